"""Encoded rows to samples: decoding, augmentation and resizing, by the kernels of `torchvision.transforms.v2`.

What is done to a training image is drawn first and then done to its original pixels, once for each view of it.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision import tv_tensors
from torchvision.io import decode_jpeg
from torchvision.transforms.v2 import functional as F
from transformers.image_transforms import get_size_with_aspect_ratio

from ..errors import UserError
from .config import DataConfig, teacher_view
from .faults import BadRow
from .rows import encoded

FAULTS_OF_NAMES = (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)  # not of the machine
ORIENTATION = 0x0112  # the EXIF tag
DEEP_MODES = ("I", "F")  # PIL's modes beyond 8 bits a channel begin so; converting them to RGB would clip


@dataclass(frozen=True)
class Geometry:
    """What is done to one image: a flip, a crop, and one resize of its original pixels for the student's view."""

    flip: bool
    window: tuple[int, int, int, int]  # top, left, height, width in pixels of the flipped image
    size: tuple[int, int]  # (height, width) of the student's view


def draw_geometry(config: DataConfig, height: int, width: int) -> Geometry:
    """Draws the augmentation of a training image of `height` x `width` pixels, by torch's CPU generator."""
    flip = config.augmentation != "none" and bool(torch.rand(1) < 0.5)
    window = (0, 0, height, width)
    if config.augmentation == "detr" and int(torch.multinomial(torch.tensor([0.5, 0.5]), 1)):
        window = draw_window(config, height, width)
    if config.resize == "fixed":
        return Geometry(flip, window, tuple(config.fixed_size))
    size = config.train_sizes[int(torch.randint(len(config.train_sizes), ()))]
    return Geometry(flip, window, resized(*window[2:], size, config.max_size))


def count_geometries(config: DataConfig) -> int | None:
    """How many geometries the teacher can see of a training image: 1, 2 (as it is and flipped), or None for many."""
    one_size = config.resize == "fixed" or config.teacher_size is not None or len(set(config.train_sizes)) == 1
    if config.augmentation == "detr" or not one_size:
        return None
    return 2 if config.augmentation == "flip" else 1


def teacher_pixels(image: Tensor, geometry: Geometry, config: DataConfig) -> Tensor:
    """What the teacher sees of the pixels of an image, uint8 (3, h', w'), in training under `config`."""
    image = F.horizontal_flip(image) if geometry.flip else image
    image = F.crop(image, *geometry.window)
    size = geometry.size
    if config.teacher_size is not None:
        size = evaluation_size(teacher_view(config), *geometry.window[2:])
    return F.resize(image, size, antialias=True)


def evaluation_size(config: DataConfig, height: int, width: int) -> tuple[int, int]:
    """(height, width) to which evaluation resizes an image."""
    if config.resize == "fixed":
        return tuple(config.fixed_size)
    return resized(height, width, config.eval_size, config.max_size)


def draw_window(config: DataConfig, height: int, width: int) -> tuple[int, int, int, int]:
    """Draws the crop of DETR (Carion et al., 2020, `datasets/transforms.py`): (top, left, height, width).

    There the image is resized to a shorter side of 400, 500 or 600 pixels before a window of 384 to 600 is cut, each
    side as far as the image reaches. Here that window is mapped back to the original pixels, so that each view is
    resized once, from all that the image has.
    """
    # DETR's numbers belong to shorter sides of up to 800 pixels
    scale = (min(config.fixed_size) if config.resize == "fixed" else max(config.train_sizes)) / 800
    sizes, (low, high) = [max(1, round(s * scale)) for s in (400, 500, 600)], [round(s * scale) for s in (384, 600)]
    canvas = resized(height, width, sizes[int(torch.randint(len(sizes), ()))], None)
    spans = []
    for side, original in zip(canvas, (height, width), strict=True):
        longest = min(side, max(1, high))
        length = int(torch.randint(min(max(1, low), longest), longest + 1, ()))
        first = int(torch.randint(side - length + 1, ()))
        begin = min(round(first * original / side), original - 1)
        end = max(round((first + length) * original / side), begin + 1)
        spans.append((begin, end - begin))
    (top, height), (left, width) = spans
    return top, left, height, width


def resized(height: int, width: int, size: int, max_size: int | None) -> tuple[int, int]:
    """(height, width) with a shorter side of `size` and no longer one than `max_size`, as Transformers rounds them."""
    height, width = get_size_with_aspect_ratio((height, width), size, max_size)
    return max(1, height), max(1, width)


