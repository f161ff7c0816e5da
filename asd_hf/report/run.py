"""The report of one run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..files import write_whole
from ..hub import without_folders
from .blocks import Chart, Section
from .charts import scatter
from .commands import next_commands
from .heat import heat_maps
from .mistakes import confusion, errors, precision
from .models import STUDENT, Evaluation, evaluate_models, same_images
from .objects import objects
from .page import render_page
from .pictures import galleries
from .run_files import RunFiles, read_run
from .summary import summary
from .training import training


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
    if not files.metrics and files.steps < files.max_steps:
        notes.insert(
            0, f"The run has not ended: this is its state after {files.steps:,} of {files.max_steps:,} steps."
        )
    sections = [
        Section("summary", "Summary", summary(files, other, evaluation)),
        Section("curves", "Training", training(files, other, evaluation)),
        Section("objects", "Classes and sizes", objects(evaluation), "AP in points, 0 to 100."),
        Section("pictures", "Pictures", galleries(evaluation, num_pictures)),
        Section("errors", "Errors", errors(evaluation)),
        Section("precision", "Precision and recall", precision(evaluation)),
        Section("confusion", "Confusion", confusion(evaluation)),
        Section("sampling", "Sampling", heat_maps(files)),
        Section("speed", "Speed and accuracy", _speed(evaluation, files)),
        Section("next", "Next", [next_commands(files, other, folder)]),
    ]
    for section in sections:
        section.listed = section.title
    title = f"{folder.absolute().name}: {files.method}"
    write_whole(output, render_page(title, _subtitle(files), sections, notes))
    return notes


def _subtitle(files: RunFiles) -> str:
    data, teacher = files.config.data, files.config.model.teacher
    taught = f"taught by {without_folders(teacher)}" if teacher else "on the labels alone"
    return f"A student for {without_folders(data.source)}, {taught}, {files.steps:,} steps"


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
