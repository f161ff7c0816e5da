"""Predictions on disk: that they are the teacher's, and that a training from them is the training with it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F
from transformers import set_seed

from asd_hf.benchmark.cache import first_losses
from asd_hf.build import Parts
from asd_hf.commands import run
from asd_hf.config import build_config
from asd_hf.data import DataConfig, build_loader
from asd_hf.data.transforms import count_geometries
from asd_hf.detectors.base import DetectorOutput
from asd_hf.doctor import ADAPTED, check
from asd_hf.errors import UserError
from asd_hf.ops import cxcywh_to_xyxy
from asd_hf.teacher_cache import CacheWriter, Contents, TeacherCache
from asd_hf.teacher_cache import write as writing
from asd_hf.teacher_cache.form import carry, encode, learnt_question, restore
from tests import tiny
from tests.hub_server import HubServer
from tests.test_commands import run as run_apart
from tests.test_methods import SERVED, compare, make_method, make_pair
from tests.tiny_run import configuration, write_places

FLIP = {"resize": "fixed", "fixed_size": [96, 96], "augmentation": "flip"}
DRAWN = {"augmentation": "detr", "train_sizes": [128, 144], "max_size": 240}
PAIRS = {"name": "balanced_pairs", "trust": 0.0}
DISTILL = {"name": "detrdistill", "contrastive_weight": 0.1}
FGD = {"name": "fgd", "weight": 10}
MAPS = [FGD, {"name": "fitnet"}, {"name": "mgd"}]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return write_places(tmp_path_factory.mktemp("places"))


@pytest.fixture(scope="module")
def flipped(places, tmp_path_factory):
    """Predictions for `balanced_pairs` under `FLIP`."""
    return build(tmp_path_factory.mktemp("flipped"), settings(places))


@pytest.fixture(scope="module")
def drawn(places, tmp_path_factory):
    """Predictions for `balanced_pairs` on two drawn views of each image."""
    return build(tmp_path_factory.mktemp("drawn"), settings(places, data=DRAWN), "--views", "2")


@pytest.fixture(autouse=True, scope="module")
def small_shards():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "LEAST_IMAGES", 5)  # three shards of the twelve images
        yield


def settings(places, teacher="deformable_detr", data=FLIP, method=PAIRS, cache=None, **training):
    training = {"per_device_eval_batch_size": 2, "max_steps": 6, "report_to": [], "disable_tqdm": True} | training
    values = configuration(places, teacher, data=data, **training)
    values["method"] = method
    values["model"]["teacher_cache"] = None if cache is None else str(cache)
    return values


def build(tmp_path, values, *options, name="kept", code=0):
    """What `asd-hf cache` writes."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    assert run("cache", ["--config", str(file), "--output", str(tmp_path / name), *options]) == code
    return tmp_path / name


def parts_of(values, output=None):
    if output is not None:
        values["training"]["output_dir"] = str(output)
    return Parts(build_config(values))


def batches(trainer, epoch):
    trainer.train_dataset.set_epoch(epoch)
    return list(trainer.get_train_dataloader())


def same_answers(live, kept, epochs):
    """Both trainers' teachers on the same batches; their differences are those of half precision."""
    for epoch in epochs:
        pairs = list(zip(batches(live, epoch), batches(kept, epoch), strict=True))
        assert len(pairs) > 2
        for ours, theirs in pairs:
            assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
            assert "teacher_pixel_values" not in theirs
            a, b = live.ask_teacher(ours), kept.ask_teacher(theirs)
            layers = len(b.logits)
            torch.testing.assert_close(b.logits, a.logits[-layers:], atol=2e-3, rtol=1e-3)
            torch.testing.assert_close(b.boxes, a.boxes[-layers:], atol=1e-5, rtol=0)
            for x, y in zip(a.decode.own, b.decode.own, strict=True):
                assert (x is None) is (y is None)
                if x is not None:
                    torch.testing.assert_close(y, x, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("teacher", "data", "options"),
    [
        ("deformable_detr", FLIP, []),
        ("detr", FLIP | {"augmentation": "none", "teacher_size": [80, 96]}, []),
        ("rt_detr", FLIP | {"teacher_size": [64, 96]}, []),
        ("deformable_detr", DRAWN, ["--views", "2"]),
    ],
)
def test_the_predictions_are_the_teachers(places, tmp_path, teacher, data, options):
    # Batches of one image: padding, which only the live teacher sees as in training, is none.
    values = settings(places, teacher, data, per_device_train_batch_size=1, per_device_eval_batch_size=1)
    folder = build(tmp_path, values, *options)
    live = parts_of(values, tmp_path / "a").trainer()
    parts = parts_of(settings(places, teacher, data, cache=folder, per_device_train_batch_size=1), tmp_path / "b")
    kept = parts.trainer()
    assert parts.teacher is kept.teacher is None and "_lender" not in vars(parts)  # no teacher in memory
    same_answers(live, kept, range(2))


