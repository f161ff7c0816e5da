"""Several ranks, each a process: on two machines, with little data, when one ends; and builds that are killed."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from safetensors.torch import load_file

from asd_hf.checkpoints import all_checkpoints, read_manifest
from asd_hf.commands import run
from asd_hf.config import build_config
from asd_hf.data import open_source, shard_dataset
from asd_hf.errors import UserError
from asd_hf.ranks import require_shared
from tests.tiny_data import tiny_rows, write_coco
from tests.tiny_run import configuration, write_places

ROOT = Path(__file__).parents[1]
MACHINES = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/two_machines.yaml"]
LENGTHS = (1, 14, 3)  # rows of the shards, which four readers share


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Uneven shards, fewer than readers; one image to evaluate on, less than ranks; a configuration."""
    root = write_places(tmp_path_factory.mktemp("world"))
    write_coco(root / "source", "train", tiny_rows(sum(LENGTHS)))
    write_coco(root / "source", "val", tiny_rows(1))
    shards = root / "shards"
    for split in ("train", "val"):
        shard_dataset(open_source(str(root / "source"), split), split, shards, 1, progress=False)
    whole = shards / "data/train-00000-of-00001.parquet"
    table, first = pq.read_table(whole), 0
    for index, length in enumerate(LENGTHS):
        pq.write_table(table.slice(first, length), shards / f"data/train-{index:05d}-of-00003.parquet")
        first += length
    for file in (whole, shards / "manifest_train.json"):
        file.unlink()
    options = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2, "dataloader_num_workers": 2}
    options |= {"per_device_train_batch_size": 2, "eval_strategy": "epoch", "save_steps": 1, "ema_decay": 0.9}
    options |= {"disable_tqdm": True, "report_to": "none", "ddp_timeout": 20}
    sections = configuration(root, student={"frozen_batch_norm": False}, data={"source": str(shards)}, **options)
    (root / "run.yaml").write_text(yaml.safe_dump(sections))
    return root


