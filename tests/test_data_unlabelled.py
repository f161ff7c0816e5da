"""Images without annotations: where they may lie, and how they are mixed with labelled ones."""

from __future__ import annotations

import io
import json
import logging
import os
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Features, Value
from PIL import Image

from asd_hf.data import (
    DataConfig,
    DetectionStream,
    RowTransform,
    Source,
    build_loader,
    open_source,
    open_training_source,
)
from asd_hf.data.folder import open_images
from asd_hf.data.mixture import UNLABELLED_BIT, mark_unlabelled, mix
from asd_hf.data.rows import cut_evenly, read_rows, stream_of
from asd_hf.errors import UserError
from tests.test_data_sources import table, write_table, write_tars
from tests.test_data_stream import Numbered, Simulated, Tagged, batches
from tests.tiny_data import IDS, NAMES, SHARED, jpeg, tiny_rows, write_coco, write_images

ROWS, BARE = tiny_rows(23), tiny_rows(14, first_id=100)
SIZES = {"train_sizes": [40, 48], "eval_size": 48, "max_size": 80}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ASD_HF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def read(source) -> list[dict]:
    return list(read_rows(source.stream))


def unlabelled(path, **values) -> Source:
    return open_training_source(DataConfig(train_split=None, unlabelled=str(path), **values))


def contents(row: dict) -> bytes:
    image = row["image"]
    return Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]


# -- a folder of images -----------------------------------------------------------------------------------------------


def test_a_folder_is_searched_with_its_subfolders(tmp_path):
    root = tmp_path / "images"
    names = ["b.jpg", "a/z.PNG", "a/b/c.jpeg", "a.webp", "z.bmp", "a b/ü.JPG", "10.jpg", "9.jpg"]
    others = ["a/notes.txt", "b.jpg.part", "list.json", ".hidden.jpg", ".thumbs/x.jpg", "a/noext"]
    for index, name in enumerate(names + others):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(20 + index, 30, index))
    (root / "folder.jpg").mkdir()
    source = unlabelled(root)
    found = read(source)
    assert [Path(row["image"]["path"]).relative_to(root).as_posix() for row in found] == sorted(names)
    assert [row["image_id"] - UNLABELLED_BIT for row in found] == list(range(len(names)))
    assert {(row["image"]["bytes"], row["width"], row["height"], row["objects"]) for row in found} == {(None,) * 4}
    assert (source.class_names, source.category_ids) == ([], [])
    assert source.num_rows == len(names) == source.stream.num_shards


def test_the_index_of_a_folder_is_built_once_and_anew_when_a_file_changes(tmp_path, cache):
    root = write_images(tmp_path / "images", BARE)
    first = root / "000100.jpg"

    def rename():
        first.rename(root / "0.jpg")
        os.utime(root / "0.jpg", ns=(7, 7))

    def grow():
        (root / "0.jpg").write_bytes(b"0" * 99)
        os.utime(root / "0.jpg", ns=(7, 7))

    changes = [lambda: None, rename, grow, lambda: os.utime(root / "0.jpg", ns=(8, 8)), (root / "000103.jpg").unlink]
    prints = []
    for change in changes:
        change()
        source = unlabelled(root)
        assert unlabelled(root).fingerprint == source.fingerprint
        prints.append(source.fingerprint)
        assert source.num_rows == len(list(root.iterdir()))
    assert len(set(prints)) == len(changes)
    assert len([path for path in (cache / "folder").iterdir() if path.is_dir()]) == len(changes)


def test_links_out_of_the_folder_are_not_followed(tmp_path, caplog):
    root, outside = write_images(tmp_path / "images", BARE[:2]), write_images(tmp_path / "outside", BARE[2:])
    (root / "inside.jpg").symlink_to("000100.jpg")
    with caplog.at_level(logging.WARNING):
        assert unlabelled(root).num_rows == 3 and not caplog.records
    (root / "escape.jpg").symlink_to(outside / "000106.jpg")
    (root / "broken.jpg").symlink_to(root / "nowhere.jpg")
    (root / "folder").symlink_to(outside)
    (root / "circle").symlink_to(root)
    (tmp_path / "alias").symlink_to(root)
    for folder in (root, tmp_path / "alias"):  # the folder itself may be a link
        caplog.clear()
        found = [Path(row["image"]["path"]).name for row in read(unlabelled(folder))]
        assert found == ["000100.jpg", "000103.jpg", "inside.jpg"]
        assert f"{folder}: 4 links to folders or out of it are not followed, {folder}/broken.jpg" in caplog.text


