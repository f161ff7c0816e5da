"""Imitation of predictions without any matching: what the matching of DETRDistill is worth shows against it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..detectors.base import DetectorOutput, DetectorSpec
from ..distances import clip_to_image, imitation_losses
from ..errors import UserError
from ..ops import full
from .base import DistillationMethod, MethodConfig, align_layers, check_layers, option


@dataclass
class IndexPairingConfig(MethodConfig):
    """The weights of the logits part of DETRDistill."""

    layers: int | None = option(None, "Last decoder layers to distil, aligned from the end; default: all")
    class_weight: float = option(1.0, "Weight of the divergence of the classes, summed over them")
    box_weight: float = option(5.0, "Weight of the L1 distance of the boxes, summed over coordinates")
    giou_weight: float = option(2.0, "Weight of 1 - GIoU of the boxes")
    clip_boxes: bool = option(True, "Clip the teacher's boxes to the image first, as DETRDistill does")


class IndexPairing(DistillationMethod):
    """Query i of the student imitates query i of the teacher: classes, L1 and GIoU of the boxes, in every layer.

    A control and no published method. Queries of two detectors are in no common order, unless the student starts from
    the teacher's weights (`model.student.copy_weights`): any other must give up its order.

    Source: the losses of predictions, and their weights, of DETRDistill (Chang et al., ICCV 2023, arXiv 2211.10156).

    Requires: as many queries in the student as in the teacher. No decoder access, no features, no labels.

    Differs from the paper in: nothing is matched, and its imitation of features and its assignment are left out. The
    class loss is less the teacher's entropy: the same gradient.

    With equal predictions the losses are 0, those of the boxes only where all boxes lie in the image or with
    `clip_boxes: false`.
    """

    config_class = IndexPairingConfig

    def __init__(self, config: IndexPairingConfig, student: DetectorSpec, teacher: DetectorSpec) -> None:
        super().__init__(config, student, teacher)
        check_layers(config.layers, student)
        if student.num_queries != teacher.num_queries:
            raise UserError(
                f"index_pairing pairs query i with query i, but the student has {student.num_queries} queries and the "
                f"teacher {teacher.num_queries}: set model.student.num_queries to {teacher.num_queries}"
            )
        self.softmax = student.activation == "softmax"

    def compare(self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict]) -> dict[str, Tensor]:
        config, layers = self.config, align_layers(student, teacher, self.config.layers)
        with torch.autocast(student.logits.device.type, enabled=False):
            ours = tuple(full(x[-len(layers) :]) for x in (student.logits, student.boxes))
            logits, boxes = (torch.stack([full(x[t]) for _, t in layers]) for x in (teacher.logits, teacher.boxes))
            theirs = logits.detach(), (clip_to_image(boxes) if config.clip_boxes else boxes).detach()
            classes, l1, giou = imitation_losses(ours, theirs, self.softmax)
        return {
            "index_pairing_class": config.class_weight * classes,
            "index_pairing_box": config.box_weight * l1,
            "index_pairing_giou": config.giou_weight * giou,
        }
