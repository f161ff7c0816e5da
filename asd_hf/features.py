"""Feature maps of teacher and student, brought to one size, width and frame; and where objects lie on them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .detectors.base import DetectorOutput, DetectorSpec
from .ops import cxcywh_to_xyxy, full


def pair_levels(student: DetectorSpec, teacher: DetectorSpec) -> list[tuple[int, int]]:
    """(student level, teacher level) of maps that are to agree: those of equal strides, or else of the nearest.

    Where no stride is the same, every level of the one with fewer levels is paired with the nearest of the other.
    """
    ours, theirs = student.strides, teacher.strides
    same = [(i, theirs.index(stride)) for i, stride in enumerate(ours) if stride in theirs]
    if same:
        return same
    if len(ours) <= len(theirs):
        return [(i, _nearest(stride, theirs)) for i, stride in enumerate(ours)]
    return [(_nearest(stride, ours), i) for i, stride in enumerate(theirs)]


def _nearest(stride: int, strides: tuple[int, ...]) -> int:
    return min(range(len(strides)), key=lambda i: abs(math.log(strides[i] / stride)))


class AlignedMaps(nn.Module):
    """The student's feature maps as the teacher has them: paired by stride, of its width, at its cells.

    A 1x1 convolution where the widths differ, bilinear sampling where the cells do. The maps of two views of an image
    are compared in the frame of the valid image, wherever their canvases end.

    How large their differences are depends on the teacher. Maps of Deformable DETR, Grounding DINO, LW-DETR and
    RF-DETR end in a norm of each image or cell and have a variance near 1. Those of other families have any: of DETR
    and its kin they end in a bare 1x1 convolution, of D-FINE and DEIMv2 in nothing where the widths agree, of YOLOS
    they are its patches, and of a fresh RT-DETR the variance is 0.02 to 0.05. Weights are to be tuned there with
    `asd-hf doctor`.

    Args:
        student, teacher: specs of the two.
        always: a convolution also where the widths are the same.
    """

    def __init__(self, student: DetectorSpec, teacher: DetectorSpec, always: bool = False) -> None:
        super().__init__()
        self.pairs = pair_levels(student, teacher)
        widths = student.hidden_size, teacher.hidden_size
        convolve = always or widths[0] != widths[1]
        self.project = nn.ModuleList(nn.Conv2d(*widths, 1) if convolve else nn.Identity() for _ in self.pairs)

    def forward(self, student: DetectorOutput, teacher: DetectorOutput) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each pair of levels the student's and the teacher's map (B, D, H, W), in fp32 or wider, and their valid
        cells (B, 1, H, W) as 0 and 1. Invalid cells of both maps are 0; the teacher's map has no gradient."""
        levels = []
        with torch.autocast(teacher.mask.device.type, enabled=False):
            for (ours, theirs), project in zip(self.pairs, self.project, strict=True):
                target = full(teacher.features[theirs].detach())
                valid = valid_cells(teacher.mask, target.shape[-2:]).to(target)
                source = full(student.features[ours])
                if student.mask is not teacher.mask or source.shape[-2:] != target.shape[-2:]:
                    source = _resample(source, student.mask, teacher.mask, target.shape[-2:])
                levels.append((project(source) * valid, target * valid, valid))
        return levels


def map_distance(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Squared difference of maps (B, D, H, W): mean over channels and an image's `valid` cells, then over images.

    An image too small to have a cell at this level counts as 0.
    """
    squared = ((student - teacher) ** 2 * valid).mean(1).sum((1, 2))  # (B,)
    return (squared / valid.sum((1, 2, 3)).clamp(min=1)).mean()


def valid_cells(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 1, H, W) bool: the cells of a map of `size` whose centres lie in the image, of a mask (B, H', W')."""
    rows, columns = (
        (2 * torch.arange(count, device=mask.device) + 1) * side // (2 * count)
        for count, side in zip(size, mask.shape[1:], strict=True)
    )
    return mask[:, rows][:, :, columns][:, None]


def _extent(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 2): the part of the canvas' width and height that is the image's."""
    return torch.stack([mask[:, 0].to(dtype).mean(1), mask[:, :, 0].to(dtype).mean(1)], -1)


def _resample(source: Tensor, source_mask: Tensor, target_mask: Tensor, size: tuple[int, int]) -> Tensor:
    """The map `source` (B, D, H', W') at the centres of the cells of another canvas, cells of `size`."""
    scale = _extent(source_mask, source.dtype) / _extent(target_mask, source.dtype)  # (B, 2)
    y, x = ((torch.arange(count, device=source.device).to(source.dtype) + 0.5) / count for count in size)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # (H, W, 2) of the target's canvas
    grid = grid * scale[:, None, None]  # (B, H, W, 2) of the source's
    return F.grid_sample(source, 2 * grid - 1, padding_mode="border", align_corners=False)


def cell_boxes(boxes: Tensor, mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (B, G, 4) in [0, 1] of the valid image as corners x1, y1, x2, y2 in cells of a map of `size` (H, W)."""
    extent = _extent(mask, boxes.dtype)
    cells = torch.stack([extent[:, 0] * size[1], extent[:, 1] * size[0]] * 2, -1)
    return cxcywh_to_xyxy(boxes) * cells[:, None]


def covered_cells(corners: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, G, H, W) bool: the cells that each box touches; `corners` (B, G, 4) in cells, from `cell_boxes`.

    A box without area touches the cell that it lies in.
    """
    height, width = size
    y, x = torch.arange(height, device=corners.device), torch.arange(width, device=corners.device)
    x1, y1, x2, y2 = corners.unbind(-1)
    columns = (x + 1 > x1[..., None]) & ((x < x2[..., None]) | (x <= x1[..., None]))
    rows = (y + 1 > y1[..., None]) & ((y < y2[..., None]) | (y <= y1[..., None]))
    return rows[..., :, None] & columns[..., None, :]
