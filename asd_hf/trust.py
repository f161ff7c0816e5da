"""How much a teacher is to be imitated, by what both models know of the labels."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from .criterion import DetectionCriterion
from .detectors.base import DetectorOutput, sum_over_ranks

EVERY = 4  # optimizer steps between comparisons: each matches on the host
DECAY = 0.9  # of the running means of both models' losses, a comparison


class Trust(nn.Module):
    """factor * (1 - teacher's detection loss / student's), at most 1 and at least 0.

    A teacher that is far ahead is trusted wholly, one that the student has caught up with no more. Both losses are
    those of the last decoder layer on the labels that both know, as running means over batches and ranks.

    Args:
        factor: 2 trusts wholly until the teacher's loss is more than half of the student's.
        activation: of the class logits, see `DetectorSpec`.
    """

    def __init__(self, factor: float, activation: str) -> None:
        super().__init__()
        self.factor = factor
        self.criterion = DetectionCriterion(activation, class_cost=2, class_loss_weight=2)
        self.register_buffer("running_losses", torch.zeros(2))  # of the student and the teacher
        self.register_buffer("batches", torch.zeros(()))

    @torch.no_grad()
    def forward(self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict], step: int) -> Tensor:
        """A scalar in [0, 1], without gradient; `factor`, at most 1, before the first comparison with labels.

        Args:
            student, teacher, labels: as in `DistillationMethod.forward`.
            step: optimizer steps done.
        """
        if step % EVERY == 0:
            with torch.autocast(student.logits.device.type, enabled=False):
                self._follow(student, teacher, labels)
        ours, theirs = self.running_losses
        return (self.factor * (1 - theirs / ours.clamp(min=1e-6))).clamp(0, 1)

    def _follow(self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict]) -> None:
        """Adds this batch to the running means."""
        last = [replace(x, logits=x.logits[-1:], boxes=x.boxes[-1:]) for x in (student, teacher)]
        pairs = self.criterion.assign(last, labels)  # both at once: one copy to the host
        now = [sum(self.criterion(x, labels, pair).values()) for x, pair in zip(last, pairs, strict=True)]
        now, _ = sum_over_ranks(torch.stack(now).to(self.running_losses))  # their ratio is that of the means
        # Without labelled images there is nothing to compare, and what is not finite would stay for ever.
        counts = (now[0] > 0) & now.isfinite().all()
        self.batches += counts
        share = (1 / self.batches.clamp(min=1)).clamp(min=1 - DECAY)
        self.running_losses.lerp_(torch.where(counts, now, self.running_losses), share)
