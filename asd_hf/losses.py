"""Losses of matched queries, of all layers and images at once and layer by layer; the host never waits for them.

Letters as in `detectors.base`. A pair is a query, counted over L * B * Q, and a target, counted over all images; every
layer has as many pairs, those of the first layer first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ops import cxcywh_to_xyxy, full, iou_and_giou


def sum_by_layer(values: Tensor, num_layers: int) -> Tensor:
    """(L,) sums of what the pairs (N, ...) have."""
    return values.reshape(num_layers, values.numel() // num_layers).sum(1)


@torch.no_grad()
def pair_iou(boxes: Tensor, targets: Tensor, query: Tensor, target: Tensor) -> Tensor:
    """IoU (N,) of each pair, see `box_losses`."""
    return iou_and_giou(cxcywh_to_xyxy(boxes.flatten(0, 2)[query]), cxcywh_to_xyxy(targets[target]))[0]


def box_losses(
    boxes: Tensor, targets: Tensor, query: Tensor, target: Tensor, corner_l1: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """Sums (L,) of the L1 distance and of 1 - GIoU over the pairs, and the IoU (N,) of each pair, without gradient.

    Args:
        boxes: predicted ones (L, B, Q, 4), cxcywh.
        targets: (T, 4) of all images.
        query, target: (N,) indices of pairs.
        corner_l1: the L1 distance is that of the corners, and not of centre and size.
    """
    predicted, wanted = boxes.flatten(0, 2)[query], targets[target]
    corners = cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted)
    iou, giou = iou_and_giou(*corners)
    if corner_l1:
        predicted, wanted = corners
    sums = {
        "loss_bbox": sum_by_layer((predicted - wanted).abs(), len(boxes)),
        "loss_giou": sum_by_layer(1 - giou, len(boxes)),
    }
    return sums, iou.detach()


@dataclass
class Begun:
    """What is known of a class loss before the matching is."""

    logits: Tensor  # (L, B, Q, C)
    sums: Tensor | None  # (L, B) of the losses, as if no query had an object
    gradients: Tensor  # of these losses at the logits; of a cross entropy, logarithms of the shares of the classes


class CrossEntropy:
    """Of softmax heads, whose last column is "no object", which weighs `no_object_weight`.

    As in `SigmoidLoss` the gradient is written down.
    """

    name = "loss_ce"

    def __init__(self, no_object_weight: float) -> None:
        self.no_object_weight = no_object_weight

    @torch.no_grad()
    def begin(self, logits: Tensor) -> Begun:
        return Begun(logits, None, logits.log_softmax(-1))

    def finish(
        self, begun: Begun, query: Tensor, classes: Tensor, iou: Tensor, labelled: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Weighted sums (L,) over the queries, and the weight of a layer, by which they are divided; all layers have
        the same. Arguments as in `SigmoidLoss.finish`."""
        logits, gradients = begun.logits, begun.gradients
        no_object = logits.shape[-1] - 1
        with torch.no_grad():
            wanted = torch.full(logits.shape[:3], no_object, device=logits.device)
            wanted.view(-1)[query] = classes
            weight = torch.ones_like(logits[..., 0]).masked_fill(wanted == no_object, self.no_object_weight)
            if labelled is not None:
                weight = weight * labelled
            wanted, weight = wanted[..., None], weight[..., None]
            sums = -(gradients.gather(-1, wanted) * weight).sum((1, 2, 3))
            gradients.exp_().scatter_add_(-1, wanted, -torch.ones_like(weight)).mul_(weight)
        return _Known.apply(logits, sums, gradients), weight[-1].sum()


