"""FGD: feature maps are imitated by focus on objects and on what the teacher attends to, and by their relations.

Source: Yang et al., "Focal and Global Knowledge Distillation for Detectors" (arXiv 2111.11837) and its code,
github.com/yzd-v/FGD. The weights are those of the Deformable DETR configuration of
github.com/BIVLab-USTC/DETRDistill, which are the code's for one-stage detectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..detectors.base import DetectorOutput, DetectorSpec
from ..features import AlignedMaps, cell_boxes, covered_cells
from ..targets import pad_labels
from .base import DistillationMethod, MethodConfig, option


@dataclass
class FGDConfig(MethodConfig):
    """Options of focal and global distillation.

    The weights go with sums over channels and cells, so larger images have larger losses. Unrelated maps of 256
    channels with a variance of 1 (images of 800 x 1333, 7 objects) start at 13, 1, 1 and 57, in the order of the
    weights. Most families have maps of another variance, see `AlignedMaps`. The authors' advice: keep the ratios and
    scale all terms together, here by `weight`, until the smallest is about 0.1 to 2; `asd-hf doctor` shows them.
    """

    foreground_weight: float = option(1e-3, "alpha, of the cells of objects")
    background_weight: float = option(5e-4, "beta, of the cells without")
    attention_weight: float = option(5e-4, "gamma, of the difference of the attentions")
    relation_weight: float = option(5e-6, "lambda, of the maps with their global context; 0 leaves the context out")
    temperature: float = option(0.5, "T of the softmax of the attentions; the higher, the more even they are")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("temperature")


class FGD(DistillationMethod):
    """Feature maps are imitated most on objects, small ones as much as large, and where the teacher attends.

    Focal: the squared difference of the maps, weighed by the teacher's attention over cells and over channels, apart
    for the cells of objects and for the others; and the difference of those attentions of student and teacher. Global:
    the squared difference of the maps after each has got a context of its own, a weighted mean of its cells passed
    through a bottleneck (GC block, arXiv 1904.11492); both blocks are trained with the student, the teacher's too.
    Terms are sums over channels and cells, as in the code, a mean over images, and a sum over levels.

    Requires: feature maps of both, and boxes. An image without objects, or without labels, is all background.

    Differs from the paper in: a 1x1 convolution only where the widths differ, as in its code; maps of other strides
    than the teacher's are resampled. Differs from the code in: maps are those that the transformer reads, of another
    scale than a dense detector's; cells of padding are left out of all sums, means and attentions; objects lie where
    the image is and are not stretched over the padding; the weights of the cells of a context have no bias, which
    would cancel.
    """

    config_class = FGDConfig
    requires = frozenset({"features"})
    paper = {
        "title": "Focal and Global Knowledge Distillation for Detectors",
        "id": "arXiv 2111.11837",
        "bibtex": "@inproceedings{fgd,\n"
        "  title={Focal and Global Knowledge Distillation for Detectors},\n"
        "  author={Yang, Zhendong and Li, Zhe and Jiang, Xiaohu and Gong, Yuan and Yuan, Zehuan and Zhao, Danpei and "
        "Yuan, Chun},\n"
        "  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},\n"
        "  year={2022}\n"
        "}",
    }

    def __init__(self, config: FGDConfig, student: DetectorSpec, teacher: DetectorSpec) -> None:
        super().__init__(config, student, teacher)
        self.teacher_layers = 1  # `trust` reads the last; the losses read maps alone
        self.maps = AlignedMaps(student, teacher)
        levels = self.maps.pairs if config.relation_weight else []
        self.student_context = nn.ModuleList(GlobalContext(teacher.hidden_size) for _ in levels)
        self.teacher_context = nn.ModuleList(GlobalContext(teacher.hidden_size) for _ in levels)

    def compare(self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict]) -> dict[str, Tensor]:
        config = self.config
        _, boxes, there = pad_labels(labels)
        focal, relation = [], []
        with torch.autocast(student.logits.device.type, enabled=False):
            for level, (source, target, valid) in enumerate(self.maps(student, teacher)):
                corners = cell_boxes(boxes, teacher.mask, target.shape[-2:])
                foreground, background = _masks(corners, there, valid[:, 0])
                focal.append(self._focal_losses(source, target, valid, foreground, background))
                if self.student_context:
                    ours, theirs = self.student_context[level], self.teacher_context[level]
                    difference = (ours(source, valid) - theirs(target, valid)) * valid
                    relation.append((difference**2).sum((1, 2, 3)).mean())
            foreground, background, attention = torch.stack(focal).sum(0)
            losses = {
                "fgd_foreground": config.foreground_weight * foreground,
                "fgd_background": config.background_weight * background,
                "fgd_attention": config.attention_weight * attention,
            }
            if relation:
                losses["fgd_relation"] = config.relation_weight * sum(relation)
        return losses

    def _focal_losses(
        self, source: Tensor, target: Tensor, valid: Tensor, foreground: Tensor, background: Tensor
    ) -> Tensor:
        """(3,): difference on objects, on the background, and of the attentions; sums, then means over images."""
        s_cells, s_channels = _attention(source, valid, self.config.temperature)
        t_cells, t_channels = _attention(target, valid, self.config.temperature)
        weighed = ((source - target) ** 2 * t_channels * t_cells).sum(1)  # (B, H, W)
        attention = (s_cells - t_cells).abs().sum((1, 2, 3)) + (s_channels - t_channels).abs().sum((1, 2, 3))
        on_objects, beside = ((mask * weighed).sum((1, 2)) for mask in (foreground, background))
        return torch.stack([on_objects, beside, attention]).mean(1)


def _masks(corners: Tensor, there: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (B, H, W) of the cells of objects, and of the others.

    An object is the cells from the one of its upper left corner to that after its lower right one, and each weighs 1
    over their number; of overlapping objects the smallest counts. The others share a weight of 1.

    Args:
        corners, there: (B, G, 4) of objects in cells, and which of them there are (B, G).
        valid: (B, H, W), 1 where the image is.
    """
    corners = torch.cat([corners[..., :2].floor(), corners[..., 2:].ceil() + 1], -1)
    share = there / (corners[..., 2:] - corners[..., :2]).prod(-1)  # (B, G)
    foreground = (covered_cells(corners, valid.shape[1:]) * share[..., None, None]).amax(1)
    background = valid * (foreground == 0)
    return foreground, background / background.sum((1, 2), keepdim=True).clamp(min=1)


