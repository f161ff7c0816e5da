"""Draws the figures of README.md and how_it_works.md, after `make quickstart` and the same without a teacher:

    python docs/figures.py outputs/quickstart outputs/quickstart_none

One is a drawing; the others show the packaged teacher and the students as they are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle

from asd_hf.data import DataConfig, DetectionStream, RowTransform, open_source
from asd_hf.detectors.base import DetectorAdapter
from asd_hf.distances import pair_distances
from asd_hf.loading import load_teacher
from asd_hf.matching import match_sets
from asd_hf.methods.balanced_pairs import balance
from asd_hf.sampling import Sampler

IMAGES = Path(__file__).parent / "images"
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#F0E442")  # of the classes
COLUMNS, THRESHOLD = 8, 0.3
SAMPLER_STEPS = 400
IMAGE = 3  # of the evaluation split
Predictions = tuple[torch.Tensor, torch.Tensor]  # logits (N, Q, C), boxes (N, Q, 4)


def flow() -> Figure:
    """What happens in a step of active sampling distillation, after the paper's Figure 2."""
    figure = Figure((10, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 100), ylim=(0, 46))
    axes.axis("off")

    def box(x: float, y: float, text: str, colour: str, width: float = 16) -> None:
        axes.add_patch(
            FancyBboxPatch((x, y), width, 8, boxstyle="round,pad=0.6", facecolor=colour + "22", edgecolor=colour)
        )
        axes.text(x + width / 2, y + 4, text, ha="center", va="center", fontsize=9)

    def arrow(*points: tuple[float, float], text: str = "", colour: str = GREY) -> None:
        for start, end in zip(points, points[1:], strict=False):
            style = "-|>" if end == points[-1] else "-"
            axes.add_patch(
                FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=12, color=colour, shrinkA=0, shrinkB=0)
            )
        if text:
            (x0, y0), (x1, y1) = points[-2:]
            axes.text((x0 + x1) / 2, (y0 + y1) / 2 + 1, text, ha="center", va="bottom", fontsize=8, color=colour)

    box(1, 33, "teacher\n(frozen)", BLUE, 12)
    box(1, 5, "student", ORANGE, 12)
    box(22, 33, "predictions\nboxes, classes", BLUE)
    box(22, 5, "predictions\nboxes, classes", ORANGE)
    box(47, 19, "sampler: two MLPs\nattention, temperature T", GREEN, 19)
    box(74, 33, "samples\n$W_t$ · predictions", BLUE, 15)
    box(74, 5, "samples\n$W_s$ · predictions", ORANGE, 15)
    axes.text(96.5, 23, "L1 + KL\n(Eq. 17)", ha="center", va="center", fontsize=9)
    arrow((14, 37), (21, 37))
    arrow((14, 9), (21, 9))
    arrow((39, 39), (73, 39))
    arrow((39, 7), (73, 7))
    arrow((39, 35), (52, 35), (52, 28))
    axes.text(45, 35.6, "points, keys", ha="center", fontsize=8, color=BLUE)
    arrow((39, 11), (52, 11), (52, 18))
    axes.text(45, 11.6, "keys", ha="center", fontsize=8, color=ORANGE)
    arrow((61, 28), (61, 36), (73, 36))
    axes.text(66, 33.4, "$W_t$", ha="center", fontsize=9, color=GREEN)
    arrow((61, 18), (61, 10), (73, 10))
    axes.text(66, 11, "$W_s$", ha="center", fontsize=9, color=GREEN)
    arrow((90, 37), (96.5, 37), (96.5, 27))
    arrow((90, 9), (96.5, 9), (96.5, 19))
    return figure


def pairs(student: DetectorAdapter, teacher: DetectorAdapter) -> Figure:
    """Who is compared with whom on one image: by matching, by active sampling, by balanced pairs."""
    batch = _batch()
    ours, theirs = _predict(student, batch), _predict(teacher, batch)
    classes, l1, giou = pair_distances(ours, theirs, softmax=False)
    cost = (classes + 5 * l1 + 2 * giou)[IMAGE]
    hungarian = torch.zeros_like(cost)
    rows, columns = match_sets(cost)
    hungarian[rows, columns] = 1
    scores = _trained_scores(ours, theirs)
    weights = {
        "Hungarian matching": hungarian,
        "active sampling, T = 1": scores.softmax(-1),
        "active sampling, T = 4": (scores / 4).softmax(-1),
        "balanced_pairs": balance(-cost[None] / 0.3, 20)[0],
    }
    best = theirs[0][IMAGE].sigmoid().amax(-1)
    order = best.argsort(descending=True)
    partner = hungarian.argmax(-1)[order]  # columns follow their Hungarian partners
    others = [i for i in range(cost.shape[1]) if i not in set(partner.tolist())]
    columns = torch.cat([partner, torch.tensor(others, dtype=torch.long)])
    figure = Figure((12.5, 2.9), layout="constrained")
    picture, *panels = figure.subplots(1, 1 + len(weights))
    _draw_image(
        picture,
        batch["pixel_values"][IMAGE],
        theirs[1][IMAGE][best > 0.4],
        ours[1][IMAGE][ours[0][IMAGE].sigmoid().amax(-1) > 0.3],
    )
    for axes, (name, matrix) in zip(panels, weights.items(), strict=True):
        shown = axes.imshow(matrix[order][:, columns].clamp(0, 1), cmap="viridis", vmin=0, vmax=1)
        axes.axhline(int((best > 0.4).sum()) - 0.5, color="white", linewidth=1, linestyle=":")
        axes.set_title(name, fontsize=10)
        axes.set(xticks=[], yticks=[], xlabel="student's queries")
    panels[0].set_ylabel("teacher's queries, surest first")
    figure.colorbar(shown, ax=panels, label="weight", shrink=0.9, pad=0.01)
    return figure


