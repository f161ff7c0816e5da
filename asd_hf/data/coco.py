"""A COCO folder as a source: its JSON is parsed once into a memory-mapped index, its images stay files."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
from datasets import Features, List, Value

from ..errors import UserError
from .cache import build_once, cache_root, digest
from .faults import NOTES, BadRow, Fault, bad_row, box_note, first_of, is_number, is_text, is_whole
from .rows import MAX_SHARDS, Source, cut_evenly, read_rows, stream_of

logger = logging.getLogger(__name__)

INDEX_VERSION = 3  # of the index on disk
BESIDE_IMAGES = "_annotations.coco.json"  # the name under which Roboflow puts it among a split's images
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
    root: Path
    images: Path
    labelled: bool
    keep_bad: bool

    def __call__(self, shard: int) -> Iterator[dict[str, Any]]:
        inside = [self.root.resolve(), self.images.resolve()]
        part = self.index.shard(num_shards=self.index.num_shards, index=shard)
        for row in read_rows(part, batch_size=256):
            path = str(self.images / row.pop("file_name"))
            row["objects"] = row["objects"] if self.labelled else None
            row = {"image": {"bytes": None, "path": path}, **row}
            if not any(Path(os.path.realpath(path)).is_relative_to(folder) for folder in inside):
                name = f"image {row['image_id']} ({path})"
                error = BadRow("file name", f"{name} is a link to a file outside {self.root}")
                if not self.keep_bad:
                    raise error
                row = bad_row(error, row["image_id"], path)
            yield row


@dataclass
class ImageFiles:
    """The paths of all images of an index; picklable, as it travels with its source."""

    index: datasets.Dataset
    images: Path

    def __iter__(self) -> Iterator[Path]:
        return (self.images / name for name in self.index["file_name"])


def is_coco(root: Path, split: str) -> bool:
    """Whether `open_coco` is what reads this folder."""
    return (root / "annotations").is_dir() or (root / split / BESIDE_IMAGES).is_file()


def open_coco(root: Path, split: str, labelled: bool = True, keep_bad: bool = False) -> Source:
    """The split of `root/annotations/instances_<split>.json`, or of `root/<split>/_annotations.coco.json`.

    File names begin in the first of `root/<split>/`, `root/images/<split>/`, `root/images/` and `root` that has the
    first image; where one of the first two is there, the image must lie in it, whatever the others have by its name.
    Boxes without area (or outside their image) stay in the ground truth but give no label in training,
    and boxes that reach beyond their image are cut; both are counted in a warning. A missing `area` is the box's own,
    a missing `iscrowd` is 0.

    Args:
        labelled: False takes the images alone: annotations and categories are not read and need not be there, and
            `annotations/image_info_<split>.json`, as COCO names such files, will do as well.
        keep_bad: leave out the images that the file says wrong things of, and list them in `faults`, where otherwise
            they are an error.

    Raises:
        UserError: a file or folder is missing, or an annotation is wrong; the line names it.
    """
    kinds = ("instances_",) if labelled else ("instances_", "image_info_")
    files = [root / "annotations" / f"{kind}{split}.json" for kind in kinds] + [root / split / BESIDE_IMAGES]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        splits = {p.stem.removeprefix(kind) for kind in kinds for p in files[0].parent.glob(f"{kind}*.json")}
        names = " or ".join(map(str, files[:-1]))
        raise UserError(f"{names} does not exist; splits of {root}: {', '.join(sorted(splits)) or 'none'}")
    stat = file.stat()
    key = digest(INDEX_VERSION, str(file.resolve()), stat.st_size, stat.st_mtime_ns)
    name = f"{split}-{key}" if labelled else f"{split}-{key}-images"
    folder = build_once(cache_root() / "coco" / name, lambda new: _build_index(file, new, labelled))
    about = json.loads((folder / "about.json").read_text())
    faults = [Fault(**fault) for fault in about["faults"]]
    if faults and not keep_bad:
        raise first_of(faults)
    for note, count in about["notes"].items():
        logger.warning("%s: %d x %s: %s", file, count, note, NOTES[note])
    rows = datasets.load_from_disk(str(folder / "rows"))
    if not len(rows):
        raise first_of(faults)
    images = _image_folder(root, split, rows[0]["file_name"])
    num_shards = min(MAX_SHARDS, len(rows))
    reader = CocoReader(rows.to_iterable_dataset(num_shards=num_shards), root, images, labelled, keep_bad)
    return Source(
        stream=stream_of(reader, num_shards),
        class_names=about["class_names"],
        category_ids=about["category_ids"],
        shard_lengths=cut_evenly(len(rows), num_shards),
        fingerprint=digest(about["sha256"], labelled),  # wherever the folder lies
        faults=faults,
        notes=about["notes"],
        files=ImageFiles(rows, images),
    )


def _image_folder(root: Path, split: str, file_name: str) -> Path:
    folders = [root / split, root / "images" / split, root / "images", root]
    own = [folder for folder in folders[:2] if folder.is_dir()]
    for folder in folders:
        file = folder / file_name
        if file.is_file() and (not own or any(file.is_relative_to(place) for place in own)):
            return folder
    if own:
        return own[0]  # the reader names each image that is missing
    raise UserError(f"no images of split {split!r}: {file_name} is in none of {', '.join(map(str, folders))}")


def read_images(file: Path) -> tuple[list[dict[str, Any]], list[int], list[str]]:
    """The images of an annotation file, whose annotations are neither read nor needed, and its categories.

    Returns:
        `image_id`, `file_name`, `width` and `height` (None where not stated) of each image, in the file's order; ids
        and names of the categories, by id.

    Raises:
        UserError: the file cannot be read or has no images or categories, or an image is not as it must be.
    """
    _, parts, ids, names = _read(file, ("images", "categories"))
    rows, faults = _image_rows(parts["images"], file)
    if faults:
        raise first_of(faults)
    return list(rows.values()), ids, names


def _read(file: Path, keys: Sequence[str]) -> tuple[bytes, dict[str, list], list[int], list[str]]:
    """An annotation file: its bytes, the lists of those `keys`, and ids and names of the categories, by id."""
    try:
        raw = file.read_bytes()
        contents = json.loads(raw)
        parts = {key: contents[key] for key in keys}
        if not all(isinstance(part, list) for part in parts.values()):
            raise TypeError("images, annotations and categories must be lists")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is no COCO annotation file: {type(error).__name__}: {error}") from error
    for key in ("images", "categories"):
        if key in parts and not parts[key]:
            raise UserError(f"{file} has no {key}")
    try:
        categories = [(category["id"], category["name"]) for category in parts.get("categories", [])]
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: every category needs an id and a name") from error
    for category_id, name in categories:
        if not is_whole(category_id) or not is_text(name):
            what = f"category {category_id!r:.80} with the name {name!r:.80}"
            raise UserError(f"{file}: {what}: its id must be an integer below 2^62, and its name a text")
    categories.sort()
    ids, names = [category_id for category_id, _ in categories], [name for _, name in categories]
    for what, values in (("id", ids), ("name", names)):
        if len(set(values)) < len(values):
            repeated = next(value for value in values if values.count(value) > 1)
            raise UserError(f"{file}: two categories have the {what} {repeated!r}")
    return raw, parts, ids, names


def _build_index(file: Path, folder: Path, labelled: bool) -> None:
    """Reads the annotation file and writes `rows` (a data set of `FEATURES`, of the good images) and `about.json`."""
    keys = ("images", "annotations", "categories") if labelled else ("images",)
    raw, parts, ids, names = _read(file, keys)
    class_index = {category_id: index for index, category_id in enumerate(ids)}
    rows, faults = _image_rows(parts["images"], file)
    known = {row["image_id"] for row in rows.values()} | {fault.image_id for fault in faults}
    counts = dict.fromkeys(NOTES, 0)
    lost: dict[int, list[str]] = {}  # image id that is not in the file -> its annotations
    for annotation in parts.get("annotations", []):
        image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
        row = rows.get(image_id) if is_whole(image_id) else None
        try:
            if row is not None:
                note = _add_annotation(annotation, row, class_index, file)
                counts[note] = counts.get(note, 0) + 1
            elif not is_whole(image_id):
                raise BadRow("annotation", f"{_name(annotation, file)} is of image {image_id!r:.80}, which cannot be")
            elif image_id not in known:
                lost.setdefault(image_id, []).append(_name(annotation, file))
        except BadRow as error:
            # The whole image: with one object unmarked it would teach that nothing is there
            faults.append(Fault(error.kind, image_id if row else None, row and row["file_name"], str(error)))
            rows.pop(image_id if row else None, None)
    for image_id, its in lost.items():
        others = f", as are {len(its) - 1} others" if len(its) > 1 else ""
        why = f"{its[0]} is of image {image_id}, which is not in the file{others}"
        faults.append(Fault("annotation", image_id, None, why))
    columns = {name: [row[name] for row in rows.values()] for name in FEATURES}
    with _without_bars():
        datasets.Dataset.from_dict(columns, features=FEATURES).save_to_disk(str(folder / "rows"))
    about = {
        "class_names": names,
        "category_ids": ids,
        "faults": [asdict(fault) for fault in faults],
        "notes": {note: count for note in NOTES if (count := counts[note])},
        "sha256": hashlib.sha256(raw).hexdigest(),
    }
    (folder / "about.json").write_text(json.dumps(about))


@contextmanager
def _without_bars() -> Iterator[None]:
    """Within, `datasets` shows no progress of its own: an index is written in a moment."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _image_rows(images: list, file: Path) -> tuple[dict[int, dict], list[Fault]]:
    """The rows by image id, still without objects, and what is wrong with the images that have none."""
    rows: dict[int, dict] = {}
    faults: list[Fault] = []
    ids = Counter(image["id"] for image in images if isinstance(image, dict) and is_whole(image.get("id")))
    for image in images:
        about = image if isinstance(image, dict) else {}
        try:
            row = _image_row(image, file)
            if ids[row["image_id"]] > 1:  # annotations may belong to any of them
                raise BadRow("image id", f"{file}: {ids[row['image_id']]} images have the id {row['image_id']}")
            rows[row["image_id"]] = row
        except BadRow as error:
            image_id, name = about.get("id"), about.get("file_name")
            image_id, name = image_id if is_whole(image_id) else None, name if is_text(name) else None
            faults.append(Fault(error.kind, image_id, name, str(error)))
    return rows, faults


