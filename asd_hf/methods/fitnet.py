"""FitNet: the student's feature maps imitate the teacher's.

Source: Romero et al., "FitNets: Hints for Thin Deep Nets" (arXiv 1412.6550), which has one hidden layer of a
classifier as hint. Here the hints are the maps between neck and transformer, as in the port to Deformable DETR of
github.com/xingyitong1/TPRD.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..detectors.base import DetectorOutput, DetectorSpec
from ..features import AlignedMaps, map_distance
from .base import DistillationMethod, MethodConfig, option


@dataclass
class FitNetConfig(MethodConfig):
    """Options of feature imitation."""

    # On maps with a variance near 1, as in Deformable DETR, the loss starts between 1 and 2. Most families have
    # others, see `AlignedMaps`: tune it with `asd-hf doctor`.
    features_weight: float = option(1.0, "Weight of the squared difference of the maps")
    always_adapt: bool = option(False, "A 1x1 convolution on the student's maps also where the widths are the same")


class FitNet(DistillationMethod):
    """The student's feature maps imitate the teacher's, every cell and channel alike.

    Maps of the same stride are compared, or else of the nearest, after a 1x1 convolution of the student's to the
    teacher's width (the regressor of the paper). The loss is the squared difference: a mean over channels and the
    cells that lie in the image, then over images and levels.

    Requires: feature maps of both. No labels.

    Differs from the paper in: several hints and not one, trained together with the detector and not before it; the
    regressor has no size beyond 1x1, and is left out where the widths are the same. The weight is ours: the port
    divides a mean by the images of a GPU once more, so that its weight of 10 depends on their number.
    """

    config_class = FitNetConfig
    requires = frozenset({"features"})
    paper = {
        "title": "FitNets: Hints for Thin Deep Nets",
        "id": "arXiv 1412.6550",
        "bibtex": "@inproceedings{fitnets,\n"
        "  title={FitNets: Hints for Thin Deep Nets},\n"
        "  author={Romero, Adriana and Ballas, Nicolas and Kahou, Samira Ebrahimi and Chassang, Antoine and Gatta, "
        "Carlo and Bengio, Yoshua},\n"
        "  booktitle={International Conference on Learning Representations},\n"
        "  year={2015}\n"
        "}",
    }

    def __init__(self, config: FitNetConfig, student: DetectorSpec, teacher: DetectorSpec) -> None:
        super().__init__(config, student, teacher)
        self.teacher_layers = 1  # `trust` reads the last; the losses read maps alone
        self.maps = AlignedMaps(student, teacher, always=config.always_adapt)

    def compare(self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict]) -> dict[str, Tensor]:
        with torch.autocast(student.logits.device.type, enabled=False):
            distances = [map_distance(*level) for level in self.maps(student, teacher)]
            return {"fitnet_features": self.config.features_weight * torch.stack(distances).mean()}
