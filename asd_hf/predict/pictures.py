"""Boxes and their labels drawn into pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..files import written_beside

# Of Okabe and Ito and of Tol, in an order that keeps neighbours apart for colour-blind eyes too
COLOURS = ("#E69F00", "#0072B2", "#F0E442", "#CC79A7", "#009E73", "#D55E00", "#56B4E9", "#882255")
DARK, LIGHT = "#111111", "#FFFFFF"
SMALL = 480  # pixels of the longer side up to which pictures are enlarged, by whole factors: text needs room
LEAST_FONT = 12  # pixels
QUALITY = 90  # of JPEG and WebP
CROWDED = 0.15  # of a label's area that others may cover before it gives up its score, and then its name


def draw_boxes(image: Image.Image, rows: np.ndarray, class_names: Sequence[str], emphasis: float = 1.0) -> Image.Image:
    """A picture of `image` with boxes, each with class and score where there is room; small images are enlarged.

    Every box has two lines, a light and a dark one, so that it shows on any ground. Labels stay inside the picture and
    take the place where they cover least of each other, those of the best boxes first.

    Args:
        rows: (K, 6) of (x, y, w, h, score, class index) in pixels of `image`, the best first.
        emphasis: of lines and letters, above 1 for pictures that will be shown small.
    """
    factor = max(1, SMALL // max(image.size))
    size = image.width * factor, image.height * factor
    picture = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    scale = emphasis * (picture.width * picture.height) ** 0.5
    line, font = max(2, round(scale / 320)), _font(max(LEAST_FONT, round(scale / 48)))
    boxes = [_corners(row[:4] * factor, picture.size, line) for row in rows]
    for box, row in reversed(list(zip(boxes, rows, strict=True))):  # the best one last, on top
        colour = COLOURS[int(row[5]) % len(COLOURS)]
        draw.rectangle(_grown(box, 1), outline=_contrast(colour), width=line + 2)
        draw.rectangle(box, outline=colour, width=line)
    labels = place_labels([(class_names[int(row[5])], row[4]) for row in rows], boxes, picture.size, font)
    for text, place, row in reversed(list(zip(*labels, rows, strict=True))):
        if text:
            colour = COLOURS[int(row[5]) % len(COLOURS)]
            draw.rectangle(place, fill=colour, outline=_contrast(colour))
            middle = (place[0] + place[2]) / 2, (place[1] + place[3]) / 2
            draw.text(middle, text, _contrast(colour), font, anchor="mm")
    return picture


def place_labels(
    labels: Sequence[tuple[str, float]],
    boxes: Sequence[tuple[int, ...]],
    size: tuple[int, int],
    font: ImageFont.FreeTypeFont,
) -> tuple[list[str], list[tuple[int, ...]]]:
    """What is written beside each box and where (left, top, right, bottom): less where it is crowded, or "".

    Args:
        labels: name and score of each box, the best first.
        boxes: (left, top, right, bottom).
        size: (width, height) of the picture, which no label leaves.
    """
    texts, places, taken = [], [], np.zeros((0, 4))
    height = sum(font.getmetrics())
    for (name, score), box in zip(labels, boxes, strict=True):
        for text in (f"{name} {score:.2f}", name, ""):
            text = _shortened(text, size[0], font)
            choice = _places(box, round(font.getlength(text)) + font.size // 2, height, size)
            covered = _covered(choice, taken)
            if covered.min() <= CROWDED:
                break
        place = choice[covered.argmin()]
        texts.append(text)
        places.append(tuple(place.tolist()))
        taken = np.vstack([taken, place]) if text else taken
    return texts, places


def save_picture(picture: Image.Image, file: Path) -> None:
    """Writes a picture whole, in the format of its name."""
    kind = Image.registered_extensions()[file.suffix.lower()]
    options = {"quality": QUALITY} if kind in ("JPEG", "WEBP") else {}
    with written_beside(file) as beside:
        picture.save(beside, kind, **options)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # Matplotlib brings a font that knows more letters than Pillow's own
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans-Bold.ttf", size)


def _contrast(colour: str) -> str:
    """Dark beside a light colour, light beside a dark one."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return DARK if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 > 0.18 else LIGHT


def _corners(box: np.ndarray, size: tuple[int, int], line: int) -> tuple[int, ...]:
    """(left, top, right, bottom) in whole pixels that can be drawn with both lines inside a picture of this size."""
    x, y, w, h = box
    (left, right), (top, bottom) = (
        np.clip(np.rint((start, start + length)), 1, side - 2).astype(int)
        for start, length, side in ((x, w, size[0]), (y, h, size[1]))
    )
    return int(left), int(top), int(right), int(bottom)


def _grown(box: Sequence[int], by: int) -> tuple[int, ...]:
    return box[0] - by, box[1] - by, box[2] + by, box[3] + by


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """The text, its end cut off as far as it is wider than the picture."""
    if font.getlength(text) + font.size // 2 < width:
        return text
    while len(text) > 1 and font.getlength(f"{text}…") + font.size // 2 >= width:
        text = text[:-1]
    return f"{text}…"


def _places(box: tuple[int, ...], width: int, height: int, size: tuple[int, int]) -> np.ndarray:
    """Where a label may stand, (N, 4), the best place first, moved into the picture."""
    left, top, right, bottom = box
    x = [left, right - width, left, right - width, left, right - width, left, right - width]
    y = [top - height, top - height, top, top, bottom, bottom, bottom - height, bottom - height]
    x = np.clip(x, 0, max(0, size[0] - 1 - width))
    y = np.clip(y, 0, max(0, size[1] - 1 - height))
    return np.stack([x, y, x + width, y + height], 1)


def _covered(places: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Of each place, the share of its area that lies under those taken; parts may count twice."""
    first = np.maximum(places[:, None, :2], taken[None, :, :2])
    last = np.minimum(places[:, None, 2:], taken[None, :, 2:])
    return np.clip(last - first, 0, None).prod(2).sum(1) / (places[:, 2:] - places[:, :2]).prod(1)
