"""What a cache of predictions holds and what it was made of: `manifest.json`."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..classes import match_classes, rename_classes, short_list
from ..data import DataConfig, Source, resize_spec, teacher_view
from ..data.transforms import count_geometries
from ..detectors.base import DetectorAdapter, DetectorSpec
from ..errors import UserError
from ..hub import without_folders
from ..methods import CombinedMethod, DistillationMethod

FORMAT = 1  # of the files
MANIFEST = "manifest.json"
COMMON = "common.safetensors"
FIELDS = (
    "logits",
    "boxes",
    "queries",
    "sides",
    "question",
    "features",
)  # what can be stored, see `DistillationMethod.teacher_reads`


@dataclass(frozen=True)
class Contents:
    """What is stored of each prediction.

    Attributes:
        fields: some of `FIELDS`.
        layers: of the teacher's decoder, rising.
        levels: of the teacher's feature maps, finest first; none without "features".
        top_queries: only the best so many, by their best class probability in the last layer; None for all.
        top_classes: only the best so many classes of each query, in each layer; None for all.
    """

    fields: list[str]
    layers: list[int]
    levels: list[int] = field(default_factory=list)
    top_queries: int | None = None
    top_classes: int | None = None

    @classmethod
    def of(
        cls,
        method: DistillationMethod | CombinedMethod,
        teacher: DetectorSpec,
        top_queries: int | None = None,
        top_classes: int | None = None,
    ) -> Contents:
        """What a method needs of a teacher.

        Raises:
            UserError: it reads what cannot be stored, or fewer than one or more than all are to be kept.
        """
        reads = method.teacher_reads
        if unheld := reads - set(FIELDS):
            raise UserError(
                f"the method reads {named(unheld)} of the teacher, which no cache holds: train it with the teacher"
            )
        for option, value, count in (
            ("--top-queries", top_queries, teacher.num_queries),
            ("--top-classes", top_classes, len(teacher.class_names)),
        ):
            if value is not None and not 1 <= value <= count:
                raise UserError(f"{option} is {value}, but the teacher has {count}")
        layers = list(range(teacher.num_layers - method.teacher_layers, teacher.num_layers))
        if "question" in reads and teacher.reference_size != 4 and 0 not in layers:
            layers = [0, *layers]  # the boxes of the first layer tell where the queries begin, see `Translator`
        return cls(
            [name for name in FIELDS if name in reads],
            layers,
            sorted(method.teacher_levels) if "features" in reads else [],
            None if top_queries == teacher.num_queries else top_queries,
            None if top_classes == len(teacher.class_names) else top_classes,
        )

    @property
    def num_layers(self) -> int:
        """How many of the last layers are there."""
        return len(self.layers) if self.layers[-1] - self.layers[0] == len(self.layers) - 1 else len(self.layers) - 1

    @property
    def summary(self) -> str:
        """For people."""
        layered = ", ".join(name for name in self.fields if name != "features")
        maps = f" and {len(self.levels)} feature maps" if self.levels else ""
        return f"{layered} of {len(self.layers)} decoder layers{maps}"


@dataclass(frozen=True)
class Manifest:
    """Of a cache.

    Attributes:
        teacher: its Hub id, or the last part of its folder.
        teacher_sha256: of its weights, see `weights_sha256`.
        parameters: of the teacher.
        spec: the teacher's `DetectorSpec` as JSON has it, of the classes and the number of queries that are stored.
        all_classes: of the teacher; those that the data lacks are not stored, and `spec` lacks them.
        prompted: the teacher was told the names of the data's classes.
        precision: in which the teacher computed: "no" for fp32, or that of autocast.
        fingerprint: of the data.
        num_images: of the data.
        view: what decides of the data section how the teacher sees an image.
        canonical: one prediction an image, as evaluation shows it, is carried to the augmented views.
        views: of each image.
        seed: of the drawn views; None where all that can be drawn are stored, or none.
        contents: what is stored.
        images_per_shard: the last shard has fewer.
        shards: `bytes` and `sha256` of each.
        learnt: parts of the teacher's question that are the same for every image.
        common_sha256: of the file with the ids of the images, what is `learnt`, and the mask of the teacher's canvas.
    """

    teacher: str
    teacher_sha256: str
    parameters: int
    spec: dict[str, Any]
    all_classes: list[str]
    prompted: bool
    precision: str
    fingerprint: str
    num_images: int
    view: dict[str, Any]
    canonical: bool
    views: int
    seed: int | None
    contents: Contents
    images_per_shard: int
    learnt: list[str]
    format: int = FORMAT
    asd_hf: str = __version__
    shards: list[dict[str, Any]] = field(default_factory=list)
    common_sha256: str | None = None

    @property
    def detector_spec(self) -> DetectorSpec:
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in self.spec.items()}
        return DetectorSpec(**values | {"capabilities": frozenset(values["capabilities"])})

    @property
    def num_shards(self) -> int:
        return math.ceil(self.num_images / self.images_per_shard)

    def shard_name(self, shard: int) -> str:
        return f"predictions-{shard:05d}-of-{self.num_shards:05d}.safetensors"

    def images_in(self, shard: int) -> int:
        return min(self.images_per_shard, self.num_images - shard * self.images_per_shard)

    @property
    def kind(self) -> str:
        """How the views of training are had, for people."""
        if self.canonical:
            return "approximate: one prediction an image, carried to its augmented views"
        if self.seed is None:
            return (
                f"exact: all {self.views} views of each image" if self.views > 1 else "exact: images are not augmented"
            )
        return f"exact: {self.views} drawn views of each image, in turn"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    def differences(self, other: Manifest) -> list[str]:
        """Where this one's cache is not what `other` would be, without the files."""
        own, theirs = (asdict(manifest) for manifest in (self, other))
        return [
            f"{name} is {_shown(own[name])} there and {_shown(theirs[name])} here"
            for name in own
            if name not in ("shards", "common_sha256") and own[name] != theirs[name]
        ]

    def check(
        self,
        config: DataConfig,
        seed: int,
        source: Source,
        teacher: DetectorAdapter | None,
        teacher_name: str,
        class_names: Sequence[str],
        class_map: Mapping[str, str] | None,
    ) -> list[str]:
        """What of a training differs from what the cache was made for; nothing if it may be used.

        Args:
            config, seed: of the training data and its augmentation.
            source: of the training data.
            teacher: the teacher, if its weights are at hand; otherwise its name must do.
            class_names, class_map: the student's classes, which a teacher of open vocabulary was told.
        """
        found = []

        def compare(what: str, there: Any, here: Any) -> None:
            if there != here:
                found.append(f"{what} is {_shown(there)} there and {_shown(here)} here")

        compare("the version of asd_hf", self.asd_hf, __version__)
        if teacher is None:
            compare("the teacher", self.teacher, without_folders(teacher_name))
        else:
            compare("the checksum of the teacher's weights", self.teacher_sha256, weights_sha256(teacher.model))
            compare("the list of the teacher's classes", self.all_classes, list(teacher.spec.class_names))
            spec = spec_values(teacher.spec, self.contents.top_queries)
            del spec["class_names"]
            for name in spec:
                compare(f"{name} of the teacher", self.spec.get(name), spec[name])
        if self.prompted:
            names = rename_classes(class_names, class_map)
            compare("the list of classes that the teacher is told", self.all_classes, list(names))
        known = [self.all_classes[i] for i in shared_columns(self.all_classes, class_names, class_map)]
        compare("the list of classes that teacher and data share", self.spec["class_names"], known)
        compare("the fingerprint of the training data", self.fingerprint, source.fingerprint)
        view = view_values(config, self.canonical)
        for name in dict.fromkeys([*self.view, *view]):
            compare(f"data.{name}", self.view.get(name), view.get(name))
        if self.seed is not None:
            compare("the seed of the augmentation (training.data_seed, or else training.seed)", self.seed, seed)
        return found