def test_drawn_views_come_round(places, drawn):
    stream = parts_of(settings(places, data=DRAWN, cache=drawn)).training_stream()
    transform, row = stream.transform, next(iter(stream.source.stream))
    samples = []
    for epoch in range(4):
        transform.set_epoch(epoch)
        samples.append(transform(row))
    for sample, other, same in ((0, 2, True), (1, 3, True), (0, 1, False)):
        a, b = samples[sample], samples[other]
        assert torch.equal(a["pixel_values"], b["pixel_values"]) is same
        assert torch.equal(a["teacher"]["boxes"], b["teacher"]["boxes"]) is same


def test_a_training_from_disk_is_the_training_with_the_teacher(places, tmp_path):
    steps = {"logging_steps": 1, "learning_rate": 1e-3, "save_strategy": "no", "max_steps": 4}
    method = [PAIRS, DISTILL, FGD]
    folder = build(tmp_path, settings(places, method=method))
    losses, weights = [], []
    for cache in (None, folder):
        set_seed(0)
        trainer = parts_of(settings(places, method=method, cache=cache, **steps), tmp_path / "out").trainer()
        trainer.train()
        losses.append([{k: v for k, v in e.items() if k.startswith("loss")} for e in trainer.state.log_history[:4]])
        weights.append(torch.cat([p.detach().flatten() for p in trainer.adapter.model.parameters()]))
    for live, kept in zip(*losses, strict=True):
        assert live.keys() == kept.keys() and len(live) == 22
        assert all(kept[name] == pytest.approx(live[name], rel=5e-3, abs=1e-3) for name in live)
    assert losses[0][0]["loss"] != losses[0][-1]["loss"]
    torch.testing.assert_close(weights[1], weights[0], atol=3e-3, rtol=0)


@pytest.mark.parametrize(
    ("teacher", "data", "options"),
    [
        ("deformable_detr", FLIP, []),
        ("rt_detr", FLIP | {"fixed_size": [64, 80], "augmentation": "none"}, []),  # it pads to multiples of 32
        ("detr", DRAWN | {"teacher_size": [80, 96]}, ["--views", "2"]),
    ],
)
def test_the_feature_maps_are_the_teachers(places, tmp_path, teacher, data, options):
    folder = build(tmp_path, settings(places, teacher, data, MAPS), *options)
    live = parts_of(settings(places, teacher, data, MAPS), tmp_path / "out")
    kept = live.from_disk(parts_of(settings(places, teacher, data, MAPS, cache=folder)).cache)
    trainers = [live.trainer(), kept.trainer()]
    for epoch in range(2):
        for trainer in trainers:
            trainer.train_dataset.set_epoch(epoch)
        losses, from_disk = first_losses(live, trainers)
        assert losses.keys() == from_disk.keys() and len(losses) == 6
        for name in losses:
            assert from_disk[name] == pytest.approx(losses[name], rel=1e-3), name
        ours, theirs = (batches(trainer, epoch)[1] for trainer in trainers)
        a, b = trainers[0].ask_teacher(ours), trainers[1].ask_teacher(theirs)
        assert torch.equal(a.mask, b.mask) and bool(b.mask.all()) is (teacher != "rt_detr")
        # One tensor for both says that the student's maps need no resampling.
        assert (b.mask is theirs["pixel_mask"]) is (a.mask is ours["pixel_mask"]) is (data == FLIP)


