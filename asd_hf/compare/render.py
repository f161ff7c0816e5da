"""What a comparison found: the records of its runs as a table and pictures.

A record is what one run wrote, see `RECORD`. AP is 0..1 in records and 0..100 in everything that is shown.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from ..config import NO_METHOD
from ..errors import UserError
from ..evaluation import STATS
from .verdict import (
    BETTER,
    CONFIDENCE,
    GROWTHS,
    MARGIN,
    MOST_SEEDS,
    NOT_BETTER,
    UNDECIDED,
    WORSE,
    Difference,
    common_seeds,
    paired_difference,
)

POINT = {"step": int, "seconds": float}
RECORD = {  # as far as it is read here: types, objects by their keys, lists by what they hold
    "setting": str,
    "method": str,
    "seed": int,
    "metrics": dict.fromkeys(STATS, float),
    "bootstrap": {"seed": int, "AP": [float]},
    "num_images": int,
    "data_fingerprint": str,
    "student_sha256": str,
    "teacher": object,  # {"AP": float}, or null
    "steps": int,
    "seconds": float,
    "ms_per_step": float,
    "peak_memory_mib": float,
    "device": str,
    "curves": {"train": [POINT], "eval": [POINT | {"AP": float}]},
}
_KINDS = {str: "text", int: "an integer", float: "a finite number", dict: "an object", list: "a list"}

DIFFERENCE, IMAGES_ALONE, VERDICT, AFTER = "difference", "over images alone", "verdict", "baseline's AP after"
SIZES = ("AP50", "APs", "APm", "APl")
COSTS = {"steps": "steps", "s/run": "seconds", "ms/step": "ms_per_step", "memory, MiB": "peak_memory_mib"}
HEADER = ["method", "seeds", "AP", *SIZES, DIFFERENCE, IMAGES_ALONE, VERDICT, AFTER, *COSTS]
NOTHING = "-"

SHARE = "distillation_gradient_share"  # of the training log, beside the methods' own statistics
MOST_METHODS, BEST, MOST_PANELS = 8, 6, 6
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255")  # of Okabe and Ito, and of Tol
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))  # another each time the palette is used up,
MARKERS = "osD^"  # and so with the points
BASELINE, TEACHER = "#444444", "#000000"  # colours
DPI = 110
GAPS = range(9, 120, 9)  # pixels between a point and its name
FAR = 1.5  # a teacher this many times above the best method is left out of the scale: it would press the curves flat


def load_runs(folder: Path) -> dict[str, list[dict]]:
    """All records below `folder`, which are all its `*.json`, by setting.

    Raises:
        UserError: there is none; a file is no record (named with the key that is wrong); a run is there twice; a
            setting cannot be the name of a file.
    """
    settings: dict[str, list[dict]] = {}
    files: dict[tuple[str, str, int], Path] = {}
    for file in sorted(folder.rglob("*.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file} is not JSON: {error}") from None
        _check(record, RECORD, "", file)
        if record["teacher"] is not None:
            _check(record["teacher"], {"AP": float}, "teacher", file)
        setting = record["setting"]
        if setting in ("", ".", "..") or re.search(r"[/\\\0]", setting):
            raise UserError(f"{file}: the setting {setting!r} cannot be the name of a file")
        first = files.setdefault((setting, record["method"], record["seed"]), file)
        if first is not file:
            raise UserError(f"{first} and {file} are records of the same setting, method and seed")
        settings.setdefault(setting, []).append(record)
    if not settings:
        raise UserError(f"{folder}: no record of a run (*.json) is there")
    return dict(sorted(settings.items()))


def _check(value: Any, shape: Any, key: str, file: Path) -> None:
    """Raises a UserError if `value`, which `file` has under `key`, is not as `shape` says."""
    kind = shape if isinstance(shape, type) else type(shape)
    fits = isinstance(value, int | float) and math.isfinite(value) if kind is float else isinstance(value, kind)
    if not fits:
        raise UserError(f"{file} is not the record of a run: {key or 'it'} is not {_KINDS[kind]}")
    for name, inner in shape.items() if kind is dict else ():
        path = f"{key}.{name}".lstrip(".")
        if name not in value:
            raise UserError(f"{file} is not the record of a run: {path} is missing")
        _check(value[name], inner, path, file)
    for index, item in enumerate(value if kind is list else ()):
        _check(item, shape[0], f"{key}[{index}]", file)


def ranked(runs: Sequence[dict], baseline: str) -> dict[str, list[dict]]:
    """The records of a setting by method: the baseline first, then by mean AP, the best first."""
    methods: dict[str, list[dict]] = {}
    for run in runs:
        methods.setdefault(run["method"], []).append(run)
    order = sorted(methods, key=lambda name: (name != baseline, -_mean_ap(methods[name]), name))
    return {name: methods[name] for name in order}


def table(runs: Sequence[dict], baseline: str = NO_METHOD) -> list[list[str]]:
    """The records of one setting as cells under `HEADER`, the teachers first, then the methods as `ranked`.

    Numbers are means over the seeds of a method, AP in 0..100 with the sample standard deviation over seeds. The
    differences are over the seeds in common with the baseline; without a baseline they are "-".

    Raises:
        UserError: runs cannot be paired, see `paired_difference`.
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