def resize_spec(config: DataConfig) -> dict[str, int]:
    """The `size` of a Transformers image processor that resizes as evaluation does here."""
    if config.resize == "fixed":
        return {"height": config.fixed_size[0], "width": config.fixed_size[1]}
    return {"shortest_edge": config.eval_size, "longest_edge": config.max_size}


def resize_options(size: Mapping[str, int]) -> dict[str, Any]:
    """The keys of the data section that resize in evaluation as an image processor with this `size` does."""
    if "shortest_edge" in size:
        return {"resize": "multiscale", "eval_size": size["shortest_edge"], "max_size": size["longest_edge"]}
    return {"resize": "fixed", "fixed_size": [size["height"], size["width"]]}


class Predictions(Protocol):
    """What a teacher on disk said of the images, in the place of its view of them."""

    def draw_epoch(self, epoch: int) -> int:
        """The epoch whose random choices the images have in `epoch`."""

    def read(self, image_id: int, epoch: int, geometry: Geometry, size: tuple[int, int]) -> dict[str, Tensor]:
        """The tensors of an image of `size` (height, width) under `geometry`."""


class RowTransform:
    """Turns an encoded row of a `Source` into a sample for `collate`.

    Every random choice is a function of (seed, epoch, image_id) alone: neither the worker nor the order of the rows
    nor `teacher_size` changes what is done to an image. Crowd boxes and boxes without area inside the image give no
    label.

    Args:
        training: whether to augment and to make the teacher's view, if `config.teacher_size` asks for one; otherwise
            the labels carry the ground truth for evaluation. The teacher is evaluated with `teacher_view(config)`.
        label_map: the model's class index of each class index of the source, for labels and ground truth; None keeps
            the source's.
        predictions: of the teacher, to be added to each training sample in place of the teacher's view.
    """

    def __init__(
        self,
        config: DataConfig,
        training: bool,
        seed: int = 0,
        label_map: list[int] | None = None,
        predictions: Predictions | None = None,
    ) -> None:
        self.config, self.training, self.predictions = config, training, predictions
        self.shows_teacher = training and config.teacher_size is not None and predictions is None
        self.seed, self.epoch = seed, 0
        self.label_map = None if label_map is None else torch.tensor(label_map)

    def set_epoch(self, epoch: int) -> None:
        """Makes the next rows draw the random choices of this epoch."""
        self.epoch = epoch

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """One sample: `pixel_values` uint8 (3, h, w), `labels` as the collated batch has them, and the teacher's view
        `teacher_pixel_values` uint8 (3, h', w') where there is one, or the `teacher`'s predictions.

        Raises:
            UserError: the image cannot be decoded, has another size than its annotation says, has too many boxes to
                train on, or is to be evaluated and has no annotations.
        """
        objects = row["objects"]
        if objects is None and not self.training:
            raise UserError(
                f"{_name(row)} of split {self.config.eval_split!r} has no annotations: it cannot be evaluated"
            )
        if self.training:
            check_boxes(row, self.config.max_boxes)
        labelled = objects is not None
        objects = objects if labelled else {"bbox": [], "category": [], "iscrowd": []}
        image = original = decode(row)
        height, width = image.shape[-2:]
        categories = torch.tensor(objects["category"], dtype=torch.int64)
        if self.label_map is not None:
            categories = self.label_map[categories]
        raw = torch.tensor(objects["bbox"], dtype=torch.float64).reshape(-1, 4)
        crowd = torch.tensor(objects["iscrowd"], dtype=torch.bool)

        corners = torch.cat([raw[:, :2], raw[:, :2] + raw[:, 2:]], 1)
        boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width))
        boxes = F.clamp_bounding_boxes(boxes, clamping_mode="hard")
        if self.training:
            epoch = self.epoch if self.predictions is None else self.predictions.draw_epoch(self.epoch)
            with seeded(self.seed, epoch, row["image_id"]):
                geometry = draw_geometry(self.config, height, width)
        else:
            geometry = Geometry(False, (0, 0, height, width), evaluation_size(self.config, height, width))
        if geometry.flip:
            image, boxes = F.horizontal_flip(image), F.horizontal_flip(boxes)
        image, boxes = F.crop(image, *geometry.window), F.crop(boxes, *geometry.window)
        h, w = geometry.window[2:]
        boxes = boxes.as_subclass(Tensor)
        size = boxes[:, 2:] - boxes[:, :2]
        keep = (size > 0).all(1) & ~crowd
        boxes = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, size], 1) / torch.tensor([w, h, w, h])
        labels = {
            "class_labels": categories[keep],
            "boxes": boxes[keep].float(),
            "image_id": torch.tensor(row["image_id"]),
            "orig_size": torch.tensor([height, width]),
        }
        if self.training:
            labels["labelled"] = labelled
        else:
            area = torch.tensor(objects["area"], dtype=torch.float64)
            labels["ground_truth"] = torch.cat([raw, torch.stack([area, crowd.double(), categories.double()], 1)], 1)
        sample = {"pixel_values": F.resize(image, geometry.size, antialias=True), "labels": labels}
        if self.shows_teacher:
            sample["teacher_pixel_values"] = teacher_pixels(original, geometry, self.config)
        if self.training and self.predictions is not None:
            sample["teacher"] = self.predictions.read(row["image_id"], self.epoch, geometry, (height, width))
        return sample


