"""The sampling matrices of one image while a method trains, kept small for the report of the run."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from .classes import SharedClasses
from .data import DetectionStream, RowTransform, collate, teacher_view
from .data.rows import read_rows
from .detectors.base import DetectorAdapter, DetectorOutput
from .files import written_beside
from .methods import CombinedMethod, DistillationMethod
from .methods.base import name_of
from .questions import point_scores

logger = logging.getLogger(__name__)

FOLDER = "_matrices"  # of the output folder; the underscore keeps it off the Hub
MOST_POINTS = 100  # of those that the teacher rates highest
MOST_ROWS = 100  # looked through for an image with objects


class MatrixRecorder(TrainerCallback):
    """Writes `DistillationMethod.matrices` of an evaluation image at the first step, at evaluations and at the end.

    It costs one forward pass of both models, on rank 0, outside the steps. The image is the first of the split that
    shows an object. A file a step holds "<method>/<whose queries>", float16 (P, Q), and "scores" (P,): the points are
    the teacher's best queries, the best first.

    Args:
        student, teacher: both in the classes of their own.
        stream: of evaluation.
    """

    def __init__(
        self,
        student: DetectorAdapter,
        teacher: DetectorAdapter,
        classes: SharedClasses,
        method: DistillationMethod | CombinedMethod,
        stream: DetectionStream,
    ) -> None:
        self.student, self.teacher, self.classes, self.method = student, teacher, classes, method
        self.stream = stream
        self.views: list[dict] | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 0:
            self._record(args, state)

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        self._record(args, state)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._record(args, state)

    def _record(self, args, state) -> None:
        if not args.should_save:
            return
        training = self.student.model.training
        self.student.model.eval()
        found = self.matrices(args.device)
        self.student.model.train(training)
        file = Path(args.output_dir) / FOLDER / f"step-{state.global_step}.safetensors"
        if found:
            try:
                with written_beside(file) as beside:
                    save_file(found, beside)
            except (OSError, SafetensorError) as error:  # a training must not end for it
                logger.warning("%s could not be written: %s", file, error)

    @torch.no_grad()
    def matrices(self, device: torch.device) -> dict[str, Tensor]:
        """What a file holds; empty where no image shows an object."""
        if self.views is None:
            self.views = self._read()
        if not self.views:
            return {}
        student, teacher = (
            adapter(view["pixel_values"].to(device), view["pixel_mask"].to(device))
            for adapter, view in zip((self.student, self.teacher), self.views, strict=True)
        )
        outputs = self.classes.student(student), self.classes.teacher(teacher)
        return small_matrices(self.method, *outputs, softmax=self.student.spec.activation == "softmax")

    def _read(self) -> list[dict]:
        """The image as the student and as the teacher sees it."""
        rows = islice(read_rows(self.stream.source.stream), MOST_ROWS)
        row = next((row for row in rows if row["objects"] and row["objects"]["bbox"]), None)
        own = self.stream.transform
        views = own, RowTransform(teacher_view(own.config), training=False)  # of which only the pixels are read
        # Twice: group norm refuses a single cell of a single image, as small images have at the coarsest level.
        return [] if row is None else [collate([view(row)] * 2) for view in views]


def has_matrices(method: DistillationMethod | CombinedMethod) -> bool:
    return any(type(own).matrices is not DistillationMethod.matrices for own in _parts(method))


def small_matrices(
    method: DistillationMethod | CombinedMethod, student: DetectorOutput, teacher: DetectorOutput, softmax: bool
) -> dict[str, Tensor]:
    """The `matrices` of the first image at the teacher's best queries, and their "scores"; empty if there are none.

    Args:
        student, teacher: as a method sees them.
        softmax: their kind of head.
    """
    parts = _parts(method)
    found = {f"{name_of(own)}/{who}": w[0] for own in parts for who, w in own.matrices(student, teacher).items()}
    if not found:
        return {}
    scores = point_scores(teacher.logits[-1, 0], softmax)
    scores, best = scores.topk(min(MOST_POINTS, len(scores)))
    return {"scores": scores.float().cpu()} | {name: w[best].half().cpu() for name, w in found.items()}


def _parts(method: DistillationMethod | CombinedMethod) -> list[DistillationMethod]:
    return method.methods if isinstance(method, CombinedMethod) else [method]
