"""Trains the runs of a comparison in processes side by side, each as soon as a place is free."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from time import monotonic

import torch

from ..errors import UserError
from ..progress import tqdm
from .plan import Plan
from .run import STEP_LINE, read_plan, write_plan

LOG = "log.txt"


def open_plans(plans: Sequence[Plan], output: Path, work: Path) -> list[Plan]:
    """The plans without a record.

    Raises:
        UserError: a record of a plan, or of its variant with another seed, or what lies in the plan's folder, is of
            another configuration.
    """
    missing = []
    for plan in plans:
        for file in sorted(plan.record(output).parent.glob(f"{plan.variant}_*.json")):
            record = json.loads(file.read_text(encoding="utf-8"))
            if record["method"] == plan.variant and (differs := _difference(_described(record), plan.described())):
                raise UserError(f"{file} was made with {differs}: take another --output, or move the record away")
        if plan.record(output).is_file():
            continue
        begun = read_plan(folder := plan.folder(work))
        if begun is not None and (differs := _difference(begun.described(), plan.described())):
            raise UserError(f"{folder} was trained with {differs}: take another --work, or remove that folder")
        missing.append(plan)
    return missing


def _described(record: dict) -> dict:
    """What `Plan.described` says, of the run of a record; options that are younger than it have their defaults."""
    plan = Plan(record["setting"], record["method"], record["seed"], record["minutes"], record["config"])
    return plan.described()


def _difference(old: dict, new: dict) -> str | None:
    """The first value that differs, as text; None if none does."""
    for section in new:
        ours, theirs = new[section], old.get(section)
        if not (isinstance(ours, dict) and isinstance(theirs, dict)):
            if ours != theirs:
                return f"{section} {theirs!r}, not {ours!r}"
            continue
        for key in sorted(ours.keys() | theirs.keys()):
            if _last_part(ours.get(key)) != _last_part(theirs.get(key)):
                return f"{section}.{key} {theirs.get(key)!r}, not {ours.get(key)!r}"
    return None


def _last_part(value):
    """Of what may be a path: records hold no more of those that existed."""
    if isinstance(value, dict):
        return {key: _last_part(item) for key, item in value.items()}
    return value.rpartition("/")[2] if isinstance(value, str) else value


class Schedule:
    """Runs plans, `jobs` at a time, each on a GPU of its own or on its share of the cores.

    Args:
        plans: in this order.
        output: folder of the records.
        work: folder of what the runs leave: models, checkpoints and `log.txt`.
        jobs: runs at a time.
    """

    def __init__(self, plans: Sequence[Plan], output: Path, work: Path, jobs: int) -> None:
        self.waiting, self.output, self.work, self.jobs = deque(plans), output, work, jobs
        self.failures: list[str] = []
        self.processes: set[subprocess.Popen] = set()
        self.lock = threading.Lock()
        self.stopped = False
        self.count, self.done = len(plans), 0

    def run(self) -> list[str]:
        """Returns when all runs have ended: which of them failed, and why; the others have their records."""
        with tqdm(total=self.count, desc="compare", unit="run", bar_format=_BAR) as self.bar:
            self.shares = [0.0] * self.jobs
            threads = [threading.Thread(target=self._place, args=(i,), daemon=True) for i in range(self.jobs)]
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    while thread.is_alive():
                        thread.join(0.5)
            except BaseException:
                self._stop()  # the runs are ended first
                raise
        return self.failures

    def _stop(self) -> None:
        with self.lock:
            self.stopped = True
            for process in self.processes:
                process.terminate()

    def _place(self, index: int) -> None:
        """Runs one plan after the other in place `index` of `jobs`."""
        while True:
            with self.lock:
                if self.stopped or not self.waiting:
                    return
                plan = self.waiting.popleft()
            try:
                self._run(plan, index)
            except OSError as error:  # a full disk, say: the other runs may still find a place
                self._fail(plan, str(error))

    def _run(self, plan: Plan, index: int) -> None:
        folder, record = plan.folder(self.work), plan.record(self.output)
        write_plan(plan, folder)
        command = [sys.executable, "-m", "asd_hf.compare.run", str(folder), str(record)]
        began = monotonic()
        with (folder / LOG).open("a", encoding="utf-8") as log:
            written = log.tell()
            with self.lock:
                if self.stopped:
                    return
                streams = {"stdout": subprocess.PIPE, "stderr": log, "text": True, "errors": "replace"}
                process = subprocess.Popen(command, env=self._environment(index), **streams)
                self.processes.add(process)
            for line in process.stdout:
                if line.startswith(STEP_LINE):
                    _, step, steps = line.split()
                    self._show(index, int(step) / int(steps))
                else:
                    log.write(line)
            code = process.wait()
        with self.lock:
            self.processes.discard(process)
            if self.stopped:
                return
            self.done += 1
        self._show(index, 0.0)
        minutes = (monotonic() - began) / 60
        if code or not record.is_file():
            with (folder / LOG).open(encoding="utf-8", errors="replace") as log:
                log.seek(written)
                lines = [line.strip() for line in log if line.strip()]
            errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            reason = errors[-1] if errors else f"exit code {code}: {lines[-1] if lines else 'no message'}"
            self._fail(plan, f"{reason} ({folder / LOG})")
        else:
            ap = json.loads(record.read_text(encoding="utf-8"))["metrics"]["AP"]
            self.bar.write(f"{plan.setting}/{plan.name}: AP {100 * ap:.1f} ({minutes:.1f} min)")

    def _fail(self, plan: Plan, reason: str) -> None:
        self.failures.append(f"{plan.setting}/{plan.name}: {reason}")
        self.bar.write(f"{plan.setting}/{plan.name} failed: {reason}")

    def _show(self, index: int, share: float) -> None:
        with self.lock:
            self.shares[index] = share
            self.bar.n = round(self.done + sum(self.shares), 2)
            self.bar.refresh()

    def _environment(self, index: int) -> dict[str, str]:
        environment = dict(os.environ)
        if gpus := torch.cuda.device_count():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
            environment["CUDA_VISIBLE_DEVICES"] = visible[index % gpus]
        else:
            environment["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // self.jobs))
        return environment


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} runs [{elapsed}<{remaining}]"
