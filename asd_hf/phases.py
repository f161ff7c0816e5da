"""Where the time of a step goes: `with phase(...)` marks its parts, `Stopwatch` measures them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

import torch


class Stopwatch:
    """Adds up the seconds of each phase during a `with` block; the time of an inner phase is not its outer one's.

    The device is waited for at both ends of every phase, so a measured step is slower than one that is not.

    Args:
        clock: gives the seconds; by default those of the wall.

    Attributes:
        seconds: by the phase, "outer/inner" for one within another.
    """

    active: Stopwatch | None = None

    def __init__(self, device: torch.device, clock: Callable[[], float] | None = None) -> None:
        self.device, self.seconds, self._open = device, defaultdict(float), []
        self._clock = clock or perf_counter

    def __enter__(self) -> Stopwatch:
        Stopwatch.active = self
        return self

    def __exit__(self, *_) -> None:
        Stopwatch.active = None

    def _lap(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = self._clock()
        if self._open:
            self.seconds["/".join(self._open)] += now - self._last
        self._last = now


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Marks a part of the step; costs nothing but this call while nobody measures."""
    watch = Stopwatch.active
    if watch is None:
        yield
        return
    watch._lap()
    watch._open.append(name)
    try:
        yield
    finally:
        watch._lap()
        watch._open.pop()
