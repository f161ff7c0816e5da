"""Where the queries of a decoder look: at each other, and at the feature maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import full

Look = Callable[[Tensor], list[Tensor]]


@dataclass
class Attention:
    """Attention of one batch, first decoder layer first, each time the mean over heads.

    It carries gradient, through sampling points too. In training mode a model with `attention_dropout`, which none has
    by default, shows the weights among queries after it, or before it where Transformers gives no others.
    """

    queries: Tensor  # (L, B, Q, Q), from each query to each: rows sum to 1
    # Weights of queries (L, B, Q) -> one map (L, B, H, W) a level, finest first: the sum over queries of their
    # attention to each cell times their weight. The maps sum to the weights' sum, less what falls beyond the canvas.
    look: Look


def dense_look(attention: Tensor, size: Sequence[int]) -> Look:
    """`Attention.look` of attention (L, B, Q, H * W) to the one feature map of this `size` (H, W)."""
    attention = full(attention)

    def look(weights: Tensor) -> list[Tensor]:
        with torch.autocast(attention.device.type, enabled=False):
            cells = weights.to(attention.dtype)[:, :, None] @ attention
        return [cells.unflatten(-1, size).squeeze(2)]

    return look


def sampled_look(
    points: Sequence[Tensor], attention: Sequence[Tensor], sizes: Sequence[Sequence[int]], nearest: bool = False
) -> Look:
    """`Attention.look` of deformable attention, which reads feature maps at a few points.

    Args:
        points: of each level (L, B, Q, heads, P, 2) as x, y in [0, 1] of the canvas.
        attention: to the points of each level (L, B, Q, heads, P).
        sizes: (H, W) of each level.
        nearest: points read one cell and not the four around them, as in RT-DETRv2's discrete sampling.
    """
    points, attention = [full(p) for p in points], [full(a) for a in attention]

    def look(weights: Tensor) -> list[Tensor]:
        maps = []
        for where, share, size in zip(points, attention, sizes, strict=True):
            mass = share * weights.to(share.dtype)[..., None, None] / share.shape[3]
            cells = splat(where.flatten(0, 1).flatten(1, 3), mass.flatten(0, 1).flatten(1), size, nearest)
            maps.append(cells.unflatten(0, weights.shape[:2]))
        return maps

    return look


def splat(points: Tensor, mass: Tensor, size: Sequence[int], nearest: bool = False) -> Tensor:
    """Maps (N, H, W) with the `mass` (N, P) of `points` (N, P, 2) on the cells that a sampling there would read.

    Points are x, y in [0, 1] of the map. Bilinear shares go to the four cells around a point, those outside the map
    are lost, as `grid_sample` pads with zeros.

    Args:
        nearest: one cell a point instead, that of Transformers' "discrete" method: the coordinates times the size,
            plus a half, cut off and clamped to the map.
    """
    height, width = size
    x, y = points[..., 0] * width, points[..., 1] * height
    if nearest:
        column = (x + 0.5).long().clamp(0, width - 1)
        row = (y + 0.5).long().clamp(0, height - 1)
        return mass.new_zeros(len(mass), height * width).scatter_add(1, row * width + column, mass).unflatten(1, size)
    x, y = x - 0.5, y - 0.5  # the centre of a cell is half a cell from its corner
    left, top = x.detach().floor(), y.detach().floor()
    right_share, bottom_share = x - left, y - top
    cells, shares = [], []
    for column, across in ((left, 1 - right_share), (left + 1, right_share)):
        for row, down in ((top, 1 - bottom_share), (top + 1, bottom_share)):
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            # Clamped as integers: also a point that is NaN has a cell, where its share, which is NaN, shows.
            cells.append(row.long().clamp(0, height - 1) * width + column.long().clamp(0, width - 1))
            shares.append(mass * across * down * inside)
    maps = mass.new_zeros(len(mass), height * width)
    return maps.scatter_add(1, torch.cat(cells, 1), torch.cat(shares, 1)).unflatten(1, size)