def test_only_the_levels_that_a_student_reads_are_kept(places, tmp_path):
    values = settings(places, method=[FGD, {"name": "asd", "layers": 1}])
    small = json.loads(json.dumps(values))
    small["model"]["student"]["config"] |= {"num_feature_levels": 1}
    small["model"]["student"]["config"]["backbone_config"] |= {"out_features": ["stage4"]}
    folder = build(tmp_path, small)
    shard = load_file(folder / "predictions-00000-of-00003.safetensors")
    assert {name: x.shape for name, x in shard.items() if name.startswith("map")} == {"map_2": (10, 32, 3, 3)}
    assert shard["map_2"].dtype == torch.float16 and shard["logits"].shape[1] == 1
    values["model"]["teacher_cache"] = str(folder)
    with pytest.raises(UserError, match="fgd reads feature maps of stride 8, 16, 64 of .* holds those of stride 32: "):
        parts_of(values).method  # noqa: B018


def test_feature_maps_fit_into_half_precision():
    output = output_of()
    wide, narrow = torch.tensor([1e6, -1e6, 3.0, 1e-5]), torch.tensor([0.1, 3e4]).bfloat16()  # as under autocast
    output.features = [x.view(1, -1, 1, 1) for x in (wide, narrow)]
    spec = replace(make_pair("alike")[1].spec, strides=(8, 16))
    contents = Contents(["logits", "boxes", "features"], [2], [0, 1])
    back = restore(encode(output, contents, False), spec, {}).features
    assert back[0].flatten().tolist() == [65504, -65504, 3, pytest.approx(1e-5, rel=1e-2)]
    assert back[1].dtype == torch.float32 and torch.equal(back[1].flatten(), narrow.float())


# -- what is kept ----------------------------------------------------------------------------------------------------


OPTIONS = {
    "clockdistill": {"class_weight": 0.0, "box_weight": 0.0, "giou_weight": 0.0},
    "detrdistill": {"contrastive_weight": 0.1},
    "kd_detr": {"general_class_weight": 0.0, "general_box_weight": 0.0, "general_giou_weight": 0.0},
    "d3etr": {f"{g}_{a}_attention_weight": 0.0 for g in ("fixed", "adaptive") for a in ("self", "cross")},
}
UNLIKE = ("other numbers", "one map", "sides")  # pairs of `test_methods`
KEPT = ("asd", "balanced_pairs", "d3etr", "detrdistill", "index_pairing", "kd_detr", "ld", "pseudo_labels")
MAPS_ALONE = ("clockdistill", "fgd", "fitnet", "mgd")


@pytest.mark.parametrize(
    ("name", "pair"), [(n, p) for n, p in SERVED if n in KEPT and p in UNLIKE or n in MAPS_ALONE and p == "one map"]
)
def test_every_method_declares_all_that_it_reads(name, pair):
    student, teacher = make_pair(pair)
    method, shared = make_method(name, student, teacher, **OPTIONS.get(name, {}))
    batch = tiny.batch(3)
    contents = Contents.of(method, teacher.spec)
    live = compare(method, shared, student, teacher, batch)
    softmax, spec = teacher.spec.activation == "softmax", teacher.spec

    def on_disk(*inputs):
        output = teacher(*inputs)
        learnt = learnt_question(output) if "question" in contents.fields else {}
        return restore(encode(output, contents, softmax, learnt), spec, learnt, output.mask)

    on_disk.spec = spec
    kept = compare(method, shared, student, on_disk, batch)
    assert kept.keys() == live.keys()
    for term in live:
        assert kept[term].item() == pytest.approx(live[term].item(), rel=1e-2, abs=1e-3), term


@pytest.mark.parametrize("name", ["clockdistill", "d3etr", "kd_detr", "qskd"])
def test_a_method_that_needs_more_than_predictions_is_refused_before_training(places, flipped, name):
    values = settings(places, method={"name": name}, cache=flipped)
    with pytest.raises(UserError, match=f"^{name} reads .* of the teacher, which no cache holds: train it with the"):
        parts_of(values).method  # noqa: B018


