"""Students for a latency: what is built, which is chosen, and that its configuration trains."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

import pytest
import torch
import yaml

from asd_hf import shrink as shrinking
from asd_hf.commands import run
from asd_hf.commands.shrink import _sections, _student
from asd_hf.config import load_config
from asd_hf.data import DataConfig, make_shapes
from asd_hf.detectors import get_adapter
from asd_hf.errors import UserError
from asd_hf.loading import load_teacher
from asd_hf.model_config import StudentConfig
from asd_hf.shrink import Candidate, _ladder, choose, shrink
from tests import tiny
from tests.families import FAMILIES, STUDENTS

SIZE, IMAGE = {"height": 64, "width": 64}, (64, 64)
OVERRIDES = ["data.augmentation=flip", "model.student.frozen_stages=1"]


@pytest.fixture(scope="module")
def deep_teacher():
    return get_adapter(
        tiny.deformable_detr(
            encoder_layers=6, decoder_layers=6, backbone_config=tiny.TIMM_RESNET, num_feature_levels=3
        ),
        tiny.processor(size=SIZE),
    )


@pytest.mark.parametrize("target", [1, 40, 60, 90, 100, 1000])
def test_the_search_finds_the_largest_that_meets_the_target(target, deep_teacher, monkeypatch):
    """Times that fall with every rung are given: the bisection finds what measuring every one of them does."""

    def measure(config, *_):
        layers = (config.encoder_layers or 6) + (config.decoder_layers or 6)
        small, few = config.backbone is not None, config.num_queries is not None
        return Candidate(config, 1000 * (2 - small) + 10 * layers - few, 0, 10.0 * layers - 30 * small - few)

    monkeypatch.setattr(shrinking, "_measure", measure)
    found, refused = shrink(deep_teacher, SIZE, IMAGE, target)
    ladders = {backbone: _ladder(deep_teacher, backbone) for backbone in (None, "mobilenetv3_large_100")}
    every = [
        measure(StudentConfig(backbone=backbone, copy_weights=True, **rung))
        for backbone, ladder in ladders.items()
        for rung in ladder
    ]
    assert not refused and len(found) <= 6 < len(every) and len({c.student.backbone for c in found}) == 2
    assert choose(found, target) == choose(every, target)
    assert found == sorted(found, key=lambda candidate: -candidate.parameters)
    assert (choose(found, target) is None) == (target == 1)


def test_layers_go_first_and_stay_the_teachers(deep_teacher):
    rungs = _ladder(deep_teacher, "mobilenetv3_large_100")
    assert rungs[:3] == [{}, {"decoder_layers": 3}, {"decoder_layers": 3, "encoder_layers": 3}]
    assert rungs[-1] == {"decoder_layers": 2, "encoder_layers": 2, "num_queries": 6}  # no width below 64
    assert _ladder(deep_teacher, None) == rungs[1:]
    student = shrinking._measure(
        StudentConfig(copy_weights=True, decoder_layers=3), deep_teacher, SIZE, IMAGE, "cpu", 1
    )
    assert student.copied == student.parameters and student.milliseconds > 0
    other = StudentConfig(copy_weights=True, backbone="mobilenetv3_large_100")
    other = shrinking._measure(other, deep_teacher, SIZE, IMAGE, "cpu", 1)
    assert 0 < other.copied < other.parameters < student.parameters


def test_a_backbone_that_cannot_be_built_is_told(deep_teacher, monkeypatch):
    def measure(config, *_):
        if config.backbone is not None:
            raise UserError("it has no levels")
        return Candidate(config, 1, 0, 1.0)

    monkeypatch.setattr(shrinking, "_measure", measure)
    found, refused = shrink(deep_teacher, SIZE, IMAGE, 5)
    assert found and refused == {"mobilenetv3_large_100": "it has no levels"}


def test_the_ladder_of_a_large_teacher(deep_teacher, monkeypatch):
    monkeypatch.setattr(deep_teacher, "spec", replace(deep_teacher.spec, num_layers=12, hidden_size=288))
    rungs = _ladder(deep_teacher, None)
    assert [rung["decoder_layers"] for rung in rungs[:3]] == [6, 6, 4] and rungs[-1]["d_model"] == 128


def test_students_are_measured_on_images_of_the_size(deep_teacher, monkeypatch):
    shapes = []
    monkeypatch.setattr(shrinking, "milliseconds_per_image", lambda _, image, *__: shapes.append(image.shape) or 1.0)
    shrinking._measure(StudentConfig(decoder_layers=3), deep_teacher, SIZE, (64, 96), "cpu", 1)
    assert shapes == [(1, 3, 64, 96)]


@pytest.mark.parametrize("name", STUDENTS)
def test_the_smallest_student_of_every_family_can_be_built(name):
    teacher = get_adapter(*FAMILIES[name]())
    assert (rungs := _ladder(teacher, None))
    candidate = shrinking._measure(StudentConfig(copy_weights=True, **rungs[-1]), teacher, SIZE, (64, 96), "cpu", 1)
    assert candidate.parameters > 0 and candidate.copied > 0 and candidate.name


@pytest.mark.parametrize("name", STUDENTS)
def test_a_ladder_has_what_the_family_has(name, monkeypatch):
    """Of a teacher whose every size could be smaller."""
    teacher = get_adapter(*FAMILIES[name]())
    monkeypatch.setattr(shrinking, "_count_parameters", lambda backbone: 0)
    own = name in ("yolos", "lw_detr", "rf_detr")  # they are a ViT, or made for one of their own
    assert shrinking._backbones(teacher) == [None, *([] if own else shrinking.BACKBONES)]
    teacher.spec = replace(teacher.spec, num_layers=12, num_queries=300, hidden_size=256)
    rungs = _ladder(teacher, "resnet18")
    assert set(rungs[-1]) - {"encoder_layers"} == teacher.config_names.keys() & {
        "decoder_layers",
        "num_queries",
        "d_model",
    }


def test_the_largest_of_those_that_meet_the_target_is_chosen():
    found = [Candidate(StudentConfig(), count, 0, ms) for count, ms in ((9, 30.0), (5, 20.0), (3, 10.0))]
    assert choose(found, 20).parameters == 5 and choose(found, 100).parameters == 9 and choose(found, 9.9) is None


@pytest.fixture(scope="module")
def proposed(tmp_path_factory):
    root = tmp_path_factory.mktemp("shrink")
    make_shapes(root / "shapes", num_train=24, num_val=4, progress=False)
    arguments = ["shapes", "--target-ms", "1e6", "--rounds", "1", "--data", str(root / "shapes")]
    assert run("shrink", [*arguments, "--output", str(root / "student.yaml"), *OVERRIDES]) == 0
    return root / "student.yaml"


def test_the_configuration_is_that_of_the_chosen_student(proposed):
    text = proposed.read_text()
    assert text.startswith("# A student of shapes that takes ") and "64 x 64 pixels on cpu" in text
    config = load_config(proposed)
    assert config.model.teacher == "shapes" and config.method_name == "balanced_pairs"
    assert config.model.student == StudentConfig(decoder_layers=2, copy_weights=True, frozen_stages=1)
    assert (config.data.resize, config.data.fixed_size, config.data.augmentation) == ("fixed", [64, 64], "flip")
    assert set(yaml.safe_load(text)) == {"model", "data", "method", "training"}


def test_a_new_backbone_begins_with_its_own_weights():
    student = StudentConfig(backbone="resnet18", decoder_layers=3, copy_weights=True)
    assert _student(Candidate(student, 1, 0, 1.0)) == {
        **{"base": "teacher", "backbone": "resnet18", "decoder_layers": 3},
        **{"pretrained_backbone": True, "copy_weights": True},
    }


def test_images_that_keep_their_aspect_and_a_teacher_without_a_decoder(tmp_path):
    teacher = get_adapter(*FAMILIES["yolos"]())
    args = Namespace(teacher="big", data=None, overrides=[])
    sections = _sections(args, teacher, teacher.processor, tmp_path / "student.yaml")
    assert sections["method"] == {"name": "asd", "layers": 1}
    data = sections["data"]
    assert (data["source"], data["resize"], data["eval_size"], data["max_size"]) == ("data/coco", "multiscale", 64, 96)
    usual = DataConfig()
    assert data["train_sizes"] == [round(64 * side / usual.eval_size) for side in usual.train_sizes]


def test_the_doctor_and_a_training_take_it_as_it_is(proposed, tmp_path, capsys):
    quick = ["training.max_steps=2", "training.use_cpu=true", "method.ramp_steps=0"]
    quick += ["training.eval_strategy=no", "training.save_strategy=no", f"training.output_dir={tmp_path}"]
    assert run("doctor", ["--config", str(proposed), "--images", "4", "--steps", "0", *quick[1:2]]) == 0
    assert "refused" not in capsys.readouterr().out
    assert run("train", ["--config", str(proposed), *[q for q in quick if "ramp" not in q]]) == 0
    assert (tmp_path / "metrics.json").is_file() and load_teacher(str(tmp_path)).spec.num_layers == 2


def test_what_cannot_be_met_is_said(tmp_path, capsys, monkeypatch):
    output = tmp_path / "student.yaml"
    assert run("shrink", ["shapes", "--target-ms", "0.001", "--rounds", "1", "--output", str(output)]) == 1
    told = capsys.readouterr()
    assert "no student meets 0.001 ms: the fastest, decoder 2" in told.err and "| decoder 2" in told.out
    assert not output.exists()
    found = [
        Candidate(StudentConfig(decoder_layers=2), 9, 0, 30.0),
        Candidate(StudentConfig(num_queries=6), 5, 0, 20.0),
    ]
    monkeypatch.setattr("asd_hf.commands.shrink.shrink", lambda *_: (found, {"resnet18": "it has no levels"}))
    assert run("shrink", ["shapes", "--target-ms", "10", "--output", str(output)]) == 1
    told = capsys.readouterr()
    assert "the fastest, 6 queries, takes 20.0 ms" in told.err and "resnet18: it has no levels" in told.out


def test_mistakes_are_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert run("shrink", ["shapes", "--target-ms", "9", "--device", "cuda"]) == 2
    assert "--device cuda: PyTorch sees no such device here" in capsys.readouterr().err
    for part in FAMILIES["grounding_dino"]():
        part.save_pretrained(tmp_path)
    assert run("shrink", [str(tmp_path), "--target-ms", "9"]) == 2
    assert "a grounding-dino can only be a teacher" in capsys.readouterr().err
    assert run("shrink", ["shapes", "--target-ms", "0"]) == 2
    assert "--target-ms must be more than 0" in capsys.readouterr().err
    assert run("shrink", ["shapes", "--target-ms", "9", "--output", "x.yaml", "data.sourec=y"]) == 2
    assert "data.sourec is unknown: did you mean 'source'?" in capsys.readouterr().err
