from __future__ import annotations

import ast
import configparser
import importlib.metadata
import io
import json
import multiprocessing
import re
import sys
import tarfile
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Features, List, Value
from PIL import Image

from asd_hf.data import DataConfig, open_source
from asd_hf.data.cache import build_once
from asd_hf.data.rows import read_rows
from asd_hf.errors import UserError
from tests.tiny_data import IDS, NAMES, SHARED, tiny_rows, write_coco

ROWS = tiny_rows(23)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ASD_HF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def read(source) -> list[dict]:
    return list(read_rows(source.stream))


def expected(rows=ROWS) -> list[dict]:
    keys = ("bbox", "category", "area", "iscrowd")
    return [{"image_id": r["image_id"], "objects": {k: r[k] for k in keys}} for r in rows]


def same(found: list[dict], rows: list[dict], tolerance: float = 0) -> None:
    assert [r["image_id"] for r in found] == [r["image_id"] for r in rows]
    for a, b in zip(found, rows, strict=True):
        for key, values in b["objects"].items():
            np.testing.assert_allclose(a["objects"][key], values, rtol=0, atol=tolerance, err_msg=f"{a['image_id']}")


# -- COCO folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", ["val", "images/val", "images", "."])
def test_coco_folder(tmp_path, images):
    write_coco(tmp_path, "val", ROWS, images)
    source = open_source(str(tmp_path), "val")
    found = read(source)
    same(found, expected())
    assert (source.class_names, source.category_ids) == (NAMES, IDS)
    assert source.num_rows == len(ROWS) == sum(source.shard_lengths)
    assert [Path(r["image"]["path"]).read_bytes() for r in found] == [r["jpeg"] for r in ROWS]
    assert {r["image"]["bytes"] for r in found} == {None}
    assert [(r["width"], r["height"]) for r in found] == [(r["width"], r["height"]) for r in ROWS]


def test_a_missing_image_is_not_taken_from_another_split(tmp_path):
    write_coco(tmp_path, "val", ROWS)
    name = Path(read(open_source(str(tmp_path), "val"))[0]["image"]["path"]).name
    for place in ("images", "."):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / name).write_bytes((tmp_path / "val" / name).read_bytes())
    (tmp_path / "val" / name).unlink()
    found = read(open_source(str(tmp_path), "val"))
    assert {Path(row["image"]["path"]).parent for row in found} == {tmp_path / "val"}
    file = tmp_path / "annotations/instances_val.json"
    file.write_text(file.read_text().replace('"file_name": "', '"file_name": "val/'))  # names that begin in the root
    (tmp_path / name).rename(tmp_path / "val" / name)
    found = read(open_source(str(tmp_path), "val"))
    assert [Path(row["image"]["path"]).read_bytes() for row in found] == [row["jpeg"] for row in ROWS]


def test_annotations_among_the_images(tmp_path):
    write_coco(tmp_path, "valid", ROWS)
    (tmp_path / "annotations/instances_valid.json").rename(tmp_path / "valid/_annotations.coco.json")
    (tmp_path / "annotations").rmdir()
    found = read(open_source(str(tmp_path), "valid"))
    same(found, expected())
    assert [Path(r["image"]["path"]).read_bytes() for r in found] == [r["jpeg"] for r in ROWS]
    with pytest.raises(UserError, match="looked for annotations/instances_val.json, val/_annotations.coco.json"):
        open_source(str(tmp_path), "val")


def test_opening_a_folder_shows_no_bar_of_another_package(tmp_path, capfd):
    write_coco(tmp_path, "val", ROWS)
    open_source(str(tmp_path), "val")
    assert capfd.readouterr().err == ""
    assert not datasets.are_progress_bars_disabled()


def naive(file: Path) -> list[dict]:
    contents = json.loads(file.read_text())
    index = {id_: i for i, id_ in enumerate(sorted(c["id"] for c in contents["categories"]))}
    rows = []
    for image in contents["images"]:
        own = [a for a in contents["annotations"] if a["image_id"] == image["id"]]
        objects = {k: [a[k] for a in own] for k in ("bbox", "area", "iscrowd")}
        objects["category"] = [index[a["category_id"]] for a in own]
        rows.append({"image_id": image["id"], "objects": objects})
    return rows


