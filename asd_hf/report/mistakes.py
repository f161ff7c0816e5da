"""Where the models are wrong: kinds of errors, precision against recall, classes that are confused."""

from __future__ import annotations

import numpy as np

from ..evaluation.bootstrap import RECALLS
from ..evaluation.confusion import confusion_matrix
from ..evaluation.errors import KINDS, error_kinds
from ..evaluation.matches import IOUS, match, precision_curves
from .blocks import Cell, Chart, Facts, Table, legend
from .charts import Series, bars, lines
from .models import STUDENT, Evaluation

MOST_CONFUSED = 20  # classes in the confusion matrix
SHOWN_IOUS = (0.5, 0.75)


def errors(evaluation: Evaluation) -> list:
    if not evaluation.seen:
        return []
    num_classes = len(evaluation.source.class_names)
    kinds = {name: error_kinds(model.matches.values(), num_classes) for name, model in evaluation.seen.items()}
    series = [
        Series(
            name, [(0.0, 100 * own[kind].gain, 100 * own[kind].gain) for kind in KINDS], evaluation.seen[name].colour
        )
        for name, own in kinds.items()
    ]
    chart = Chart(
        "What mending one kind of error alone would add to AP50",
        bars(list(KINDS), series, "points of AP50"),
        legend(series),
        "After TIDE (Bolya et al., ECCV 2020). All detections count, whatever their score, as in AP.",
        wide=True,
    )
    header = ["error", *(text for name in kinds for text in (f"{name}: count", f"{name}: dAP50"))]
    rows = [
        [
            Cell(kind),
            *(
                cell
                for own in kinds.values()
                for cell in (
                    Cell(f"{own[kind].count:,}", own[kind].count),
                    Cell(f"{100 * own[kind].gain:.1f}", 100 * own[kind].gain),
                )
            ),
        ]
        for kind in KINDS
    ]
    return [chart, Facts([(kind, what, None) for kind, what in KINDS.items()]), Table(header, rows)]


def precision(evaluation: Evaluation) -> list:
    if not evaluation.seen:
        return []
    num_classes = len(evaluation.source.class_names)
    curves = {name: precision_curves(m.matches.values(), num_classes) for name, m in evaluation.seen.items()}
    blocks = []
    for iou in SHOWN_IOUS:
        level = int(np.argmin(abs(IOUS - iou)))
        series, areas = [], []
        for name, own in curves.items():
            mean = np.nanmean(own[level], 0)
            series.append(
                Series(name, list(zip(RECALLS.tolist(), mean.tolist(), strict=True)), evaluation.seen[name].colour)
            )
            areas.append(f"AP{100 * iou:.0f} {100 * mean.mean():.1f}")
        svg = lines(series, "recall", "precision", zero=True)
        blocks.append(Chart(f"IoU {iou:.2f}, mean over classes", svg, legend(series, areas)))
    return blocks


def confusion(evaluation: Evaluation) -> list:
    if STUDENT not in evaluation.seen:
        return []
    student, names = evaluation.seen[STUDENT], evaluation.source.class_names
    kept = [match(image, IOUS[:1], student.threshold) for image in student.images.values()]
    counts = confusion_matrix(kept, len(names))
    wrong = counts - np.diag(np.diag(counts))
    classes = np.argsort(-(wrong.sum(0) + wrong.sum(1))[:-1], kind="stable")[:MOST_CONFUSED]
    shown = [*sorted(classes.tolist()), len(names)]
    totals = counts.sum(1)
    rows = []
    for row in shown:
        name = "nothing" if row == len(names) else names[row]
        cells = [Cell(name)]
        for column in shown:
            share = 0.0 if row == len(names) else counts[row, column] / max(totals[row], 1)
            blank = row == column == len(names)
            cells.append(Cell("" if blank else f"{counts[row, column]:,}", None, "", None, share))
        rows.append(cells)
    left_out = len(names) + 1 - len(shown)
    why = "as asked for" if evaluation.threshold is not None else "where its F1 is best"
    note = (
        f"Rows: the class of the object; columns: the class of the student's box, from score {student.threshold:.2f} "
        f"on ({why}), at IoU 0.50. Shade: share of the row. The last row counts boxes where nothing is, the "
        "last column objects without a box."
    )
    if left_out:
        note += f" {left_out} classes that are confused less are left out."
    header = ["object \\ box", *("nothing" if c == len(names) else names[c] for c in shown)]
    return [Table(header, rows, note=note, matrix=True)]
