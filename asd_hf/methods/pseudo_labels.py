"""The teacher's sure predictions as further ground truth: what imitation gains over mere labels shows against it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.ops import nms

from ..criterion import DetectionCriterion
from ..detectors.base import DetectorOutput, DetectorSpec
from ..distances import box_iou, clip_to_image
from ..errors import UserError
from ..ops import cxcywh_to_xyxy, full
from ..targets import pad_labels
from .base import DistillationMethod, MethodConfig, option


@dataclass
class PseudoLabelsConfig(MethodConfig):
    """Which predictions are labels, and the weights of a detection loss (those of Deformable DETR)."""

    threshold: float = option(0.5, "Least probability of the best class that makes a prediction a label")
    nms_iou: float | None = option(
        0.7, "Of predictions of one class that overlap by more than this only the best is a label; null: all are"
    )
    skip_known_iou: float | None = option(
        None, "Predictions that overlap an object of the ground truth by more than this are no labels; null: all are"
    )
    max_labels: int | None = option(100, "Most labels of an image, the surest ones; null: any number")
    class_weight: float = option(2.0, "Weight of the class loss")
    box_weight: float = option(5.0, "Weight of the L1 loss of the boxes")
    giou_weight: float = option(2.0, "Weight of the GIoU loss of the boxes")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("threshold", "nms_iou", "skip_known_iou"):
            if (value := getattr(self, name)) is not None and not 0 < value < 1:
                raise UserError(f"method.{name} must be between 0 and 1, not {value}")
        if self.max_labels is not None:
            self.require_positive("max_labels")


class PseudoLabels(DistillationMethod):
    """The student trains on what the teacher detects, by the usual detection loss of every decoder layer.

    A control: all that the teacher's unsure predictions, features and queries could teach is left out. It comes beside
    the loss of the ground truth and matches on its own. Images without labels count like any other.

    Source: self-training as in STAC (Sohn et al., "A Simple Semi-Supervised Learning Framework for Object Detection",
    arXiv 2005.04757).

    Requires: boxes and class probabilities of the teacher's last layer. No decoder access, no features, no labels.

    Differs from the paper in: the threshold is 0.5 where it is 0.9, for the scores of DETR and its kin are lower; the
    student sees the image as the teacher did, without stronger changes; labelled images get pseudo-labels too, and
    there objects that the teacher misses are background to this loss. A batch without any pseudo-label has the loss of
    the background, divided by one box. Students of families with a loss of their own (RT-DETR and its kin) get the
    focal loss here.

    The loss is against labels: equal predictions do not make it 0.
    """

    config_class = PseudoLabelsConfig
    paper = {
        "title": "A Simple Semi-Supervised Learning Framework for Object Detection",
        "id": "arXiv 2005.04757",
        "bibtex": "@article{stac,\n"
        "  title={A Simple Semi-Supervised Learning Framework for Object Detection},\n"
        "  author={Sohn, Kihyuk and Zhang, Zizhao and Li, Chun-Liang and Zhang, Han and Lee, Chen-Yu "
        "and Pfister, Tomas},\n"
        "  journal={arXiv preprint arXiv:2005.04757},\n"
        "  year={2020}\n"
        "}",
    }

    def __init__(self, config: PseudoLabelsConfig, student: DetectorSpec, teacher: DetectorSpec) -> None:
        super().__init__(config, student, teacher)
        self.teacher_layers = 1
        self.softmax = student.activation == "softmax"
        self.criterion = DetectionCriterion(
            student.activation,
            class_cost=2,  # as the original Deformable DETR matches
            class_loss_weight=config.class_weight,
            bbox_loss_weight=config.box_weight,
            giou_loss_weight=config.giou_weight,
        )

    def compare(self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict]) -> dict[str, Tensor]:
        student = replace(student, proposals=None)  # the decoder's layers alone
        losses = self.criterion(student, self._labels_of(teacher, labels))
        return {
            "pseudo_labels_class": losses["loss_ce"],
            "pseudo_labels_box": losses["loss_bbox"],
            "pseudo_labels_giou": losses["loss_giou"],
        }

    @torch.no_grad()
    def _labels_of(self, teacher: DetectorOutput, labels: list[dict]) -> list[dict]:
        """The teacher's labels in the form of the ground truth `labels`, surest first."""
        config = self.config
        logits, boxes = full(teacher.logits[-1]), clip_to_image(full(teacher.boxes[-1]))  # (B, Q, .)
        probabilities = logits.softmax(-1)[..., :-1] if self.softmax else logits.sigmoid()
        scores, classes = probabilities.max(-1)  # (B, Q)
        taken = scores > config.threshold
        if config.nms_iou is not None:
            images = torch.arange(len(scores), device=scores.device)[:, None]
            apart = images * probabilities.shape[-1] + classes  # a number for every image and class
            # Boxes of each number are moved two images' sides from those of the last, in float64, for that is far.
            corners = cxcywh_to_xyxy(boxes.double()) + 2 * apart[..., None]
            best = nms(corners.flatten(0, 1), scores.double().flatten(), config.nms_iou)
            taken &= torch.zeros_like(taken).flatten().index_fill(0, best, True).view_as(taken)
        if config.skip_known_iou is not None:
            _, known, _ = pad_labels(labels)  # padding overlaps nothing
            iou = box_iou(boxes[:, :, None], known.to(boxes)[:, None])  # (B, Q, G)
            taken &= (iou <= config.skip_known_iou).all(-1)
        order = scores.masked_fill(~taken, -1).argsort(1, descending=True)[:, : config.max_labels]
        counts = taken.sum(1).clamp(max=order.shape[1])
        self.statistics = {"pseudo_labels/per_image": counts.double().mean()}
        classes, boxes = classes.gather(1, order), boxes.take_along_dim(order[..., None], 1)
        rows = zip(classes, boxes, counts.tolist(), strict=True)  # the host must know the counts
        return [{"class_labels": c[:count], "boxes": b[:count]} for c, b, count in rows]