def _image_row(image: Any, file: Path) -> dict[str, Any]:
    try:
        image_id, name = image["id"], image["file_name"]
    except (KeyError, TypeError):
        raise BadRow("row", f"{file}: an image lacks its id or file_name: {image!r:.80}") from None
    if not is_whole(image_id):
        raise BadRow("image id", f"{file}: image id {image_id!r:.80} is not an integer, or not below 2^62")
    if not is_text(name) or PurePosixPath(name).is_absolute() or ".." in (parts := PurePosixPath(name).parts):
        raise BadRow("file name", f"{file}: file_name {name!r:.200} of image {image_id} leaves the image folder")
    if not parts or "\0" in name:
        raise BadRow("file name", f"{file}: file_name {name!r:.200} of image {image_id} is no name of a file")
    size = {key: image.get(key) for key in ("width", "height")}
    if any(not is_whole(value) or value < 1 for value in size.values() if value is not None):
        raise BadRow(
            "stated size", f"{file}: image {image_id} needs a whole number of pixels as width and height: {size}"
        )
    return {
        "image_id": image_id,
        "file_name": name,
        **size,
        "objects": {"bbox": [], "category": [], "area": [], "iscrowd": []},
    }


def _name(annotation: Any, file: Path) -> str:
    return f"{file}: annotation {annotation.get('id') if isinstance(annotation, dict) else annotation!r:.80}"


