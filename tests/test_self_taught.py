"""A student that is taught by its own moving average, and by several methods at once."""

from __future__ import annotations

import pytest
import torch

from asd_hf.build import Parts
from asd_hf.commands.train import train
from asd_hf.config import build_config
from asd_hf.doctor import REFUSED, check
from asd_hf.errors import UserError
from asd_hf.trainer import METHOD_WEIGHTS
from tests.tiny_run import configuration, write_places

SELF_TAUGHT = [
    {"name": "od_detr", "ramp_steps": 0},
    {"name": "asd", "hidden_dim": 16, "key_dim": 16, "ramp_steps": 0},
    {"name": "mgd", "weight": 0.5},
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return write_places(tmp_path_factory.mktemp("self_taught"))


def values_of(places, folder, **training):
    options = {"output_dir": str(folder), "ema_decay": 0.9, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-3}
    values = configuration(places, teacher=None, **options | training)
    values["model"]["teacher"] = "ema"
    return values | {"method": SELF_TAUGHT}


def trained(values, resume=None):
    torch.manual_seed(0)
    parts = Parts(build_config(values))
    trainer = parts.trainer()
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_teacher_is_the_moving_average_and_a_run_resumes_exactly(places, tmp_path):
    whole = trained(values_of(places, tmp_path / "whole"))
    assert whole.teacher.model is whole.ema.model and not whole.teacher.model.training
    rows = [row for row in whole.state.log_history if "loss" in row]
    terms = ("od_detr_matching_class", "od_detr_box", "od_detr_auxiliary_box", "asd_box", "mgd_generation")
    assert all(f"loss/{term}" in row for row in rows for term in terms)
    assert rows[0]["loss/od_detr_box"] == pytest.approx(0, abs=1e-5) and rows[-1]["loss/od_detr_box"] > 1e-4

    values = values_of(places, tmp_path / "whole")
    again = trained(values, resume=str(tmp_path / "whole" / "checkpoint-2"))
    for ours, theirs in ((whole.model, again.model), (whole.ema.model, again.ema.model)):
        expected, state = ours.state_dict(), theirs.state_dict()
        assert expected.keys() == state.keys() and all(torch.equal(expected[key], state[key]) for key in expected)
    assert (tmp_path / "whole" / "checkpoint-2" / METHOD_WEIGHTS).is_file()


def test_doctor_and_train_know_a_student_that_teaches_itself(places, tmp_path):
    parts = Parts(build_config(values_of(places, tmp_path)))
    found = {finding.topic: finding for finding in check(parts)}
    assert found["teacher"].text == "the student's own moving average, of decay 0.9"
    assert found["method"].text.startswith("od_detr+asd+mgd needs decode, features;")
    assert parts.under({}, None).method is None and parts.under({}, None).run.model.teacher is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": {"ema_decay": 0.0}}, "model.teacher is the student's moving average: set training.ema_decay"),
        ({"method": {}}, "model.teacher teaches by a method: set method.name"),
        ({"model": {"class_map": {"cat": "puma"}}}, "model.class_map has no use with model.teacher: ema"),
        ({"model": {"student": {"base": "teacher"}}}, "there is no pretrained teacher"),
    ],
)
def test_mistakes_are_one_line(places, tmp_path, change, message):
    values = values_of(places, tmp_path)
    for section, part in change.items():
        values[section] = values[section] | part if part else {}
    with pytest.raises(UserError, match=message) as caught:
        Parts(build_config(values)).trainer()
    assert "\n" not in str(caught.value)


def test_a_pretrained_teacher_cannot_stand_in_for_the_moving_average(places, tmp_path):
    values = configuration(places, output_dir=str(tmp_path)) | {"method": "od_detr"}
    values["model"]["student"] = str(places / "deformable_detr")  # the very model: nothing but its origin is wrong
    with pytest.raises(UserError, match="own moving average: set model.teacher: ema and training.ema_decay"):
        Parts(build_config(values)).trainer()


def test_doctor_refuses_a_moving_average_that_is_not_kept(places, tmp_path):
    found = check(Parts(build_config(values_of(places, tmp_path, ema_decay=0.0))))
    teacher = next(finding for finding in found if finding.topic == "teacher")
    assert teacher.verdict == REFUSED and "training.ema_decay" in teacher.remedy


def test_models_are_evaluated_as_they_will_be_used(places, tmp_path):
    values = configuration(places, output_dir=str(tmp_path), max_steps=1, ema_decay=0.9) | {"method": "d3etr"}
    trainer = Parts(build_config(values)).trainer()
    seen = []
    for adapter in (trainer.adapter, trainer.teacher, trainer.ema_adapter):
        ask = adapter.forward

        def forward(*args, adapter=adapter, ask=ask):
            output = ask(*args)
            seen.append((adapter.model.training, output.attention is not None))
            return output

        adapter.forward = forward
    usual = trainer.adapter.model.config._attn_implementation
    trainer.train()
    assert set(seen) == {(True, True), (False, True)}  # the student and its teacher, in the step
    seen.clear()
    trainer.evaluate()
    trainer.evaluate_adapter(trainer.teacher)
    assert len(seen) >= 3 and set(seen) == {(False, False)}
    assert trainer.adapter.with_attention and trainer.teacher.with_attention
    trainer.watch_attention(False)
    assert trainer.adapter.model.config._attn_implementation == "sdpa" and usual == "eager"


def test_a_run_goes_on_with_its_own_methods_alone(places, tmp_path):
    def trained_with(method):
        values = configuration(places, output_dir=str(tmp_path), max_steps=1, save_steps=1)
        values["training"]["resume_from_checkpoint"] = True
        return train(build_config(values | {"method": method}))

    trained_with("ld")  # it has no weights by which a checkpoint could tell
    for method, reason in (
        ("pseudo_labels", "with method ld, not pseudo_labels"),
        (["ld", "asd"], "with method ld, not ld\\+asd"),
        ({"name": "ld", "main_weight": 0.5}, "with other options of ld"),
    ):
        with pytest.raises(UserError, match=f"checkpoint-1 was trained {reason}: set another training.output_dir"):
            trained_with(method)
    assert trained_with("ld")["student"]["AP"] >= 0
