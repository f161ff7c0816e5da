"""Running statistics of batch normalisation: the one thing of a model that changes and no gradient averages."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import TrainerCallback


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Means and variances of all layers that keep them."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    return [buffer for m in norms for buffer in (m.running_mean, m.running_var)]


class SameStatistics(TrainerCallback):
    """Gives all ranks the running statistics of rank 0 after each optimizer step, in one broadcast.

    DistributedDataParallel does so before the next step. Until then the ranks would evaluate, and average over time,
    models that are not the one that is saved, and a run that goes on from there would differ from an unbroken one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.buffers = model, None

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        if self.buffers is None:  # by now they are on the device
            self.buffers = running_statistics(self.model)
        if self.buffers:
            flat = torch.cat([buffer.flatten() for buffer in self.buffers])
            dist.broadcast(flat, 0)
            for buffer, value in zip(self.buffers, flat.split([b.numel() for b in self.buffers]), strict=True):
                buffer.copy_(value.view_as(buffer))
