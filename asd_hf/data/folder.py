"""A folder of images without annotations as a source: listed once into a memory-mapped index."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Features, Value

from ..errors import UserError
from .cache import build_once, cache_root, digest
from .faults import is_text
from .rows import MAX_SHARDS, Source, cut_evenly, read_rows, stream_of

logger = logging.getLogger(__name__)

INDEX_VERSION = 1  # of the index on disk
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FEATURES = Features({"image_id": Value("int64"), "file_name": Value("string")})


@dataclass
class FolderReader:
    """Reads the rows of one shard of the index."""

    index: datasets.IterableDataset
    root: Path

    def __call__(self, shard: int) -> Iterator[dict[str, Any]]:
        part = self.index.shard(num_shards=self.index.num_shards, index=shard)
        for row in read_rows(part, batch_size=256):
            image = {"bytes": None, "path": str(self.root / row["file_name"])}
            yield {"image": image, "image_id": row["image_id"], "width": None, "height": None, "objects": None}


def open_images(root: Path) -> Source:
    """All images in `root` and its subfolders, by their suffixes, numbered in the order of their relative paths.

    Names that begin with a dot are left out. Links to folders, and to files outside `root`, are not followed; they are
    counted in a warning. The source has no classes.

    Raises:
        UserError: there is no image, or the folder cannot be listed.
    """
    try:
        files = list_files(root, SUFFIXES)
    except OSError as error:
        raise UserError(f"the images of {root} cannot be listed: {error}") from error
    if not files:
        raise UserError(f"{root} holds no images: looked for {', '.join(SUFFIXES)}, in its subfolders too")
    key = digest(INDEX_VERSION, files)

    def build(folder: Path) -> None:
        columns = {"image_id": list(range(len(files))), "file_name": [name for name, *_ in files]}
        datasets.Dataset.from_dict(columns, features=FEATURES).save_to_disk(str(folder))

    rows = datasets.load_from_disk(str(build_once(cache_root() / "folder" / key, build)))
    num_shards = min(MAX_SHARDS, len(rows))
    return Source(
        stream=stream_of(FolderReader(rows.to_iterable_dataset(num_shards=num_shards), root), num_shards),
        class_names=[],
        category_ids=[],
        shard_lengths=cut_evenly(len(rows), num_shards),
        fingerprint=key,
    )


def list_files(root: Path, suffixes: Collection[str]) -> list[tuple[str, int, int]]:
    """(relative path, bytes, time of change) of each file with one of `suffixes`, in order.

    Links to folders or out of `root` are left out, and counted in a warning.

    Raises:
        UserError: a name is not UTF-8.
    """
    inside, folders, files, left_out = root.resolve(), [root], [], []
    while folders:
        for entry in os.scandir(folders.pop()):
            path, linked = Path(entry.path), entry.is_symlink()
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                (left_out if linked else folders).append(path)
            elif path.suffix.lower() in suffixes:
                if linked and not (entry.is_file() and path.resolve().is_relative_to(inside)):
                    left_out.append(path)
                    continue
                name, stat = path.relative_to(root).as_posix(), entry.stat()
                if not is_text(name):
                    raise UserError(f"{root}: the file name {name!r} is not UTF-8: rename the file")
                files.append((name, stat.st_size, stat.st_mtime_ns))
    if left_out:
        first = min(left_out)
        logger.warning(
            "%s: %d links to folders or out of it are not followed, %s the first", root, len(left_out), first
        )
    return sorted(files)
