"""DETRDistill: matched predictions, features near the teacher's queries, and its queries with their assignment.

Letters beside the usual: N layers that are distilled, P matched pairs, K predictions that make the mask of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..criterion import DetectionCriterion
from ..detectors.base import DetectorOutput, DetectorSpec, Question
from ..distances import box_iou, clip_to_image, imitation_losses, pair_costs
from ..features import AlignedMaps
from ..matching import match_sets
from ..ops import full
from ..questions import Translator
from ..targets import pad_labels
from .base import DistillationMethod, MethodConfig, align_layers, check_layers, option, take_layers, take_queries

Predictions = tuple[Tensor, Tensor]  # logits (N, B, Q, C) and boxes (N, B, Q, 4)


@dataclass
class DETRDistillConfig(MethodConfig):
    """Options of DETRDistill. The defaults are those of its code for Deformable DETR (R101 teaches R50)."""

    layers: int | None = option(None, "Last decoder layers to distil, aligned from the end; default: all")

    # Hungarian-matching logits distillation: all three weights 0 leave the part out
    class_weight: float = option(1.0, "Weight of the divergence of the classes, summed over them")
    box_weight: float = option(5.0, "Weight of the L1 distance of the boxes, summed over coordinates")
    giou_weight: float = option(2.0, "Weight of 1 - GIoU of the boxes")
    class_cost: float = option(1.0, "Weight of the classes' cross entropy in the matching")
    bbox_cost: float = option(5.0, "Weight of the L1 distance in the matching")
    giou_cost: float = option(2.0, "Weight of 1 - GIoU in the matching")
    clip_boxes: bool = option(True, "Clip the teacher's boxes to the image before matching and imitation")

    # Target-aware feature distillation: weight 0 leaves the part out
    feature_weight: float = option(1.0, "Weight of the squared error of the masked maps; levels and layers are summed")
    top_predictions: int = option(100, "Best pairs of query and class of the teacher that make the mask of a layer")
    mask_floor: float = option(0.01, "Least value of the mask before it is divided by its largest")

    # Query-prior assignment distillation: all three weights 0 leave the part out
    assignment_class_weight: float = option(2.0, "Weight of the class loss of the teacher's queries in the student")
    assignment_box_weight: float = option(5.0, "Weight of their L1 loss")
    assignment_giou_weight: float = option(2.0, "Weight of their GIoU loss")

    # In the code alone, where it is on
    contrastive_weight: float | None = option(
        None, "Weight of the contrast of matched decoder states; default: 0, or 0.2 with `as_released`"
    )
    contrastive_temperature: float = option(0.07, "Temperature of the contrast")
    contrastive_dim: int = option(512, "Width of its projections")

    as_released: bool = option(
        False,
        "What the code does and the paper does not: answers to the teacher's queries are matched with objects anew, "
        "states are contrasted, and every layer and image is matched apart (slower, same numbers)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("top_predictions", "mask_floor", "contrastive_temperature", "contrastive_dim")

    def term_weight(self, term: str) -> float | None:
        weight = super().term_weight(term)
        if term == "contrastive" and weight is None:
            return 0.2 if self.as_released else 0.0
        return weight

    @property
    def contrasts(self) -> bool:
        return self.term_weight("contrastive") > 0

    @property
    def matches(self) -> bool:
        return any((self.class_weight, self.box_weight, self.giou_weight, self.contrasts))

    @property
    def assigns(self) -> bool:
        return any((self.assignment_class_weight, self.assignment_box_weight, self.assignment_giou_weight))


class Contrast(nn.Module):
    """InfoNCE of matched decoder states: each teacher state is to find its partner among all matched of the image."""

    def __init__(self, student_dim: int, teacher_dim: int, dim: int, temperature: float) -> None:
        super().__init__()

        def projection(input_dim: int) -> nn.Sequential:
            layers = nn.Linear(dim, dim), nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, dim)
            return nn.Sequential(nn.Linear(input_dim, dim), *layers)

        self.student, self.teacher = projection(student_dim), projection(teacher_dim)
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(...) of states (..., P, D), pair by pair."""
        ours, theirs = F.normalize(self.student(student), dim=-1), F.normalize(self.teacher(teacher), dim=-1)
        scores = theirs @ ours.transpose(-1, -2) / self.temperature
        return -scores.log_softmax(-1).diagonal(dim1=-2, dim2=-1).mean(-1)