def decode(row: dict[str, Any]) -> Tensor:
    """The pixels of a row, uint8 (3, height, width) in RGB, EXIF orientation not applied: COCO's boxes ignore it.

    Raises:
        BadRow: the file is missing, is no image, is too large, has more than 8 bits a channel, or has another size
            than its annotation says.
        UserError: the file cannot be read for another reason.
    """
    image, name = row["image"], _name(row)
    try:
        data = encoded(image)
        with Image.open(io.BytesIO(data)) as file:
            if file.format == "EPS":  # Pillow has it run by Ghostscript
                raise BadRow("broken image", f"{name} is PostScript, a program: convert it to PNG or JPEG")
            if file.mode.startswith(DEEP_MODES):
                why = f"{name} has more than 8 bits a channel (mode {file.mode}): convert it to 8 bits"
                raise BadRow("deep image", why)
            pixels = _jpeg(data) if file.format == "JPEG" and file.mode == "RGB" else None
            if pixels is None:
                pixels = F.pil_to_tensor(file.convert("RGB"))
    except FileNotFoundError:
        why = f"{name} is missing: put the file there or take the image out of the annotations"
        raise BadRow("missing image", why) from None
    except (UserError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadRow("large image", f"{name} is too large: {error}") from error
    except UnidentifiedImageError as error:
        raise BadRow("broken image", f"{name} cannot be decoded: it is no image of a known format") from error
    except Exception as error:  # decoders of broken data raise whatever comes
        reason = getattr(error, "strerror", None) or error
        if getattr(error, "errno", None) not in (None, *FAULTS_OF_NAMES):
            raise UserError(f"{name} cannot be read: {reason}") from error
        raise BadRow("broken image", f"{name} cannot be decoded: {reason}") from error
    stated = (row["height"], row["width"])
    if None not in stated and tuple(pixels.shape[-2:]) != stated:
        raise BadRow(
            "other size",
            f"{name} is {pixels.shape[-1]}x{pixels.shape[-2]} pixels but its annotation says {stated[1]}x{stated[0]}: "
            "correct the annotation (its boxes may belong to another size or orientation)",
        )
    return pixels


def _jpeg(data: bytes) -> Tensor | None:
    """Pixels (3, height, width) of a JPEG in colour, the same as PIL's and sooner; None where PIL must say why not."""
    try:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    except RuntimeError:
        return None


def orientation(image: dict[str, Any]) -> int:
    """How the camera was held, 1 to 8 as EXIF has it, of the `image` of a row that can be decoded; 1 is upright."""
    with Image.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])) as file:
        if file.format not in ("JPEG", "MPO"):  # of other formats it may take decoding them
            return 1
        try:
            return file.getexif().get(ORIENTATION, 1)
        except Exception:  # broken EXIF data: the pixels are sound
            return 1


def upright(pixels: Tensor, orientation: int) -> Tensor:
    """Pixels (3, height, width) of a photograph as it was seen, by its `orientation`."""
    pixels = pixels.transpose(1, 2) if orientation in (5, 6, 7, 8) else pixels
    flips = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}
    return pixels.flip(flips[orientation]) if orientation in flips else pixels


def check_boxes(row: dict[str, Any], most: int | None) -> None:
    """Raises BadRow if the image of a row has more boxes than `most`, if that is given."""
    count = 0 if row["objects"] is None else len(row["objects"]["bbox"])
    if most is not None and count > most:
        raise BadRow("many boxes", f"{_name(row)} has {count:,} boxes, more than data.max_boxes={most}")


def _name(row: dict[str, Any]) -> str:
    return f"image {row['image_id']} ({row['image']['path'] or 'no file name'})"


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
