"""Images a second and core: our decoding, augmentation and resizing side by side with the usual ones."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any

import torch
from PIL import Image
from torchvision.transforms import functional as F
from transformers import DeformableDetrImageProcessor

from ..data import DataConfig, RowTransform, open_training_source
from ..data.rows import read_rows
from ..data.transforms import decode, draw_geometry, resized, seeded
from ..errors import UserError
from .sidebyside import Row, take_turns

OURS, USUAL, DECODING = "ours", "usual pipeline", "decoding alone"


def measure_data(config: DataConfig, num_images: int, rounds: int) -> dict[str, Row]:
    """Ours against the usual pipeline, and against decoding alone, on the first training images of `config`.

    Times are those of the CPU an image, on one thread, with the files in memory. The first round warms up.

    Raises:
        UserError: there are not so many images.
    """
    rows = read_images(config, num_images)
    sides = {OURS: RowTransform(config, training=True), USUAL: UsualTransform(config), DECODING: decode}

    def timed(transform: Callable[[dict], object]) -> float:
        start = process_time()
        for row in rows:
            transform(row)
        return (process_time() - start) / len(rows)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = take_turns({name: lambda side=side: timed(side) for name, side in sides.items()}, rounds)
    finally:
        torch.set_num_threads(threads)
    return {name: Row.of(f"data: {name}", times[OURS], times[name], "cpu") for name in (USUAL, DECODING)}


def read_images(config: DataConfig, num_images: int) -> list[dict[str, Any]]:
    """The first rows of the training data, with the bytes of their files."""
    source = open_training_source(replace(config, unlabelled=None, teacher_size=None))
    rows = list(itertools.islice(read_rows(source.stream), num_images))
    if len(rows) < num_images:
        raise UserError(f"--images {num_images}: {config.source} has {len(rows)}")
    for row in rows:
        image = row["image"]
        if image["bytes"] is None:
            row["image"] = image | {"bytes": Path(image["path"]).read_bytes()}
    return rows


class UsualTransform:
    """What examples of detection transformers do to an image, with the random choices of `RowTransform`.

    As DETR's and Deformable DETR's code: PIL decodes, flips, resizes before a crop and again after it, by
    `torchvision.transforms`; then Transformers' image processor normalises and makes labels of the annotations.
    """

    def __init__(self, config: DataConfig, seed: int = 0) -> None:
        self.config, self.seed = config, seed
        self.processor = DeformableDetrImageProcessor(do_resize=False, do_pad=False)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """`pixel_values` float (3, h, w) and `labels`."""
        with Image.open(io.BytesIO(row["image"]["bytes"])) as file:
            image = file.convert("RGB")
        width, height = image.size
        with seeded(self.seed, 0, row["image_id"]):
            geometry = draw_geometry(self.config, height, width)
        x, y, w, h = torch.tensor(row["objects"]["bbox"], dtype=torch.float64).reshape(-1, 4).unbind(1)
        boxes = torch.stack([x.clamp(0, width), y.clamp(0, height), (x + w).clamp(0, width), (y + h).clamp(0, height)])
        if geometry.flip:
            image = F.hflip(image)
            boxes = torch.stack([width - boxes[2], boxes[1], width - boxes[0], boxes[3]])
        top, left, window_height, window_width = geometry.window
        if (window_height, window_width) != (height, width):
            canvas = resized(height, width, round(min(geometry.size) * 500 / 800), None)
            image = F.resize(image, canvas)
            down, across = canvas[0] / height, canvas[1] / width
            spans = (top * down, left * across, window_height * down, window_width * across)
            image = F.crop(image, *(max(1, round(s)) if i > 1 else round(s) for i, s in enumerate(spans)))
        left_top = torch.tensor([left, top, left, top])[:, None]
        limits = torch.tensor([window_width, window_height, window_width, window_height])[:, None]
        boxes = (boxes - left_top).clamp(min=0).minimum(limits)
        image = F.resize(image, geometry.size)
        boxes = boxes * torch.tensor(geometry.size[::-1]).repeat(2)[:, None] / limits
        sides = boxes[2:] - boxes[:2]
        annotations = [
            {"bbox": [*box[:2], *side], "category_id": category, "area": side[0] * side[1], "iscrowd": crowd}
            for box, side, category, crowd in zip(
                boxes.T.tolist(),
                sides.T.tolist(),
                row["objects"]["category"],
                row["objects"]["iscrowd"],
                strict=True,
            )
        ]
        target = {"image_id": row["image_id"], "annotations": annotations}
        inputs = self.processor(images=image, annotations=target, return_tensors="pt")
        return {"pixel_values": inputs["pixel_values"][0], "labels": inputs["labels"][0]}
