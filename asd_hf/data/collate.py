"""Samples to a padded batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SCALARS = ("image_id", "orig_size")  # labels of one value an image, stacked and not joined


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Pads images at the bottom and the right; boxes stay relative to the valid image.

    Returns:
        `pixel_values` uint8 (B, 3, H, W), zero where padded; `pixel_mask` bool (B, H, W), true where valid;
        `labels`, a list of B dictionaries: `class_labels` int64 (T,), `boxes` float32 (T, 4) as cxcywh in [0, 1],
        `image_id` int64 (), `orig_size` int64 (2,) as (height, width) of the file; in training `labelled`, a
        plain bool, false for an image without annotations; in evaluation `ground_truth` float64 (G, 7): x, y, w, h in
        pixels of the file, area, iscrowd, class index, of all annotations.
        Where the teacher has a view of its own also `teacher_pixel_values` uint8 (B, 3, H', W') and
        `teacher_pixel_mask` bool (B, H', W'), padded by themselves; the labels are the same for both views. Where its
        predictions are on disk, `teacher`: their tensors, stacked.
    """
    return unpack(pack(samples))


def pack(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch with the labels of all images joined, so that a worker sends a handful of tensors and not six an image.

    Each tensor sent takes a file descriptor; with one a label, large batches run out of them.
    """
    batch: dict[str, Any] = {}
    batch["pixel_values"], batch["pixel_mask"] = pad([sample["pixel_values"] for sample in samples])
    if "teacher_pixel_values" in samples[0]:
        images = [sample["teacher_pixel_values"] for sample in samples]
        batch["teacher_pixel_values"], batch["teacher_pixel_mask"] = pad(images)
    if "teacher" in samples[0]:
        batch["teacher"] = {name: torch.stack([s["teacher"][name] for s in samples]) for name in samples[0]["teacher"]}
    labels = {}
    for key in samples[0]["labels"]:
        values = [sample["labels"][key] for sample in samples]
        if key == "labelled":  # no tensor: on a device, reading it would wait
            labels[key] = values
            continue
        values = [value[None] for value in values] if key in SCALARS else values
        labels[key] = (torch.cat(values), [len(value) for value in values])
    return {**batch, "labels": labels}


def unpack(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch of `collate` from a packed one, its labels as views of the joined tensors."""
    columns = {}
    for key, values in batch["labels"].items():
        if key != "labelled":
            joined, lengths = values
            values = joined.split(lengths)
        columns[key] = [value[0] for value in values] if key in SCALARS else values
    labels = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return {**batch, "labels": labels}


def pad(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Images (3, h, w) as (B, 3, H, W), zero where padded, and their mask (B, H, W)."""
    height, width = max(image.shape[-2] for image in images), max(image.shape[-1] for image in images)
    pixel_values = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    pixel_mask = torch.zeros(len(images), height, width, dtype=torch.bool)
    for index, image in enumerate(images):
        h, w = image.shape[-2:]
        pixel_values[index, :, :h, :w] = image
        pixel_mask[index, :h, :w] = True
    return pixel_values, pixel_mask
