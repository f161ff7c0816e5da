"""Steps whose loss or gradient is not finite: left out, kept, replayed, and too many of them end the training."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
import yaml
from torch import nn

from asd_hf.bad_steps import Step, StepGuard, guard_loss, read_batches, write_batches
from asd_hf.commands import run
from asd_hf.errors import UserError
from tests import tiny
from tests.test_trainer import assert_equal, make_trainer, shapes, weights  # noqa: F401
from tests.tiny_run import configuration, write_places


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
@pytest.mark.parametrize("where", ["loss", "student", "method"])
def test_a_bad_step_moves_nothing_and_is_counted(shapes, tmp_path, optim, where):  # noqa: F811
    trainer = make_trainer(shapes, tmp_path, optim=optim, max_steps=4, logging_steps=1, save_strategy="no")
    states, compute_loss = [], trainer.compute_loss

    def state():
        return {
            **weights(trainer),
            **deepcopy({str(k): v for k, v in trainer.optimizer.state_dict()["state"].items()}),
        }

    def spoiled(model, inputs, **kwargs):
        states.append(state())
        loss = compute_loss(model, inputs, **kwargs)
        if trainer.state.global_step != 2:
            return loss
        if where == "loss":
            return guard_loss(loss + torch.inf)
        part = trainer.model.student if where == "student" else trainer.method
        next(p for p in part.parameters() if p.requires_grad).register_hook(lambda gradient: gradient * torch.nan)
        return loss

    trainer.compute_loss = spoiled
    trainer.train()
    states.append(state())
    before, after = states[2], states[3]
    assert not [key for key in before if not _equal(before[key], after[key])]
    assert any(not _equal(states[1][key], states[2][key]) for key in before)
    if where == "loss":
        assert any(not _equal(states[3][key], states[4][key]) for key in before)
        assert trainer.bad_steps == 1
    logged = [row.get("bad_steps") for row in trainer.state.log_history if "loss" in row]
    assert logged[:3] == [None, None, 1]
    assert json.loads((tmp_path / "_bad_steps/step-3/step.json").read_text())["step"] == 2
    assert all(value.isfinite().all() for value in weights(trainer).values())


def _equal(one, two):
    if isinstance(one, dict):
        return all(_equal(one[key], two[key]) for key in one)
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def test_a_loss_that_is_finite_is_as_it_was():
    x = torch.randn(5, requires_grad=True)
    loss = x.exp().sum()
    guarded = guard_loss(loss)
    assert torch.equal(guarded, loss)
    one, two = torch.autograd.grad(loss, x, retain_graph=True), torch.autograd.grad(guarded, x)
    assert torch.equal(one[0], two[0])
    (gradient,) = torch.autograd.grad(guard_loss(x.sum() + torch.inf), x)
    assert gradient.isnan().all()


def test_running_statistics_do_not_take_what_a_bad_step_saw():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    guard = StepGuard(model, torch.optim.SGD(model.parameters()))
    for x, finite in ((torch.tensor([[1.0, 2.0], [torch.inf, 4.0]]), False), (torch.rand(3, 2), True)):
        before = model[1].running_mean.clone()
        guard.begin(0)
        model(x)
        guard.judge(torch.tensor(finite))
        assert torch.equal(model[1].running_mean, before) is not finite
        assert model[1].running_mean.isfinite().all() and model[1].running_var.isfinite().all()


def test_the_host_may_hear_of_it_later():
    model = nn.Linear(2, 2)
    guard = StepGuard(model, torch.optim.AdamW(model.parameters(), fused=True))
    guard.begin(7)
    guard.judge(torch.tensor(False))
    guard.waiting.ready = Happened()  # as on a GPU
    assert list(guard.bad(wait=False)) == []
    assert [step.number for step in guard.bad(wait=True)] == [7]
    assert list(guard.bad(wait=True)) == []
    guard.begin(8)
    guard.judge(torch.tensor(True))
    assert list(guard.bad(wait=True)) == []


class Happened:
    def synchronize(self):
        pass


def test_batches_come_back(tmp_path):
    batches = [tiny.batch(3), tiny.batch(2, seed=1)]
    for batch in batches:
        for index, label in enumerate(batch["labels"]):
            label["labelled"] = index != 1
    write_batches(Step(5, {"cpu": torch.get_rng_state()}, batches), tmp_path, rank=0)
    random, back = read_batches(tmp_path / "batches_0.safetensors")
    assert torch.equal(random["cpu"], torch.get_rng_state())
    assert len(back) == 2
    for one, two in zip(batches, back, strict=True):
        assert one.keys() == two.keys() and _equal(one["pixel_values"], two["pixel_values"])
        for label, other in zip(one["labels"], two["labels"], strict=True):
            assert label.keys() == other.keys() and _equal(label, other)
            assert type(other["labelled"]) is bool


def test_too_many_end_the_training_and_one_can_be_replayed(tmp_path, capsys):
    """A learning rate so high that the second step is beyond all numbers."""
    places = write_places(tmp_path)
    options = {"output_dir": str(tmp_path / "run"), "disable_tqdm": True, "max_steps": 9}
    sections = configuration(places, learning_rate=1e30, max_grad_norm=0.0, max_bad_steps=2, **options)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sections))
    assert run("train", ["--config", str(tmp_path / "run.yaml")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: 2 steps had a loss or gradient that is not finite")
    kept = sorted((tmp_path / "run/_bad_steps").iterdir())
    assert len(kept) == 2
    assert run("replay", [str(kept[0])]) == 0
    table = capsys.readouterr().out
    assert "loss_ce" in table and "nan" in table
    first = next(line for line in table.splitlines() if "first output" in line)
    assert "student." in first
    assert run("replay", [str(tmp_path)]) == 2
    with pytest.raises(UserError, match="training.max_bad_steps must be 1 or more"):
        make_trainer(tmp_path, tmp_path, max_bad_steps=0)
