"""The generated data set "shapes": coloured shapes on textured ground, written as an ordinary COCO folder.

Small enough to train on with a CPU in minutes, and with what makes COCO awkward: three sizes of object, occlusion,
crowds and empty images.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..errors import UserError
from ..progress import tqdm

CLASS_NAMES = ("circle", "square", "triangle", "star", "cross")
SPLITS = ("train", "val")
EMPTY_SHARE, CROWD_SHARE = 0.03, 0.03  # of the images
MAX_CONTRAST = 300  # any ground has colours further from it than that: grey ones are 382 from black and white
MAX_OVERLAP = 0.35  # intersection of two boxes over the smaller one
SIZES = (14 / 128, 108 / 128)  # longer side of an object over the side of the image
SUPERSAMPLING = 4  # of the masks, against jagged edges


def make_shapes(
    root: Path,
    num_train: int = 2000,
    num_val: int = 400,
    image_size: int = 128,
    seed: int = 0,
    max_objects: int = 4,
    contrast: int = 110,
    progress: bool = True,
) -> None:
    """Writes `annotations/instances_{train,val}.json` and `{train,val}/*.jpg` under `root`.

    An image depends on (seed, split, index) alone, so a larger data set begins with the images of a smaller one.
    A box is the extent of the visible pixels of its object, and `area` is the area of the box (there are no masks).

    Args:
        image_size: side of the square images in pixels; the objects grow with it. COCO's three sizes of object (limits
            32^2 and 96^2 pixels) all exist at 128.
        max_objects: at most so many objects an image; more of them also overlap more often.
        contrast: least difference of an object's colour from the ground behind it, summed over the three channels.
        progress: whether to show a progress bar.

    Raises:
        UserError: `root` holds something already, or a number is out of range.
    """
    if min(num_train, num_val, max_objects) < 1 or image_size < 32:
        raise UserError("shapes: at least one image a split, one object and an image size of 32 pixels are needed")
    if contrast > MAX_CONTRAST:
        raise UserError(f"shapes: contrast {contrast} is not to be had before every ground: at most {MAX_CONTRAST}")
    if root.exists() and any(root.iterdir()):
        raise UserError(f"{root} is not empty: name a new folder for the generated data set")
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split, count in zip(SPLITS, (num_train, num_val), strict=True):
        (root / split).mkdir(exist_ok=True)
        images, annotations = [], []
        for index in tqdm(range(count), desc=f"shapes/{split}", unit="image", disable=not progress):
            pixels, objects = render(
                image_size, np.random.default_rng([seed, SPLITS.index(split), index]), max_objects, contrast
            )
            name = f"{index:06d}.jpg"
            Image.fromarray(pixels).save(root / split / name, quality=95, subsampling=0)
            images.append({"id": index + 1, "file_name": name, "width": image_size, "height": image_size})
            for category, (x, y, w, h), iscrowd in objects:
                # ids start at 1: pycocotools takes a match with annotation 0 for no match
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "category_id": category + 1,
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": iscrowd,
                    }
                )
        categories = [{"id": i + 1, "name": name, "supercategory": "shape"} for i, name in enumerate(CLASS_NAMES)]
        info = {"description": "asd_hf shapes", "seed": seed, "image_size": image_size}
        contents = {"info": info, "images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(contents))


def render(
    size: int, rng: np.random.Generator, max_objects: int = 4, contrast: int = 110
) -> tuple[np.ndarray, list[tuple[int, list[int], int]]]:
    """One image: uint8 pixels (size, size, 3) and its objects as (class index, [x, y, w, h], iscrowd)."""
    canvas = _background(size, rng)
    owner = np.full((size, size), -1)  # which object is seen at each pixel
    kind = rng.random()
    number = 0 if kind < EMPTY_SHARE else int(rng.integers(1, max_objects + 1))
    crowd = EMPTY_SHARE <= kind < EMPTY_SHARE + CROWD_SHARE
    placed: list[tuple[int, int]] = []  # (class index, iscrowd) of each object painted
    taken: list[tuple[float, float, float, float]] = []
    for _ in range(4 * number):  # a place that overlaps too much is given up, so an image can hold fewer
        if len(placed) == number:
            break
        as_crowd = crowd and not placed
        smallest, largest = (0.3, 0.5) if as_crowd else SIZES
        side = size * math.exp(rng.uniform(math.log(smallest), math.log(largest)))
        x, y = rng.uniform(0, size - side, 2)
        box = (x, y, x + side, y + side)
        if any(_overlap(box, other) > MAX_OVERLAP for other in taken):
            continue
        category = int(rng.integers(len(CLASS_NAMES)))
        colour = _contrasting(
            canvas[int(y) : int(y + side) + 1, int(x) : int(x + side) + 1].mean((0, 1)), contrast, rng
        )
        if as_crowd:
            for row, column in ((r, c) for r in range(3) for c in range(3)):
                if (row, column) != (1, 1) and rng.random() < 0.25:
                    continue
                member = side / 3 * rng.uniform(0.7, 1.0)
                at = x + column * side / 3, y + row * side / 3
                _paint(canvas, owner, len(placed), category, at, member, colour, rng)
        else:
            _paint(canvas, owner, len(placed), category, (x, y), side, colour, rng)
        placed.append((category, int(as_crowd)))
        taken.append(box)
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * rng.uniform(1, 5)
    objects = []
    for index, (category, iscrowd) in enumerate(placed):
        ys, xs = np.nonzero(owner == index)
        if len(xs):
            x, y = int(xs.min()), int(ys.min())
            objects.append((category, [x, y, int(xs.max()) + 1 - x, int(ys.max()) + 1 - y], iscrowd))
    return canvas.clip(0, 255).astype(np.uint8), objects


def _background(size: int, rng: np.random.Generator) -> np.ndarray:
    """Float pixels (size, size, 3): smooth blobs of colour with a grating across them."""
    cells = int(rng.integers(2, 6))
    blobs = (rng.integers(0, 256, 3) + rng.normal(0, 40, (cells, cells, 3))).clip(0, 255).astype(np.uint8)
    ground = np.asarray(Image.fromarray(blobs).resize((size, size), Image.Resampling.BICUBIC)).astype(np.float32)
    return ground + _grating(size, size, rng.uniform(0, 14), size / rng.uniform(4, 20), rng)


def _grating(height: int, width: int, amplitude: float, wavelength: float, rng: np.random.Generator) -> np.ndarray:
    """Stripes (height, width, 1) of brightness in a random direction."""
    angle, phase = rng.uniform(0, 2 * math.pi, 2)
    y, x = np.ogrid[:height, :width]
    waves = np.sin((x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / wavelength) + phase)
    return (amplitude * waves).astype(np.float32)[..., None]


def _contrasting(ground: np.ndarray, contrast: int, rng: np.random.Generator) -> np.ndarray:
    """A random colour whose difference from `ground`, summed over the channels, is above `contrast`."""
    while True:
        colour = rng.integers(0, 256, 3).astype(np.float32)
        if np.abs(colour - ground).sum() > contrast:
            return colour


def _paint(canvas, owner, index: int, category: int, corner, side: float, colour, rng: np.random.Generator) -> None:
    """Paints one shape of class `category` whose longer side is `side` pixels, its upper left corner at `corner`."""
    points = _outline(CLASS_NAMES[category], rng.uniform(0, 2 * math.pi)) * side + np.asarray(corner)
    left, top = np.floor(points.min(0)).astype(int).clip(0)
    right, bottom = np.minimum(np.ceil(points.max(0)).astype(int), canvas.shape[1::-1])
    width, height = int(right - left), int(bottom - top)
    mask = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    ImageDraw.Draw(mask).polygon([tuple(p) for p in (points - (left, top)) * SUPERSAMPLING], fill=255)
    alpha = np.asarray(mask.reduce(SUPERSAMPLING)).astype(np.float32)[..., None] / 255
    texture = colour + _grating(height, width, rng.uniform(0, 22), side / rng.uniform(1.5, 5), rng)
    window = np.s_[top:bottom, left:right]
    canvas[window] += alpha * (texture - canvas[window])
    owner[window][alpha[..., 0] > 0.5] = index


def _outline(name: str, angle: float) -> np.ndarray:
    """The corners (N, 2) of a shape turned by `angle`, moved and scaled to begin at 0 with a longer side of 1."""
    if name == "cross":
        a = 0.3  # half the width of an arm
        arm = np.array([(a, -1), (a, -a), (1, -a)])
        quarter = np.array([(0, 1), (-1, 0)])
        points = np.concatenate([arm @ np.linalg.matrix_power(quarter, k) for k in range(4)])
    else:
        count = {"circle": 48, "square": 4, "triangle": 3, "star": 10}[name]
        radius = np.where(np.arange(count) % 2, 0.45, 1.0) if name == "star" else np.ones(count)
        turn = np.arange(count) * (2 * math.pi / count)
        points = radius[:, None] * np.stack([np.cos(turn), np.sin(turn)], 1)
    points = points @ np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    points = points - points.min(0)
    return points / points.max()


def _overlap(a, b) -> float:
    """Intersection of two (x1, y1, x2, y2) boxes over the smaller of their areas."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(0.0, width) * max(0.0, height) / smaller
