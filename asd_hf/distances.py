"""How far single predictions of the student are from single ones of the teacher: element by element, or all pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import cxcywh_to_xyxy, generalized_iou


def class_divergence(student: Tensor, teacher: Tensor, softmax: bool) -> Tensor:
    """KL(teacher || student) of class logits (..., C), summed over classes: (...).

    Of sigmoid heads it is the binary cross entropy with the teacher's probabilities as soft labels, less their own
    entropy: the same gradient, and 0 where the two agree.

    Args:
        softmax: the logits are of one distribution, with the last column "no object"; otherwise of C classes apart.
    """
    if softmax:
        target = teacher.log_softmax(-1)
        return (target.exp() * (target - student.log_softmax(-1))).sum(-1)
    cross = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="none")
    return (cross - _entropy(teacher)).sum(-1)


def box_distances(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """L1, summed over the coordinates, and 1 - GIoU of cxcywh boxes (..., 4): two of (...)."""
    giou = generalized_iou(cxcywh_to_xyxy(student), cxcywh_to_xyxy(teacher))
    return (student - teacher).abs().sum(-1), 1 - giou


def imitation_losses(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], softmax: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`class_divergence`, L1 and 1 - GIoU of pairs: means over pairs and images, sums over layers.

    Args:
        student, teacher: logits (L, B, P, C) and boxes (L, B, P, 4) of the P pairs.
    """
    (s_logits, s_boxes), (t_logits, t_boxes) = student, teacher
    distances = class_divergence(s_logits, t_logits, softmax), *box_distances(s_boxes, t_boxes)
    return tuple(distance.mean((1, 2)).sum() for distance in distances)


def pair_distances(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], softmax: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`class_divergence`, L1 and 1 - GIoU of every teacher prediction and every student prediction: (N, T, S) each.

    Args:
        student, teacher: logits (N, S, C) and boxes (N, S, 4); logits (N, T, C) and boxes (N, T, 4).
    """
    (s_logits, s_boxes), (t_logits, t_boxes) = student, teacher
    # Cross entropy less entropy, by products of matrices, so that no (N, T, S, C) arises.
    if softmax:
        target = t_logits.softmax(-1)
        cross = -target @ s_logits.log_softmax(-1).transpose(1, 2)
        entropy = torch.special.entr(target).sum(-1)
    else:
        cross = F.softplus(s_logits).sum(-1)[:, None] - t_logits.sigmoid() @ s_logits.transpose(1, 2)
        entropy = _entropy(t_logits).sum(-1)
    l1 = torch.cdist(t_boxes, s_boxes, p=1)
    giou = generalized_iou(cxcywh_to_xyxy(t_boxes)[:, :, None], cxcywh_to_xyxy(s_boxes)[:, None])
    return cross - entropy[..., None], l1, 1 - giou


@torch.no_grad()
def pair_costs(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    softmax: bool,
    class_cost: float,
    bbox_cost: float,
    giou_cost: float,
) -> Tensor:
    """Weighted distance (..., S, T) of every student prediction from every teacher prediction, to match them by.

    The class part is the cross entropy: `class_divergence` and a number of the teacher prediction alone.

    Args:
        student, teacher: logits (..., S, C) and boxes (..., S, 4); logits (..., T, C) and boxes (..., T, 4).
    """
    (s_logits, s_boxes), (t_logits, t_boxes) = student, teacher
    # Products of matrices and `cdist`, so that no (S, T, C) arises.
    if softmax:
        classes = -s_logits.log_softmax(-1) @ t_logits.softmax(-1).transpose(-1, -2)
    else:
        classes = F.softplus(s_logits).sum(-1, keepdim=True) - s_logits @ t_logits.sigmoid().transpose(-1, -2)
    # Added up in place: of many queries each (S, T) is large.
    cost = classes.mul_(class_cost)
    cost += torch.cdist(s_boxes, t_boxes, p=1).mul_(bbox_cost)
    giou = generalized_iou(cxcywh_to_xyxy(s_boxes)[..., :, None, :], cxcywh_to_xyxy(t_boxes)[..., None, :, :])
    cost += (1 - giou).mul_(giou_cost)
    return cost


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of cxcywh boxes, element by element and broadcast; of two boxes without area it is 0."""
    (a_low, a_high), (b_low, b_high) = (cxcywh_to_xyxy(x).split(2, -1) for x in (a, b))
    both = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0).prod(-1)
    union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - both
    return both / union.clamp(min=torch.finfo(union.dtype).tiny)


def clip_to_image(boxes: Tensor) -> Tensor:
    """The part of cxcywh boxes (..., 4) that lies in the image, [0, 1]; without area where there is none."""
    low, high = cxcywh_to_xyxy(boxes).clamp(0, 1).split(2, -1)
    return torch.cat([(low + high) / 2, high - low], -1)


def _entropy(logits: Tensor) -> Tensor:
    """Of Bernoulli distributions, each."""
    return F.softplus(logits) - logits * logits.sigmoid()