def teachers(runs: Sequence[dict]) -> dict[str, float]:
    """AP of each teacher by what to call it: "teacher", or "teacher of ..." if methods had different ones."""
    taught: dict[float, dict[str, None]] = {}
    for run in runs:
        if run["teacher"] is not None:
            taught.setdefault(run["teacher"]["AP"], {})[run["method"]] = None
    if len(taught) == 1:
        return {"teacher": next(iter(taught))}
    return {f"teacher of {', '.join(methods)}": ap for ap, methods in taught.items()}


def _mean_ap(runs: Sequence[dict]) -> float:
    return fmean(run["metrics"]["AP"] for run in runs)


def _against(runs: Sequence[dict], baseline_runs: Sequence[dict]) -> tuple[str, str, str]:
    """The cells of `DIFFERENCE`, `IMAGES_ALONE` and `VERDICT`."""
    if not common_seeds(runs, baseline_runs):
        return NOTHING, NOTHING, NOTHING
    difference = paired_difference(runs, baseline_runs)
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


class Curve(NamedTuple):
    """AP at the evaluations during training.

    Attributes:
        steps, seconds: (P,), means over seeds.
        ap: (seeds, P).
    """

    steps: np.ndarray
    seconds: np.ndarray
    ap: np.ndarray


def curve(runs: Sequence[dict]) -> Curve | None:
    """The evaluations of one method's runs, brought together by the share of its steps that a run has taken.

    Runs with a budget of minutes differ in their steps; their schedules go by the share. Between its evaluations a run
    is interpolated linearly. None if a run has no evaluation.
    """
    points = [run["curves"]["eval"] for run in runs]
    if not points or not all(points):
        return None
    shares = [np.array([p["step"] for p in own]) / own[-1]["step"] for own in points]
    grid = np.unique(np.concatenate(shares))
    grid = grid[grid >= max(own[0] for own in shares)]

    def along(key: str) -> np.ndarray:  # (seeds, P)
        pairs = zip(shares, points, strict=True)
        return np.array([np.interp(grid, share, [p[key] for p in own]) for share, own in pairs])

    return Curve(along("step").mean(0), along("seconds").mean(0), along("AP"))


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


def _escaped(text: str) -> str:
    """So that it stays one cell."""
    return re.sub(r"([\\|])", r"\\\1", " ".join(text.split()))


class Look(NamedTuple):
    """How a method is drawn, the same in all pictures of a setting."""

    colour: str
    dashes: Any
    marker: str


class Scene(NamedTuple):
    """What the pictures of a setting show.

    Attributes:
        setting: its name.
        methods: all records, as `ranked`.
        looks: of every method.
        lines: the methods that pictures with lines show.
        teachers: AP by name.
    """

    setting: str
    methods: dict[str, list[dict]]
    looks: dict[str, Look]
    lines: list[str]
    teachers: dict[str, float]

    @property
    def left_out(self) -> str:
        count = len(self.methods) - len(self.lines)
        return f"; {count} more method{'s' * (count > 1)} left out" if count else ""


