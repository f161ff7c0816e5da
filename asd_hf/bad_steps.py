"""Steps whose loss or gradient is not finite: the optimizer leaves them out, and what they were made of is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from .norms import running_statistics

FOLDER = "_bad_steps"  # of the output folder; the underscore keeps it off the Hub
BATCHES = "batches_{rank}.safetensors"


@dataclass
class Step:
    """What one optimizer step was made of.

    Attributes:
        number: the optimizer steps before it.
        random: states of the generators of CPU and GPU at its beginning.
        batches: as the loader gave them.
        finite: (), on the host once `ready` has happened.
    """

    number: int
    random: dict[str, Tensor]
    batches: list[dict] = field(default_factory=list)
    finite: Tensor | None = None
    ready: torch.cuda.Event | None = None


def guard_loss(loss: Tensor) -> Tensor:
    """The loss as it is; one that is not finite gives gradients that are not, on every rank."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


class StepGuard:
    """Leaves bad steps out without waiting for the device: the optimizer reads there whether it has to do anything.

    What the host does about a bad step it does once it hears of it, on a GPU one step later: the weights are the same
    then. An optimizer that cannot read its orders on the device (all but the fused ones) is waited for, as is a CPU.

    Args:
        model: all that is trained.
        optimizer: torch's own, not Accelerate's.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.reads_device = getattr(optimizer, "_step_supports_amp_scaling", False)
        self.buffers = running_statistics(model)
        self.before: list[Tensor] = []
        self.step: Step | None = None
        self.waiting: Step | None = None

    def begin(self, number: int) -> None:
        """Before the first batch of a step."""
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            random["cuda"] = torch.cuda.get_rng_state()
        self.step = Step(number, random)
        self.before = [buffer.clone() for buffer in self.buffers]

    def judge(self, finite: Tensor) -> None:
        """After the backward passes: `finite` (), on the device, says whether the optimizer may step."""
        step, self.step = self.step, None
        for buffer, before in zip(self.buffers, self.before, strict=True):
            buffer.copy_(torch.where(finite, buffer, before))
        if self.reads_device:
            self.optimizer.found_inf = (~finite).float()
        elif not finite:
            self.optimizer.zero_grad()  # what has no gradient, no optimizer touches
        step.finite = finite.to("cpu", non_blocking=True)
        if finite.is_cuda:
            step.ready = torch.cuda.Event()
            step.ready.record()
        self.waiting = step

    def bad(self, wait: bool) -> Iterator[Step]:
        """The last step, if it was a bad one and that is known; `wait` for it to be known. Each is given once."""
        step = self.waiting
        if step is None or not (wait or step.ready is None):
            return
        self.waiting = None
        if step.ready is not None:
            step.ready.synchronize()
        if not step.finite:
            yield step


def write_batches(step: Step, folder: Path, rank: int) -> None:
    """Writes the batches of this rank and the states of its generators."""
    tensors = {f"random/{name}": state for name, state in step.random.items()}
    for index, batch in enumerate(step.batches):
        for key, value in batch.items():
            if key == "labels":
                for image, label in enumerate(value):
                    for name, entry in label.items():
                        tensors[f"{index}/labels/{image}/{name}"] = torch.as_tensor(entry).clone()
            else:
                tensors[f"{index}/{key}"] = value.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / BATCHES.format(rank=rank))


def read_batches(file: Path) -> tuple[dict[str, Tensor], list[dict]]:
    """(states of the generators, batches) as `write_batches` got them."""
    random, batches = {}, {}
    for name, value in load_file(file).items():
        index, key, *path = name.split("/")
        if index == "random":
            random[key] = value
            continue
        batch = batches.setdefault(int(index), {"labels": {}})
        if key == "labels":
            image, entry = path
            value = bool(value) if entry == "labelled" else value
            batch["labels"].setdefault(int(image), {})[entry] = value
        else:
            batch[key] = value
    for batch in batches.values():
        batch["labels"] = [batch["labels"][image] for image in sorted(batch["labels"])]
    return random, [batches[index] for index in sorted(batches)]
