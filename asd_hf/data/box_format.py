"""Whether stored boxes are corners or sizes: as stated, or as the first ones prove."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

from PIL import Image

from ..errors import UserError
from .columns import IMAGE_COLUMNS, MISUNDERSTOOD, find, flat, is_box, objects_of
from .faults import is_number
from .stored import Raw, read_all

logger = logging.getLogger(__name__)

BOXES_TO_DETECT = 1000
MAX_RELATIVE = 2  # first boxes without a larger number are not in pixels; relative ones may reach a little beyond 1


def find_box_format(raw: Raw, stated: str | None) -> str:
    """The stated box format, or the one that the first boxes prove; both must be in pixels."""
    boxes = _first_boxes(raw)
    if stated is None:
        boxes = list(boxes)
    _check_pixels(raw.name, boxes)  # reads no further than to the first box that is in pixels
    return stated or _detect_box_format(raw.name, boxes)


def _first_boxes(raw: Raw) -> Iterator[tuple[list[float], int, tuple[float, float]]]:
    """(box as it is stored, image id, (width, height) of the image) of the first boxes."""
    count = 0
    for number, stored in enumerate(read_all(raw, raw.stream)):
        try:
            stored = flat(stored)
            image_id = stored.get("image_id", number)
            boxes = objects_of(stored, f"{raw.name}: image {image_id}")["bbox"]
        except MISUNDERSTOOD:
            continue  # a bad row, which the reader reports
        size = _size(stored) if boxes else (0, 0)
        yield from ((box, image_id, size) for box in boxes if is_box(box))
        count += len(boxes)
        if count >= BOXES_TO_DETECT:
            return


def _check_pixels(name: str, boxes: Iterable[tuple[list[float], int, tuple[float, float]]]) -> None:
    relative = None
    for box, image_id, size in boxes:
        if max(*box, 0) > MAX_RELATIVE or min(size) <= MAX_RELATIVE:
            return
        if relative is None and max(box) > 0:
            relative = f"{box} of image {image_id}"
    if relative is not None:
        raise UserError(f"{name}: its boxes look relative, in [0, 1] (box {relative}): absolute pixels are needed")


def _detect_box_format(name: str, boxes: list[tuple[list[float], int, tuple[float, float]]]) -> str:
    """The box format that the boxes leave possible: xyxy where no corner is before the other, xywh where no box
    reaches more than a pixel beyond its image.
    """
    possible = {"xywh": None, "xyxy": None}  # format -> the box that excludes it
    for (a, b, c, d), image_id, (width, height) in boxes:
        if possible["xyxy"] is None and (c < a or d < b):
            possible["xyxy"] = f"box {[a, b, c, d]} of image {image_id} has its corners in the wrong order"
        if possible["xywh"] is None and (a + c > width + 1 or b + d > height + 1):
            possible["xywh"] = f"box {[a, b, c, d]} of image {image_id} would reach beyond {width}x{height} pixels"
    left = [form for form, reason in possible.items() if reason is None]
    if len(left) == 1:
        other = next(form for form in possible if form != left[0])
        logger.info("%s: boxes are %s: as %s, %s", name, left[0], other, possible[other])
        return left[0]
    why = "both fit" if left else f"neither fits ({'; '.join(possible.values())})"
    raise UserError(f"{name}: xywh or xyxy boxes? Of the first {len(boxes)} boxes {why}: set data.box_format")


def _size(stored: dict[str, Any]) -> tuple[float, float]:
    """(width, height) of a row's image, as stated or read from the head of the file."""
    size = stored.get("width"), stored.get("height")
    if all(map(is_number, size)) and all(size):
        return size
    image = find(stored, IMAGE_COLUMNS)
    data = image.get("bytes") if isinstance(image, dict) else image
    try:
        return Image.open(io.BytesIO(data)).size
    except (OSError, TypeError):
        return math.inf, math.inf  # unknown: excludes nothing
