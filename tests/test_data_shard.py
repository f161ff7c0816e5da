from __future__ import annotations

import hashlib
import json
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest

from asd_hf.commands import shard as shard_command
from asd_hf.data import open_source, shard_dataset
from asd_hf.data import shard as shard_module
from asd_hf.data.rows import read_rows
from asd_hf.errors import UserError
from tests.test_data_sources import table, write_table
from tests.tiny_data import IDS, NAMES, tiny_rows, write_coco


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("ASD_HF_CACHE", str(tmp_path / "cache"))
    write_coco(tmp_path / "coco", "train", tiny_rows(23))
    return open_source(str(tmp_path / "coco"), "train")


def content(source) -> list[dict]:
    """Rows with the bytes of their images; names without folders."""
    rows = list(read_rows(source.stream))
    for row in rows:
        path = Path(row["image"]["path"])
        row["image"] = (path.name, path.read_bytes() if row["image"]["bytes"] is None else row["image"]["bytes"])
    return rows


def test_round_trip(tmp_path, source):
    out = tmp_path / "out"
    manifest = shard_dataset(source, "train", out, num_shards=4, progress=False)
    again = open_source(str(out), "train")
    assert content(again) == content(source)
    assert (again.class_names, again.category_ids) == (NAMES, IDS)
    assert again.shard_lengths == [6, 6, 6, 5] == [shard["rows"] for shard in manifest["shards"]]
    for shard in manifest["shards"]:
        data = (out / shard["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
        assert pq.read_metadata(out / shard["file"]).num_rows == shard["rows"]
    assert sorted(p.name for p in (out / "data").iterdir()) == [f"train-{i:05d}-of-00004.parquet" for i in range(4)]
    assert not list(out.rglob("*.part")) and not list(out.rglob("*.new"))


def test_a_source_of_unknown_length(tmp_path, source):
    source.shard_lengths = None
    manifest = shard_dataset(source, "train", tmp_path / "out", num_shards=2, progress=False)
    assert manifest["num_rows"] == 23 and content(open_source(str(tmp_path / "out"), "train")) == content(source)


def test_load_dataset_reads_it(tmp_path, source):
    write_coco(tmp_path / "coco", "val", tiny_rows(9))
    for split in ("train", "val"):
        shard_dataset(open_source(str(tmp_path / "coco"), split), split, tmp_path / "out", 2, progress=False)
    data = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "hf"))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 23, "val": 9}
    assert data["val"].features["objects"]["category"].feature.names == NAMES
    row, plain = data["val"][3], tiny_rows(9)[3]
    assert row["image"].size == (plain["width"], plain["height"]) and row["objects"]["bbox"] == plain["bbox"]


@pytest.mark.parametrize("damage", ["half-written", "flipped byte", "missing"])
def test_going_on_after_an_interruption(tmp_path, source, monkeypatch, damage):
    out, whole = tmp_path / "out", tmp_path / "whole"
    expected = shard_dataset(source, "train", whole, num_shards=4, progress=False)
    write = shard_module._write_shard
    written = []

    def interrupted(path, *rest):
        if len(written) == 2:
            (path.parent / f"{path.name}.part").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shard_module, "_write_shard", interrupted)
        shard_dataset(source, "train", out, num_shards=4, progress=False)
    assert not (out / "manifest_train.json").exists()
    damaged = out / "data/train-00001-of-00004.parquet"
    if damage == "flipped byte":
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 255
        damaged.write_bytes(data)
    elif damage == "missing":
        damaged.unlink()
    kept = (out / "data/train-00000-of-00004.parquet").stat().st_mtime_ns
    again = []
    monkeypatch.setattr(
        shard_module, "_write_shard", lambda path, *rest: again.append(path.name) or write(path, *rest)
    )
    assert shard_dataset(source, "train", out, num_shards=4, progress=False)["shards"] == expected["shards"]
    assert len(again) == (2 if damage == "half-written" else 3)
    assert (out / "data/train-00000-of-00004.parquet").stat().st_mtime_ns == kept
    assert content(open_source(str(out), "train")) == content(source)


def test_finished_shards_are_checked_and_mended(tmp_path, source):
    out = tmp_path / "out"
    manifest = shard_dataset(source, "train", out, num_shards=3, progress=False)
    file = out / manifest["shards"][1]["file"]
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    assert shard_dataset(source, "train", out, num_shards=3, progress=False) == manifest
    assert hashlib.sha256(file.read_bytes()).hexdigest() == manifest["shards"][1]["sha256"]


