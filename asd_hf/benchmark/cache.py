"""Training from a teacher's predictions on disk, side by side with the teacher itself and with plain training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from ..build import Parts
from ..data.rows import Source, read_rows, stream_of
from ..data.transforms import Geometry, RowTransform, count_geometries
from ..detectors.base import DetectorOutput
from ..errors import UserError
from ..methods import CombinedMethod, DistillationMethod
from ..phases import Stopwatch
from ..teacher_cache import TeacherCache
from ..trainer import DistillationTrainer
from .sidebyside import Row, format_table, seconds, spread, take_turns
from .step import SETTLED, checkpoint_activations, one_step, stand_still

ALL = "all predictions"


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """Of one form of the predictions.

    Attributes:
        bytes_per_view: on disk, file headers included.
        bytes_per_second, spread: of reading them in memory-mapped files that the system holds in memory.
        losses: of the method on the first batch, by name: under the teacher and under this form.
    """

    name: str
    bytes_per_view: float
    bytes_per_second: float
    spread: float
    losses: dict[str, tuple[float, float]]


def measure_cache(
    parts: Parts, folder: Path, num_images: int, rounds: int, top_queries: int, top_classes: int
) -> tuple[list[Row], list[CacheSize]]:
    """Writes the predictions on the first training images into `folder`, whole and of the best queries and classes
    alone, and measures steps and reading in turn. All train the same student, at a learning rate of 0.

    Args:
        top_queries, top_classes: how many the best are; if that is all of them, there is one form.

    Returns:
        of each form the step from disk beside the teacher's and beside plain training's, and reading an image's
        predictions beside decoding and augmenting it; and what the forms are.

    Raises:
        UserError: the method reads what cannot be kept, or there are not so many images.
    """
    parts.__dict__["train_source"] = source = _first_images(parts.train_source, num_images, parts.run.data.source)
    run, spec = parts.run, parts.teacher_spec
    device, views = run.training.device, None if count_geometries(run.data) else 1
    largest = spec.num_queries, len(parts.classes.names)
    best = min(top_queries, largest[0]), min(top_classes, largest[1])
    forms = {ALL: largest} | ({f"best {best[0]} x {best[1]}": best} if best != largest else {})
    caches = {}
    for number, (name, top) in enumerate(forms.items()):
        writer, output = parts.cache_writer(views, False, *top), folder / str(number)
        writer.prepare(output)
        writer.write(output)
        writer.finish(output)
        caches[name] = TeacherCache(str(output))
    plain, live = parts.under({}, None).trainer(), parts.trainer()
    kept = {name: parts.from_disk(cache).trainer() for name, cache in caches.items()}
    losses = first_losses(parts, [live, *kept.values()])
    checkpoint_activations(plain)

    def step(trainer: DistillationTrainer) -> Callable[[], float]:
        stand_still(trainer.create_optimizer())
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        return lambda: sum(one_step(trainer, batch, partial(Stopwatch, device)).values())

    steps = {"plain": step(plain), "live": step(live)} | {name: step(trainer) for name, trainer in kept.items()}
    images = list(read_rows(source.stream))
    readers = {name: partial(_read, cache, images) for name, cache in caches.items()}
    reading = {"plain": partial(_decode, RowTransform(run.data, training=True), images)} | readers
    stepped = take_turns(steps, rounds)
    read = take_turns({name: partial(seconds, side) for name, side in reading.items()}, rounds)
    rows, sizes = [], []
    for number, (name, cache) in enumerate(caches.items(), 1):
        ours, each = stepped[name], {side: [t / num_images for t in read[side]] for side in ("plain", name)}
        rows.append(Row.of(f"{name}: step, beside the teacher's", ours, stepped["live"], str(device)))
        rows.append(Row.of(f"{name}: step, beside plain training's", ours, stepped["plain"], str(device)))
        rows.append(Row.of(f"{name}: reading an image's, beside decoding it", each[name], each["plain"], "cpu"))
        rate = [readers[name]() / time for time in read[name]]
        manifest = cache.manifest
        sizes.append(
            CacheSize(
                name=name,
                bytes_per_view=sum(shard["bytes"] for shard in manifest.shards) / (num_images * manifest.views),
                bytes_per_second=sorted(rate)[len(rate) // 2],
                spread=spread(rate),
                losses={loss: (value, losses[number][loss]) for loss, value in losses[0].items()},
            )
        )
    return rows, sizes


def first_losses(parts: Parts, trainers: Sequence[DistillationTrainer]) -> list[dict[str, float]]:
    """Each loss of the method on the first training batch, under what each of the trainers takes for the teacher."""
    found = []
    parts.student.model.eval()
    for trainer in trainers:
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        with torch.no_grad(), trainer.accelerator.autocast():
            student = trainer.classes.student(parts.student(batch["pixel_values"], batch["pixel_mask"]))
            teacher, labels = trainer.ask_teacher(batch), trainer.classes.labels(batch["labels"])
            found.append(_losses(parts.method, student, teacher, labels))
    parts.student.model.train()
    return found


def _losses(
    method: DistillationMethod | CombinedMethod, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict]
) -> dict[str, float]:
    """As they are at the end of all schedules. The method is a copy: some keep running means."""
    method = copy.deepcopy(method)
    method.step = SETTLED
    with torch.random.fork_rng():
        return {name: loss.item() for name, loss in method(student, teacher, labels).items()}


def difference(live: float, kept: float) -> str:
    """In per cent of the first; the second itself where that is 0."""
    return f"{100 * (kept - live) / abs(live):+.3f} %" if live else f"{kept:+.3g}"


def _first_images(source: Source, count: int, name: str) -> Source:
    rows = list(islice(read_rows(source.stream), count))
    if len(rows) < count:
        raise UserError(f"--images {count}: {name} has {len(rows)}")
    return replace(source, stream=stream_of(partial(_give, rows), 1), shard_lengths=[count])


def _give(rows: list[dict], shard: int) -> Iterator[dict]:
    yield from rows


def _read(cache: TeacherCache, images: list[dict]) -> int:
    """Reads the predictions on each image as a loader does that stacks them; returns how many bytes these are."""
    total = 0
    for image in images:
        whole = Geometry(False, (0, 0, 1, 1), (1, 1))
        for x in cache.read(image["image_id"], 0, whole, (1, 1)).values():
            total += x.clone().nbytes
    return total


def _decode(transform: RowTransform, images: list[dict]) -> None:
    for image in images:
        transform(image)


def format_cache(rows: Sequence[Row], sizes: Sequence[CacheSize]) -> str:
    """Three tables: times, sizes, and the losses."""
    times = [
        [row.name]
        + [f"{x:.2f}" for x in (row.ours_ms, row.ours_spread_ms, row.reference_ms, row.reference_spread_ms)]
        + [f"{row.ratio:.3f} x"]
        for row in rows
    ]
    kept = [
        [size.name, f"{size.bytes_per_view / 1e3:.1f}"]
        + [f"{x / 1e6:.0f}" for x in (size.bytes_per_second, size.spread)]
        for size in sizes
    ]
    losses = [
        [name, f"{live:.6g}", *(difference(live, size.losses[name][1]) for size in sizes)]
        for name, (live, _) in sizes[0].losses.items()
    ]
    return "\n\n".join(
        [
            format_table(["", "ours, ms", "spread", "reference, ms", "spread", "ratio"], times),
            format_table(["", "kB a view", "MB/s", "spread"], kept),
            format_table(["loss of the first batch", "teacher", *(size.name for size in sizes)], losses),
        ]
    )
