"""How long a step of training takes, where its time goes, and on what; for the log and the model card."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from time import perf_counter

import torch
from transformers import TrainerCallback

from .phases import Stopwatch, phase

logger = logging.getLogger(__name__)

SLOW_DATA = 0.25  # of a step, from which waiting for data is worth a word


class Pace(TrainerCallback):
    """Times the steps between two entries of the log, without evaluations and checkpoints.

    `<what>_runtime` is in seconds a step, as Trainer's own names are. `step_runtime` and `data_runtime`, which is how
    long this process waited for batches, take the host's clock and no wait for the device. While the host runs ahead
    of a GPU, part of the latter costs nothing. With `phases` the device times all phases, "data" among them, which is
    then how long it waited itself.

    Args:
        phases: whether to measure all phases of the step and name the longest in the log.
    """

    def __init__(self, device: torch.device, phases: bool) -> None:
        self._watch = Stopwatch(device) if phases else None
        self._optimizing, self._begin, self._end = ExitStack(), None, 0.0
        self._seconds, self._waited, self._steps, self._entries = 0.0, 0.0, 0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what fetches the batches of a step, which begins with it."""
        start = perf_counter()
        if self._begin is None:
            self._begin = start
            if self._watch is not None:
                self._watch.__enter__()
        with phase("data"):
            yield
        self._waited += perf_counter() - start

    def on_pre_optimizer_step(self, *_, **__) -> None:
        self._optimizing.enter_context(phase("optimizer"))

    def on_optimizer_step(self, *_, **__) -> None:
        self._optimizing.close()

    def on_step_end(self, *_, **__) -> None:
        if self._watch is not None:
            self._watch.__exit__()
        self._end = perf_counter()
        self._seconds += self._end - self._begin
        self._steps, self._begin = self._steps + 1, None

    def read(self) -> dict[str, float]:
        """Seconds a step since the last call; called when the log has just waited for the device."""
        if not self._steps:
            return {}
        step = (self._seconds + perf_counter() - self._end) / self._steps
        runtimes = {"step": step, "data": self._waited / self._steps}
        if self._watch is not None:
            phases = {name: seconds / self._steps for name, seconds in self._watch.seconds.items()}
            phases["rest"] = step - sum(phases.values())
            runtimes |= phases
            self._watch.seconds.clear()
            order = sorted(phases, key=phases.get, reverse=True)
            shares = ", ".join(f"{name} {1e3 * phases[name]:.1f}" for name in order)
            logger.info("a step takes %.1f ms, %s most of all: %s", 1e3 * step, order[0], shares)
        elif self._entries == 1 and runtimes["data"] > SLOW_DATA * step:  # the first steps also start the workers
            logger.info(
                "%.0f%% of a step's %.0f ms wait for data: raise training.dataloader_num_workers",
                100 * runtimes["data"] / step,
                1e3 * step,
            )
        self._seconds, self._waited, self._steps, self._entries = 0.0, 0.0, 0, self._entries + 1
        return {f"{name.replace('/', '_').replace(' ', '_')}_runtime": value for name, value in runtimes.items()}


def seconds_of_steps(history: Sequence[dict], steps: int) -> float | None:
    """How long the steps of a training took, without evaluations and checkpoints, by the entries of its log.

    Those since the last entry are taken to be as long as the ones before; None if none were logged.
    """
    seconds, done, pace = 0.0, 0, None
    for entry in history:
        if "step_runtime" in entry:
            pace = entry["step_runtime"]
            seconds, done = seconds + pace * (entry["step"] - done), entry["step"]
    return None if pace is None else seconds + pace * (steps - done)