def test_no_predictions_are_written_that_would_not_do(places, tmp_path, capsys):
    build(tmp_path, settings(places, method=[FGD, {"name": "qskd"}]), code=2)
    assert "reads attention of the teacher, which no cache holds" in capsys.readouterr().err
    build(tmp_path, settings(places, data=DRAWN | {"teacher_size": 96}, method=FGD), "--views", "2", code=2)
    assert "feature maps, which can be kept only where the teacher sees all images in one size: set data.resize: " in (
        capsys.readouterr().err
    )
    build(tmp_path, settings(places, method=FGD), "--canonical", code=2)
    assert "--canonical: feature maps cannot be carried to a flip or a crop" in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()


def test_what_the_cache_lacks_is_named(places, tmp_path):
    folder = build(tmp_path, settings(places, method={"name": "asd", "layers": 1}))
    assert load_file(folder / "predictions-00000-of-00003.safetensors")["logits"].shape[:2] == (10, 1)
    with pytest.raises(UserError, match="balanced_pairs reads question of the teacher, but .* holds boxes, logits"):
        parts_of(settings(places, cache=folder)).method  # noqa: B018
    with pytest.raises(UserError, match="fgd reads features of the teacher, but .* holds boxes, logits: build one"):
        parts_of(settings(places, method=FGD, cache=folder)).method  # noqa: B018
    with pytest.raises(UserError, match="asd reads 2 decoder layers of the teacher, but .* holds the last 1"):
        parts_of(settings(places, method={"name": "asd", "layers": 2}, cache=folder)).method  # noqa: B018
    with pytest.raises(UserError, match="moving average is another in each step"):
        parts_of(settings(places, cache=folder) | {"model": {"teacher": "ema", "teacher_cache": "x"}}).cache  # noqa: B018


def output_of(seed=0, layers=3, images=2, queries=6, classes=5):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, images, queries, classes, generator=generator) * 3
    boxes = torch.rand(layers, images, queries, 4, generator=generator) * 0.5 + 0.1
    return DetectorOutput(logits, boxes, torch.randn(layers, images, queries, 8, generator=generator))


@pytest.mark.parametrize("softmax", [False, True])
def test_only_the_best_queries_and_classes(softmax):
    output = output_of(classes=5)  # of a softmax head the last one is "no object"
    spec = replace(
        make_pair("alike")[1].spec,
        class_names=tuple("abcde"[: 5 - softmax]),
        activation="softmax" if softmax else "sigmoid",
    )
    contents = Contents(["logits", "boxes", "queries"], [1, 2], top_queries=4, top_classes=2)
    back = restore(encode(output, contents, softmax), spec, {})
    assert back.logits.shape == (2, 2, 4, 5) and back.queries.shape == (2, 2, 4, 8)
    for image in range(2):
        last = output.logits[-1, image]
        scores = (last.softmax(-1)[:, :-1] if softmax else last.sigmoid()).amax(-1)
        best = sorted(scores.argsort(descending=True)[:4].tolist())  # in their own order
        for place, query in enumerate(best):
            for layer in range(2):
                full = output.logits[layer + 1, image, query].tolist()
                named = sorted(range(5 - softmax), key=lambda c: -full[c])
                kept, rest = named[:2], named[2:]
                ours = back.logits[layer, image, place]
                for c in [*kept, 4] if softmax else kept:
                    assert ours[c].item() == pytest.approx(full[c], rel=1e-3)
                shared = {round(ours[c].item(), 4) for c in rest}
                assert len(shared) == 1
                if softmax:  # all probabilities of what is kept stay
                    wanted = torch.tensor(full).softmax(-1)
                    torch.testing.assert_close(ours.softmax(-1)[[*kept, 4]], wanted[[*kept, 4]], atol=1e-3, rtol=0)
                else:
                    assert shared.pop() == pytest.approx(sum(full[c] for c in rest) / len(rest), abs=5e-3)
                torch.testing.assert_close(back.boxes[layer, image, place], output.boxes[layer + 1, image, query])


