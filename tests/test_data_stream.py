from __future__ import annotations

import itertools
import math

import pytest
import torch

from asd_hf.data import DataConfig, DetectionStream, RowTransform, Source, build_loader, open_source
from asd_hf.data.rows import cut_evenly, stream_of
from asd_hf.errors import UserError
from tests.tiny_data import tiny_rows, write_coco


class Numbered:
    """Rows that are only a number, in shards of the given lengths."""

    def __init__(self, lengths):
        self.lengths = lengths

    def __call__(self, shard):
        first = sum(self.lengths[:shard])
        for number in range(first, first + self.lengths[shard]):
            yield {"image_id": number}


class Tagged:
    """A sample that carries its row's number and the epoch; row `broken` cannot be read."""

    def __init__(self, broken=None):
        self.epoch, self.broken, self.calls = 0, broken, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __call__(self, row):
        self.calls += 1
        if row["image_id"] == self.broken:
            raise UserError(f"image {self.broken} cannot be decoded: it is broken")
        tags = {"image_id": torch.tensor(row["image_id"]), "orig_size": torch.tensor([self.epoch, 0])}
        return {"pixel_values": torch.zeros(3, 1, 1, dtype=torch.uint8), "labels": tags}


def numbered(lengths, known=True) -> Source:
    return Source(stream_of(Numbered(lengths), len(lengths)), ["a"], [1], list(lengths) if known else None, "f")


def make(source, batch=2, **options) -> DetectionStream:
    return DetectionStream(source, Tagged(options.pop("broken", None)), batch, **options)


def batches(stream, loader=None) -> list[list[int]]:
    loader = loader or build_loader(stream)
    return [[int(labels["image_id"]) for labels in batch["labels"]] for batch in loader]


class Simulated:
    """What `build_loader` with workers gives, in one process: the workers' batches in turn."""

    def __init__(self, stream, monkeypatch):
        self.stream, self.monkeypatch = stream, monkeypatch

    def __iter__(self):
        from asd_hf.data import stream as module
        from asd_hf.data.collate import unpack

        workers = self.stream.num_workers
        iterators = []
        for worker in range(max(1, workers)):
            info = type("Info", (), {"num_workers": workers, "id": worker}) if workers else None
            with self.monkeypatch.context() as patch:
                patch.setattr(module, "get_worker_info", lambda info=info: info)
                iterators.append(list(self.stream))
        for turn in itertools.zip_longest(*iterators):
            yield from (unpack(batch) for batch in turn if batch is not None)


GRID = list(itertools.product([1, 2, 3], [0, 1, 2, 3], [1, 4, 5, 12]))


@pytest.mark.parametrize(("world", "workers", "shards"), GRID)
def test_evaluation_reads_every_row_once(world, workers, shards, monkeypatch):
    source = numbered(cut_evenly(61, shards))
    seen = []
    for rank in range(world):
        stream = make(source, 4, rank=rank, world_size=world, num_workers=workers, shuffle=False, drop_last=False)
        found = batches(stream, Simulated(stream, monkeypatch))
        assert len(found) == stream.batches_per_epoch == len(stream)
        seen += sum(found, [])
    assert sorted(seen) == list(range(61))


@pytest.mark.parametrize(("world", "workers", "shards"), GRID)
def test_training_repeats_nothing_and_ends_together(world, workers, shards, monkeypatch):
    source = numbered(cut_evenly(97, shards))
    left_over = []
    for epoch in range(2):
        counts, seen = set(), []
        for rank in range(world):
            stream = make(source, 2, rank=rank, world_size=world, num_workers=workers, shuffle_buffer=10)
            stream.set_epoch(epoch)
            found = batches(stream, Simulated(stream, monkeypatch))
            counts.add(len(found))
            assert len(found) == stream.batches_per_epoch and {len(b) for b in found} == {2}
            seen += sum(found, [])
        assert len(counts) == 1 and len(set(seen)) == len(seen)
        readers = world * max(1, workers)
        # left over: less than a batch a reader, and what unequal shards may cost
        assert len(seen) >= 97 - readers * 2 - math.ceil(0.02 * 97) - readers
        left_over.append(set(range(97)) - set(seen))
    if len(left_over[0]) > 3:
        assert left_over[0] != left_over[1]


