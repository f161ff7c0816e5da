"""Deformable attention on a CPU: Transformers' numbers in a fraction of the time.

Transformers samples each level with `grid_sample` into a tensor of (B, heads, D, queries, levels x points), which it
then weighs and sums. Here a query's look through one head is a bag of 4 x levels x points rows of the maps, the
corners of the cells in which its points lie. `embedding_bag` weighs and sums them in one pass, and nothing of D
channels a point is ever stored. The gradient of the maps is the same sum from the other side: a cell is a bag of those
who look into it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

STOCK = "MultiScaleDeformableAttention"  # Transformers' name for it in every family, of one signature
MOST = 2**31  # indices are of 32 bits
# Where `grid_sample` is as fast or faster: with more cells a query, as in decoders, and with fewer channels a head
CELLS, CHANNELS = 2, 16


def use_fast_deformable_attention(model: nn.Module) -> nn.Module:
    """Lets a Transformers detector sample its maps by `sample_levels` where they are on a CPU and every cell looks.

    That is in encoders. In decoders, elsewhere, and where the model is compiled or exported, Transformers' own code
    runs as before. It concerns Deformable DETR and Grounding DINO; of others with a `MultiScaleDeformableAttention`
    only the decoders have it. A model that has it already stays as it is. No parameter and no checkpoint changes.

    Returns:
        The same model.
    """
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            kind = type(module)
            stock = kind.__name__ == STOCK and kind.__module__.startswith("transformers.")
            if stock and not isinstance(parent, FastDeformableAttention):
                setattr(parent, name, FastDeformableAttention(module))
    return model


class FastDeformableAttention(nn.Module):
    """Takes the place of Transformers' module `stock`, and leaves to it what is not on a CPU, empty, or huge, and what
    has few queries for its maps or few channels."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """See `sample_levels`; arguments as `stock` takes them."""
        elsewhere = value.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing()
        fits = 0 < 4 * attention_weights.numel() < MOST and value.numel() < MOST
        gains = value.shape[1] <= CELLS * sampling_locations.shape[1] and value.shape[3] >= CHANNELS
        if elsewhere or not fits or not gains:
            return self.stock(
                value,
                value_spatial_shapes,
                value_spatial_shapes_list,
                level_start_index,
                sampling_locations,
                attention_weights,
                im2col_step,
            )
        return sample_levels(value, value_spatial_shapes_list, sampling_locations, attention_weights)


def sample_levels(value: Tensor, sizes: Sequence[tuple[int, int]], points: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of what bilinear interpolation finds at the points, zero outside a map.

    Args:
        value: (B, S, H, D), the maps of all levels row by row, S = sum of height x width.
        sizes: (height, width) of each of the L levels.
        points: (B, Q, H, L, P, 2) as x, y; a map spans [0, 1].
        weights: (B, Q, H, L, P).

    Returns:
        (B, Q, H * D), in the widest precision of the three, computed in fp32 at least. Differentiable once.
        Nothing may be empty, and `value` and 4 x `weights` must have fewer than 2^31 elements.
    """
    kind = torch.promote_types(value.dtype, torch.promote_types(points.dtype, weights.dtype))
    exact = torch.promote_types(kind, torch.float32)
    value, points, weights = (x.to(exact).contiguous() for x in (value, points, weights))
    return _SampleLevels.apply(value, points, weights, tuple(sizes)).to(kind)