def test_the_best_queries_are_asked_alone(places, tmp_path):
    folder = build(tmp_path, settings(places), "--top-queries", "4", "--top-classes", "2")
    values = settings(places, cache=folder)
    parts = parts_of(values, tmp_path / "out")
    assert parts.cache.spec.num_queries == 4
    trainer, live = parts.trainer(), parts_of(settings(places), tmp_path / "live").trainer()
    kept, whole = (t.ask_teacher(batches(t, 0)[0]) for t in (trainer, live))
    for image in range(2):
        best = whole.logits[-1, image].sigmoid()
        for query in range(4):
            same = (whole.boxes[-1, image] - kept.boxes[-1, image, query]).abs().amax(-1).argmin()
            for x, y in zip(kept.decode.own, whole.decode.own, strict=True):
                torch.testing.assert_close(x[image, query], y[image, same], atol=2e-3, rtol=1e-3)
            assert best[same].amax() >= best.amax(-1).sort(descending=True).values[3] - 1e-6
    trainer.train()


# -- one prediction an image -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("softmax", [False, True])
def test_predictions_are_carried_as_torchvision_carries_boxes(softmax):
    output = output_of(layers=2, images=4)
    height, width = 60, 80
    views = [(0, 0, 0, 60, 80), (1, 0, 0, 60, 80), (0, 10, 20, 30, 40), (1, 25, 5, 35, 30)]  # flip, top, left, h, w
    window = torch.tensor([[f, x / width, y / height, w / width, h / height] for f, y, x, h, w in views])
    carried, cut = carry(output, window, softmax), 0
    probability = (lambda x: x.softmax(-1)[..., :-1]) if softmax else torch.sigmoid
    for layer in range(2):
        for image, (flip, *crop) in enumerate(views):
            for query in range(6):
                scale = torch.tensor([width, height, width, height])
                corners = (cxcywh_to_xyxy(output.boxes[layer, image, query]) * scale)[None]
                box = tv_tensors.BoundingBoxes(corners.double(), format="XYXY", canvas_size=(height, width))
                box = F.horizontal_flip(box) if flip else box
                left = F.crop(F.clamp_bounding_boxes(box), *crop).as_subclass(torch.Tensor)[0]
                wanted = left / torch.tensor([crop[3], crop[2]] * 2)
                ours, theirs = (probability(x.logits[layer, image, query]) for x in (carried, output))
                if image < 2:  # nothing is cut, and nothing clipped
                    wanted = box.as_subclass(torch.Tensor)[0] / scale
                    torch.testing.assert_close(ours, theirs)
                else:
                    inside = F.clamp_bounding_boxes(box).as_subclass(torch.Tensor)[0]
                    area, before = ((b[2:] - b[:2]).prod().item() for b in (left, inside))
                    cut += area < 0.9 * before
                    torch.testing.assert_close(ours, theirs * max(area / before, 1e-4), atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(
                    cxcywh_to_xyxy(carried.boxes[layer, image, query]), wanted.float(), atol=1e-5, rtol=0
                )
    assert cut > 5


def test_one_prediction_an_image_moves_with_the_labels(places, tmp_path, caplog):
    values = settings(places, data=DRAWN)
    folder = build(tmp_path, values, "--canonical")
    parts = parts_of(settings(places, data=DRAWN, cache=folder), tmp_path / "out")
    kept = parts.trainer()
    whole = {
        int(label["image_id"]): label
        for batch in build_loader(replace_training(parts, tmp_path))
        for label in batch["labels"]
    }
    seen = 0
    for batch in batches(kept, 1):
        answer = kept.cache(batch["teacher"], batch["pixel_mask"])
        assert answer.boxes.shape[1] == len(batch["labels"]) == 2 and answer.decode.own[2].shape[-1] == 2
        for label, window in zip(batch["labels"], batch["teacher"]["window"], strict=True):
            boxes = whole[int(label["image_id"])]["boxes"]
            output = DetectorOutput(torch.zeros(1, 1, len(boxes), 3), boxes[None, None], None)
            carried = carry(output, window[None], False)
            left = carried.boxes[0, 0][(carried.boxes[0, 0, :, 2:] > 1e-6).all(-1)]
            torch.testing.assert_close(left, label["boxes"], atol=1e-4, rtol=0)
            seen += len(left)
    assert seen > 10
    kept.train()
    told = next(finding for finding in check(parts) if finding.topic == "teacher")
    assert told.verdict == ADAPTED and "approximate" in told.text


def replace_training(parts, folder):
    """The training data without augmentation."""
    run_ = replace(parts.run, model=replace(parts.run.model, teacher_cache=None))
    run_ = replace(run_, data=replace(run_.data, augmentation="none"))
    return Parts(run_).training_stream()


def test_queries_that_a_flip_would_leave_behind_are_refused(places, tmp_path, capsys):
    build(tmp_path, settings(places, "detr"), "--canonical", code=2)
    assert "the queries of detr say by their contents where they look" in capsys.readouterr().err


# -- building --------------------------------------------------------------------------------------------------------


def shard_sums(folder):
    return [shard["sha256"] for shard in json.loads((folder / "manifest.json").read_text())["shards"]]


def writer_of(values):
    parts = parts_of(values)
    contents = Contents.of(parts.method, parts.teacher.spec)
    data = parts.train_source, parts.run.data, parts.data_seed
    return CacheWriter(parts.teacher, "t", *data, contents, parts.class_names, batch_size=2)


def test_two_ranks_and_loader_workers_write_what_one_rank_writes(places, tmp_path):
    one = build(tmp_path, settings(places), name="one")
    assert len(shard_sums(one)) == 3
    workers = build(tmp_path, settings(places, dataloader_num_workers=2), name="workers")
    two = tmp_path / "two"
    for rank in (0, 1):
        writer = writer_of(settings(places))
        if rank == 0:
            writer.prepare(two)
        assert writer.write(two, rank, 2, progress=False) == 2 - rank
    writer.finish(two)
    assert shard_sums(one) == shard_sums(workers) == shard_sums(two)


def test_a_stopped_build_leaves_whole_shards_and_goes_on(places, tmp_path, monkeypatch, capsys):
    values = settings(places, method=[PAIRS, FGD])
    whole = build(tmp_path, values, name="whole")
    put, calls = writing._Shard.put, []

    def stop(self, rows, stored):
        calls.append(rows)
        if len(calls) == 8:  # within the second shard
            os.kill(os.getpid(), signal.SIGTERM)
        put(self, rows, stored)

    with monkeypatch.context() as patch:
        patch.setattr(writing._Shard, "put", stop)
        folder = build(tmp_path, values, code=143)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(f"stopped by SIGTERM; what is finished is kept in {folder}, the same command goes on")
    first = folder / "predictions-00000-of-00003.safetensors"
    assert sorted(p.name for p in folder.glob("*.safetensors*")) == [first.name, f"{first.name}.json"]
    with pytest.raises(UserError, match="holds no finished predictions: build it with asd-hf cache"):
        TeacherCache(str(folder))
    # What a killed process may leave: a file that was being written, and a shard that nobody vouches for.
    (folder / "predictions-00001-of-00003.safetensors.part").write_bytes(b"half")
    (folder / "predictions-00002-of-00003.safetensors").write_bytes(b"torn")
    before = first.stat().st_mtime_ns
    build(tmp_path, values)
    assert first.stat().st_mtime_ns == before and shard_sums(folder) == shard_sums(whole)
    assert (folder / "common.safetensors").read_bytes() == (whole / "common.safetensors").read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_other_predictions_are_not_mixed_in(places, flipped, tmp_path, capsys):
    folder = shutil.copytree(flipped, tmp_path / "kept")
    build(tmp_path, settings(places, data=FLIP | {"fixed_size": [96, 128]}), code=2)
    assert "holds other predictions: view is" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    build(tmp_path, settings(places), name="full", code=2)
    assert "holds other files" in capsys.readouterr().err
    TeacherCache(str(folder))  # is as it was


def test_a_damaged_shard_is_found_and_mended(places, flipped, tmp_path):
    folder = shutil.copytree(flipped, tmp_path / "kept")
    before, file = shard_sums(folder), folder / "predictions-00001-of-00003.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match=f"{file.name} is damaged: its checksum is not that of manifest.json"):
        TeacherCache(str(folder))
    build(tmp_path, settings(places))
    assert shard_sums(folder) == before
    TeacherCache(str(folder))


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (FLIP, ["--views", "3"], "an image has 2 view"),
        (DRAWN, [], "give --views N, as many as epochs"),
        (DRAWN, ["--views", "0"], "--views must be 1 or more"),
        (DRAWN, ["--views", "2", "--canonical"], "leave out --views"),
        (FLIP, ["--top-queries", "10"], "--top-queries is 10, but the teacher has 9"),
        (FLIP, ["--top-classes", "0"], "--top-classes is 0, but the teacher has 3"),
    ],
)
def test_options_that_make_no_sense(places, tmp_path, capsys, data, options, message):
    build(tmp_path, settings(places, data=data), *options, code=2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "count"),
    [
        ({"augmentation": "none"} | FLIP | {"augmentation": "none"}, 1),
        (FLIP, 2),
        (FLIP | {"augmentation": "detr"}, None),
        ({"augmentation": "flip", "train_sizes": [64]}, 2),
        ({"augmentation": "flip", "train_sizes": [64, 80]}, None),
        ({"augmentation": "flip", "train_sizes": [64, 80], "teacher_size": 96}, 2),
    ],
)
def test_how_many_views_there_are(data, count):
    assert count_geometries(DataConfig(**data)) == count


