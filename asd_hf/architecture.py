"""A student that is built anew: its configuration, its image processor, its backbone's first weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    PreTrainedConfig,
)

from .classes import short_list
from .copying import state_of
from .detectors import ADAPTERS, adapter_class
from .detectors.base import DetectorAdapter
from .errors import UserError
from .loading import PACKAGED, brief, load_config
from .model_config import StudentConfig
from .registry import nearest

logger = logging.getLogger(__name__)

_NOT_ARCHITECTURE = {
    *("_name_or_path", "architectures", "dtype", "id2label", "label2id", "model_type", "problem_type"),
    "transformers_version",
}


def new_architecture(
    config: StudentConfig, teacher: DetectorAdapter | None, class_names: tuple[str, ...]
) -> PreTrainedConfig:
    """The configuration of a new student, or a UserError that names the option that it cannot have."""
    name = str(PACKAGED.get(config.base, config.base))
    if name == "teacher":
        if teacher is None:
            raise UserError(
                "model.student.base is 'teacher', but there is no pretrained teacher (model.teacher is null or "
                f"'ema'): name one of {', '.join(ADAPTERS)}, a Hub id or a folder"
            )
        base = teacher.model.config
    elif name in ADAPTERS:
        base = CONFIG_MAPPING[name](**adapter_class(name).default_values)
    elif "/" not in name and not Path(name).is_dir():
        raise UserError(
            f"model.student.base: {name!r} is no detector type, folder or Hub id: {nearest(name, ADAPTERS)}"
        )
    else:
        base = load_config(name, "model.student.base")
    sizes = {name: getattr(config, name) for name in ("encoder_layers", "decoder_layers", "num_queries", "d_model")}
    if config.num_queries is not None and config.num_queries < 1:
        raise UserError(f"model.student.num_queries must be 1 or more, not {config.num_queries}")
    family = adapter_class(base.model_type)
    if family.open_vocabulary:
        raise UserError(f"a {base.model_type} can only be a teacher: set model.student.base to another architecture")
    values = family.config_values(**sizes)
    known = {key: value for key, value in base.to_dict().items() if key not in family.derived_values}
    valid = set(known) - _NOT_ARCHITECTURE
    for name in config.config:
        if name not in valid:
            raise UserError(f"model.student.config.{name} is unknown to {base.model_type}: {nearest(name, valid)}")
        if name in values:
            raise UserError(f"model.student.config.{name} contradicts the option model.student has for it: give one")
    values |= config.config
    # As many of the last stages as the architecture takes of its own backbone.
    indices = [-n for n in range(len(base.backbone_config.out_indices), 0, -1)] if "backbone_config" in valid else []
    if config.backbone is not None:
        if not indices:
            raise UserError(f"model.student.backbone: a {base.model_type} is one transformer and has no backbone")
        if "backbone_config" in config.config:
            raise UserError("give model.student.backbone or model.student.config.backbone_config, not both")
        # A transformer's maps are not of its last layers, but of those that its own configuration names.
        values["backbone_config"] = _backbone_config(config.backbone, None if family.backbone_type else indices)
    elif config.pretrained_backbone:
        raise UserError("model.student.pretrained_backbone needs model.student.backbone")
    elif "backbone_config" in values and not {"out_features", "out_indices"} & set(values["backbone_config"]):
        if family.backbone_type:
            raise UserError(
                "model.student.config.backbone_config needs out_indices: which layers give the feature maps"
            )
        values["backbone_config"] = values["backbone_config"] | {"out_indices": indices}
    if "backbone_config" in values:
        kind = values["backbone_config"].get("model_type")
        if family.backbone_type not in (None, kind):
            raise UserError(
                f"model.student: the backbone of a {base.model_type} is a {family.backbone_type}, not {kind}"
            )
        values = family.backbone_values(_channels(values["backbone_config"])) | values
    names = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: i for i, name in enumerate(class_names)},
    }
    try:
        return type(base)(**(known | values | names))
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise UserError(f"model.student: {base.model_type} cannot have this configuration: {brief(error)}") from error


def new_model(architecture: PreTrainedConfig) -> nn.Module:
    """With fresh weights."""
    try:
        return AutoModelForObjectDetection.from_config(architecture, dtype=torch.float32)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = "Transformers needs at least 2 decoder layers" if "tie_weights_keys" in str(error) else brief(error)
        raise UserError(f"model.student cannot be built: {reason}") from error


def known_processor(config: StudentConfig, teacher: DetectorAdapter | None):
    """Of the architecture, by which the student sees pixels alike with and without its teacher; None if there is none.

    So the teacher's only where the student is built after it.
    """
    if config.base == "teacher" or config.copy_weights:
        return teacher.processor
    name = str(PACKAGED.get(config.base, config.base))
    if name in ADAPTERS:
        return None
    try:
        return AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):  # a folder with nothing but a configuration
        return None


def new_processor(config: StudentConfig, model_type: str, known, size: dict[str, int]):
    """With the pixel statistics that the first weights know: a pretrained backbone's, or those of `known`."""
    options: dict[str, Any] = {"size": dict(size)}
    if config.pretrained_backbone and timm.is_model(config.backbone):
        weights = timm.get_pretrained_cfg(config.backbone)
        options |= {"do_normalize": True, "image_mean": list(weights.mean), "image_std": list(weights.std)}
        known = None
    elif config.pretrained_backbone:
        try:
            known = AutoImageProcessor.from_pretrained(config.backbone, trust_remote_code=False)
        except (OSError, ValueError) as error:
            architecture = "the teacher" if config.base == "teacher" else config.base
            other = f"a new {model_type}" if known is None else architecture
            logger.warning("no image processor with %s: normalised as %s (%s)", config.backbone, other, brief(error))
    if known is not None:
        for name in ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"):
            options[name] = getattr(known, name)
    return adapter_class(model_type).processor_class(**options)


