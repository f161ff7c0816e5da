"""Where rows are stored: folders of `save_to_disk`, Parquet and WebDataset shards, repositories on the Hub."""

from __future__ import annotations

import itertools
import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.packaged_modules.parquet.parquet import Parquet

from ..errors import UserError
from .cache import digest
from .coco import BESIDE_IMAGES
from .columns import BOX_FIELDS, IMAGE_COLUMNS, OBJECT_COLUMNS, find, first_line, leaf
from .faults import is_text, is_whole
from .rows import MAX_SHARDS, cut_evenly, read_rows

FOOTERS_AT_A_TIME = 16


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


def open_folder(folder: Path, split: str, labelled: bool) -> Raw:
    """A folder of `save_to_disk` or of shards, with its manifest if there is one."""
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
        f"{split}/* with .parquet or .tar; splits found: {', '.join(sorted(_splits(folder))) or 'none'}"
    )


def open_hub(source: str, split: str, labelled: bool = True) -> Raw:
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
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    inferred = leaf(find((stream.features or {}).get("json") or {}, OBJECT_COLUMNS)) or {}
    if labelled and any(leaf(inferred[name]).dtype.startswith("int") for name in BOX_FIELDS if name in inferred):
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


def holds_split(folder: Path, split: str) -> bool:
    """Whether `folder` was written by `save_to_disk` or has shards of `split`."""
    return _is_saved(folder) or any(_find_shards(folder, split, suffix) for suffix in ("parquet", "tar"))


def read_shard(
    stream: datasets.IterableDataset, shard: int, files: list[str] | None, name: str
) -> Iterator[dict[str, Any]]:
    """The rows of one shard; a file that breaks off is the user's error, which names it."""
    try:
        yield from read_rows(stream.shard(num_shards=stream.num_shards, index=shard))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name if files is None else files[shard]} cannot be read: {first_line(error)}") from error


def read_all(raw: Raw, stream: datasets.IterableDataset) -> Iterator[dict[str, Any]]:
    """All rows of a stream of `raw`, shard by shard."""
    for shard in range(stream.num_shards):
        yield from read_shard(stream, shard, raw.files, raw.name)


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _find_shards(folder: Path, split: str, suffix: str) -> list[Path]:
    patterns = [f"{split}.{suffix}", f"{split}-*.{suffix}", f"data/{split}-*.{suffix}", f"{split}/*.{suffix}"]
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def _splits(folder: Path) -> set[str]:
    """Those that shards, and files of annotations among images, are named by."""
    folders = {path.parent.name for path in folder.glob(f"*/{BESIDE_IMAGES}")}
    shards = [
        path for suffix in ("parquet", "tar") for depth in ("", "*/") for path in folder.glob(f"{depth}*.{suffix}")
    ]
    named = (folder, folder / "data")  # a shard in these begins with the name of its split
    return folders | {p.stem.partition("-")[0] if p.parent in named else p.parent.name for p in shards}


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
            raise UserError(f"{file} is no Parquet file: {first_line(error)}") from error
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
            raise UserError(f"{file} cannot be read: {first_line(error)}") from error
        if empty:  # as is a file of zeros, which a crash of the machine may leave
            raise UserError(f"{file} holds no samples")


def _add_json(row: dict[str, Any], text: bytes) -> str | None:
    """Adds the JSON of a sample to its row; why it cannot be read, if so."""
    try:
        row |= json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        return f"has a .json that cannot be read: {first_line(error)}"
    return None


def _key_and_suffix(name: str) -> tuple[str, str]:
    base, _, suffix = PurePosixPath(name).name.partition(".")
    return str(PurePosixPath(name).parent / base), suffix.lower()


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