def _attention(x: Tensor, valid: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Attention of a map (B, D, H, W) over cells (B, 1, H, W) and over channels (B, D, 1, 1), each 1 on average."""
    cells = valid.sum((2, 3), keepdim=True)  # (B, 1, 1, 1)
    strength = x.abs().mean(1, keepdim=True) / temperature
    over_cells = cells * _softmax_over_cells(strength, valid)
    strength = x.abs().sum((2, 3), keepdim=True) / cells.clamp(min=1) / temperature
    return over_cells, x.shape[1] * strength.softmax(1)


def _softmax_over_cells(scores: Tensor, valid: Tensor) -> Tensor:
    """Softmax of (B, 1, H, W) over the valid cells of each image; even where there is none."""
    scores = scores.masked_fill(valid == 0, torch.finfo(scores.dtype).min)  # infinity would have no softmax there
    return scores.flatten(2).softmax(-1).view_as(scores)


class GlobalContext(nn.Module):
    """Adds to every cell of a map what a learnt mean of its cells says; nothing at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Conv2d(width, 1, 1, bias=False)
        self.transform = nn.Sequential(
            nn.Linear(width, width // 2), nn.LayerNorm(width // 2), nn.ReLU(), nn.Linear(width // 2, width)
        )
        nn.init.kaiming_normal_(self.score.weight)
        nn.init.zeros_(self.transform[-1].weight)
        nn.init.zeros_(self.transform[-1].bias)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """(B, D, H, W) of `x` and its valid cells (B, 1, H, W)."""
        weights = _softmax_over_cells(self.score(x), valid)
        context = (weights * x).sum((2, 3))  # (B, D)
        return x + self.transform(context)[..., None, None]
