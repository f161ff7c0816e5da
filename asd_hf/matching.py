"""Hungarian matching of all layers and images of a step, with a single copy to the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .phases import phase


@torch.no_grad()
def match_targets(costs: Sequence[Tensor], counts: np.ndarray) -> list[tuple[Tensor, Tensor]]:
    """Matches queries with ground truth.

    Args:
        costs: one (L, B, Q, G) a set of predictions, of each query for each target of its image.
        counts: (B,) how many targets each image has; columns beyond are padding.

    Returns:
        For each cost the indices of matched pairs: queries counted over L * B * Q, and targets over all images. Where
        there are more targets than queries, some have none.
    """
    device = costs[0].device
    starts = np.cumsum(counts) - counts
    with phase("matching"):
        pairs = []
        for cost in _to_host(costs):
            num_layers, num_images, num_queries, _ = cost.shape
            matched = []
            for layer in range(num_layers):
                for image in np.flatnonzero(counts):
                    query, target = linear_sum_assignment(cost[layer, image, :, : counts[image]])
                    matched.append((query + (layer * num_images + image) * num_queries, target + starts[image]))
            pairs.append(np.concatenate(matched, axis=1) if matched else np.empty((2, 0), np.int64))
        indices = torch.from_numpy(np.concatenate(pairs, axis=1)).to(device, non_blocking=True)
    return [tuple(part) for part in indices.split([p.shape[1] for p in pairs], dim=1)]


@torch.no_grad()
def match_sets(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns (..., min(S, T)) of the cheapest assignment of two sets of predictions, of cost (..., S, T).

    Rows ascend; of the larger set some have no partner.
    """
    with phase("matching"):
        (host,) = _to_host([cost])
        pairs = [linear_sum_assignment(matrix) for matrix in host.reshape(-1, *host.shape[-2:])]
        indices = torch.from_numpy(np.array(pairs)).to(cost.device, non_blocking=True)  # (N, 2, min(S, T))
    return tuple(indices.reshape(*cost.shape[:-2], 2, -1).unbind(-2))


def _to_host(costs: Sequence[Tensor]) -> list[np.ndarray]:
    flat = costs[0].flatten() if len(costs) == 1 else torch.cat([cost.flatten() for cost in costs])
    worst = 1e9  # a prediction that is not finite is matched last; more would leave no digits to tell the others apart
    parts = np.split(flat.nan_to_num(worst, worst, worst).cpu().numpy(), np.cumsum([c.numel() for c in costs])[:-1])
    return [part.reshape(cost.shape) for part, cost in zip(parts, costs, strict=True)]
