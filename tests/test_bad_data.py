"""One bad input of each kind, through the real readers: as an error, left out, and as `asd-hf check-data` lists it."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from datasets import Value
from PIL import Image

from asd_hf.build import Parts
from asd_hf.commands import run
from asd_hf.config import build_config, load_config
from asd_hf.data import (
    DataConfig,
    DetectionStream,
    RowTransform,
    build_loader,
    check,
    open_source,
    open_training_source,
)
from asd_hf.data.check import check_source, leave_out, require_agreement, require_whole
from asd_hf.data.faults import NOTES, REMEDIES, Fault, box_note
from asd_hf.data.rows import read_rows
from asd_hf.errors import UserError
from tests.test_data_sources import table, write_table, write_tars
from tests.tiny_data import NAMES, jpeg, tiny_rows, write_coco, write_images
from tests.tiny_run import configuration, write_places

ROWS = tiny_rows(6)
BAD = ROWS[2]  # of two objects and more
WIDTH, HEIGHT = BAD["width"], BAD["height"]
FILE = f"{BAD['image_id']:06d}.jpg"
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n"
LENIENT = {"bad_rows": "skip", "max_bad_share": 0.5, "eval_size": 40, "train_sizes": [40]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ASD_HF_CACHE", str(tmp_path / "cache"))
    package = logging.getLogger("asd_hf")
    monkeypatch.setattr(package, "handlers", package.handlers[:])  # to which the command adds its own
    monkeypatch.setattr(package, "level", package.level)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width=WIDTH, height=HEIGHT) -> Image.Image:
    with Image.open(io.BytesIO(jpeg(width, height))) as image:
        return image.convert("RGB")


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has width x height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photo(), "JPEG", exif=exif)


# -- changes of a COCO folder: (its folder of images, contents of its annotation file) --------------------------------


def image_bytes(data: bytes, size: tuple[int, int] | None = None):
    def change(images, contents):
        (images / FILE).write_bytes(data)
        if size is not None:
            contents["images"][2].update(width=size[0], height=size[1])

    return change


def of_image(**values):
    return lambda images, contents: contents["images"][2].update(values)


def of_annotation(**values):
    def change(images, contents):
        next(a for a in contents["annotations"] if a["image_id"] == BAD["image_id"]).update(values)

    return change


def link_out(images, contents):
    outside = images.parents[1] / "outside.jpg"
    outside.write_bytes(BAD["jpeg"])
    (images / FILE).unlink()
    (images / FILE).symlink_to(outside)


def link_within(images, contents):
    (images / FILE).rename(images.parent / "original.jpg")
    (images / FILE).symlink_to("../original.jpg")


def in_its_place(make):
    def change(images, contents):
        (images / FILE).unlink()
        make(images / FILE)

    return change


def renamed(name: str):
    def change(images, contents):
        (images / FILE).rename(images / name)
        contents["images"][2]["file_name"] = name

    return change


def crowded(images, contents):
    one = next(a for a in contents["annotations"] if a["image_id"] == BAD["image_id"])
    contents["annotations"] += [one | {"id": 10_000 + number} for number in range(10_000)]


FAULTS = {
    "truncated": ("broken image", image_bytes(BAD["jpeg"][:-100])),
    "cut within its head": ("broken image", image_bytes(BAD["jpeg"][:80])),
    "empty": ("broken image", image_bytes(b"")),
    "a page": ("broken image", image_bytes(b"<html>404</html>")),
    "truncated png": ("broken image", image_bytes(encoded(photo(), "PNG")[:-200])),
    "postscript": ("broken image", image_bytes(POSTSCRIPT)),
    "pipe": ("broken image", in_its_place(os.mkfifo)),
    "folder": ("broken image", in_its_place(Path.mkdir)),
    "16 bit": ("deep image", image_bytes(encoded(Image.new("I;16", (WIDTH, HEIGHT)), "PNG"))),
    "bomb": ("large image", image_bytes(bomb(60_000, 60_000), (60_000, 60_000))),
    "16,000 pixels square": ("large image", image_bytes(bomb(16_000, 16_000), (16_000, 16_000))),
    "missing": ("missing image", lambda images, contents: (images / FILE).unlink()),
    "turned size": ("other size", of_image(width=HEIGHT, height=WIDTH)),
    "out of its folder": ("file name", of_image(file_name="../../etc/passwd")),
    "absolute": ("file name", of_image(file_name="/etc/passwd")),
    "link out": ("file name", link_out),
    "no name": ("file name", of_image(file_name="")),
    "nul": ("file name", of_image(file_name="a\0b.jpg")),
    "surrogate": ("file name", of_image(file_name="\ud800.jpg")),
    "line break": ("missing image", of_image(file_name="a\n\x1b[2J.jpg")),
    "no string": ("file name", of_image(file_name=["a.jpg"])),
    "long": ("broken image", of_image(file_name=300 * "a")),
    "no id": ("row", lambda images, contents: contents["images"][2].pop("id")),
    "no dictionary": ("row", lambda images, contents: contents["images"].__setitem__(2, None)),
    "id of a string": ("image id", of_image(id="7")),
    "large id": ("image id", of_image(id=2**70)),
    "unlabelled id": ("image id", of_image(id=2**62)),
    "width of a string": ("stated size", of_image(width="64")),
    "large width": ("stated size", of_image(width=2**70)),
    "nan": ("box", of_annotation(bbox=[1, float("nan"), 3, 4])),
    "infinite": ("box", of_annotation(bbox=[1, 2, float("inf"), 4])),
    "huge": ("box", of_annotation(bbox=[1, 2, 10**400, 4])),
    "negative": ("box", of_annotation(bbox=[1, 2, -3, 4])),
    "three numbers": ("box", of_annotation(bbox=[1, 2, 3])),
    "box of a string": ("box", of_annotation(bbox="1234")),
    "box of strings": ("box", of_annotation(bbox=["1", "2", "3", "4"])),
    "area": ("box", of_annotation(area="large")),
    "crowd": ("box", of_annotation(iscrowd="no")),
    "half a crowd": ("box", of_annotation(iscrowd=0.5)),
    "10,000 boxes": ("many boxes", crowded),
    "unknown category": ("category", of_annotation(category_id=99)),
    "category of a list": ("category", of_annotation(category_id=[3])),
}
SOUND = {
    "png named jpg": (None, image_bytes(encoded(photo(), "PNG"))),
    "cmyk": (None, image_bytes(encoded(photo().convert("CMYK"), "JPEG"))),
    "palette": (None, image_bytes(encoded(photo().convert("P"), "PNG"))),
    "grey": (None, image_bytes(encoded(photo().convert("L"), "PNG"))),
    "one pixel": ("box without area", image_bytes(encoded(photo(1, 1), "PNG"), (1, 1))),
    "16,000 pixels wide": (None, image_bytes(encoded(photo(16_000, 60), "JPEG"), (16_000, 60))),
    "16,000 pixels by one": ("box without area", image_bytes(encoded(photo(16_000, 1), "PNG"), (16_000, 1))),
    "exif": ("EXIF orientation", image_bytes(turned())),
    "other script": (None, renamed("möwe 鳥 'ü'.jpg")),
    "link within": (None, link_within),
    "no size": ("box without area", of_annotation(bbox=[1, 2, 0, 4])),
    "outside": ("box without area", of_annotation(bbox=[1000, 2, 5, 4])),
    "beyond": ("clipped box", of_annotation(bbox=[1, 2, 1e300, 4])),
    "huge area": (None, of_annotation(area=1e300)),
}


def broken(root: Path, change, split="train") -> Path:
    contents = write_coco(root, split, ROWS)
    change(root / split, contents)
    (root / f"annotations/instances_{split}.json").write_text(json.dumps(contents))
    return root


def samples(source, training=True) -> dict[int, dict]:
    transform = RowTransform(DataConfig(**LENIENT), training)
    return {row["image_id"]: transform(row) for row in read_rows(source.stream)}


def checked(capsys, *arguments) -> tuple[int, str]:
    code = run("check-data", [*map(str, arguments), "--workers", "1"])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_row_of_a_coco_folder(tmp_path, capsys, name):
    kind, change = FAULTS[name]
    root = broken(tmp_path / "coco", change)
    with pytest.raises(UserError) as error:
        samples(open_source(str(root), "train"))
    assert "\n" not in str(error.value) and str(root) in str(error.value) and len(str(error.value)) < 800

    code, out = checked(capsys, root, "--split", "train")
    assert code == 1 and f"  {kind} " in out and REMEDIES[kind] in out and str(error.value)[:50] in out

    source = open_training_source(DataConfig(source=str(root), **LENIENT))
    assert [fault.kind for fault in source.faults if fault.kind != "annotation"] == [kind]
    good = [row["image_id"] for row in ROWS if row is not BAD]
    assert list(samples(source)) == good and source.num_rows == len(good) == len(ROWS) - 1


def test_the_objects_of_each_class_are_counted(tmp_path, capsys):
    root = broken(tmp_path / "coco", lambda folder, _: (folder / FILE).write_bytes(b""))
    write_coco(root, "val", ROWS)
    _, out = checked(capsys, root)
    for split, rows in (("train", [row for row in ROWS if row is not BAD]), ("val", ROWS)):
        names = [NAMES[category] for row in rows for category in row["category"]]
        (line,) = re.findall(rf"{split}: .*\n  ({len(names)} objects: .*)", out)
        for name in NAMES:
            assert f" {name} {names.count(name)}" in line


@pytest.mark.parametrize("name", SOUND)
def test_a_strange_but_sound_row_of_a_coco_folder(tmp_path, capsys, name):
    note, change = SOUND[name]
    root = broken(tmp_path / "coco", change)
    plain = samples(open_source(str(root), "train"))
    assert len(plain) == len(ROWS)
    code, out = checked(capsys, root, "--split", "train")
    assert code == 0 and "0 of 6 rows are bad" in out
    assert [kind for kind in NOTES if f" {kind} " in out] == ([] if note is None else [note])
    source = open_training_source(DataConfig(source=str(root), **LENIENT))
    assert not source.faults and list(source.notes) == ([] if note is None else [note])
    torch.testing.assert_close(samples(source), plain, rtol=0, atol=0)
    boxes = plain[BAD["image_id"]]["labels"]["boxes"]
    assert torch.isfinite(boxes).all() and (boxes >= 0).all() and (boxes <= 1).all()
    assert len(samples(open_source(str(root), "train"), training=False)) == len(ROWS)  # evaluation takes it too


def test_postscript_is_not_run(tmp_path):
    root = broken(tmp_path / "coco", image_bytes(POSTSCRIPT))
    with pytest.raises(UserError, match="is PostScript, a program: convert it to PNG or JPEG$"):
        samples(open_source(str(root), "train"))


def test_images_of_one_id(tmp_path):
    root = broken(tmp_path / "coco", of_image(id=ROWS[1]["image_id"]))
    with pytest.raises(UserError, match=r"2 images have the id 103 \(and 2 more: `asd-hf check-data` lists them\)$"):
        open_source(str(root), "train")
    source = open_training_source(DataConfig(source=str(root), **LENIENT))
    # annotations of that id may belong to either; those of the old id have no image now
    assert list(samples(source)) == [row["image_id"] for row in ROWS if row not in ROWS[1:3]]
    assert [f.kind for f in source.faults] == ["image id"] * 2 + ["annotation"]


def test_an_annotation_of_no_image(tmp_path, capsys):
    root = broken(tmp_path / "coco", of_annotation(image_id=9))
    with pytest.raises(UserError, match="is of image 9, which is not in the file$"):
        open_source(str(root), "train")
    assert checked(capsys, root, "--split", "train")[0] == 1
    source = open_training_source(DataConfig(source=str(root), **LENIENT))
    assert len(samples(source)) == len(ROWS) and [f.kind for f in source.faults] == ["annotation"]


def test_an_image_of_many_boxes_is_evaluated_and_trained_on_if_asked(tmp_path):
    root = broken(tmp_path / "coco", crowded)
    source = open_source(str(root), "train")
    assert len(samples(source, training=False)[BAD["image_id"]]["labels"]["ground_truth"]) > 10_000
    require_whole(source)
    config = DataConfig(source=str(root), max_boxes=20_000, **LENIENT)
    assert not open_training_source(config).faults
    sample = RowTransform(config, training=True)(list(read_rows(source.stream))[2])
    assert len(sample["labels"]["boxes"]) > 9_000


def test_an_image_with_several_bad_annotations_is_one_row(tmp_path):
    def change(images, contents):
        for annotation in contents["annotations"]:
            if annotation["image_id"] == BAD["image_id"]:
                annotation["category_id"] = 99

    source = open_training_source(DataConfig(source=str(broken(tmp_path / "coco", change)), **LENIENT))
    assert len(source.faults) == 1 and source.num_rows == len(ROWS) - 1


@pytest.mark.parametrize(
    "text", [b"", b"{not json", b"\xff\xfe\x00", b"[]", b"5", b"null", 100_000 * b"[", b'{"images": 5}']
)
def test_a_broken_annotation_file_stops_under_both(tmp_path, capsys, text):
    root = broken(tmp_path / "coco", lambda images, contents: None)
    (root / "annotations/instances_train.json").write_bytes(text)
    for values in ({}, LENIENT):
        with pytest.raises(UserError, match="instances_train.json is no COCO annotation file"):
            open_training_source(DataConfig(source=str(root), **values))
    assert checked(capsys, root, "--split", "train")[0] == 1


@pytest.mark.parametrize("change", [{"id": 18.5}, {"id": "18"}, {"id": True}, {"name": None}, {"name": "\ud800"}])
def test_categories_are_taken_as_they_stand_or_refused(tmp_path, change):
    root = broken(tmp_path / "coco", lambda images, contents: contents["categories"][0].update(change))
    with pytest.raises(UserError, match="its id must be an integer below 2\\^62, and its name a text$"):
        open_source(str(root), "train")


# -- tables -----------------------------------------------------------------------------------------------------------


def of_objects(**values):
    return lambda row: row["objects"].update({key: value(row["objects"][key]) for key, value in values.items()})


TABLE_FAULTS = {
    "nan": ("box", of_objects(bbox=lambda boxes: [[1.0, float("nan"), 2.0, 3.0], *boxes[1:]])),
    "negative": ("box", of_objects(bbox=lambda boxes: [[1.0, 2.0, -2.0, 3.0], *boxes[1:]])),
    "three numbers": ("box", of_objects(bbox=lambda boxes: [[1.0, 2.0, 3.0], *boxes[1:]])),
    "area": ("box", of_objects(area=lambda areas: [float("nan"), *areas[1:]])),
    "crowd": ("box", of_objects(iscrowd=lambda crowds: [2, *crowds[1:]])),
    "lengths": ("row", of_objects(category=lambda categories: categories[1:])),
    "truncated": ("broken image", lambda row: row["image"].update(bytes=row["image"]["bytes"][:-100])),
    "no image": ("missing image", lambda row: row.update(image=None)),
    "absolute": ("file name", lambda row: row.update(image={"bytes": None, "path": "/etc/passwd"})),
    "out of its folder": ("file name", lambda row: row.update(image={"bytes": None, "path": "../../etc/passwd"})),
    "missing": ("missing image", lambda row: row.update(image={"bytes": None, "path": "nowhere.jpg"})),
    "same id": ("image id", lambda row: row.update(image_id=ROWS[0]["image_id"])),
    "other size": ("other size", lambda row: row.update(width=7)),
}
JSON_FAULTS = {
    "box of letters": ("box", of_objects(bbox=lambda boxes: ["1234", *boxes[1:]])),
    "boxes of a number": ("row", of_objects(bbox=lambda boxes: 5)),
    "category of a list": ("row", of_objects(category=lambda categories: [[1], *categories[1:]])),
    "area of a string": ("box", of_objects(area=lambda areas: ["5", *areas[1:]])),
    "half a crowd": ("box", of_objects(iscrowd=lambda crowds: [0.5, *crowds[1:]])),
    "unknown category": ("category", of_objects(category=lambda categories: [77, *categories[1:]])),
    "category that is true": ("category", of_objects(category=lambda categories: [True, *categories[1:]])),
    "objects of a string": ("row", lambda row: row.update(objects="none")),
    "no objects": ("row", lambda row: row.pop("objects")),
    "id of a string": ("image id", lambda row: row.update(image_id="7")),
    "large id": ("image id", lambda row: row.update(image_id=2**62)),
    "width of a string": ("other size", lambda row: row.update(width="64")),
}


def changed_table(change):
    stored, features = table("lists", ROWS)
    change(stored[2])
    features["image"] = {"bytes": Value("binary"), "path": Value("string")}
    return stored, features


@pytest.mark.parametrize("name", [*TABLE_FAULTS, *JSON_FAULTS])
def test_a_bad_row_of_a_table(tmp_path, capsys, name):
    kind, change = (TABLE_FAULTS | JSON_FAULTS)[name]
    stored, features = changed_table(change)
    folder = tmp_path / "t"
    if name in JSON_FAULTS:
        write_tars(folder, stored)
        for file in folder.glob("val-*"):
            file.rename(folder / file.name.replace("val", "train"))
    else:
        folder.mkdir()
        datasets.Dataset.from_list(stored, features=features).to_parquet(folder / "train-0.parquet")
    (folder / "manifest_train.json").write_text(json.dumps({"class_names": NAMES, "box_format": "xywh"}))

    if name != "same id":  # which only a pass over all rows shows
        with pytest.raises(UserError, match="row 2 |image 106|image 7|sample|00002") as error:
            samples(open_source(str(folder), "train"))
        assert "\n" not in str(error.value)
    code, out = checked(capsys, folder, "--split", "train")
    assert code == 1 and f"  {kind} " in out and "1 of 6 rows are bad" in out
    source = open_training_source(DataConfig(source=str(folder), **LENIENT))
    assert [fault.kind for fault in source.faults] == [kind]
    assert list(samples(source)) == [row["image_id"] for row in ROWS if row is not BAD]


def test_a_broken_sample_of_a_tar(tmp_path, capsys):
    stored, _ = table("lists", ROWS)
    stored[1]["filler"] = 9 * "x"
    folder = Path(write_tars(tmp_path / "t", stored))
    (folder / "manifest_val.json").write_text(json.dumps({"class_names": NAMES, "box_format": "xywh"}))
    file = folder / "val-0000.tar"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"filler": "xxxxxxxxx"', b'"image": {"bytes": 5}'))  # in place of the image itself
    with pytest.raises(UserError, match="row 1 is not understood"):
        samples(open_source(str(folder), "val"))
    file.write_bytes(bytes(len(whole)))
    with pytest.raises(UserError, match="val-0000.tar holds no samples$"):
        samples(open_source(str(folder), "val"))
    file.write_bytes(whole)
    about = json.dumps({key: value for key, value in stored[2].items() if key != "image"}).encode()
    file.write_bytes(file.read_bytes().replace(about, b"!" + about[1:]))
    with pytest.raises(UserError, match=r"val-0000.tar: sample '00002' has a .json that cannot be read: Expecting"):
        samples(open_source(str(folder), "val"))
    code, out = checked(capsys, folder, "--split", "val")
    assert code == 1 and "1 of 6 rows are bad" in out
    kept = leave_out(open_source(str(folder), "val", keep_bad=True), 0.5)
    assert [row["image_id"] for row in read_rows(kept.stream)] == [row["image_id"] for row in ROWS if row is not BAD]


def test_a_file_of_many_rows_that_breaks_off_stops_under_both(tmp_path, capsys):
    folder = Path(write_table(tmp_path / "t", "parquet", *table("lists", ROWS)))
    file = folder / "val-00001-of-00002.parquet"
    data = bytearray(file.read_bytes())
    data[20 : len(data) // 2] = bytes(len(data) // 2 - 20)  # its footer is whole
    file.write_bytes(data)
    config = DataConfig(box_format="xywh")
    with pytest.raises(UserError, match="val-00001-of-00002.parquet cannot be read: ") as error:
        list(read_rows(open_source(str(folder), "val", config).stream))
    assert "\n" not in str(error.value)
    code, out = checked(capsys, folder, "--split", "val", "data.box_format=xywh")
    assert code == 1 and "val: " in out and "val-00001-of-00002.parquet cannot be read" in out
    with pytest.raises(UserError, match="cannot be read"):
        leave_out(open_source(str(folder), "val", config, keep_bad=True), 0.9)


def test_unlabelled_images(tmp_path, capsys):
    folder = write_images(tmp_path / "more", ROWS)
    (folder / FILE).write_bytes(BAD["jpeg"][:-100])
    write_coco(tmp_path / "coco", "train", ROWS)
    config = DataConfig(source=str(tmp_path / "coco"), unlabelled=str(folder), **LENIENT)
    source = open_training_source(config)
    assert source.num_rows == 2 * len(ROWS) - 1 and len(samples(source)) == source.num_rows
    assert [(fault.kind, fault.image_id) for fault in source.faults] == [("broken image", 2)]
    file = tmp_path / "found.json"
    code, out = checked(capsys, config.source, "--split", "train", f"data.unlabelled={folder}", "--json", file)
    stored = json.loads(file.read_text())[f"unlabelled, {folder}"]
    assert stored["num_rows"] == 6 and [fault["kind"] for fault in stored["faults"]] == ["broken image"]
    assert code == 1 and "train: 0 of 6" in out and f"unlabelled, {folder}: 1 of 6" in out
    alone = open_training_source(DataConfig(train_split=None, unlabelled=str(folder), **LENIENT))
    assert alone.num_rows == len(ROWS) - 1


def test_what_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    root = broken(tmp_path / "coco", lambda images, contents: None)
    (tmp_path / "file").touch()
    arguments = [str(root), "--split", "train", "--workers", "1", "--json"]
    assert run("check-data", [*arguments, str(tmp_path / "file/found.json")]) == 2
    assert f"error: {tmp_path / 'file'}: File exists\n" in capsys.readouterr().err
    assert run("check-data", [*arguments, str(tmp_path / "file/a\x1b[2J\n")]) == 2
    assert f"error: {tmp_path / 'file'}" in (err := capsys.readouterr().err) and "\x1b" not in err
    assert run("check-data", [*arguments, "/dev/full"]) == 2  # a disk without room
    assert "error: No space left on device\n" in capsys.readouterr().err
    monkeypatch.setenv("ASD_HF_CACHE", str(tmp_path / "file/cache"))
    assert run("check-data", arguments[:-1]) == 2
    assert f"error: {tmp_path / 'file/cache'}" in capsys.readouterr().err


# -- what a run reads -------------------------------------------------------------------------------------------------


def many(root: Path, count: int, bad: tuple[int, ...]) -> tuple[Path, list[int]]:
    """A COCO folder of `count` images, those at the places `bad` broken, and the ids of the others."""
    rows = tiny_rows(count)
    write_coco(root, "train", rows)
    for place in bad:
        (root / f"train/{rows[place]['image_id']:06d}.jpg").write_bytes(b"broken")
    return root, [row["image_id"] for place, row in enumerate(rows) if place not in bad]


def stream(root: Path, workers: int = 0, rank: int = 0, world_size: int = 1, **values) -> DetectionStream:
    config = DataConfig(source=str(root), **{**LENIENT, **values})
    transform = RowTransform(config, training=True, seed=5)
    return DetectionStream(
        open_training_source(config), transform, 2, rank, world_size, workers, seed=5, shuffle_buffer=8
    )


def batches(stream: DetectionStream, epoch: int, skip: int = 0) -> list[dict]:
    stream.set_epoch(epoch)
    stream.skip_batches = skip
    return list(build_loader(stream))


def ids(found: list[dict]) -> list[list[int]]:
    return [[int(label["image_id"]) for label in batch["labels"]] for batch in found]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_seed_and_epoch_alone_and_resume_exactly(tmp_path, workers):
    root, good = many(tmp_path / "coco", 16, bad=(3, 4, 11))
    first = stream(root, workers)
    found = {epoch: batches(first, epoch) for epoch in (0, 1)}
    for epoch, whole in found.items():
        assert len(whole) == first.batches_per_epoch == 6  # 13 rows in batches of 2, of one or two readers
        seen = sum(ids(whole), [])
        assert len(set(seen)) == 12 and set(seen) <= set(good)
        again = stream(root, workers)
        for skip in (0, 1, 4) if epoch else (0,):
            torch.testing.assert_close(batches(again, epoch, skip), whole[skip:], rtol=0, atol=0)
    assert ids(found[0]) != ids(found[1])


def test_ranks_share_the_good_rows(tmp_path):
    root, good = many(tmp_path / "coco", 16, bad=(0, 1, 15))
    seen = [sum(ids(batches(stream(root, rank=rank, world_size=2), 0)), []) for rank in range(2)]
    assert len(seen[0]) == len(seen[1]) == 6 and len(set(sum(seen, []))) == 12 and set(sum(seen, [])) <= set(good)


def test_skip_changes_nothing_of_sound_data(tmp_path):
    root, _ = many(tmp_path / "coco", 10, bad=())
    strict, lenient = stream(root, bad_rows="raise"), stream(root)
    torch.testing.assert_close(batches(lenient, 1), batches(strict, 1), rtol=0, atol=0)
    assert lenient.source.fingerprint == strict.source.fingerprint


def test_too_many_bad_rows_stop_the_run(tmp_path):
    root, _ = many(tmp_path / "coco", 10, bad=(3, 4))
    with pytest.raises(UserError, match="^2 of 10 rows are bad, more than data.max_bad_share=0.19 allows: image 109 "):
        stream(root, max_bad_share=0.19)
    assert len(stream(root, max_bad_share=0.2).source.faults) == 2
    root, _ = many(tmp_path / "all", 3, bad=(0, 1, 2))
    with pytest.raises(UserError, match="3 of 3 rows are bad"):
        stream(root, max_bad_share=0.99)
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match=r"data.max_bad_share is .*: it must be in \[0, 1\)"):
            DataConfig(max_bad_share=share)
    with pytest.raises(UserError, match="data.bad_rows is 'ignore': it must be one of raise, skip"):
        DataConfig(bad_rows="ignore")


def test_rows_are_read_once_until_a_file_changes(tmp_path, monkeypatch):
    root, good = many(tmp_path / "coco", 6, bad=(3,))
    decoded = []
    decode = check.decode
    monkeypatch.setattr(check, "decode", lambda row: decoded.append(row["image_id"]) or decode(row))
    report = check_source(open_source(str(root), "train", keep_bad=True))
    assert sorted(decoded) == sorted([*good, 109])
    assert check_source(open_source(str(root), "train", keep_bad=True)) == report and len(decoded) == 6
    (root / "train/000109.jpg").write_bytes(tiny_rows(6)[3]["jpeg"])
    assert not check_source(open_source(str(root), "train", keep_bad=True)).faults and len(decoded) == 12
    check_source(open_source(str(root), "train", keep_bad=True), fresh=True)
    assert len(decoded) == 18


def test_data_that_change_while_a_run_reads_them(tmp_path):
    """A row that was good when all were read is an error under both policies: it was counted."""
    root, _ = many(tmp_path / "coco", 6, bad=(3,))
    source = stream(root)
    for file in (root / "train").iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"^image \d+ \(.*\) cannot be decoded: it is no image"):
        batches(source, 0)
    folder = Path(write_table(tmp_path / "t", "parquet", *changed_table(TABLE_FAULTS["nan"][1])))
    config = DataConfig(box_format="xywh")
    kept = leave_out(open_source(str(folder), "val", config, keep_bad=True), 0.5)
    for file in folder.glob("*.parquet"):
        file.unlink()
    write_table(folder, "parquet", *changed_table(lambda row: row.update(image_id=7)))
    with pytest.raises(UserError, match="image 7 lies where a bad row was: run `asd-hf check-data` again"):
        list(read_rows(kept.stream))


def test_repairs_of_a_table_are_said_once(tmp_path, caplog):
    stored, features = changed_table(of_objects(bbox=lambda boxes: [[1.0, 2.0, 0.0, 3.0], *boxes[1:]]))
    config = DataConfig(box_format="xywh")
    source = open_source(write_table(tmp_path / "t", "parquet", stored, features), "val", config)
    for _ in range(2):
        assert len(samples(source)) == len(ROWS)
    assert caplog.text.count("image 106: box without area: gives no label in training") == 1


def test_box_notes_agree_with_the_transform():
    rng = np.random.default_rng(0)
    transform = RowTransform(DataConfig(eval_size=40), training=False)
    kinds = set()
    for _ in range(40):
        boxes = np.concatenate([rng.uniform(-30, 90, (8, 2)), rng.uniform(-5, 60, (8, 2)).clip(0)], 1)
        objects = {"bbox": boxes.tolist(), "category": [0] * 8, "area": [1.0] * 8, "iscrowd": [0] * 8}
        row = {"image": {"bytes": BAD["jpeg"], "path": None}, "image_id": 1, "width": WIDTH, "height": HEIGHT}
        labels = transform({**row, "objects": objects})["labels"]
        notes = [box_note(box, WIDTH, HEIGHT) for box in boxes]
        kept = boxes[[note != "box without area" for note in notes]]
        assert len(labels["boxes"]) == len(kept)
        size = labels["boxes"][:, 2:].double() * torch.tensor([WIDTH, HEIGHT])
        cut = (torch.tensor(kept[:, 2:]) - size > 1.0).any(1)
        clipped = torch.tensor([note == "clipped box" for note in notes if note != "box without area"])
        assert (clipped >= cut)[~(kept[:, 2:] - size.numpy() > 0.99).all(1)].all()
        kinds |= set(notes)
    assert kinds == {None, "box without area", "clipped box"}


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return write_places(tmp_path_factory.mktemp("places"))


def trainer(places, tmp_path, **data):
    values = {"bad_rows": "skip", "max_bad_share": 0.3} | data
    training = {"output_dir": str(tmp_path / "out"), "save_steps": 2, "report_to": [], "disable_tqdm": True}
    return Parts(build_config(configuration(places, teacher=None, data=values, **training))).trainer()


def test_a_run_says_what_it_left_out_and_resumes_with_it(tmp_path, caplog):
    places = write_places(tmp_path / "places")
    image = places / "coco/train/000109.jpg"
    whole = image.read_bytes()
    image.write_bytes(whole[:-100])
    with caplog.at_level(logging.INFO, "asd_hf"):
        trainer(places, tmp_path).train()
    file = tmp_path / "out/skipped_rows.jsonl"
    (line,) = map(json.loads, file.read_text().splitlines())
    assert line["image_id"] == 109 and line["file"] == str(image) and line["kind"] == "broken image"
    assert "cannot be decoded: image file is truncated" in line["why"]
    assert "1 of 12 rows are bad and left out: image 109" in caplog.text
    assert "training data: 1 bad rows left out, see skipped_rows.jsonl" in caplog.text

    checkpoint = str(tmp_path / "out/checkpoint-2")
    file.write_text(json.dumps(line | {"file": "elsewhere/000109.jpg", "why": "cannot be decoded"}))
    trainer(places, tmp_path).train(resume_from_checkpoint=checkpoint)
    assert json.loads(file.read_text()) == line
    image.write_bytes(whole)
    with pytest.raises(UserError, match="left out 1 bad rows, now it would be 0, or others"):
        trainer(places, tmp_path).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(UserError, match="left out 1 bad rows, now it would be 0, or others"):
        trainer(places, tmp_path, bad_rows="raise").train(resume_from_checkpoint=checkpoint)
    trainer(places, tmp_path).train()
    assert not file.exists()


def on_rank(rank: int, folder: str, answers) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    lost = Fault("missing image", 7, "a.jpg", "why")
    require_agreement([replace(lost, file=f"node{rank}/a.jpg")])
    for faults in ([lost] * rank, [replace(lost, image_id=rank)]):
        try:
            require_agreement(faults)
        except UserError as error:
            answers.append(str(error))
    dist.destroy_process_group()


def test_ranks_whose_data_differ_stop(tmp_path):
    require_agreement([])  # alone
    with mp.Manager() as manager:
        answers = manager.list()
        mp.start_processes(on_rank, (str(tmp_path), answers), nprocs=2, start_method="fork")
        text = "the ranks leave out different bad rows ({}): their copies of the data are unequal"
        assert sorted(answers) == sorted([text.format("0, 1"), text.format("1, 1")] * 2)


def test_evaluation_leaves_nothing_out(places, tmp_path, capsys):
    image = places / "coco/val/000103.jpg"  # the second
    whole = image.read_bytes()
    try:
        image.write_bytes(whole[:-100])
        with pytest.raises(UserError, match="^evaluation leaves no image out, whatever data.bad_rows says: image 103"):
            trainer(places, tmp_path)
        trainer(places, tmp_path, num_eval_images=1)
        arguments = ["--model", str(places / "detr"), "--data", str(places / "coco"), "data.bad_rows=skip"]
        assert run("evaluate", arguments) == 2
        assert "error: data.bad_rows has no use here: evaluation leaves no image out" in capsys.readouterr().err
    finally:
        image.write_bytes(whole)


# -- anything at all --------------------------------------------------------------------------------------------------

WEIRD = [None, True, -1, 0, 2**63, 2**64, 1e308, float("nan"), float("inf"), "", "x", "\ud800", "../x", [], {}, [[]]]


def places_in(tree: object) -> list[tuple]:
    """(container, key) of everything in nested lists and dictionaries."""
    pairs = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    return [(tree, key) for key, _ in pairs] + [place for _, value in pairs for place in places_in(value)]


def mutated(tree: object, rng: random.Random) -> object:
    """A copy in which one to three places hold something else, or nothing."""
    tree = {"": json.loads(json.dumps(tree))}
    for _ in range(rng.randint(1, 3)):
        places = places_in(tree)
        container, key = rng.choice(places)
        other, its = rng.choice(places)
        value = rng.choice([rng.choice(WEIRD), json.loads(json.dumps(other[its]))])
        if rng.random() < 0.2 and isinstance(container, dict) and container is not tree:
            del container[key]
        else:
            container[key] = value
    return tree[""]


def torn(text: bytes, rng: random.Random) -> bytes:
    """The text with bytes changed, removed or doubled."""
    data = bytearray(text)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(data))
        data[at : at + rng.choice([0, 1, 1, 1, 30])] = rng.choice(
            [b"", bytes([rng.randrange(256)]), data[at : at + 20]]
        )
    return bytes(data)


def only_user_errors(function, what: str) -> bool:
    try:
        function()
    except UserError as error:
        assert "\n" not in str(error), what
        return False
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\nof {what}") from error
    return True


def test_any_annotation_file_is_read_or_refused(tmp_path):
    rng, outcomes = random.Random(0), []
    contents = write_coco(tmp_path, "train", ROWS[:3])
    file = tmp_path / "annotations/instances_train.json"
    text = json.dumps(contents).encode()
    for number in range(200):
        data = torn(text, rng) if number % 3 == 0 else json.dumps(mutated(contents, rng)).encode()
        file.write_bytes(data)

        def read(number=number):
            from asd_hf.data.coco import _build_index  # below the cache, which would keep each index

            folder = tmp_path / f"index{number}"
            _build_index(file, folder, labelled=True)
            faults = json.loads((folder / "about.json").read_text())["faults"]
            if faults:
                raise UserError(faults[0]["why"])

        outcomes.append(only_user_errors(read, data.decode(errors="replace")))
    assert 10 < sum(outcomes) < 190


def test_any_configuration_is_read_or_refused(tmp_path):
    rng, outcomes = random.Random(0), []
    sections = configuration(tmp_path, data={"source": "shapes", **LENIENT}) | {"method": {"name": "asd", "layers": 1}}
    text = yaml.safe_dump(sections).encode()
    file = tmp_path / "run.yaml"
    for number in range(300):
        data = torn(text, rng) if number % 3 == 0 else yaml.dump(mutated(sections, rng)).encode(errors="replace")
        file.write_bytes(data)
        outcomes.append(only_user_errors(lambda: load_config(file), data.decode(errors="replace")))
    assert 10 < sum(outcomes) < 290
