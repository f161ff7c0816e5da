"""The report of a comparison, from its records."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from ..compare.pictures import PALETTE, Scene, make_scene
from ..compare.records import BY_CLASS, curve, gains_over, load_runs, logged_statistics, mean_ap
from ..compare.render import columns_explained
from ..compare.table import VERDICT, table
from ..compare.verdict import CONFIDENCE, Difference, NotComparable, common_seeds, paired_difference
from ..config import NO_METHOD
from ..files import write_whole
from ..methods import METHODS, get_method
from .blocks import Cell, Chart, Facts, Section, Table, Tiles, legend
from .charts import Series, bars, lines, number, scatter
from .page import render_page
from .papers import paper_link

MOST_STATISTICS, MOST_CLASSES = 12, 12


def report_comparison(folder: Path, output: Path, baseline: str = NO_METHOD) -> None:
    """Writes the report of all settings whose records are below `folder`.

    Args:
        baseline: the method that the others are compared with.

    Raises:
        UserError: the records cannot be read, see `load_runs`.
    """
    settings = load_runs(folder)
    sections = []
    for index, (setting, runs) in enumerate(settings.items()):
        scene = make_scene(setting, runs, baseline)
        several = len(settings) > 1
        for name, (title, blocks, intro) in _sections(scene, runs).items():
            heading = f"{setting}: {title}" if several else title
            listed = (setting if name == "table" else None) if several else title
            sections.append(Section(f"{name}-{index}", heading, blocks, intro, listed))
    title = "How to read it"
    sections.append(Section("read", title, [Facts(_how_to_read(baseline))], listed=title))
    count = sum(map(len, settings.values()))
    subtitle = f"{count} runs, {', '.join(settings)}; compared with {baseline}"
    write_whole(output, render_page(f"Comparison: {', '.join(settings)}", subtitle, sections))


def _sections(scene: Scene, runs: Sequence[dict]) -> dict[str, tuple[str, list, str]]:
    images = sorted({run["num_images"] for run in runs})
    devices = sorted({run["device"] for run in runs})
    what = f"AP in points (0 to 100), mean over seeds, on {' or '.join(f'{n:,}' for n in images)} evaluation images."
    sections = {
        "table": ("Results", [*_tiles(scene), *_intervals(scene), _table(scene, runs)], what),
        "curves": ("Curves", _curves(scene), "Mean over seeds in a band from the least to the most."),
        "cost": ("Cost", _cost(scene), f"Trained on {'; '.join(devices)}."),
        "gains": (
            "Which objects gain",
            _gains(scene),
            f"AP minus that of {scene.baseline}, mean over seeds; lines from the least to the most.",
        ),
        "inside": ("What methods log", _inside(scene), "Mean over seeds."),
        "methods": ("Methods", [_papers(scene)], ""),
    }
    return {name: section for name, section in sections.items() if any(section[1])}


def _colour(scene: Scene, name: str) -> int:
    """Of `charts`, the same as in the pictures of `asd-hf compare`; in dashes where the palette is used up."""
    look = scene.looks[name]
    if look.colour not in PALETTE:
        return 0
    others = [other for other in scene.looks if scene.looks[other].colour in PALETTE]
    return 1 + others.index(name)


def _tiles(scene: Scene) -> list[Tiles]:
    best = max(scene.methods, key=lambda name: mean_ap(scene.methods[name]))
    tiles = [("best", best, f"AP {100 * mean_ap(scene.methods[best]):.1f}")]
    if scene.baseline in scene.methods:
        base = mean_ap(scene.methods[scene.baseline])
        tiles.append((scene.baseline, f"{100 * base:.1f}", "AP of the baseline"))
        if (found := _difference(scene, best)) is not None:
            tiles.append(("difference", f"{100 * found.mean:+.1f}", found.verdict()))
    tiles += [(name, f"{100 * ap:.1f}", "AP") for name, ap in list(scene.teachers.items())[:2]]
    return [Tiles(tiles)]


def _difference(scene: Scene, name: str) -> Difference | None:
    own, base = scene.methods[name], scene.methods.get(scene.baseline, [])
    if name == scene.baseline or not common_seeds(own, base):
        return None
    try:
        return paired_difference(own, base)
    except NotComparable:
        return None


def _intervals(scene: Scene) -> list[Chart]:
    found = {name: d for name in scene.methods if (d := _difference(scene, name)) is not None}
    if not found:
        return []
    points = []
    for difference in found.values():
        low, high = difference.interval
        points.append((100 * low, 100 * difference.mean, 100 * high))
    series = [Series(f"minus {scene.baseline}", points, 1)]
    note = (
        f"The line is the {100 * CONFIDENCE:.0f} % interval over seeds and images; of a method with one seed, over "
        "images alone. One that does not reach 0 decides."
    )
    svg = bars(list(found), series, f"points of AP minus {scene.baseline}", filled=False)
    return [Chart(f"Difference from {scene.baseline}", svg, note=note, wide=True)]


def _table(scene: Scene, runs: Sequence[dict]) -> Table:
    header, *rows = table(runs, scene.baseline)
    verdict = header.index(VERDICT)
    marks = {"better": "up", "worse": "down"}
    body = []
    for row in rows:
        cells = [Cell(row[0])]
        for column, text in enumerate(row[1:], 1):
            mark = f"{marks.get(text, '')} long" if column == verdict else "num"
            cells.append(Cell(text, None if column == verdict else _value(text), mark))
        body.append(cells)
    return Table(header, body)


def _value(text: str) -> float | None:
    """What a cell is sorted by: the number that it begins with, of an interval its lower end."""
    found = re.match(r"\[?([-+]?[\d,]+(?:\.\d+)?)", text)
    return float(found[1].replace(",", "")) if found else None


def _curves(scene: Scene) -> list[Chart]:
    charts = []
    for x_label, scale in (("training steps", None), ("minutes of training", 1 / 60)):
        series, ends = [], []
        for name in scene.lines:
            points = curve(scene.methods[name])
            if points is None:
                continue
            xs = (points.steps if scale is None else points.seconds * scale).tolist()
            ap = 100 * points.ap
            band = list(zip(xs, ap.min(0).tolist(), ap.max(0).tolist(), strict=True))
            line = list(zip(xs, ap.mean(0).tolist(), strict=True))
            series.append(Series(name, line, _colour(scene, name), band if len(ap) > 1 else ()))
            ends.append(f"{ap.mean(0)[-1]:.1f}")
        if not series:
            return []
        order = sorted(range(len(series)), key=lambda i: -float(ends[i]))
        svg = lines(series, x_label, "AP", zero=True)
        entries = legend([series[i] for i in order], [ends[i] for i in order])
        teachers = ", ".join(f"{name} {100 * ap:.1f}" for name, ap in scene.teachers.items())
        note = "; ".join(part for part in (teachers, scene.left_out.removeprefix("; ")) if part)
        charts.append(Chart(f"AP against {x_label}", svg, entries, note))
    return charts


def _cost(scene: Scene) -> list[Chart]:
    points = []
    for name, runs in scene.methods.items():
        sides = [[run["ms_per_step"] for run in runs], [100 * run["metrics"]["AP"] for run in runs]]
        spreads = [stdev(side) if len(runs) > 1 else 0.0 for side in sides]
        points.append((name, _colour(scene, name), *map(fmean, sides), *spreads))
    note = "Bars: one standard deviation over seeds."
    return [Chart("AP at the end and the time of a step", scatter(points, "ms a step", "AP"), note=note, wide=True)]


def _gains(scene: Scene) -> list[Chart]:
    base = scene.methods.get(scene.baseline, [])
    found = {name: gains_over(scene.methods[name], base) for name in scene.lines if name != scene.baseline}
    found = {name: own for name, own in found.items() if own}
    kinds = list(dict.fromkeys(kind for own in found.values() for kind in own))
    classes = [kind for kind in kinds if kind[0] == BY_CLASS]
    moved = {kind: max(abs(fmean(own[kind])) for own in found.values() if kind in own) for kind in classes}
    most = sorted(classes, key=lambda kind: -moved[kind])[:MOST_CLASSES]
    charts = []
    for title in dict.fromkeys(title for title, _ in kinds):
        shown = [kind for kind in kinds if kind[0] == title and (title != BY_CLASS or kind in most)]
        series = [
            Series(name, [_spread(own.get(kind)) for kind in shown], _colour(scene, name))
            for name, own in found.items()
        ]
        svg = bars([name for _, name in shown], series, "points of AP", filled=False)
        left_out = len(classes) - len(most) if title == BY_CLASS else 0
        note = f"{left_out} classes whose AP moved less are left out." if left_out else ""
        charts.append(Chart(title.capitalize(), svg, legend(series), note))
    return charts


def _spread(values: list[float] | None) -> tuple:
    return (min(values), fmean(values), max(values)) if values else ()


def _inside(scene: Scene) -> list[Chart]:
    logged = {name: logged_statistics(scene.methods[name]) for name in scene.lines}
    keys = sorted({key for own in logged.values() for key in own}, key=lambda k: -sum(k in o for o in logged.values()))
    charts = []
    for key in keys[:MOST_STATISTICS]:
        series = [
            Series(name, list(own[key].items()), _colour(scene, name)) for name, own in logged.items() if key in own
        ]
        ends = [number(s.points[-1][1]) for s in series]
        charts.append(Chart(key, lines(series, "training steps", "", zero=True), legend(series, ends)))
    return charts


def _how_to_read(baseline: str) -> list[tuple[str, str, None]]:
    plain = re.sub(r"[*`]", "", columns_explained(baseline))
    items = (" ".join(item.split()) for item in plain.removeprefix("- ").split("\n- "))
    return [(*item.split(": ", 1), None) for item in items]


def _papers(scene: Scene) -> Facts:
    """What each variant is, and the paper of its methods."""
    rows = []
    for name, runs in scene.methods.items():
        sections = runs[0].get("config", {}).get("method", {"name": name})
        methods = [entry["name"] for entry in (sections if isinstance(sections, list) else [sections])]
        for method in methods:
            paper = get_method(method).paper if method in METHODS else {}
            label = name if method == name else f"{name} ({method})"
            if paper:
                rows.append((label, f"{paper['title']} ({paper['id']})", paper_link(paper["id"])))
            else:
                what = "on the labels alone" if method == NO_METHOD else "a method without a paper of its own"
                rows.append((label, what, None))
    return Facts(rows)
