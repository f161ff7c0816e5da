"""The detection losses of DETR and its kin: the numbers of Transformers, in one pass over all layers and images."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .detectors.base import DetectorOutput, sum_over_ranks
from .losses import (
    CrossEntropy,
    FocalLoss,
    SigmoidLoss,
    box_losses,
    fine_grained_loss,
    pair_iou,
    self_distillation_loss,
)
from .matching import Pairs, start_matching
from .ops import cxcywh_to_xyxy, full, generalized_iou

MatchInput = tuple[Tensor, Tensor, Tensor, Tensor]  # logits, boxes, classes, targets: see `DetectionCriterion.match`


@dataclass
class Stage:
    """Predictions of layers that are judged alike.

    Attributes:
        logits, boxes: (L, B, Q, C) and (L, B, Q, 4).
        copies: of each target for a layer to find: groups of queries, see `start_matching`, or of denoising queries.
        pairs: known ones, of the first layer alone, that need no matching.
        agnostic: the predictions tell objects from background alone: class 0 stands for every object.
        sides, frames: distributions over the sides of boxes, see `losses.fine_grained_loss`.
        last: sides and logits (B, Q, .) of the decoder's last layer, which the others imitate.
        ends: the last layer here is that one.
    """

    logits: Tensor
    boxes: Tensor
    copies: int = 1
    pairs: Pairs | None = None
    agnostic: bool = False
    sides: Tensor | None = None
    frames: Tensor | None = None
    last: tuple[Tensor, Tensor] | None = None
    ends: bool = False

    def __post_init__(self) -> None:
        self.logits, self.boxes = full(self.logits), full(self.boxes)


class DetectionCriterion:
    """Bipartite matching, then class, L1 and generalised IoU losses, summed over every decoder layer.

    The class loss is the focal loss for sigmoid heads and the cross entropy for softmax heads, whose last column is
    "no object", unless another is given. Under `torch.distributed` every rank must call it as often as the others,
    since the number of boxes is averaged over ranks.

    References: Carion et al., DETR (arXiv 2005.12872), for softmax heads; Zhu et al., Deformable DETR (arXiv
    2010.04159), for sigmoid heads; matching and losses as in their code. Transformers' own loss gives the same numbers
    on one rank; on W ranks its box losses are W times too large.

    Args:
        activation: of the class logits, "sigmoid" or "softmax".
        class_cost, bbox_cost, giou_cost: weights of the matching cost.
        class_loss_weight, bbox_loss_weight, giou_loss_weight: weights of the losses.
        focal_alpha: of the focal loss; the matching cost keeps `cost_alpha`.
        no_object_weight: of queries without object in the cross entropy.
        class_loss: another class loss, see `losses`.
        cost_alpha, cost_gamma: of the matching cost of sigmoid heads.
        dense: boxes of every layer are judged by the matches of all layers together, as in DEIMv2.
        side_values: what the bins of `Stage.sides` stand for.
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
        class_loss: CrossEntropy | SigmoidLoss | None = None,
        cost_alpha: float = 0.25,
        cost_gamma: float = 2,
        dense: bool = False,
        side_values: Tensor | None = None,
        corner_l1: bool = False,
    ) -> None:
        self.activation, self.corner_l1 = activation, corner_l1
        self.class_cost, self.bbox_cost, self.giou_cost = class_cost, bbox_cost, giou_cost
        self.class_loss_weight, self.bbox_loss_weight = class_loss_weight, bbox_loss_weight
        self.giou_loss_weight = giou_loss_weight
        if class_loss is None:
            class_loss = FocalLoss(focal_alpha) if activation == "sigmoid" else CrossEntropy(no_object_weight)
        self.class_loss, self.cost_alpha, self.cost_gamma = class_loss, cost_alpha, cost_gamma
        self.dense, self.side_values = dense, side_values

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

    def __call__(self, output: DetectorOutput, labels: list[dict], pairs: Pairs | None = None) -> dict[str, Tensor]:
        """Weighted scalars `loss_ce`, `loss_bbox`, `loss_giou`; of the proposals of two stages the same with `_enc`.

        Args:
            output: predictions of B images.
            labels: B dicts with `class_labels` (T,) and `boxes` (T, 4) as (cx, cy, w, h) in [0, 1]. Images whose
                bool `labelled` is false have no objects here and take no part in the loss.
            pairs: of the decoder's queries, from `assign`, to take instead of matching; proposals are left out then.
        """
        stages = {"": Stage(output.logits, output.boxes)}
        if output.proposals is not None and pairs is None:
            logits, boxes = output.proposals
            stages["_enc"] = Stage(logits[None], boxes[None], agnostic=True)
        weights = {"loss_bbox": self.bbox_loss_weight, "loss_giou": self.giou_loss_weight}
        weights[self.class_loss.name] = self.class_loss_weight
        terms = self.terms(list(stages.values()), labels, None if pairs is None else [pairs])
        return {
            name + suffix: weights[name] * loss.sum()
            for suffix, losses in zip(stages, terms, strict=True)
            for name, loss in losses.items()
        }

    def terms(
        self, stages: list[Stage], labels: list[dict], pairs: list[Pairs] | None = None
    ) -> list[dict[str, Tensor]]:
        """For each stage its losses by name, (L,) each, without weights.

        Args:
            labels: as in `__call__`.
            pairs: of each stage that has none of its own, instead of matching.
        """
        device = stages[0].logits.device
        with torch.autocast(device.type, enabled=False):
            classes = torch.cat([label["class_labels"] for label in labels])
            boxes = torch.cat([label["boxes"] for label in labels]).to(stages[0].boxes.dtype)
            flags = [label.get("labelled", True) for label in labels]
            labelled = None if all(flags) else torch.tensor(flags)[:, None].to(boxes, non_blocking=True)  # (B, 1)
            if pairs is None:
                nothing = torch.zeros_like(classes)
                searching = [s for s in stages if s.pairs is None]
                matched = [(s.logits, s.boxes, nothing if s.agnostic else classes, boxes) for s in searching]
                finish = self.start_matching(
                    matched, [len(label["class_labels"]) for label in labels], searching[0].copies
                )
            # What follows needs no pairs: the device computes it while the host matches.
            begun = [self.class_loss.begin(stage.logits) for stage in stages]
            pairs = finish() if pairs is None else pairs
            union, pairs = pairs[-1] if self.dense else None, iter(pairs)
            sums, weights = [], []
            for stage, beginning in zip(stages, begun, strict=True):
                query, target = next(pairs) if stage.pairs is None else _in_every_layer(stage.pairs, stage.boxes)
                # Known pairs are those of denoising queries, which are no part of the union.
                dense = union is not None and stage.pairs is None
                paired = _in_every_layer(union, stage.boxes) if dense else (query, target)
                losses, iou = box_losses(stage.boxes, boxes, *paired, self.corner_l1)
                if stage.sides is not None:
                    losses |= self._side_losses(stage, boxes, paired, iou, labelled)
                own_iou = pair_iou(stage.boxes, boxes, query, target) if dense else iou
                chosen = torch.zeros_like(target) if stage.agnostic else classes[target]
                of_class, weight = self.class_loss.finish(beginning, query, chosen, own_iou, labelled)
                sums.append({self.class_loss.name: of_class} | losses)
                weights.append(weight)
            found = torch.tensor([len(classes), 0 if union is None else len(union[0])]).to(boxes, non_blocking=True)
            (targets, dense), weights, num_ranks = _over_ranks(found, weights)
            # With the averaged gradients of DistributedDataParallel, W ranks then train as one rank with all their
            # images; so it is the number of all ranks that is raised to 1: without any box, the loss is that of the
            # background. Without any labelled image it is 0.
            for losses, stage, weight in zip(sums, stages, weights, strict=True):
                own = (stage.copies * targets).clamp(min=1) / num_ranks
                paired = own if union is None or stage.pairs is not None else dense.clamp(min=1) / num_ranks
                of_class = own if weight is None else weight.clamp(min=1e-6) / num_ranks
                divisors = dict.fromkeys(losses, paired) | {self.class_loss.name: of_class, "loss_ddf": 1}
                losses |= {name: loss / divisors[name] for name, loss in losses.items()}
            return sums

    def _side_losses(
        self, stage: Stage, boxes: Tensor, pairs: Pairs, iou: Tensor, labelled: Tensor | None
    ) -> dict[str, Tensor]:
        sides, (query, _), values = full(stage.sides), pairs, self.side_values.to(boxes, non_blocking=True)
        return {
            "loss_fgl": fine_grained_loss(sides, full(stage.frames), values, boxes, *pairs, iou),
            # A mean already, over queries.
            "loss_ddf": self_distillation_loss(sides, *stage.last, query, iou, stage.ends, labelled),
        }

    def assign(self, outputs: list[DetectorOutput], labels: list[dict]) -> list[Pairs]:
        """Matches the queries of every layer of several outputs with ground truth, see `match`."""
        with torch.autocast(outputs[0].logits.device.type, enabled=False):
            classes = torch.cat([label["class_labels"] for label in labels])
            boxes = torch.cat([label["boxes"] for label in labels])
            stages = [(full(x.logits), full(x.boxes), classes, boxes.to(full(x.boxes).dtype)) for x in outputs]
            return self.match(stages, [len(label["class_labels"]) for label in labels])

    def match(self, predictions: list[MatchInput], counts: list[int]) -> list[Pairs]:
        """Hungarian matching of every layer and image, with a single copy to the host for all of them.

        Args:
            predictions: for each set its logits (L, B, Q, C) and boxes (L, B, Q, 4), and the classes (N,) and boxes
                (N, 4) of the targets of all images one after another.
            counts: how many of the N targets each of the B images has.

        Returns:
            For each set the indices of matched pairs: predictions counted over L * B * Q, and targets over N.
        """
        return self.start_matching(predictions, counts)()

    @torch.no_grad()
    def start_matching(
        self, predictions: list[MatchInput], counts: list[int], groups: int = 1
    ) -> Callable[[], list[Pairs]]:
        """Begins `match`; the function that is returned ends it. With `dense` it also gives the union of all pairs,
        queries counted over B * Q."""
        device = predictions[0][0].device
        counts = np.array(counts)
        if not counts.any():
            none = (torch.empty(0, dtype=torch.int64, device=device),) * 2
            return lambda: [none] * (len(predictions) + self.dense)
        # Images have unequal numbers of targets: `slots` (B, T) says which target stands in which column of an image.
        ends = np.cumsum(counts)
        starts = ends - counts
        slots = np.minimum(np.arange(counts.max()) + starts[:, None], ends[-1] - 1)
        slots = torch.from_numpy(slots).to(device, non_blocking=True)
        costs = [self.cost(logits, boxes, classes[slots], aims[slots]) for logits, boxes, classes, aims in predictions]
        return start_matching(costs, counts, groups, self.dense)

    def cost(self, logits: Tensor, boxes: Tensor, classes: Tensor, targets: Tensor) -> Tensor:
        """(L, B, Q, T) cost of each of Q predictions for each of T targets of the same image.

        Args:
            logits, boxes: (L, B, Q, C) and (L, B, Q, 4).
            classes, targets: (B, T) and (B, T, 4).
        """
        index = classes[None, :, None].expand(*logits.shape[:3], -1)
        if self.activation == "sigmoid":
            p = logits.gather(-1, index).transpose(2, 3).sigmoid()  # (L, B, T, Q), as matching wants it
            right = self.cost_alpha * (1 - p) ** self.cost_gamma * -(p + 1e-8).log()
            class_cost = right - (1 - self.cost_alpha) * p**self.cost_gamma * -(1 - p + 1e-8).log()
        else:
            class_cost = -logits.softmax(-1).gather(-1, index).transpose(2, 3)
        pairs = [(boxes, targets), (cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets))]
        (ours, theirs), corners = [(_apart(a)[:, :, None], _apart(b)[None, :, :, None]) for a, b in pairs]
        if self.corner_l1:
            ours, theirs = corners
        bbox_cost = sum((a - b).abs_() for a, b in zip(ours.unbind(-1), theirs.unbind(-1), strict=True))
        giou_cost = -generalized_iou(*corners)
        cost = self.class_cost * class_cost + self.bbox_cost * bbox_cost + self.giou_cost * giou_cost
        return cost.transpose(2, 3)


