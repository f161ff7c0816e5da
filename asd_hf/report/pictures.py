"""Images on which one model gains or loses most against another, with the boxes of all models."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from itertools import islice

import numpy as np
import torchvision.transforms.v2.functional as F
from PIL import Image
from torch import Tensor

from ..data.rows import read_rows
from ..data.transforms import decode
from ..evaluation.matches import NOTHING, Matches, image_ap
from .blocks import Box, Gallery, Picture, Text, View
from .models import REFERENCE, STUDENT, TEACHER, Evaluation, Model

MOST_TAGS = 12  # boxes of a view whose names are written beside them
TAG, LETTER = 0.05, 0.68  # height of a name in widths of the image, width of a letter in heights
LONGEST_SIDE, QUALITY = 480, 70  # of an embedded image: pixels, and WebP's
MEASURE = (
    "Image AP: the AP (IoU 0.50 to 0.95) of one image alone, with its detections of all classes in one ranking, so "
    "that false alarms of any class count."
)


def galleries(evaluation: Evaluation, count: int) -> list[Gallery | Text]:
    """`count` images on which the student gains most, and as many on which it loses most.

    Against the reference, if there is one; else against the teacher; alone, its best and its worst images.
    """
    seen = evaluation.seen
    if STUDENT not in seen or not count:
        return []
    student = seen[STUDENT]
    other = seen.get(REFERENCE, seen.get(TEACHER))
    ours = image_aps(student)
    theirs = {} if other is None else image_aps(other)
    gains = {i: ap - theirs.get(i, 0.0) for i, ap in ours.items()}
    order = sorted(gains, key=lambda i: (-gains[i], i))
    up = order[:count]
    down = [i for i in order[::-1] if i not in up][:count]
    titles = "Best images", "Worst images"
    if other is not None:
        up, down = [i for i in up if gains[i] > 0], [i for i in down if gains[i] < 0]
        if not up + down:
            return [Text(f"On no image does the student differ from the {other.name}. {MEASURE}")]
        titles = f"Most improved against the {other.name}", f"Most worsened against the {other.name}"
    pixels = read_images(evaluation, {*up, *down})
    names = evaluation.source.class_names
    return [
        Gallery(title, [_picture(i, pixels[i], evaluation, names, ours, theirs, other) for i in ids], TAG, note)
        for title, ids, note in zip(titles, (up, down), (_note(seen), ""), strict=True)
        if ids
    ]


def image_aps(model: Model) -> dict[int, float]:
    """Image AP by image id, of images with objects."""
    found = {image_id: image_ap(matches) for image_id, matches in model.matches.items()}
    return {image_id: ap for image_id, ap in found.items() if ap is not None}


def read_images(evaluation: Evaluation, ids: set[int]) -> dict[int, Tensor]:
    """uint8 pixels (3, H, W) by image id; the data is read as far as the last of them."""
    pixels: dict[int, Tensor] = {}
    for row in islice(read_rows(evaluation.source.stream), evaluation.num_images):
        if row["image_id"] in ids:
            pixels[row["image_id"]] = decode(row)
            if len(pixels) == len(ids):
                break
    return pixels


def embed(pixels: Tensor) -> tuple[str, int, int]:
    """A data URI of an image, made small, and its width and height."""
    height, width = pixels.shape[-2:]
    scale = min(1.0, LONGEST_SIDE / max(height, width))
    image = F.to_pil_image(pixels)
    if scale < 1:
        image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}", *image.size


def _note(seen: dict[str, Model]) -> str:
    shown = ", ".join(f"{model.threshold:.2f} ({name})" for name, model in seen.items())
    return (
        f"{MEASURE} Boxes are shown from these scores on: {shown}. Blue: right at IoU 0.50; orange: wrong; "
        "yellow, dotted, in the ground truth: the student misses it. Hold the pointer over a box for its class and "
        "score."
    )


def _picture(
    image_id: int,
    pixels: Tensor,
    evaluation: Evaluation,
    names: Sequence[str],
    ours: dict[int, float],
    theirs: dict[int, float],
    other: Model | None,
) -> Picture:
    uri, width, height = embed(pixels)
    scale = np.array([width / pixels.shape[-1], height / pixels.shape[-2]] * 2)
    title = f"Image {image_id}: image AP {100 * ours[image_id]:.0f}"
    if other is not None:
        title += f", {other.name} {100 * theirs.get(image_id, 0.0):.0f}"
    seen = evaluation.seen
    student = seen[STUDENT]
    views = [_view("ground truth", _objects(student.matches[image_id], student.threshold, names, scale), width)]
    for name in (TEACHER, REFERENCE, STUDENT):
        if name in seen and image_id in seen[name].matches:
            model = seen[name]
            views.append(_view(name, _detections(model.matches[image_id], model.threshold, names, scale), width))
    return Picture(f"image-{image_id}", title, uri, width, height, views)


def _view(title: str, boxes: list[Box], width: int) -> View:
    """Names stand at the boxes, of the best first, where they cover no other; `boxes` have the best at the end."""
    height, taken, shown = TAG * width, [], []
    for box in reversed(boxes):
        y = max(box.y, height)
        long = LETTER * height * len(box.name)
        x = max(0.0, min(box.x, width - long))
        name = x, y - height, x + long, y
        free = not any(name[0] < t[2] and t[0] < name[2] and name[1] < t[3] and t[1] < name[3] for t in taken)
        tag = free and len(boxes) <= MOST_TAGS
        taken += [name] * tag
        shown.append(box._replace(tag=(round(x, 1), round(y, 1)) if tag else None))
    return View(title, shown[::-1])


def _objects(matches: Matches, threshold: float, names: Sequence[str], scale: np.ndarray) -> list[Box]:
    hits = set(matches.found[0][matches.scores >= threshold].tolist()) - {NOTHING}
    return [
        Box(*_scaled(box, scale), names[label], "truth" if index in hits else "missed")
        for index, (box, label) in enumerate(zip(matches.object_boxes, matches.objects, strict=True))
    ]


def _detections(matches: Matches, threshold: float, names: Sequence[str], scale: np.ndarray) -> list[Box]:
    boxes = []
    for row in np.flatnonzero(matches.scores >= threshold)[::-1]:  # the best on top
        right = matches.found[0, row] != NOTHING or matches.ignored[0, row]
        name = f"{names[matches.labels[row]]} {matches.scores[row]:.2f}"
        boxes.append(Box(*_scaled(matches.boxes[row], scale), name, "right" if right else "wrong"))
    return boxes


def _scaled(box: np.ndarray, scale: np.ndarray) -> list[float]:
    return [round(value, 1) for value in (np.maximum(box, [-np.inf, -np.inf, 0, 0]) * scale).tolist()]
