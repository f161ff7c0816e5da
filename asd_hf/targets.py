"""The ground truth of a batch as one tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def pad_labels(labels: list[dict]) -> tuple[Tensor, Tensor, Tensor]:
    """Classes (B, G), cxcywh boxes (B, G, 4) and which of them are there (B, G bool), G at least 1.

    What is not there has class 0 and a box of zeros.
    """
    classes = pad_sequence([label["class_labels"] for label in labels], batch_first=True)
    boxes = pad_sequence([label["boxes"] for label in labels], batch_first=True)
    there = pad_sequence([torch.ones_like(label["class_labels"]) for label in labels], batch_first=True) > 0
    if not classes.shape[1]:
        return classes.new_zeros(len(labels), 1), boxes.new_zeros(len(labels), 1, 4), there.new_zeros(len(labels), 1)
    return classes, boxes, there
