"""Writes the predictions of a teacher: each rank its own shards, each shard whole or not at all."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from time import perf_counter

import torch
from huggingface_hub import DatasetCardData
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..classes import keep_classes
from ..data import DataConfig, Source, teacher_view
from ..data.collate import pad
from ..data.rows import read_rows
from ..data.transforms import (
    Geometry,
    count_geometries,
    decode,
    draw_geometry,
    evaluation_size,
    seeded,
    teacher_pixels,
)
from ..detectors.base import DetectorAdapter, DetectorOutput
from ..errors import UserError
from ..files import checksum, write_whole
from ..hub import without_folders
from ..progress import tqdm
from .form import encode, learnt_question
from .manifest import (
    COMMON,
    MANIFEST,
    Contents,
    Manifest,
    read_manifest,
    shared_columns,
    spec_values,
    view_values,
    weights_sha256,
)

BUILDING = "building.json"  # the manifest of a cache that is not complete
SHARD_BYTES = 128 * 2**20  # a shard is no larger, ...
LEAST_SHARDS = 64  # ... and there are so many, ...
LEAST_IMAGES = 32  # ... unless they would hold fewer images


class CacheWriter:
    """Writes what a teacher says of each view of the training images.

    One rank after `prepare`s the folder, every rank `write`s its shards, and one `finish`es; between these, ranks wait
    for each other.

    Args:
        teacher: on the device where it is to compute.
        teacher_name: as `model.teacher` has it.
        source, config, seed: the training data and its augmentation.
        class_names, class_map: the student's classes and what the teacher calls them; only these are stored.
        contents: what to store.
        views: drawn views of each image, where the augmentation has no end of them: epoch e has the draw of epoch
            e modulo this number.
        canonical: one prediction an image, as evaluation shows it.
        batch_size, num_workers: of the teacher's images, and loader workers.
        precision, autocast: name and context of the precision in which the teacher computes.

    Raises:
        UserError: `views` are asked for and not drawn, or not and needed; or what the method reads cannot be had in
            views of unequal size, or with `canonical`.
    """

    def __init__(
        self,
        teacher: DetectorAdapter,
        teacher_name: str,
        source: Source,
        config: DataConfig,
        seed: int,
        contents: Contents,
        class_names: Sequence[str],
        class_map: Mapping[str, str] | None = None,
        views: int | None = None,
        canonical: bool = False,
        batch_size: int = 8,
        num_workers: int = 0,
        precision: str = "no",
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.teacher, self.num_workers, self.autocast = teacher, num_workers, autocast
        self.device = next(teacher.model.parameters()).device
        if contents.levels and teacher_view(config).resize != "fixed":
            raise UserError(
                "the method reads feature maps, which can be kept only where the teacher sees all images in one size: "
                "set data.resize: fixed with data.fixed_size, or data.teacher_size: [height, width], or train with "
                "the teacher itself"
            )
        names = teacher.spec.class_names
        self.columns = shared_columns(names, class_names, class_map)
        spec = replace(teacher.spec, class_names=tuple(names[i] for i in self.columns))
        lengths = source.shard_lengths or _count_rows(source)
        self.manifest = Manifest(
            teacher=without_folders(teacher_name),
            teacher_sha256=weights_sha256(teacher.model),
            parameters=sum(p.numel() for p in teacher.model.parameters()),
            spec=spec_values(spec, contents.top_queries),
            all_classes=list(names),
            prompted=teacher.open_vocabulary,
            precision=precision,
            fingerprint=source.fingerprint,
            num_images=sum(lengths),
            view=view_values(config, canonical),
            canonical=canonical,
            views=_number_of_views(config, contents, views, canonical, teacher),
            seed=None if canonical or count_geometries(config) else seed,
            contents=contents,
            images_per_shard=1,
            learnt=[],
        )
        self.images = _Images(source, lengths, config, seed, self.manifest, batch_size)
        self._measure()

    def _measure(self) -> None:
        """Bytes of a prediction and the seconds that it takes, by the first batch, and so the size of a shard."""
        count, views = self.manifest.num_images, self.manifest.views
        rows = list(islice(self.images.rows(range(count)), max(2, self.images.batch_size)))
        for _ in range(2):  # the first one warms up
            start = perf_counter()
            images = [decode(row) for row in rows]
            pixels = pad([self.images.view(row, image, 0) for row, image in zip(rows, images, strict=True)])
            middle = perf_counter()
            output = self._ask(*pixels)
            end = perf_counter()
        decoding, asking = (middle - start) / len(rows), (end - middle) / len(rows)
        # Loader workers decode while the teacher computes.
        self.seconds = max(decoding / self.num_workers, asking) if self.num_workers else decoding + asking
        asks = "question" in self.manifest.contents.fields and len(rows) > 1
        self.learnt = learnt_question(output) if asks else {}
        self.canvas = {"mask": output.mask[0].cpu()} if self.manifest.contents.levels else {}
        stored = self._encode(output)
        self.bytes = sum(x[0].numel() * x.element_size() for x in stored.values())
        largest = max(1, SHARD_BYTES // (self.bytes * views))
        images = min(largest, max(LEAST_IMAGES, math.ceil(count / LEAST_SHARDS)))
        self.manifest = self.images.manifest = replace(
            self.manifest, images_per_shard=images, learnt=list(self.learnt)
        )

    @property
    def total_bytes(self) -> int:
        """On disk, all shards, file headers not counted."""
        return self.manifest.num_images * self.manifest.views * (self.bytes + 8)

    def prepare(self, output: Path) -> None:
        """Makes the folder ready for `write`.

        Raises:
            UserError: it holds other things, or predictions of other kind; or the disk is too small.
        """
        output.mkdir(parents=True, exist_ok=True)
        begun = next((output / name for name in (BUILDING, MANIFEST) if (output / name).is_file()), None)
        if begun is None:
            if any(file.name != f"{BUILDING}.part" for file in output.iterdir()):
                raise UserError(f"{output} holds other files: name an empty folder, or one that is not there")
        else:
            before = read_manifest(begun)
            if wrong := before.differences(self.manifest):
                raise UserError(f"{output} holds other predictions: {'; '.join(wrong)}: name another folder")
            for shard, listed in enumerate(before.shards):
                write_whole(self._note(output, shard), json.dumps(listed))
        write_whole(output / BUILDING, self.manifest.to_json())
        (output / MANIFEST).unlink(missing_ok=True)
        there = sum(self._note(output, shard).is_file() for shard in range(self.manifest.num_shards))
        missing = self.total_bytes * (1 - there / self.manifest.num_shards)
        if missing > (free := shutil.disk_usage(output).free):
            raise UserError(f"{output}: {missing / 1e9:.1f} GB are to be written and the disk has {free / 1e9:.1f} GB")

    def write(self, output: Path, rank: int = 0, world_size: int = 1, progress: bool = True) -> int:
        """Writes those shards of this rank that are not there or not whole; returns how many those were.

        Raises:
            UserError: an image cannot be read, or the source has changed.
        """
        manifest = self.manifest
        own = range(rank, manifest.num_shards, world_size)
        missing = [shard for shard in own if not self._is_whole(output, shard)]
        views = sum(manifest.images_in(shard) for shard in missing) * manifest.views
        loader = DataLoader(
            _Views(self.images, missing), batch_size=None, num_workers=self.num_workers, collate_fn=_as_it_is
        )
        begun: dict[int, _Shard] = {}
        with tqdm(total=views, desc="teacher", unit="view", disable=not progress) as bar:
            for item in loader if missing else ():
                if isinstance(item, UserError):
                    raise item
                shard, rows, ids, pixels, mask = item
                size = manifest.images_in(shard) * manifest.views
                part = begun.setdefault(shard, _Shard(size))
                part.put(rows, self._encode(self._ask(pixels, mask)) | {"image_id": torch.tensor(ids)})
                bar.update(len(rows))
                if part.missing == 0:
                    self._save(output, shard, begun.pop(shard))
        if begun:
            raise UserError(f"the training data ended within shard {min(begun)}: did its files change meanwhile?")
        return len(missing)

    def finish(self, output: Path) -> Manifest:
        """The index and the manifest, once all shards are there; the files of unfinished work go.

        Raises:
            UserError: a shard is missing, or two images have one id.
        """
        manifest = self.manifest
        shards = [output / manifest.shard_name(shard) for shard in range(manifest.num_shards)]
        notes = [self._note(output, shard) for shard in range(manifest.num_shards)]
        if missing := sum(not file.is_file() for file in (*shards, *notes)):
            raise UserError(f"{missing} files of {output} are missing: start the same command again")
        ids = torch.cat([load_file(file)["image_id"][:: manifest.views] for file in shards])
        if len(ids.unique()) < len(ids):
            raise UserError("two images of the training data have the same id: predictions are found by their ids")
        _save_whole(output / COMMON, self.learnt | self.canvas | {"image_id": ids})
        manifest = replace(
            manifest,
            shards=[json.loads(note.read_text()) for note in notes],
            common_sha256=checksum(output / COMMON),
        )
        write_whole(output / "README.md", _card(manifest))
        write_whole(output / MANIFEST, manifest.to_json())
        for file in (output / BUILDING, *notes, *output.glob("*.part")):
            file.unlink(missing_ok=True)
        return manifest

    # -- shards ------------------------------------------------------------------------------------------------------

    def _note(self, output: Path, shard: int) -> Path:
        """The file that says what a finished shard is, until the manifest does."""
        return output / f"{self.manifest.shard_name(shard)}.json"

    def _is_whole(self, output: Path, shard: int) -> bool:
        note, file = self._note(output, shard), output / self.manifest.shard_name(shard)
        if note.is_file() and json.loads(note.read_text())["sha256"] == checksum(file):
            return True
        note.unlink(missing_ok=True)
        return False

    def _save(self, output: Path, shard: int, part: _Shard) -> None:
        file = output / self.manifest.shard_name(shard)
        _save_whole(file, part.tensors)
        note = {"bytes": file.stat().st_size, "sha256": checksum(file)}
        write_whole(self._note(output, shard), json.dumps(note))

    @torch.no_grad()
    def _ask(self, pixels: Tensor, mask: Tensor) -> DetectorOutput:
        with self.autocast():
            return self.teacher(pixels.to(self.device), mask.to(self.device))

    def _encode(self, output: DetectorOutput) -> dict[str, Tensor]:
        if self.learnt:
            now = learnt_question(output)
            if any(name not in now or not torch.equal(x, now[name]) for name, x in self.learnt.items()):
                raise RuntimeError("the teacher asks unlike questions of images, where those of the first were alike")
        activation = self.teacher.spec.activation
        if len(self.columns) < len(self.manifest.all_classes):
            columns = torch.tensor(self.columns, device=output.logits.device)
            output = output.map_logits(lambda logits: keep_classes(logits, columns, activation))
        return encode(output, self.manifest.contents, activation == "softmax", self.learnt)


@dataclass
class _Images:
    """The images of the training data as the teacher sees them; picklable, as it travels to loader workers."""

    source: Source
    lengths: list[int]  # of its shards
    config: DataConfig
    seed: int
    manifest: Manifest
    batch_size: int

    def rows(self, wanted: range) -> Iterator[dict]:
        """The rows of the source from the first of `wanted` to its last; only the shards that hold them are read."""
        first, stream = 0, self.source.stream
        for shard, length in enumerate(self.lengths):
            begin, end = max(wanted.start - first, 0), min(wanted.stop - first, length)
            if begin < end:
                yield from islice(read_rows(stream.shard(num_shards=stream.num_shards, index=shard)), begin, end)
            first += length

    def view(self, row: dict, image: Tensor, view: int) -> Tensor:
        """The pixels of a view of an image."""
        height, width = image.shape[-2:]
        if self.manifest.canonical:
            shown = teacher_view(self.config)
            whole = Geometry(False, (0, 0, height, width), evaluation_size(shown, height, width))
            return teacher_pixels(image, whole, shown)
        with seeded(self.seed, view, row["image_id"]):
            geometry = draw_geometry(self.config, height, width)
        if self.manifest.seed is None:
            geometry = replace(geometry, flip=view == 1)
        return teacher_pixels(image, geometry, self.config)

    def batches(self, shard: int) -> Iterator[tuple[int, list[int], list[int], Tensor, Tensor]]:
        """Of a shard of the cache: its number, the rows in it, ids of the images, pixels and mask.

        They are the same however many ranks and workers there are: padding, and so the last digits, depend on them.
        """
        manifest, done = self.manifest, 0
        first = shard * manifest.images_per_shard
        rows = self.rows(range(first, first + manifest.images_in(shard)))
        while batch := list(islice(rows, self.batch_size)):
            images = [decode(row) for row in batch]
            ids = [row["image_id"] for row in batch]
            for view in range(manifest.views):
                shown = [self.view(row, image, view) for row, image in zip(batch, images, strict=True)]
                yield shard, [(done + i) * manifest.views + view for i in range(len(batch))], ids, *pad(shown)
            done += len(batch)


class _Views(IterableDataset):
    """The batches of some shards, each shard by one loader worker, which gives a UserError as an item."""

    def __init__(self, images: _Images, shards: list[int]) -> None:
        self.images, self.shards = images, shards

    def __iter__(self) -> Iterator[tuple | UserError]:
        info = get_worker_info()
        own = self.shards if info is None else self.shards[info.id :: info.num_workers]
        try:
            for shard in own:
                yield from self.images.batches(shard)
        except UserError as error:
            if info is None:
                raise
            yield error


class _Shard:
    """The rows of a shard as they come in."""

    def __init__(self, size: int) -> None:
        self.size, self.missing, self.tensors = size, size, {}

    def put(self, rows: list[int], stored: dict[str, Tensor]) -> None:
        for name, x in stored.items():
            whole = self.tensors.setdefault(name, x.new_empty(self.size, *x.shape[1:]))
            whole[rows] = x
        self.missing -= len(rows)


def _number_of_views(
    config: DataConfig, contents: Contents, views: int | None, canonical: bool, teacher: DetectorAdapter
) -> int:
    known = count_geometries(config)
    if canonical:
        if views is not None:
            raise UserError("--canonical keeps one prediction an image: leave out --views")
        if "sides" in contents.fields:
            raise UserError("--canonical: distributions over the sides of boxes cannot be carried to a crop")
        if contents.levels:
            raise UserError(
                "--canonical: feature maps cannot be carried to a flip or a crop: build an exact cache, with --views "
                "where crops are drawn"
            )
        if "question" in contents.fields and not teacher.spec.reference_size:
            raise UserError(
                f"--canonical: the queries of {teacher.spec.family} say by their contents where they look, which a "
                "flip does not change: build an exact cache, or train by a method that asks no questions"
            )
        return 1
    if known is None and views is None:
        raise UserError(
            f"data.augmentation {config.augmentation!r} draws no view twice: give --views N, as many as epochs for "
            "exactly the training with the teacher, or --canonical, which is approximate"
        )
    if known is not None and views is not None:
        raise UserError(f"--views has no use: an image has {known} view(s) under this data section, all of them kept")
    if views is not None and views < 1:
        raise UserError(f"--views must be 1 or more, not {views}")
    return known or views


def _count_rows(source: Source) -> list[int]:
    """Of each shard of a source whose lengths are not known, by reading all of it."""
    stream = source.stream
    shards = tqdm(range(stream.num_shards), desc="counting images", unit="shard")
    return [sum(1 for _ in read_rows(stream.shard(num_shards=stream.num_shards, index=shard))) for shard in shards]


def _card(manifest: Manifest) -> str:
    data = DatasetCardData(task_categories=["object-detection"], tags=["asd_hf", "knowledge-distillation"])
    return (
        f"---\n{data.to_yaml()}\n---\n\n# Predictions of {manifest.teacher}\n\n"
        f"What this detector says of {manifest.num_images} images, to train students by asd_hf without it: "
        f"`model.teacher_cache`.\n\n- {manifest.kind}\n- {manifest.contents.summary}, "
        f"{manifest.spec['num_queries']} queries, found by image id\n\n"
        "`manifest.json` says what they were made of, and has the checksum of each file.\n"
    )


def _save_whole(file: Path, tensors: dict[str, Tensor]) -> None:
    beside = file.with_name(f"{file.name}.part")
    try:
        save_file(tensors, beside)
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def _as_it_is(item):
    return item
