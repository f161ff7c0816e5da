"""What to do next with a run."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..config import NO_METHOD
from ..hub import without_folders
from ..loading import SELF_TAUGHT
from .blocks import Commands
from .run_files import RunFiles


def next_commands(files: RunFiles, other: RunFiles | None, folder: Path) -> Commands:
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
