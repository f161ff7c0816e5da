"""Arithmetic on boxes, shared by the criterion and the methods."""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Centre and size to corners; shape (..., 4) and unit are kept."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al., CVPR 2019) of (x1, y1, x2, y2) boxes, in [-1, 1].

    Element by element: `a` (..., 4) and `b` (..., 4) are broadcast, so that `a[:, None]` and `b` give every pair.
    Boxes without area have finite values and gradients; two equal points have -1.
    """
    tiny = torch.finfo(a.dtype).tiny
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    intersection = (low[..., 2:] - high[..., :2]).clamp(min=0).prod(-1)
    hull = (high[..., 2:] - low[..., :2]).clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - intersection
    return intersection / union.clamp(min=tiny) + union / hull.clamp(min=tiny) - 1