def make_scene(setting: str, runs: Sequence[dict], baseline: str) -> Scene:
    """Chooses what is drawn: of more than 8 methods, lines for the baseline, the best 6 and any `asd*`."""
    methods = ranked(runs, baseline)
    others = [name for name in methods if name != baseline]
    lines = list(methods)
    if len(methods) > MOST_METHODS:
        lines = [name for name in methods if name in (baseline, *others[:BEST]) or name.startswith("asd")]
    looks = {baseline: Look(BASELINE, DASHES[0], MARKERS[0])}
    for index, name in enumerate(sorted(others, key=lambda name: name not in lines)):
        turn, colour = divmod(index, len(PALETTE))
        looks[name] = Look(PALETTE[colour], DASHES[turn % len(DASHES)], MARKERS[turn % len(MARKERS)])
    return Scene(setting, methods, looks, lines, teachers(runs))


def draw_curves(scene: Scene) -> Figure:
    """AP against steps and against minutes of training: the mean over seeds in a band from the least to the most."""
    figure, panels = _panels(1, 2, 4.7, 4.2, sharey=True)
    entries = []
    for name in scene.lines:
        points, look = curve(scene.methods[name]), scene.looks[name]
        if points is None:
            continue
        for axes, x in zip(panels, (points.steps, points.seconds / 60), strict=True):
            ap = 100 * points.ap
            axes.fill_between(x, ap.min(0), ap.max(0), color=look.colour, alpha=0.13, linewidth=0)
            (line,) = axes.plot(x, ap.mean(0), color=look.colour, linestyle=look.dashes, linewidth=1.8)
        entries.append((100 * _mean_ap(scene.methods[name]), name, line))
    for axes, label in zip(panels, ("training steps", "minutes of training"), strict=True):
        axes.set_xlabel(label)
        drawn = _draw_teachers(axes, scene)
    panels[0].set_ylabel("AP (points, 0-100)")
    entries = sorted([*entries, *drawn], key=lambda entry: -entry[0])
    _legend(figure, [(f"{ap:.1f}  {name}", line) for ap, name, line in entries], "AP at the end")
    _title(figure, f"{scene.setting}: AP in training, mean over seeds (band: min to max){scene.left_out}")
    return figure


def draw_cost(scene: Scene) -> Figure:
    """AP at the end against milliseconds a step: a point a method, bars of one standard deviation over seeds."""
    figure, [axes] = _panels(1, 1, 7.4, 4.8)
    points, taken = [], []
    for name, runs in scene.methods.items():
        sides = [[run["ms_per_step"] for run in runs], [100 * run["metrics"]["AP"] for run in runs]]
        x, y = map(fmean, sides)
        dx, dy = (stdev(side) if len(runs) > 1 else 0.0 for side in sides)
        look = scene.looks[name]
        axes.errorbar(x, y, dy, dx, fmt=look.marker, color=look.colour, markersize=6, elinewidth=1.1, capsize=2)
        points.append((x, y, name, look.colour))
        taken += [((x - dx, y), (x + dx, y)), ((x, y - dy), (x, y + dy))]
    axes.margins(0.1)
    axes.set(xlabel="ms per training step", ylabel="AP (points, 0-100)")
    for ap, name, _ in _draw_teachers(axes, scene):
        height = min(ap, axes.get_ylim()[1])
        taken.append([(x, ap) for x in axes.get_xlim()])
        where = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
        axes.annotate(f"{name}\n{ap:.1f}", (1, height), (6, 0), va="center", fontsize=8.5, parse_math=False, **where)
    _title(figure, f"{scene.setting}: AP at the end and the time of a step (bars: standard deviation over seeds)")
    _label_points(axes, points, taken)
    return figure