def read_manifest(file: Path) -> Manifest:
    """
    Raises:
        UserError: it is no manifest, or of another format.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        form = values["format"]
        if form == FORMAT:
            values["contents"] = Contents(**values["contents"])
            manifest = Manifest(**values)
            manifest.detector_spec  # noqa: B018  whether it is one
            return manifest
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{file} is no manifest of a teacher's predictions: {type(error).__name__}: {error}"
        ) from error
    raise UserError(f"{file} is of format {form!r}, this asd_hf reads format {FORMAT}: build it again (asd-hf cache)")


def weights_sha256(model: nn.Module) -> str:
    """16 digits of the checksum of all weights and buffers, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def shared_columns(
    all_classes: Sequence[str], class_names: Sequence[str], class_map: Mapping[str, str] | None
) -> list[int]:
    """Which of a teacher's classes those of the data are, in the teacher's order."""
    return sorted(match_classes(class_names, all_classes, class_map)[1])


def spec_values(spec: DetectorSpec, top_queries: int | None) -> dict[str, Any]:
    """A spec as JSON has it, with the queries that are kept."""
    values = {f.name: getattr(spec, f.name) for f in fields(spec)} | {"capabilities": sorted(spec.capabilities)}
    values["num_queries"] = spec.num_queries if top_queries is None else top_queries
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def view_values(config: DataConfig, canonical: bool) -> dict[str, Any]:
    """What decides of the data section what the teacher sees of an image in training."""
    size = config.teacher_size
    if canonical:
        return {"resolution of the teacher": resize_spec(teacher_view(config))}
    values = {"augmentation": config.augmentation, "resize": config.resize, "teacher_size": size}
    if config.resize == "fixed":
        values["fixed_size"] = config.fixed_size
    elif size is None or count_geometries(config) is None:
        values |= {"train_sizes": config.train_sizes, "max_size": config.max_size}
    if isinstance(size, int):
        values |= {"eval_size": config.eval_size, "max_size": config.max_size}
    return values


def named(what: Iterable[str]) -> str:
    return ", ".join("answers to questions of its own" if name == "decode" else name for name in sorted(what))


def _shown(value: Any) -> str:
    return short_list([str(item) for item in value]) if isinstance(value, list) else repr(value)
