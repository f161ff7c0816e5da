"""A method's own work on fixed outputs of both detectors, which a difference of whole steps hides in its noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from ..build import Parts
from ..detectors.base import DetectorOutput
from ..errors import UserError
from ..methods import MethodConfig
from ..phases import Stopwatch, phase
from ..trainer import DistillationTrainer
from .sidebyside import Row, format_table, spread, take_turns
from .step import SETTLED, Seconds, make_trainer, make_watch

LEAVES = ("logits", "boxes", "queries", "features", "proposals", "sides")  # of what the student predicts


@dataclass(frozen=True, kw_only=True)
class MethodCost(Row):
    """Of one method beside the first.

    Attributes:
        ratio_spread: of the rounds' ratios, from the first to the third quartile.
        forward_ms, backward_ms: the two parts of `ours_ms`.
    """

    ratio_spread: float
    forward_ms: float
    backward_ms: float


def measure_methods(
    parts: Parts, methods: Mapping[str, Mapping[str, MethodConfig]], rounds: int, cpu_time: bool = False
) -> tuple[list[MethodCost], dict[str, str]]:
    """Measures each method in turn, on what teacher and student make of the first batch: its losses, and the backward
    pass from them to the student's predictions, states and feature maps, to the method's parameters and, where it asks
    the student's decoder, to the decoder's.

    What comes before those is no part of it: neither forward pass, and not the encoder's share of the backward pass,
    which the detection loss needs anyway. Nor are gradients at the encoded image and
    at the attention to it.

    Args:
        methods: by the name of the row, what `RunConfig.methods` is.
        cpu_time: counts the time that the CPU spends on this process and not what passes meanwhile.

    Returns:
        the costs beside the first method's, and of the methods that this pair cannot be trained by the reason.

    Raises:
        UserError: no method can be measured, or `cpu_time` is asked of a GPU.
    """
    device = parts.run.training.device
    watch = make_watch(device, cpu_time)
    sides: dict[str, Callable[[], Seconds]] = {}
    refused: dict[str, str] = {}
    for name, configs in methods.items():
        try:
            sides[name] = _own_work(make_trainer(parts, configs), watch)
        except UserError as error:
            refused[name] = str(error)
    if not sides:
        raise UserError("; ".join(refused.values()) or "there is no method to measure")
    seconds = take_turns(sides, rounds)
    whole = {name: [sum(part.values()) for part in measured] for name, measured in seconds.items()}
    first = whole[next(iter(whole))]
    costs = []
    for name, measured in seconds.items():
        backward = [part["backward"] for part in measured]
        costs.append(
            MethodCost.of(
                name,
                whole[name],
                first,
                str(device),
                ratio_spread=spread([a / b for a, b in zip(whole[name], first, strict=True)]),
                forward_ms=1e3 * median(a - b for a, b in zip(whole[name], backward, strict=True)),
                backward_ms=1e3 * median(backward),
            )
        )
    return costs, refused


def _own_work(trainer: DistillationTrainer, watch: Callable[[], Stopwatch]) -> Callable[[], Seconds]:
    distiller, method = trainer.model.train(), trainer.method
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    method.step = SETTLED
    trainer.watch_attention()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        teacher = trainer.ask_teacher(batch)
        student = trainer.adapter(batch["pixel_values"], batch["pixel_mask"])
    trainer.watch_attention(False)
    student, leaves = _cut_off(student)
    trained = [p for p in distiller.parameters() if p.requires_grad]

    def work() -> Seconds:
        trainer.watch_attention()
        with watch() as measured:
            with trainer.compute_loss_context_manager():
                losses = distiller.imitate(student, teacher, batch["labels"])
            with phase("backward"):
                torch.autograd.grad(sum(losses.values()), [*leaves, *trained], allow_unused=True)
        trainer.watch_attention(False)
        return dict(measured.seconds)

    return work


def _cut_off(output: DetectorOutput) -> tuple[DetectorOutput, list[Tensor]]:
    """The same output with leaves of the graph in it, and these."""
    leaves: list[Tensor] = []

    def cut(value: Tensor | Sequence[Tensor] | None) -> Tensor | Sequence[Tensor] | None:
        if value is None:
            return None
        if not isinstance(value, Tensor):
            return type(value)(map(cut, value))
        leaves.append(value.detach().requires_grad_())
        return leaves[-1]

    output = replace(output, **{name: cut(getattr(output, name)) for name in LEAVES})
    if output.attention is not None:
        output.attention = replace(output.attention, queries=cut(output.attention.queries))
    return output, leaves


def format_methods(costs: Sequence[MethodCost], refused: Mapping[str, str]) -> str:
    """A table, and the methods that were refused."""
    rows = [
        [cost.name]
        + [f"{x:.1f}" for x in (cost.ours_ms, cost.ours_spread_ms, cost.forward_ms, cost.backward_ms)]
        + [f"{cost.ratio:.2f} x", f"{cost.ratio_spread:.2f}"]
        for cost in costs
    ]
    header = ["method", "own work, ms", "spread", "forward, ms", "backward, ms", f"of {costs[0].name}'s", "spread"]
    return "\n\n".join(
        [format_table(header, rows), *(f"{name}: refused: {reason}" for name, reason in refused.items())]
    )
