"""The detection loss of Deformable DETR: the numbers of Transformers, in one pass over all layers and images."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .detectors.base import DetectorOutput
from .ops import cxcywh_to_xyxy, generalized_iou


class DetectionCriterion:
    """Bipartite matching, then focal, L1 and generalised IoU losses, summed over every decoder layer.

    Requirements: sigmoid class logits. Under `torch.distributed` every rank must call it as often as the others, since
    the number of boxes is averaged over ranks.

    References: Zhu et al., Deformable DETR (arXiv 2010.04159); matching and losses as in its code. Transformers' own
    loss gives the same numbers on one rank; on W ranks it is W times too large.

    Args:
        class_cost, bbox_cost, giou_cost: weights of the matching cost.
        class_loss_weight, bbox_loss_weight, giou_loss_weight: weights of the losses.
        focal_alpha: of the focal loss; the matching cost keeps 0.25.
    """

    def __init__(
        self,
        class_cost: float = 1,
        bbox_cost: float = 5,
        giou_cost: float = 2,
        class_loss_weight: float = 1,
        bbox_loss_weight: float = 5,
        giou_loss_weight: float = 2,
        focal_alpha: float = 0.25,
    ) -> None:
        self.class_cost, self.bbox_cost, self.giou_cost = class_cost, bbox_cost, giou_cost
        self.class_loss_weight, self.bbox_loss_weight = class_loss_weight, bbox_loss_weight
        self.giou_loss_weight, self.focal_alpha = giou_loss_weight, focal_alpha

    @classmethod
    def from_config(cls, config, class_loss_weight: float = 1) -> DetectionCriterion:
        """Takes the weights of a Transformers configuration, which fixes that of the class loss at 1 (paper: 2)."""
        return cls(
            config.class_cost,
            config.bbox_cost,
            config.giou_cost,
            class_loss_weight,
            config.bbox_loss_coefficient,
            config.giou_loss_coefficient,
            config.focal_alpha,
        )

    def __call__(self, output: DetectorOutput, labels: list[dict]) -> dict[str, Tensor]:
        """Weighted scalars `loss_ce`, `loss_bbox`, `loss_giou`; of the proposals of two stages the same with `_enc`.

        Args:
            output: predictions of B images.
            labels: B dicts with `class_labels` (T,) and `boxes` (T, 4) as (cx, cy, w, h) in [0, 1].
        """
        with torch.autocast(output.logits.device.type, enabled=False):
            predictions = {"": (_full(output.logits), _full(output.boxes))}
            if output.proposals is not None:
                logits, boxes = output.proposals
                predictions["_enc"] = _full(logits)[None], _full(boxes)[None]
            classes = torch.cat([label["class_labels"] for label in labels])
            boxes = torch.cat([label["boxes"] for label in labels]).to(predictions[""][1].dtype)
            # Proposals tell objects from background: class 0 stands for every object.
            targets = {"": (classes, boxes), "_enc": (torch.zeros_like(classes), boxes)}
            pairs = self.match(
                [(*predictions[stage], *targets[stage]) for stage in predictions],
                [len(label["class_labels"]) for label in labels],
            )
            count = _mean_count(classes)
            losses = {}
            for stage, matched in zip(predictions, pairs, strict=True):
                named = self._losses(*predictions[stage], *targets[stage], *matched)
                losses |= {name + stage: loss / count for name, loss in named.items()}
        return losses

    @torch.no_grad()
    def match(
        self, stages: list[tuple[Tensor, Tensor, Tensor, Tensor]], counts: list[int]
    ) -> list[tuple[Tensor, Tensor]]:
        """Hungarian matching of every layer and image, with a single copy to the host for all of them.

        Args:
            stages: for each set of predictions its logits (L, B, Q, C) and boxes (L, B, Q, 4), and the classes (N,)
                and boxes (N, 4) of the targets of all images one after another.
            counts: how many of the N targets each of the B images has.

        Returns:
            For each stage the indices of matched pairs: predictions counted over L * B * Q, and targets over N.
        """
        device = stages[0][0].device
        counts = np.array(counts)
        if not counts.any():
            return [(torch.empty(0, dtype=torch.int64, device=device),) * 2] * len(stages)
        # Images have unequal numbers of targets: `slots` (B, T) says which target stands in which column of an image.
        ends = np.cumsum(counts)
        starts = ends - counts
        slots = np.minimum(np.arange(counts.max()) + starts[:, None], ends[-1] - 1)
        slots = torch.from_numpy(slots).to(device, non_blocking=True)
        costs = [
            self._cost(logits, boxes, classes[slots], targets[slots]) for logits, boxes, classes, targets in stages
        ]
        host = torch.cat([cost.flatten() for cost in costs]).cpu().numpy()
        pairs, start = [], 0
        for num_layers, num_images, num_queries, num_slots in (cost.shape for cost in costs):
            stop = start + num_layers * num_images * num_queries * num_slots
            cost, start = host[start:stop].reshape(num_layers, num_images, num_queries, num_slots), stop
            matched = []
            for layer in range(num_layers):
                for image in np.flatnonzero(counts):
                    query, target = linear_sum_assignment(cost[layer, image, :, : counts[image]])
                    matched.append((query + (layer * num_images + image) * num_queries, target + starts[image]))
            pairs.append(np.concatenate(matched, axis=1))
        indices = torch.from_numpy(np.concatenate(pairs, axis=1)).to(device, non_blocking=True)
        return [tuple(stage) for stage in indices.split([p.shape[1] for p in pairs], dim=1)]

    def _cost(self, logits: Tensor, boxes: Tensor, classes: Tensor, targets: Tensor) -> Tensor:
        """(L, B, Q, T) cost of each of Q predictions for each of T targets of the same image."""
        index = classes[None, :, None].expand(*logits.shape[:3], -1)
        p = logits.gather(-1, index).sigmoid()
        class_cost = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
        boxes, targets = boxes[..., None, :], targets[None, :, None]
        bbox_cost = (boxes - targets).abs().sum(-1)
        giou_cost = -generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets))
        cost = self.class_cost * class_cost + self.bbox_cost * bbox_cost + self.giou_cost * giou_cost
        worst = torch.finfo(cost.dtype).max  # a prediction that is not finite is matched last
        return cost.nan_to_num(worst, worst, worst)

    def _losses(
        self, logits: Tensor, boxes: Tensor, classes: Tensor, targets: Tensor, query: Tensor, target: Tensor
    ) -> dict[str, Tensor]:
        """Weighted sums over the matched pairs, and of the focal loss over all predictions."""
        hit = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        hit.view(-1, logits.shape[-1])[query, classes[target]] = True
        right = torch.where(hit, logits, -logits)  # log-odds of the right answer
        alpha = torch.full_like(logits, 1 - self.focal_alpha).masked_fill(hit, self.focal_alpha)
        focal = alpha * (-right).sigmoid() ** 2 * -F.logsigmoid(right)
        predicted, wanted = boxes.flatten(0, 2)[query], targets[target]
        giou = generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted))
        return {
            "loss_ce": self.class_loss_weight * focal.sum(),
            "loss_bbox": self.bbox_loss_weight * (predicted - wanted).abs().sum(),
            "loss_giou": self.giou_loss_weight * (1 - giou).sum(),
        }


def _full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _mean_count(classes: Tensor) -> Tensor:
    """Targets of a rank, averaged over all ranks and at least 1: with the averaged gradients of
    DistributedDataParallel, W ranks then train as one rank with all their images."""
    count = torch.full((), float(len(classes)), device=classes.device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        count /= dist.get_world_size()
    return count.clamp(min=1)
