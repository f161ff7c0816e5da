from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback


class EMACallback(TrainerCallback):
    """A moving average of the student's weights, updated after each optimizer step.

    The decay grows from 0.1 to `decay` as (1 + step) / (10 + step), so that the first steps are soon forgotten.
    """

    def __init__(self, student: PreTrainedModel, decay: float) -> None:
        self.student, self.decay = student, decay
        self.model = copy.deepcopy(student).requires_grad_(False).eval()

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        averages, weights = _floats(self.model), _floats(self.student)
        torch._foreach_lerp_(averages, weights, 1 - decay)


def _floats(model: nn.Module) -> list[torch.Tensor]:
    """Parameters and floating-point buffers, each once however many modules share it."""
    return [x.detach() for x in (*model.parameters(), *model.buffers()) if x.is_floating_point()]
