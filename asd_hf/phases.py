"""Where the time of a step goes: `with phase(...)` marks its parts, `Stopwatch` measures them."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

import torch


class Stopwatch:
    """Adds up the seconds of each phase during a `with` block; the time of an inner phase is not its outer one's.

    On a GPU the device notes when it comes to either end of a phase, and the host does not wait for it: a phase also
    has the time in which the device waits for the host.

    Args:
        clock: gives the seconds of work on a CPU; by default those of the wall.
    """

    active: Stopwatch | None = None

    def __init__(self, device: torch.device, clock: Callable[[], float] | None = None) -> None:
        self.device, self._open = device, []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._laps: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()  # not added up yet
        self._clock = clock or perf_counter

    def __enter__(self) -> Stopwatch:
        Stopwatch.active = self
        return self

    def __exit__(self, *_) -> None:
        Stopwatch.active = None
        self._add_up(wait=False)

    @property
    def seconds(self) -> defaultdict[str, float]:
        """By the phase, "outer/inner" for one within another; waits for the device."""
        self._add_up(wait=True)
        return self._seconds

    def _lap(self) -> None:
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record(torch.cuda.current_stream(self.device))
            if self._open:
                self._laps.append(("/".join(self._open), self._last, now))
        else:
            now = self._clock()
            if self._open:
                self._seconds["/".join(self._open)] += now - self._last
        self._last = now

    def _add_up(self, wait: bool) -> None:
        """Of the laps those that the device has run, or all."""
        while self._laps:
            name, start, end = self._laps[0]
            if wait:
                end.synchronize()
            elif not end.query():
                return
            self._seconds[name] += start.elapsed_time(end) / 1e3
            self._laps.popleft()


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