def results(detectors: dict[str, DetectorAdapter]) -> Figure:
    """The labels of some images, and below them what each detector finds there."""
    batch, names = _batch(), next(iter(detectors.values())).spec.class_names
    labels = [values.split(counts) for values, counts in map(batch["labels"].get, ("class_labels", "boxes"))]
    found = {"labels": list(zip(*labels, strict=True))}
    for title, detector in detectors.items():
        logits, boxes = _predict(detector, batch)
        scores, classes = logits.sigmoid().max(-1)
        sure = scores > THRESHOLD
        found[title] = [(classes[i][sure[i]], boxes[i][sure[i]]) for i in range(len(boxes))]
    figure = Figure((10, 1.45 * len(found)), layout="constrained")
    grid = figure.subplots(len(found), COLUMNS)
    for row, (title, answers) in zip(grid, found.items(), strict=True):
        for axes, pixels, (classes, boxes) in zip(row, batch["pixel_values"], answers, strict=False):
            axes.imshow(pixels.permute(1, 2, 0))
            axes.set(xticks=[], yticks=[])
            for (cx, cy, w, h), index in zip((boxes * pixels.shape[1]).tolist(), classes.tolist(), strict=True):
                style = {"fill": False, "edgecolor": COLOURS[index], "linewidth": 1.8}
                axes.add_patch(Rectangle((cx - w / 2, cy - h / 2), w, h, **style))
        row[0].set_ylabel(title, fontsize=9)
    handles = [Patch(facecolor=colour, label=name) for name, colour in zip(names, COLOURS, strict=False)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), fontsize=9, frameon=False)
    return figure


def _batch() -> dict:
    data = DataConfig(source="shapes", resize="fixed", fixed_size=[64, 64], augmentation="flip")
    rows = RowTransform(data, training=False)
    return next(iter(DetectionStream(open_source("shapes", "val", data), rows, batch_size=64, shuffle=False)))


@torch.no_grad()
def _predict(adapter: DetectorAdapter, batch: dict) -> Predictions:
    adapter.model.eval()
    output = adapter(batch["pixel_values"], batch["pixel_mask"])
    return output.logits[-1], output.boxes[-1]


def _trained_scores(ours: Predictions, theirs: Predictions) -> torch.Tensor:
    """Scores (T, S) on `IMAGE` of a sampler that has learnt on the teacher's predictions to find each one (Eq. 16)."""
    torch.manual_seed(0)
    points, keys = (torch.cat([boxes, logits.sigmoid()], -1) for logits, boxes in (theirs, ours))
    sampler = Sampler(points.shape[-1])
    optimizer = torch.optim.AdamW(sampler.parameters(), lr=1e-3)
    for _ in range(SAMPLER_STEPS):
        own = sampler(points, points)[:, 0].log_softmax(-1).diagonal(dim1=1, dim2=2)
        optimizer.zero_grad()
        (-own.mean()).backward()
        optimizer.step()
    return sampler(points, keys).detach()[IMAGE, 0]


def _draw_image(axes: Axes, pixels: torch.Tensor, teacher: torch.Tensor, student: torch.Tensor) -> None:
    axes.imshow(pixels.permute(1, 2, 0))
    height, width = pixels.shape[1:]
    for boxes, colour, style in ((teacher, BLUE, "-"), (student, ORANGE, "--")):
        for cx, cy, w, h in (boxes * torch.tensor([width, height, width, height])).tolist():
            axes.add_patch(
                Rectangle((cx - w / 2, cy - h / 2), w, h, fill=False, edgecolor=colour, linewidth=1.8, linestyle=style)
            )
    axes.set(xticks=[], yticks=[])
    axes.set_title("teacher —, student - -", fontsize=10)


def _title(what: str, metrics: dict[str, float]) -> str:
    return f"{what}\nAP {100 * metrics['AP']:.1f}"


if __name__ == "__main__":
    taught, alone = (Path(run) for run in sys.argv[1:])
    teacher, student = load_teacher("shapes"), load_teacher(str(taught))
    metrics, without = (json.loads((run / "metrics.json").read_text()) for run in (taught, alone))
    detectors = {
        _title("teacher", metrics["teacher"]): teacher,
        _title("student, taught", metrics["student"]): student,
        _title("student, alone", without["student"]): load_teacher(str(alone)),
    }
    IMAGES.mkdir(exist_ok=True)
    figures = {"flow.png": flow(), "pairs.png": pairs(student, teacher), "results.jpg": results(detectors)}
    for name, figure in figures.items():
        FigureCanvasAgg(figure).print_figure(IMAGES / name, dpi=110)
