"""The costs of methods, measured on a small run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml

from asd_hf.benchmark import cache, data, evaluation, loss, step
from asd_hf.build import Parts
from asd_hf.commands import run
from asd_hf.config import load_config
from asd_hf.data import DataConfig, RowTransform
from asd_hf.data.transforms import draw_geometry, seeded
from asd_hf.detectors.deformable_detr import DeformableDetrAdapter
from asd_hf.distiller import Distiller
from asd_hf.evaluation import STATS
from asd_hf.methods.asd import ASD
from asd_hf.phases import Stopwatch, phase
from asd_hf.trainer import DistillationTrainer
from tests.tiny_data import tiny_rows, write_coco
from tests.tiny_run import configuration, write_places


def test_inner_phases_are_not_counted_twice(monkeypatch):
    clock = iter([0, 1, 3, 6, 10, 15])  # at each begin and end
    monkeypatch.setattr("asd_hf.phases.perf_counter", lambda: next(clock))
    with Stopwatch(torch.device("cpu")) as watch, phase("outer"):
        for _ in range(2):
            with phase("inner"):
                pass
    assert watch.seconds == {"outer": 1 + 3 + 5, "outer/inner": 2 + 4}
    with phase("outer"):  # nobody measures
        pass


def test_what_is_measured_is_the_settled_step_and_nothing_is_pushed(tmp_path, monkeypatch):
    values = configuration(write_places(tmp_path / "places"), push_to_hub=True, hub_model_id="me/student")
    file, steps = tmp_path / "run.yaml", []
    file.write_text(yaml.safe_dump(values))
    compare = ASD.compare

    def spy(self, student, teacher, labels):
        losses = compare(self, student, teacher, labels)
        steps.append((self.step >= self.settled_at, bool(losses["asd_box"] > 0)))
        return losses

    monkeypatch.setattr(ASD, "compare", spy)
    monkeypatch.setattr(DistillationTrainer, "init_hf_repo", lambda *_, **__: pytest.fail("a repository was made"))
    assert run("benchmark", ["step", "--config", str(file), "--methods", "asd", "--rounds", "2"]) == 0
    assert steps == [(True, True)] * 3


def test_a_step_under_each_method_is_measured_and_what_cannot_be_is_named(tmp_path, capsys):
    places = write_places(tmp_path / "places")
    file = tmp_path / "run.yaml"
    values = configuration(places, data={"teacher_size": 96, "unlabelled": str(places / "more")})
    file.write_text(yaml.safe_dump(values))
    methods = "asd,index_pairing,od_detr,kd_detr,d3etr"
    arguments = [
        "step",
        "--config",
        str(file),
        "--methods",
        methods,
        "--rounds",
        "2",
        "--json",
        str(tmp_path / "a.json"),
    ]
    assert run("benchmark", arguments) == 0
    shown = capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads((tmp_path / "a.json").read_text())}
    assert list(rows) == [
        *("Transformers' own", "none", "none + teacher"),
        *("asd", "od_detr", "kd_detr", "d3etr", "index_pairing"),
    ]
    assert "and the teacher 9" in rows["index_pairing"]["refused"] and "index_pairing: refused:" in shown
    del rows["index_pairing"]
    cost = {name: row["milliseconds"] for name, row in rows.items()}
    assert cost["none"]["teacher"] == cost["none"]["extra decoding"] == cost["asd"]["matching"] == 0
    assert rows["none"]["ratio"] == 1 != rows["kd_detr"]["ratio"] and rows["none + teacher"]["of_teacher_too"] == 1
    assert cost["asd"]["teacher"] > 0 < cost["kd_detr"]["extra decoding"] and cost["d3etr"]["matching"] > 0
    assert cost["none + teacher"]["teacher"] > 0 < cost["Transformers' own"]["detection loss"]
    assert rows["asd"]["parameters"] > 0 == rows["od_detr"]["parameters"]
    for name, row in rows.items():
        assert all(cost[name][phase] > 0 for phase in ("student", "detection loss", "backward", "optimizer"))
        assert sum(cost[name].values()) == pytest.approx(row["ours_ms"], rel=0.5)
        assert row["reference_ms"] == rows["none"]["ours_ms"] and row["device"] == "cpu"
        assert shown.count(f"| {name.ljust(17)} |") == 2


def test_own_work_leaves_out_the_teacher_and_the_models_stand_still(tmp_path, monkeypatch):
    """The seconds of the phases are given: plain training 1, 3 and 5 s, each method's step 4 s more, 3 of them the
    teacher's."""
    file = tmp_path / "run.yaml"
    values = configuration(write_places(tmp_path / "places"), method={"ramp_steps": 0})
    values["training"] |= {"learning_rate": 1.0, "activation_checkpointing": True}
    file.write_text(yaml.safe_dump(values))
    parts, before = Parts(load_config(file)), {}
    before = {name: tensor.clone() for name, tensor in parts.student.model.named_parameters()}
    take_one_step, calls = step.one_step, []

    def spy(trainer, batch, watch, taught=None):
        assert take_one_step(trainer, batch, watch, taught)
        calls.append(trainer)
        plain = float(1 + 2 * ((len(calls) - 1) // 3))  # a round has three calls
        asked = {"teacher": 3.0} if taught or trainer.method else {}
        return {"student": plain} | asked | ({"method": 1.0} if trainer.method else {})

    monkeypatch.setattr(step, "one_step", spy)
    monkeypatch.setattr(step, "_stock_step", lambda *_: lambda: {"student": 1.0})
    costs, refused = step.measure_steps(parts, {"asd": parts.run.methods}, rounds=2)
    row = {cost.name: cost for cost in costs}["asd"]
    assert not refused and len(calls) == 9 and parts.student.model.is_activation_checkpointing
    assert (row.own_ms, row.own_spread_ms, row.own_forward_ms) == (1000, 0, 1000)
    assert all(torch.equal(tensor, before[name]) for name, tensor in parts.student.model.named_parameters())


def test_variants_of_one_method_are_measured_and_other_sections_are_refused(tmp_path, capsys):
    file, variants = tmp_path / "run.yaml", tmp_path / "variants.yaml"
    file.write_text(yaml.safe_dump(configuration(write_places(tmp_path / "places"))))
    small = {"name": "asd", "hidden_dim": 16, "key_dim": 16}
    variants.write_text(
        yaml.safe_dump(
            {
                "none": {"method": "none"},
                "one": {"method": small | {"layers": 1}},
                "two": {"method": [small | {"key_dim": 32}, "fitnet"]},
                "longer": {"method": small, "training": {"max_steps": 9}},
            }
        )
    )
    arguments = ["step", "--config", str(file), "--variants", str(variants), "--rounds", "1"]
    assert run("benchmark", arguments) == 2
    assert "variant 'longer' has its own 'training'" in capsys.readouterr().err
    assert run("benchmark", [*arguments, "--methods", "none,two,one", "--cpu-time"]) == 0
    table = capsys.readouterr().out
    assert [line.split(" | ")[0].strip("| ") for line in table.splitlines()[-5:]] == [
        *("Transformers' own", "none", "none + teacher"),
        *("two", "one"),
    ]
    assert "of two's own work" in table


@pytest.mark.parametrize("augmentation", ["none", "flip", "detr"])
def test_the_usual_pipeline_makes_the_same_sample(tmp_path, augmentation):
    write_coco(tmp_path / "coco", "train", tiny_rows(24))
    sizes = {"train_sizes": [160], "max_size": 400, "augmentation": augmentation}
    config = DataConfig(source=str(tmp_path / "coco"), **sizes)
    ours, usual = RowTransform(config, training=True), data.UsualTransform(config)
    cropped = flipped = 0
    for row in data.read_images(config, 24):
        mine, theirs = ours(row), usual(row)
        mean, std = (torch.tensor(x)[:, None, None] for x in (usual.processor.image_mean, usual.processor.image_std))
        pixels = (mine["pixel_values"] / 255 - mean) / std
        assert pixels.shape == theirs["pixel_values"].shape
        assert (pixels - theirs["pixel_values"]).abs().mean() < 0.1  # two resizes for one where there is a crop
        assert torch.equal(mine["labels"]["class_labels"], theirs["labels"]["class_labels"])
        torch.testing.assert_close(mine["labels"]["boxes"], theirs["labels"]["boxes"])
        with seeded(0, 0, row["image_id"]):
            geometry = draw_geometry(config, row["height"], row["width"])
        flipped += geometry.flip
        cropped += geometry.window[2:] != (row["height"], row["width"])
    assert (cropped > 0) == (augmentation == "detr") and (flipped > 0) == (augmentation != "none")


def test_data_is_measured(tmp_path, capsys):
    write_coco(tmp_path / "coco", "train", tiny_rows(9))
    file, numbers = tmp_path / "run.yaml", tmp_path / "a.json"
    file.write_text(yaml.safe_dump({"data": {"source": str(tmp_path / "coco"), "train_sizes": [160]}}))
    arguments = ["data", "--config", str(file), "--rounds", "2", "--json", str(numbers)]
    assert run("benchmark", [*arguments, "--images", "10"]) == 2
    assert "--images 10: " in capsys.readouterr().err
    assert run("benchmark", [*arguments, "--images", "9"]) == 0
    usual, decoding = json.loads(numbers.read_text())
    assert usual["ratio"] < 1 < decoding["ratio"] and usual["ours_ms"] == decoding["ours_ms"]
    assert "| usual pipeline |" in capsys.readouterr().out


def test_evaluation_is_measured_and_its_numbers_are_compared(tmp_path, monkeypatch, capsys):
    file = tmp_path / "a.json"
    arguments = ["eval", "--images", "30", "--detections", "20", "--json", str(file)]
    assert run("benchmark", arguments) == 0
    (row,) = json.loads(file.read_text())
    assert row["difference"] == 0 < row["ratio"] < 1 and row["ours_ms"] < row["reference_ms"]
    assert "30 images x 20 detections" in capsys.readouterr().out
    monkeypatch.setattr(evaluation, "score", lambda *_: (dict.fromkeys(STATS, 0.25), [0.25] * 80))
    assert run("benchmark", arguments) == 0
    (row,) = json.loads(file.read_text())
    assert row["difference"] > 0.2


def test_detections_are_like_a_detector_s():
    images = evaluation.make_detections(60, 100)
    numbers, per_class = evaluation.score(images, 80)
    assert 0.05 < numbers["AP"] < 0.5 and all(value > 0 for value in numbers.values())
    assert any(image.ground_truth[:, 5].any() for image in images.values())
    assert all((np.diff(image.predictions[:, 4]) <= 0).all() for image in images.values())
    assert len(images[1].predictions) == 100 and min(per_class) == -1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "asdd"], "--methods: 'asdd': did you mean 'asd'?"),
        (["--json", "nowhere/a.json"], "--json: folder nowhere does not exist"),
        (["--rounds", "0"], "--rounds must be 1 or more, not 0"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert run("benchmark", ["step", "--config", "configs/quickstart.yaml", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert run("benchmark", ["stepp"]) == 2
    assert "unknown benchmark 'stepp': did you mean 'step'?" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["deformable_detr", "detr", "rt_detr", "d_fine", "deimv2", "rf_detr"])
def test_the_loss_is_measured_against_transformers_and_equal(family, tmp_path, capsys):
    file = tmp_path / "a.json"
    size = ["--images", "2", "--layers", "2", "--queries", "12", "--classes", "4", "--boxes", "3"]
    assert run("benchmark", ["loss", "--family", family, "--rounds", "1", "--json", str(file), *size]) == 0
    rows = json.loads(file.read_text())
    assert [row["name"] for row in rows] == ["late training", "early training"]
    for row in rows:
        assert row["ours_ms"] > 0 < row["reference_ms"] and row["device"] in ("cpu", "cuda")
        assert row["ratio"] == pytest.approx(row["ours_ms"] / row["reference_ms"])
        assert 0 < row["difference"] < 1e-5
    assert "| early training |" in capsys.readouterr().out


def test_late_in_training_predictions_stand_at_their_objects():
    step = loss._Step("deformable_detr", loss.LossSize(images=2, layers=2, queries=40, classes=4, boxes=3), True, 0)
    boxes, logits = step.leaves["outputs_coord"], step.leaves["outputs_class"]
    for image, label in enumerate(step.labels):
        for box, wanted in zip(label["boxes"], label["class_labels"], strict=True):
            near = (boxes[:, image] - box).abs().amax(-1) < 5 * loss.NOISE
            assert (near.sum(1) >= loss.NEAR).all()
            assert logits[:, image][near][:, wanted].mean() > -2.5 > logits.mean()


def test_a_sweep_has_a_row_for_every_size(monkeypatch):
    monkeypatch.setitem(loss.SWEEPS, "boxes", (0, 2))
    size = loss.LossSize(images=1, layers=1, queries=5, classes=3)
    names = [row.name for row in loss.measure_losses("rt_detr", size, "boxes", 1)]
    assert names == [f"{when} training, {count} boxes" for count in (0, 2) for when in ("late", "early")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--family", "rt_dert"], "--family: unknown family 'rt_dert': did you mean 'rt_detr'?"),
        (["--boxes", "-1"], "--boxes must be 0 or more, not -1"),
        (["--images", "0"], "--images must be 1 or more, not 0"),
    ],
)
def test_mistakes_about_the_loss_are_one_line(arguments, message, capsys):
    assert run("benchmark", ["loss", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_predictions_on_disk_are_measured(tmp_path, capsys, monkeypatch):
    file, numbers, checkpointing = tmp_path / "run.yaml", tmp_path / "a.json", []

    def spy(trainer, *args):
        checkpointing.append(trainer.model.student.is_activation_checkpointing)
        return step.one_step(trainer, *args)

    monkeypatch.setattr(cache, "one_step", spy)
    sizes = {"resize": "fixed", "fixed_size": [64, 64], "augmentation": "flip"}
    method = {"name": "balanced_pairs", "trust": 0.0}
    values = configuration(write_places(tmp_path / "places"), data=sizes, per_device_eval_batch_size=2)
    values["training"]["activation_checkpointing"] = True
    file.write_text(yaml.safe_dump(values | {"method": method}))
    arguments = ["cache", "--config", str(file), "--rounds", "2", "--json", str(numbers)]
    assert run("benchmark", [*arguments, "--images", "13"]) == 2
    assert "--images 13: " in capsys.readouterr().err
    assert run("benchmark", [*arguments, "--images", "6", "--top-queries", "4", "--top-classes", "2"]) == 0
    assert checkpointing and all(checkpointing)
    shown = capsys.readouterr().out
    *rows, whole, best = json.loads(numbers.read_text())
    assert [row["name"] for row in rows] == [
        f"{form}: {what}"
        for form in ("all predictions", "best 4 x 2")
        for what in (
            "step, beside the teacher's",
            "step, beside plain training's",
            "reading an image's, beside decoding it",
        )
    ]
    for row in rows:
        assert row["ours_ms"] > 0 < row["reference_ms"] and row["device"] == "cpu" and row["name"] in shown
    assert rows[0]["ours_ms"] == rows[1]["ours_ms"] != rows[3]["ours_ms"]
    assert rows[1]["reference_ms"] == rows[4]["reference_ms"] != rows[0]["reference_ms"]
    # 2 layers x 9 queries x 3 classes; 16 bytes a box of a layer; the question's reference points; the image id
    least = 2 * 9 * (3 * 2 + 16)
    assert least < whole["bytes_per_view"] < 3 * least + 2000 and best["bytes_per_view"] < whole["bytes_per_view"]
    assert whole["bytes_per_second"] > 0 and whole["losses"].keys() == best["losses"].keys()
    for name, (live, kept) in whole["losses"].items():
        assert kept == pytest.approx(live, rel=2e-3, abs=1e-4), name
    assert any(abs(kept - live) > 0.01 * abs(live) for live, kept in best["losses"].values())


def test_a_method_s_own_work_is_measured_on_fixed_outputs(tmp_path, capsys, monkeypatch):
    file, numbers, seen, asked = tmp_path / "run.yaml", tmp_path / "a.json", [], []
    file.write_text(yaml.safe_dump(configuration(write_places(tmp_path / "places"))))
    imitate, forward = Distiller.imitate, DeformableDetrAdapter.forward

    def spy(self, student, teacher, labels):
        losses = imitate(self, student, teacher, labels)
        seen.append((self.method, student, teacher, losses))
        return losses

    monkeypatch.setattr(Distiller, "imitate", spy)
    monkeypatch.setattr(DeformableDetrAdapter, "forward", lambda *given: (asked.append(1), forward(*given))[1])
    arguments = ["method", "--config", str(file), "--methods", "asd,d3etr,index_pairing", "--rounds", "2"]
    assert run("benchmark", [*arguments, "--cpu-time", "--json", str(numbers)]) == 0
    assert len(asked) == 2 * 2 and len(seen) == 2 * 3  # each method asks both once; a round warms up
    for method, student, teacher, losses in seen:
        assert method.step >= method.settled_at and sum(losses.values()).requires_grad
        leaves = [student.logits, student.boxes, student.queries, *student.features]
        leaves += [student.attention.queries] if "attention" in method.requires else []
        assert all(x.is_leaf and x.requires_grad for x in leaves) and not teacher.logits.requires_grad
    asd, d3etr, refused = json.loads(numbers.read_text())
    assert refused["name"] == "index_pairing" and "index_pairing: refused:" in capsys.readouterr().out
    assert asd["ratio"] == 1 and d3etr["reference_ms"] == asd["ours_ms"] > asd["backward_ms"] > 0
    for cost in (asd, d3etr):
        assert cost["forward_ms"] + cost["backward_ms"] == pytest.approx(cost["ours_ms"], rel=0.5)
    assert run("benchmark", ["method", "--config", str(file), "--methods", "index_pairing"]) == 2


def test_deformable_attention_is_measured_against_transformers_and_equal(tmp_path, capsys):
    numbers = tmp_path / "a.json"
    sizes = ["--image-size", "64", "--queries", "15", "--rounds", "1"]
    assert run("benchmark", ["attention", *sizes, "--json", str(numbers)]) == 0
    rows, shown = json.loads(numbers.read_text()), capsys.readouterr().out
    layers, passes = ("encoder, 85", "decoder, 15"), ("forward", "forward and backward")
    names = [f"{layer} queries: {what}" for layer in layers for what in passes]
    assert [row["name"] for row in rows] == names
    assert all(row["ours_ms"] > 0 and f"| {row['name']} " in shown for row in rows)
    assert all(0 < row["difference"] < 1e-5 for row in rows[:2])
    assert [row["difference"] for row in rows[2:]] == [0, 0]  # decoders run Transformers' code
