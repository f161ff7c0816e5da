"""The `model` section of a run: the teacher, and which student to train."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _option(default, text: str):
    make = {"default_factory": default} if callable(default) else {"default": default}
    return field(**make, metadata={"help": text})


@dataclass
class StudentConfig:
    """Which student to train: a checkpoint, or an architecture built anew."""

    checkpoint: str | None = _option(
        None, "Hub id or folder of a student to train on; excludes the options of a new one"
    )
    base: str = _option(
        "teacher", "Architecture: 'teacher', Hub id or folder with a config, 'shapes', or a type (deformable_detr)"
    )
    backbone: str | None = _option(
        None, "Other backbone: a timm name (resnet18), or Hub id or folder of a Transformers one"
    )
    pretrained_backbone: bool = _option(False, "Load the weights of `backbone` too")
    encoder_layers: int | None = _option(None, "Encoder layers; default: as the architecture")
    decoder_layers: int | None = _option(None, "Decoder layers; default: as the architecture")
    num_queries: int | None = _option(None, "Object queries (two stages: proposals); default: as the architecture")
    d_model: int | None = _option(None, "Width, a multiple of 32; default: as the architecture")
    config: dict[str, Any] = _option(dict, "Any further attribute of the architecture's configuration")
    copy_weights: bool = _option(False, "Copy from the teacher all weights that fit")
    frozen_stages: int | None = _option(
        None,
        "-1: train all of the backbone, 0: freeze its stem, 1: stem and first stage, ...; default: if pretrained, as "
        "the family is trained",
    )
    frozen_batch_norm: bool = _option(True, "Keep batch norm fixed; false for a backbone that trains from scratch")


@dataclass
class ModelConfig:
    """The `model` section of a run's configuration."""

    teacher: str | None = _option(
        None,
        "Hub id or folder of the teacher; 'shapes' for the packaged one; 'ema' for the moving average of the student "
        "itself (training.ema_decay); null: train without one",
    )
    teacher_cache: str | None = _option(
        None,
        "Folder or data set on the Hub with the teacher's predictions (asd-hf cache), read in its place; "
        "model.teacher still names it",
    )
    student: StudentConfig | str = _option(StudentConfig, "Hub id or folder of the student, or how to build one")
    class_map: dict[str, str] = _option(
        dict, "What the teacher calls a class of the data, where the names differ: {motorbike: motorcycle}"
    )
