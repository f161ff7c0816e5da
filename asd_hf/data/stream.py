"""The stream of batches that one rank reads, shared out over ranks and loader workers without duplicates or gaps."""

from __future__ import annotations

import itertools
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..errors import UserError
from .collate import pack, unpack
from .rows import Source, read_rows

GRACE = 60  # seconds that a loader worker goes on after SIGTERM; its process may still be at a step
MAX_LEFTOVER = 0.02  # of the rows, that unequal shards may keep out of an epoch before they are shared row by row


class DetectionStream(IterableDataset):
    """Batches of one rank's share of a source.

    The rows are dealt to `world_size * max(1, num_workers)` readers. The shards fall into groups, as many as divide
    both numbers; a group is read by readers / groups readers, each of which keeps every such row of it. So any number
    of ranks, workers and shards covers every row just once a pass, and with one shard two ranks of batch size B see
    together, batch by batch, what one rank of 2B sees.

    In training (`shuffle` and `drop_last`) every rank ends an epoch after the same number of batches, counted from the
    lengths of the shards without communication; the few rows left over are others in each epoch. Where the lengths are
    unknown the passes follow one another without end. In evaluation every row is read once, and ranks may differ in
    their number of batches.

    Args:
        transform: row -> sample; its `set_epoch(epoch)` is called before each pass.
        batch_size: images a batch of this rank.
        num_workers: worker processes of the loader that will read this stream.
        seed: of the order of the rows; the transform has its own.
        shuffle_buffer: rows that a reader holds, still encoded, to shuffle among them.
        num_rows: read only this many rows, the first of the source; None for all.

    Raises:
        UserError: there are fewer rows than one batch for each reader, or no image in a batch.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[dict[str, Any]], dict[str, Any]],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        shuffle_buffer: int = 1000,
        drop_last: bool = True,
        num_rows: int | None = None,
    ) -> None:
        self.source, self.transform, self.batch_size = source, transform, batch_size
        self.rank, self.world_size, self.num_workers = rank, world_size, num_workers
        self.seed, self.shuffle, self.shuffle_buffer, self.drop_last = seed, shuffle, shuffle_buffer, drop_last
        self.num_rows = num_rows
        if batch_size < 1 or num_workers < 0:
            raise UserError(
                f"batches of {batch_size} images by {num_workers} loader workers: 1 and 0 at least are needed"
            )
        if shuffle and not drop_last:
            raise ValueError("a shuffled stream ends with whole batches: drop_last must be true")
        # In shared memory: a persistent worker keeps its copy of the stream from one epoch to the next
        self._position = torch.zeros(2, dtype=torch.int64).share_memory_()
        self.readers = world_size * max(1, num_workers)
        self.groups = self._count_groups()
        if drop_last and self.batches_per_epoch == 0:
            raise UserError(
                f"{num_rows or source.num_rows} rows are less than one batch of {batch_size} for each of {world_size} "
                f"ranks x {max(1, num_workers)} loader workers: lower the batch size or the workers"
            )

    # -- position ----------------------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration read this epoch: another order, other random choices of the transform."""
        self._position[0] = int(epoch)

    @property
    def skip_batches(self) -> int:
        """Batches of this rank that the next iterations leave out, to resume within an epoch.

        Their rows are passed over before they are decoded, and the batches that follow are those of the full epoch.
        """
        return int(self._position[1])

    @skip_batches.setter
    def skip_batches(self, count: int) -> None:
        self._position[1] = int(count)

    # -- shares ------------------------------------------------------------------------------------------------------

    def _count_groups(self) -> int:
        """Groups of shards: as many as divide the shards and the readers, without starving a reader of rows."""
        if self.num_rows is not None:
            return 1  # only a reader that passes over all rows can tell which are the first
        groups = math.gcd(self.source.stream.num_shards, self.readers)
        if self.source.shard_lengths is None or not self.drop_last:
            return groups
        enough = (1 - MAX_LEFTOVER) * self.source.num_rows - self.readers
        divisors = (count for count in range(groups, 0, -1) if groups % count == 0)
        return next((count for count in divisors if self._least_rows(count) * self.readers >= enough), 1)

    def _least_rows(self, groups: int) -> int:
        """Rows that the poorest reader has in the worst of all orders of the shards."""
        lengths = sorted(self.source.shard_lengths)
        return sum(lengths[: len(lengths) // groups]) // (self.readers // groups)

    def _rows_of(self, reader: int) -> int | None:
        """Rows that a reader gives in one epoch; None for as many as there are, without end in training."""
        if self.source.shard_lengths is None:
            return None
        group, turn = reader % self.groups, reader // self.groups
        if not self.drop_last:
            rows = sum(self.source.shard_lengths[group :: self.groups])
            rows = rows if self.num_rows is None else min(rows, self.num_rows)
            each = self.readers // self.groups
            return (rows - turn + each - 1) // each
        if self.num_rows is not None:
            return min(self.num_rows, self.source.num_rows) // self.readers
        return self._least_rows(self.groups)

    @property
    def batches_per_epoch(self) -> int | None:
        """Batches that this rank reads in an epoch; None where the lengths of the shards are not known."""
        workers = max(1, self.num_workers)
        rows = [self._rows_of(self.rank * workers + worker) for worker in range(workers)]
        if None in rows:
            return None
        return sum(count // self.batch_size if self.drop_last else -(-count // self.batch_size) for count in rows)

    def __len__(self) -> int:
        if (count := self.batches_per_epoch) is None:
            raise TypeError("the length of this source is not known before it is read")
        return count

    # -- reading -----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[dict[str, Any] | UserError]:
        """Packed batches (`collate.pack`). A worker gives a UserError as an item, for the loader to raise."""
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        if workers != max(1, self.num_workers):
            raise ValueError(f"the stream was made for {self.num_workers} workers, the loader has {workers}")
        try:
            yield from self._batches(workers, worker)
        except UserError as error:
            if info is None:
                raise
            yield error

    def _batches(self, workers: int, worker: int) -> Iterator[dict[str, Any]]:
        epoch, skip = self._position.tolist()
        # The loader asks its workers in turn from the first: after `skip` batches it must be the turn of worker 0
        worker = (worker + skip) % workers
        skip = (skip // workers + (worker < skip % workers)) * self.batch_size
        reader = self.rank * workers + worker
        limit = self._rows_of(reader) if self.drop_last else None
        if limit is not None:
            limit = limit // self.batch_size * self.batch_size
        samples: list[dict[str, Any]] = []
        for row in itertools.islice(self._rows(reader, epoch, endless=limit is None and self.drop_last), skip, limit):
            samples.append(self.transform(row))
            if len(samples) == self.batch_size:
                yield pack(samples)
                samples = []
        if samples and not self.drop_last:
            yield pack(samples)

    def _rows(self, reader: int, epoch: int, endless: bool) -> Iterator[dict[str, Any]]:
        group, turn = reader % self.groups, reader // self.groups
        while True:
            stream = self.source.stream
            if self.shuffle:
                # the same for all readers: those that share a group must see it in one order
                order = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                seed = int(torch.randint(2**31, (), generator=order))
                stream = stream.shuffle(seed=seed, buffer_size=self.shuffle_buffer)
            stream = stream.shard(num_shards=self.groups, index=group, contiguous=False)
            rows = read_rows(stream)
            if self.num_rows is not None:
                rows = itertools.islice(rows, self.num_rows)
            if hasattr(self.transform, "set_epoch"):
                self.transform.set_epoch(epoch)
            count = 0
            for row in itertools.islice(rows, turn, None, self.readers // self.groups):
                count += 1
                yield row
            if not endless:
                return
            if not count:
                raise UserError("a loader worker found no rows at all: use fewer workers or more shards")
            epoch += 1


class DetectionLoader(DataLoader):
    """A DataLoader over a DetectionStream: gives batches as `collate` does, raises a worker's UserError as it was."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield unpack(batch)


def build_loader(stream: DetectionStream, num_workers: int | None = None, pin_memory: bool = False) -> DetectionLoader:
    """The loader of `stream`, with the workers that the stream was made for. They live on between epochs."""
    if num_workers is not None and num_workers != stream.num_workers:
        raise ValueError(f"the stream was made for {stream.num_workers} workers, not for {num_workers}")
    return DetectionLoader(
        stream,
        batch_size=None,  # the stream makes the batches
        collate_fn=_as_it_is,
        num_workers=stream.num_workers,
        pin_memory=pin_memory,
        persistent_workers=stream.num_workers > 0,
        worker_init_fn=_outlive_signals,
        # Of the workers' own seeds, which the stream has no use for. Drawn from the global generator, they would make
        # what a model draws depend on where loaders are begun, and so on whether the run was interrupted.
        generator=torch.Generator(),
    )


def _outlive_signals(worker: int) -> None:
    """Terminals and schedulers signal all processes of a run: the loader's go on until its own process has stopped."""

    def end_later(*_) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        timer = threading.Timer(GRACE, os._exit, args=(0,))
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_later)


def _as_it_is(batch: Any) -> Any:
    return batch
