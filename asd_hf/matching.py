"""Hungarian matching of all layers and images of a step, with a single copy to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .phases import phase

Pairs = tuple[Tensor, Tensor]  # (N,) indices of queries, counted over L * B * Q, and of targets, over all images


@torch.no_grad()
def start_matching(
    costs: Sequence[Tensor], counts: np.ndarray, groups: int = 1, with_union: bool = False
) -> Callable[[], list[Pairs]]:
    """Begins to match queries with ground truth: sends the costs to the host.

    What the device is told before the returned function is called it computes while the host matches.

    Args:
        costs: one (L, B, Q, G) a set of predictions, of each query for each target of its image. What lies in memory
            as (L, B, G, Q) is matched fastest.
        counts: (B,) how many targets each image has; columns beyond are padding.
        groups: the queries of an image are so many groups, one after another, each matched with all of its targets.
        with_union: at the end also the pairs of `_union`, queries counted over B * Q.

    Returns:
        A function that waits for the costs and gives for each of them the indices of matched pairs: queries counted
        over L * B * Q, ascending, and targets over all images. Where there are more targets than queries, some have
        none.
    """
    device = costs[0].device
    # Targets before queries: rows are then contiguous, and the solver need not turn the matrix by itself.
    receive = _send([cost.transpose(-1, -2) for cost in costs])

    @torch.no_grad()
    def finish() -> list[Pairs]:
        with phase("matching"):
            hosts = receive()
            pairs = [_match(host, counts, groups) for host in hosts]
            if with_union:
                _, num_images, _, num_queries = hosts[0].shape
                pairs.append(_union(np.concatenate(pairs, axis=1), num_images, num_queries))
            indices = torch.from_numpy(np.concatenate(pairs, axis=1)).to(device, non_blocking=True)
        return [tuple(part) for part in indices.split([p.shape[1] for p in pairs], dim=1)]

    return finish


def _match(costs: np.ndarray, counts: np.ndarray, groups: int) -> np.ndarray:
    """(2, N) pairs of costs (L, B, G, Q)."""
    num_layers, num_images, _, num_queries = costs.shape
    starts = np.cumsum(counts) - counts
    size, matched = num_queries // groups, []
    for layer in range(num_layers):
        for image in np.flatnonzero(counts):
            first = (layer * num_images + image) * num_queries
            for group in range(groups):
                part = costs[layer, image, : counts[image], group * size : (group + 1) * size]
                target, query = linear_sum_assignment(part)
                matched.append((query + (first + group * size), target + starts[image]))
    pairs = np.concatenate(matched, axis=1) if matched else np.empty((2, 0), np.int64)
    return pairs[:, pairs[0].argsort()]


def _union(pairs: np.ndarray, num_images: int, num_queries: int) -> np.ndarray:
    """(2, N) pairs in which each query of any layer has the target that most layers gave it.

    Of equals it is the one that Transformers takes (`Deimv2Loss`), which lets an unstable sort decide.
    """
    query, target = pairs[0] % (num_images * num_queries), pairs[1]
    (query, target), votes = np.unique([query, target], axis=1, return_counts=True)
    chosen = []
    for image in range(num_images):
        own = np.flatnonzero(query // num_queries == image)
        own = own[torch.from_numpy(votes[own]).argsort(descending=True).numpy()]
        chosen.append(own[np.sort(np.unique(query[own], return_index=True)[1])])
    chosen = np.concatenate(chosen)
    return np.stack([query[chosen], target[chosen]])


@torch.no_grad()
def match_sets(cost: Tensor) -> Pairs:
    """Rows and columns (..., min(S, T)) of the cheapest assignment of two sets of predictions, of cost (..., S, T).

    Rows ascend; of the larger set some have no partner.
    """
    with phase("matching"):
        (host,) = _send([cost])()
        pairs = [linear_sum_assignment(matrix) for matrix in host.reshape(-1, *host.shape[-2:])]
        indices = torch.from_numpy(np.array(pairs)).to(cost.device, non_blocking=True)  # (N, 2, min(S, T))
    return tuple(indices.reshape(*cost.shape[:-2], 2, -1).unbind(-2))


def _send(costs: Sequence[Tensor]) -> Callable[[], list[np.ndarray]]:
    """Begins the copy of all costs to the host; the function that is returned waits for it."""
    flat = costs[0].flatten() if len(costs) == 1 else torch.cat([cost.flatten() for cost in costs])
    worst = 1e9  # a prediction that is not finite is matched last; more would leave no digits to tell the others apart
    host = flat.nan_to_num(worst, worst, worst).to("cpu", non_blocking=flat.is_cuda)  # into pinned memory
    copied = torch.cuda.current_stream(flat.device).record_event() if flat.is_cuda else None

    def receive() -> list[np.ndarray]:
        if copied is not None:
            copied.synchronize()
        # The solver takes double precision and would convert each matrix by itself.
        parts = np.split(host.numpy().astype(np.float64, copy=False), np.cumsum([cost.numel() for cost in costs])[:-1])
        return [part.reshape(cost.shape) for part, cost in zip(parts, costs, strict=True)]

    return receive
