"""Alternatives measured in turn in one process, so that what else the machine does meets them alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TypeVar

import numpy as np

from ..progress import tqdm

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison; times are medians over the rounds, in milliseconds.

    Attributes:
        ratio: ours over the reference, the median of the rounds' ratios.
        ours_spread_ms, reference_spread_ms: from the first to the third quartile.
    """

    name: str
    ours_ms: float
    reference_ms: float
    ratio: float
    ours_spread_ms: float
    reference_spread_ms: float
    device: str

    @classmethod
    def of(cls, name: str, ours: Sequence[float], reference: Sequence[float], device: str, **more) -> Row:
        """From the seconds of each round; `more` are the fields of a subclass."""
        return cls(
            name=name,
            ours_ms=1e3 * median(ours),
            reference_ms=1e3 * median(reference),
            ratio=median(a / b for a, b in zip(ours, reference, strict=True)),
            ours_spread_ms=1e3 * spread(ours),
            reference_spread_ms=1e3 * spread(reference),
            device=device,
            **more,
        )


def take_turns(alternatives: Mapping[str, Callable[[], T]], rounds: int, warm_up: int = 1) -> dict[str, list[T]]:
    """What each alternative returns in each of `rounds`; they run one after the other, `warm_up` rounds unseen."""
    results: dict[str, list[T]] = {name: [] for name in alternatives}
    for number in tqdm(range(warm_up + rounds), desc="measure", unit="round", leave=False):
        for name, run in alternatives.items():
            result = run()
            if number >= warm_up:
                results[name].append(result)
    return results


def seconds(run: Callable[[], object]) -> float:
    """How long `run` takes, on the CPU."""
    start = perf_counter()
    run()
    return perf_counter() - start


def spread(values: Sequence[float]) -> float:
    """From the first to the third quartile."""
    low, high = np.percentile(values, [25, 75])
    return float(high - low)


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, which the terminal shows as well: the first column left, the others right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *others in (header, *rows):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
    lines.insert(1, "| " + " | ".join(["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]) + " |")
    return "\n".join(lines)


def write_rows(file: Path, rows: list[dict]) -> None:
    """As JSON."""
    file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
