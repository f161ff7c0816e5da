"""Opens a data set by its name: a generated one, a folder, or a data set on the Hub; with or without annotations."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qsl

from ..errors import UserError
from ..registry import nearest
from .cache import build_once, cache_root, digest
from .check import leave_out
from .coco import is_coco, open_coco
from .config import DataConfig
from .folder import open_images
from .mixture import mark_unlabelled, mix
from .rows import Source
from .shapes import SPLITS, make_shapes
from .stored import holds_split
from .tables import open_table

__all__ = ["Source", "open_source", "open_training_source", "open_unlabelled"]

SHAPES = {"num_train": 2000, "num_val": 400, "image_size": 128, "seed": 0, "max_objects": 4, "contrast": 110}
SHAPES_VERSION = 1  # of the images that the same numbers give


def open_source(source: str, split: str, config: DataConfig | None = None, keep_bad: bool = False) -> Source:
    """Opens one split of a data set as a stream of encoded rows.

    Args:
        source: `shapes` (or `shapes?num_train=64&seed=1`); a COCO folder; a folder written by `save_to_disk`; a folder
            of Parquet or WebDataset shards; or a Hub id.
        config: only `box_format` is read, for sources that do not state theirs.
        keep_bad: for `check.check_source`: in place of a row that cannot be used its `fault` is given, or it is listed
            in the `faults` of the source. Otherwise it is an error.

    Raises:
        UserError: the source or the split does not exist, or its contents cannot be understood.
    """
    return _open(source, split, None if config is None else config.box_format, labelled=True, keep_bad=keep_bad)


def open_training_source(config: DataConfig) -> Source:
    """What `config` trains on: the labelled split, the unlabelled images, or both as one source (`mixture.mix`).

    Unlabelled images alone have no classes: `class_names` and `category_ids` are empty. Their rows have no `objects`
    (None), and bit 62 of their image ids is turned over (`mixture.mark_unlabelled`).

    Under `bad_rows: skip` all rows are read once, and the source is without the bad ones, see `check.leave_out`.

    Raises:
        UserError: as `open_source`, of `data.source` or `data.unlabelled`; or too many rows are bad.
    """
    skip = config.bad_rows == "skip"
    labelled = unlabelled = None
    if config.train_split is not None:
        labelled = open_source(config.source, config.train_split, config, keep_bad=skip)
        labelled = leave_out(labelled, config.max_bad_share, config.max_boxes) if skip else labelled
    if config.unlabelled is not None:
        unlabelled = open_unlabelled(config.unlabelled, keep_bad=skip)
        unlabelled = mark_unlabelled(leave_out(unlabelled, config.max_bad_share) if skip else unlabelled)
    if labelled is None or unlabelled is None:
        return labelled or unlabelled
    return mix(labelled, unlabelled)


def open_unlabelled(source: str, keep_bad: bool = False) -> Source:
    """A folder of images or `SOURCE#split`, image ids as they are; a folder of this whole name comes first."""
    folder = Path(source).expanduser()
    is_folder = source != "" and folder.is_dir()  # an empty path is the working folder
    name, _, split = (source, "", "") if is_folder else source.partition("#")
    split = split or "train"
    try:
        if is_folder and not is_coco(folder, split) and not holds_split(folder, split):
            return open_images(folder)
        return _open(name, split, None, labelled=False, keep_bad=keep_bad)
    except UserError as error:
        raise UserError(f"data.unlabelled: {error}") from error


def _open(source: str, split: str, box_format: str | None, labelled: bool, keep_bad: bool) -> Source:
    """Opens one split; without `labelled` its annotations are not read, and the rows have no `objects`."""
    if not source:
        raise UserError("source '' is empty: name a folder or a data set")
    if source == "shapes" or source.startswith("shapes?"):
        return _open_shapes(source, split, labelled)
    path = Path(source).expanduser()
    if is_coco(path, split):
        return open_coco(path, split, labelled, keep_bad)
    if path.is_file():
        raise UserError(f"source {source!r} is a file: name the folder of the data set")
    return open_table(source, split, box_format, labelled, keep_bad)


def _open_shapes(source: str, split: str, labelled: bool) -> Source:
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
    return open_coco(build_once(folder, lambda new: make_shapes(new, **options)), split, labelled)