def on_ranks(script: str, *arguments: object) -> dict:
    """What a script of `FORK` and `script` has left in `told`."""
    command = [sys.executable, "-c", FORK + script + "\nprint(json.dumps(told))", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


# Processes forked of one that has imported all.
FORK = """
import hashlib, json, os, shutil, signal, socket, sys, time
from multiprocessing import get_context
from pathlib import Path
from asd_hf.commands import run
from asd_hf.commands import cache, shard, train
from asd_hf.trainer import DistillationTrainer

told, context = {}, get_context("fork")

def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

def fork(log, command, arguments, rank=0, world=1, port=0, before=None):
    def main():
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if world > 1:
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": world}
            place |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
            os.environ.update({name: str(value) for name, value in place.items()})
        if before is not None:
            before()
        code = run(command, arguments)
        sys.stderr.flush()
        os._exit(code)

    process = context.Process(target=main)
    process.start()
    return process
"""

RANKS = """
root, config = Path(sys.argv[1]), sys.argv[2]
training_step = DistillationTrainer.training_step

def dies(how):
    def step(self, *args, **kwargs):
        if self.state.global_step == 1 and how:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "hangs":
                time.sleep(600)
            raise ValueError("a mistake of one rank")
        return training_step(self, *args, **kwargs)

    DistillationTrainer.training_step = step

def tells():
    evaluate = DistillationTrainer.evaluate_adapter

    def telling(self, adapter, *args):
        weights = b"".join(value.numpy().tobytes() for value in adapter.model.state_dict().values())
        print("evaluated", hashlib.sha256(weights).hexdigest(), flush=True)
        return evaluate(self, adapter, *args)

    DistillationTrainer.evaluate_adapter = telling

def before(rank, how):
    tells()
    if rank == 1:
        dies(how)

for how in ("", "killed", "fails", "hangs"):
    logs, port = [root / f"{how}{rank}.log" for rank in range(2)], free_port()
    arguments = ["--config", config, f"training.output_dir={root / how / 'out'}"]
    ranks = [
        fork(logs[rank], "train", arguments, rank, 2, port, lambda rank=rank: before(rank, how)) for rank in range(2)
    ]
    ranks[0].join(120)
    told[how] = {"code": ranks[0].exitcode}
    for process in ranks:
        process.join(0 if how else 60)
        process.kill()
        process.join()
    told[how] |= {"other": ranks[1].exitcode, "log": logs[0].read_text(), "other log": logs[1].read_text()}
shutil.copytree(root / "killed", root / "alone")
arguments = ["--config", config, f"training.output_dir={root / 'alone/out'}"]
alone = fork(root / "alone.log", "train", [*arguments, "training.resume_from_checkpoint=true"])
alone.join()
told["alone"] = {"code": alone.exitcode, "log": (root / "alone.log").read_text()}
"""


@pytest.fixture(scope="module")
def ranks(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    return root, on_ranks(RANKS, root, world / "run.yaml")


@pytest.mark.parametrize("how", ["killed", "fails", "hangs"])
def test_when_a_rank_ends_or_hangs_the_others_say_so_and_end(ranks, how):
    root, told = ranks
    log = told[how]["log"]
    assert told[how]["code"] == 2 and "Traceback" not in log, log
    before, reason, after = re.split(r" \((.*)\): ", log.splitlines()[-1])
    assert before == "error: another rank has ended, or has not answered within training.ddp_timeout"
    assert after.endswith("a training goes on from its newest checkpoint with training.resume_from_checkpoint=true")
    if how != "fails":  # its loader workers may hold the connection until the others have waited long enough
        assert ("by peer" in reason) is (how == "killed")
    (checkpoint,) = all_checkpoints(root / how / "out")
    assert read_manifest(checkpoint)["step"] == 1


def test_all_ranks_evaluate_the_same_weights(ranks):
    """Running statistics of batch normalisation among them, of the student and of its moving average."""
    logs = [ranks[1][""][key].splitlines() for key in ("log", "other log")]
    weights = [[line for line in log if line.startswith("evaluated")] for log in logs]
    assert weights[0] == weights[1] and len(set(weights[0])) == 5  # two epochs, of two models each, and the teacher


def test_a_run_goes_on_with_another_number_of_ranks(ranks):
    root, told = ranks
    assert told["alone"]["code"] == 0, told["alone"]["log"]
    assert "images come in another order than they would have: ranks was 2, is 1" in told["alone"]["log"]
    assert all_checkpoints(root / "alone/out") and (root / "alone/out/metrics.json").is_file()


def test_two_machines_are_one_with_as_many_ranks(world, ranks, tmp_path):
    """The recipe as it is, but for CPUs: each machine has its launcher, and they find each other by the address."""
    root, told = ranks
    assert told[""]["code"] == told[""]["other"] == 0, told[""]["log"]
    machines, port = [], free_port()
    for rank in range(2):
        here = ["--machine_rank", rank, "--main_process_ip", "127.0.0.1", "--main_process_port", port]
        there = [*here, "--num_processes", 2, "--mixed_precision", "no", "scripts/train.py"]
        arguments = [*MACHINES, *there, "--config", world / "run.yaml", f"training.output_dir={tmp_path / 'out'}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        machines.append(subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, **streams))
    said = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(said)
    assert "student, metrics.json" in said[0] and "student, metrics.json" not in said[1]
    for name in ("model.safetensors", "ema/model.safetensors", "_method.safetensors"):
        one, two = (load_file(folder / name) for folder in (root / "out", tmp_path / "out"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    state = json.loads((all_checkpoints(tmp_path / "out")[-1] / "trainer_state.json").read_text())
    assert state["global_step"] == 4 and state["epoch"] == 2  # of 18 rows four readers have two batches each
    assert json.loads((tmp_path / "out/metrics.json").read_text())["protocol"]["num_images"] == 1


def on_rank(rank: int, folder: Path, answers) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    require_shared(folder / "shared")
    try:
        require_shared(folder / f"machine{rank}")
    except UserError as error:
        answers.append(str(error))
    dist.destroy_process_group()


def test_ranks_that_do_not_share_the_output_folder_stop(tmp_path):
    require_shared(tmp_path / "alone")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run cannot be written: \[Errno 20\] Not a directory"):
        require_shared(tmp_path / "file/run")
    with mp.Manager() as manager:
        answers = manager.list()
        mp.start_processes(on_rank, (tmp_path, answers), nprocs=2, start_method="fork")
        lines = [f"rank 1 does not see what rank 0 writes to {tmp_path / f'machine{rank}'}: " for rank in range(2)]
        assert sorted(answers) == [
            line + "training.output_dir must be a folder that all machines share" for line in lines
        ]
    assert not list((tmp_path / "shared").iterdir()) and not list((tmp_path / "alone").iterdir())


def test_more_readers_than_rows_are_refused(world, capsys):
    small = [f"training.output_dir={world / 'small'}", "training.dataloader_num_workers=10"]
    assert run("train", ["--config", str(world / "run.yaml"), *small]) == 2
    assert "18 rows are less than one batch of 2 for each of 1 ranks x 10 loader workers" in capsys.readouterr().err


# -- what is refused before anything is loaded ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "options", "message"),
    [
        ("ACCELERATE_USE_FSDP", {}, "FSDP is not supported"),
        ("ACCELERATE_USE_DEEPSPEED", {}, "DeepSpeed is not supported"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", {}, "N-d parallelism is not supported"),
        (None, {"fsdp": "full_shard"}, "FSDP is not supported"),
        (None, {"deepspeed": "zero.json"}, "DeepSpeed is not supported"),
        (None, {"save_on_each_node": True}, "training.save_on_each_node must be false"),
    ],
)
def test_ways_to_use_many_gpus_that_are_not_ours(monkeypatch, variable, options, message):
    if variable is not None:
        monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=message):
        build_config({"training": {"use_cpu": True} | options})


# -- builds that are killed -------------------------------------------------------------------------------------------

BUILDS = """
from asd_hf.teacher_cache import write
write.LEAST_IMAGES = 5

def dies(number):
    replace, calls = Path.replace, []

    def replaced(self, target):
        calls.append(target)
        if len(calls) == number and self.suffix == ".part":
            os.truncate(self, self.stat().st_size // 2)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    Path.replace = replaced

root, commands = Path(sys.argv[1]), json.loads(sys.argv[2])
for name, arguments in commands.items():
    kills, number, killed = 0, 0, True
    whole = fork(root / f"{name}.log", name, [*arguments, "--output", str(root / name / "whole")])
    whole.join()
    while killed:
        number += 3  # files that this start finishes before it is killed, and one
        log, output = root / f"{name}{number}.log", str(root / name / "killed")
        process = fork(log, name, [*arguments, "--output", output], before=lambda: dies(number))
        process.join()
        killed = process.exitcode == -signal.SIGKILL
        kills += killed
    told[name] = {"kills": kills, "codes": [whole.exitcode, process.exitcode], "log": log.read_text()}
port, arguments = free_port(), [*commands["cache"], "--output", str(root / "cache/two")]
ranks = [fork(root / f"cache{rank}.log", "cache", arguments, rank, 2, port) for rank in range(2)]
for process in ranks:
    process.join()
told["two"] = {"codes": [process.exitcode for process in ranks], "log": (root / "cache0.log").read_text()}
"""


@pytest.fixture(scope="module")
def builds(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("builds")
    data = {"source": str(world / "source"), "resize": "fixed", "fixed_size": [96, 96], "augmentation": "flip"}
    sections = configuration(world, data=data) | {"method": {"name": "balanced_pairs", "trust": 0.0}}
    (root / "run.yaml").write_text(yaml.safe_dump(sections))
    shard = ["--data", str(world / "source"), "--split", "train", "--num-shards", "5"]
    return root, on_ranks(BUILDS, root, json.dumps({"shard": shard, "cache": ["--config", str(root / "run.yaml")]}))


def same_files(one, two):
    one, two = ({p.relative_to(d): p.read_bytes() for p in d.rglob("*") if p.is_file()} for d in (one, two))
    assert len(one) > 5 and one.keys() == two.keys()
    assert not [str(file) for file in one if one[file] != two[file]]


@pytest.mark.parametrize("name", ["shard", "cache"])
def test_a_killed_build_ends_as_an_unbroken_one(builds, name):
    root, told = builds
    assert told[name]["codes"] == [0, 0] and told[name]["kills"] >= 2, told[name]["log"]
    same_files(root / name / "whole", root / name / "killed")


def test_two_ranks_write_the_predictions_that_one_writes(builds):
    root, told = builds
    assert told["two"]["codes"] == [0, 0], told["two"]["log"]
    same_files(root / "cache/whole", root / "cache/two")
