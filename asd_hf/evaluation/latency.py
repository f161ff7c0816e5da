"""How long a detector takes for one image."""

from __future__ import annotations

from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from ..detectors.base import DetectorAdapter


@torch.no_grad()
def milliseconds_per_image(
    adapter: DetectorAdapter, pixel_values: Tensor, pixel_mask: Tensor, repeats: int = 20, warmup: int = 3
) -> float:
    """Median time of a forward pass of one image, waiting for the device; the model is in evaluation mode meanwhile.

    Args:
        pixel_values: (B, 3, H, W) uint8 on the model's device; the first image is used.
        pixel_mask: (B, H, W), true where valid.
    """
    pixel_values, pixel_mask = pixel_values[:1], pixel_mask[:1]
    training = adapter.model.training
    adapter.model.eval()
    times = []
    for _ in range(warmup + repeats):
        start = perf_counter()
        adapter(pixel_values, pixel_mask)
        if pixel_values.is_cuda:
            torch.cuda.synchronize(pixel_values.device)
        times.append(perf_counter() - start)
    adapter.model.train(training)
    return 1e3 * median(times[warmup:])
