"""Predictions as COCO's tools read them, written as they come."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ..files import written_beside
from .detect import Detections

PREDICTIONS, IMAGES = "predictions.json", "images.json"


class Results:
    """Adds images to the two files of `open_results`."""

    def __init__(self, predictions: TextIO, images: TextIO, category_ids: Sequence[int]) -> None:
        self.predictions, self.images = _ListWriter(predictions), _ListWriter(images)
        self.category_ids = category_ids

    def add(self, found: Detections) -> None:
        frame = found.frame
        height, width = frame.pixels.shape[1:]
        about = {"id": frame.image_id, "file_name": frame.name, "width": width, "height": height}
        if frame.video is not None:
            about |= {"video": frame.video, "frame": frame.number}
        self.images.add(about)
        for *box, score, label in found.rows.tolist():
            category = self.category_ids[int(label)]
            self.predictions.add({"image_id": frame.image_id, "category_id": category, "bbox": box, "score": score})


class _ListWriter:
    """Items of a JSON list, a line each."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.separator = stream, "\n"

    def add(self, item: dict[str, Any]) -> None:
        self.stream.write(self.separator + json.dumps(item))
        self.separator = ",\n"


@contextmanager
def open_results(folder: Path, category_ids: Sequence[int], class_names: Sequence[str]) -> Iterator[Results]:
    """`predictions.json` (COCO's result format) and `images.json` (images and categories, as an annotation file has
    them) in `folder`. They take their places when the block ends; of a block that fails nothing is left.

    Args:
        category_ids, class_names: of each class index.
    """
    with (
        written_beside(folder / PREDICTIONS) as first,
        written_beside(folder / IMAGES) as second,
        first.open("w", encoding="utf-8") as predictions,
        second.open("w", encoding="utf-8") as images,
    ):
        predictions.write("[")
        images.write('{"images": [')
        yield Results(predictions, images, category_ids)
        categories = [{"id": i, "name": name} for i, name in zip(category_ids, class_names, strict=True)]
        predictions.write("\n]\n")
        images.write(f'\n],\n"categories": {json.dumps(categories)}}}\n')
