"""Checkpoints are whole or not there, and training goes on from them exactly, wherever it was ended."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
from itertools import count

import pytest
import torch
from safetensors.torch import load_file

from asd_hf import stopping
from asd_hf.checkpoints import (
    MANIFEST,
    PARTIAL,
    all_checkpoints,
    complete,
    moved_in,
    newest_checkpoint,
    publish,
    read_manifest,
    rotate,
)
from asd_hf.errors import UserError
from asd_hf.trainer import METHOD_WEIGHTS, DistillationTrainer
from tests.test_trainer import assert_equal, logged, make_trainer, shapes, weights  # noqa: F401


def write(output, step, content="weights"):
    partial, checkpoint = output / PARTIAL / f"checkpoint-{step}", output / f"checkpoint-{step}"
    (partial / "ema").mkdir(parents=True)
    (partial / "model.safetensors").write_text(content)
    (partial / "ema" / "model.safetensors").write_text(content)
    complete(partial, {"step": step})
    publish(partial, checkpoint)
    return checkpoint


def names(output):
    return [path.name for path in all_checkpoints(output)]


def test_manifest_lists_every_file(tmp_path):
    checkpoint = write(tmp_path, 4)
    manifest = read_manifest(checkpoint)
    assert manifest["step"] == 4 and set(manifest["files"]) == {"model.safetensors", "ema/model.safetensors"}
    assert manifest["files"]["model.safetensors"]["bytes"] == 7
    assert list((tmp_path / PARTIAL).iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda c: (c / "model.safetensors").write_text("wEights"),
            "model.safetensors has changed since it was written",
        ),
        (lambda c: (c / "model.safetensors").write_text("weig"), "model.safetensors has 4 bytes, not 7"),
        (lambda c: (c / "ema/model.safetensors").unlink(), "ema/model.safetensors is not there"),
        (lambda c: (c / MANIFEST).unlink(), f"no whole checkpoint: it has no {MANIFEST}"),
        (lambda c: (c / MANIFEST).write_text("{"), f"{MANIFEST} cannot be read"),
        (lambda c: (c / MANIFEST).write_text("[1]"), f"{MANIFEST} cannot be read"),
    ],
)
def test_a_damaged_one_is_passed_over_and_said(tmp_path, caplog, damage, message):
    assert newest_checkpoint(tmp_path) is None
    whole, damaged = write(tmp_path, 9), write(tmp_path, 10)  # by number, not by name
    assert newest_checkpoint(tmp_path) == damaged
    damage(damaged)
    with caplog.at_level(logging.WARNING, "asd_hf"):
        assert newest_checkpoint(tmp_path) == whole
    assert len(caplog.messages) == 1 and message in caplog.messages[0] and "checkpoint-10" in caplog.messages[0]
    damage(whole)
    with pytest.raises(UserError, match="has no whole checkpoint .*checkpoint-10.*: delete the damaged ones"):
        newest_checkpoint(tmp_path)
    write(tmp_path, 10)  # takes the damaged one's place
    assert newest_checkpoint(tmp_path) == damaged


def test_only_folders_of_that_name_are_checkpoints(tmp_path):
    for name in ("checkpoint-x", "checkpoint-3.old", f"{PARTIAL}/checkpoint-5"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "checkpoint-7").write_text("")
    assert names(tmp_path) == [] and newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [2, 4, 6, 8]),
        (3, None, [2, 4, 6]),  # 8 is of a training that was left: 6 is the newest
        (2, None, [4, 6]),
        (1, None, [6]),
        (2, 2, [2, 6]),
        (1, 2, [2, 6]),
        (2, 6, [4, 6]),
        (2, 3, [4, 6]),  # the best one is not there any more
    ],
)
def test_the_oldest_go_first_and_the_best_stays(tmp_path, limit, best, left):
    for step in (2, 4, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
    rotate(tmp_path / "checkpoint-6", limit, best and str(tmp_path / f"checkpoint-{best}"))
    assert names(tmp_path) == [f"checkpoint-{step}" for step in left]


def test_an_interrupted_deletion_leaves_no_checkpoint_in_parts(tmp_path, monkeypatch):
    def interrupted(folder):
        (folder / MANIFEST).unlink()
        raise KeyboardInterrupt

    for step in (2, 4):
        write(tmp_path, step)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", interrupted)
        rotate(tmp_path / "checkpoint-4", 1, None)
    assert names(tmp_path) == ["checkpoint-4"]


def test_files_take_their_places_whole_or_not_at_all(tmp_path):
    (tmp_path / "model").write_text("old")
    with pytest.raises(OSError), moved_in(tmp_path) as new:
        (new / "model").write_text("ne")
        raise OSError("No space left on device")
    assert (tmp_path / "model").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["model"]
    with moved_in(tmp_path) as new:
        (new / "ema").mkdir()
        (new / "ema/model").write_text("average")
        (new / "model").write_text("new")
    assert (tmp_path / "model").read_text() == "new" and (tmp_path / "ema/model").read_text() == "average"
    assert not (tmp_path / PARTIAL).exists()


# -- in training ------------------------------------------------------------------------------------------------------

# The log, the evaluations and the checkpoints at different steps, six steps an epoch.
STEPS = {"max_steps": 8, "logging_steps": 4, "save_steps": 3, "ema_decay": 0.8, "early_stopping_patience": 9}
EVERY = {
    "epochs": {"eval_strategy": "epoch"},
    "steps": {"eval_strategy": "steps", "eval_steps": 2},
    "together": {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"},
}


def same_end(one, two, folders):
    assert_equal(weights(one), weights(two))
    assert_equal(dict(one.ema.model.state_dict()), dict(two.ema.model.state_dict()))
    assert logged(one) == logged(two)
    rows = [next(row for row in t.state.log_history if "train_loss" in row) for t in (one, two)]
    assert rows[0]["train_loss"] == rows[1]["train_loss"]
    assert names(folders[0]) == names(folders[1])
    assert one.state.best_global_step == two.state.best_global_step
    moments = [t.optimizer.state_dict()["state"] for t in (one, two)]
    for number, values in moments[0].items():
        assert all(torch.equal(values[name], moments[1][number][name]) for name in values)


@pytest.fixture(scope="module")
def unbroken(shapes, tmp_path_factory):  # noqa: F811
    made = {}

    def train(every):
        if every not in made:
            folder = tmp_path_factory.mktemp("unbroken")
            made[every] = make_trainer(shapes, folder, **STEPS | EVERY[every]), folder
            made[every][0].train()
        return made[every]

    return train


def signal_at(monkeypatch, name, time):
    """SIGTERM to this very process, in the `time`-th call of a method of the trainer."""
    calls, method = count(1), getattr(DistillationTrainer, name)

    def signalled(self, *args, **kwargs):
        result = method(self, *args, **kwargs)
        if next(calls) == time:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(DistillationTrainer, name, signalled)


@pytest.mark.parametrize(
    ("every", "method", "time", "saved"),
    [
        ("epochs", "training_step", 4, 4),  # between checkpoints
        ("epochs", "training_step", 6, 6),  # the last step of an epoch: its evaluation is still to be done
        ("epochs", "evaluate_adapter", 1, 6),  # in that evaluation, of the student; then comes the average's
        ("steps", "training_step", 2, 2),  # an evaluation is due: it is done when the run goes on
        ("steps", "evaluate_adapter", 8, 8),  # the last one
        ("together", "training_step", 8, 8),  # the last step
    ],
)
def test_a_signal_ends_the_run_within_the_step_and_it_goes_on_exactly(
    shapes,  # noqa: F811
    tmp_path,
    monkeypatch,
    unbroken,
    every,
    method,
    time,
    saved,
):
    whole, folder = unbroken(every)
    with monkeypatch.context() as patch, stopping.handled():
        signal_at(patch, method, time)
        with pytest.raises(stopping.Stopped) as stopped:
            make_trainer(shapes, tmp_path, **STEPS | EVERY[every]).train()
        assert stopped.value.number == signal.SIGTERM
    assert newest_checkpoint(tmp_path).name == f"checkpoint-{saved}"
    # another seed: nothing may come from a fresh start
    again = make_trainer(shapes, tmp_path, seed=9, **STEPS | EVERY[every])
    again.train(resume_from_checkpoint=True)
    extra = tmp_path / f"checkpoint-{saved}"
    if extra.name not in names(folder):
        shutil.rmtree(extra)
    same_end(whole, again, (folder, tmp_path))


@pytest.mark.parametrize("step", [6, 8])
def test_a_checkpoint_before_the_evaluation_of_its_epoch(shapes, tmp_path, unbroken, step):  # noqa: F811
    """SIGKILL leaves any checkpoint as the newest; the last one is of a run whose final evaluation was not reached."""
    whole, folder = unbroken("epochs")
    for checkpoint in all_checkpoints(folder):
        if int(checkpoint.name.rpartition("-")[2]) <= step:
            shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    again = make_trainer(shapes, tmp_path, seed=9, **STEPS | EVERY["epochs"])
    again.train(resume_from_checkpoint=True)
    same_end(whole, again, (folder, tmp_path))


def test_early_stopping_waits_no_longer_for_having_been_interrupted(shapes, tmp_path):  # noqa: F811
    options = {"max_steps": 12, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": None}
    whole = make_trainer(shapes, tmp_path / "a", early_stopping_patience=2, **options)
    whole.train()
    last = whole.state.global_step
    assert last < 12
    for step in (last - 1, last):
        shutil.copytree(tmp_path / f"a/checkpoint-{step}", tmp_path / f"{step}/checkpoint-{step}")
        again = make_trainer(shapes, tmp_path / str(step), early_stopping_patience=2, **options)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == last
        assert_equal(weights(whole), weights(again))
        assert logged(whole) == logged(again)


def test_what_lies_in_a_checkpoint(shapes, unbroken):  # noqa: F811
    _, folder = unbroken("epochs")
    manifest = read_manifest(folder / "checkpoint-6")
    assert {"model.safetensors", "ema/model.safetensors", METHOD_WEIGHTS, "optimizer.pt", "rng_state.pth"} <= set(
        manifest["files"]
    )
    assert manifest["left"] == {"evaluate": False, "save": False, "epoch_ended": False, "stopped_early": False}
    assert not (folder / PARTIAL).exists() or not any((folder / PARTIAL).iterdir())
    for name in ("optimizer.pt", "scheduler.pt"):  # pickles, but of nothing but tensors and numbers
        torch.load(folder / "checkpoint-6" / name, weights_only=True)
    window = load_file(folder / "checkpoint-6" / "log_window_0.safetensors")
    assert window["last_logged"] == 4 and len(window["scalars/loss/loss_ce"]) == 2
    state = json.loads((folder / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] is None or PARTIAL not in state["best_model_checkpoint"]


def test_other_data_is_refused_and_another_order_is_said(shapes, tmp_path, unbroken, caplog):  # noqa: F811
    _, folder = unbroken("epochs")
    trainer = make_trainer(shapes, tmp_path, **STEPS | EVERY["epochs"])
    trainer.train_dataset.source.fingerprint = "0123456789abcdef"
    with pytest.raises(UserError, match="was trained on other data, or the data has changed since"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    trainer = make_trainer(
        shapes, tmp_path, **STEPS | EVERY["epochs"] | {"per_device_train_batch_size": 2, "max_steps": 7}
    )
    with caplog.at_level(logging.WARNING, "asd_hf"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    assert any("in another order than they would have: batch size was 4, is 2" in line for line in caplog.messages)


def test_a_full_disk_leaves_the_last_checkpoint_and_one_line(shapes, tmp_path):  # noqa: F811
    options, limits = {"save_steps": 2, "save_strategy": "steps"}, resource.getrlimit(resource.RLIMIT_FSIZE)
    make_trainer(shapes, tmp_path, max_steps=2, **options).train()
    for name in ("model.safetensors", "optimizer.pt"):  # by safetensors, and by torch
        trainer = make_trainer(shapes, tmp_path, max_steps=4, **options)
        save, size = trainer._save_checkpoint, (tmp_path / "checkpoint-2" / name).stat().st_size

        def full(model, trial, save=save, size=size):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1]))
            try:
                save(model, trial)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        trainer._save_checkpoint = full
        with pytest.raises(UserError, match="/checkpoint-4 cannot be written: .*; whole checkpoints are as") as error:
            trainer.train(resume_from_checkpoint=True)
        assert "\n" not in str(error.value) and PARTIAL not in str(error.value)
        assert names(tmp_path) == ["checkpoint-2"] and not (tmp_path / PARTIAL).exists()
    again = make_trainer(shapes, tmp_path, max_steps=4, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4 and names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
