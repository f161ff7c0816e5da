"""Kills trainings at random moments, starts them again, and compares what they leave with the unbroken one."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import socket
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from time import monotonic, sleep

import torch
from safetensors.torch import load_file
from transformers.trainer_pt_utils import safe_globals

from .checkpoints import MANIFEST, PARTIAL
from .errors import UserError
from .progress import tqdm
from .trainer import DistillationTrainer

# Tiny, and with all that makes a resumed run differ where it is done carelessly: rows shuffled in a buffer by two
# workers, random augmentation and dropout, accumulated gradients, bf16, a moving average, a method with parameters of
# its own, and neither the log nor the evaluations in step with the checkpoints.
SECTIONS = {
    "model": {
        "teacher": "shapes",
        "student": {
            "base": "teacher",
            "d_model": 32,
            "decoder_layers": 2,
            "num_queries": 12,
            "config": {
                "dropout": 0.1,
                "encoder_ffn_dim": 32,
                "decoder_ffn_dim": 32,
                "backbone_config": {
                    "model_type": "resnet",
                    "layer_type": "basic",
                    "embedding_size": 8,
                    "hidden_sizes": [8, 16, 16, 32],
                    "depths": [1, 1, 1, 1],
                    "out_features": ["stage2", "stage3", "stage4"],
                },
            },
            "frozen_batch_norm": False,
        },
    },
    "data": {
        "source": "shapes?num_train=48&num_val=12&image_size=64",
        "train_sizes": [48, 64],
        "eval_size": 64,
        "max_size": 96,
        "shuffle_buffer": 8,
    },
    "method": {"name": "asd", "layers": 1, "hidden_dim": 16, "key_dim": 16, "ramp_steps": 10},
    "training": {
        "use_cpu": True,
        "bf16": True,
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "dataloader_num_workers": 2,
        "learning_rate": 1e-3,
        "ema_decay": 0.9,
        "eval_strategy": "epoch",
        "save_steps": 2,
        "logging_steps": 5,
    },
}
KILLS_A_RUN = 6
POLL = 0.002  # seconds between two looks at what a run is doing
GRACE = 60  # seconds in which ranks must end when another was killed
_TIMES = ("runtime", "per_second", "ms_per_image")  # parts of the names of what differs from run to run


class Doing(IntEnum):
    START = 0
    STEP = 1
    SAVE = 2
    EVALUATION = 3
    END = 4  # the final numbers and files


@dataclass
class Result:
    """Of `survive_kills`.

    Attributes:
        kills: how many by what the run was doing.
        alone: kills of one rank of several, after which the others have ended by themselves.
        half_written: kills that left a part of a checkpoint behind.
        runs: that were killed, started again and ended.
        unbroken: seconds of the run that was not killed.
        differences: what differs from the unbroken run, as text; empty if nothing does.
    """

    kills: Counter = field(default_factory=Counter)
    alone: int = 0
    half_written: int = 0
    runs: int = 0
    unbroken: float = 0.0
    differences: list[str] = field(default_factory=list)


def survive_kills(
    train: Callable[[dict], None], sections: dict, kills: int, seed: int, work: Path, ranks: int = 1
) -> Result:
    """Trains once unbroken, then again and again under SIGKILL, each run to its end.

    Of several ranks either all are killed at once, or one alone, and the others must end by themselves.

    Args:
        train: runs a configuration; it is called in processes of their own.
        sections: the configuration; output folder and resuming are set here.
        kills: in all, at most `KILLS_A_RUN` in one run.
        seed: of the moments.
        work: folder of all that the runs leave.
        ranks: of each run, on this machine.

    Raises:
        UserError: a run failed by itself, or a rank went on for `GRACE` seconds when another was killed.
    """
    result, rng = Result(), random.Random(seed)
    unbroken, clock = _Run(train, sections, work / "unbroken", ranks), Counter()
    began = monotonic()
    unbroken.start()
    while unbroken.is_alive():
        clock[unbroken.doing] += POLL
        sleep(POLL)
    unbroken.join()
    result.unbroken = monotonic() - began
    steps = max(1, len(unbroken.order()))
    with tqdm(total=kills, desc="selftest/resume", unit="kill") as bar:
        while sum(result.kills.values()) < kills:
            run = _Run(train, sections, work / f"killed_{result.runs}", ranks)
            for _ in range(min(KILLS_A_RUN, kills - sum(result.kills.values()))):
                run.start()
                victim = rng.choice([None, *range(ranks)]) if ranks > 1 else None
                doing = run.kill(rng, result.unbroken, clock, steps, victim)
                if doing is None:
                    break
                result.kills[doing] += 1
                result.alone += victim is not None
                result.half_written += doing == Doing.SAVE and any((run.folder / PARTIAL).glob("*"))
                bar.update()
            else:
                run.start()
            run.join()
            result.runs += 1
            result.differences += [f"run {run.folder.name}: {line}" for line in differences(unbroken, run)]
    return result


class _Run:
    """A training in `folder`, of one process a rank, started again and again."""

    def __init__(self, train: Callable[[dict], None], sections: dict, folder: Path, ranks: int) -> None:
        self.train, self.folder, self.ranks, self.starts = train, folder, ranks, 0
        self.sections = deepcopy(sections)
        settings = {
            "output_dir": str(folder),
            "resume_from_checkpoint": True,
            "disable_tqdm": True,
            "report_to": "none",
        }
        self.sections.setdefault("training", {}).update(settings)
        self.log, self.images = (folder.with_name(f"{folder.name}.{name}") for name in ("log", "images"))
        self.processes: list[multiprocessing.Process] = []
        # Forked: what this process has imported need not be imported at each start. It must not have evaluated
        # anything: the threads of hotcoco do not live on in a fork.
        self.context = multiprocessing.get_context("fork")
        self._doing = self.context.RawValue("i", Doing.START)

    @property
    def doing(self) -> Doing:
        return Doing(self._doing.value)

    def start(self) -> None:
        self.starts += 1
        self._doing.value = Doing.START
        port = _free_port()
        self.processes = [self.context.Process(target=self._main, args=(rank, port)) for rank in range(self.ranks)]
        for process in self.processes:
            process.start()

    def _main(self, rank: int, port: int) -> None:
        with self.log.open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        if self.ranks > 1:  # what a launcher tells
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks, "LOCAL_WORLD_SIZE": self.ranks}
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in (ranks | place).items()})
        _watch(None if rank else self._doing, self.images, self.starts, rank)
        try:
            self.train(self.sections)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    def is_alive(self) -> bool:
        """Whether all of its processes are."""
        return all(process.is_alive() for process in self.processes)

    def kill(self, rng: random.Random, seconds: float, clock: Counter, steps: int, victim: int | None) -> Doing | None:
        """Sends SIGKILL at a random moment of a training, of a save or of an evaluation; None if it ended before.

        Args:
            victim: the rank that is killed alone; all of them by default.
        """
        aim = rng.choice([None, Doing.SAVE, Doing.EVALUATION])
        if aim is not None:
            for _ in range(rng.randint(1, 3)):  # occurrences
                self._wait(lambda: self.doing != aim)
                self._wait(lambda: self.doing == aim)
            seconds = 2 * clock[aim] / steps
        end = monotonic() + rng.uniform(0, seconds)
        self._wait(lambda: monotonic() >= end)
        if not self.is_alive():
            return None
        for process in self.processes if victim is None else [self.processes[victim]]:
            process.kill()
        end = monotonic() + GRACE
        for rank, process in enumerate(self.processes):
            process.join(max(0, end - monotonic()))
            if process.is_alive():
                self._end()
                raise UserError(f"rank {rank} went on for {GRACE} s when rank {victim} was killed ({self.log})")
        return self.doing if any(process.exitcode for process in self.processes) else None

    def _wait(self, condition: Callable[[], bool]) -> None:
        while self.is_alive() and not condition():
            sleep(POLL)

    def _end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def join(self) -> None:
        for process in self.processes:
            process.join()
        if any(process.exitcode for process in self.processes):
            lines = self.log.read_text(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "no message")
            raise UserError(f"a run failed by itself: {last.strip()} ({self.log})")

    def order(self) -> dict[int, list]:
        """The ids of the images of each step and rank, as it was trained last."""
        steps = {}
        for line in self.images.read_text().splitlines():
            start, step, rank, ids = json.loads(line)
            if step not in steps or steps[step][0] != start:
                steps[step] = (start, [[] for _ in range(self.ranks)])
            steps[step][1][rank].append(ids)
        return {step: ids for step, (_, ids) in steps.items()}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _watch(doing, images: Path, start: int, rank: int) -> None:
    """Makes the trainer of this process tell which images it trains on, and what it is doing if `doing` is given."""

    def during(name: str, now: Doing, after: Doing) -> None:
        method = getattr(DistillationTrainer, name)

        def told(self, *args, **kwargs):
            doing.value = now
            try:
                return method(self, *args, **kwargs)
            finally:
                doing.value = after

        setattr(DistillationTrainer, name, told)

    if doing is not None:
        during("_save_checkpoint", Doing.SAVE, Doing.STEP)
        during("evaluation_loop", Doing.EVALUATION, Doing.STEP)
        during("_run_epoch", Doing.STEP, Doing.STEP)
        during("_finalize_training", Doing.END, Doing.END)
    training_step = DistillationTrainer.training_step

    def listed(self, model, inputs, *args, **kwargs):
        with images.open("a") as file:
            ids = [int(label["image_id"]) for label in inputs["labels"]]
            file.write(json.dumps([start, self.state.global_step, rank, ids]) + "\n")
        return training_step(self, model, inputs, *args, **kwargs)

    DistillationTrainer.training_step = listed


def differences(one: _Run, two: _Run) -> Iterator[str]:
    """What two runs have left otherwise, but for times and the names of their folders."""
    if one.order() != two.order():
        yield "the images were trained on in another order"
    files = [{path.relative_to(run.folder) for path in run.folder.rglob("*") if path.is_file()} for run in (one, two)]
    for name in sorted(files[0] ^ files[1]):
        yield f"{name} is there once only"
    for name in sorted(files[0] & files[1]):
        if name.name == "README.md":  # it shows times, of metrics.json
            continue
        contents = [dict(_flat(_read(run.folder, run.folder / name))) for run in (one, two)]
        names = [key for key in sorted({*contents[0], *contents[1]}) if not _same(*(c.get(key) for c in contents))]
        if names:
            yield f"{name}: {len(names)} of {len(contents[0])} values differ, as {names[0] or 'all of it'}"


def _read(folder: Path, file: Path):
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix in (".pt", ".pth"):
        with safe_globals():
            return torch.load(file, weights_only=True)
    text = file.read_text(encoding="utf-8").replace(str(folder), "")
    if file.name == MANIFEST:  # the sums are those of files that hold times
        return {key: value for key, value in json.loads(text).items() if key != "files"}
    return json.loads(text) if file.suffix == ".json" else text


def _flat(value, name: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict | list | tuple) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            if not any(part in str(key) for part in _TIMES):
                yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _same(one, two) -> bool:
    """Equal bit by bit: NaN is NaN."""
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        if one.shape != two.shape or one.dtype != two.dtype:
            return False
        return torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (one, two)))
    return type(one) is type(two) and repr(one) == repr(two)
