"""Opens a data set by its name: a generated one, a folder, or a data set on the Hub."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qsl

from ..errors import UserError
from ..registry import nearest
from .cache import build_once, cache_root, digest
from .coco import open_coco
from .config import DataConfig
from .rows import Source
from .shapes import SPLITS, make_shapes
from .tables import open_table

__all__ = ["Source", "open_source"]

SHAPES = {"num_train": 2000, "num_val": 400, "image_size": 128, "seed": 0}
SHAPES_VERSION = 1  # of the images that the same numbers give


def open_source(source: str, split: str, config: DataConfig | None = None) -> Source:
    """Opens one split of a data set as a stream of encoded rows.

    Args:
        source: `shapes` (or `shapes?num_train=64&seed=1`); a COCO folder; a folder written by `save_to_disk`; a folder
            of Parquet or WebDataset shards; or a Hub id.
        config: only `box_format` is read, for sources that do not state theirs.

    Raises:
        UserError: the source or the split does not exist, or its contents cannot be understood.
    """
    config = config or DataConfig()
    if source == "shapes" or source.startswith("shapes?"):
        return _open_shapes(source, split)
    path = Path(source).expanduser()
    if (path / "annotations").is_dir():
        return open_coco(path, split)
    if path.is_file():
        raise UserError(f"data.source {source!r} is a file: name the folder of the data set")
    return open_table(source, split, config.box_format)


def _open_shapes(source: str, split: str) -> Source:
    if split not in SPLITS:
        raise UserError(f"source 'shapes' has no split {split!r}: {nearest(split, SPLITS)}")
    options = dict(SHAPES)
    for key, value in parse_qsl(source.partition("?")[2], keep_blank_values=True):
        if key not in SHAPES:
            raise UserError(f"source {source!r}: option {key!r} is unknown: {nearest(key, SHAPES)}")
        if not value.isdecimal():
            raise UserError(f"source {source!r}: {key} must be a whole number, not {value!r}")
        options[key] = int(value)
    folder = cache_root() / f"shapes-{digest(SHAPES_VERSION, sorted(options.items()))}"
    return open_coco(build_once(folder, lambda new: make_shapes(new, **options)), split)