class _SampleLevels(torch.autograd.Function):
    """Cells are numbered over maps with a border of zeros, so that no corner needs a look at whether it is outside."""

    @staticmethod
    def forward(ctx, value: Tensor, points: Tensor, weights: Tensor, sizes: tuple[tuple[int, int], ...]) -> Tensor:
        batch, _, heads, channels = value.shape
        queries = points.shape[1]
        maps = value.split([height * width for height, width in sizes], dim=1)
        bordered = [
            nn.functional.pad(x.view(batch, *size, heads, channels), (0, 0, 0, 0, 1, 1, 1, 1)).flatten(1, 2)
            for x, size in zip(maps, sizes, strict=True)
        ]
        table = torch.cat(bordered, dim=1).view(-1, channels)  # a row for each image, cell and head
        height, width = points.new_tensor(sizes)[:, None].unbind(-1)  # each (L, 1)
        left, right, inside_x = _along(points[..., 0], width)
        above, below, inside_y = _along(points[..., 1], height)

        row = width.int() + 2
        cells = [x.shape[1] for x in bordered]
        first = row.new_tensor([0, *cells[:-1]]).cumsum(0, dtype=torch.int32)[:, None] + row + 1
        image = torch.arange(batch, dtype=torch.int32)[:, None, None, None, None] * sum(cells)
        head = torch.arange(heads, dtype=torch.int32)[:, None, None]
        cell = above.int().mul_(row).add_(left.int()).add_(first).add_(image).mul_(heads).add_(head)
        corner = torch.stack([torch.zeros_like(row), torch.ones_like(row), row, row + 1], dim=-1) * heads
        index = (cell[..., None] + corner).view(batch * queries * heads, -1)
        lower = weights * below
        pair = torch.stack([weights - lower, lower], dim=-1)
        share = pair * right[..., None]
        share = torch.stack([pair - share, share], dim=-1).view_as(index)

        ctx.save_for_backward(table, index, share, cell, weights, right, below, inside_x, inside_y)
        ctx.sizes, ctx.cells, ctx.batch = sizes, cells, batch
        found = nn.functional.embedding_bag(index, table, mode="sum", per_sample_weights=share)
        return found.view(batch, queries, heads * channels)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        table, index, share, cell, weights, right, below, inside_x, inside_y = ctx.saved_tensors
        gradient = gradient.reshape(len(index), -1)
        to_value = _to_value(ctx, gradient, cell, share) if ctx.needs_input_grad[0] else None
        if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            return to_value, None, None, None
        height, width = weights.new_tensor(ctx.sizes)[:, None].unbind(-1)
        top_left, top_right, low_left, low_right = _products(gradient, table, index).view(*weights.shape, 4).unbind(-1)
        across, across_low = top_right - top_left, low_right - low_left
        top, low = torch.addcmul(top_left, across, right), torch.addcmul(low_left, across_low, right)
        down = low.sub_(top)
        to_weights = torch.addcmul(top, down, below)
        across = across_low.sub_(across).mul_(below).add_(across)
        # Beyond the border the value is 0 and stays 0 wherever a point moves.
        to_x = across.mul_(weights).mul_(width * inside_x)
        to_y = down.mul_(weights).mul_(height * inside_y)
        return to_value, torch.stack([to_x, to_y], dim=-1), to_weights, None


def _along(position: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of positions in [0, 1] over `size` cells: the cell before each, how far it is to the next, whether it is within
    the map and its border."""
    # Rounded as `grid_sample` rounds: at a cell's centre, where all points start, the slope has two sides.
    position = torch.addcmul(size.new_tensor(-0.5), (position * 2).sub_(1).add_(1), size / 2)
    inside = (position >= -1) & (position < size)
    position = torch.minimum(position.clamp_(min=-1), size)
    before = torch.minimum(position.floor(), size - 1).nan_to_num_(nan=0.0)
    return before, position.sub_(before), inside


def _products(gradient: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """The product of each bag's gradient (N, D) with each of its rows `index` (N, K) of `table` (R, D): (N * K)."""
    _hear_of_beta()
    ends = torch.arange(0, index.numel() + 1, index.shape[1], dtype=torch.int32)
    pattern = torch.sparse_csr_tensor(
        ends, index.view(-1), gradient.new_zeros(index.numel()), (len(index), len(table)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, gradient, table.t(), beta=0.0).values()


@cache
def _hear_of_beta() -> None:
    """PyTorch says once a process that sparse tensors are in beta: here, unseen. (To catch warnings in each step would
    make Python show others, which it shows once, in each step.)"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(1).to_sparse_csr()


def _to_value(ctx, gradient: Tensor, cell: Tensor, share: Tensor) -> Tensor:
    """The gradient of the maps: a cell gathers what its points have of each corner, which then moves to the corner."""
    points = cell.numel() // len(gradient)  # of one query and head
    heads, channels = cell.shape[2], gradient.shape[1]
    rows = ctx.batch * sum(ctx.cells) * heads
    key, order = cell.view(-1).sort()
    start = torch.searchsorted(key, torch.arange(rows, dtype=key.dtype))
    source = order.div(points, rounding_mode="floor")
    corners = [
        nn.functional.embedding_bag(source, gradient, start, mode="sum", per_sample_weights=part.contiguous())
        .view(ctx.batch, -1, heads, channels)
        .split(ctx.cells, dim=1)
        for part in share.view(-1, 4)[order].unbind(-1)
    ]
    levels = []
    for (height, width), *parts in zip(ctx.sizes, *corners, strict=True):
        here, right, below, across = (x.unflatten(1, (height + 2, width + 2)) for x in parts)
        level = here[:, 1:-1, 1:-1] + right[:, 1:-1, :-2]
        levels.append(level.add_(below[:, :-2, 1:-1]).add_(across[:, :-2, :-2]).flatten(1, 2))
    return torch.cat(levels, dim=1)
