"""Labelled and unlabelled images as one source."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import datasets

from .cache import digest
from .rows import Source, read_rows, stream_of

UNLABELLED_BIT = 1 << 62  # of an image id; ids of data sets are smaller


@dataclass
class UnlabelledReader:
    """Reads the rows of one shard, their ids marked as those of unlabelled images."""

    stream: datasets.IterableDataset

    def __call__(self, shard: int) -> Iterator[dict[str, Any]]:
        for row in read_rows(self.stream.shard(num_shards=self.stream.num_shards, index=shard)):
            yield {**row, "image_id": row["image_id"] ^ UNLABELLED_BIT}


@dataclass
class MixtureReader:
    """Reads one shard of a mixture: every so many shards of each part, their rows spread evenly over each other."""

    parts: list[datasets.IterableDataset]
    lengths: list[list[int]] | None  # rows of the shards of each part
    num_shards: int

    def __call__(self, shard: int) -> Iterator[dict[str, Any]]:
        merged = heapq.merge(*(self._spread(part, shard) for part in range(len(self.parts))), key=itemgetter(0))
        return (row for _, row in merged)

    def _spread(self, part: int, shard: int) -> Iterator[tuple[float, dict[str, Any]]]:
        """The rows of a part, each with its place in (0, 1); without lengths row i has its place in (i, i + 1)."""
        stream = self.parts[part].shard(num_shards=self.num_shards, index=shard, contiguous=False)
        length = 1 if self.lengths is None else sum(self.lengths[part][shard :: self.num_shards])
        # `datasets` reads several shards side by side: in one phase they would all come to a rare row at once
        phase = 0.5 if part else (shard + 0.5) / self.num_shards
        for number, row in enumerate(read_rows(stream)):
            yield (number + phase) / length, row


def mark_unlabelled(source: Source) -> Source:
    """`source` with bit 62 of every image id turned over.

    Image ids seed the augmentation and name images in caches, so an unlabelled image must not have the id of a
    labelled one: it has its own id plus 2^62, with which labelled ids, being below 2^62, cannot collide.
    """
    stream = stream_of(UnlabelledReader(source.stream), source.stream.num_shards)
    return replace(source, stream=stream, fingerprint=digest(source.fingerprint, "unlabelled"))


def mix(labelled: Source, unlabelled: Source) -> Source:
    """Both sources as one, with the classes of `labelled` and every image of both once a pass.

    It has as many shards as the source with fewer, and each shard holds its share of both, spread evenly: so whatever
    shards a reader gets and however small its buffer is, its batches are mixed as the whole is. Where a length is not
    known, rows of both come in turn until one of them ends.
    """
    parts = [labelled, unlabelled]
    num_shards = min(source.stream.num_shards for source in parts)
    lengths = [source.shard_lengths for source in parts]
    lengths = None if None in lengths else lengths
    reader = MixtureReader([source.stream for source in parts], lengths, num_shards)
    return Source(
        stream=stream_of(reader, num_shards),
        class_names=labelled.class_names,
        category_ids=labelled.category_ids,
        shard_lengths=lengths
        and [sum(sum(part[shard::num_shards]) for part in lengths) for shard in range(num_shards)],
        fingerprint=digest(labelled.fingerprint, unlabelled.fingerprint),
        faults=labelled.faults + unlabelled.faults,
        notes=dict(Counter(labelled.notes) + Counter(unlabelled.notes)),
    )