def test_shards_of_very_unequal_length_are_shared_row_by_row():
    source = numbered([50, 50, 2, 2])
    streams = [make(source, 2, rank=rank, world_size=4) for rank in range(4)]
    found = [batches(stream) for stream in streams]
    assert {len(f) for f in found} == {13} and len(set(sum(sum(found, []), []))) == 104
    equal = make(numbered([26] * 4), 2, rank=1, world_size=4)
    assert equal.groups == 4 and streams[0].groups == 1  # each reader opens its own shards where that is fair


def test_the_order_is_new_each_epoch_and_the_same_each_time():
    source = numbered(cut_evenly(60, 6))
    stream, other = make(source, 4, shuffle_buffer=20), make(source, 4, shuffle_buffer=20)
    seeded = make(source, 4, shuffle_buffer=20, seed=1)
    orders = []
    for epoch in range(3):
        for s in (stream, other, seeded):
            s.set_epoch(epoch)
        orders.append(batches(stream))
        assert batches(other) == orders[-1] != batches(seeded)
        assert sorted(sum(orders[-1], [])) == list(range(60))
    assert orders[0] != orders[1] != orders[2] != orders[0]
    first = sum(orders[0], [])
    assert sum(abs(b - a) == 1 for a, b in itertools.pairwise(first)) < 15  # 59 if it were not shuffled


@pytest.mark.parametrize("workers", [0, 3])
def test_two_ranks_see_together_what_one_sees(workers, monkeypatch):
    source = numbered([83])
    one = make(source, 8, num_workers=workers, shuffle_buffer=20)
    two = [make(source, 4, rank=r, world_size=2, num_workers=workers, shuffle_buffer=20) for r in range(2)]
    for epoch in range(2):
        for stream in (one, *two):
            stream.set_epoch(epoch)
        alone = batches(one, Simulated(one, monkeypatch))
        together = [batches(stream, Simulated(stream, monkeypatch)) for stream in two]
        for whole, first, second in zip(alone, *together, strict=False):
            assert sorted(whole) == sorted(first + second)
        assert len(alone) > 5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_with_workers_of_its_own(workers):
    """Real worker processes, which live on from epoch to epoch."""
    source = numbered(cut_evenly(50, 5))
    stream = make(source, 4, num_workers=workers, shuffle_buffer=10)
    loader = build_loader(stream, workers)
    orders = []
    for epoch in range(3):
        stream.set_epoch(epoch)
        orders.append(batches(stream, loader))
        assert {int(b["labels"][0]["orig_size"][0]) for b in loader} == {epoch}  # the transform was told
    assert len(orders[0]) == stream.batches_per_epoch == len(loader) == 12
    assert orders[0] != orders[1] and len(set(sum(orders[0], []))) == 48
    for skip in (1, 2, 5, 11, 12):
        stream.set_epoch(2)
        stream.skip_batches = skip
        assert batches(stream, loader) == orders[2][skip:]
    stream.skip_batches = 0
    assert batches(stream, loader) == orders[2]


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("shards", [1, 6])
def test_resuming_within_an_epoch(workers, shards, monkeypatch):
    source = numbered(cut_evenly(64, shards))
    stream = make(source, 3, rank=1, world_size=2, num_workers=workers, shuffle_buffer=10)
    stream.set_epoch(4)
    whole = batches(stream, Simulated(stream, monkeypatch))
    for skip in range(len(whole) + 1):
        stream.skip_batches = skip
        assert batches(stream, Simulated(stream, monkeypatch)) == whole[skip:]


def test_rows_that_are_skipped_or_left_over_are_not_transformed():
    stream = make(numbered([43]), 4)
    stream.skip_batches = 8
    assert len(batches(stream)) == 2 and stream.transform.calls == 8