@pytest.mark.parametrize(
    ("name", "split", "crowds"), [("coco_tiny", "val2017", 11), ("bccd", "train", 0), ("bccd", "val", 0)]
)
def test_real_coco_folders(name, split, crowds):
    file = SHARED / name / "annotations" / f"instances_{split}.json"
    if not file.is_file():
        pytest.skip(f"no {file}")
    found = read(open_source(str(SHARED / name), split))
    same(found, naive(file))
    assert sum(sum(r["objects"]["iscrowd"]) for r in found) == crowds
    assert all(Path(r["image"]["path"]).is_file() for r in found)


def test_boxes_without_area_are_kept_and_counted(tmp_path, caplog):
    rows = tiny_rows(3)
    rows[0]["bbox"][0][2] = 0.0
    rows[1]["bbox"][0][0] = rows[1]["width"] + 5.0
    write_coco(tmp_path, "val", rows)
    for _ in range(2):  # also when the index is there already
        caplog.clear()
        found = read(open_source(str(tmp_path), "val"))
        assert "2 x box without area: gives no label in training" in caplog.text
    same(found, expected(rows))


def test_missing_area_and_iscrowd(tmp_path):
    contents = write_coco(tmp_path, "val", ROWS)
    for annotation in contents["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    (tmp_path / "annotations/instances_val.json").write_text(json.dumps(contents))
    for row in read(open_source(str(tmp_path), "val")):
        objects = row["objects"]
        assert objects["area"] == [w * h for _, _, w, h in objects["bbox"]] and not any(objects["iscrowd"])


def _set(kind, key, value, index=0):
    return lambda contents: contents[kind][index].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("annotations", "bbox", [1, 2, float("nan"), 3], 4), "annotation 5 has box .*finite"),
        (_set("annotations", "bbox", [1, 2, -3, 4], 4), "annotation 5 has box .*negative"),
        (_set("annotations", "bbox", [1, 2, 3], 4), r"annotation 5 needs bbox \[x, y, width, height\]"),
        (_set("annotations", "bbox", None, 4), "annotation 5 needs bbox"),
        (_set("annotations", "category_id", 99), "annotation 1 is of category 99"),
        (_set("annotations", "image_id", 99), "annotation 1 is of image 99"),
        (_set("images", "file_name", "../secret.jpg"), "'../secret.jpg' of image 100 leaves the image folder"),
        (_set("images", "file_name", "/etc/secret.jpg"), "'/etc/secret.jpg' of image 100 leaves the image folder"),
        (_set("images", "id", "7"), "image id '7' is not an integer"),
        (_set("images", "id", 103), "2 images have the id 103"),
        (_set("images", "width", "64"), "image 100 needs a whole number of pixels as width and height"),
        (_set("categories", "id", 7), "two categories have the id 7"),
        (_set("categories", "name", "dog"), "two categories have the name 'dog'"),
        (lambda c: c.pop("categories"), "is no COCO annotation file: KeyError: 'categories'"),
        (lambda c: c["images"].clear(), "has no images"),
    ],
)
def test_wrong_annotations_are_named(tmp_path, change, message):
    contents = write_coco(tmp_path, "val", ROWS)
    change(contents)
    (tmp_path / "annotations/instances_val.json").write_text(json.dumps(contents))
    for _ in range(2):  # also when there is an index already
        with pytest.raises(UserError, match=message) as error:
            open_source(str(tmp_path), "val")
        assert "instances_val.json" in str(error.value) and "\n" not in str(error.value)


def test_missing_files_are_named(tmp_path):
    write_coco(tmp_path, "val", ROWS)
    with pytest.raises(UserError, match=r"instances_train.json does not exist; splits of .*: val$"):
        open_source(str(tmp_path), "train")
    (tmp_path / "val").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="[0-9]+.jpg is in none of .*/val, .*/images/val, .*/images, "):
        open_source(str(tmp_path), "val")
    (tmp_path / "annotations/instances_val.json").write_text("{not json")
    with pytest.raises(UserError, match="instances_val.json is no COCO annotation file"):
        open_source(str(tmp_path), "val")


def test_a_changed_annotation_file_is_read_again(tmp_path):
    contents = write_coco(tmp_path, "val", ROWS)
    file, prints = tmp_path / "annotations/instances_val.json", set()
    for area in (4321.0, 1234.0, 12345.0):  # of the same size as before, and longer
        contents["annotations"][0]["area"] = area
        file.write_text(json.dumps(contents))
        source = open_source(str(tmp_path), "val")
        prints.add(source.fingerprint)
        assert read(source)[0]["objects"]["area"][0] == area
    assert len(prints) == 3


