"""Data sets whose rows hold the image beside its objects: on the Hub, saved on disk, Parquet or WebDataset shards."""

from __future__ import annotations

import io
import itertools
import json
import logging
import math
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.packaged_modules.parquet.parquet import Parquet
from PIL import Image

from ..errors import UserError
from .cache import digest
from .faults import NOTES, BadRow, bad_row, box_note, is_number, is_text, is_whole
from .rows import MAX_SHARDS, Source, cut_evenly, read_rows, stream_of

logger = logging.getLogger(__name__)

# The names in use, first come first served
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
OBJECT_COLUMNS = ("objects", "annotations")
BOX_FIELDS = ("bbox", "bboxes", "boxes")
CATEGORY_FIELDS = ("category", "categories", "category_id", "class", "classes", "label", "labels")
NAME_FIELDS = ("category_name", "category_names")
AREA_FIELDS = ("area", "areas")
CROWD_FIELDS = ("iscrowd", "iscrowds")

ARCHIVES = ("zip://", "tar://", "gzip://")  # of the Hub's data sets that images are read from
BOXES_TO_DETECT = 1000
MAX_RELATIVE = 2  # first boxes without a larger number are not in pixels; relative ones may reach a little beyond 1
FOOTERS_AT_A_TIME = 16
# Raised by rows of another form than expected
MISUNDERSTOOD = (TypeError, ValueError, LookupError, AttributeError, OverflowError)
UNKNOWN_LENGTH = 1 << 32  # rows that a shard of unknown length is taken to have, to number rows without image_id


_warned: set[str] = set()  # names of data sets of which this process has said that boxes are repaired


@dataclass
class Raw:
    """Rows as they are stored, images not decoded."""

    name: str  # for messages
    stream: datasets.IterableDataset
    lengths: list[int] | None
    fingerprint: str
    annotations: datasets.IterableDataset | None  # the same rows without their images; None where that saves nothing
    folder: Path | None = None
    repository: str | None = None  # its name on the Hub
    files: list[str] | None = None  # of each shard
    manifest: dict[str, Any] = field(default_factory=dict)


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
    raw = _open_folder(folder, split, labelled) if folder.is_dir() else _open_hub(source, split, labelled)
    if labelled:
        names, ids, known = _classes(raw)
        box_format = _box_format(raw, box_format or raw.manifest.get("box_format"))
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


# -- where the rows are -----------------------------------------------------------------------------------------------


def holds_split(folder: Path, split: str) -> bool:
    """Whether `folder` was written by `save_to_disk` or has shards of `split`."""
    return _is_saved(folder) or any(_find_shards(folder, split, suffix) for suffix in ("parquet", "tar"))


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _find_shards(folder: Path, split: str, suffix: str) -> list[Path]:
    patterns = [f"{split}.{suffix}", f"{split}-*.{suffix}", f"data/{split}-*.{suffix}", f"{split}/*.{suffix}"]
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def _open_folder(folder: Path, split: str, labelled: bool) -> Raw:
    if _is_saved(folder):
        return _open_saved(folder, split, labelled)
    manifest_file = folder / f"manifest_{split}.json"
    manifest = _read_manifest(manifest_file) if manifest_file.is_file() else {}
    for suffix in ("parquet", "tar"):
        files = _find_shards(folder, split, suffix)
        listed = [folder / shard["file"] for shard in manifest.get("shards", ()) if shard["file"].endswith(suffix)]
        if listed:
            _check_shards(manifest_file, manifest, listed, files)
        if files:
            raw = (
                _open_parquet(folder, split, files)
                if suffix == "parquet"
                else _open_tars(folder, split, files, labelled)
            )
            raw.manifest = manifest
            if listed:
                raw.fingerprint = digest([shard["sha256"] for shard in manifest["shards"]])
            return raw
    raise UserError(
        f"{folder} holds no split {split!r}: looked for annotations/instances_{split}.json, "
        f"{split}/_annotations.coco.json, a data set saved with save_to_disk, and {split}-*, data/{split}-* or "
        f"{split}/* with .parquet or .tar"
    )


