"""What a comparison found, as a table: AP with its spread, differences with their intervals, verdicts, costs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np

from ..config import NO_METHOD
from .records import curve, ranked, teachers
from .verdict import UNDECIDED, Difference, NotComparable, common_seeds, paired_difference

DIFFERENCE, IMAGES_ALONE, VERDICT, AFTER = "difference", "over images alone", "verdict", "baseline's AP after"
SIZES = ("AP50", "APs", "APm", "APl")
COSTS = {"steps": "steps", "s/run": "seconds", "ms/step": "ms_per_step", "memory, MiB": "peak_memory_mib"}
HEADER = ["method", "seeds", "AP", *SIZES, DIFFERENCE, IMAGES_ALONE, VERDICT, AFTER, *COSTS]
NOTHING = "-"


def table(runs: Sequence[dict], baseline: str = NO_METHOD) -> list[list[str]]:
    """The records of one setting as cells under `HEADER`, the teachers first, then the methods as `ranked`.

    Numbers are means over the seeds of a method, AP in 0..100 with the sample standard deviation over seeds. The
    differences are over the seeds in common with the baseline; without a baseline they are "-". Runs that cannot be
    paired, see `paired_difference`, have the reason as verdict.
    """
    methods = ranked(runs, baseline)
    rows = [HEADER]
    for name, ap in teachers(runs).items():
        rows.append([name, NOTHING, f"{100 * ap:.1f}", *[NOTHING] * (len(HEADER) - 3)])
    for name, own in methods.items():
        aps = [100 * run["metrics"]["AP"] for run in own]
        spread = f" ± {stdev(aps):.1f}" if len(aps) > 1 else ""
        sizes = [fmean(run["metrics"][size] for run in own) for size in SIZES]
        costs = [fmean(run[key] for run in own) for key in COSTS.values()]
        rows.append(
            [
                name,
                str(len(own)),
                f"{fmean(aps):.1f}{spread}",
                *(NOTHING if size < 0 else f"{100 * size:.1f}" for size in sizes),
                *_against(own, [] if name == baseline else methods.get(baseline, [])),
                _after(own, methods.get(baseline, [])),
                *(
                    f"{cost:,.1f}" if key == "ms/step" else f"{cost:,.0f}"
                    for key, cost in zip(COSTS, costs, strict=True)
                ),
            ]
        )
    return rows


def _against(runs: Sequence[dict], baseline_runs: Sequence[dict]) -> tuple[str, str, str]:
    """The cells of `DIFFERENCE`, `IMAGES_ALONE` and `VERDICT`."""
    if not common_seeds(runs, baseline_runs):
        return NOTHING, NOTHING, NOTHING
    try:
        difference = paired_difference(runs, baseline_runs)
    except NotComparable as error:
        return NOTHING, NOTHING, f"not comparable: {error}"
    shown = f"{100 * difference.mean:+.1f}"
    if difference.seeds > 1:
        shown += f" {_interval(difference.interval)}"
    if difference.seeds < max(len(runs), len(baseline_runs)):
        shown += f" ({difference.seeds} seed{'s' * (difference.seeds > 1)})"
    return shown, _interval(difference.image_interval), _verdict(difference)


def _interval(bounds: tuple[float, float]) -> str:
    low, high = bounds
    return f"[{100 * low:+.1f}, {100 * high:+.1f}]"


def _verdict(difference: Difference) -> str:
    verdict, needed = difference.verdict(), difference.needed()
    if verdict != UNDECIDED:
        return verdict
    if difference.seeds == 1:
        return f"{UNDECIDED}: one seed"
    if needed is None:
        return UNDECIDED
    what = [f"{count:,} {unit}" for unit, count in needed._asdict().items() if count is not None]
    return f"{UNDECIDED}: {' and '.join(what)}"


def _after(runs: Sequence[dict], baseline_runs: Sequence[dict]) -> str:
    share = time_to(runs, baseline_runs)
    return NOTHING if share is None else f"{100 * share.time:.0f} % of its time"


class Share(NamedTuple):
    """Of the baseline's training: seconds and steps."""

    time: float
    steps: float


def time_to(runs: Sequence[dict], baseline_runs: Sequence[dict]) -> Share | None:
    """After which share of the baseline's training a method first has the AP that the baseline has at its end.

    By the curves' means over the seeds in common, linear between evaluations. A method that has it at its first
    evaluation is given the time of that.

    Args:
        runs: records of one method.
        baseline_runs: records of the baseline.

    Returns:
        None if it never has it, or if there is no such seed or no evaluation.
    """
    seeds = common_seeds(runs, baseline_runs)
    own, base = (curve([run for run in side if run["seed"] in seeds]) for side in (runs, baseline_runs))
    if own is None or base is None:
        return None
    ap, goal = own.ap.mean(0), base.ap.mean(0)[-1]
    reached = np.flatnonzero(ap >= goal)
    if not reached.size:
        return None
    step = slice(max(0, reached[0] - 1), reached[0] + 1)  # from the last evaluation below to the first that is not
    seconds, steps = (float(np.interp(goal, ap[step], axis[step])) for axis in (own.seconds, own.steps))
    return Share(seconds / float(base.seconds[-1]), steps / float(base.steps[-1]))


def to_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the header first, as an aligned GitHub table; columns of numbers are aligned to the right."""
    header, *body = [[_escaped(cell) for cell in row] for row in rows]
    columns = list(zip(header, *body, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    numbers = [all(re.match(r"[-+\[\d]", cell) for cell in column[1:]) for column in columns]
    dashes = ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, numbers, strict=True)]
    lines = []
    for row in (header, dashes, *body):
        cells = zip(row, widths, numbers, strict=True)
        lines.append(f"| {' | '.join(c.rjust(width) if right else c.ljust(width) for c, width, right in cells)} |")
    return "\n".join(lines)


def fitted(rows: Sequence[Sequence[str]], width: int) -> str:
    """As `to_markdown`; what is wider than `width` goes into further tables below, each with the first column."""
    first, *others = (max(3, *map(len, column)) + 3 for column in zip(*rows, strict=True))
    groups, used = [[0]], first + 1
    for column, wide in enumerate(others, start=1):
        if used + wide > width and len(groups[-1]) > 1:
            groups.append([0])
            used = first + 1
        groups[-1].append(column)
        used += wide
    return "\n\n".join(to_markdown([[row[column] for column in group] for row in rows]) for group in groups)


def _escaped(text: str) -> str:
    """So that it stays one cell."""
    return re.sub(r"([\\|])", r"\\\1", " ".join(text.split()))
