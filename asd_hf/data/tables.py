"""Data sets whose rows hold the image beside its objects: on the Hub, saved on disk, Parquet or WebDataset shards."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import fsspec

from ..errors import UserError
from .box_format import find_box_format
from .cache import digest
from .categories import find_classes
from .columns import IMAGE_COLUMNS, MISUNDERSTOOD, find, first_line, flat, is_box, is_sample, objects_of
from .faults import NOTES, BadRow, bad_row, box_note, is_number, is_whole
from .rows import Source, stream_of
from .stored import open_folder, open_hub, read_shard

logger = logging.getLogger(__name__)

ARCHIVES = ("zip://", "tar://", "gzip://")  # of the Hub's data sets that images are read from
UNKNOWN_LENGTH = 1 << 32  # rows that a shard of unknown length is taken to have, to number rows without image_id

_warned: set[str] = set()  # names of data sets of which this process has said that boxes are repaired


def open_table(
    source: str, split: str, box_format: str | None, labelled: bool = True, keep_bad: bool = False
) -> Source:
    """Opens a split of a folder of `save_to_disk`, of Parquet or WebDataset shards, or of a data set on the Hub.

    Class names come from `manifest_<split>.json`, from a ClassLabel, or from a `category_name` beside the numbers. The
    box format is `box_format`, else the manifest's, else the only one that the first boxes allow. Rows without
    `image_id` are numbered in their order.

    Args:
        labelled: False takes the images alone, numbered in their order: objects are not read and need not be there.
        keep_bad: give `faults.bad_row` in place of a row that cannot be used, which is an error otherwise.

    Raises:
        UserError: the source, the split, class names or box format are not to be found, or do not fit the rows; or
            the first boxes are relative to their images.
    """
    folder = Path(source).expanduser()
    raw = open_folder(folder, split, labelled) if folder.is_dir() else open_hub(source, split, labelled)
    if labelled:
        names, ids, known = find_classes(raw)
        box_format = find_box_format(raw, box_format or raw.manifest.get("box_format"))
    else:
        names, ids, known, box_format = [], [], None, None
    reader = TableReader(
        raw.stream, raw.lengths, known, box_format == "xyxy", raw.folder, raw.repository, raw.name, raw.files, keep_bad
    )
    return Source(
        stream=stream_of(reader, raw.stream.num_shards),
        class_names=names,
        category_ids=ids,
        shard_lengths=raw.lengths,
        fingerprint=digest(raw.fingerprint, box_format, names, ids),
    )


@dataclass
class TableReader:
    """Reads the rows of one shard and checks them."""

    stream: datasets.IterableDataset
    lengths: list[int] | None
    known: dict[int | str, int] | None  # a category as it is stored -> class index; None does not read the objects
    corners: bool  # boxes are stored as two corners
    folder: Path | None
    repository: str | None
    name: str
    files: list[str] | None = None  # of each shard, for messages
    keep_bad: bool = False

    def __call__(self, shard: int) -> Iterator[dict[str, Any]]:
        first = shard * UNKNOWN_LENGTH if self.lengths is None else sum(self.lengths[:shard])
        for number, stored in enumerate(read_shard(self.stream, shard, self.files, self.name), start=first):
            try:
                row = self.row(stored, number)
            except BadRow as error:
                if not self.keep_bad:
                    raise
                row = bad_row(error, self._id(stored, number), None)
            yield row

    def _id(self, stored: dict[str, Any], number: int) -> int:
        """The id of a bad row, its number where it has none."""
        image_id = (stored["row"] if is_sample(stored) else stored).get("image_id")
        return image_id if self.known is not None and is_whole(image_id) else number

    def row(self, stored: dict[str, Any], number: int) -> dict[str, Any]:
        """A stored row in the form of `rows`, or a BadRow; UserError where the machine is to blame."""
        try:
            return self._row(flat(stored), number)
        except UserError:
            raise
        except MISUNDERSTOOD as error:
            raise BadRow("row", f"{self.name}: row {number} is not understood: {first_line(error)}") from error

    def _row(self, stored: dict[str, Any], number: int) -> dict[str, Any]:
        image_id = None if self.known is None else stored.get("image_id")
        image_id = number if image_id is None else image_id
        size = stored.get("width"), stored.get("height")
        name = f"{self.name}: image {image_id}"
        if not is_whole(image_id):
            why = f"{self.name}: image_id {image_id!r:.80} of row {number} is not an integer, or not below 2^62"
            raise BadRow("image id", why)
        return {
            "image": self._image(find(stored, IMAGE_COLUMNS), name),
            "image_id": image_id,
            "width": size[0],
            "height": size[1],
            "objects": None if self.known is None else self._checked(objects_of(stored, name), size, name),
        }

    def _checked(self, objects: dict[str, Any], size: tuple[int | None, int | None], name: str) -> dict[str, list]:
        """The objects of image `name` with boxes as xywh and categories as class indices."""
        boxes = objects.pop("bbox")
        for index, box in enumerate(boxes):
            if not is_box(box):
                raise BadRow("box", f"{name}: box {index} is {box!r:.80}: it must be four finite numbers")
            x, y, w, h = map(float, box)
            w, h = (w - x, h - y) if self.corners else (w, h)
            if w < 0 or h < 0:
                stated = "xyxy" if self.corners else "xywh"
                why = f"{name}: box {index} is {box}: as {stated} its size is negative; see data.box_format"
                raise BadRow("box", why)
            boxes[index] = [x, y, w, h]
        categories = []
        for category in objects["category"]:
            if isinstance(category, bool) or category not in self.known:  # to Python, true is 1
                classes = len(set(self.known.values()))
                raise BadRow("category", f"{name}: category {category!r:.80} is not among the {classes} classes")
            categories.append(self.known[category])
        self._warn(boxes, size, name)
        count = len(boxes)
        area = [w * h for _, _, w, h in boxes] if objects["area"] is None else list(objects["area"])
        crowd = [0] * count if objects["iscrowd"] is None else list(objects["iscrowd"])
        if {len(categories), len(area), len(crowd)} != {count}:
            raise BadRow(
                "row",
                f"{name}: {count} boxes, but {len(categories)} categories, {len(area)} areas, {len(crowd)} iscrowd",
            )
        if not all(map(is_number, area)) or not {0, 1}.issuperset(crowd):
            raise BadRow("box", f"{name}: every area must be a finite number and every iscrowd 0 or 1")
        area, crowd = list(map(float, area)), list(map(int, crowd))
        return {"bbox": boxes, "category": categories, "area": area, "iscrowd": crowd}

    def _warn(self, boxes: list[list[float]], size: tuple[int | None, int | None], name: str) -> None:
        """Says once a process that boxes are repaired; they are counted where all are read before training."""
        if self.name in _warned or self.keep_bad:
            return
        width, height = (math.inf if side is None else side for side in size)
        if note := next(filter(None, (box_note(box, width, height) for box in boxes)), None):
            _warned.add(self.name)
            logger.warning("%s: %s: %s; `asd-hf check-data` counts all", name, note, NOTES[note])

    def _image(self, image: Any, name: str) -> dict[str, Any]:
        """The encoded bytes of an image, read from its file if the row only names one."""
        if isinstance(image, bytes):
            image = {"bytes": image, "path": None}
        elif isinstance(image, str):
            image = {"bytes": None, "path": image}
        if not isinstance(image, dict) or (image.get("bytes") is None and image.get("path") is None):
            raise BadRow("missing image", f"{name} has no image: looked in the columns {', '.join(IMAGE_COLUMNS)}")
        if image["bytes"] is not None:
            return {"bytes": image["bytes"], "path": image["path"]}
        if self.repository is not None and _is_in_repository(image["path"], self.repository):
            try:
                with fsspec.open(image["path"], "rb") as file:
                    return {"bytes": file.read(), "path": image["path"]}
            except FileNotFoundError:
                raise BadRow("missing image", f"{name} ({image['path']}) is missing") from None
            except OSError as error:
                raise UserError(f"{name} ({image['path']}) cannot be read: {first_line(error)}") from error
        if self.folder is not None:
            folder = self.folder.resolve()
            path = (folder / image["path"]).resolve()
            if path.is_relative_to(folder):
                return {"bytes": None, "path": str(path)}
        raise BadRow("file name", f"{name} is only named, and {image['path']!r} is not inside the data set")


def _is_in_repository(url: str, repository: str) -> bool:
    """Whether `url` names a file of a data set on the Hub, possibly inside archives that lie there.

    The rows are written by others: any other chain of fsspec's could read local files or ask any server.
    """
    *archives, file = url.split("::")
    roots = (f"hf://datasets/{repository}@", f"hf://datasets/{repository}/")
    return (
        file.startswith(roots)
        and ".." not in file.split("/")
        and all(archive.startswith(ARCHIVES) for archive in archives)
    )