def _open_saved(folder: Path, split: str, labelled: bool) -> Raw:
    data = datasets.load_from_disk(str(folder))
    splits = data if isinstance(data, datasets.DatasetDict) else {str(data.split): data}
    if split not in splits:
        raise UserError(f"{folder} has no split {split!r}; its splits: {', '.join(splits)}")
    data = splits[split].with_format(None)
    if not len(data):
        raise UserError(f"{folder}: split {split!r} has no rows")
    for column, feature in data.features.items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(column, datasets.Image(decode=False))
    num_shards = min(MAX_SHARDS, len(data))
    return Raw(
        name=f"{folder} ({split})",
        stream=data.to_iterable_dataset(num_shards=num_shards),
        lengths=cut_evenly(len(data), num_shards),
        fingerprint=data._fingerprint,
        annotations=_without_images(data).to_iterable_dataset(num_shards=1) if labelled else None,
        folder=folder,
    )


def _open_parquet(folder: Path, split: str, files: list[Path]) -> Raw:
    lengths = []
    for file in files:
        try:
            lengths.append(pq.read_metadata(file).num_rows)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file} is no Parquet file: {_first_line(error)}") from error
    if not sum(lengths):
        raise UserError(f"{folder}: split {split!r} has no rows")
    named = {"data_files": {split: [str(file) for file in files]}, "split": split, "streaming": True}
    stream = datasets.load_dataset("parquet", **named).decode(False)
    columns = [column for column in stream.column_names if column not in IMAGE_COLUMNS]
    return Raw(
        name=f"{folder} ({split})",
        stream=stream,
        lengths=lengths,
        fingerprint=digest([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]),
        annotations=datasets.load_dataset("parquet", columns=columns, **named),
        folder=folder,
        files=[str(file) for file in files],
    )


def _open_tars(folder: Path, split: str, files: list[Path], labelled: bool) -> Raw:
    # Not the webdataset builder of `datasets`: it types the JSON by the first five samples, and where their boxes are
    # whole numbers it cuts the fractions off all others.
    generate, kwargs = datasets.IterableDataset.from_generator, {"files": [str(file) for file in files]}
    return Raw(
        name=f"{folder} ({split})",
        stream=generate(_read_tars, gen_kwargs={**kwargs, "labelled": labelled}),
        lengths=None,
        fingerprint=digest([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]),
        annotations=generate(_read_tars, gen_kwargs={**kwargs, "with_images": False}),
        folder=folder,
    )


def _read_tars(files: list[str], with_images: bool = True, labelled: bool = True) -> Iterator[dict[str, Any]]:
    """Samples of WebDataset tars: neighbouring members whose names agree up to the first dot, one of them JSON if
    they are `labelled`. A sample is {"row", "fault"}, the latter saying why its JSON cannot be read, if so.
    """
    for file in files:
        empty = True
        try:
            with tarfile.open(file, "r|*") as archive:
                members = ((member, *_key_and_suffix(member.name)) for member in archive if member.isfile())
                for key, group in itertools.groupby(members, key=lambda item: item[1]):
                    row: dict[str, Any] = {}
                    fault, empty = None, False
                    for member, _, suffix in group:
                        if suffix == "json":
                            fault = _add_json(row, archive.extractfile(member).read())
                        elif suffix in IMAGE_COLUMNS and with_images:
                            row["image"] = {"bytes": archive.extractfile(member).read(), "path": member.name}
                    if labelled and fault is None and not any(column in row for column in OBJECT_COLUMNS):
                        fault = "has no .json with its objects"
                    yield {"row": row, "fault": fault and f"{file}: sample {key!r} {fault}"}
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {_first_line(error)}") from error
        if empty:  # as is a file of zeros, which a crash of the machine may leave
            raise UserError(f"{file} holds no samples")


def _add_json(row: dict[str, Any], text: bytes) -> str | None:
    """Adds the JSON of a sample to its row; why it cannot be read, if so."""
    try:
        row |= json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        return f"has a .json that cannot be read: {_first_line(error)}"
    return None


def _key_and_suffix(name: str) -> tuple[str, str]:
    base, _, suffix = PurePosixPath(name).name.partition(".")
    return str(PurePosixPath(name).parent / base), suffix.lower()