def test_many_images_make_shards_that_are_read_apart(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    for index in range(150):
        (root / f"{index:03d}.jpg").write_bytes(b"")
    source = unlabelled(root)
    assert source.shard_lengths == cut_evenly(150, 64)
    own = [list(read_rows(source.stream.shard(num_shards=64, index=shard))) for shard in range(64)]
    assert [len(rows) for rows in own] == source.shard_lengths
    assert [row["image_id"] for rows in own for row in rows] == [UNLABELLED_BIT + i for i in range(150)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("images", r"^data.unlabelled: .*/images holds no images: looked for .jpg, .jpeg, .png, .webp, .bmp"),
        ("images#train", r"^data.unlabelled: .*/images holds no split 'train'"),
        ("missing", "^data.unlabelled: source '.*/missing', split 'train': no such folder, and not to be had"),
        ("list.json", "^data.unlabelled: source '.*list.json' is a file: name the folder"),
        (
            "coco",
            "^data.unlabelled: .*instances_train.json or .*image_info_train.json does not exist; splits .*: dev, x$",
        ),
    ],
)
def test_what_is_no_source_of_images_is_named(tmp_path, monkeypatch, name, message):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "images/sub").mkdir(parents=True)
    (tmp_path / "images/sub/a.txt").write_text("")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "coco/annotations").mkdir(parents=True)
    for kind in ("instances_x", "image_info_dev", "image_info_x"):
        (tmp_path / f"coco/annotations/{kind}.json").write_text("{}")
    with pytest.raises(UserError, match=message) as error:
        unlabelled(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "#train"])
def test_no_name_is_not_the_working_folder(tmp_path, monkeypatch, name):
    write_images(tmp_path / "images", BARE[:1])
    monkeypatch.chdir(tmp_path / "images")
    with pytest.raises(UserError, match="^data.unlabelled: source '' is empty: name a folder or a data set"):
        unlabelled(name)
    with pytest.raises(UserError, match="^source '' is empty"):
        open_source("", "train")
    assert unlabelled(".").num_rows == 1


