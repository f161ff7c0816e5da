"""Charts as small inline SVG. Their colours are classes of the page's style sheet, so that they follow dark mode."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 250  # units, which are pixels where a chart has its natural size
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 24, 38  # margins
NUM_COLOURS = 7  # of the style sheet: `.s0` is ink, `.s1` to `.s7` are of Okabe and Ito, and of Tol
DASHES = ("", "6 3", "2 2", "7 2 2 2")  # another each time the colours are used up
MOST_POINTS = 300  # of a line: more cannot be seen
ROW, BAR_LEFT = 13, 118
LETTER, LINE = 6.6, 13  # of a name, at most
GAPS = range(8, 90, 8)  # between a point and its name


@dataclass(frozen=True)
class Series:
    """A line, or the points or bars of one kind.

    Attributes:
        points: (x, y) by rising x; (low, middle, high) by row for `bars`.
        colour: 0 is ink, from 1 on one of the palette's, in turn.
        band: (x, low, high) around a line.
        dashed: as what stands for a level, not for a course.
    """

    name: str
    points: Sequence[tuple]
    colour: int = 1
    band: Sequence[tuple[float, float, float]] = ()
    dashed: bool = False

    @property
    def css(self) -> str:
        return f"s{(self.colour - 1) % NUM_COLOURS + 1 if self.colour else 0}"

    @property
    def dashes(self) -> str:
        if self.dashed:
            return "5 4"
        return DASHES[max(0, self.colour - 1) // NUM_COLOURS % len(DASHES)]


def lines(series: Sequence[Series], x_label: str, y_label: str, log: bool = False, zero: bool = False) -> Markup:
    """Lines over a common axis; y in powers of ten with `log`, from 0 on with `zero`."""
    kept = [(s, [p for p in s.points if math.isfinite(p[1]) and (p[1] > 0 or not log)]) for s in series]
    kept = [(s, thinned(points)) for s, points in kept if points]
    xs = [p[0] for _, points in kept for p in points]
    ys = [p[1] for _, points in kept for p in points] + [y for s in series for _, *ends in s.band for y in ends]
    if log:
        ys = [math.log10(y) for y in ys if y > 0]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(*_padded([*ys, *([0.0] * zero)]), 5)
    x_axis = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y_axis = _Axis(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [_frame(x_axis, y_axis, x_ticks, y_ticks, x_label, y_label, log)]
    for s, points in kept:
        if s.band:
            band = thinned(s.band)
            edge = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
            path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in edge)
            parts.append(Markup('<polygon class="band {}" points="{}"/>').format(s.css, path))
        path = [(x_axis(x), y_axis(math.log10(y) if log else y)) for x, y in points]
        if len(path) == 1:
            mark = Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3"><title>{}</title></circle>')
            parts.append(mark.format(s.css, *path[0], f"{s.name}: {number(points[0][1])}"))
            continue
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in path)
        line = Markup('<polyline class="line {}" points="{}"{}><title>{}</title></polyline>')
        parts.append(line.format(s.css, drawn, _dash(s), f"{s.name}: {number(points[-1][1])} at the end"))
    return _svg(parts, f"{y_label} against {x_label}: {', '.join(s.name for s, _ in kept)}")


def scatter(points: Sequence[tuple[str, int, float, float, float, float]], x_label: str, y_label: str) -> Markup:
    """Named points (name, colour, x, y, x spread, y spread), bars from minus to plus a spread; nothing overlaps."""
    xs = [x + sign * dx for _, _, x, _, dx, _ in points for sign in (-1, 1)]
    ys = [y + sign * dy for _, _, _, y, _, dy in points for sign in (-1, 1)]
    x_ticks, y_ticks = (ticks(*_padded([*side, 0.0])) for side in (xs, ys))
    height = max(HEIGHT, 20 * len(points) + TOP + BOTTOM)
    x_axis = _Axis(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT)
    y_axis = _Axis(y_ticks[0], y_ticks[-1], height - BOTTOM, TOP)
    parts = [_frame(x_axis, y_axis, x_ticks, y_ticks, x_label, y_label, height=height)]
    taken, names = [], []
    for name, colour, x, y, dx, dy in points:
        css, (px, py) = Series(name, (), colour).css, (x_axis(x), y_axis(y))
        for (x0, y0), (x1, y1) in (((x - dx, y), (x + dx, y)), ((x, y - dy), (x, y + dy))):
            ends = x_axis(x0), y_axis(y0), x_axis(x1), y_axis(y1)
            parts.append(Markup('<path class="line {}" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(css, *ends))
            taken.append((min(ends[::2]) - 3, min(ends[1::2]) - 3, max(ends[::2]) + 3, max(ends[1::2]) + 3))
        about = f"{name}: {y_label} {number(y)}, {x_label} {number(x)}"
        mark = Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="4.5"><title>{}</title></circle>')
        parts.append(mark.format(_filled(css, colour), px, py, about))
        taken.append((px - 5, py - 5, px + 5, py + 5))
        names.append((px, py, name, css))
    labels = []
    for px, py, name, css in names:
        box = _free_place(px, py, LETTER * len(name), taken, (LEFT, TOP, WIDTH, height - BOTTOM))
        taken.append(box)
        x, y = min(max(px, box[0]), box[2]), min(max(py, box[1]), box[3])  # of the name, nearest to the point
        if math.hypot(px - x, py - y) > 10:
            line = Markup('<path class="leader {}" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>')
            parts.append(line.format(css, px, py, x, y))
        label = Markup('<text class="halo" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>')
        labels.append(label.format((box[0] + box[2]) / 2, (box[1] + box[3]) / 2 + 4, name))
    parts += labels
    return _svg(parts, f"{y_label} against {x_label}: {', '.join(p[0] for p in points)}", height)


def bars(rows: Sequence[str], series: Sequence[Series], x_label: str, filled: bool = True) -> Markup:
    """A row for each name, in it a bar from 0 (or, not `filled`, a point) and a line from low to high a series."""
    values = [v for s in series for p in s.points if p for v in p if math.isfinite(v)]
    x_ticks = ticks(*_padded([*values, 0.0]))
    each = max(ROW * len(series) + 8, 22)
    top_edge = 6
    height = top_edge + each * len(rows) + BOTTOM
    left = min(190, max(BAR_LEFT, 7 * max(map(len, rows), default=0) + 10))
    axis = _Axis(x_ticks[0], x_ticks[-1], left, WIDTH - RIGHT - 8)
    parts = [_grid(axis, x_ticks, x_label, top_edge, height - BOTTOM)]
    zero = Markup('<path class="axis" d="M{0:.1f} {1}V{2}"/>').format(axis(0), top_edge, height - BOTTOM)
    for index, row in enumerate(rows):
        top = top_edge + each * index
        if index % 2:
            parts.append(Markup('<rect class="stripe" x="0" y="{}" width="{}" height="{}"/>').format(top, WIDTH, each))
        name = row if len(row) <= 26 else f"{row[:25]}…"
        label = Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}<title>{}</title></text>')
        parts.append(label.format(left - 8, top + each / 2 + 4, name, row))
        for place, s in enumerate(series):
            if not s.points[index]:
                continue
            low, middle, high = s.points[index]
            y = top + (each - ROW * len(series)) / 2 + ROW * (place + 0.5)
            about = f"{row}, {s.name}: {number(middle)}" + (f" [{number(low)}, {number(high)}]" * (low < high))
            if filled:
                start, end = sorted((axis(0), axis(middle)))
                bar = Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{}" rx="1.5">')
                parts.append(bar.format(s.css, start, y - 4.5, max(end - start, 0.8), 9))
            else:
                span = Markup('<path class="line {}" d="M{:.1f} {:.1f}H{:.1f}"{}/>')
                parts.append(span.format(s.css, axis(low), y, axis(high), _dash(s)))
                mark = Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="4">')
                parts.append(mark.format(_filled(s.css, s.colour), axis(middle), y))
            parts.append(Markup("<title>{}</title></{}>").format(about, Markup("rect" if filled else "circle")))
    return _svg([*parts, zero], f"{x_label} by {', '.join(rows)}", height)


def thinned(points: Sequence[tuple]) -> list[tuple]:
    """At most `MOST_POINTS` of them: the means of as many equal parts."""
    if len(points) <= MOST_POINTS:
        return list(points)
    edges = [round(i * len(points) / MOST_POINTS) for i in range(MOST_POINTS + 1)]
    parts = [points[a:b] for a, b in pairwise(edges)]
    return [tuple(math.fsum(values) / len(values) for values in zip(*part, strict=True)) for part in parts]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that span `low` to `high`, about `count` of them."""
    if high - low < 1e-12 * max(1.0, abs(low)):
        low, high = low - abs(low or 1) / 2, high + abs(high or 1) / 2
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= 0.999 * raw)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """Short: three digits that count."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    size = abs(value)
    if size >= 1e5 or size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}".rstrip("0").rstrip(".")


def in_points(ap: float) -> str:
    """AP of 0 to 1 in points; "-" for none."""
    return f"{100 * ap:.1f}" if ap >= 0 else "-"


@dataclass(frozen=True)
class _Axis:
    """From values to units."""

    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        return self.begin + (self.end - self.begin) * ((value - self.low) / span if span else 0.5)


def _padded(values: Iterable[float]) -> tuple[float, float]:
    values = list(values)
    return min(values), max(values)


def _frame(x_axis, y_axis, x_ticks, y_ticks, x_label, y_label, log=False, height=HEIGHT) -> Markup:
    parts = [
        Markup('<text x="2" y="12">{}</text>').format(y_label),
        _grid(x_axis, x_ticks, x_label, TOP, height - BOTTOM, height),
    ]
    for tick in y_ticks:
        if log and tick != round(tick) and y_ticks[-1] - y_ticks[0] >= 1:
            continue
        y = y_axis(tick)
        parts.append(Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(LEFT, y, WIDTH - RIGHT))
        shown = number(10**tick if log else tick)
        parts.append(Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(LEFT - 6, y + 4, shown))
    return Markup("").join(parts)


def _grid(axis: _Axis, marks: Sequence[float], label: str, top: float, bottom: float, height: float = 0) -> Markup:
    """Vertical lines with their numbers, and the axis' label below."""
    parts, last = [], -math.inf
    for tick in marks:
        x = axis(tick)
        if not min(axis.begin, axis.end) - 1 <= x <= max(axis.begin, axis.end) + 1:
            continue
        parts.append(Markup('<path class="grid" d="M{:.1f} {}V{}"/>').format(x, top, bottom))
        half = 3.3 * len(number(tick))
        if x - half > last:
            anchor = Markup(' text-anchor="{}"').format("end" if x + half > WIDTH else "middle")
            parts.append(Markup('<text x="{:.1f}" y="{}"{}>{}</text>').format(x, bottom + 15, anchor, number(tick)))
            last = x + half + 4
    middle = (axis.begin + axis.end) / 2
    parts.append(
        Markup('<text class="label" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            middle, bottom + 32, label
        )
    )
    return Markup("").join(parts)


