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
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    intersection = _area(high[..., :2], low[..., 2:])
    hull = _area(low[..., :2], high[..., 2:])
    union = _area(a[..., :2], a[..., 2:]) + _area(b[..., :2], b[..., 2:]) - intersection
    return _ratio(intersection, union) + _ratio(union, hull) - 1


def _area(top_left: Tensor, bottom_right: Tensor) -> Tensor:
    width, height = (bottom_right - top_left).clamp(min=0).unbind(-1)
    return width * height


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """0 where `whole` is 0, there without gradient."""
    positive = whole > 0
    return torch.where(positive, part / torch.where(positive, whole, 1), 0)