class DETRDistill(DistillationMethod):
    """Three kinds of imitation in every decoder layer, of the layer of the teacher that is as far from its end.

    Predictions: student and teacher queries are matched one to one at the least cost, and each pair's classes and
    boxes are brought together. Features: the student's maps imitate the teacher's, most where they look like those
    of the teacher's queries that found objects. Assignment: the teacher's queries are asked of the student's decoder,
    and its answers trained on the ground truth as the teacher's own answers are matched with it.

    Source: Chang et al., "DETRDistill: A Universal Knowledge Distillation Framework for DETR-families" (ICCV 2023,
    arXiv 2211.10156); formulas and weights from its code for Deformable DETR (BIVLab-USTC/DETRDistill).

    Requires: features and decode, each while its part has a weight. Any two query counts: of the larger set some
    queries have no partner. A softmax head is taken as one distribution; the code knows sigmoid heads alone.

    Differs from the paper in: its separate losses of positive and negative queries are one loss of all pairs, as in
    its code; the quality of a query is score times IoU as there, where the paper has exponents. Where widths differ,
    features and queries go through linear layers. Padding is left out of the features.

    Differs from the code in: the class loss is less the teacher's entropy (same gradient), and unmatched queries are
    left out, where the code sets them targets of 80. `as_released` does not run the encoder a second time, takes the
    references of the teacher's queries from the teacher and not from the student's layer, and contrasts within each
    image with layer norm, not within the batch with batch norm, so that several ranks train as one.

    With equal predictions the losses of predictions and features are 0, those of boxes only where all lie in the image
    or with `clip_boxes: false`; assignment and contrast never are.
    """

    config_class = DETRDistillConfig
    paper = {
        "title": "DETRDistill: A Universal Knowledge Distillation Framework for DETR-families",
        "id": "arXiv 2211.10156",
        "bibtex": "@inproceedings{detrdistill,\n"
        "  title={{DETRDistill}: A Universal Knowledge Distillation Framework for {DETR}-families},\n"
        "  author={Chang, Jiahao and Wang, Shuo and Xu, Hai-Ming and Chen, Zehui "
        "and Yang, Chenhongyi and Zhao, Feng},\n"
        "  booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},\n"
        "  pages={6898--6908},\n"
        "  year={2023}\n"
        "}",
    }

    def __init__(self, config: DETRDistillConfig, student: DetectorSpec, teacher: DetectorSpec) -> None:
        super().__init__(config, student, teacher)
        check_layers(config.layers, student)
        self.softmax = student.activation == "softmax"
        self.maps = AlignedMaps(student, teacher) if config.feature_weight else None
        self.translator = Translator(student, teacher) if config.assigns else None
        self.criterion = DetectionCriterion(
            student.activation,
            class_cost=2,  # as in the code's Deformable DETR, for teacher and student
            class_loss_weight=config.assignment_class_weight,
            bbox_loss_weight=config.assignment_box_weight,
            giou_loss_weight=config.assignment_giou_weight,
        )
        self.contrast = None
        if config.contrasts:
            widths = student.hidden_size, teacher.hidden_size
            self.contrast = Contrast(*widths, config.contrastive_dim, config.contrastive_temperature)

    @property
    def requires(self) -> frozenset[str]:
        # Contrast acts on the decoder's states, which every family has, and so on more than predictions; "features",
        # which every family has as well, says so.
        needs = {"features": self.config.feature_weight or self.config.contrasts, "decode": self.config.assigns}
        return frozenset(name for name, needed in needs.items() if needed)

    @property
    def teacher_reads(self) -> frozenset[str]:
        config = self.config
        needs = {
            "queries": config.feature_weight or config.contrasts,
            "features": config.feature_weight,
            "question": config.assigns,
        }
        return frozenset({"logits", "boxes"} | {name for name, needed in needs.items() if needed})

    def compare(self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict]) -> dict[str, Tensor]:
        config, layers = self.config, align_layers(student, teacher, self.config.layers)
        ours = take_layers(student, [layer for layer, _ in layers])
        with torch.no_grad():
            theirs = take_layers(teacher, [layer for _, layer in layers])
        losses: dict[str, Tensor] = {}
        self.statistics = {}
        with torch.autocast(student.logits.device.type, enabled=False):
            if config.matches:
                losses |= self._matched_losses(ours, theirs)
            if config.feature_weight:
                losses["detrdistill_feature"] = config.feature_weight * self._feature_loss(ours, theirs, labels)
        if config.assigns:
            answer = self.answer(student, teacher)
            losses |= self._assignment_losses(take_layers(answer, range(-len(layers), 0)), theirs, labels)
        return losses

    def question(self, teacher: DetectorOutput) -> Question | None:
        return self.translator(teacher.decode.own, teacher) if self.config.assigns else None

    # -- Hungarian-matching logits distillation -----------------------------------------------------------------------

    def _matched_losses(self, student: DetectorOutput, teacher: DetectorOutput) -> dict[str, Tensor]:
        config = self.config
        ours, (logits, boxes) = ((full(x.logits), full(x.boxes)) for x in (student, teacher))
        theirs = logits, clip_to_image(boxes) if config.clip_boxes else boxes
        rows, columns = self._match(ours, theirs)  # (N, B, P) each
        self.statistics = _kept_pairs(rows, columns, ours[0].shape[2])
        pairs = [take_queries(x, rows) for x in ours], [take_queries(x, columns) for x in theirs]
        classes, l1, giou = imitation_losses(*pairs, self.softmax)
        losses = {
            "detrdistill_class": config.class_weight * classes,
            "detrdistill_box": config.box_weight * l1,
            "detrdistill_giou": config.giou_weight * giou,
        }
        if self.contrast is not None:
            states = take_queries(full(student.queries), rows), take_queries(full(teacher.queries), columns)
            contrast = self.contrast(*states).mean(1).sum()
            losses["detrdistill_contrastive"] = config.term_weight("contrastive") * contrast
        return losses

    def _match(self, ours: Predictions, theirs: Predictions) -> tuple[Tensor, Tensor]:
        """Student and teacher queries (N, B, P) of the pairs of least cost."""
        options = self.softmax, self.config.class_cost, self.config.bbox_cost, self.config.giou_cost
        if not self.config.as_released:
            return match_sets(pair_costs(ours, theirs, *options))
        num_layers, num_images = ours[0].shape[:2]
        pairs = [
            match_sets(pair_costs([x[layer, image] for x in ours], [x[layer, image] for x in theirs], *options))
            for layer in range(num_layers)
            for image in range(num_images)
        ]
        return tuple(torch.stack(side).unflatten(0, (num_layers, num_images)) for side in zip(*pairs, strict=True))

    # -- target-aware feature distillation ----------------------------------------------------------------------------

    def _feature_loss(self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict]) -> Tensor:
        prototypes = self._prototypes(teacher, labels)
        total = 0.0
        for source, target, valid in self.maps(student, teacher):
            likeness = torch.einsum("nbd,bdhw->nbhw", prototypes, F.normalize(target, dim=1))
            mask = likeness.clamp(min=self.config.mask_floor)
            mask = mask / mask.amax((-2, -1), keepdim=True)
            error = (source - target).square().mean(1)  # (B, H, W), 0 where the image is not
            per_image = (mask.square() * error).sum((-2, -1)) / valid.sum((1, 2, 3)).clamp(min=1)  # (N, B)
            total = total + per_image.mean(1).sum()
        return total

    def _prototypes(self, teacher: DetectorOutput, labels: list[dict]) -> Tensor:
        """(N, B, D): the best queries' states as unit vectors, each times its quality, summed.

        So the product with a cell's unit vector is the sum of the qualities times the cosines.
        """
        logits, boxes, states = full(teacher.logits), full(teacher.boxes), full(teacher.queries)
        scores = logits.softmax(-1)[..., :-1] if self.softmax else logits.sigmoid()
        num_classes = scores.shape[-1]
        scores = scores.flatten(2)  # of every query and class
        scores, best = scores.topk(min(self.config.top_predictions, scores.shape[-1]))  # (N, B, K)
        query = best // num_classes
        _, objects, there = pad_labels(labels)
        iou = box_iou(boxes[..., None, :], objects.to(boxes)[:, None]).amax(-1)  # (N, B, T), 0 with padding
        iou = torch.where(there.any(-1)[:, None], iou, 1)  # without objects the score alone counts
        quality = scores * iou.gather(-1, query)
        return (quality[..., None] * take_queries(F.normalize(states, dim=-1), query)).sum(2)

    # -- query-prior assignment distillation --------------------------------------------------------------------------

    def _assignment_losses(
        self, answer: DetectorOutput, teacher: DetectorOutput, labels: list[dict]
    ) -> dict[str, Tensor]:
        """Detection losses of the student's `answer` to the teacher's queries, objects assigned as by the teacher."""
        pairs = None if self.config.as_released else self.criterion.assign([teacher], labels)[0]
        losses = self.criterion(answer, labels, pairs)
        return {
            "detrdistill_assignment_class": losses["loss_ce"],
            "detrdistill_assignment_box": losses["loss_bbox"],
            "detrdistill_assignment_giou": losses["loss_giou"],
        }


def _kept_pairs(rows: Tensor, columns: Tensor, num_students: int) -> dict[str, Tensor]:
    """Which part of the pairs is one in the layer before as well: how stable the matching is."""
    if len(rows) == 1:
        return {}
    partner = rows.new_full((*rows.shape[:2], num_students), -1).scatter(2, rows, columns)
    kept = (partner[1:] == partner[:-1]) & (partner[1:] >= 0)
    return {"detrdistill/kept_pairs": kept.sum() / columns[1:].numel()}
