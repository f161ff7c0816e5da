"""All that is trained, as one module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .criterion import DetectionCriterion
from .detectors.base import DetectorAdapter, DetectorOutput
from .methods.base import DistillationMethod


@dataclass
class DistillerOutput(ModelOutput):
    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None  # named, weighted scalars; `loss` is their sum
    gradient_share: Tensor | None = None  # see `Distiller.forward`


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
        criterion: DetectionCriterion | None,
        method: DistillationMethod | None = None,
    ) -> None:
        super().__init__()
        self.student, self.method = adapter.model, method
        self.adapter, self.criterion = adapter, criterion

    @property
    def config(self):
        return self.student.config

    def activation_checkpointing_enable(self, **kwargs) -> None:
        self.student.activation_checkpointing_enable(**kwargs)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor,
        labels: list[dict],
        teacher: DetectorOutput | None = None,
        measure_gradient_share: bool = False,
    ) -> DistillerOutput:
        """Detection loss of the student, and the method's losses when the teacher's predictions are given.

        Args:
            pixel_values: (B, 3, H, W) uint8.
            pixel_mask: (B, H, W) bool, true where the image is.
            labels: one dictionary an image with `class_labels` (T,) and `boxes` (T, 4), cxcywh in [0, 1].
            teacher: predictions on the same images, classes in the student's order.
            measure_gradient_share: also give |g_m| / (|g_m| + |g_t|), the share of the method's losses in the gradient
                at the student's predictions; it costs a backward pass through the losses alone.
        """
        if self.criterion is None:
            student = self.adapter(pixel_values, pixel_mask, labels)
            task = student.losses
        else:
            student = self.adapter(pixel_values, pixel_mask)
            task = self.criterion(student, labels)
        imitation = {} if teacher is None else self.method(student, teacher, labels)
        share = None
        if measure_gradient_share and imitation:
            share = _gradient_share(sum(imitation.values()), sum(task.values()), [student.logits, student.boxes])
        losses = task | imitation
        return DistillerOutput(sum(losses.values()), losses, share)


def _gradient_share(imitation: Tensor, task: Tensor, outputs: list[Tensor]) -> Tensor:
    norms = []
    for loss in (imitation, task):
        gradients = torch.autograd.grad(loss, outputs, retain_graph=True, materialize_grads=True)
        norms.append(torch.stack([g.float().norm() for g in gradients]).norm())
    return norms[0] / (norms[0] + norms[1]).clamp(min=1e-12)
