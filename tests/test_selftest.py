"""`asd-hf selftest` finds nothing where nothing is lost, and something where something is."""

from __future__ import annotations

import random
import re
import subprocess
import sys

import torch

from asd_hf.randomness import RandomState

SMALL = ["training.max_steps=6", "training.dataloader_num_workers=0", "training.logging_steps=4"]


def selftest(kills: int, before: str = "", *more: str) -> subprocess.CompletedProcess:
    """The command in a process of its own: it forks, which the threads of an evaluation in this one do not survive."""
    command = f"import sys\nfrom asd_hf.commands import run\n{before}\nsys.exit(run('selftest', sys.argv[1:]))"
    arguments = ["resume", "--kills", str(kills), "--seed", "3", *SMALL, *more]
    return subprocess.run([sys.executable, "-c", command, *arguments], capture_output=True, text=True, timeout=300)


def test_a_killed_run_ends_as_the_unbroken_one():
    done = selftest(2)
    assert done.returncode == 0, done.stderr
    assert re.search(r"2 kills survived: \d runs ended as the unbroken one, bit by bit", done.stdout)
    assert sum(int(line.split()[1]) for line in done.stdout.splitlines()[1:6]) == 2


def test_ranks_are_killed_together_or_alone():
    done = selftest(2, "", "--ranks", "2")
    assert done.returncode == 0, done.stderr
    assert re.search(r"[12] of 2 kills were of one rank alone: the others ended by themselves", done.stdout)
    assert re.search(r"2 kills survived: \d runs ended as the unbroken one, bit by bit", done.stdout)


FORGETFUL = """
from asd_hf.commands import selftest
from asd_hf.commands.train import train

def forgetful(run):
    run.training.max_grad_norm *= 1 + ("killed" in run.training.output_dir)
    train(run)

selftest.train = forgetful
"""


def test_what_is_lost_is_found():
    done = selftest(1, FORGETFUL)
    assert done.returncode == 1, done.stderr
    assert "run killed_0: checkpoint-6/model.safetensors: " in done.stdout and "1 kills: not survived" in done.stdout


def test_all_generators_go_back():
    def draw():
        return random.random(), torch.rand(2).tolist()

    state = RandomState.now()
    first, second = draw(), draw()
    assert first != second
    state.restore()
    assert draw() == first
