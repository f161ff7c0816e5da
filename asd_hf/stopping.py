"""SIGTERM and SIGINT end a command in order: at once, or where it says so at the next good moment."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME = 3  # seconds in which a second signal is the first one, which a launcher passes on to those who got it already


class Stopped(BaseException):
    """The process was told to end. No Exception: what goes on after a failure must not go on after this.

    Attributes:
        number: the signal's.
        advice: how to go on.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number, self.advice = number, "nothing was written"


_pid: int | None = None  # of the process whose signals are handled
_deferred = False
_number: int | None = None  # the signal that came
_since = 0.0  # when


@contextmanager
def handled() -> Iterator[None]:
    """Within, the first of `SIGNALS` raises `Stopped`; a later one ends the process. For the main thread alone."""
    global _pid, _number
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _pid, _number = os.getpid(), None
    before = [signal.signal(number, _handle) for number in SIGNALS]
    try:
        yield
    finally:
        _number = None
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


def _handle(number: int, frame) -> None:
    global _number, _since
    again = _number is not None
    if again and monotonic() - _since < SAME:
        return
    if again or os.getpid() != _pid:  # a forked child has inherited this handler and is none of its business
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    _number, _since = number, monotonic()
    if not _deferred:
        raise Stopped(number)


@contextmanager
def advise(advice: Callable[[], str]) -> Iterator[None]:
    """Gives what stops the block the advice that holds then."""
    try:
        yield
    except Stopped as stopped:
        stopped.advice = advice()
        raise


def requested() -> bool:
    """Whether a signal came."""
    return _number is not None


def stop() -> Stopped:
    """What to raise once the good moment has come."""
    return Stopped(signal.SIGTERM if _number is None else _number)  # None: another rank was told


@contextmanager
def deferred(defer: bool = True) -> Iterator[None]:
    """Within, a signal is only noted, see `requested`; with `defer=False` it raises within such a block as well."""
    global _deferred
    before, _deferred = _deferred, defer
    try:
        if requested() and not defer:
            raise stop()
        yield
    finally:
        _deferred = before
    if requested() and not before:
        raise stop()