def test_a_folder_is_built_once_by_several_threads(tmp_path):
    builds = []

    def build(folder):
        builds.append(threading.current_thread().name)
        folder.mkdir()
        (folder / "a").write_text("whole")

    threads = [threading.Thread(target=build_once, args=(tmp_path / "x/folder", build)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1 and (tmp_path / "x/folder/a").read_text() == "whole"

    def fail(folder):
        folder.mkdir()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        build_once(tmp_path / "x/other", fail)
    assert not (tmp_path / "x/other").exists()


def _open_in_process(folder, queue):
    queue.put(open_source(folder, "val").num_rows)


def test_several_processes_open_one_folder(tmp_path, cache):
    write_coco(tmp_path, "val", ROWS)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_open_in_process, args=(str(tmp_path), queue)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=60) for _ in processes] == [len(ROWS)] * 4
    for process in processes:
        process.join()
    assert len([p for p in (cache / "coco").iterdir() if p.is_dir()]) == 1


# -- shapes -----------------------------------------------------------------------------------------------------------


def test_shapes_are_generated_and_cached(cache):
    source = open_source("shapes?num_train=5&num_val=3&image_size=40", "val")
    assert source.num_rows == 3 and source.class_names == ["circle", "square", "triangle", "star", "cross"]
    assert read(source)[0]["width"] == 40
    made = {p.name: p.stat().st_mtime_ns for p in cache.glob("shapes-*")}
    assert open_source("shapes?image_size=40&num_val=3&num_train=5", "train").num_rows == 5
    assert {p.name: p.stat().st_mtime_ns for p in cache.glob("shapes-*")} == made


@pytest.mark.parametrize(
    ("source", "split", "message"),
    [
        ("shapes", "test", "no split 'test'"),
        ("shapes?seeds=3", "val", "option 'seeds' is unknown: did you mean 'seed'"),
        ("shapes?seed=x", "val", "seed must be a whole number, not 'x'"),
    ],
)
def test_wrong_names_of_shapes(source, split, message):
    with pytest.raises(UserError, match=message):
        open_source(source, split)


# -- tables -----------------------------------------------------------------------------------------------------------


def table(form: str, rows=ROWS, corners: bool = False, extras: bool = True, size: bool = True):
    """(rows, features) in the layouts found on the Hub."""
    label = ClassLabel(names=NAMES)
    out = []
    for row in rows:
        boxes = [[x, y, x + w, y + h] if corners else [x, y, w, h] for x, y, w, h in row["bbox"]]
        stored = {"image": {"bytes": row["jpeg"], "path": f"{row['image_id']}.jpg"}, "image_id": row["image_id"]}
        if size:
            stored |= {"width": row["width"], "height": row["height"]}
        if form == "lists":
            stored["objects"] = {"bbox": boxes, "category": row["category"]}
            if extras:
                stored["objects"] |= {"area": row["area"], "iscrowd": row["iscrowd"]}
        elif form == "plural":
            stored["objects"] = {"bboxes": boxes, "classes": row["category"]}
            if extras:
                stored["objects"] |= {"areas": row["area"], "iscrowds": [bool(c) for c in row["iscrowd"]]}
        else:
            columns = zip(boxes, row["category"], row["area"], row["iscrowd"], strict=True)
            stored["annotations"] = [
                {"bbox": b, "category_id": IDS[c], "category_name": NAMES[c], "area": a, "iscrowd": k}
                for b, c, a, k in columns
            ]
        out.append(stored)
    box, number = List(List(Value("float64"))), List(Value("float64"))
    features = {"image": datasets.Image(), "image_id": Value("int64")}
    if size:
        features |= {"width": Value("int64"), "height": Value("int64")}
    if form == "lists":
        objects = {"bbox": box, "category": List(label), "area": number, "iscrowd": List(Value("int64"))}
    elif form == "plural":
        objects = {"bboxes": box, "classes": List(label), "areas": number, "iscrowds": List(Value("bool"))}
    else:
        one = {"bbox": List(Value("float64")), "category_id": Value("int64"), "category_name": Value("string")}
        features["annotations"] = List({**one, "area": Value("float64"), "iscrowd": Value("int64")})
        return out, Features(features)
    features["objects"] = {k: v for k, v in objects.items() if k in out[0]["objects"]}
    return out, Features(features)


