"""`asd-hf selftest` finds nothing where nothing is lost, and something where something is."""

from __future__ import annotations

import random

import torch

from asd_hf.commands import run
from asd_hf.randomness import RandomState
from asd_hf.trainer import DistillationTrainer

SMALL = ["training.max_steps=6", "training.dataloader_num_workers=0", "training.logging_steps=4"]


def test_a_killed_run_ends_as_the_unbroken_one(capsys):
    assert run("selftest", ["resume", "--kills", "2", "--seed", "3", *SMALL]) == 0
    table = capsys.readouterr().out
    assert "2 kills survived: 1 runs ended as the unbroken one, bit by bit" in table
    assert sum(int(line.split()[1]) for line in table.splitlines()[1:6]) == 2


def test_what_is_lost_is_found(capsys, monkeypatch):
    monkeypatch.setattr(DistillationTrainer, "_load_log_window", lambda self, file: None)
    assert run("selftest", ["resume", "--kills", "2", "--seed", "3", *SMALL]) == 1
    table = capsys.readouterr().out
    assert "trainer_state.json" in table and "kills: not survived" in table


def test_all_generators_go_back():
    def draw():
        return random.random(), torch.rand(2).tolist()

    state = RandomState.now()
    first, second = draw(), draw()
    assert first != second
    state.restore()
    assert draw() == first