# -- whether it is the right one -------------------------------------------------------------------------------------


def other_weights(root):
    file = root / "deformable_detr" / "model.safetensors"
    weights = load_file(file)
    weights["class_embed.0.bias"] += 1
    save_file(weights, file, metadata={"format": "pt"})


def other_pixels(root):
    file = root / "deformable_detr" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.5, 0.5, 0.5]}))


def other_data(root):
    file = root / "coco" / "annotations" / "instances_train.json"
    values = json.loads(file.read_text())
    values["images"] = values["images"][:-1]
    kept = {image["id"] for image in values["images"]}
    values["annotations"] = [a for a in values["annotations"] if a["image_id"] in kept]
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_weights, "the checksum of the teacher's weights is"),
        (other_pixels, "pixel_mean of the teacher is"),
        (other_data, "the fingerprint of the training data is"),
        ({"augmentation": "flip"}, "data.augmentation is 'detr' there and 'flip' here"),
        ({"train_sizes": [64]}, "data.train_sizes is 128, 144 there and 64 here"),
        ({"teacher_size": 96}, "data.teacher_size is None there and 96 here"),
        ({"seed": 7}, r"the seed of the augmentation \(training.data_seed, or else training.seed\) is 42 there and 7"),
        ("asd_hf", "the version of asd_hf is '0.0.1' there"),
        ("format", "is of format 0, this asd_hf reads format 1"),
        ("broken", "is no manifest of a teacher's predictions"),
    ],
)
def test_a_foreign_or_stale_cache_is_refused(places, drawn, tmp_path, change, message):
    root, folder = shutil.copytree(places, tmp_path / "places"), shutil.copytree(drawn, tmp_path / "drawn")
    assert parts_of(settings(root, data=DRAWN, cache=folder)).cache.manifest.views == 2  # is right as yet
    data, seed = dict(DRAWN), {}
    if callable(change):
        change(root)
    elif isinstance(change, dict):
        seed = {k: v for k, v in change.items() if k == "seed"}
        data |= {k: v for k, v in change.items() if k != "seed"}
    else:
        file = folder / "manifest.json"
        values = json.loads(file.read_text())
        values = {"format": values | {"format": 0}, "asd_hf": values | {"asd_hf": "0.0.1"}, "broken": [1]}[change]
        file.write_text(json.dumps(values))
    with pytest.raises(UserError, match=message) as caught:
        parts_of(settings(root, data=data, cache=folder, **seed)).cache  # noqa: B018
    assert "\n" not in str(caught.value)


