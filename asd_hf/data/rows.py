"""What every source of images is turned into: a stream of encoded rows of one form, and what is known of it.

A row has `image` ({"bytes", "path"}, not decoded; read from `path` where `bytes` is None), `image_id`, `width` and
`height` (pixels; None where the source does not state them) and `objects`: a dictionary of lists `bbox` ([x, y, width,
height] in absolute pixels), `category` (class indices), `area` and `iscrowd`; or None for an image that has not been
annotated, which is another thing than one without objects. A reader that is told to keep bad rows gives one with
`fault` (`faults.Fault`) in place of each.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import datasets

from .faults import Fault

MAX_SHARDS = 64  # of a data set that can be cut anywhere: divisible by the usual numbers of ranks and workers
READ_BATCH = 16  # rows converted from Arrow at a time; encoded images of as many are in memory


class RowReader(Protocol):
    """Reads the rows of one shard in their order; picklable, as it travels to the loader's workers."""

    def __call__(self, shard: int) -> Iterator[dict[str, Any]]: ...


@dataclass
class Source:
    """A split of a data set; unlabelled images alone have no classes.

    `category_ids` are the data set's own ids of the classes, for result files. `shard_lengths` are the rows of each
    shard, None when only reading all of the data would tell. `fingerprint` changes when the data does.

    `faults` are the rows that have been left out; where a reader keeps bad rows, those known before they are read.
    `notes` counts what is repaired or worth a look, by the kinds of `faults.NOTES`, as far as it is known.
    `files` names the images that lie in files of their own, which `fingerprint` does not cover.
    """

    stream: datasets.IterableDataset
    class_names: list[str]
    category_ids: list[int]
    shard_lengths: list[int] | None
    fingerprint: str
    faults: list[Fault] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    files: Iterable[Path] = ()

    @property
    def num_rows(self) -> int | None:
        """Rows of the split, or None when they are not known."""
        return None if self.shard_lengths is None else sum(self.shard_lengths)


def stream_of(reader: RowReader, num_shards: int) -> datasets.IterableDataset:
    """The rows of all shards as one stream that `datasets` can shuffle and share out by shards."""
    return datasets.IterableDataset.from_generator(
        _read_shards, gen_kwargs={"shards": list(range(num_shards)), "reader": reader}
    )


def _read_shards(shards: list[int], reader: RowReader) -> Iterator[dict[str, Any]]:
    for shard in shards:
        yield from reader(shard)


def read_rows(stream: datasets.IterableDataset, batch_size: int = READ_BATCH) -> Iterator[dict[str, Any]]:
    """All rows of `stream`, in a loader's worker too, where plain iteration would give only that worker's share."""
    for batch in stream.iter(batch_size=batch_size):
        columns = list(batch)
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def encoded(image: dict[str, Any]) -> bytes:
    """The bytes of the `image` of a row.

    Raises:
        OSError: its file is missing or cannot be read, or is a pipe or a device, which may have no end.
    """
    if image["bytes"] is not None:
        return image["bytes"]
    path = Path(image["path"])
    if not stat.S_ISREG(path.stat().st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is no file, but a folder, a pipe or a device", str(path))
    return path.read_bytes()


def cut_evenly(num_rows: int, num_shards: int) -> list[int]:
    """Lengths of contiguous shards that differ by one row at most, as `datasets` cuts them."""
    return [num_rows // num_shards + (shard < num_rows % num_shards) for shard in range(num_shards)]