def draw_inside(scene: Scene) -> Figure | None:
    """What methods log of themselves in training, mean over seeds; None if they log nothing.

    Of more than 6 statistics, those that most methods have.
    """
    logged = {name: _logged(scene.methods[name]) for name in scene.lines}
    keys = sorted({key for own in logged.values() for key in own})
    statistics = sorted(
        (key for key in keys if key != SHARE), key=lambda key: -sum(key in own for own in logged.values())
    )
    shown = [*statistics[:MOST_PANELS], *([SHARE] if SHARE in keys else [])]
    if not shown:
        return None
    rows = math.ceil(len(shown) / 4)
    figure, panels = _panels(rows, math.ceil(len(shown) / rows), 2.9, 2.3)
    lines = {}
    for key, axes in zip(shown, panels, strict=False):
        axes.set_title(key, fontsize=9, parse_math=False)
        axes.set_xlabel("training steps", fontsize=8)
        for name in scene.lines:
            if key in logged[name]:
                look = scene.looks[name]
                (lines[name],) = axes.plot(
                    *zip(*logged[name][key].items(), strict=True),
                    color=look.colour,
                    linestyle=look.dashes,
                    linewidth=1.4,
                )
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    _legend(figure, [(name, lines[name]) for name in scene.lines if name in lines])
    more = len(statistics) - MOST_PANELS
    unseen = f"; {more} more statistics left out" * (more > 0)
    _title(figure, f"{scene.setting}: what methods log in training, mean over seeds{scene.left_out}{unseen}")
    return figure


def _logged(runs: Sequence[dict]) -> dict[str, dict[int, float]]:
    """By statistic and step, the mean over seeds, at the steps that all of them have."""
    values: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        for point in run["curves"]["train"]:
            for key, value in point.items():
                if key == SHARE or ("/" in key and not key.startswith("loss/")):
                    values.setdefault(key, {}).setdefault(point["step"], []).append(value)
    means = {
        key: {step: fmean(found) for step, found in sorted(own.items()) if len(found) == len(runs)}
        for key, own in values.items()
    }
    return {key: own for key, own in means.items() if own}