def test_without_the_teachers_weights_its_name_must_do(places, flipped, tmp_path):
    root = shutil.copytree(places, tmp_path / "places")
    (root / "deformable_detr").rename(root / "gone")
    parts = parts_of(settings(root, cache=flipped), tmp_path / "out")
    assert parts.trainer().cache is parts.cache
    with pytest.raises(UserError, match="the teacher is 'deformable_detr' there and 'other' here"):
        parts_of(settings(root, "other", cache=flipped)).cache  # noqa: B018


def test_an_image_that_is_not_there(flipped):
    with pytest.raises(UserError, match="has no predictions of image 77"):
        TeacherCache(str(flipped)).read(77, 0, None, (1, 1))


# -- in use ----------------------------------------------------------------------------------------------------------


def test_workers_read_what_the_main_process_reads(places, flipped):
    answers = []
    for workers in (0, 2):
        parts = parts_of(settings(places, cache=flipped, dataloader_num_workers=workers))
        found = {}
        for batch in build_loader(parts.training_stream()):
            for i, label in enumerate(batch["labels"]):
                found[int(label["image_id"])] = {name: x[i] for name, x in batch["teacher"].items()}
        answers.append(found)
    assert answers[0].keys() == answers[1].keys() and len(answers[0]) == 12
    for image, tensors in answers[0].items():
        assert all(torch.equal(x, answers[1][image][name]) for name, x in tensors.items())
    again = pickle.loads(pickle.dumps(parts.cache))
    assert again._shards == {}