def _add_annotation(annotation: dict, row: dict, class_index: dict[int, int], file: Path) -> str | None:
    """Adds an annotation to the row of its image; what is to be noted of its box."""
    name, category_id = _name(annotation, file), annotation.get("category_id")
    category = class_index.get(category_id) if is_number(category_id) else None
    if category is None:
        raise BadRow("category", f"{name} is of category {category_id!r:.80}, which is not in the file")
    box, area, crowd = annotation.get("bbox"), annotation.get("area"), annotation.get("iscrowd")
    if not isinstance(box, list) or len(box) != 4:
        raise BadRow("box", f"{name} needs bbox [x, y, width, height], not {box!r:.80}")
    if not all(map(is_number, box)) or box[2] < 0 or box[3] < 0:
        raise BadRow("box", f"{name} has box {box!r:.80}: sizes must not be negative, and all must be finite numbers")
    x, y, w, h = map(float, box)
    area = w * h if area is None else area
    if not is_number(area):
        raise BadRow("box", f"{name} has area {area!r:.80}: it must be a finite number")
    if crowd not in (None, 0, 1):
        raise BadRow("box", f"{name} has iscrowd {crowd!r:.80}: it must be 0 or 1")
    objects = row["objects"]
    objects["bbox"].append([x, y, w, h])
    objects["category"].append(category)
    objects["area"].append(float(area))
    objects["iscrowd"].append(int(crowd or 0))
    return box_note((x, y, w, h), row["width"] or math.inf, row["height"] or math.inf)