def test_a_source_of_unknown_length_goes_on_without_end():
    stream = make(numbered([7, 9], known=False), 4, rank=1, world_size=2, shuffle_buffer=4)
    assert stream.batches_per_epoch is None
    with pytest.raises(TypeError, match="length of this source is not known"):
        len(stream)
    found = [b for _, b in zip(range(12), build_loader(stream), strict=False)]
    rows = [[int(labels["image_id"]) for labels in b["labels"]] for b in found]
    epochs = [int(labels["orig_size"][0]) for b in found for labels in b["labels"]]
    assert epochs == sorted(epochs) and epochs[-1] >= 4
    first = {r for r, e in zip(sum(rows, []), epochs, strict=True) if e == 0}
    assert first in (set(range(7)), set(range(7, 16)))  # the shard of this rank, once a pass
    seen = batches(make(numbered([7, 9], known=False), 4, shuffle=False, drop_last=False))
    assert sum(seen, []) == list(range(16))


def test_an_endless_source_with_nothing_in_a_share_is_an_error():
    with pytest.raises(UserError, match="found no rows at all"):
        batches(make(numbered([0, 0], known=False), 4))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("known", [True, False])
def test_only_the_first_rows(workers, known, monkeypatch):
    source = numbered(cut_evenly(30, 4), known)
    seen = []
    for rank in range(2):
        options = {"rank": rank, "world_size": 2, "num_workers": workers, "shuffle": False, "drop_last": False}
        stream = make(source, 4, num_rows=11, **options)
        found = batches(stream, Simulated(stream, monkeypatch))
        assert not known or len(found) == stream.batches_per_epoch
        seen += sum(found, [])
    assert sorted(seen) == list(range(11))


def test_too_few_rows_for_one_batch():
    with pytest.raises(UserError, match="5 rows are less than one batch of 2 for each of 2 ranks x 2 loader workers"):
        make(numbered([5]), 2, world_size=2, num_workers=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_worker_is_the_users_line(workers):
    stream = make(numbered([20]), 4, num_workers=workers, broken=9)
    for drop_last in (True, False):
        stream.drop_last = drop_last
        with pytest.raises(UserError) as error:
            batches(stream)
        assert str(error.value) == "image 9 cannot be decoded: it is broken"


def test_the_loader_has_the_workers_that_the_stream_was_made_for():
    with pytest.raises(ValueError, match="made for 0 workers, not for 2"):
        build_loader(make(numbered([20])), 2)


def test_images_do_not_depend_on_the_workers(tmp_path, monkeypatch):
    """The whole way from a COCO folder: the same augmented pixels from 0 and from 2 workers."""
    monkeypatch.setenv("ASD_HF_CACHE", str(tmp_path / "cache"))
    write_coco(tmp_path / "coco", "train", tiny_rows(12))
    config = DataConfig(train_sizes=[40, 48], max_size=80)
    seen = []
    for workers in (0, 2):
        source = open_source(str(tmp_path / "coco"), "train")
        stream = DetectionStream(source, RowTransform(config, True, seed=1), 1, num_workers=workers)
        stream.set_epoch(3)
        images = {}
        for batch in build_loader(stream, workers):
            images[int(batch["labels"][0]["image_id"])] = (batch["pixel_values"], batch["labels"][0]["boxes"])
        seen.append(images)
    assert len(seen[0]) == 12 and seen[0].keys() == seen[1].keys()
    for image_id, (pixels, boxes) in seen[0].items():
        assert torch.equal(pixels, seen[1][image_id][0]) and torch.equal(boxes, seen[1][image_id][1])


def test_a_missing_image_is_named_from_a_worker(tmp_path, monkeypatch):
    monkeypatch.setenv("ASD_HF_CACHE", str(tmp_path / "cache"))
    write_coco(tmp_path / "coco", "val", tiny_rows(6))
    (tmp_path / "coco/val/000103.jpg").unlink()
    source = open_source(str(tmp_path / "coco"), "val")
    transform = RowTransform(DataConfig(eval_size=40), training=False)
    stream = DetectionStream(source, transform, 2, num_workers=1, shuffle=False, drop_last=False)
    with pytest.raises(UserError, match=r"^image 103 \(.*val/000103.jpg\) is missing"):
        list(build_loader(stream))