def test_files_that_differ_from_the_manifest_are_named(tmp_path, source):
    out = tmp_path / "out"
    shard_dataset(source, "train", out, num_shards=3, progress=False)
    file = out / "data/train-00001-of-00003.parquet"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"train-00001-of-00003.parquet has \d+ bytes but .*manifest_train.json says"):
        open_source(str(out), "train")
    file.unlink()
    with pytest.raises(UserError, match="lists files that are missing: .*train-00001-of-00003.parquet"):
        open_source(str(out), "train")
    file.write_bytes(data)
    (out / "data/train-00009.parquet").write_bytes(data)
    with pytest.raises(UserError, match="does not list .*train-00009.parquet"):
        open_source(str(out), "train")
    (out / "data/train-00009.parquet").unlink()
    manifest = json.loads((out / "manifest_train.json").read_text())
    manifest["shards"][0]["file"] = "../elsewhere.parquet"
    (out / "manifest_train.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="lists a shard outside its folder"):
        open_source(str(out), "train")
    no_sum = [{key: shard[key] for key in ("file", "bytes")} for shard in manifest["shards"]]
    changes = [{"shards": no_sum}, {"shards": 5}, {"class_names": 5}, {"class_names": ["cat", "dog", "cat"]}]
    for change in (*changes, {"category_ids": ["1", "2", "3"]}, {"box_format": "cxcywh"}, None):
        (out / "manifest_train.json").write_text("{" if change is None else json.dumps(manifest | change))
        with pytest.raises(UserError, match="manifest_train.json is no manifest"):
            open_source(str(out), "train")
    with pytest.raises(UserError, match="manifest_train.json cannot be read: delete it, and all shards are written"):
        shard_dataset(source, "train", out, num_shards=3, progress=False)


def test_a_folder_of_other_data_is_left_alone(tmp_path, source):
    out = tmp_path / "out"
    shard_dataset(source, "train", out, num_shards=3, progress=False)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    write_coco(tmp_path / "other", "train", tiny_rows(11))
    other = open_source(str(tmp_path / "other"), "train")
    with pytest.raises(UserError, match="belongs to other data"):
        shard_dataset(other, "train", out, num_shards=3, progress=False)
    with pytest.raises(UserError, match="another number of shards than 4"):
        shard_dataset(source, "train", out, num_shards=4, progress=False)
    other.class_names = ["x", "y", "z"]
    with pytest.raises(UserError, match="other class names than this split"):
        shard_dataset(other, "val", out, num_shards=3, progress=False)
    with pytest.raises(UserError, match="23 rows cannot be written as 24 shards"):
        shard_dataset(source, "train", tmp_path / "new", num_shards=24, progress=False)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_the_default_number_of_shards(tmp_path, source):
    assert len(shard_dataset(source, "train", tmp_path / "a", rows_per_shard=8, progress=False)["shards"]) == 3
    assert len(shard_dataset(source, "train", tmp_path / "b", rows_per_shard=2, progress=False)["shards"]) == 16


def test_the_command_takes_the_box_format(tmp_path):
    rows = [{**row, "bbox": [[5.0, 6.0, 20.0, 25.0]], "category": [1]} for row in tiny_rows(4)]
    path = write_table(tmp_path / "in", "parquet", *table("lists", rows, extras=False))
    arguments = ["--data", path, "--split", "val", "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="set data.box_format"):
        shard_command.main(arguments)
    shard_command.main([*arguments, "--num-shards", "2", "data.box_format=xyxy"])
    found = read_rows(open_source(str(tmp_path / "out"), "val").stream)
    assert [row["objects"]["bbox"] for row in found] == [[[5.0, 6.0, 15.0, 19.0]]] * 4
    with pytest.raises(UserError, match="'data.resize=fixed': only data.box_format"):
        shard_command.main([*arguments, "data.resize=fixed"])
    with pytest.raises(UserError, match="data.box_format is 'yxyx'"):
        shard_command.main([*arguments, "data.box_format=yxyx"])


def test_a_missing_image_is_named(tmp_path, source):
    (tmp_path / "coco/train/000103.jpg").unlink()
    with pytest.raises(UserError, match=r"image 103 \(.*000103.jpg\) cannot be read"):
        shard_dataset(source, "train", tmp_path / "out", num_shards=2, progress=False)