class SigmoidLoss:
    """Of sigmoid heads: the binary cross entropy, of classes without object times `scale * p ** gamma`.

    Loss and gradient are written down together, since autograd would walk several times through all the logits.
    """

    name = "loss_ce"
    through_weight = True  # whether gradients flow through `p ** gamma`

    def __init__(self, scale: float, gamma: float) -> None:
        self.scale, self.gamma = scale, gamma

    @torch.no_grad()
    def begin(self, logits: Tensor) -> Begun:
        gradients, sums = torch.empty_like(logits), []
        # A CPU has one layer at a time in its cache, and need not ask for memory for all of them.
        size = 1 if logits.device.type == "cpu" else len(logits)
        for part, gradient in zip(logits.split(size), gradients.split(size), strict=True):
            losses, gradient[:] = self._background(part, part.sigmoid())
            sums.append(losses.sum((2, 3)))
        return Begun(logits, torch.cat(sums), gradients)

    def _background(self, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gradient of the logits `x`, of probability `p`, of classes without object."""
        entropy, weight = F.softplus(x), self.scale * p**self.gamma
        losses = weight * entropy
        if not self.through_weight:
            return losses, weight.mul_(p)
        return losses, entropy.addcmul_(entropy, p, value=-1).mul_(self.gamma).add_(p).mul_(weight)

    def finish(
        self, begun: Begun, query: Tensor, classes: Tensor, iou: Tensor, labelled: Tensor | None
    ) -> tuple[Tensor, None]:
        """Sums (L,) over all logits; they are divided by the number of boxes.

        Args:
            begun: of logits (L, B, Q, C).
            query, classes, iou: (N,) of the pairs: index, class and IoU of the boxes.
            labelled: (B, 1), 0 for images that take no part.
        """
        num_layers, num_images, num_queries, _ = begun.logits.shape
        row = query.div(num_queries, rounding_mode="floor")
        place = row.div(num_images, rounding_mode="floor"), row % num_images, query % num_queries, classes
        with torch.no_grad():
            x = begun.logits[place]
            p = x.sigmoid()
            losses, begun.gradients[place] = self.hit(x, p, iou)
            losses = losses - self._background(x, p)[0]
            sums = begun.sums
            if labelled is not None:
                sums = sums * labelled[:, 0]
                begun.gradients *= labelled[..., None]
            sums = sums.sum(1) + sum_by_layer(losses, num_layers)
        return _Known.apply(begun.logits, sums, begun.gradients), None

    def hit(self, x: Tensor, p: Tensor, iou: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gradient (N,) of the logits `x`, of probability `p`, of the objects' own classes."""
        raise NotImplementedError


class _Known(torch.autograd.Function):
    """Sums (L,) of losses of logits (L, B, Q, C), whose gradients are known."""

    @staticmethod
    def forward(ctx, logits: Tensor, sums: Tensor, gradients: Tensor) -> Tensor:
        ctx.save_for_backward(gradients)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, above: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * above[:, None, None, None], None, None


class FocalLoss(SigmoidLoss):
    """Lin et al., arXiv 1708.02002, with gamma 2: of Deformable DETR and its kin."""

    def __init__(self, alpha: float) -> None:
        super().__init__(1 - alpha, 2)
        self.alpha = alpha

    def hit(self, x: Tensor, p: Tensor, iou: Tensor) -> tuple[Tensor, Tensor]:
        q, entropy = (-x).sigmoid(), F.softplus(-x)
        return self.alpha * q**2 * entropy, -self.alpha * q**2 * (2 * p * entropy + q)


class VarifocalLoss(SigmoidLoss):
    """Zhang et al., arXiv 2008.13367: the IoU is target and weight of an object's class; of RT-DETR and D-FINE."""

    name = "loss_vfl"
    through_weight = False

    def hit(self, x: Tensor, p: Tensor, iou: Tensor) -> tuple[Tensor, Tensor]:
        return iou * (F.softplus(x) - iou * x), iou * (p - iou)


class MatchabilityAwareLoss(SigmoidLoss):
    """Huang et al., DEIM (arXiv 2412.04234): a power of the IoU is the target of an object's class; of DEIMv2."""

    name = "loss_mal"
    through_weight = False

    def hit(self, x: Tensor, p: Tensor, iou: Tensor) -> tuple[Tensor, Tensor]:
        target = iou**self.gamma
        return F.softplus(x) - target * x, p - target


class IoUAwareLoss(SigmoidLoss):
    """Of LW-DETR (arXiv 2406.03458) and RF-DETR: the target is p ** alpha * IoU ** (1 - alpha), at least 0.01."""

    def __init__(self, alpha: float) -> None:
        super().__init__(1, 2)
        self.alpha = alpha

    def hit(self, x: Tensor, p: Tensor, iou: Tensor) -> tuple[Tensor, Tensor]:
        target = (p**self.alpha * iou ** (1 - self.alpha)).clamp(min=0.01)
        return F.softplus(x) - target * x, p - target


# -- distributions over the sides of boxes, of D-FINE (Peng et al., arXiv 2410.13842) and DEIMv2 ---------------------


def fine_grained_loss(
    sides: Tensor, frames: Tensor, values: Tensor, targets: Tensor, query: Tensor, target: Tensor, iou: Tensor
) -> Tensor:
    """Sums (L,) over the pairs and their sides of the cross entropy with the two bins around the target's side.

    Args:
        sides: logits (L, B, Q, 4, bins).
        frames: boxes (L, B, Q, 4) from which the sides are measured, cxcywh.
        values: (bins,) what the bins stand for, rising, in widths and heights of the frame.
        targets: (T, 4) of all images, cxcywh.
        query, target, iou: (N,) of the pairs.
    """
    logits, frame = sides.flatten(0, 2)[query], frames.detach().flatten(0, 2)[query]
    corners, centre, size = cxcywh_to_xyxy(targets[target]), frame[:, :2], frame[:, 2:]
    outside = torch.cat([centre - corners[:, :2], corners[:, 2:] - centre], 1) / (size.repeat(1, 2) + 1e-16) - 0.5
    left = (torch.bucketize(outside, values, right=True) - 1).clamp(0, len(values) - 2)  # (N, 4)
    right_share = ((outside - values[left]) / (values[left + 1] - values[left])).clamp(0, 1)
    log_shares = logits.log_softmax(-1)
    bins = torch.stack([left, left + 1], -1)
    shares = torch.stack([1 - right_share, right_share], -1)
    losses = -(log_shares.gather(-1, bins) * shares).sum(-1) * iou[:, None]
    return sum_by_layer(losses, len(sides))


def self_distillation_loss(
    sides: Tensor,
    last: Tensor,
    last_logits: Tensor,
    query: Tensor,
    iou: Tensor,
    ends: bool,
    labelled: Tensor | None,
) -> Tensor:
    """(L,) divergences of the sides of each layer from those of the last one, at temperature 5.

    A matched query weighs its IoU, another the last layer's best probability; the means over the matched and over the
    others are averaged with the square roots of their numbers as weights.

    Args:
        sides: logits (L, B, Q, 4, bins).
        last, last_logits: the last layer's (B, Q, 4, bins) and (B, Q, C).
        query, iou: (N,) of the pairs.
        ends: the last of `sides` are `last`; they have loss 0.
        labelled: (B, 1), 0 for images that take no part.
    """
    temperature, num_layers = 5, len(sides)
    taught = num_layers - ends
    aim = (full(last).detach() / temperature).softmax(-1).expand_as(sides[:taught])
    ours = (sides[:taught] / temperature).log_softmax(-1)
    divergence = temperature**2 * F.kl_div(ours, aim, reduction="none").sum(-1).mean(-1)  # (L, B, Q)
    weight = full(last_logits).detach().sigmoid().amax(-1).repeat(num_layers, 1, 1)
    matched = torch.zeros_like(weight)
    weight.view(-1)[query], matched.view(-1)[query] = iou, 1
    parts = torch.stack([matched, 1 - matched])[:, :taught]  # (2, L, B, Q)
    if labelled is not None:
        parts = parts * labelled
    counts = parts.sum((2, 3))
    means = (parts * (weight[:taught] * divergence)).sum((2, 3)) / counts.clamp(min=1)
    roots = counts.sqrt()
    return F.pad((means * roots).sum(0) / roots.sum(0).clamp(min=1), (0, num_layers - taught))
