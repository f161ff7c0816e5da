"""The student of a run, loaded or built to the data's classes."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from .architecture import known_processor, load_backbone_weights, new_architecture, new_model, new_processor
from .classes import find_classes, rename_classes, short_list
from .copying import copy_weights
from .deformable_attention import use_fast_deformable_attention
from .detectors import get_adapter
from .detectors.base import DetectorAdapter
from .errors import UserError
from .freezing import backbone_stage, freeze_backbone
from .loading import load_detector
from .model_config import StudentConfig

logger = logging.getLogger(__name__)


def build_student(
    config: StudentConfig | str,
    teacher: DetectorAdapter | None,
    class_names: tuple[str, ...],
    size: dict[str, int],
    class_map: Mapping[str, str] | None = None,
) -> DetectorAdapter:
    """Loads or builds the student, in training mode, and sets what of it is trained.

    Its classes are `class_names`, in this order. A checkpoint with other classes keeps the weights of those that it
    knows by name. New weights are drawn from torch's global generator.

    Args:
        size: of images at inference, as image processors have it: {"shortest_edge": 800, "longest_edge": 1333}.
        class_map: other names of classes, by which first weights may know them.

    Raises:
        UserError: an option is unknown, contradicts another or cannot be built.
    """
    config = StudentConfig(checkpoint=config) if isinstance(config, str) else config
    pretrained = config.pretrained_backbone
    if config.checkpoint is not None:
        unused = ("base", "backbone", "encoder_layers", "decoder_layers", "num_queries", "d_model", "config")
        new = StudentConfig()
        for name in (*unused, "pretrained_backbone", "copy_weights"):
            if getattr(config, name) != getattr(new, name):
                raise UserError(f"model.student.{name} is for a new student: {config.checkpoint} is loaded as it is")
        student = load_detector(config.checkpoint, "model.student.checkpoint", size=dict(size))
        pretrained = True
    else:
        if config.copy_weights and teacher is None:
            raise UserError("model.student.copy_weights needs model.teacher")
        if config.copy_weights and teacher.open_vocabulary:
            raise UserError(
                f"model.student.copy_weights: no student has the form of a {teacher.model.config.model_type}"
            )
        names = teacher.spec.class_names if config.copy_weights else tuple(class_names)
        architecture = new_architecture(config, teacher, names)
        processor = new_processor(config, architecture.model_type, known_processor(config, teacher), size)
        student = get_adapter(use_fast_deformable_attention(new_model(architecture)), processor)
        student.reset_transformer()
        student.reset_heads()
        if config.copy_weights:
            copied = copy_weights(student, teacher)
            logger.info("copied %d of the student's modules from the teacher", len(copied))
            pretrained = pretrained or any(
                student.model.get_submodule(name) in set(student.backbone.modules()) for name in copied
            )
        if config.pretrained_backbone:  # last: it is asked for by name
            load_backbone_weights(student, config.backbone, architecture.backbone_config)
    _set_classes(student, tuple(class_names), class_map)
    student.model.config.auxiliary_loss = student.auxiliary_loss
    stages = (
        config.frozen_stages if config.frozen_stages is not None else (student.frozen_stages if pretrained else -1)
    )
    if not config.frozen_batch_norm:
        count = student.train_batch_norm(lambda name: backbone_stage(name) > stages)
        logger.info("%d batch norms of the backbone are trained", count)
    elif not pretrained and student.open_residuals():
        logger.info(
            "the backbone is fresh, its batch norm frozen: model.student.frozen_batch_norm=false would train it"
        )
    freeze_backbone(student, stages)
    student.model.train()
    return student


def _set_classes(student: DetectorAdapter, class_names: tuple[str, ...], class_map: Mapping[str, str] | None) -> None:
    if student.spec.class_names == class_names:
        return
    known = student.spec.class_names
    other = find_classes(rename_classes(class_names, class_map), known)
    rows = [own if own is not None else row for own, row in zip(find_classes(class_names, known), other, strict=True)]
    fresh = [name for name, row in zip(class_names, rows, strict=True) if row is None]
    logger.info(
        "class head of %d classes replaced by one of %d: %d keep their weights, %d are fresh%s",
        len(student.spec.class_names),
        len(class_names),
        len(class_names) - len(fresh),
        len(fresh),
        f" ({short_list(fresh)})" if fresh else "",
    )
    student.replace_classes(class_names, rows)
