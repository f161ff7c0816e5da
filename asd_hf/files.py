"""Files that are whole or not there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_beside(file: Path) -> Iterator[Path]:
    """Where to write `file`, which takes its place when the block ends; of a block that fails nothing is left.

    For one process at a time. What a killed process has left, the next to write this file takes the place of.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.part")
    try:
        yield beside
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(file: Path, text: str) -> None:
    """Writes beside and renames, so that a file that exists is whole."""
    with written_beside(file) as beside:
        beside.write_text(text, encoding="utf-8")


def checksum(file: Path) -> str | None:
    """The sha256 of a file, None if it is not there."""
    if not file.is_file():
        return None
    sha256 = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def sync(path: Path) -> None:
    """Returns when a file, or the list of names of a folder, is on the disk and outlives a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
