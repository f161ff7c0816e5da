"""Every row of a source read and decoded once, before training: which are bad, and the source without them.

What a training run reads must follow from its data, seed and epoch alone, and a run that resumes in mid-epoch passes
over rows without decoding them. So bad rows are found first, all of them, and the stream that is shuffled, shared out
and counted does not have them: nothing depends on which worker meets one, or when.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch.distributed as dist

from ..errors import UserError
from ..files import write_whole
from ..progress import tqdm
from .cache import build_once, cache_root, digest
from .faults import NOTES, BadRow, Fault, box_note, first_of
from .rows import Source, read_rows, stream_of
from .threads import ahead, default_threads
from .transforms import check_boxes, decode, orientation

logger = logging.getLogger(__name__)

CHECK_VERSION = 2  # of the reports on disk
EXAMPLES = 5  # of each note, kept
LEFT_OUT = "skipped_rows.jsonl"


@dataclass
class Report:
    """What one pass over a source has found.

    `num_rows` counts the bad rows too. `places` has the (shard, position in it, image id) of each row that the stream
    gives and that must be left out; `faults` has these, and before them those that were known before reading. `notes`
    counts boxes and images by kind, `examples` names the first of each.
    """

    num_rows: int
    faults: list[Fault]
    places: list[tuple[int, int, int | None]]
    notes: dict[str, int]
    examples: list[Fault]


def check_source(
    source: Source,
    max_boxes: int | None = None,
    fresh: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> Report:
    """Reads and decodes every row of a source whose reader keeps bad rows. Reports are stored and built once.

    Args:
        max_boxes: an image with more is bad; None for images that are not trained on.
        fresh: read all anew, whatever is stored.
        workers: threads; `threads.default_threads()` by default.

    Raises:
        UserError: a file of many rows cannot be read, or the machine fails to read an image.
    """
    stats = [_stat(path) for path in source.files]
    faults = [asdict(fault) for fault in source.faults]
    key = digest(CHECK_VERSION, max_boxes, source.fingerprint, source.shard_lengths, faults, stats)
    folder = cache_root() / "checked" / key
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)

    def build(new: Path) -> None:
        report = _read_all(source, max_boxes, workers or default_threads(), progress)
        new.mkdir()
        (new / "report.json").write_text(json.dumps(asdict(report)))

    stored = json.loads((build_once(folder, build) / "report.json").read_text())
    for name in ("faults", "examples"):
        stored[name] = [Fault(**fault) for fault in stored[name]]
    return Report(**stored | {"places": [tuple(place) for place in stored["places"]]})


def leave_out(source: Source, max_share: float, max_boxes: int | None = None) -> Source:
    """The source without its bad rows, which its `faults` then list; with the same stream if there are none.

    Raises:
        UserError: they are more than `max_share` (below 1) of all rows.
    """
    report = check_source(source, max_boxes)
    for kind, number in report.notes.items():
        if source.notes.get(kind) != number:  # it has not been said when the source was opened
            logger.warning("%d x %s: %s", number, kind, NOTES[kind])
    source = replace(source, notes=report.notes)
    if not report.faults:
        return source
    count = len(report.faults)
    if count > max_share * report.num_rows:
        raise UserError(
            f"{count} of {report.num_rows} rows are bad, more than data.max_bad_share={max_share:g} allows: "
            f"{first_of(report.faults)}"
        )
    logger.warning("%d of %d rows are bad and left out: %s", count, report.num_rows, first_of(report.faults))
    places: dict[int, dict[int, int | None]] = {}
    for shard, position, image_id in report.places:
        places.setdefault(shard, {})[position] = image_id
    lengths = source.shard_lengths
    return replace(
        source,
        stream=stream_of(GoodReader(source.stream, places), source.stream.num_shards),
        shard_lengths=lengths and [length - len(places.get(shard, ())) for shard, length in enumerate(lengths)],
        fingerprint=digest(source.fingerprint, report.places),
        faults=report.faults,
    )


def require_whole(source: Source, num_rows: int | None = None) -> None:
    """Checks a source to be evaluated on: AP without some images is not the AP of the split, so none is left out.

    Raises:
        UserError: one of the first `num_rows` rows is bad, None for all; or one that was left out before reading.
    """
    report = check_source(source)
    first = None if source.shard_lengths is None or num_rows is None else num_rows
    starts = [sum((source.shard_lengths or [0])[:shard]) for shard in range(source.stream.num_shards)]
    faults = source.faults + [
        fault
        for fault, (shard, position, _) in zip(report.faults[len(source.faults) :], report.places, strict=True)
        if first is None or starts[shard] + position < first
    ]
    if faults:
        raise UserError(f"evaluation leaves no image out, whatever data.bad_rows says: {first_of(faults)}")


@dataclass
class GoodReader:
    """Reads one shard of a stream whose reader keeps bad rows, without those in `places`."""

    stream: datasets.IterableDataset
    places: dict[int, dict[int, int | None]]  # shard -> position -> image id

    def __call__(self, shard: int) -> Iterator[dict[str, Any]]:
        left_out = self.places.get(shard, {})
        for position, row in enumerate(_shard(self.stream, shard)):
            fault = row.get("fault")
            image_id = row["image_id"] if fault is None else fault.image_id
            if position not in left_out:
                if fault is not None:
                    raise UserError(f"{fault.why}: it was not so before: run `asd-hf check-data` again")
                yield row
            elif left_out[position] != image_id:
                raise UserError(f"image {image_id} lies where a bad row was: run `asd-hf check-data` again")


def write_left_out(folder: Path, faults: list[Fault]) -> None:
    """Writes what a run leaves out as `folder/skipped_rows.jsonl`, a line a row; no file if nothing is left out."""
    file = folder / LEFT_OUT
    if faults:
        # Whole at any time: other ranks may be reading it
        write_whole(file, "".join(json.dumps(asdict(fault)) + "\n" for fault in faults))
    else:
        file.unlink(missing_ok=True)


def require_same(folder: Path, faults: list[Fault]) -> None:
    """Checks that a run which is resumed left out the same rows until now, wherever the data lay then.

    Raises:
        UserError: it did not: the images that follow would not be those of one uninterrupted run.
    """
    file = folder / LEFT_OUT
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    try:
        before = [(stored["kind"], stored["image_id"]) for stored in map(json.loads, lines)]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not as the run wrote it: {type(error).__name__}: {error}") from error
    if before != _keys(faults):
        raise UserError(
            f"the run in {folder} left out {len(before)} bad rows, now it would be {len(faults)}, or others, and its "
            f"order of images cannot go on: bring the data back to what {file} says, or start anew"
        )


def require_agreement(faults: list[Fault]) -> None:
    """Checks that all ranks leave out the same rows. Collective: all ranks must call it.

    Raises:
        UserError: they do not, on every rank: one would wait for another's batches for ever.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    answers: list[list | None] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, _keys(faults))
    if any(answer != answers[0] for answer in answers):
        counts = ", ".join(str(len(answer)) for answer in answers)
        raise UserError(f"the ranks leave out different bad rows ({counts}): their copies of the data are unequal")


