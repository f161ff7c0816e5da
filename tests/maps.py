"""Random feature maps of two detectors, and loops in float64 that say how they meet."""

from __future__ import annotations

from dataclasses import replace

import torch

from asd_hf.detectors.base import DetectorOutput, DetectorSpec

SPEC = DetectorSpec(
    family="deformable_detr",
    hidden_size=6,
    class_names=("a", "b"),
    num_layers=2,
    num_queries=4,
    strides=(8, 16),
    pixel_mean=(0, 0, 0),
    pixel_std=(1, 1, 1),
    activation="sigmoid",
    capabilities=frozenset({"features"}),
)


def spec(**changes):
    return replace(SPEC, **changes)


def canvas(height, width, *sizes):
    """A mask whose images have these sizes (height, width)."""
    mask = torch.zeros(len(sizes), height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        mask[i, :h, :w] = True
    return mask


def output(mask, strides=(8, 16), width=6, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    batch, height, length = mask.shape
    features = [
        torch.randn(batch, width, -(-height // s), -(-length // s), generator=g, dtype=torch.float64).to(dtype)
        for s in strides
    ]
    empty = torch.zeros(1, batch, 1, 4)
    return DetectorOutput(empty, empty, empty, features, mask=mask)


def sampled(level, x, y):
    """Value (D,) of a map (D, H, W) at a point in cells, whose centres lie at halves; constant beyond the border."""
    height, width = level.shape[1:]
    x, y = min(max(x - 0.5, 0), width - 1), min(max(y - 0.5, 0), height - 1)
    left, top = int(x), int(y)
    right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
    dx, dy = x - left, y - top
    return (
        (1 - dx) * (1 - dy) * level[:, top, left]
        + dx * (1 - dy) * level[:, top, right]
        + (1 - dx) * dy * level[:, bottom, left]
        + dx * dy * level[:, bottom, right]
    )


def in_frame_of(source, source_mask, target_mask, size):
    """`source` at the places in the image where the cells of the other canvas have their centres."""
    result = torch.zeros(*source.shape[:2], *size, dtype=source.dtype)
    for b in range(len(source)):
        for i in range(size[0]):
            for j in range(size[1]):
                # As parts of the image, which may be beyond it: through pixels of one canvas to cells of the other.
                down = (i + 0.5) / size[0] * target_mask.shape[1] / int(target_mask[b, :, 0].sum())
                across = (j + 0.5) / size[1] * target_mask.shape[2] / int(target_mask[b, 0].sum())
                y = down * int(source_mask[b, :, 0].sum()) / source_mask.shape[1] * source.shape[2]
                x = across * int(source_mask[b, 0].sum()) / source_mask.shape[2] * source.shape[3]
                result[b, :, i, j] = sampled(source[b], x, y)
    return result


def inside(mask, size):
    """[b][i][j]: whether the pixel at the centre of a cell is the image's."""
    return [
        [
            [
                bool(image[(2 * i + 1) * mask.shape[1] // (2 * size[0]), (2 * j + 1) * mask.shape[2] // (2 * size[1])])
                for j in range(size[1])
            ]
            for i in range(size[0])
        ]
        for image in mask
    ]