def test_a_name_that_is_no_text(tmp_path):
    root = write_images(tmp_path / "images", BARE[:1])
    try:
        Path(os.fsdecode(os.fsencode(root) + b"/\xff.jpg")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes no such name")
    with pytest.raises(UserError, match="is not UTF-8: rename the file"):
        open_images(root)


# -- other sources, their annotations left out ------------------------------------------------------------------------


def image_info(root: Path, split: str) -> None:
    """Leaves the annotation file as COCO's own of unlabelled images are."""
    file = root / f"annotations/instances_{split}.json"
    images = json.loads(file.read_text())["images"]
    file.with_name(f"image_info_{split}.json").write_text(json.dumps({"images": images, "categories": []}))
    file.unlink()


def write(root: Path, layout: str) -> str:
    """`BARE` in a layout, and the name under which it is to be found."""
    if layout == "folder":
        return str(write_images(root / "images", BARE))
    if layout.startswith("coco"):
        write_coco(root, "val", BARE)
        if layout == "coco-image_info":
            image_info(root, "val")
        elif layout == "coco-bare":
            file = root / "annotations/instances_val.json"
            file.write_text(json.dumps({"images": json.loads(file.read_text())["images"]}))
        return f"{root}#val"
    stored, features = table("lists", BARE)
    if layout == "tar-bare":
        return write_tars(root, [{"image": row["image"]} for row in stored]) + "#val"
    if layout.endswith("-bare"):
        stored = [{"image": row["image"], "image_id": f"name {row['image_id']}"} for row in stored]
        features = Features({"image": datasets.Image(), "image_id": Value("string")})
    if layout.endswith("-alone"):
        stored = [{"image": row["image"]} for row in stored]
        features = Features({"image": datasets.Image()})
    if layout == "tar":
        return write_tars(root, stored) + "#val"
    return write_table(root, layout.split("_")[0], stored, features) + "#val"


LAYOUTS = ["folder", "coco", "coco-image_info", "coco-bare", "tar", "tar-bare"]
LAYOUTS += [f"{layout}{kind}" for layout in ("saved", "parquet") for kind in ("", "_-bare", "_-alone")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_source_gives_its_images_alone(tmp_path, layout):
    source = unlabelled(write(tmp_path / "d", layout))
    found = read(source)
    assert [contents(row) for row in found] == [row["jpeg"] for row in BARE]
    assert {row["objects"] for row in found} == {None} and (source.class_names, source.category_ids) == ([], [])
    assert source.num_rows == (None if layout.startswith("tar") else len(BARE))
    ids = [row["image_id"] - UNLABELLED_BIT for row in found]
    assert len(set(ids)) == len(BARE) and min(ids) >= 0
    if layout.startswith("coco"):
        assert ids == [row["image_id"] for row in BARE]
        assert [(row["width"], row["height"]) for row in found] == [(row["width"], row["height"]) for row in BARE]
    elif not layout.startswith("tar"):
        assert ids == list(range(len(BARE)))


def test_the_split_is_train_where_none_is_named(tmp_path):
    write_coco(tmp_path / "a", "train", BARE)
    write_coco(tmp_path / "a#b", "train", BARE[:3])
    assert unlabelled(tmp_path / "a").num_rows == unlabelled(f"{tmp_path}/a#train").num_rows == len(BARE)
    assert unlabelled(tmp_path / "a#b").num_rows == 3  # a folder of the whole name comes first
    assert unlabelled("shapes?num_train=5&num_val=3&image_size=40").num_rows == 5
    assert unlabelled("shapes?num_train=5&num_val=3&image_size=40#val").num_rows == 3
    with pytest.raises(UserError, match="^data.unlabelled: source 'shapes' has no split 'vall'"):
        unlabelled("shapes#vall")


def test_a_folder_of_tables_is_no_folder_of_images(tmp_path):
    folder = tmp_path / "t"
    write_table(folder, "parquet", *table("lists", BARE))
    write_images(folder / "images", BARE[:4])
    assert unlabelled(folder).num_rows == 4  # its shards are of another split
    for number in range(2):
        name = f"{number:05d}-of-00002.parquet"
        (folder / f"val-{name}").rename(folder / f"train-{name}")
    assert unlabelled(folder).num_rows == len(BARE)
    write_table(tmp_path / "saved", "saved", *table("lists", BARE))
    write_images(tmp_path / "saved/images", BARE[:4])
    assert unlabelled(tmp_path / "saved").num_rows == 3  # as `write_table` fills the split train


def test_a_file_without_annotations_is_not_labelled(tmp_path):
    write_coco(tmp_path, "val", BARE)
    image_info(tmp_path, "val")
    with pytest.raises(UserError, match="instances_val.json does not exist; splits of .*: none$"):
        open_source(str(tmp_path), "val")
    file = tmp_path / "annotations/image_info_val.json"
    file.rename(tmp_path / "annotations/instances_val.json")
    assert unlabelled(f"{tmp_path}#val").num_rows == len(BARE)
    with pytest.raises(UserError, match="is no COCO annotation file: KeyError: 'annotations'"):
        open_source(str(tmp_path), "val")  # the index of its images is no index of its annotations


# -- mixed with labelled images ---------------------------------------------------------------------------------------


def numbered(lengths, known=True, bare=False) -> Source:
    source = Source(stream_of(Numbered(lengths), len(lengths)), ["a"], [1], list(lengths) if known else None, "f")
    return mark_unlabelled(source) if bare else source


def stream_over(source: Source, batch: int, **options) -> DetectionStream:
    return DetectionStream(source, Tagged(), batch, **options)


@pytest.mark.parametrize("layout", ["folder", "coco-image_info", "parquet", "tar"])
def test_a_mixture_has_each_image_of_both_once(tmp_path, layout):
    write_coco(tmp_path / "coco", "train", ROWS)
    config = DataConfig(source=str(tmp_path / "coco"), unlabelled=write(tmp_path / "d", layout))
    alone, source = open_source(config.source, "train"), open_training_source(config)
    assert (source.class_names, source.category_ids) == (NAMES, IDS)
    found = read(source)
    labelled = sorted((row for row in found if row["objects"] is not None), key=lambda row: row["image_id"])
    assert labelled == read(alone)
    assert Counter(contents(row) for row in found if row["objects"] is None) == Counter(r["jpeg"] for r in BARE)
    assert len({row["image_id"] for row in found}) == len(ROWS) + len(BARE)
    if layout != "tar":
        assert source.num_rows == len(found)
        shards = source.stream.num_shards
        own = [len(list(read_rows(source.stream.shard(num_shards=shards, index=i)))) for i in range(shards)]
        assert own == source.shard_lengths
    others = [
        alone,
        unlabelled(config.unlabelled),
        open_training_source(DataConfig(**{**vars(config), "unlabelled": None})),
    ]
    assert len({source.fingerprint, *(other.fingerprint for other in others)}) == 3  # the last is the first
    assert open_training_source(config).fingerprint == source.fingerprint


def test_the_same_images_on_both_sides_are_different_images(tmp_path):
    write_coco(tmp_path, "train", ROWS)
    source = open_training_source(DataConfig(source=str(tmp_path), unlabelled=str(tmp_path)))
    ids = Counter(row["image_id"] for row in read(source))
    assert set(ids.values()) == {1} and len(ids) == 2 * len(ROWS)
    for extreme in (0, 7, -1, -(2**63), 2**63 - 1):
        (row,) = read(mark_unlabelled(Source(stream_of(One(extreme), 1), [], [], [1], "f")))
        assert row["image_id"] ^ UNLABELLED_BIT == extreme
        assert int(torch.tensor(row["image_id"])) == row["image_id"]  # an int64 like the others


class One:
    def __init__(self, image_id):
        self.image_id = image_id

    def __call__(self, shard):
        yield {"image_id": self.image_id, "objects": None}


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 0), (2, 3), (3, 1), (4, 2)])
@pytest.mark.parametrize(("first", "second"), [([37] * 3, [5] * 8), ([9], [40, 41]), (cut_evenly(70, 8), [16] * 8)])
def test_a_streamed_mixture_over_ranks_and_workers(world, workers, first, second, monkeypatch):
    source = mix(numbered(first), numbered(second, bare=True))
    every = {*range(sum(first)), *(UNLABELLED_BIT + i for i in range(sum(second)))}
    assert source.num_rows == len(every)
    for shuffle in (False, True):
        seen, counts = [], set()
        for rank in range(world):
            ranks = {"rank": rank, "world_size": world, "num_workers": workers}
            stream = stream_over(source, 2, shuffle=shuffle, drop_last=shuffle, shuffle_buffer=8, **ranks)
            found = batches(stream, Simulated(stream, monkeypatch))
            counts.add(len(found))
            seen += sum(found, [])
        assert len(set(seen)) == len(seen) and set(seen) <= every
        readers = world * max(1, workers)
        assert len(seen) >= (len(every) - 3 * readers - 0.02 * len(every) if shuffle else len(every))
        assert not shuffle or len(counts) == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (cut_evenly(1600, 64), cut_evenly(1700, 64)),  # two COCO parts
        (cut_evenly(320, 64), cut_evenly(3200, 64)),  # few labels
        (cut_evenly(2000, 4), cut_evenly(1000, 64)),  # few shards of the labelled part
        (cut_evenly(2000, 64), [250, 200, 150]),
    ],
)
@pytest.mark.parametrize("readers", [1, 8])
def test_batches_are_mixed_as_the_whole_is(first, second, readers):
    """Of every reader, with a buffer that is smaller than a shard: no worse than if each row were drawn by chance."""
    source, size = mix(numbered(first), numbered(second, bare=True)), 16
    share = sum(second) / (sum(first) + sum(second))
    chance = (share * (1 - share) / size) ** 0.5  # standard deviation of a batch
    found = []
    for rank in range(0, readers, 3):
        stream = stream_over(source, size, rank=rank, world_size=readers, shuffle_buffer=32)
        found.append([np.mean([i >= UNLABELLED_BIT for i in batch]) for batch in batches(stream)])
        assert abs(np.mean(found[-1]) - share) < 4 * chance / len(found[-1]) ** 0.5
    found = np.concatenate(found)
    assert abs(found.mean() - share) < 0.02
    assert np.abs(found - share).max() < 4 * chance + 1 / size
    assert found.std() < chance * (1 + 3 / (2 * len(found)) ** 0.5)


