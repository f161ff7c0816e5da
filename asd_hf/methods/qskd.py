"""QSKD: what is distilled are the queries near objects, and what they look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..criterion import DetectionCriterion
from ..detectors.base import DetectorOutput, DetectorSpec, sum_over_ranks
from ..distances import box_distances, class_divergence
from ..errors import UserError
from ..features import AlignedMaps, valid_cells
from ..ops import cxcywh_to_xyxy, full, generalized_iou
from ..targets import pad_labels
from .base import DistillationMethod, MethodConfig, align_layers, check_layers, option, take_layers, take_queries


@dataclass
class QSKDConfig(MethodConfig):
    """Options of QSKD. The defaults are those of the third-party code that the class names."""

    layers: int | None = option(None, "Last decoder layers of the student to distil; null: all")
    giou_threshold: float = option(0.0, "GIoU with an object above which an unmatched query is a hard negative")
    # At this weight each layer starts at about 1 on canvases of 640 x 640 pixels, where attention covers few of many
    # cells, and at 15 on the packaged shapes of 64 x 64: set less where images are small.
    feature_weight: float = option(100.0, "Attention-guided feature distillation: mean over cells, for each layer")
    class_weight: float = option(1.0, "Local prediction distillation: class divergence, mean over pairs")
    box_weight: float = option(5.0, "Local prediction distillation: L1, mean over pairs")
    giou_weight: float = option(2.0, "Local prediction distillation: 1 - GIoU, mean over pairs")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.giou_threshold < 1:
            raise UserError(f"method.giou_threshold must be in [-1, 1), not {self.giou_threshold}")

    @property
    def predicts(self) -> bool:
        return any((self.class_weight, self.box_weight, self.giou_weight))


@dataclass
class Groups:
    """Group query selection: the queries that are distilled, and the object that each stands for."""

    objects: Tensor  # (L, B, Q): which of the G objects of its image, or G: not selected
    giou: Tensor  # (L, B, Q) with that object
    order: Tensor  # (L, B, Q): query indices, object by object: its matched query, then the others by falling GIoU
    counts: Tensor  # (L, B, G + 1): how many queries each object has


class QSKD(DistillationMethod):
    """Distils matched queries and hard negatives: unmatched queries whose box overlaps an object well.

    Group query selection (GQS) does so in both models, and gives each query to one object. The maps are compared where
    the teacher's selected queries look (AGFD). Predictions are compared within the groups of an object: the matched
    queries of both models with each other, the hard negatives by their rank in GIoU (LAPD), so that no query of one
    object imitates that of another and no bipartite match of all predictions is needed.

    Source: Liu et al., "Knowledge Distillation via Query Selection for Detection Transformer", arXiv 2409.06443. No
    code is public, and of the text we know the abstract and secondary accounts. From the re-implementation in
    github.com/xingyitong1/TPRD come: the GIoU threshold, the weights 1 + GIoU of the queries, masking both maps before
    the mean squared error, all weights, and one loss a decoder layer.

    Requires: labels, the feature maps of both, and the cross-attention of the teacher's decoder. Without
    `feature_weight` nothing but labels and predictions. Numbers of queries, layers, levels and widths may differ: maps
    are brought to the teacher's cells and, where widths differ, by a 1x1 convolution to its width.

    Differs from the paper in (as far as we know it): feature maps are those before the encoder; pairing by rank is our
    reading of "local alignment". From TPRD in: hard negatives are paired within their object and not by a Hungarian
    match over the image; a layer's queries go with the same layer's attention; the mask is divided by its maximum
    on the image, however small; the class term lacks the teacher's entropy, so equal predictions give 0; means over
    pairs are over those of all ranks.
    """

    config_class = QSKDConfig
    paper = {
        "title": "Knowledge Distillation via Query Selection for Detection Transformer",
        "id": "arXiv 2409.06443",
        "bibtex": "@article{liu2024qskd,\n"
        "  title={Knowledge Distillation via Query Selection for Detection Transformer},\n"
        "  author={Liu, Yi and Wang, Luting and Tang, Zongheng and Liao, Yue and Sun, Yifan and Zhang, Lijun and "
        "Liu, Si},\n"
        "  journal={arXiv preprint arXiv:2409.06443},\n"
        "  year={2024}\n"
        "}",
    }

    def __init__(self, config: QSKDConfig, student: DetectorSpec, teacher: DetectorSpec) -> None:
        super().__init__(config, student, teacher)
        check_layers(config.layers, student)
        self.softmax = student.activation == "softmax"
        self.criterion = DetectionCriterion(student.activation)
        self.maps = AlignedMaps(student, teacher) if config.feature_weight else None

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"features"} if self.config.feature_weight else ())

    @property
    def teacher_requires(self) -> frozenset[str]:
        return frozenset({"attention"} if self.config.feature_weight else ())

    def compare(self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict]) -> dict[str, Tensor]:
        config = self.config
        layers = align_layers(student, teacher, config.layers)
        ours, theirs = take_layers(student, [i for i, _ in layers]), take_layers(teacher, [j for _, j in layers])
        matched = self.criterion.assign([ours, theirs], labels)
        losses: dict[str, Tensor] = {}
        with torch.autocast(student.logits.device.type, enabled=False):
            s_groups, t_groups = (
                self._select(output, pairs, labels) for output, pairs in zip((ours, theirs), matched, strict=True)
            )
            if config.feature_weight:
                losses["qskd_feature"] = self._features(student, teacher, t_groups, [j for _, j in layers])
            if config.predicts:
                losses |= self._predictions(ours, theirs, s_groups, t_groups)
        return {name: getattr(config, f"{name.removeprefix('qskd_')}_weight") * loss for name, loss in losses.items()}

    @torch.no_grad()
    def _select(self, output: DetectorOutput, matched: tuple[Tensor, Tensor], labels: list[dict]) -> Groups:
        """GQS: matched queries, and others whose best GIoU with an object is above the threshold.

        Args:
            matched: queries, counted over L * B * Q, and their objects, counted over all images.
        """
        _, targets, there = pad_labels(labels)
        boxes = full(output.boxes)
        corners = cxcywh_to_xyxy(boxes)[..., None, :], cxcywh_to_xyxy(targets.to(boxes.dtype))[:, None]
        giou = generalized_iou(*corners).masked_fill(~there[:, None], -2)  # (L, B, Q, G)
        best, objects = giou.max(-1)
        nothing = there.shape[1]
        objects = torch.where(best > self.config.giou_threshold, objects, nothing)
        query, target = matched
        place = torch.cat([torch.arange(len(label["boxes"]), device=boxes.device) for label in labels])
        objects.view(-1)[query] = place[target]
        giou = giou.gather(-1, objects.clamp(max=nothing - 1)[..., None]).squeeze(-1)

        rank = giou.clone()
        rank.view(-1)[query] += 3  # above every GIoU
        order = rank.argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, objects.gather(-1, order).argsort(dim=-1, stable=True))
        counts = torch.zeros(*objects.shape[:2], nothing + 1, dtype=objects.dtype, device=objects.device)
        return Groups(objects, giou, order, counts.scatter_add(-1, objects, torch.ones_like(objects)))

    def _features(self, student: DetectorOutput, teacher: DetectorOutput, groups: Groups, layers: list[int]) -> Tensor:
        """AGFD: squared difference of masked maps, mean over an image's cells and over images, summed over layers.

        Args:
            groups: the teacher's, of these of its `layers`.
        """
        selected = groups.objects < groups.counts.shape[-1] - 1
        # Layers of the teacher that teach several of the student's have the same queries each time.
        weights = teacher.boxes.new_zeros(teacher.boxes.shape[:3], dtype=groups.giou.dtype)
        for layer, weight in zip(layers, (1 + groups.giou) * selected, strict=True):
            weights[layer] = weight
        looks = [full(look.detach()) for look in teacher.attention.look(weights)]
        looks = [torch.stack([look[layer] for layer in layers]) for look in looks]  # (L, B, H, W) a level
        # What falls on padding is no peak: on another canvas it would be another one.
        looks = [look * valid_cells(teacher.mask, look.shape[2:])[:, 0] for look in looks]
        peak = torch.stack([look.amax((2, 3)) for look in looks]).amax(0)  # (L, B)
        peak = peak.clamp(min=torch.finfo(peak.dtype).tiny)[..., None, None]
        shares = [((look / peak) ** 2).sum(0)[:, None] for look in looks]  # (B, 1, H, W) a level
        total, cells = 0, 0
        for (_, level), (ours, theirs, valid) in zip(self.maps.pairs, self.maps(student, teacher), strict=True):
            total = total + (shares[level] * (ours - theirs) ** 2).mean(1).sum((1, 2))  # (B,)
            cells = cells + valid.sum((1, 2, 3))
        return (total / cells.clamp(min=1)).mean()

    def _predictions(
        self, student: DetectorOutput, teacher: DetectorOutput, s_groups: Groups, t_groups: Groups
    ) -> dict[str, Tensor]:
        """LAPD: distances of the pairs of one rank in one object's groups, means over pairs, summed over layers."""
        order, objects = s_groups.order, s_groups.objects.gather(-1, s_groups.order)
        starts = [groups.counts.cumsum(-1) - groups.counts for groups in (s_groups, t_groups)]
        rank = torch.arange(order.shape[-1], device=order.device) - starts[0].gather(-1, objects)
        paired = (objects < s_groups.counts.shape[-1] - 1) & (rank < t_groups.counts.gather(-1, objects))
        partner = (starts[1].gather(-1, objects) + rank).clamp(max=t_groups.order.shape[-1] - 1)
        partner = t_groups.order.gather(-1, partner)

        boxes = take_queries(full(student.boxes), order), take_queries(full(teacher.boxes.detach()), partner)
        logits = take_queries(full(student.logits), order), take_queries(full(teacher.logits.detach()), partner)
        l1, giou = box_distances(*boxes)
        distances = {"qskd_class": class_divergence(*logits, self.softmax), "qskd_box": l1, "qskd_giou": giou}
        count = paired.sum((1, 2)).to(l1.dtype)  # (L,)
        self.statistics = {"qskd/pairs_per_image": count.mean() / order.shape[1]}
        total, num_ranks = sum_over_ranks(count)
        count = total.clamp(min=1) / num_ranks
        return {name: ((paired * distance).sum((1, 2)) / count).sum() for name, distance in distances.items()}
