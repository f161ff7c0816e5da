"""What long work shows while it runs, on stderr; nothing but warnings under `--quiet`, which is `ASD_HF_QUIET=1`."""

from __future__ import annotations

import logging
import os

from tqdm import auto
from transformers.utils.logging import disable_progress_bar

QUIET = "ASD_HF_QUIET"  # of the environment: processes that this one starts are quiet as well


def is_quiet() -> bool:
    return os.environ.get(QUIET, "") not in ("", "0")


class tqdm(auto.tqdm):
    """The progress bar of every long work here."""

    def __init__(self, *args, disable: bool = False, **options) -> None:
        super().__init__(*args, disable=disable or is_quiet(), **options)


def show_logs(rank: int) -> None:
    """Shows what this package logs: everything on rank 0, warnings of the others. Other packages stay as set."""
    package = logging.getLogger("asd_hf")
    package.setLevel(logging.INFO if rank == 0 and not is_quiet() else logging.WARNING)
    if not package.handlers:
        package.addHandler(logging.StreamHandler())
    disable_progress_bar()  # Transformers' own, of every checkpoint written; Trainer's and ours stay
