"""MGD: from a part of its feature maps the student generates the whole of the teacher's.

Source: Yang et al., "Masked Generative Distillation" (arXiv 2205.01529) and its code, github.com/yzd-v/MGD. Neither
has a DETR; that the maps are taken between neck and transformer, and the mean for the sum, is as in the port to
Deformable DETR of github.com/xingyitong1/TPRD.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..detectors.base import DetectorOutput, DetectorSpec
from ..errors import UserError
from ..features import AlignedMaps, map_distance
from ..ops import uniform_noise
from .base import DistillationMethod, MethodConfig, option


@dataclass
class MGDConfig(MethodConfig):
    """Options of masked generative distillation."""

    # The code sums over channels and cells and weighs by 2e-5, which on maps of 100 x 167 x 256 is 85 times the mean.
    # The mean over maps with a variance near 1, as in Deformable DETR, starts near 1, and so does this loss. Most
    # families have others, see `AlignedMaps`: tune it with `asd-hf doctor`.
    generation_weight: float = option(1.0, "Weight of the squared difference of generated and teacher's maps")
    mask_ratio: float = option(0.65, "Part of the cells that the student must do without (code: 0.65; 0.45 two-stage)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mask_ratio < 1:
            raise UserError(f"method.mask_ratio must be from 0 to below 1, not {self.mask_ratio}")


class MGD(DistillationMethod):
    """From the cells that a random mask leaves of its maps, the student generates the teacher's maps.

    Maps are paired by stride; the student's is brought to the teacher's width by a 1x1 convolution, masked, and passed
    through two 3x3 convolutions of its level, which are trained with it. The loss is the squared difference from the
    teacher's map: a mean over channels and the cells that lie in the image, then over images and levels. As the
    student's own maps are never compared, equal ones do not give 0.

    Masks depend on step and image alone: the same in any batch, on any number of ranks and after a resumed run.

    Requires: feature maps of both. No labels.

    Differs from the paper in: a mean and not a sum; cells of padding are left out; the 1x1 convolution is left out
    where the widths are the same, as in the paper's code.
    """

    config_class = MGDConfig
    requires = frozenset({"features"})
    paper = {
        "title": "Masked Generative Distillation",
        "id": "arXiv 2205.01529",
        "bibtex": "@inproceedings{mgd,\n"
        "  title={Masked Generative Distillation},\n"
        "  author={Yang, Zhendong and Li, Zhe and Shao, Mingqi and Shi, Dachuan and Yuan, Zehuan and Yuan, Chun},\n"
        "  booktitle={European Conference on Computer Vision},\n"
        "  year={2022}\n"
        "}",
    }

    def __init__(self, config: MGDConfig, student: DetectorSpec, teacher: DetectorSpec) -> None:
        super().__init__(config, student, teacher)
        self.teacher_layers = 1  # `trust` reads the last; the losses read maps alone
        self.maps = AlignedMaps(student, teacher)
        self.generators = nn.ModuleList(_generator(teacher.hidden_size) for _ in self.maps.pairs)

    def compare(self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict]) -> dict[str, Tensor]:
        ids = torch.stack([label["image_id"] for label in labels])
        distances = []
        for level, (source, target, valid) in enumerate(self.maps(student, teacher)):
            noise = uniform_noise(ids, self.step, source.shape[-2:], stream=level)
            kept = (noise >= self.config.mask_ratio)[:, None]  # (B, 1, H, W): one value for all channels
            generated = self.generators[level](source * kept)  # under autocast, as a part of the model would be
            distances.append(map_distance(generated, target, valid))  # in fp32, for the maps are
        return {"mgd_generation": self.config.generation_weight * torch.stack(distances).mean()}


def _generator(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