class TransformersCriterion:
    """Transformers' own loss in the place of `DetectionCriterion`: the same numbers on one rank, except that proposals
    of two stages have no loss. On W ranks its box losses, and focal losses, are W times too large.

    Args:
        model: a `...ForObjectDetection` whose `loss_function` is that of DETR or Deformable DETR.
        class_loss_weight: of the class loss, for which Transformers has none.
    """

    def __init__(self, model: nn.Module, class_loss_weight: float = 1) -> None:
        self.model, self.class_loss_weight = model, class_loss_weight

    def __call__(self, output: DetectorOutput, labels: list[dict]) -> dict[str, Tensor]:
        """Weighted scalars `loss_ce`, `loss_bbox`, `loss_giou`, see `DetectionCriterion.__call__`."""
        labelled = [i for i, label in enumerate(labels) if label.get("labelled", True)]
        # Every rank must ask for the loss, which counts boxes over ranks: without labels it is multiplied by 0.
        rows, config = labelled or [0], copy(self.model.config)
        with torch.autocast(output.logits.device.type, enabled=False):
            logits, boxes = full(output.logits)[:, rows], full(output.boxes)[:, rows]
            config.auxiliary_loss = len(logits) > 1
            config.decoder_layers = len(logits)
            _, parts, _ = self.model.loss_function(
                logits[-1], [labels[i] for i in rows], logits.device, boxes[-1], config, logits, boxes
            )
        layers = ["", *(f"_{i}" for i in range(len(logits) - 1))]
        weights = {
            "loss_ce": self.class_loss_weight,
            "loss_bbox": config.bbox_loss_coefficient,
            "loss_giou": config.giou_loss_coefficient,
        }
        return {
            name: weight * bool(labelled) * sum(parts[name + layer] for layer in layers)
            for name, weight in weights.items()
        }


