"""Frames through a detector, just as `asd-hf evaluate` runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ..data import DataConfig, resize_options
from ..data.collate import pad
from ..data.transforms import evaluation_size
from ..errors import UserError
from ..evaluation import Predictor
from .frames import Frame


class Detections(NamedTuple):
    """What was found in one frame: (K, 6) rows (x, y, w, h, score, class index), the best first, in its pixels."""

    frame: Frame
    rows: np.ndarray


def choose_device(name: str | None) -> torch.device:
    """The device of this name, or the first accelerator, or the CPU.

    Raises:
        UserError: there is no such device.
    """
    if name is None:
        return PartialState().device
    there, accelerator = ["cpu"], torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        there += [accelerator.type, *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if name not in there:
        raise UserError(f"--device {name}: PyTorch sees no such device here, only {', '.join(there)}")
    return torch.device(name)


def preprocessing(processor) -> Callable[[Tensor], Tensor]:
    """From pixels (3, height, width) to the size at which evaluation shows them to the model of this processor."""
    config = DataConfig(**resize_options(processor.size))

    def prepare(pixels: Tensor) -> Tensor:
        return F.resize(pixels, evaluation_size(config, *pixels.shape[1:]), antialias=True)

    return prepare


def detect(predictor: Predictor, frames: Iterable[Frame], batch_size: int) -> Iterator[Detections]:
    """All that `predictor` finds, frame by frame; a batch of frames is in memory.

    Raises:
        UserError: predictions are not finite numbers.
    """
    frames = iter(frames)
    while batch := list(islice(frames, batch_size)):
        sizes = torch.tensor([frame.pixels.shape[1:] for frame in batch])
        found = predictor(*pad([frame.view for frame in batch]), sizes).double().cpu().numpy()
        for frame, rows in zip(batch, found, strict=True):
            if not np.isfinite(rows).all():
                raise UserError(f"{frame.name}: predictions are not finite numbers: the model diverged")
            yield Detections(frame, rows)
