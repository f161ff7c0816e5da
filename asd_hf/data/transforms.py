"""Encoded rows to samples: decoding, augmentation and resizing, by `torchvision.transforms.v2` on tv_tensors."""

from __future__ import annotations

import io
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from transformers.image_transforms import get_size_with_aspect_ratio

from ..errors import UserError
from .config import DataConfig

DEEP_MODES = ("I", "F")  # PIL's modes beyond 8 bits a channel begin so; converting them to RGB would clip


class ResizeShortest(v2.Transform):
    """Resizes the shorter side to one of `sizes`, drawn at random, rounding as Transformers' image processors do.

    Args:
        sizes: shorter sides in pixels.
        max_size: cap of the longer side in pixels, or None for none.
    """

    def __init__(self, sizes: list[int], max_size: int | None) -> None:
        super().__init__()
        self.sizes, self.max_size = sizes, max_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        size = self.sizes[int(torch.randint(len(self.sizes), ()))]
        height, width = get_size_with_aspect_ratio(v2.query_size(flat_inputs), size, self.max_size)
        return {"size": [max(1, height), max(1, width)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.resize, inpt, params["size"], antialias=True)


class RandomSizeCrop(v2.Transform):
    """Crops a window whose sides are drawn from [min_size, max_size] pixels, each as far as the image reaches.

    The crop of DETR (Carion et al., 2020, `datasets/transforms.py`).
    """

    def __init__(self, min_size: int, max_size: int) -> None:
        super().__init__()
        self.min_size, self.max_size = min_size, max_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        window = []
        for side in v2.query_size(flat_inputs):
            high = min(side, self.max_size)
            length = int(torch.randint(min(self.min_size, high), high + 1, ()))
            window.append((int(torch.randint(side - length + 1, ())), length))
        (top, height), (left, width) = window
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.crop, inpt, **params)


def build_transform(config: DataConfig, training: bool) -> v2.Transform:
    """The augmentation and the resize of `config`. Boxes that a crop leaves without area are not taken out."""
    fixed = config.resize == "fixed"
    sizes = config.train_sizes if training else [config.eval_size]
    resize = v2.Resize(config.fixed_size, antialias=True) if fixed else ResizeShortest(sizes, config.max_size)
    if not training or config.augmentation == "none":
        return resize
    flip = v2.RandomHorizontalFlip()
    if config.augmentation == "flip":
        return v2.Compose([flip, resize])
    # DETR's numbers belong to shorter sides of up to 800 pixels
    scale = (min(config.fixed_size) if fixed else max(config.train_sizes)) / 800
    before, (low, high) = [max(1, round(s * scale)) for s in (400, 500, 600)], [round(s * scale) for s in (384, 600)]
    crop = v2.Compose([ResizeShortest(before, None), RandomSizeCrop(max(1, low), max(1, high)), resize])
    return v2.Compose([flip, v2.RandomChoice([resize, crop])])


def resize_spec(config: DataConfig) -> dict[str, int]:
    """The `size` of a Transformers image processor that resizes as evaluation does here."""
    if config.resize == "fixed":
        return {"height": config.fixed_size[0], "width": config.fixed_size[1]}
    return {"shortest_edge": config.eval_size, "longest_edge": config.max_size}


class RowTransform:
    """Turns an encoded row of a `Source` into a sample for `collate`.

    Every random choice is a function of (seed, epoch, image_id) alone: neither the worker nor the order of the rows
    changes what is done to an image. Crowd boxes and boxes without area inside the image give no label.

    Args:
        training: whether to augment; otherwise the labels carry the ground truth for evaluation.
        label_map: the model's class index of each class index of the source, for labels and ground truth; None keeps
            the source's.
    """

    def __init__(self, config: DataConfig, training: bool, seed: int = 0, label_map: list[int] | None = None) -> None:
        self.transform, self.training = build_transform(config, training), training
        self.seed, self.epoch = seed, 0
        self.label_map = None if label_map is None else torch.tensor(label_map)

    def set_epoch(self, epoch: int) -> None:
        """Makes the next rows draw the random choices of this epoch."""
        self.epoch = epoch

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """One sample: `pixel_values` uint8 (3, h, w) and `labels` as the collated batch has them.

        Raises:
            UserError: the image cannot be decoded, or has another size than its annotation says.
        """
        image = decode(row)
        height, width = image.shape[-2:]
        objects = row["objects"]
        categories = torch.tensor(objects["category"], dtype=torch.int64)
        if self.label_map is not None:
            categories = self.label_map[categories]
        raw = torch.tensor(objects["bbox"], dtype=torch.float64).reshape(-1, 4)
        crowd = torch.tensor(objects["iscrowd"], dtype=torch.bool)

        corners = torch.cat([raw[:, :2], raw[:, :2] + raw[:, 2:]], 1).float()
        boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width))
        boxes = F.clamp_bounding_boxes(boxes, clamping_mode="hard")
        with seeded(self.seed, self.epoch, row["image_id"]):
            pixels, boxes = self.transform(tv_tensors.Image(image), boxes)
        h, w = pixels.shape[-2:]
        boxes = boxes.as_subclass(Tensor)
        size = boxes[:, 2:] - boxes[:, :2]
        keep = (size > 0).all(1) & ~crowd
        boxes = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, size], 1) / torch.tensor([w, h, w, h])
        labels = {
            "class_labels": categories[keep],
            "boxes": boxes[keep],
            "image_id": torch.tensor(row["image_id"]),
            "orig_size": torch.tensor([height, width]),
        }
        if not self.training:
            area = torch.tensor(objects["area"], dtype=torch.float64)
            labels["ground_truth"] = torch.cat([raw, torch.stack([area, crowd.double(), categories.double()], 1)], 1)
        return {"pixel_values": pixels.as_subclass(Tensor), "labels": labels}


def decode(row: dict[str, Any]) -> Tensor:
    """The pixels of a row, uint8 (3, height, width) in RGB, EXIF orientation not applied: COCO's boxes ignore it.

    Raises:
        UserError: the file is missing, is no image, has more than 8 bits a channel, or has another size than its
            annotation says.
    """
    image = row["image"]
    name = f"image {row['image_id']} ({image['path'] or 'no file name'})"
    try:
        with Image.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])) as file:
            if file.mode.startswith(DEEP_MODES):
                raise UserError(f"{name} has more than 8 bits a channel (mode {file.mode}): convert it to 8 bits")
            pixels = F.pil_to_tensor(file.convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"{name} is missing: put the file there or take the image out of the annotations") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} cannot be decoded: {error}") from error
    stated = (row["height"], row["width"])
    if None not in stated and tuple(pixels.shape[-2:]) != stated:
        raise UserError(
            f"{name} is {pixels.shape[-1]}x{pixels.shape[-2]} pixels but its annotation says {stated[1]}x{stated[0]}: "
            "correct the annotation (its boxes may belong to another size or orientation)"
        )
    return pixels


@contextmanager
def seeded(*key: int):
    """Runs a block with torch's CPU generator seeded from `key`, and restores the generator after it."""
    entropy = np.random.SeedSequence([int(part) % 2**64 for part in key])
    # not torch.manual_seed: that would reseed the accelerators as well
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
