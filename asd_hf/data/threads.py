"""Images are decoded by threads: decoders leave Python's lock."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = 8  # at most: what is between the decoders does not leave the lock


def default_threads() -> int:
    """One for each CPU, at most `THREADS`."""
    return min(THREADS, os.cpu_count() or 1)


def ahead(pool: Executor, work: Callable[[Item], Result], items: Iterable[Item], count: int) -> Iterator[Result]:
    """`map(work, items)` by the threads of `pool`, at most `count` items ahead."""
    items = iter(items)
    pending = deque(pool.submit(work, item) for item in islice(items, count))
    while pending:
        yield pending.popleft().result()
        pending.extend(pool.submit(work, item) for item in islice(items, 1))