def _free_place(x: float, y: float, width: float, taken: Sequence[tuple], room: tuple) -> tuple:
    """(left, top, right, bottom) of a name near (x, y): the nearest place where it covers nothing of `taken`."""
    places = []
    for gap in GAPS:
        for right, down in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)):
            middle_x, middle_y = x + right * (gap + width / 2), y + down * (gap + LINE / 2)
            places.append((middle_x - width / 2, middle_y - LINE / 2, middle_x + width / 2, middle_y + LINE / 2))

    def covers(box: tuple) -> int:
        over = sum(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken)
        inside = room[0] <= box[0] and room[1] <= box[1] and box[2] <= room[2] and box[3] <= room[3]
        return over + 2 * (not inside)

    return min(places, key=covers)


def _filled(css: str, colour: int) -> str:
    """Points are rings where the colours are used up."""
    return f"{css} ring" if colour > NUM_COLOURS else css


def _dash(series: Series) -> Markup:
    return Markup(' stroke-dasharray="{}"').format(series.dashes) if series.dashes else Markup("")


def _svg(parts: Iterable[Markup], what: str, height: float = HEIGHT) -> Markup:
    head = Markup('<svg class="chart" viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">')
    return head.format(WIDTH, height, escape(what)) + Markup("").join(parts) + Markup("</svg>")
