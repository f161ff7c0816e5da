"""Deformable attention on a CPU: ours side by side with Transformers' own, on the same maps and points."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

from ..deformable_attention import FastDeformableAttention
from .sidebyside import Row, seconds, take_turns

STRIDES = (8, 16, 32, 64)
HEADS, CHANNELS, POINTS = 8, 32, 4  # of Deformable DETR
SPREAD = 0.05  # of the points about their query, as a share of the image


@dataclass(frozen=True, kw_only=True)
class AttentionRow(Row):
    """`difference`: of the outputs, or the gradients, as a share of the largest one."""

    difference: float


def measure_attention(images: int, side: int, queries: int, rounds: int) -> Iterator[AttentionRow]:
    """Of one layer of the encoder, whose queries are the cells, and one of the decoder; with and without gradients."""
    sizes = [(-(-side // stride), -(-side // stride)) for stride in STRIDES]
    centres = torch.cat(
        [
            torch.stack(torch.meshgrid(*[(torch.arange(n) + 0.5) / n for n in size], indexing="ij"), -1).view(-1, 2)
            for size in sizes
        ]
    )
    generator = torch.Generator().manual_seed(0)
    for layer, at in (("encoder", centres), ("decoder", torch.rand(queries, 2, generator=generator))):
        shape = images, len(at), HEADS, len(sizes), POINTS
        offsets = torch.randn(*shape, 2, generator=generator) * SPREAD
        inputs = (
            torch.randn(images, len(centres), HEADS, CHANNELS, generator=generator),
            at[None, :, None, None, None] + offsets,
            torch.rand(shape, generator=generator).flatten(3).softmax(-1).view(shape),
        )
        sides = {"ours": partial(_ours, sizes), "theirs": partial(_theirs, sizes)}
        for what, work in (("forward", _forward), ("forward and backward", _backward)):
            runs = {name: partial(work, side, inputs) for name, side in sides.items()}
            mine, theirs = (torch.cat([x.flatten() for x in run()]) for run in runs.values())
            measured = take_turns({name: partial(seconds, run) for name, run in runs.items()}, rounds)
            difference = ((mine - theirs).abs().max() / theirs.abs().max()).item()
            name = f"{layer}, {len(at)} queries: {what}"
            yield AttentionRow.of(name, measured["ours"], measured["theirs"], "cpu", difference=difference)


def _ours(sizes, value: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    return FastDeformableAttention(MultiScaleDeformableAttention())(value, None, sizes, None, points, weights, 64)


def _theirs(sizes, value: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    return MultiScaleDeformableAttention()(value, None, sizes, None, points, weights, 64)


@torch.no_grad()
def _forward(attend, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (attend(*inputs),)


def _backward(attend, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    inputs = [x.requires_grad_() for x in inputs]
    output = attend(*inputs)
    return torch.autograd.grad(output, inputs, output.detach())
