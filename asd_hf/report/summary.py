"""The top of a run's report: what was trained, by whom, on what, and what came of it."""

from __future__ import annotations

from dataclasses import fields

from ..hub import is_hub_id, without_folders
from ..methods import get_method
from .blocks import Facts, Tiles
from .charts import in_points, number
from .models import REFERENCE, STUDENT, TEACHER, Evaluation
from .papers import paper_link
from .run_files import RunFiles


def summary(files: RunFiles, other: RunFiles | None, evaluation: Evaluation) -> list:
    models = evaluation.models
    student = models[STUDENT].numbers
    tiles = []
    if "AP" in student:
        which = " (moving average)" if files.judged == "ema" else ""
        tiles.append((f"student AP{which}", in_points(student["AP"]), f"AP50 {in_points(student['AP50'])}"))
    for name in (REFERENCE, TEACHER):
        if name in models and "AP" in student and "AP" in models[name].numbers:
            difference = 100 * (student["AP"] - models[name].numbers["AP"])
            tiles.append(
                (f"against the {name}", f"{difference:+.1f}", f"{name} AP {in_points(models[name].numbers['AP'])}")
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
        rows.append((REFERENCE, f"{other.folder.absolute().name}: {other.method}, {other.steps:,} steps", None))
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


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
