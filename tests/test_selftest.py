"""`asd-hf selftest` finds nothing where nothing is lost, and something where something is."""

from __future__ import annotations

import random
import re

import torch

from asd_hf.commands import run
from asd_hf.commands.train import train
from asd_hf.randomness import RandomState

SMALL = ["training.max_steps=6", "training.dataloader_num_workers=0", "training.logging_steps=4"]


def test_a_killed_run_ends_as_the_unbroken_one(capsys):
    assert run("selftest", ["resume", "--kills", "2", "--seed", "3", *SMALL]) == 0
    table = capsys.readouterr().out
    assert re.search(r"2 kills survived: \d runs ended as the unbroken one, bit by bit", table)
    assert sum(int(line.split()[1]) for line in table.splitlines()[1:6]) == 2


def test_what_is_lost_is_found(capsys, monkeypatch):
    def forgetful(run):
        run.training.max_grad_norm *= 1 + ("killed" in run.training.output_dir)
        train(run)

    monkeypatch.setattr("asd_hf.commands.selftest.train", forgetful)
    assert run("selftest", ["resume", "--kills", "1", "--seed", "3", *SMALL]) == 1
    table = capsys.readouterr().out
    assert "run killed_0: checkpoint-6/model.safetensors: " in table and "1 kills: not survived" in table


def test_all_generators_go_back():
    def draw():
        return random.random(), torch.rand(2).tolist()

    state = RandomState.now()
    first, second = draw(), draw()
    assert first != second
    state.restore()
    assert draw() == first