def write_table(folder: Path, layout: str, stored: list[dict], features: Features) -> str:
    half = len(stored) // 2
    if layout == "saved":
        data = datasets.Dataset.from_list(stored, features=features)
        datasets.DatasetDict({"train": data.select(range(3)), "val": data}).save_to_disk(str(folder))
        return str(folder)
    names = {
        "parquet": ["val-00000-of-00002.parquet", "val-00001-of-00002.parquet"],
        "parquet-data": ["data/val-00000-of-00002.parquet", "data/val-00001-of-00002.parquet"],
        "parquet-folder": ["val/0.parquet", "val/1.parquet"],
    }[layout]
    for name, part in zip(names, (stored[:half], stored[half:]), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(part, features=features).to_parquet(folder / name)
    return str(folder)


def write_tars(folder: Path, stored: list[dict]) -> str:
    half = len(stored) // 2
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate((stored[:half], stored[half:])):
        with tarfile.open(folder / f"val-{number:04d}.tar", "w") as archive:
            for index, row in enumerate(part):
                about = {key: value for key, value in row.items() if key != "image"}
                for suffix, data in (("jpg", row["image"]["bytes"]), ("json", json.dumps(about).encode())):
                    member = tarfile.TarInfo(f"{index:05d}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return str(folder)


@pytest.mark.parametrize("form", ["lists", "plural", "dictionaries"])
@pytest.mark.parametrize("layout", ["saved", "parquet", "parquet-data", "parquet-folder", "tar"])
def test_tables(tmp_path, layout, form):
    stored, features = table(form)
    if layout == "tar":
        path = write_tars(tmp_path / "t", stored)
        if form != "dictionaries":
            (tmp_path / "t/manifest_val.json").write_text(json.dumps({"class_names": NAMES}))
    else:
        path = write_table(tmp_path / "t", layout, stored, features)
    source = open_source(path, "val", DataConfig(box_format="xywh"))
    found = read(source)
    same(found, expected())
    assert source.class_names == NAMES
    assert source.category_ids == (IDS if form == "dictionaries" else [0, 1, 2])
    assert source.num_rows == (None if layout == "tar" else len(ROWS))
    assert [r["image"]["bytes"] for r in found] == [r["jpeg"] for r in ROWS]


def test_fractions_survive_whole_numbers_in_the_first_samples(tmp_path):
    # the webdataset builder of `datasets` types a column by its first five samples
    rows = [{**row, "bbox": [[1, 2, 3, 4]], "category": [0], "area": [12], "iscrowd": [0]} for row in ROWS[:8]]
    rows[-1]["bbox"] = [[1.25, 2.5, 3.75, 4.5]]
    path = write_tars(tmp_path / "t", table("lists", rows)[0])
    (tmp_path / "t/manifest_val.json").write_text(json.dumps({"class_names": NAMES, "box_format": "xywh"}))
    assert read(open_source(path, "val"))[-1]["objects"]["bbox"] == [[1.25, 2.5, 3.75, 4.5]]


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("size", [False, True])
def test_box_format_is_proven(tmp_path, corners, size):
    stored, features = table("lists", corners=corners, extras=False, size=size)
    source = open_source(write_table(tmp_path / "t", "parquet", stored, features), "val")
    wanted = expected()
    for row in wanted:
        row["objects"]["area"] = [w * h for _, _, w, h in row["objects"]["bbox"]]
        row["objects"]["iscrowd"] = [0] * len(row["objects"]["bbox"])
    same(read(source), wanted, tolerance=1e-9)


def test_box_format_that_is_not_proven_must_be_stated(tmp_path):
    rows = [
        {**row, "bbox": [[5.0, 6.0, 20.0, 25.0]], "category": [1], "area": [1.0], "iscrowd": [0]} for row in ROWS[:4]
    ]
    path = write_table(tmp_path / "a", "parquet", *table("lists", rows))
    with pytest.raises(UserError, match="both fit: set data.box_format"):
        open_source(path, "val")
    assert read(open_source(path, "val", DataConfig(box_format="xyxy")))[0]["objects"]["bbox"] == [
        [5.0, 6.0, 15.0, 19.0]
    ]
    assert read(open_source(path, "val", DataConfig(box_format="xywh")))[0]["objects"]["bbox"] == [
        [5.0, 6.0, 20.0, 25.0]
    ]
    rows[0]["bbox"] = [[30.0, 6.0, 20.0, 900.0]]  # corners in the wrong order, and beyond the image
    path = write_table(tmp_path / "b", "parquet", *table("lists", rows))
    with pytest.raises(UserError, match="neither fits .*reach beyond.*wrong order.*set data.box_format"):
        open_source(path, "val")


@pytest.mark.parametrize("stated", [None, "xywh", "xyxy", "manifest"])
def test_relative_boxes_are_an_error(tmp_path, stated):
    boxes = [[0.3, 0.3, 0.2, 0.2], [0.0, 0.0, 0.0, 0.0], [0.5, 0.25, 0.5, 1.002]]
    same = {"category": [1] * 3, "area": [1.0] * 3, "iscrowd": [0] * 3}
    rows = [{**row, "bbox": boxes, **same} for row in ROWS[:4]]
    rows.insert(0, {**ROWS[0], "bbox": [], "category": [], "area": [], "iscrowd": []})
    config = DataConfig(box_format=None if stated == "manifest" else stated)
    for layout, size in (("parquet", True), ("saved", True), ("parquet-data", False)):
        path = write_table(tmp_path / layout, layout, *table("lists", rows, size=size))
        if stated == "manifest" and layout != "saved":
            text = json.dumps({"class_names": NAMES, "box_format": "xywh"})
            (Path(path) / "manifest_val.json").write_text(text)
        with pytest.raises(UserError, match=r"look relative.*\[0.3, 0.3, 0.2, 0.2\] of image 100\): absolute pixels"):
            open_source(path, "val", config)


def test_boxes_of_a_few_pixels_are_not_relative(tmp_path):
    rows = [{**row, "bbox": [[1.0, 1.0, 1.0, 1.0]], "category": [1], "area": [1.0]} for row in ROWS[:2]]
    rows = [{**row, "iscrowd": [0]} for row in rows]
    rows[1]["bbox"] = [[0.0, 1.0, 1.0, 3.0]]
    path = write_table(tmp_path / "t", "parquet", *table("lists", rows))
    found = read(open_source(path, "val", DataConfig(box_format="xywh")))
    assert [row["objects"]["bbox"] for row in found] == [row["bbox"] for row in rows]


def test_a_stated_format_that_does_not_fit_is_an_error(tmp_path):
    path = write_table(tmp_path / "t", "parquet", *table("lists"))
    with pytest.raises(UserError, match=r"image \d+: box \d+ is .*as xyxy its size is negative; see data.box_format"):
        read(open_source(path, "val", DataConfig(box_format="xyxy")))


def test_rows_without_image_id_are_numbered(tmp_path):
    stored, features = table("lists")
    for row in stored:
        del row["image_id"]
    features.pop("image_id")
    for layout in ("parquet", "saved"):
        source = open_source(write_table(tmp_path / layout, layout, stored, features), "val")
        assert [r["image_id"] for r in read(source)] == list(range(len(ROWS)))
    (tmp_path / "t").mkdir()
    (tmp_path / "t/manifest_val.json").write_text(json.dumps({"class_names": NAMES, "box_format": "xywh"}))
    ids = [r["image_id"] for r in read(open_source(write_tars(tmp_path / "t", stored), "val"))]
    assert len(set(ids)) == len(ROWS) and ids[0] == 0


def _bad(change):
    stored, features = table("lists")
    change(stored[2])
    return stored, features


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["objects"]["bbox"].__setitem__(0, [1.0, float("inf"), 2.0, 3.0]), "image 106: box 0 is .*finite"),
        (lambda r: r["objects"]["bbox"].__setitem__(0, [1.0, 2.0, 3.0]), "image 106: box 0 is .*four finite numbers"),
        (lambda r: r["objects"]["bbox"].append([1.0, 2.0, 3.0, 4.0]), "image 106: 3 boxes, but 2 categories"),
        (lambda r: r.__setitem__("image", None), "image 106 has no image"),
        (lambda r: r.__setitem__("image", {"path": "/etc/hostname", "bytes": None}), "'/etc/hostname' is not inside"),
        (lambda r: r.__setitem__("image", {"path": "../x.jpg", "bytes": None}), "'../x.jpg' is not inside"),
    ],
)
def test_wrong_rows_are_named(tmp_path, change, message):
    stored, features = _bad(change)
    features["image"] = {"bytes": Value("binary"), "path": Value("string")}
    path = write_table(tmp_path / "t", "parquet", stored, features)
    with pytest.raises(UserError, match=message):
        read(open_source(path, "val", DataConfig(box_format="xywh")))