def _apart(boxes: Tensor) -> Tensor:
    """The same (..., 4) boxes, laid out coordinate by coordinate, so that what reads one of them reads in a row."""
    return boxes.movedim(-1, 0).contiguous().movedim(0, -1)


def _in_every_layer(pairs: Pairs, boxes: Tensor) -> Pairs:
    """The pairs of one layer, queries counted over B * Q, as those of all layers of `boxes` (L, B, Q, 4)."""
    (query, target), (num_layers, num_images, num_queries, _) = pairs, boxes.shape
    steps = num_images * num_queries * torch.arange(num_layers, device=query.device)
    return (steps[:, None] + query).flatten(), target.repeat(num_layers)


def _over_ranks(counts: Tensor, weights: list[Tensor | None]) -> tuple[Tensor, list[Tensor | None], int]:
    """Sums over all ranks of `counts` and of those `weights` that are given, and how many ranks there are.

    Every rank must have the same ones, whatever its images: it has no denoising queries where they have no objects.
    """
    given = [weight for weight in weights if weight is not None]
    totals, num_ranks = sum_over_ranks(torch.cat([counts, *(weight.detach()[None] for weight in given)]))
    summed = iter(totals[len(counts) :])
    return totals[: len(counts)], [None if weight is None else next(summed) for weight in weights], num_ranks
