"""The report of one run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from statistics import fmean

import numpy as np

from ..compare.records import GRADIENTS, SIZES
from ..config import NO_METHOD
from ..evaluation import STATS
from ..evaluation.bootstrap import RECALLS
from ..evaluation.confusion import confusion_matrix
from ..evaluation.errors import KINDS, error_kinds
from ..evaluation.matches import IOUS, match, precision_curves
from ..files import write_whole
from ..hub import is_hub_id, without_folders
from ..methods import get_method
from ..student import SELF_TAUGHT
from .blocks import Cell, Chart, Commands, Facts, Section, Table, Text, Tiles, legend
from .charts import Series, bars, lines, number, scatter
from .heat import heat_maps
from .models import REFERENCE, STUDENT, TEACHER, Evaluation, Model, evaluate_models, same_images
from .page import render_page
from .papers import paper_link
from .pictures import galleries
from .run_files import RunFiles, read_run

MOST_CONFUSED = 20  # classes in the confusion matrix
MOST_LINES = 7
SHOWN_IOUS = (0.5, 0.75)
NAMES = {"AP": "AP", "AP50": "AP50", "AP75": "AP75"}


def report_run(
    folder: Path,
    output: Path,
    reference: Path | None = None,
    threshold: float | None = None,
    num_images: int | None = None,
    num_pictures: int = 4,
    overrides: Sequence[str] = (),
) -> list[str]:
    """Writes the report of a run.

    Args:
        folder: of the run.
        output: the HTML file.
        reference: folder of another run on the same data, say one without distillation.
        threshold, num_images: see `evaluate_models`.
        num_pictures: images that improved most, and as many that worsened most.
        overrides: `section.key=value` in place of what the run had.

    Returns:
        what is missing in it, and why.

    Raises:
        UserError: a folder holds no run, or the two were not scored on the same images.
    """
    files = read_run(folder, list(overrides))
    other = None if reference is None else read_run(reference)
    if other is not None:
        same_images(files, other)
    notes: list[str] = []
    evaluation = evaluate_models(files, other, threshold, num_images, notes)
    if files.steps < files.max_steps:
        notes.insert(
            0, f"The run has not ended: this is its state after {files.steps:,} of {files.max_steps:,} steps."
        )
    sections = [
        Section("summary", "Summary", _summary(files, other, evaluation)),
        Section("curves", "Training", _curves(files, other, evaluation)),
        Section("objects", "Classes and sizes", _objects(evaluation), "AP in points, 0 to 100."),
        Section("pictures", "Pictures", galleries(evaluation, num_pictures)),
        Section("errors", "Errors", _errors(evaluation)),
        Section("precision", "Precision and recall", _precision(evaluation)),
        Section("confusion", "Confusion", _confusion(evaluation)),
        Section("sampling", "Sampling", heat_maps(files)),
        Section("speed", "Speed and accuracy", _speed(evaluation, files)),
        Section("next", "Next", [_next(files, other, folder)]),
    ]
    for section in sections:
        section.listed = section.title
    title = f"{folder.absolute().name}: {_method(files)}"
    write_whole(output, render_page(title, _subtitle(files), sections, notes))
    return notes


def _method(files: RunFiles) -> str:
    name = files.config.method_name
    return "no distillation" if name == NO_METHOD else name


def _subtitle(files: RunFiles) -> str:
    data, teacher = files.config.data, files.config.model.teacher
    taught = f"taught by {without_folders(teacher)}" if teacher else "on the labels alone"
    return f"A student for {without_folders(data.source)}, {taught}, {files.steps:,} steps"


# -- summary ----------------------------------------------------------------------------------------------------------


def _summary(files: RunFiles, other: RunFiles | None, evaluation: Evaluation) -> list:
    models = evaluation.models
    student = models[STUDENT].numbers
    tiles = []
    if "AP" in student:
        which = " (moving average)" if files.judged == "ema" else ""
        tiles.append((f"student AP{which}", _points(student["AP"]), f"AP50 {_points(student['AP50'])}"))
    for name in (REFERENCE, TEACHER):
        if name in models and "AP" in student and "AP" in models[name].numbers:
            difference = 100 * (student["AP"] - models[name].numbers["AP"])
            tiles.append(
                (f"against the {name}", f"{difference:+.1f}", f"{name} AP {_points(models[name].numbers['AP'])}")
            )
    if TEACHER in models and {"parameters"} <= student.keys() & models[TEACHER].numbers.keys():
        share = student["parameters"] / models[TEACHER].numbers["parameters"]
        remark = f"{student['parameters'] / 1e6:.1f}M of {models[TEACHER].numbers['parameters'] / 1e6:.1f}M"
        tiles.append(("of the teacher's parameters", f"{100 * share:.0f} %", remark))
    if files.seconds:
        per_step = 1000 * files.seconds / max(files.steps, 1)
        tiles.append(("training", _duration(files.seconds), f"{number(per_step)} ms a step, without evaluations"))
    return [Tiles(tiles), Facts(_facts(files, other, evaluation))]


def _facts(files: RunFiles, other: RunFiles | None, evaluation: Evaluation) -> list[tuple[str, str, str | None]]:
    config, metrics, training = files.config, files.metrics, files.training
    protocol, environment = metrics.get("protocol", {}), metrics.get("environment", {})
    student = evaluation.models[STUDENT].numbers
    rows = [("student", _student(files, student), None)]
    if teacher := config.model.teacher:
        link = f"https://huggingface.co/{teacher}" if is_hub_id(teacher) else None
        rows.append(("teacher", _teacher(files, evaluation), link))
    for name, method in config.methods.items():
        paper = get_method(name).paper
        default = type(method)()
        changed = [
            f"{spec.name}={value}"
            for spec in fields(method)
            if (value := getattr(method, spec.name)) != getattr(default, spec.name)
        ]
        text = name + (f" ({', '.join(changed)})" if changed else " (all options at their defaults)")
        rows.append(("method", text, None))
        if paper:
            rows.append(("paper", f"{paper['title']} ({paper['id']})", paper_link(paper["id"])))
    data = config.data
    images = protocol.get("num_images") or len(evaluation.models[STUDENT].images) or None
    splits = f"trained on {data.train_split or 'unlabelled images'}, evaluated on {data.eval_split}"
    rows.append(("data", f"{without_folders(data.source)}: {splits}{f', {images:,} images' if images else ''}", None))
    if evaluation.num_images is not None:
        rows.append(
            ("of these", f"the first {evaluation.num_images:,} images for all but the AP of whole tables", None)
        )
    if other is not None:
        rows.append((REFERENCE, f"{other.folder.absolute().name}: {_method(other)}, {other.steps:,} steps", None))
    given = (
        "learning_rate",
        "per_device_train_batch_size",
        "lr_scheduler_type",
        "warmup_steps",
        "bf16",
        "ema_decay",
        "seed",
    )
    shown = {key: training[key] for key in given if key in training}
    settings = ", ".join(f"{key} {f'{v:g}' if isinstance(v, float) else v}" for key, v in shown.items())
    rows.append(("training", f"{files.steps:,} steps" + (f": {settings}" if settings else ""), None))
    if environment:
        versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
        rows.append(("device", environment["device"], None))
        rows.append(("versions", versions, None))
    return rows


def _student(files: RunFiles, numbers: dict) -> str:
    size = f", {numbers['parameters'] / 1e6:.2f}M parameters" if "parameters" in numbers else ""
    student = files.config.model.student
    if isinstance(student, str) or student.checkpoint:
        return f"{without_folders(student if isinstance(student, str) else student.checkpoint)}{size}"
    built = {
        "backbone": student.backbone,
        "encoder layers": student.encoder_layers,
        "decoder layers": student.decoder_layers,
        "queries": student.num_queries,
        "width": student.d_model,
    }
    changes = "".join(f", {key} {value}" for key, value in built.items() if value is not None)
    base = "the teacher's architecture" if student.base == "teacher" else without_folders(student.base)
    return f"{base}{changes}{', with weights of the teacher' if student.copy_weights else ''}{size}"


def _teacher(files: RunFiles, evaluation: Evaluation) -> str:
    text = without_folders(files.config.model.teacher)
    numbers = evaluation.models[TEACHER].numbers if TEACHER in evaluation.models else {}
    if "parameters" in numbers:
        text += f", {numbers['parameters'] / 1e6:.2f}M parameters"
    if files.config.model.teacher_cache:
        text += ", its predictions from disk"
    return text


# -- training ---------------------------------------------------------------------------------------------------------


def _curves(files: RunFiles, other: RunFiles | None, evaluation: Evaluation) -> list:
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
            blocks[-1].note = f"The teacher's AP is {_points(evaluation.models[TEACHER].numbers['AP'])}."
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


# -- classes and sizes ------------------------------------------------------------------------------------------------


def _objects(evaluation: Evaluation) -> list:
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
        Cell(_points(v), 100 * v) if v >= 0 else Cell("-") for v in (values[STUDENT], *(values[o] for o in others))
    ]
    for name in others:
        if min(values[STUDENT], values[name]) < 0:
            cells.append(Cell("-"))
            continue
        difference = 100 * (values[STUDENT] - values[name])
        cells.append(Cell(f"{difference:+.1f}", difference, _mark(difference)))
    return cells


def _gain_chart(whole: dict, per_class: dict, other: str) -> Chart:
    """The differences to one model, by size and by class; of many classes those that differ most."""
    pairs = [(size, whole[STUDENT][stat], whole[other][stat]) for stat, size in SIZES.items()]
    classes = [(name, ap, per_class[other].get(name, -1)) for name, ap in per_class[STUDENT].items()]
    classes = [row for row in classes if min(row[1:]) >= 0]
    most = sorted(classes, key=lambda row: -abs(row[1] - row[2]))[:12]
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


# -- errors, precision, confusion -------------------------------------------------------------------------------------


def _errors(evaluation: Evaluation) -> list:
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


def _precision(evaluation: Evaluation) -> list:
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


def _confusion(evaluation: Evaluation) -> list:
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
    note = (
        f"Rows: the class of the object; columns: the class of the student's box, from score {student.threshold:.2f} "
        f"on ({_why(student)}), at IoU 0.50. Shade: share of the row. The last row counts boxes where nothing is, the "
        "last column objects without a box."
    )
    if left_out:
        note += f" {left_out} classes that are confused less are left out."
    header = ["object \\ box", *("nothing" if c == len(names) else names[c] for c in shown)]
    return [Table(header, rows, note=note, matrix=True)]


def _why(student: Model) -> str:
    return (
        "where its F1 is best"
        if any(student.threshold in m.scores for m in student.matches.values())
        else "as asked for"
    )


# -- speed, next ------------------------------------------------------------------------------------------------------


def _speed(evaluation: Evaluation, files: RunFiles) -> list:
    timed = {n: m for n, m in evaluation.models.items() if {"AP", "ms_per_image"} <= m.numbers.keys()}
    if STUDENT not in timed:
        return []
    points = [
        (name, m.colour, m.numbers["ms_per_image"], 100 * m.numbers["AP"], 0.0, 0.0) for name, m in timed.items()
    ]
    device = files.metrics.get("environment", {}).get("device", "the training's device")
    note = f"One image at a time on {device}, as measured at the end of each run: the median of 20 passes."
    return [Chart("AP against the time of an image", scatter(points, "ms an image", "AP"), note=note, wide=True)]


def _next(files: RunFiles, other: RunFiles | None, folder: Path) -> Commands:
    run, data = shlex.quote(str(folder)), files.config.data
    source = data.source if not Path(data.source).is_absolute() else without_folders(data.source)
    config = shlex.quote(str(folder / "asd_hf.yaml"))
    rows = []
    if not files.metrics:
        rows.append(
            ("Go on with the training", f"asd-hf train --config {config} training.resume_from_checkpoint=true")
        )
    rows.append(
        (
            "Score it on other data",
            f"asd-hf evaluate --model {run} --data {shlex.quote(source)} --split {shlex.quote(data.eval_split)}",
        )
    )
    if files.config.methods:
        if other is None and (overrides := _without_teacher(files)):
            rows.append(
                (
                    "Train the same student without a teacher, and show both",
                    f"asd-hf train --config {config} {overrides} training.output_dir={run}_none\n"
                    f"asd-hf report {run} --reference {run}_none",
                )
            )
        methods = shlex.quote(",".join([NO_METHOD, *files.config.methods]))
        rows.append(
            (
                "Is the difference more than chance? Several seeds, with intervals",
                f"asd-hf compare --config {config} --methods {methods} --seeds 1,2,3",
            )
        )
    rows.append(
        (
            "Use it in Python",
            f'from transformers import pipeline\n\ndetect = pipeline("object-detection", model={str(folder)!r})',
        )
    )
    return Commands(rows)


def _without_teacher(files: RunFiles) -> str | None:
    """What makes the configuration that of the same student alone; None if its first weights are the teacher's."""
    model, data = files.config.model, files.config.data
    changes = {"model.teacher": "null", "method": NO_METHOD}
    if not isinstance(model.student, str):
        if model.student.copy_weights or (model.student.base == "teacher" and model.teacher == SELF_TAUGHT):
            return None
        if model.student.base == "teacher" and model.student.checkpoint is None:
            changes["model.student.base"] = model.teacher
    changes |= {"model.teacher_cache": "null"} if model.teacher_cache else {}
    changes |= {"model.class_map": "{}"} if model.class_map else {}
    changes |= {f"data.{key}": "null" for key in ("unlabelled", "teacher_size") if getattr(data, key)}
    return " ".join(shlex.quote(f"{key}={value}") for key, value in changes.items())


def _points(value: float) -> str:
    return f"{100 * value:.1f}" if value >= 0 else "-"


def _mark(difference: float) -> str:
    return "up" if difference >= 0.05 else "down" if difference <= -0.05 else ""


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
