"""Students of a teacher that answer in a given time: built, measured, and the largest of them chosen."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import timm
import torch

from .copying import copy_weights
from .detectors.base import DetectorAdapter
from .errors import UserError
from .evaluation import milliseconds_per_image
from .model_config import StudentConfig
from .progress import tqdm
from .student import build_student

# timm's, pretrained on ImageNet; those that are no smaller than the teacher's own are left out.
BACKBONES = ("resnet101", "resnet50", "resnet34", "resnet18", "mobilenetv3_large_100")
FEWEST_LAYERS = 2  # of a decoder: Transformers does not build a smaller one of every family
NARROWEST = 64
SIZES = {
    "backbone": "{}",
    "decoder_layers": "decoder {}",
    "encoder_layers": "encoder {}",
    "num_queries": "{} queries",
    "d_model": "width {}",
}


@dataclass(frozen=True)
class Candidate:
    """A student that was built and measured.

    Attributes:
        student: what `build_student` makes it of.
        parameters: how many it has.
        copied: how many of them begin with the teacher's weights.
        milliseconds: of a forward pass of one image, the median.
    """

    student: StudentConfig
    parameters: int
    copied: int
    milliseconds: float

    @property
    def name(self) -> str:
        """What of it is not as in the teacher."""
        values = {key: getattr(self.student, key) for key in SIZES}
        return ", ".join(SIZES[key].format(value) for key, value in values.items() if value is not None)


def shrink(
    teacher: DetectorAdapter,
    size: dict[str, int],
    image_size: tuple[int, int],
    target_ms: float,
    device: str = "cpu",
    rounds: int = 10,
) -> tuple[list[Candidate], dict[str, str]]:
    """Builds and measures students of the teacher, of ever smaller transformers on each of some backbones.

    On every backbone the largest that meets the target is found by bisection, so that few are built.

    Args:
        size: of images as the student's image processor will have it.
        image_size: (height, width) of the image that students are measured on.
        rounds: forward passes, whose median is a student's time.

    Returns:
        All that were measured, the largest first; and of the backbones that this family cannot have the reason.

    Raises:
        UserError: nothing of the teacher can be made smaller, or no student of it be built.
    """
    ladders = {backbone: _ladder(teacher, backbone) for backbone in _backbones(teacher)}
    if not any(ladders.values()):
        raise UserError(f"this {teacher.spec.family} has nothing that could be made smaller")
    found, refused = [], {}
    steps = sum(len(ladder).bit_length() for ladder in ladders.values())
    with tqdm(total=steps, desc="measure", unit="student", leave=False) as bar:
        for backbone, ladder in ladders.items():
            low, high = 0, len(ladder)  # rungs before `low` miss the target, those from `high` on meet it
            while low < high:
                middle = (low + high) // 2
                config = StudentConfig(backbone=backbone, copy_weights=True, **ladder[middle])
                try:
                    candidate = _measure(config, teacher, size, image_size, device, rounds)
                except UserError as error:
                    refused[backbone or "the teacher's backbone"] = str(error)
                    break
                found.append(candidate)
                low, high = (low, middle) if candidate.milliseconds <= target_ms else (middle + 1, high)
                bar.update()
    if not found:
        raise UserError("; ".join(f"{backbone}: {reason}" for backbone, reason in refused.items()))
    return sorted(found, key=lambda candidate: -candidate.parameters), refused


def choose(candidates: Iterable[Candidate], target_ms: float) -> Candidate | None:
    """The one with the most parameters that meets the target; None if none does."""
    meeting = [candidate for candidate in candidates if candidate.milliseconds <= target_ms]
    return max(meeting, key=lambda candidate: candidate.parameters, default=None)


def _backbones(teacher: DetectorAdapter) -> list[str | None]:
    """None for the teacher's own, then smaller ones of timm, where the family takes them."""
    if teacher.backbone_type is not None or "backbone_config" not in teacher.model.config.to_dict():
        return [None]
    own = sum(p.numel() for p in teacher.backbone.parameters())
    return [None, *(name for name in BACKBONES if _count_parameters(name) < own)]


def _count_parameters(backbone: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(backbone, features_only=True).parameters())


def _ladder(teacher: DetectorAdapter, backbone: str | None) -> list[dict[str, int]]:
    """Sizes of ever smaller transformers, as `StudentConfig` has them; the first is the teacher's.

    Layers are left out first, since the teacher's weights fit those that stay. The width comes last: a narrower
    transformer starts from scratch.
    """
    spec, names = teacher.spec, teacher.config_names
    encoder = max((getattr(teacher.model.config, name) for name in names.get("encoder_layers", ())), default=1)
    fewer = [
        {"decoder_layers": max(FEWEST_LAYERS, math.ceil(spec.num_layers / 2))},
        {"encoder_layers": max(1, encoder // 2)},
        {"decoder_layers": max(FEWEST_LAYERS, math.ceil(spec.num_layers / 3))},
        {"encoder_layers": max(1, encoder // 3)},
        {"num_queries": max(1, spec.num_queries // 2)},
        {"d_model": max(NARROWEST, spec.hidden_size // 64 * 32)},  # a multiple of 32
    ]
    now = {
        "decoder_layers": spec.num_layers,
        "encoder_layers": encoder,
        "num_queries": spec.num_queries,
        "d_model": spec.hidden_size,
    }
    rungs: list[dict[str, int]] = [{}]
    for step in fewer:
        ((name, value),) = step.items()
        if name in names and value < rungs[-1].get(name, now[name]):
            rungs.append(rungs[-1] | step)
    return rungs if backbone is not None else rungs[1:]  # the teacher itself is no student


def _measure(
    config: StudentConfig,
    teacher: DetectorAdapter,
    size: dict[str, int],
    image_size: tuple[int, int],
    device: str,
    rounds: int,
) -> Candidate:
    student = build_student(config, teacher, teacher.spec.class_names, size)
    modules = [student.model.get_submodule(name) for name in copy_weights(student, teacher)]
    copied = {id(p): p.numel() for module in modules for p in module.parameters(recurse=False)}  # some are shared
    student.model.to(device)
    image = torch.randint(0, 256, (1, 3, *image_size), dtype=torch.uint8, device=device)
    milliseconds = milliseconds_per_image(student, image, torch.ones_like(image[:, 0], dtype=torch.bool), rounds)
    parameters = sum(p.numel() for p in student.model.parameters())
    return Candidate(config, parameters, sum(copied.values()), milliseconds)