def summary(source: Source) -> str:
    """One line on what was left out, repaired or worth a look; empty if nothing was."""
    parts = [f"{len(source.faults)} bad rows left out, see {LEFT_OUT}"] if source.faults else []
    return "; ".join(parts + [f"{count} x {kind}" for kind, count in source.notes.items()])


def _keys(faults: list[Fault]) -> list[tuple[str, int | None]]:
    return [(fault.kind, fault.image_id) for fault in faults]


def _shard(stream: datasets.IterableDataset, shard: int) -> Iterator[dict[str, Any]]:
    return read_rows(stream.shard(num_shards=stream.num_shards, index=shard))


def _stat(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return None
    return stat.st_size, stat.st_mtime_ns


def _read_all(source: Source, max_boxes: int | None, workers: int, progress: bool) -> Report:
    known = len(source.faults)
    report = Report(known, list(source.faults), [], {}, [])
    seen: dict[int, int] = {}  # image id -> its row
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=source.num_rows, desc="check", unit="image", leave=False, disable=not progress) as bar,
    ):
        for shard in range(source.stream.num_shards):
            found = ahead(pool, partial(_examine, max_boxes=max_boxes), _shard(source.stream, shard), 4 * workers)
            for position, (image_id, file, fault, notes) in enumerate(found):
                if fault is None and image_id in seen:
                    why = f"image {image_id} ({file or 'no file name'}) has the id of row {seen[image_id]}"
                    fault = Fault("image id", image_id, file, why)
                report.num_rows += 1
                bar.update()
                if fault is not None:
                    report.faults.append(fault)
                    report.places.append((shard, position, image_id))
                    continue
                seen[image_id] = report.num_rows - known - 1
                for kind, count in notes.items():
                    if sum(example.kind == kind for example in report.examples) < EXAMPLES:
                        report.examples.append(Fault(kind, image_id, file, f"{count} x {kind}"))
                    report.notes[kind] = report.notes.get(kind, 0) + count
    return report


def _examine(row: dict[str, Any], max_boxes: int | None) -> tuple[int | None, str | None, Fault | None, Counter]:
    """(image id, file, fault, number of boxes or images under each note) of one row."""
    if (fault := row.get("fault")) is not None:
        return fault.image_id, fault.file, fault, Counter()
    image_id, image = row["image_id"], row["image"]
    try:
        check_boxes(row, max_boxes)
        height, width = decode(row).shape[-2:]
    except BadRow as error:
        return image_id, image["path"], Fault(error.kind, image_id, image["path"], str(error)), Counter()
    notes = Counter()
    if orientation(image) != 1:
        notes["EXIF orientation"] += 1
    if row["objects"] is not None:
        notes.update(filter(None, (box_note(box, width, height) for box in row["objects"]["bbox"])))
    return image_id, image["path"], None, notes
