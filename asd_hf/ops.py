"""Arithmetic on boxes, its precision, and noise that can be drawn again; shared by the criterion and the methods."""

from __future__ import annotations

import torch
from torch import Tensor


def full(x: Tensor) -> Tensor:
    """In fp32, or wider if it was."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Centre and size to corners; shape (..., 4) and unit are kept."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al., CVPR 2019) of (x1, y1, x2, y2) boxes, in [-1, 1].

    Element by element: `a` (..., 4) and `b` (..., 4) are broadcast, so that `a[:, None]` and `b` give every pair.
    Boxes without area have finite values and gradients; two equal points have -1.
    """
    return iou_and_giou(a, b)[1]


def iou_and_giou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU in [0, 1] and generalised IoU, as `generalized_iou` computes them."""
    # Coordinate by coordinate: all four at once, of every pair, would take most of the memory of matching.
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.unbind(-1), b.unbind(-1)
    low, high = torch.minimum, torch.maximum
    intersection = _length(high(ax1, bx1), low(ax2, bx2)) * _length(high(ay1, by1), low(ay2, by2))
    union = _length(ax1, ax2) * _length(ay1, ay2) + _length(bx1, bx2) * _length(by1, by2) - intersection
    iou = _ratio(intersection, union)
    hull = _length(low(ax1, bx1), high(ax2, bx2)) * _length(low(ay1, by1), high(ay2, by2))
    return iou, iou + _ratio(union, hull) - 1


def _length(start: Tensor, end: Tensor) -> Tensor:
    return (end - start).clamp(min=0)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """0 where `whole` is 0, there without gradient."""
    positive = whole > 0
    return torch.where(positive, part / torch.where(positive, whole, 1), 0)


def uniform_noise(ids: Tensor, step: int, shape: tuple[int, ...], stream: int = 0) -> Tensor:
    """Uniform numbers in [0, 1) that depend on an image, the step and their place alone: (B, *shape) in fp32.

    The same on every device, in every batch and after a resumed run; a larger `shape` holds the smaller one.

    Args:
        ids: (B,) int64, of the images.
        stream: tells several draws of one step apart.
    """
    state = _mix(_mix(step & _BITS) ^ stream)
    for half in (ids & _BITS, ids >> 32 & _BITS):
        state = _mix(half ^ state)
    for size in shape:
        state = _mix(state[..., None] ^ torch.arange(size, device=ids.device))
    return (state >> 8) * 2.0**-24  # as many bits as fp32 holds


_BITS = (1 << 32) - 1


def _mix(x):
    """Hash of 32 bits, of a number or of an int64 tensor, where no product overflows.

    Constants and shifts: Wellons, hash-prospector (github.com/skeeto/hash-prospector, public domain).
    """
    x = x + 0x9E3779B9 & _BITS  # 0 would stay 0
    x = (x ^ x >> 16) * 0x21F0AAAD & _BITS
    x = (x ^ x >> 15) * 0x735A2D97 & _BITS
    return x ^ x >> 15
