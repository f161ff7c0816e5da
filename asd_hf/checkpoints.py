"""Checkpoints that are whole or not there: written beside, listed with their checksums, renamed.

A checkpoint is the folder `checkpoint-<step>` of an output folder. It comes into being in `_partial/` and is moved
from there when its manifest, which is written last, lists every file with size and sha256. So whatever ends a run, a
folder of that name is whole, but for what damages it later; that the manifest shows.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import UserError
from .files import checksum, sync, write_whole

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PARTIAL = "_partial"  # the underscore keeps it off the Hub: Trainer does not upload `_*`
_NAME = re.compile(r"checkpoint-(\d+)")


def all_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in an output folder by their steps, whole or damaged."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(_NAME.fullmatch(checkpoint.name)[1])


def complete(partial: Path, about: dict) -> None:
    """Writes the manifest of all files in the folder `partial`: `about`, and "files". All are on the disk then."""
    files = {}
    for file in sorted(path for path in partial.rglob("*") if path.is_file()):
        sync(file)
        name = file.relative_to(partial).as_posix()
        files[name] = {"bytes": file.stat().st_size, "sha256": checksum(file)}
    write_whole(partial / MANIFEST, json.dumps(about | {"files": files}, indent=1) + "\n")
    for path in (partial / MANIFEST, *(path for path in partial.rglob("*") if path.is_dir()), partial):
        sync(path)


def publish(partial: Path, checkpoint: Path) -> None:
    """Gives a complete folder its name. What has this name already is damaged, or of a training that was left."""
    if checkpoint.exists():
        old = partial.with_name(f"old-{checkpoint.name}")
        checkpoint.rename(old)
        partial.rename(checkpoint)
        shutil.rmtree(old)
    else:
        partial.rename(checkpoint)
    sync(checkpoint.parent)


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Deletes checkpoints until `limit` are left: the oldest first, never `newest`, which is whole, or `best`.

    Those of later steps are damaged, or of a training that was left, and go before all others.
    """
    if not limit or limit < 0:
        return
    others = [c for c in all_checkpoints(newest.parent) if c != newest and not (best and c == Path(best))]
    others.sort(key=lambda checkpoint: (step_of(checkpoint) < step_of(newest), step_of(checkpoint)))
    kept = 1 + (best is not None and Path(best) != newest and Path(best).is_dir())
    for checkpoint in others[: max(0, len(others) + kept - limit)]:
        old = newest.parent / PARTIAL / f"old-{checkpoint.name}"
        old.parent.mkdir(exist_ok=True)
        checkpoint.rename(old)  # of a deletion that is interrupted, no part is left by the name of a checkpoint
        shutil.rmtree(old)


def read_manifest(checkpoint: Path) -> dict:
    """The manifest of a checkpoint all of whose files are as it lists them.

    Raises:
        UserError: it is no checkpoint, or a damaged one; the line names the file.
    """
    file = checkpoint / MANIFEST
    if not file.is_file():
        raise UserError(f"{checkpoint} is no whole checkpoint: it has no {MANIFEST}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint} is damaged: {MANIFEST} cannot be read") from error
    for name, (size, sha256) in listed.items():
        path = checkpoint / name
        if not path.is_file():
            raise UserError(f"{checkpoint} is damaged: {name} is not there")
        if path.stat().st_size != size:
            raise UserError(f"{checkpoint} is damaged: {name} has {path.stat().st_size} bytes, not {size}")
        if checksum(path) != sha256:
            raise UserError(f"{checkpoint} is damaged: {name} has changed since it was written")
    return manifest


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint of an output folder, None if it has none; says which ones it passes over.

    Raises:
        UserError: there are checkpoints, and none of them is whole.
    """
    reason = None
    for checkpoint in reversed(all_checkpoints(Path(folder))):
        try:
            read_manifest(checkpoint)
        except UserError as error:
            reason = reason or error
            logger.warning("%s: passed over", error)
        else:
            return checkpoint
    if reason is not None:
        raise UserError(f"{folder} has no whole checkpoint ({reason}): delete the damaged ones to start anew")
    return None


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Within, what keeps a file from being written, a full disk say, becomes a UserError that names `folder`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} cannot be written: {reason}; whole checkpoints are as they were") from error


@contextmanager
def moved_in(folder: Path) -> Iterator[Path]:
    """A new folder, whose files take their places in `folder` when the `with` block ends, each of them whole."""
    new = folder / PARTIAL / "new"
    clear(folder / PARTIAL)
    new.mkdir(parents=True)
    try:
        yield new
        for file in sorted(path for path in new.rglob("*") if path.is_file()):
            place = folder / file.relative_to(new)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
    finally:
        clear(folder / PARTIAL)


def clear(folder: Path) -> None:
    """Removes a folder, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)
