"""Folders that are built once and then only read: indices of annotation files, the generated data set."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def cache_root() -> Path:
    """`$ASD_HF_CACHE`, or `~/.cache/asd_hf`."""
    return Path(os.environ.get("ASD_HF_CACHE") or "~/.cache/asd_hf").expanduser()


def digest(*parts: object) -> str:
    """16 hexadecimal digits that depend on every part."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, made by `build(path)` if it is not there. Of several processes one builds and the others wait.

    The folder is built beside and renamed when it is complete, so one that exists is whole.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as beside:
                build(Path(beside) / "new")
                (Path(beside) / "new").rename(folder)
    return folder