def test_a_category_beyond_the_classes_is_an_error(tmp_path):
    path = write_tars(tmp_path / "t", table("lists")[0])
    (tmp_path / "t/manifest_val.json").write_text(json.dumps({"class_names": NAMES[:2], "box_format": "xywh"}))
    with pytest.raises(UserError, match=r"image \d+: category 2 is not among the 2 classes"):
        read(open_source(path, "val"))


def test_sources_that_cannot_be_understood(tmp_path, monkeypatch):
    stored, _ = table("lists")
    path = write_tars(tmp_path / "names", stored)
    with pytest.raises(UserError, match="categories are numbers without names"):
        open_source(path, "val")
    with pytest.raises(UserError, match="holds no split 'train'.*; splits found: val$"):
        open_source(path, "train")
    for beside in ("train/_annotations.coco.json", "valid/_annotations.coco.json", "data/test-0.parquet"):
        (tmp_path / "beside" / beside).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "beside" / beside).write_text("")
    with pytest.raises(UserError, match="; splits found: test, train, valid$"):
        open_source(str(tmp_path / "beside"), "val")
    saved = write_table(tmp_path / "saved", "saved", *table("lists"))
    with pytest.raises(UserError, match="no split 'test'; its splits: train, val"):
        open_source(saved, "test")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/val-0.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(UserError, match="val-0.parquet is no Parquet file"):
        open_source(str(tmp_path / "broken"), "val")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        open_source(str(tmp_path / "file"), "val")
    tar = tmp_path / "names/val-0000.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    with pytest.raises(UserError, match="val-0000.tar cannot be read"):
        read(open_source(path, "val"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="'no/such-data', split 'val': no such folder, and not to be had from the Hub"):
        open_source("no/such-data", "val")


def test_a_repository_read_as_on_the_hub(tmp_path, monkeypatch):
    # the Hub's own way: `load_dataset(id, streaming=True)`, here on a repository in the working folder
    write_table(tmp_path / "owner/name", "parquet-data", *table("plural", corners=True))
    monkeypatch.chdir(tmp_path)
    from asd_hf.data import box_format, stored, tables

    raw = stored.open_hub("owner/name", "val")
    assert box_format.find_box_format(raw, None) == "xyxy"
    assert raw.lengths == [11, 12]
    monkeypatch.setattr(tables, "open_folder", lambda folder, split, labelled: raw)
    same(read(open_source("owner/name", "val")), expected(), tolerance=1e-9)


def test_a_repository_without_parquet_has_unknown_lengths(tmp_path, monkeypatch):
    write_tars(tmp_path / "owner/name", table("lists")[0])
    monkeypatch.chdir(tmp_path)
    from asd_hf.data import stored

    assert stored.open_hub("owner/name", "validation").lengths is None


def test_image_files_named_by_a_row_are_read(tmp_path):
    stored, features = table("lists")
    (tmp_path / "t/val").mkdir(parents=True)
    for row in stored:
        (tmp_path / "t" / row["image"]["path"]).write_bytes(row["image"]["bytes"])
        row["image"] = {"bytes": None, "path": row["image"]["path"]}
    features["image"] = {"bytes": Value("binary"), "path": Value("string")}
    path = write_table(tmp_path / "t", "parquet-folder", stored, features)
    for row in read(open_source(path, "val")):
        with Image.open(row["image"]["path"]) as image:
            assert image.size == (row["width"], row["height"])


def test_rows_whose_objects_are_null_are_images_without_objects(tmp_path):
    stored, features = table("lists")
    for row in stored:
        row["objects"] = row["objects"] if row["objects"]["bbox"] else None
    source = open_source(
        write_table(tmp_path / "t", "parquet", stored, features), "val", DataConfig(box_format="xywh")
    )
    same(read(source), expected())


def test_every_package_that_is_imported_is_declared():
    root = Path(__file__).parents[1]
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg")
    extras = setup["options.extras_require"]
    core = setup["options"]["install_requires"].split()
    optional = [name for extra in extras if extra != "dev" for name in extras[extra].split()]
    core, optional = (
        {re.split("[<>=,]", name)[0].replace("_", "-").lower() for name in names} for names in (core, optional)
    )
    top, anywhere = set(), set()
    for file in (root / "asd_hf").rglob("*.py"):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            names = set()
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = {node.module.partition(".")[0]}
            anywhere |= names
            top |= names if node in tree.body else set()
    owners = importlib.metadata.packages_distributions()
    for imported, declared in ((top, core), (anywhere, core | optional)):
        others = imported - {"asd_hf", *sys.stdlib_module_names}
        assert len(others) > 10
        assert not {n for n in others if not {o.replace("_", "-").lower() for o in owners.get(n, [n])} & declared}
