"""All that is trained, as one module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .classes import SharedClasses
from .criterion import DetectionCriterion, TransformersCriterion
from .detectors.base import DetectorAdapter, DetectorOutput, Question
from .errors import UserError
from .methods import CombinedMethod, DistillationMethod
from .phases import phase


@dataclass
class DistillerOutput(ModelOutput):
    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None  # named, weighted scalars; `loss` is their sum
    gradient_norms: dict[str, Tensor] | None = None  # see `Distiller.forward`
    gradient_cosine: Tensor | None = None  # between those of "detection" and "distillation"


class Distiller(nn.Module):
    """Student and method. The teacher is no part of it, so it is never trained, synchronised or saved.

    DDP, gradient accumulation, autocast and the optimizer each take one module. Parameters of a method that merely
    join the optimizer are averaged by nobody and drift apart between ranks.
    """

    accepts_loss_kwargs = False  # the losses are means over a batch: Trainer must divide by the accumulation steps
    main_input_name = "pixel_values"

    def __init__(
        self,
        adapter: DetectorAdapter,
        criterion: DetectionCriterion | TransformersCriterion | None,
        method: DistillationMethod | CombinedMethod | None = None,
        classes: SharedClasses | None = None,
    ) -> None:
        super().__init__()
        self.student, self.method = adapter.model, method
        self.adapter, self.criterion, self.classes = adapter, criterion, classes

    @property
    def config(self):
        return self.student.config

    def activation_checkpointing_enable(self, **kwargs) -> None:
        try:
            self.student.activation_checkpointing_enable(**kwargs)
        except ValueError as error:
            raise UserError(f"training.gradient_checkpointing: {error}: remove it") from error

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor,
        labels: list[dict],
        teacher: DetectorOutput | None = None,
        join_teacher: Callable[[], None] | None = None,
        measure_gradients: str | None = None,
    ) -> DistillerOutput:
        """Detection loss of the student, and the method's losses when the teacher's predictions are given.

        Args:
            pixel_values: (B, 3, H, W) uint8.
            pixel_mask: (B, H, W) bool, true where the image is.
            labels: one dictionary an image with `class_labels` (T,) and `boxes` (T, 4), cxcywh in [0, 1]; images whose
                `labelled` is false have none and train from the teacher alone.
            teacher: predictions on the same images, reduced to the shared classes (`SharedClasses.teacher`).
            join_teacher: called before `teacher` is read, which may still be computed until then.
            measure_gradients: "sums" also gives the norms of the gradients of the detection loss ("detection") and of
                the method's losses together ("distillation") and the cosine between the two, below 0 where the teacher
                pulls against the labels; "terms" the norm of each of the method's losses as well. The
                gradients are those at the student's predictions, at the cost of backward passes through the losses
                alone; at its parameters outside the backbone, where the family has its own loss, which is not computed
                of these predictions alone, or the method acts on more of the student than its predictions.
        """
        questions = None
        if teacher is not None and self.method.asks:

            def questions() -> dict[str, Question]:
                if join_teacher is not None:
                    join_teacher()
                return self.method.questions(teacher)

        with phase("student"):
            student = self.adapter(pixel_values, pixel_mask, labels if self.criterion is None else None, questions)
        with phase("detection loss"):
            task = student.losses if self.criterion is None else self.criterion(student, labels)
        if join_teacher is not None:
            join_teacher()
        imitation = {} if teacher is None else self.imitate(student, teacher, labels)
        norms = cosine = None
        if measure_gradients and imitation:
            terms = {"distillation": sum(imitation.values()), "detection": sum(task.values())}
            terms = imitation | terms if measure_gradients == "terms" else terms
            beyond = self.criterion is None or self.method.requires
            place = self._parameters_outside_the_backbone() if beyond else [student.logits, student.boxes]
            pull, push = (_gradients(terms.pop(name), place) for name in ("detection", "distillation"))
            norms = {"detection": _norm(pull), "distillation": _norm(push)}
            dot = sum((a * b).sum() for a, b in zip(pull, push, strict=True))
            cosine = dot / (norms["detection"] * norms["distillation"]).clamp(min=1e-12)
            norms |= {name: _norm(_gradients(loss, place)) for name, loss in terms.items()}
        losses = task | imitation
        return DistillerOutput(sum(losses.values()), losses, norms, cosine)

    def imitate(self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict]) -> dict[str, Tensor]:
        """The method's losses; arguments as in `forward`, `student` with all of its classes."""
        shared, device = self.classes, student.logits.device
        view, known = (student, labels) if shared is None else (shared.student(student), shared.labels(labels))
        # What a method draws, say by dropout in an extra decoder pass, leaves the student's own dropout as it is.
        with phase("method"), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return self.method(view, teacher, known)

    def _parameters_outside_the_backbone(self) -> list[Tensor]:
        backbone = {id(p) for p in self.adapter.backbone.parameters()}
        return [p for p in self.student.parameters() if p.requires_grad and id(p) not in backbone]


def _gradients(loss: Tensor, place: list[Tensor]) -> list[Tensor]:
    """Of `loss` at all tensors of `place`."""
    if not loss.requires_grad:
        return [x.new_zeros(()) for x in place]
    gradients = torch.autograd.grad(loss, place, retain_graph=True, allow_unused=True, materialize_grads=True)
    return [gradient.float() for gradient in gradients]


def _norm(gradients: list[Tensor]) -> Tensor:
    return torch.stack([gradient.norm() for gradient in gradients]).norm()
