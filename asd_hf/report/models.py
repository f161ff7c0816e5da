"""The models of a report on the images of its evaluation: what each finds there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..data import DetectionStream, RowTransform, Source, build_loader, open_source, teacher_view
from ..data.config import DataConfig
from ..detectors.base import DetectorAdapter
from ..errors import UserError
from ..evaluation import STATS, evaluate_detector
from ..evaluation.coco import ImageResult
from ..evaluation.matches import Matches, best_threshold, match
from ..loading import SELF_TAUGHT, load_teacher, prompt_teacher
from .run_files import RunFiles

STUDENT, TEACHER, REFERENCE = "student", "teacher", "reference"
COLOURS = {STUDENT: 1, TEACHER: 0, REFERENCE: 2}  # of `charts`


@dataclass
class Model:
    """What is known of one of the models.

    Attributes:
        numbers: COCO's and "per_class" in 0..1, and "parameters" and "ms_per_image", as far as they are known.
        images: predictions and ground truth by image id; empty where nothing could be evaluated.
        matches: of `images`.
        threshold: score from which its boxes are shown and counted.
    """

    name: str
    numbers: dict[str, Any]
    images: dict[int, ImageResult] = field(default_factory=dict)
    matches: dict[int, Matches] = field(default_factory=dict)
    threshold: float = 1.0

    @property
    def colour(self) -> int:
        return COLOURS[self.name]


@dataclass
class Evaluation:
    """All models of a report, and the data that they were asked about, if it is at hand."""

    models: dict[str, Model]
    source: Source | None = None
    num_images: int | None = None  # of the first of the split, if not all were evaluated
    threshold: float | None = None  # score that was asked for; None: that of each model's best F1

    @property
    def seen(self) -> dict[str, Model]:
        """Those with predictions."""
        return {name: model for name, model in self.models.items() if model.images}


def evaluate_models(
    files: RunFiles,
    reference: RunFiles | None,
    threshold: float | None,
    num_images: int | None,
    notes: list[str],
) -> Evaluation:
    """Asks student, teacher and the student of the reference about the evaluation images.

    What cannot be had, a teacher that is gone, images that have moved, is a line in `notes` and no error.

    Args:
        threshold: score from which boxes count; by default, for each model, that of its best F1 at IoU 0.50.
        num_images: only these many, the first of the split.
    """
    config, found = files.config, Evaluation({}, None, num_images, threshold)
    runs = {STUDENT: files} | ({} if reference is None else {REFERENCE: reference})
    found.models = {name: Model(name, dict(run.metrics.get(run.judged, {}))) for name, run in runs.items()}
    if "teacher" in files.metrics:
        found.models[TEACHER] = Model(TEACHER, dict(files.metrics["teacher"]))
    try:
        found.source = open_source(config.data.source, config.data.eval_split, config.data)
    except UserError as error:
        notes.append(
            f"The evaluation images are not at hand, so there are no pictures, error types or curves of them: {error} "
            "(data.source=DIR says where they are now)."
        )
        return found
    loaders: dict[str, Callable[[], DetectorAdapter]] = {
        name: lambda run=run: load_teacher(str(run.weights), "the student") for name, run in runs.items()
    }
    if config.model.teacher not in (None, SELF_TAUGHT):
        loaders[TEACHER] = lambda: load_teacher(config.model.teacher)
    for name, load in loaders.items():
        run = runs.get(name, files)
        try:
            adapter = load()
            if name == TEACHER:
                prompt_teacher(adapter, found.source.class_names, config.model.class_map)
            class_map = config.model.class_map if name == TEACHER else None
            data = _view(run.config.data, config.data, name)
            numbers, images = _evaluate(adapter, found.source, data, class_map, run, num_images)
        except UserError as error:
            notes.append(f"The {name} could not be asked about the evaluation images: {error}.")
            if name == STUDENT:
                return found
            continue
        model = found.models.setdefault(name, Model(name, {}))
        numbers["parameters"] = sum(p.numel() for p in adapter.model.parameters())
        if not all(key in model.numbers for key in STATS):
            model.numbers = numbers
        model.images = images
        model.matches = {image_id: match(images[image_id]) for image_id in sorted(images)}
        model.threshold = best_threshold(model.matches.values()) if threshold is None else threshold
    return found


def _view(own: DataConfig, data: DataConfig, name: str) -> DataConfig:
    """How a model sees the images: in its own size, and the data of the run that is reported."""
    if name == TEACHER:
        return teacher_view(data)
    sizes = {key: getattr(own, key) for key in ("resize", "eval_size", "max_size", "fixed_size")}
    return replace(data, **sizes, teacher_size=None)


def _evaluate(
    adapter: DetectorAdapter,
    source: Source,
    data: DataConfig,
    class_map: dict[str, str] | None,
    run: RunFiles,
    num_images: int | None,
) -> tuple[dict, dict[int, ImageResult]]:
    args = run.config.training
    stream = DetectionStream(
        source,
        RowTransform(data, training=False),
        batch_size=args.per_device_eval_batch_size,
        num_workers=args.dataloader_num_workers,
        shuffle=False,
        drop_last=False,
        num_rows=data.num_eval_images if num_images is None else num_images,
    )
    loader = build_loader(stream, args.dataloader_num_workers, pin_memory=args.device.type == "cuda")
    adapter.model.to(args.device)
    bf16 = bool(run.training.get("bf16")) and args.device.type == "cuda"
    with torch.autocast(args.device.type, torch.bfloat16, enabled=bf16):
        numbers, evaluator = evaluate_detector(
            adapter, loader, source.class_names, source.category_ids, class_map, device=args.device
        )
    adapter.model.cpu()
    return numbers, evaluator.images


def same_images(files: RunFiles, reference: RunFiles) -> None:
    """Raises a UserError if the two runs were not scored on the same images."""
    ours, theirs = (run.metrics.get("protocol", {}).get("fingerprint") for run in (files, reference))
    if None not in (ours, theirs) and ours != theirs:
        raise UserError(
            f"{files.folder} and {reference.folder} were not scored on the same images (protocol.fingerprint of "
            "metrics.json): they cannot be compared"
        )