def _open_hub(source: str, split: str, labelled: bool = True) -> Raw:
    """A data set on the Hub. Where it lies there as Parquet, its lengths are known; else they are None.

    Lengths that cannot be read are an error, not None: ranks that disagree on them would wait for each other.
    """
    try:
        builder = datasets.load_dataset_builder(source)
        stream = builder.as_streaming_dataset(split=split)
        lengths = None
        if isinstance(builder, Parquet) and split in builder.config.data_files:
            with ThreadPoolExecutor(FOOTERS_AT_A_TIME) as pool:
                lengths = list(pool.map(_count_rows, builder.config.data_files[split]))
        fingerprint = digest(source, split, str(stream.info.version), sorted(stream.info.download_checksums or ()))
    except Exception as error:  # whatever the Hub's client and the network raise
        raise UserError(
            f"source {source!r}, split {split!r}: no such folder, and not to be had from the Hub: "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error
    inferred = _leaf(_find((stream.features or {}).get("json") or {}, OBJECT_COLUMNS)) or {}
    if labelled and any(_leaf(inferred[name]).dtype.startswith("int") for name in BOX_FIELDS if name in inferred):
        raise UserError(
            f"source {source!r}: its first boxes are whole numbers, and `datasets` would cut off the fractions "
            "of the others: download its tar files and give their folder"
        )
    if stream.features:
        stream = stream.decode(False)
    return Raw(
        name=source,
        stream=stream,
        lengths=lengths,
        fingerprint=fingerprint,
        annotations=None,
        repository=source,
    )


def _count_rows(url: str) -> int:
    """Rows of a Parquet file, from its footer alone."""
    with fsspec.open(url, "rb") as file:
        return pq.read_metadata(file).num_rows


def _without_images(data: datasets.Dataset) -> datasets.Dataset:
    return data.remove_columns([column for column in IMAGE_COLUMNS if column in data.column_names])


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(file.read_text())
        names = manifest["class_names"]
        ids = manifest.get("category_ids", list(range(len(names))))
        shards = [(PurePosixPath(s["file"]), s["bytes"], s["sha256"]) for s in manifest.get("shards", ())]
        if not (isinstance(names, list) and all(map(is_text, names)) and all(map(is_whole, ids))):
            raise TypeError("class_names must be texts and category_ids integers")
        if len(set(names)) < len(names) or len(set(ids)) < len(ids):
            raise ValueError("two classes have one name or category id")
        if (form := manifest.get("box_format")) not in (None, "xywh", "xyxy"):
            raise ValueError(f"box_format is {form!r}, not xywh or xyxy")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is no manifest: {type(error).__name__}: {error}") from error
    if any(path.is_absolute() or ".." in path.parts for path, *_ in shards):
        raise UserError(f"{file} lists a shard outside its folder")
    if len(ids) != len(names):
        raise UserError(f"{file} has {len(names)} class_names but {len(ids)} category_ids")
    return manifest


def _check_shards(manifest_file: Path, manifest: dict[str, Any], listed: list[Path], files: list[Path]) -> None:
    """Compares a manifest's shards with the files that exist, by names and sizes."""
    if missing := [str(file) for file in listed if not file.is_file()]:
        raise UserError(f"{manifest_file} lists files that are missing: {', '.join(missing)}")
    if extra := [str(file) for file in files if file not in listed]:
        raise UserError(f"{manifest_file} does not list {', '.join(extra)}: delete them or write the shards anew")
    for file, shard in zip(listed, manifest["shards"], strict=True):
        if file.stat().st_size != shard["bytes"]:
            raise UserError(
                f"{file} has {file.stat().st_size} bytes but {manifest_file} says {shard['bytes']}: write it anew"
            )


# -- what the rows mean -----------------------------------------------------------------------------------------------


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
        for number, stored in enumerate(_read_shard(self.stream, shard, self.files, self.name), start=first):
            try:
                row = self.row(stored, number)
            except BadRow as error:
                if not self.keep_bad:
                    raise
                row = bad_row(error, self._id(stored, number), None)
            yield row

    def _id(self, stored: dict[str, Any], number: int) -> int:
        """The id of a bad row, its number where it has none."""
        image_id = (stored["row"] if _is_sample(stored) else stored).get("image_id")
        return image_id if self.known is not None and is_whole(image_id) else number

    def row(self, stored: dict[str, Any], number: int) -> dict[str, Any]:
        """A stored row in the form of `rows`, or a BadRow; UserError where the machine is to blame."""
        try:
            return self._row(_flat(stored), number)
        except UserError:
            raise
        except MISUNDERSTOOD as error:
            raise BadRow("row", f"{self.name}: row {number} is not understood: {_first_line(error)}") from error

    def _row(self, stored: dict[str, Any], number: int) -> dict[str, Any]:
        image_id = None if self.known is None else stored.get("image_id")
        image_id = number if image_id is None else image_id
        size = stored.get("width"), stored.get("height")
        name = f"{self.name}: image {image_id}"
        if not is_whole(image_id):
            why = f"{self.name}: image_id {image_id!r:.80} of row {number} is not an integer, or not below 2^62"
            raise BadRow("image id", why)
        return {
            "image": self._image(_find(stored, IMAGE_COLUMNS), name),
            "image_id": image_id,
            "width": size[0],
            "height": size[1],
            "objects": None if self.known is None else self._checked(_objects(stored, name), size, name),
        }

    def _checked(self, objects: dict[str, Any], size: tuple[int | None, int | None], name: str) -> dict[str, list]:
        """The objects of image `name` with boxes as xywh and categories as class indices."""
        boxes = objects.pop("bbox")
        for index, box in enumerate(boxes):
            if not _is_box(box):
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
                raise UserError(f"{name} ({image['path']}) cannot be read: {_first_line(error)}") from error
        if self.folder is not None:
            folder = self.folder.resolve()
            path = (folder / image["path"]).resolve()
            if path.is_relative_to(folder):
                return {"bytes": None, "path": str(path)}
        raise BadRow("file name", f"{name} is only named, and {image['path']!r} is not inside the data set")


def _read_shard(
    stream: datasets.IterableDataset, shard: int, files: list[str] | None, name: str
) -> Iterator[dict[str, Any]]:
    """The rows of one shard; a file that breaks off is the user's error, which names it."""
    try:
        yield from read_rows(stream.shard(num_shards=stream.num_shards, index=shard))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name if files is None else files[shard]} cannot be read: {_first_line(error)}") from error