def test_the_lengths_of_the_shards_of_a_mixture():
    source = mix(numbered([5, 6]), numbered([1, 2, 30, 4], bare=True))
    assert source.shard_lengths == [5 + 1 + 30, 6 + 2 + 4]
    own = [list(read_rows(source.stream.shard(num_shards=2, index=shard))) for shard in range(2)]
    assert [len(rows) for rows in own] == source.shard_lengths


def test_the_shards_of_a_mixture_are_shared_out_by_readers():
    """Two COCO parts of unequal length: every reader opens shards of its own, as with the labelled part alone."""
    source = mix(numbered(cut_evenly(1183, 64)), numbered(cut_evenly(1234, 64), bare=True))
    assert stream_over(source, 2, rank=1, world_size=8, num_workers=4).groups == 32


def test_without_lengths_both_come_in_turn():
    for known in ((False, False), (True, False), (False, True)):
        source = mix(numbered([4, 3], known[0]), numbered([2, 1], known[1], bare=True))
        assert source.shard_lengths is None and source.num_rows is None
        kinds = "".join("ab"[row["image_id"] >= UNLABELLED_BIT] for row in read(source))
        assert kinds == "abab" + "aa" + "ba" + "aa"  # shard by shard
    stream = stream_over(source, 2, shuffle_buffer=3)
    assert stream.batches_per_epoch is None
    rows = [i for _, batch in zip(range(5), batches_of(stream), strict=False) for i in batch]
    assert len(set(rows)) == 10