def _panels(rows: int, columns: int, width: float, height: float, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure with panels of about that size in inches, and room for a legend beside them."""
    figure = Figure((columns * width + 1.8, rows * height + 0.4), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False, **shared).flat)
    for axes in panels:
        axes.grid(color="#e4e4e4", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure, panels


def _draw_teachers(axes: Axes, scene: Scene) -> list[tuple[float, str, Line2D]]:
    """(AP, name, line) of each teacher. One that is far above all methods has no line but in the legend."""
    best = max(_mean_ap(runs) for runs in scene.methods.values())
    drawn = []
    for name, ap in scene.teachers.items():
        if ap <= FAR * best:
            line = axes.axhline(100 * ap, color=TEACHER, linestyle="--", linewidth=1.1)
        else:
            line, name = Line2D([], [], color=TEACHER, linestyle="--", linewidth=1.1), f"{name} (above)"
        drawn.append((100 * ap, name, line))
    return drawn


def _legend(figure: Figure, entries: Sequence[tuple[str, Artist]], title: str | None = None) -> None:
    """Beside the panels, so that it covers nothing."""
    if entries:
        labels, lines = zip(*entries, strict=True)
        legend = figure.legend(
            lines,
            labels,
            loc="outside right upper",
            title=title,
            fontsize=8.5,
            title_fontsize=8.5,
            frameon=False,
            alignment="left",
        )
        for text in legend.get_texts():
            text.set_parse_math(False)


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=10, parse_math=False)


def _label_points(axes: Axes, points: Sequence[tuple[float, float, str, str]], bars: Iterable[tuple]) -> None:
    """Writes a name beside each point (x, y, name, colour), at the nearest place where it covers nothing.

    Args:
        bars: pairs of ends (x, y) of what must not be covered, the points among it.
    """
    axes.figure.draw_without_rendering()
    axes.figure.set_layout_engine("none")  # the places are in pixels: nothing may move any more
    pixels = axes.transData.transform([point[:2] for point in points])
    taken = [Bbox(axes.transData.transform(ends)).padded(5) for ends in bars]

    def covers(box: Bbox) -> int:
        outside = not (axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max))
        return box.count_overlaps(taken) + outside

    for (x, y), (*at, name, colour) in zip(pixels, points, strict=True):
        text = axes.annotate(
            name,
            at,
            (0, 0),
            textcoords="offset pixels",
            ha="center",
            va="center",
            fontsize=8.5,
            color=[0.7 * part for part in to_rgb(colour)],  # light colours are hard to read
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4},
        )
        box = min(_places(x, y, *Text.get_window_extent(text).size), key=covers)
        text.xyann = (box.min + box.max) / 2 - (x, y)
        text.arrow_patch.set_visible(not box.padded(GAPS[0] + 1).contains(x, y))
        taken.append(box)


def _places(x: float, y: float, width: float, height: float) -> Iterator[Bbox]:
    """Boxes around (x, y), the nearest first; all in pixels."""
    for gap in GAPS:
        for right, up in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)):
            left, bottom = x - width / 2 + right * (gap + width / 2), y - height / 2 + up * (gap + height / 2)
            yield Bbox.from_bounds(left, bottom, width, height)


PICTURES = {"curves": draw_curves, "cost": draw_cost, "inside": draw_inside}


def render(folder: Path, out: Path | None = None, baseline: str = NO_METHOD) -> str:
    """Writes a Markdown file and pictures of every setting whose records are below `folder`.

    Args:
        out: where to, `folder` itself by default: `<setting>.md`, `<setting>_curves.png`, `<setting>_cost.png` and, if
            methods logged anything of themselves, `<setting>_inside.png`.
        baseline: the method that the others are compared with.

    Returns:
        the tables, for the terminal.

    Raises:
        UserError: the records cannot be read or compared, see `load_runs` and `table`.
    """
    out = folder if out is None else out
    tables = {}
    settings = load_runs(folder)
    for setting, runs in settings.items():
        tables[setting] = to_markdown(table(runs, baseline))
    out.mkdir(parents=True, exist_ok=True)
    for setting, runs in settings.items():
        scene = make_scene(setting, runs, baseline)
        links = []
        for what, draw in PICTURES.items():
            if (figure := draw(scene)) is not None:
                file = out / f"{setting}_{what}.png"
                figure.savefig(file, dpi=DPI)
                links.append(f"![{what}]({quote(file.name)})")
        lines = [
            f"# {setting}",
            _what(runs),
            tables[setting],
            *links,
            _how_to_read(baseline, os.path.relpath(folder, out)),
        ]
        (out / f"{setting}.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return "\n\n".join(f"{setting}\n\n{text}" for setting, text in tables.items())


def _what(runs: Sequence[dict]) -> str:
    images, devices = sorted({run["num_images"] for run in runs}), sorted({run["device"] for run in runs})
    return (
        "COCO AP of students at the end of training, in points (0 to 100): mean and sample standard deviation over "
        f"seeds, on {' or '.join(f'{count:,}' for count in images)} images; trained on {'; '.join(devices)}."
    )


def _how_to_read(baseline: str, records: str) -> str:
    place = "beside this file" if records == "." else f"in `{records}`"
    level, points, growth = f"{100 * CONFIDENCE:.0f} %", f"{100 * MARGIN:.0f} point", f"{GROWTHS[-1]:.0f} times"
    return f"""## How to read it

- **{DIFFERENCE}**: a method's AP minus that of `{baseline}` with the same seed, trained from the same student: the
  mean over these seeds, and in brackets its {level} interval. It allows for other seeds and for other evaluation
  images; with one seed there is none, and with two or three it is somewhat too narrow (it may miss the true difference
  in up to 13 % or 8 % of all cases).
- **{IMAGES_ALONE}**: the paired bootstrap interval over images. It allows for other evaluation images with these very
  students, and says nothing about other seeds.
- **{VERDICT}**: `{BETTER}`, the interval of the difference lies above 0; `{WORSE}`, below 0; `{NOT_BETTER}`, below
  {points}; else `{UNDECIDED}`, followed by what would decide, in all, if the mean and the spreads stayed as they are:
  seeds; or evaluation images, if {MOST_SEEDS} seeds are too few; or both. Nothing follows if {MOST_SEEDS} seeds on
  {growth} the images are too few. Each verdict stands for itself: of twenty methods that change nothing, one is
  called better or worse by chance, on average.
- **{AFTER}**: the share of the baseline's training time after which a method's mean curve reaches the baseline's end.
- **s/run**, **ms/step**: of training alone, without evaluations. **memory**: the peak.

The records lie {place}: a JSON file a run, with its configuration, curves and bootstrap."""
