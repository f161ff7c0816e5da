"""What a run ran on, to be kept with its numbers."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch

from . import __version__

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "hotcoco", "numpy")


def versions() -> dict[str, str]:
    """Of asd_hf, Python and the `PACKAGES`."""
    return {"asd_hf": __version__, "python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' if threads > 1 else ''}"
