"""What may be wrong with one row of a data set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError

# What stops a run under `data.bad_rows: raise`, and what to do about it
REMEDIES = {
    "missing image": "put the file there, or take the image out of the annotations",
    "broken image": "get the file again, or take the image out of the annotations",
    "deep image": "convert it to 8 bits a channel",
    "large image": "scale it down, and its boxes with it",
    "other size": "correct width and height; the boxes may belong to another size or orientation",
    "file name": "put the file itself into the folder of the images, and name it by its path there",
    "image id": "give each image a whole number of its own below 2^62",
    "stated size": "state width and height as whole numbers of pixels, or leave them out",
    "box": "correct or remove the annotation",
    "many boxes": "cut the image into tiles, or set data.max_boxes",
    "category": "list the category, or remove the annotation",
    "annotation": "list its image, or remove the annotation",
    "row": "correct the row as the documentation of data.source has it, or remove it",
}
# What is repaired or only worth a look: it stops nothing
NOTES = {
    "box without area": "gives no label in training, stays in the ground truth: remove it",
    "clipped box": "reaches more than a pixel beyond its image and is cut there: is its size that of this image?",
    "EXIF orientation": "is ignored, as COCO's boxes are: were these drawn on the turned image?",
}


@dataclass(frozen=True)
class Fault:
    """Why one row is left out, or what a note of `NOTES` is about.

    An image that is not listed, though there are annotations of it, counts as a bad row too.
    """

    kind: str  # of REMEDIES or NOTES
    image_id: int | None
    file: str | None
    why: str


class BadRow(UserError):
    """One row cannot be used, the others can; `kind` is a key of `REMEDIES`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self):
        return BadRow, (self.kind, str(self))  # it comes out of a loader's worker


def box_note(box: Sequence[float], width: float, height: float) -> str | None:
    """The note of `NOTES` on a box (x, y, width, height) in an image of `width` x `height` pixels, if any."""
    x, y, w, h = box
    if min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0):
        return "box without area"
    return "clipped box" if min(x, y, width - x - w, height - y - h) < -1 else None


def is_whole(value: object) -> bool:
    """Whether `value` is a whole number below 2^62, as image ids must be: that bit marks unlabelled images."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 62


def is_number(value: object) -> bool:
    """Whether `value` is a finite number that a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def is_text(value: object) -> bool:
    """Whether `value` is a string that can be written as UTF-8."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def bad_row(error: BadRow, image_id: int | None, file: str | None) -> dict[str, Any]:
    """What a reader that keeps bad rows gives in place of one: a row of `fault` alone."""
    return {"fault": Fault(error.kind, image_id, file, str(error))}


def first_of(faults: Sequence[Fault]) -> UserError:
    """The error that names the first fault and counts the others."""
    others = f" (and {len(faults) - 1} more: `asd-hf check-data` lists them)" if len(faults) > 1 else ""
    return UserError(f"{faults[0].why}{others}")
