"""Turns a source into Parquet shards in the Hub's layout, of equal size, resumable and checksummed."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, List, Value
from datasets.info import DatasetInfosDict
from datasets.splits import SplitDict, SplitInfo
from huggingface_hub import DatasetCard, DatasetCardData
from PIL import Image

from ..errors import UserError
from ..files import checksum, write_whole
from ..progress import tqdm
from .rows import Source, cut_evenly, encoded, read_rows

ROWS_PER_SHARD = 1000
ROW_GROUP = 64  # rows written, and later read, at a time


def shard_dataset(
    source: Source,
    split: str,
    output: Path,
    num_shards: int | None = None,
    rows_per_shard: int = ROWS_PER_SHARD,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes `output/data/<split>-00000-of-000NN.parquet`, `output/manifest_<split>.json` and `output/README.md`.

    The shards hold the encoded images as they are, in the order of the source, and differ by one row at most. Run
    again after an interruption, it keeps the shards whose checksum is right and writes the others.
    `load_dataset(output)` and `open_source(output, split)` both read the result.

    Args:
        num_shards: by default as many as `rows_per_shard` asks for, rounded up to a multiple of 8 beyond 8, to be
            divisible by the usual numbers of ranks and workers.
        progress: whether to show a progress bar.

    Returns:
        The manifest: rows, bytes and sha256 of each shard, class names, category ids and box format.

    Raises:
        UserError: an image cannot be read, or `output` holds shards of other data.
    """
    num_rows = sum(1 for _ in read_rows(source.stream)) if source.num_rows is None else source.num_rows
    if num_shards is None:
        num_shards = -(-num_rows // rows_per_shard)
        num_shards = num_shards if num_shards <= 8 else -(-num_shards // 8) * 8
    if not 1 <= num_shards <= num_rows:
        raise UserError(f"{num_rows} rows cannot be written as {num_shards} shards")
    manifest = {
        "split": split,
        "fingerprint": source.fingerprint,
        "num_rows": num_rows,
        "box_format": "xywh",
        "class_names": source.class_names,
        "category_ids": source.category_ids,
        "shards": [],
    }
    file, partial = output / f"manifest_{split}.json", output / f"manifest_{split}.json.part"
    (output / "data").mkdir(parents=True, exist_ok=True)
    _check_other_splits(output, file, source)
    finished = _finished_shards(file, partial, manifest, num_shards)

    rows = read_rows(source.stream)
    with tqdm(total=num_rows, desc=f"shard/{split}", unit="image", disable=not progress) as bar:
        for index, length in enumerate(cut_evenly(num_rows, num_shards)):
            part = itertools.islice(rows, length)
            name = f"data/{split}-{index:05d}-of-{num_shards:05d}.parquet"
            shard = finished.get(name)
            if shard is not None and checksum(output / name) == shard["sha256"]:
                bar.update(sum(1 for _ in part))
            else:
                count = _write_shard(output / name, part, _features(source.class_names), bar)
                if count != length:
                    raise UserError(f"the source ended within {name}: did its files change meanwhile?")
                size = (output / name).stat().st_size
                shard = {"file": name, "rows": length, "bytes": size, "sha256": checksum(output / name)}
            manifest["shards"].append(shard)
            write_whole(partial, json.dumps(manifest, indent=1))
    partial.replace(file)
    _write_card(output, source)
    return manifest


def _features(class_names: list[str]) -> Features:
    return Features(
        {
            "image": datasets.Image(),
            "image_id": Value("int64"),
            "width": Value("int64"),
            "height": Value("int64"),
            "objects": {
                "bbox": List(List(Value("float64"), length=4)),
                "category": List(ClassLabel(names=class_names)),
                "area": List(Value("float64")),
                "iscrowd": List(Value("int64")),
            },
        }
    )


def _check_other_splits(output: Path, file: Path, source: Source) -> None:
    for other in output.glob("manifest_*.json"):
        if other != file and json.loads(other.read_text())["class_names"] != source.class_names:
            raise UserError(f"{other} has other class names than this split: write the splits to different folders")


def _finished_shards(file: Path, partial: Path, manifest: dict[str, Any], num_shards: int) -> dict[str, dict]:
    """The shards that an earlier run has listed, by name; its data must be those of `manifest`."""
    listed = next((path for path in (partial, file) if path.is_file()), None)
    if listed is None:
        return {}
    try:
        before = json.loads(listed.read_text())
        names = [shard["file"] for shard in before["shards"]]
        same = all(before[key] == manifest[key] for key in manifest if key != "shards")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{listed} cannot be read: delete it, and all shards are written anew") from error
    if not same:
        raise UserError(f"{listed} belongs to other data: delete {listed.parent} or name another folder")
    if names and not names[0].endswith(f"-of-{num_shards:05d}.parquet"):
        raise UserError(f"{listed} has another number of shards than {num_shards}: name another folder")
    return {shard["file"]: shard for shard in before["shards"]}


def _write_shard(path: Path, rows: Iterator[dict[str, Any]], features: Features, bar: tqdm) -> int:
    """Writes the rows beside `path` and renames the file when it is complete; how many there were."""
    schema, count = features.arrow_schema, 0
    beside = path.with_name(f"{path.name}.part")
    try:
        with pq.ParquetWriter(beside, schema) as writer:
            while group := [_stored(row) for row in itertools.islice(rows, ROW_GROUP)]:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                count += len(group)
                bar.update(len(group))
        beside.replace(path)
    except OSError as error:
        raise UserError(f"{path} could not be finished: {error}; started again, the command goes on there") from error
    finally:
        beside.unlink(missing_ok=True)
    return count


def _stored(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the bytes of its image and with its size."""
    image, path = row["image"], row["image"]["path"]
    name = f"image {row['image_id']} ({path or 'no file name'})"
    try:
        data = encoded(image)
        width, height = row["width"], row["height"]
        if width is None or height is None:
            width, height = Image.open(io.BytesIO(data)).size
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error}") from error
    image = {"bytes": data, "path": path and Path(path).name}
    return {**row, "image": image, "width": width, "height": height}


def _write_card(output: Path, source: Source) -> None:
    """The dataset card: classes and splits, from the manifests in `output`."""
    splits, names = SplitDict(), []
    for file in sorted(output.glob("manifest_*.json")):
        manifest = json.loads(file.read_text())
        size = sum(shard["bytes"] for shard in manifest["shards"])
        splits.add(SplitInfo(manifest["split"], num_bytes=size, num_examples=manifest["num_rows"]))
        names.append(f"- `{manifest['split']}`: {manifest['num_rows']} images in {len(manifest['shards'])} shards")
    data = DatasetCardData(task_categories=["object-detection"])
    info = datasets.DatasetInfo(features=_features(source.class_names), splits=splits)
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    text = (
        f"---\n{data.to_yaml()}\n---\n\n# Object detection, {len(source.class_names)} classes\n\n"
        + "\n".join(names)
        + "\n\n`objects.bbox` is [x, y, width, height] in pixels; `iscrowd` marks COCO's crowd regions. The category "
        "ids of the original annotations and the checksum of each shard are in `manifest_<split>.json`.\n"
    )
    DatasetCard(text).save(output / "README.md")
