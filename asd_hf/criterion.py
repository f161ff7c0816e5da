"""The detection losses of DETR and its kin: the numbers of Transformers, in one pass over all layers and images."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .detectors.base import DetectorOutput, sum_over_ranks
from .matching import match_targets
from .ops import cxcywh_to_xyxy, full, generalized_iou


class DetectionCriterion:
    """Bipartite matching, then class, L1 and generalised IoU losses, summed over every decoder layer.

    The class loss is the focal loss for sigmoid heads and the cross entropy for softmax heads, whose last column is
    "no object". Under `torch.distributed` every rank must call it as often as the others, since the number of boxes is
    averaged over ranks.

    References: Carion et al., DETR (arXiv 2005.12872), for softmax heads; Zhu et al., Deformable DETR (arXiv
    2010.04159), for sigmoid heads; matching and losses as in their code. Transformers' own loss gives the same numbers
    on one rank; on W ranks its box losses are W times too large.

    Args:
        activation: of the class logits, "sigmoid" or "softmax".
        class_cost, bbox_cost, giou_cost: weights of the matching cost.
        class_loss_weight, bbox_loss_weight, giou_loss_weight: weights of the losses.
        focal_alpha: of the focal loss; the matching cost keeps 0.25.
        no_object_weight: of queries without object in the cross entropy.
        corner_l1: the L1 cost and loss compare corners, and not centre and size.
    """

    def __init__(
        self,
        activation: str = "sigmoid",
        class_cost: float = 1,
        bbox_cost: float = 5,
        giou_cost: float = 2,
        class_loss_weight: float = 1,
        bbox_loss_weight: float = 5,
        giou_loss_weight: float = 2,
        focal_alpha: float = 0.25,
        no_object_weight: float = 0.1,
        corner_l1: bool = False,
    ) -> None:
        self.activation, self.corner_l1 = activation, corner_l1
        self.class_cost, self.bbox_cost, self.giou_cost = class_cost, bbox_cost, giou_cost
        self.class_loss_weight, self.bbox_loss_weight = class_loss_weight, bbox_loss_weight
        self.giou_loss_weight = giou_loss_weight
        self.focal_alpha, self.no_object_weight = focal_alpha, no_object_weight

    @classmethod
    def from_config(cls, config, activation: str = "sigmoid", class_loss_weight: float = 1) -> DetectionCriterion:
        """Takes the weights of a Transformers configuration, which has none for the class loss in most families."""
        own = {"focal_alpha": config.focal_alpha} if activation == "sigmoid" else {}
        own |= {"no_object_weight": config.eos_coefficient} if activation == "softmax" else {}
        return cls(
            activation,
            config.class_cost,
            config.bbox_cost,
            config.giou_cost,
            class_loss_weight,
            config.bbox_loss_coefficient,
            config.giou_loss_coefficient,
            corner_l1=getattr(config, "corner_l1", False),  # AdaMixer's; no other family has it
            **own,
        )

    def __call__(
        self, output: DetectorOutput, labels: list[dict], pairs: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Weighted scalars `loss_ce`, `loss_bbox`, `loss_giou`; of the proposals of two stages the same with `_enc`.

        Args:
            output: predictions of B images.
            labels: B dicts with `class_labels` (T,) and `boxes` (T, 4) as (cx, cy, w, h) in [0, 1]. Images whose
                bool `labelled` is false have no objects here and take no part in the loss.
            pairs: of the decoder's queries, from `assign`, to take instead of matching; proposals are left out then.
        """
        with torch.autocast(output.logits.device.type, enabled=False):
            predictions = {"": (full(output.logits), full(output.boxes))}
            if output.proposals is not None and pairs is None:
                logits, boxes = output.proposals
                predictions["_enc"] = full(logits)[None], full(boxes)[None]
            classes = torch.cat([label["class_labels"] for label in labels])
            boxes = torch.cat([label["boxes"] for label in labels]).to(predictions[""][1].dtype)
            # Proposals tell objects from background: class 0 stands for every object.
            targets = {"": (classes, boxes), "_enc": (torch.zeros_like(classes), boxes)}
            matches = [pairs]
            if pairs is None:
                stages = [(*predictions[stage], *targets[stage]) for stage in predictions]
                matches = self.match(stages, [len(label["class_labels"]) for label in labels])
            flags = [label.get("labelled", True) for label in labels]
            labelled = None if all(flags) else torch.tensor(flags)[:, None].to(boxes, non_blocking=True)  # (B, 1)
            class_loss = self._focal if self.activation == "sigmoid" else self._cross_entropy
            sums, counts = {}, {}
            for stage, matched in zip(predictions, matches, strict=True):
                logits, predicted = predictions[stage]
                loss, weight = class_loss(logits, targets[stage][0], *matched, labelled)
                sums["loss_ce" + stage] = self.class_loss_weight * loss
                sums |= {name + stage: loss for name, loss in self._box_losses(predicted, boxes, *matched).items()}
                if weight is not None:
                    counts["loss_ce" + stage] = weight
            return _normalised(sums, counts, len(classes))

    def assign(self, outputs: list[DetectorOutput], labels: list[dict]) -> list[tuple[Tensor, Tensor]]:
        """Matches the queries of every layer of several outputs with ground truth, see `match`."""
        with torch.autocast(outputs[0].logits.device.type, enabled=False):
            classes = torch.cat([label["class_labels"] for label in labels])
            boxes = torch.cat([label["boxes"] for label in labels])
            stages = [(full(x.logits), full(x.boxes), classes, boxes.to(full(x.boxes).dtype)) for x in outputs]
            return self.match(stages, [len(label["class_labels"]) for label in labels])

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
            self.cost(logits, boxes, classes[slots], targets[slots]) for logits, boxes, classes, targets in stages
        ]
        return match_targets(costs, counts)

    def cost(self, logits: Tensor, boxes: Tensor, classes: Tensor, targets: Tensor) -> Tensor:
        """(L, B, Q, T) cost of each of Q predictions for each of T targets of the same image.

        Args:
            logits, boxes: (L, B, Q, C) and (L, B, Q, 4).
            classes, targets: (B, T) and (B, T, 4).
        """
        index = classes[None, :, None].expand(*logits.shape[:3], -1)
        if self.activation == "sigmoid":
            p = logits.gather(-1, index).sigmoid()
            class_cost = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
        else:
            class_cost = -logits.softmax(-1).gather(-1, index)
        boxes, targets = boxes[..., None, :], targets[None, :, None]
        corners, target_corners = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets)
        if self.corner_l1:
            boxes, targets = corners, target_corners
        bbox_cost = (boxes - targets).abs().sum(-1)
        giou_cost = -generalized_iou(corners, target_corners)
        return self.class_cost * class_cost + self.bbox_cost * bbox_cost + self.giou_cost * giou_cost

    def _focal(
        self, logits: Tensor, classes: Tensor, query: Tensor, target: Tensor, labelled: Tensor | None
    ) -> tuple[Tensor, None]:
        """Sum of the focal loss over all (L, B, Q, C) logits; it is divided by the number of boxes."""
        hit = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        hit.view(-1, logits.shape[-1])[query, classes[target]] = True
        right = torch.where(hit, logits, -logits)  # log-odds of the right answer
        alpha = torch.full_like(logits, 1 - self.focal_alpha).masked_fill(hit, self.focal_alpha)
        if labelled is not None:
            alpha = alpha * labelled[..., None]
        return (alpha * (-right).sigmoid() ** 2 * -F.logsigmoid(right)).sum(), None

    def _cross_entropy(
        self, logits: Tensor, classes: Tensor, query: Tensor, target: Tensor, labelled: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum of the cross entropy over all queries, and the weights (L,) of a layer, to divide it by.

        The sum is over layers and is to be divided by each layer's weight; all layers have the same one.
        """
        no_object = logits.shape[-1] - 1
        wanted = torch.full(logits.shape[:3], no_object, device=logits.device)
        wanted.view(-1)[query] = classes[target]
        weight = torch.ones_like(logits[..., 0]).masked_fill(wanted == no_object, self.no_object_weight)
        if labelled is not None:
            weight = weight * labelled
        loss = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), reduction="none").view_as(weight)
        return (weight * loss).sum(), weight[-1].sum()

    def _box_losses(self, boxes: Tensor, targets: Tensor, query: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Weighted sums over the matched pairs."""
        predicted, wanted = boxes.flatten(0, 2)[query], targets[target]
        corners, wanted_corners = cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted)
        giou = generalized_iou(corners, wanted_corners)
        if self.corner_l1:
            predicted, wanted = corners, wanted_corners
        return {
            "loss_bbox": self.bbox_loss_weight * (predicted - wanted).abs().sum(),
            "loss_giou": self.giou_loss_weight * (1 - giou).sum(),
        }


def _normalised(sums: dict[str, Tensor], weights: dict[str, Tensor], num_boxes: int) -> dict[str, Tensor]:
    """Each sum over its weight, or else over the number of boxes, both averaged over all ranks.

    With the averaged gradients of DistributedDataParallel, W ranks then train as one rank with all their images; so it
    is the number of all ranks that is raised to 1 where there is no box.
    """
    boxes = next(iter(sums.values())).new_full((), num_boxes)
    totals, num_ranks = sum_over_ranks(torch.stack([boxes, *weights.values()]).detach())
    boxes, *totals = totals.unbind()
    # Without any box the loss is that of the background, without any labelled image it is 0.
    totals = {name: total.clamp(min=1e-6) for name, total in zip(weights, totals, strict=True)}
    return {name: loss / (totals.get(name, boxes.clamp(min=1)) / num_ranks) for name, loss in sums.items()}
