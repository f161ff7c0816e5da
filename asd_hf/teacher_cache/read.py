"""Predictions on disk or on the Hub in the place of a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..data.cache import cache_root, digest
from ..data.transforms import Geometry
from ..detectors.base import DetectorOutput
from ..errors import UserError
from ..files import checksum
from ..hub import call_hub, is_hub_id
from ..methods import CombinedMethod, DistillationMethod
from ..methods.base import name_of
from ..progress import tqdm
from .form import restore
from .manifest import COMMON, FIELDS, MANIFEST, named, read_manifest


class TeacherCache:
    """Answers for a teacher from its predictions on disk, which are memory-mapped; those of the Hub come on need.

    It gives `RowTransform` the stored tensors of an image (`read`), and of a batch of these it makes the teacher's
    output (called, on any device).

    Args:
        location: a folder that `asd-hf cache` wrote, or a data set on the Hub.

    Attributes:
        manifest: what it was made of.
        spec: the teacher's.

    Raises:
        UserError: there is none, or it is not complete, damaged or of another format.
    """

    def __init__(self, location: str) -> None:
        self.location, self.revision = location, None
        folder = Path(location).expanduser()
        self.folder = None if is_hub_id(location) else folder
        if self.folder is not None and not (folder / MANIFEST).is_file():
            reason = "does not exist" if not folder.is_dir() else "holds no finished predictions"
            raise UserError(
                f"model.teacher_cache: {location} {reason}: build it with asd-hf cache --output {location}"
            )
        file = self._file(MANIFEST)
        if self.folder is None:
            self.revision = file.parent.name  # of a commit: what follows belongs together, and is not asked for twice
        self.manifest = read_manifest(file)
        self.spec = self.manifest.detector_spec
        if self.folder is not None:
            self._verify_all()
        self._common = load_file(self._verified(COMMON, self.manifest.common_sha256))
        self._ids, self._places = self._common.pop("image_id").sort()
        # The teacher saw the student's view, as it is: its mask is then that of the batch, the same tensor.
        self._shares_canvas = "mask" in self._common and (
            self.manifest.view["teacher_size"] is None and bool(self._common["mask"].all())
        )
        self._shards: dict[int, dict[str, Tensor]] = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_shards": {}, "_common": {}}  # a loader worker maps shards itself and makes no output

    # -- files -------------------------------------------------------------------------------------------------------

    def _file(self, name: str) -> Path:
        if self.folder is not None:
            return self.folder / name
        where = f"model.teacher_cache: {self.location} is no folder"
        try:
            return Path(
                call_hub(
                    lambda: hf_hub_download(self.location, name, repo_type="dataset", revision=self.revision),
                    f"{where}, and {name} of a data set of this name cannot be had",
                )
            )
        except LocalEntryNotFoundError as error:
            raise UserError(f"{where}, and the Hub, which may have it, cannot be reached") from error

    def _verified(self, name: str, sha256: str) -> Path:
        """A file whose checksum is right; it is computed once on each machine, while the file does not change."""
        file = self._file(name)
        if not file.is_file():
            raise UserError(f"{file} is missing: build it again with asd-hf cache")
        stat = file.stat()
        stamp = cache_root() / "verified" / digest(str(file.resolve()), stat.st_size, stat.st_mtime_ns, sha256)
        if not stamp.is_file():
            if checksum(file) != sha256:
                raise UserError(f"{file} is damaged: its checksum is not that of {MANIFEST}: start asd-hf cache again")
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.touch()
        return file

    def _verify_all(self) -> None:
        lock = cache_root() / "verified" / f"{digest(str(self.folder.resolve()))}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):  # of several ranks one reads all
            for shard, known in enumerate(tqdm(self.manifest.shards, desc="checking predictions", leave=False)):
                self._verified(self.manifest.shard_name(shard), known["sha256"])

    def _shard(self, shard: int) -> dict[str, Tensor]:
        if shard not in self._shards:
            file = self._verified(self.manifest.shard_name(shard), self.manifest.shards[shard]["sha256"])
            self._shards[shard] = load_file(file)  # maps the file: only what is read comes into memory
        return self._shards[shard]

    # -- reading -----------------------------------------------------------------------------------------------------

    def check(self, method: DistillationMethod | CombinedMethod) -> None:
        """
        Raises:
            UserError: the method reads what is not here.
        """
        for part in method.methods if isinstance(method, CombinedMethod) else [method]:
            if unheld := part.teacher_reads - set(FIELDS):
                raise UserError(
                    f"{name_of(part)} reads {named(unheld)} of the teacher, which no cache holds: train it with the "
                    "teacher itself (model.teacher_cache=null)"
                )
            contents = self.manifest.contents
            if missing := part.teacher_reads - set(contents.fields):
                raise UserError(
                    f"{name_of(part)} reads {named(missing)} of the teacher, but {self.location} holds "
                    f"{named(contents.fields)}: build one for this method (asd-hf cache)"
                )
            if "features" in part.teacher_reads and (unheld := part.teacher_levels - set(contents.levels)):
                wanted, there = (
                    ", ".join(str(self.spec.strides[level]) for level in sorted(levels))
                    for levels in (unheld, contents.levels)
                )
                raise UserError(
                    f"{name_of(part)} reads feature maps of stride {wanted} of the teacher, but {self.location} holds "
                    f"those of stride {there}: build one for this student (asd-hf cache)"
                )
            if part.teacher_layers > contents.num_layers:
                raise UserError(
                    f"{name_of(part)} reads {part.teacher_layers} decoder layers of the teacher, but {self.location} "
                    f"holds the last {contents.num_layers}: build one for these options (asd-hf cache)"
                )

    def draw_epoch(self, epoch: int) -> int:
        """The epoch whose random choices the images have in `epoch`: drawn views come round."""
        return epoch if self.manifest.seed is None else epoch % self.manifest.views

    def read(self, image_id: int, epoch: int, geometry: Geometry, size: tuple[int, int]) -> dict[str, Tensor]:
        """The stored tensors of an image as `geometry` shows it, see `form.encode`, without their first axis.

        For predictions on whole images also `window` (5,), see `form.carry`.

        Raises:
            UserError: the image is not here, or its shard is damaged.
        """
        manifest = self.manifest
        place = int(torch.searchsorted(self._ids, image_id))
        if place == len(self._ids) or self._ids[place] != image_id:
            raise UserError(f"{self.location} has no predictions of image {image_id}: was it made of other data?")
        shard, row = divmod(int(self._places[place]), manifest.images_per_shard)
        view = 0
        if manifest.views > 1:
            view = int(geometry.flip) if manifest.seed is None else epoch % manifest.views
        try:
            stored = self._shard(shard)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{manifest.shard_name(shard)} of {self.location} cannot be read: {error}") from error
        row = row * manifest.views + view
        tensors = {name: x[row] for name, x in stored.items() if name != "image_id"}
        if manifest.canonical:
            (top, left, h, w), (height, width) = geometry.window, size
            tensors["window"] = torch.tensor([geometry.flip, left / width, top / height, w / width, h / height])
        return tensors

    def __call__(self, stored: Mapping[str, Tensor], pixel_mask: Tensor) -> DetectorOutput:
        """The teacher's output of a batch of what `read` gave, whose student's view has this mask (B, H, W)."""
        logits = stored["logits"]
        self._common = {name: x.to(logits.device) for name, x in self._common.items()}  # moves them once
        learnt = dict(self._common)
        mask = learnt.pop("mask", None)
        if mask is not None:
            mask = pixel_mask if self._shares_canvas else mask.expand(len(logits), -1, -1)
        return restore(stored, self.spec, learnt, mask)
