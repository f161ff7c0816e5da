"""What a comparison found, as pictures. AP is 0..1 in records and 0..100 in everything that is shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from .records import BY_CLASS, GRADIENTS, curve, gains_over, logged_statistics, mean_ap, ranked, teachers

MOST_METHODS, BEST, MOST_NAMES, MOST_PANELS, MOST_CLASSES = 8, 6, 16, 6, 12
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255")  # of Okabe and Ito, and of Tol
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))  # another each time the palette is used up,
MARKERS = "osD^"  # and so with the points
BASELINE, TEACHER, NAMELESS = "#444444", "#000000", "#BBBBBB"  # colours
DPI = 110
GAPS = range(9, 120, 9)  # pixels between a point and its name
FAR = 1.5  # a teacher this many times above the best method is left out of the scale: it would press the curves flat


class Look(NamedTuple):
    """How a method is drawn, the same in all pictures of a setting."""

    colour: str
    dashes: Any
    marker: str


class Scene(NamedTuple):
    """What the pictures of a setting show.

    Attributes:
        setting: its name.
        baseline: the method that the others are compared with.
        methods: all records, as `ranked`.
        looks: of every method.
        lines: the methods that pictures with lines show.
        teachers: AP by name.
    """

    setting: str
    baseline: str
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
    return Scene(setting, baseline, methods, looks, lines, teachers(runs))


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
        entries.append((100 * mean_ap(scene.methods[name]), name, line))
    for axes, label in zip(panels, ("training steps", "minutes of training"), strict=True):
        axes.set_xlabel(label)
        drawn = _draw_teachers(axes, scene)
    panels[0].set_ylabel("AP (points, 0-100)")
    entries = sorted([*entries, *drawn], key=lambda entry: -entry[0])
    _legend(figure, [(f"{ap:.1f}  {name}", line) for ap, name, line in entries], "AP at the end")
    _title(figure, f"{scene.setting}: AP in training, mean over seeds (band: min to max){scene.left_out}")
    return figure


def draw_cost(scene: Scene) -> Figure:
    """AP at the end against milliseconds a step: a point a method, bars of one standard deviation over seeds.

    Of more than 16 methods, those that have no line in other pictures are points without a name.
    """
    figure, [axes] = _panels(1, 1, 7.4, 4.8)
    points, taken = [], []
    named = scene.methods if len(scene.methods) <= MOST_NAMES else scene.lines
    for name, runs in scene.methods.items():
        sides = [[run["ms_per_step"] for run in runs], [100 * run["metrics"]["AP"] for run in runs]]
        x, y = map(fmean, sides)
        if name not in named:
            axes.plot(x, y, ".", color=NAMELESS)
            continue
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
    unseen = "; the other methods in grey" * (len(named) < len(scene.methods))
    _title(
        figure, f"{scene.setting}: AP at the end and the time of a step (bars: standard deviation over seeds){unseen}"
    )
    _label_points(axes, points, taken)
    return figure


def draw_inside(scene: Scene) -> Figure | None:
    """What methods log of themselves in training, mean over seeds; None if they log nothing.

    Of more than 6 statistics, those that most methods have.
    """
    logged = {name: logged_statistics(scene.methods[name]) for name in scene.lines}
    keys = sorted({key for own in logged.values() for key in own})
    statistics = sorted(
        (key for key in keys if key not in GRADIENTS), key=lambda key: -sum(key in own for own in logged.values())
    )
    shown = [*statistics[:MOST_PANELS], *(key for key in GRADIENTS if key in keys)]
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


def draw_gains(scene: Scene) -> Figure | None:
    """Which objects gain: AP minus the baseline's by size and by class, mean over seeds, bars from least to most.

    Of more than 12 classes, those whose AP moved most. None where no method has a seed in common with the baseline.
    """
    gains = {name: gains_over(scene.methods[name], scene.methods.get(scene.baseline, [])) for name in scene.lines}
    gains = {name: own for name, own in gains.items() if own and name != scene.baseline}
    if not gains:
        return None
    moved: dict[tuple[str, str], float] = {}
    for own in gains.values():
        for kind in own:
            moved[kind] = max(moved.get(kind, 0.0), abs(fmean(own[kind])))
    classes = [kind for kind in moved if kind[0] == BY_CLASS]
    left_out = sorted(classes, key=lambda kind: -moved[kind])[MOST_CLASSES:]
    groups = {title: [kind for kind in moved if kind[0] == title and kind not in left_out] for title, _ in moved}
    widths = [max(2, len(kinds)) for kinds in groups.values()]
    figure, panels = _panels(1, len(groups), 4.7, 3.6, sharey=True, width_ratios=widths)
    lines = {}
    for axes, (title, kinds) in zip(panels, groups.items(), strict=True):
        axes.axhline(0, color=BASELINE, linewidth=1.1)
        for index, (name, own) in enumerate(gains.items()):
            look, shift = scene.looks[name], 0.7 * ((index + 0.5) / len(gains) - 0.5)
            if not any(kind in own for kind in kinds):
                continue
            at = [(place + shift, own[kind]) for place, kind in enumerate(kinds) if kind in own]
            axes.vlines([x for x, _ in at], *zip(*((min(d), max(d)) for _, d in at), strict=True), color=look.colour)
            means = [fmean(differences) for _, differences in at]
            (lines[name],) = axes.plot([x for x, _ in at], means, look.marker, color=look.colour, markersize=5)
        axes.set_xticks(
            range(len(kinds)), [name for _, name in kinds], rotation=30 * (len(kinds) > 6), parse_math=False
        )
        axes.set_xlabel(title)
    panels[0].set_ylabel(f"AP minus that of {scene.baseline}", parse_math=False)
    _legend(figure, list(lines.items()))
    unseen = f"; {len(left_out)} more class{'es' * (len(left_out) > 1)} left out" * bool(left_out)
    _title(figure, f"{scene.setting}: which objects gain, mean over seeds (bar: min to max){scene.left_out}{unseen}")
    return figure


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
    best = max(mean_ap(runs) for runs in scene.methods.values())
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


PICTURES = {"curves": draw_curves, "cost": draw_cost, "gains": draw_gains, "inside": draw_inside}
