"""AP by size and by class, and the differences between the models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..compare.records import SIZES
from ..evaluation import STATS
from .blocks import Cell, Chart, Table
from .charts import Series, bars, in_points
from .models import REFERENCE, STUDENT, TEACHER, Evaluation

MOST_CLASSES = 12  # of the chart


def objects(evaluation: Evaluation) -> list:
    models = {name: m for name in (STUDENT, REFERENCE, TEACHER) if (m := evaluation.models.get(name)) and m.numbers}
    if STUDENT not in models:
        return []
    others = [name for name in models if name != STUDENT]
    columns = [STUDENT, *others, *(f"minus {name}" for name in others)]
    whole = {name: {stat: model.numbers[stat] for stat in STATS} for name, model in models.items()}
    labels = {stat: f"{stat}{f' ({SIZES[stat]} objects)' if stat in SIZES else ''}" for stat in STATS}
    by_size = Table(
        ["number", *columns], [_row(labels[stat], stat, whole, others) for stat in STATS], "COCO's numbers"
    )
    per_class = {name: model.numbers.get("per_class", {}) for name, model in models.items()}
    counts = _counts(evaluation)
    header = ["class", *(["objects"] if counts else []), *columns]
    rows = []
    for name in per_class[STUDENT]:
        first, *rest = _row(name, name, per_class, others)
        rows.append([first, *([Cell(f"{counts.get(name, 0):,}", counts.get(name, 0))] if counts else []), *rest])
    blocks = [by_size, Table(header, rows, "AP by class")]
    if others:
        blocks.insert(0, _gain_chart(whole, per_class, others[0]))
    return blocks


def _row(label: str, key: str, numbers: dict[str, dict], others: Sequence[str]) -> list[Cell]:
    values = {name: own.get(key, -1) for name, own in numbers.items()}
    cells = [Cell(label)]
    cells += [
        Cell(in_points(v), 100 * v) if v >= 0 else Cell("-") for v in (values[STUDENT], *(values[o] for o in others))
    ]
    for name in others:
        if min(values[STUDENT], values[name]) < 0:
            cells.append(Cell("-"))
            continue
        difference = 100 * (values[STUDENT] - values[name])
        cells.append(Cell(f"{difference:+z.1f}", difference, _mark(difference)))
    return cells


def _gain_chart(whole: dict, per_class: dict, other: str) -> Chart:
    """The differences to one model, by size and by class; of many classes those that differ most."""
    pairs = [(size, whole[STUDENT][stat], whole[other][stat]) for stat, size in SIZES.items()]
    classes = [(name, ap, per_class[other].get(name, -1)) for name, ap in per_class[STUDENT].items()]
    classes = [row for row in classes if min(row[1:]) >= 0]
    most = sorted(classes, key=lambda row: -abs(row[1] - row[2]))[:MOST_CLASSES]
    rows = [row for row in pairs if min(row[1:]) >= 0] + [row for row in classes if row in most]
    differences = [100 * (ours - theirs) for _, ours, theirs in rows]
    series = [Series(f"student minus {other}", [(min(0.0, d), d, d) for d in differences], 1)]
    title = f"AP of the student minus that of the {other}"
    left_out = len(classes) - len(most)
    note = f"{left_out} classes that differ less are in the table alone." if left_out else ""
    return Chart(title, bars([name for name, *_ in rows], series, "points of AP"), note=note, wide=True)


def _counts(evaluation: Evaluation) -> dict[str, int]:
    if STUDENT not in evaluation.seen:
        return {}
    objects = np.concatenate([m.objects for m in evaluation.seen[STUDENT].matches.values()])
    names = evaluation.source.class_names
    return dict(zip(names, np.bincount(objects, minlength=len(names)).tolist(), strict=True))


def _mark(difference: float) -> str:
    return "up" if difference >= 0.05 else "down" if difference <= -0.05 else ""