def _read_all(raw: Raw, stream: datasets.IterableDataset) -> Iterator[dict[str, Any]]:
    """All rows of a stream of `raw`, shard by shard."""
    for shard in range(stream.num_shards):
        yield from _read_shard(stream, shard, raw.files, raw.name)


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


def _is_box(box: list[float | None] | None) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(map(is_number, box))


def _is_sample(stored: dict[str, Any]) -> bool:
    """Whether this is what `_read_tars` gives."""
    return set(stored) == {"row", "fault"}


def _flat(stored: dict[str, Any]) -> dict[str, Any]:
    """A WebDataset sample's JSON as columns."""
    if _is_sample(stored):
        if stored["fault"] is not None:
            raise BadRow("row", stored["fault"])
        return stored["row"]
    return {**stored, **stored["json"]} if isinstance(stored.get("json"), dict) else stored


def _find(mapping: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((mapping[name] for name in names if mapping.get(name) is not None), None)


def _objects(stored: dict[str, Any], name: str) -> dict[str, Any]:
    """bbox, category, area and iscrowd of a row as lists; the last two are None where the row has none."""
    objects = _find(stored, OBJECT_COLUMNS)
    if objects == [] or (objects is None and any(column in stored for column in OBJECT_COLUMNS)):
        return {"bbox": [], "category": [], "area": None, "iscrowd": None}
    if isinstance(objects, list):  # one dictionary an object
        keys = dict.fromkeys(key for item in objects for key in item)
        objects = {key: [item.get(key) for item in objects] for key in keys}
        objects = {key: None if all(v is None for v in values) else values for key, values in objects.items()}
    if not isinstance(objects, dict):
        raise BadRow("row", f"{name} has no objects: looked for the columns {', '.join(OBJECT_COLUMNS)}")
    boxes, categories = _find(objects, BOX_FIELDS), _find(objects, (*CATEGORY_FIELDS, *NAME_FIELDS))
    if boxes is None or categories is None:
        raise BadRow(
            "row",
            f"{name}: its objects have {', '.join(objects)}: a field of {', '.join(BOX_FIELDS)} and one of "
            f"{', '.join(CATEGORY_FIELDS)} are needed",
        )
    return {
        "bbox": list(boxes),
        "category": list(categories),
        "area": _find(objects, AREA_FIELDS),
        "iscrowd": _find(objects, CROWD_FIELDS),
    }


def _leaf(feature: Any) -> Any:
    while hasattr(feature, "feature"):
        feature = feature.feature
    return feature


def _classes(raw: Raw) -> tuple[list[str], list[int], dict[int | str, int]]:
    """Class names, category ids, and the class index of each category as it is stored."""
    if raw.manifest:
        names = raw.manifest["class_names"]
        return names, raw.manifest.get("category_ids", list(range(len(names)))), {i: i for i in range(len(names))}
    features = raw.stream.features or {}
    objects = _leaf(_find({**features, **(features.get("json") or {})}, OBJECT_COLUMNS)) or {}
    label = _leaf(_find(objects, CATEGORY_FIELDS))
    if isinstance(label, datasets.ClassLabel):
        names = label.names
        return names, list(range(len(names))), {i: i for i in range(len(names))}
    found = _scan_names(raw)
    numbers = all(isinstance(category, int) for category in found)
    if not numbers and any(isinstance(category, int) for category in found):
        raise UserError(f"{raw.name}: some categories are numbers and others names: {', '.join(map(repr, found))}")
    names = [found[category] for category in sorted(found)]
    if len(set(names)) < len(names):
        raise UserError(f"{raw.name}: two categories have the same name among {', '.join(names)}")
    ids = sorted(found) if numbers else list(range(len(found)))
    return names, ids, {category: index for index, category in enumerate(sorted(found))}


def _scan_names(raw: Raw) -> dict[int | str, str]:
    """The name of every category, from the names that stand beside the numbers or instead of them."""
    found: dict[int | str, str] = {}
    if raw.annotations is not None:
        logger.info("%s: reading all annotations once for the names of the classes", raw.name)
        for stored in _read_all(raw, raw.annotations):
            for category, name in _named_categories(stored):
                if found.setdefault(category, name) != name:
                    raise UserError(f"{raw.name}: category {category!r} is named {found[category]!r} and {name!r}")
    if not found:
        raise UserError(
            f"{raw.name}: its categories are numbers without names: store them as ClassLabel, or put "
            'manifest_<split>.json with {"class_names": [...]} into the folder of the shards'
        )
    return found


def _named_categories(stored: dict[str, Any]) -> list[tuple[int | str, str]]:
    """(category, name) of the objects of a row; none of a bad row, which the reader reports."""
    pairs = []
    try:
        objects = _find(_flat(stored), OBJECT_COLUMNS)
        for item in objects if isinstance(objects, list) else [objects]:
            categories, names = _find(item, CATEGORY_FIELDS), _find(item, NAME_FIELDS)
            names = categories if names is None else names
            categories = names if categories is None else categories
            if not isinstance(categories, list):
                categories, names = [categories], [names]
            pairs += zip(categories or (), names or (), strict=True)
    except MISUNDERSTOOD:
        return []
    return [(category, name) for category, name in pairs if isinstance(category, int | str) and isinstance(name, str)]


def _box_format(raw: Raw, stated: str | None) -> str:
    """The stated box format, or the one that the first boxes prove; both must be in pixels."""
    boxes = _first_boxes(raw)
    if stated is None:
        boxes = list(boxes)
    _check_pixels(raw.name, boxes)  # reads no further than to the first box that is in pixels
    return stated or _detect_box_format(raw.name, boxes)


def _first_boxes(raw: Raw) -> Iterator[tuple[list[float], int, tuple[float, float]]]:
    """(box as it is stored, image id, (width, height) of the image) of the first boxes."""
    count = 0
    for number, stored in enumerate(_read_all(raw, raw.stream)):
        try:
            stored = _flat(stored)
            image_id = stored.get("image_id", number)
            boxes = _objects(stored, f"{raw.name}: image {image_id}")["bbox"]
        except MISUNDERSTOOD:
            continue  # a bad row, which the reader reports
        size = _size(stored) if boxes else (0, 0)
        yield from ((box, image_id, size) for box in boxes if _is_box(box))
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
    image = _find(stored, IMAGE_COLUMNS)
    data = image.get("bytes") if isinstance(image, dict) else image
    try:
        return Image.open(io.BytesIO(data)).size
    except (OSError, TypeError):
        return math.inf, math.inf  # unknown: excludes nothing


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no details")
