"""The student's own queries and the questions of a method in one pass of its decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput


@contextmanager
def decoding_together(
    decoder: nn.Module, questions: Callable[[], Mapping[str, dict[str, Tensor]]], mask_name: str
) -> Iterator[dict[str, ModelOutput]]:
    """While the block runs, `decoder` decodes questions beside its own queries, and neither see the other.

    It is one pass: what is computed of the encoded image for each layer is computed once, and the device is given half
    as many, larger, tasks. Every query has the numbers that it has alone, up to the last bits; dropout draws others.

    Args:
        decoder: of Transformers, called with keyword arguments; queries are the second dimension of these and the last
            but one of its outputs. Hooks see its own queries alone.
        questions: called when the decoder is; gives for each the arguments (B, Q, .) that replace the decoder's own.
        mask_name: the argument that is added to the scores of attention among queries.

    Yields:
        the answers by the name of the question, once the decoder was called.
    """
    forward, answers = decoder.forward, {}

    def joined(**own: Tensor) -> ModelOutput:
        asked = questions()
        arguments = list(dict.fromkeys(name for question in asked.values() for name in question))
        if not asked:
            return forward(**own)
        groups = [{name: own[name] for name in arguments}, *asked.values()]
        sizes = [group[arguments[0]].shape[1] for group in groups]
        # In the precision of the own ones, which so are what they are alone.
        joint = {name: torch.cat([group[name].to(own[name].dtype) for group in groups], 1) for name in arguments}
        mask = _apart(sizes, own[arguments[0]], own.get(mask_name))
        output = forward(**own | joint | {mask_name: mask})
        # Not tensors are the states of each layer, if the configuration has them recorded; no adapter reads them.
        read = {key: x.split(sizes, -2) for key, x in output.items() if isinstance(x, Tensor)}
        parts = [dict(zip(read, part, strict=True)) for part in zip(*read.values(), strict=True)]
        answers.update(zip(asked, (type(output)(**part) for part in parts[1:]), strict=True))
        return type(output)(**parts[0])

    decoder.forward = joined
    try:
        yield answers
    finally:
        del decoder.forward


def _apart(sizes: list[int], like: Tensor, own: Tensor | None) -> Tensor:
    """(1, 1, Q, Q): 0 within each group of queries, minus infinity between them; within the first its `own` mask."""
    mask = like.new_full((sum(sizes), sum(sizes)), -torch.inf)
    start = 0
    for size in sizes:
        mask[start : start + size, start : start + size] = 0
        start += size
    if own is not None:
        mask[: sizes[0], : sizes[0]] = own
    return mask[None, None]