def test_the_commands_work_with_it(places, flipped, tmp_path, capsys):
    folder = shutil.copytree(flipped, tmp_path / "kept")
    build(tmp_path, settings(places))  # is complete
    shown = capsys.readouterr().out
    assert "12 images, exact: all 2 views of each image" in shown and "3 shards" in shown
    assert "balanced_pairs_asked_giou" in shown
    values = settings(places, cache=folder, max_steps=2, output_dir=str(tmp_path / "out"), save_strategy="no")
    file = tmp_path / "kept.yaml"
    file.write_text(yaml.safe_dump(values))
    assert run("doctor", ["--config", str(file), "--steps", "1"]) == 0
    shown = capsys.readouterr().out
    assert f"its predictions from {folder}, exact" in shown and "teacher's AP" not in shown
    assert "all 3 found by name" in shown
    arguments = ["step", "--config", str(file), "--methods", "balanced_pairs,fgd,od_detr", "--rounds", "1"]
    assert run("benchmark", arguments) == 0
    shown = capsys.readouterr().out
    assert "fgd: refused: fgd reads features of the teacher" in shown and "| od_detr" in shown
    assert run("train", ["--config", str(file)]) == 0
    assert "teacher" not in json.loads((tmp_path / "out/metrics.json").read_text())
    assert "whose predictions came from disk (exact: all 2 views" in (tmp_path / "out/README.md").read_text()
    assert json.loads(json.dumps(yaml.safe_load((tmp_path / "out/asd_hf.yaml").read_text())))["model"][
        "teacher_cache"
    ] == str(folder)


def test_from_the_hub(places, flipped, tmp_path):
    """Finished predictions are pushed, then read from there: only the shard that is needed is fetched."""
    program = f"""
from pathlib import Path
from asd_hf.commands.cache import push
from asd_hf.data.transforms import Geometry
from asd_hf.teacher_cache import TeacherCache
push(Path({str(flipped)!r}), "user/kept", None)
cache, flip = TeacherCache("user/kept"), Geometry(True, (0, 0, 8, 8), (8, 8))
cache.read(100, 0, flip, (8, 8))
print(cache.read(103, 0, flip, (8, 8))["boxes"].sum().item())
"""
    with HubServer() as hub:
        environment = hub.env | {"HF_HOME": str(tmp_path / "home")}
        boxes = float(run_apart("-c", program, environment=environment).stdout.splitlines()[-1])
        files = hub.repositories["user/kept"].files
        fetched = [line for line in hub.requests if line.startswith("GET") and "predictions" in line]
    assert set(files) == {path.name for path in flipped.iterdir()}
    assert str(places) not in "".join(files[name].decode() for name in ("README.md", "manifest.json"))
    assert len(fetched) == 1 and "predictions-00000" in fetched[0]
    assert boxes == load_file(flipped / "predictions-00000-of-00003.safetensors")["boxes"][3].sum().item()
