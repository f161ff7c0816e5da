"""A COCO folder as a source: its JSON is parsed once into a memory-mapped index, its images stay files."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
from datasets import Features, List, Value

from ..errors import UserError
from .cache import build_once, cache_root, digest
from .rows import MAX_SHARDS, Source, cut_evenly, read_rows, stream_of

logger = logging.getLogger(__name__)

INDEX_VERSION = 2  # of the index on disk
FEATURES = Features(
    {
        "image_id": Value("int64"),
        "file_name": Value("string"),
        "width": Value("int64"),
        "height": Value("int64"),
        "objects": {
            "bbox": List(List(Value("float64"), length=4)),
            "category": List(Value("int64")),
            "area": List(Value("float64")),
            "iscrowd": List(Value("int64")),
        },
    }
)


@dataclass
class CocoReader:
    """Reads the rows of one shard of the index, joined with the paths of their images."""

    index: datasets.IterableDataset
    images: Path
    labelled: bool

    def __call__(self, shard: int) -> Iterator[dict[str, Any]]:
        part = self.index.shard(num_shards=self.index.num_shards, index=shard)
        for row in read_rows(part, batch_size=256):
            path = str(self.images / row.pop("file_name"))
            row["objects"] = row["objects"] if self.labelled else None
            yield {"image": {"bytes": None, "path": path}, **row}


def open_coco(root: Path, split: str, labelled: bool = True) -> Source:
    """The split of `root/annotations/instances_<split>.json`, its images in `root/<split>/` or `root/images/<split>/`.

    Boxes without area (or outside their image) stay in the ground truth but give no label in training; they are
    counted in a warning. A missing `area` is that of the box, a missing `iscrowd` is 0.

    Args:
        labelled: False takes the images alone: annotations and categories are not read and need not be there, and
            `annotations/image_info_<split>.json`, as COCO names such files, will do as well.

    Raises:
        UserError: a file or folder is missing, or an annotation is wrong; the line names it.
    """
    kinds = ("instances_",) if labelled else ("instances_", "image_info_")
    files = [root / "annotations" / f"{kind}{split}.json" for kind in kinds]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        splits = {p.stem.removeprefix(kind) for kind in kinds for p in files[0].parent.glob(f"{kind}*.json")}
        names = " or ".join(map(str, files))
        raise UserError(f"{names} does not exist; splits of {root}: {', '.join(sorted(splits)) or 'none'}")
    stat = file.stat()
    key = digest(INDEX_VERSION, str(file.resolve()), stat.st_size, stat.st_mtime_ns)
    name = f"{split}-{key}" if labelled else f"{split}-{key}-images"
    folder = build_once(cache_root() / "coco" / name, lambda new: _build_index(file, new, labelled))
    about = json.loads((folder / "about.json").read_text())
    if about["boxes_without_area"]:
        logger.warning(
            "%s: %d boxes have no area inside their image: ground truth as they stand, but no training labels",
            file,
            about["boxes_without_area"],
        )
    rows = datasets.load_from_disk(str(folder / "rows"))
    images = _image_folder(root, split, rows[0]["file_name"])
    num_shards = min(MAX_SHARDS, len(rows))
    reader = CocoReader(rows.to_iterable_dataset(num_shards=num_shards), images, labelled)
    return Source(
        stream=stream_of(reader, num_shards),
        class_names=about["class_names"],
        category_ids=about["category_ids"],
        shard_lengths=cut_evenly(len(rows), num_shards),
        fingerprint=digest(about["sha256"], labelled),  # wherever the folder lies
    )


def _image_folder(root: Path, split: str, file_name: str) -> Path:
    folders = [root / split, root / "images" / split]
    for folder in folders:
        if (folder / file_name).is_file():
            return folder
    for folder in folders:
        if folder.is_dir():
            return folder  # the reader names each image that is missing
    raise UserError(f"no images of split {split!r}: neither {folders[0]} nor {folders[1]} is a folder")


def _build_index(file: Path, folder: Path, labelled: bool) -> None:
    """Checks the annotation file and writes `rows` (a data set of `FEATURES`) and `about.json` into `folder`."""
    try:
        data = file.read_bytes()
        contents = json.loads(data)
        images = contents["images"]
        annotations, categories = (contents[key] if labelled else [] for key in ("annotations", "categories"))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no COCO annotation file: {type(error).__name__}: {error}") from error
    if not images or (labelled and not categories):
        raise UserError(f"{file} has no {'images' if not images else 'categories'}")
    try:
        categories = sorted((int(category["id"]), str(category["name"])) for category in categories)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: every category needs an integer id and a name") from error
    ids, names = [category_id for category_id, _ in categories], [name for _, name in categories]
    for what, values in (("id", ids), ("name", names)):
        if len(set(values)) < len(values):
            repeated = next(value for value in values if values.count(value) > 1)
            raise UserError(f"{file}: two categories have the {what} {repeated!r}")

    class_index = {category_id: index for index, category_id in enumerate(ids)}
    rows = {row["image_id"]: row for row in (_image_row(image, file) for image in images)}
    if len(rows) < len(images):
        raise UserError(f"{file}: {len(images) - len(rows)} image ids are used twice")
    without_area = 0
    for annotation in annotations:
        without_area += _add_annotation(annotation, rows, class_index, file)
    columns = {name: [row[name] for row in rows.values()] for name in FEATURES}
    datasets.Dataset.from_dict(columns, features=FEATURES).save_to_disk(str(folder / "rows"))
    about = {"class_names": names, "category_ids": ids, "boxes_without_area": without_area}
    about["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "about.json").write_text(json.dumps(about))


def _image_row(image: dict[str, Any], file: Path) -> dict[str, Any]:
    try:
        image_id, name = image["id"], image["file_name"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: an image lacks its id or file_name: {image}") from error
    if not isinstance(image_id, int):
        raise UserError(f"{file}: image id {image_id!r} is not an integer")
    if not isinstance(name, str) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise UserError(f"{file}: file_name {name!r} of image {image_id} leaves the image folder")
    size = {key: image.get(key) for key in ("width", "height")}
    if any(not isinstance(value, int) or value < 1 for value in size.values() if value is not None):
        raise UserError(f"{file}: image {image_id} needs a whole number of pixels as width and height: {size}")
    return {
        "image_id": image_id,
        "file_name": name,
        **size,
        "objects": {"bbox": [], "category": [], "area": [], "iscrowd": []},
    }


def _add_annotation(annotation: dict, rows: dict[int, dict], class_index: dict[int, int], file: Path) -> bool:
    """Adds an annotation to the row of its image; whether its box has no area inside the image."""
    name = f"{file}: annotation {annotation.get('id')}"
    row = rows.get(annotation.get("image_id"))
    if row is None:
        raise UserError(f"{name} is of image {annotation.get('image_id')!r}, which is not in the file")
    category = class_index.get(annotation.get("category_id"))
    if category is None:
        raise UserError(f"{name} is of category {annotation.get('category_id')!r}, which is not in the file")
    box, area = annotation.get("bbox"), annotation.get("area")
    try:
        x, y, w, h = (float(value) for value in box)
        area = w * h if area is None else float(area)
    except (TypeError, ValueError):
        raise UserError(f"{name} needs bbox [x, y, width, height] and a number as area: {box}, {area}") from None
    if not all(map(math.isfinite, (x, y, w, h, area))) or w < 0 or h < 0:
        raise UserError(f"{name} has box {box} and area {area}: sizes must not be negative, and all must be finite")
    objects = row["objects"]
    objects["bbox"].append([x, y, w, h])
    objects["category"].append(category)
    objects["area"].append(area)
    objects["iscrowd"].append(int(annotation.get("iscrowd") or 0))
    width, height = row["width"] or math.inf, row["height"] or math.inf
    return min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0)