def batches_of(stream):
    for batch in build_loader(stream):
        yield [int(labels["image_id"]) for labels in batch["labels"]]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_whole_way(tmp_path, workers):
    """From files to batches of two views; the pixels of an image are those that it has alone."""
    write_coco(tmp_path / "coco", "train", ROWS)
    config = DataConfig(
        source=str(tmp_path / "coco"), unlabelled=write(tmp_path / "d", "folder"), teacher_size=64, **SIZES
    )
    transform = RowTransform(config, training=True, seed=1)
    stream = DetectionStream(open_training_source(config), transform, 3, num_workers=workers)
    alone = {row["image_id"]: transform(row) for row in read(unlabelled(config.unlabelled))}
    alone |= {row["image_id"]: transform(row) for row in read(open_source(config.source, "train"))}
    kinds = Counter()
    for batch in build_loader(stream):
        assert batch["teacher_pixel_values"].shape[0] == batch["pixel_values"].shape[0] == 3
        for index, labels in enumerate(batch["labels"]):
            sample = alone.pop(int(labels["image_id"]))
            for view in ("pixel_values", "teacher_pixel_values"):
                _, h, w = sample[view].shape
                assert torch.equal(batch[view][index, :, :h, :w], sample[view])
            torch.testing.assert_close(labels, sample["labels"], rtol=0, atol=0)
            assert labels["labelled"] is (int(labels["image_id"]) < UNLABELLED_BIT)
            kinds[labels["labelled"]] += 1
    assert len(alone) <= 3 * max(1, workers) and min(kinds.values()) >= 14 - 3 * max(1, workers)


def test_a_folder_of_photographs():
    folder = SHARED / "bccd/train"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    files = sorted(folder.glob("*.jpg"))
    source = unlabelled(folder, teacher_size=200, **SIZES)
    assert source.num_rows == len(files) > 10
    transform = RowTransform(DataConfig(augmentation="none", **SIZES), training=True)
    for row, file in zip(read(source)[:5], files, strict=False):
        with Image.open(file) as image:
            assert transform(row)["labels"]["orig_size"].tolist() == [image.height, image.width]


def test_an_unlabelled_image_that_cannot_be_read_is_named(tmp_path):
    root = write_images(tmp_path / "images", BARE)
    (root / "000103.jpg").write_bytes(b"no image")
    stream = DetectionStream(unlabelled(root), RowTransform(DataConfig(**SIZES), True), 14)
    with pytest.raises(UserError, match=r"^image \d+ \(.*/images/000103.jpg\) cannot be decoded"):
        list(build_loader(stream))


def test_deep_images_are_refused(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(buffer, "PNG")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="a.png.* has more than 8 bits a channel"):
        RowTransform(DataConfig(**SIZES), True)(read(unlabelled(tmp_path / "images"))[0])