def load_backbone_weights(student: DetectorAdapter, backbone: str, backbone_config: PreTrainedConfig) -> None:
    """Loads the weights of `backbone`, a timm name, Hub id or folder, into the backbone of the student."""
    try:
        if timm.is_model(backbone):
            indices = list(backbone_config.out_indices)
            donor = timm.create_model(backbone, pretrained=True, features_only=True, out_indices=indices)
        else:
            with torch.device("meta"):  # AutoBackbone.from_pretrained knows no folders, its classes do
                backbone_class = type(AutoBackbone.from_config(backbone_config))
            donor, report = backbone_class.from_pretrained(
                backbone, config=backbone_config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
            if missing := sorted(report["missing_keys"]):
                raise ValueError(f"it lacks {short_list(missing)}")
        student.backbone.load_state_dict(state_of(donor))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"model.student: no weights of backbone {backbone}: {brief(error)}") from error


def _backbone_config(backbone: str, indices: list[int] | None) -> dict[str, Any]:
    """Of a backbone that gives the stages `indices`, or those of its own configuration."""
    if timm.is_model(backbone):
        return {
            "model_type": "timm_backbone",
            "backbone": backbone,
            "features_only": True,
            "use_pretrained_backbone": False,  # a saved student must not ask for them again
            "out_indices": indices,
        }
    if not Path(backbone).is_dir() and "/" not in backbone:
        raise UserError(f"model.student.backbone: timm has no {backbone!r}: {nearest(backbone, timm.list_models())}")
    found = load_config(backbone, "model.student.backbone").to_dict()
    if indices is None:
        return found
    return {k: v for k, v in found.items() if k not in ("out_features", "stage_names")} | {"out_indices": indices}


def _channels(backbone_config: dict[str, Any]) -> list[int]:
    """Of the feature maps that a backbone gives."""
    try:
        with torch.device("meta"):
            return list(AutoBackbone.from_config(AutoConfig.for_model(**backbone_config)).channels)
    except (StrictDataclassError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"model.student: no backbone can be built of {backbone_config}: {brief(error)}") from error
