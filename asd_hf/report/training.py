"""The course of a training, from its log."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from ..compare.records import GRADIENTS
from .blocks import Chart, Text, legend
from .charts import Series, bars, in_points, lines, number
from .models import TEACHER, Evaluation
from .run_files import RunFiles

MOST_LINES = 7  # of a chart


def training(files: RunFiles, other: RunFiles | None, evaluation: Evaluation) -> list:
    blocks = []
    step = "training steps"
    ap = []
    for key, colour in (("eval_AP", 1), ("eval_ema_AP", 5), ("eval_AP50", 3), ("eval_AP75", 4)):
        if points := files.curve(key):
            ap.append(Series(key.removeprefix("eval_").replace("ema_AP", "AP of the moving average"), points, colour))
    if other is not None and (points := other.curve("eval_AP")):
        ap.append(Series("AP of the reference", points, 2))
    if ap:
        ap = [Series(s.name, [(x, 100 * y) for x, y in s.points], s.colour) for s in ap]
        blocks.append(_line_chart("AP", ap, step, "points", zero=True))
        if TEACHER in evaluation.models and "AP" in evaluation.models[TEACHER].numbers:
            blocks[-1].note = f"The teacher's AP is {in_points(evaluation.models[TEACHER].numbers['AP'])}."
    terms = sorted({key for entry in files.log for key in entry if key.startswith("loss/")})
    own = [
        key for key in terms if any(key.startswith(f"loss/{name.rpartition(':')[2]}") for name in files.config.methods)
    ]
    own = own or [key for key in terms if not key.startswith("loss/loss_")]
    groups = {
        "Loss": ["loss"],
        "Terms of the detection loss": [key for key in terms if key not in own],
        "Terms of the distillation": own,
        "Learning rate": ["learning_rate"],
        "Gradient norm before clipping": ["grad_norm"],
        "Gradient: share of the distillation": [GRADIENTS[0]],
        "Gradient: cosine of labels and teacher": [GRADIENTS[1]],
    }
    for title, keys in groups.items():
        series = _log_series(files, keys)
        if title == "Loss" and other is not None:
            series += [Series("loss of the reference", other.curve("loss"), 2)] if other.curve("loss") else []
        for part in range(0, len(series), MOST_LINES):
            many = title if len(series) <= MOST_LINES else f"{title} ({part // MOST_LINES + 1})"
            shown = series[part : part + MOST_LINES]
            low = min(y for s in shown for _, y in s.points)
            log = title != "Learning rate" and low > 0 and max(y for s in shown for _, y in s.points) > 20 * low
            blocks.append(_line_chart(many, shown, step, "log scale" if log else "", log=log))
            if title == "Loss" and other is not None and other.config.methods != files.config.methods:
                blocks[-1].note = "The two sum up other terms: only their courses can be compared."
    statistics = sorted({key for e in files.log for key in e if "/" in key and key not in terms})
    for key in statistics:
        blocks.append(_line_chart(key, _log_series(files, [key]), step, "", zero=True))
    blocks += _phases(files)
    if not files.log:
        blocks.append(Text("There is no log: the run was made before logs were kept, or wrote no checkpoint."))
    return blocks


def _log_series(files: RunFiles, keys: Sequence[str]) -> list[Series]:
    found = [(key.removeprefix("loss/"), files.curve(key)) for key in keys]
    return [Series(name, points, i + 1) for i, (name, points) in enumerate((n, p) for n, p in found if p)]


def _line_chart(title: str, series: list[Series], x: str, y: str, **options) -> Chart:
    ends = [number(s.points[-1][1]) for s in series]
    entries = legend(series, ends)
    if len(series) == 1:
        entries = [entries[0]._replace(name="at the end")]
    return Chart(title, lines(series, x, y, **options), entries)


def _phases(files: RunFiles) -> list:
    """Where the time of a step goes, from `training.log_phases`."""
    entries = [entry for entry in files.log if "step_runtime" in entry][1:] or files.log
    means = {
        key.removesuffix("_runtime").replace("_", " "): 1000 * fmean(e[key] for e in entries if key in e)
        for key in sorted({key for entry in entries for key in entry if key.endswith("_runtime")})
        if not key.startswith(("eval_", "train_")) and any(key in e for e in entries)
    }
    step = means.pop("step", None)
    if step is None:
        return []
    note = f"A step takes {number(step)} ms, mean over the log without its first entry."
    if means.keys() == {"data"}:
        return [
            Text(f"{note} {number(means['data'])} ms of it wait for data. training.log_phases=true logs all phases.")
        ]
    names = sorted(means, key=means.get, reverse=True)
    series = [Series("ms", [(0.0, means[name], means[name]) for name in names], 1)]
    return [Chart("Phases of a step", bars(names, series, "ms"), note=note)]
