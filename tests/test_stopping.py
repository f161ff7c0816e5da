"""Signals, as terminals and schedulers send them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch.distributed as dist
import yaml

from asd_hf.checkpoints import all_checkpoints
from asd_hf.commands import run
from asd_hf.stopping import Stopped, advise, deferred, handled
from asd_hf.vote import Vote
from tests.tiny_data import tiny_rows, write_coco
from tests.tiny_run import configuration, write_places


def kill(number=signal.SIGINT):
    os.kill(os.getpid(), number)


def test_a_signal_ends_at_once_or_where_it_is_deferred_to():
    with handled(), pytest.raises(Stopped, match="stopped by SIGINT"):
        kill()
    done = []
    with handled(), pytest.raises(Stopped) as stopped, advise(lambda: f"{len(done)} done"), deferred():
        kill()
        done.append(1)
    assert done == [1] and stopped.value.advice == "1 done" and stopped.value.number == signal.SIGINT
    with handled(), pytest.raises(Stopped), deferred():
        with deferred(False):
            kill()
        done.append(2)
    with handled(), pytest.raises(Stopped), deferred():
        kill()
        with deferred(False):  # what would take long is not begun
            done.append(3)
    assert done == [1]


def test_a_forked_child_is_ended_as_ever():
    with handled():
        child = os.fork()
        if not child:
            try:
                time.sleep(60)
            finally:
                os._exit(0)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_a_second_signal_is_not_waited_for_unless_it_is_the_first_passed_on():
    code = "import asd_hf.stopping as s, os, signal\nkill = lambda: os.kill(os.getpid(), signal.SIGTERM)\n"
    code += "with s.handled(), s.deferred():\n    kill(); kill(); print('one', flush=True); s.SAME = 0; kill()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM and done.stdout == "one\n"


def _ask(rank, folder, answers):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    vote = Vote(2)
    answers.put((rank, [vote(told=step == 2 and rank == 1) for step in range(5)]))
    dist.destroy_process_group()


def test_ranks_agree_one_step_later(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=_ask, args=(rank, tmp_path, answers)) for rank in range(2)]
    for process in processes:
        process.start()
    heard = dict(answers.get(timeout=60) for _ in processes)
    assert heard[0] == heard[1] == [False, False, False, True, False]
    assert [Vote(1)(told) for told in (False, True)] == [False, True]


def test_shard_leaves_no_half_shard(tmp_path, monkeypatch, capsys):
    write_coco(tmp_path / "coco", "train", tiny_rows(12))
    arguments = ["--data", str(tmp_path / "coco"), "--split", "train", "--output", str(tmp_path / "out")]
    write_table, calls = pq.ParquetWriter.write_table, []

    def stopped(self, *args):
        write_table(self, *args)
        calls.append(1)
        if len(calls) == 2:
            kill(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", stopped)
        assert run("shard", [*arguments, "--num-shards", "3"]) == 143
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("stopped by SIGTERM; started again, the command goes on with the shard that it was at")
    assert [path.name for path in (tmp_path / "out/data").iterdir()] == ["train-00000-of-00003.parquet"]
    assert run("shard", [*arguments, "--num-shards", "3"]) == 0
    assert len(json.loads((tmp_path / "out/manifest_train.json").read_text())["shards"]) == 3


def test_train_is_stopped_with_all_its_processes_and_goes_on(tmp_path):
    """As Ctrl-C and schedulers do, the signal goes to the loader's workers as well."""
    options = {"dataloader_num_workers": 2, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    options |= {"output_dir": str(tmp_path / "run"), "max_steps": 10_000}
    sections = configuration(write_places(tmp_path), teacher=None, **options)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sections))
    command = [sys.executable, "scripts/train.py", "--config", str(tmp_path / "run.yaml")]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    root = Path(__file__).parents[1]
    process = subprocess.Popen(command, cwd=root, env=environment, start_new_session=True, **streams)
    lines = [next(line for line in process.stdout if "'loss'" in line) for _ in range(2)]
    assert len(lines) == 2
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143 and "Traceback" not in errors, errors
    (checkpoint,) = all_checkpoints(tmp_path / "run")
    assert errors.splitlines()[-1] == (
        "stopped by SIGTERM; started again with training.resume_from_checkpoint=true, the command goes on from "
        f"{checkpoint}"
    )
