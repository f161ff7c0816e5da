"""The models of a run: the teacher as it is, and a student loaded or built to the data's classes."""

from __future__ import annotations

import logging
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
    PreTrainedConfig,
)

from .classes import find_classes, rename_classes, short_list
from .deformable_attention import use_fast_deformable_attention
from .detectors import ADAPTERS, adapter_class, get_adapter
from .detectors.base import DetectorAdapter
from .errors import UserError
from .registry import nearest

logger = logging.getLogger(__name__)

# Teachers that ship with the package, by the name of the data set they know.
SELF_TAUGHT = "ema"  # as model.teacher: the student's own moving average
PACKAGED = {"shapes": Path(__file__).parent / "assets" / "shapes_teacher"}

UNPICKLE = (
    "pickled weights, as in pytorch_model.bin, are never read: where you trust them, convert them by "
    "AutoModelForObjectDetection.from_pretrained(...).save_pretrained(...)"
)
_PROCESSOR = {False: "image processor", True: "processor with a tokenizer"}
_NOT_ARCHITECTURE = {
    *("_name_or_path", "architectures", "dtype", "id2label", "label2id", "model_type", "problem_type"),
    "transformers_version",
}


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


def load_teacher(name: str, key: str = "model.teacher") -> DetectorAdapter:
    """A frozen detector in eval mode, of a Hub id, a folder or a key of `PACKAGED`.

    Args:
        key: where the name stands, for the message.

    Raises:
        UserError: no such model, or it is no detector of a known family, lacks weights or a processor.
    """
    teacher = _load_detector(str(PACKAGED.get(name, name)), key)
    teacher.model.requires_grad_(False).eval()
    return teacher


def prompt_teacher(
    teacher: DetectorAdapter, class_names: Sequence[str], class_map: Mapping[str, str] | None = None
) -> None:
    """Tells a teacher of open vocabulary to look for `class_names`, by the names that `class_map` has for it."""
    if teacher.open_vocabulary:
        teacher.prompt(rename_classes(class_names, class_map))


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
        student = _load_detector(config.checkpoint, "model.student.checkpoint", size=dict(size))
        pretrained = True
    else:
        if config.copy_weights and teacher is None:
            raise UserError("model.student.copy_weights needs model.teacher")
        if config.copy_weights and teacher.open_vocabulary:
            raise UserError(
                f"model.student.copy_weights: no student has the form of a {teacher.model.config.model_type}"
            )
        names = teacher.spec.class_names if config.copy_weights else tuple(class_names)
        architecture = _architecture(config, teacher, names)
        processor = _new_processor(config, architecture.model_type, _known_processor(config, teacher), size)
        student = get_adapter(use_fast_deformable_attention(_new_model(architecture)), processor)
        student.reset_transformer()
        student.reset_heads()
        if config.copy_weights:
            copied = copy_weights(student, teacher)
            logger.info("copied %d of the student's modules from the teacher", len(copied))
            pretrained = pretrained or any(
                student.model.get_submodule(name) in set(student.backbone.modules()) for name in copied
            )
        if config.pretrained_backbone:  # last: it is asked for by name
            _load_backbone_weights(student, config.backbone, architecture.backbone_config)
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


def freeze_backbone(adapter: DetectorAdapter, frozen_stages: int) -> list[str]:
    """Freezes the stem and the first `frozen_stages` stages of the backbone, and nothing else; -1 freezes nothing.

    Transformers' own freezing is undone: it depends on module names that not all backbones have.

    Returns:
        Names of the frozen parameters within the backbone. They are counted in the log.

    Raises:
        UserError: stages are to be frozen and the backbone names none.
    """
    parameters = dict(adapter.backbone.named_parameters())
    if frozen_stages > 0 and max(map(backbone_stage, parameters)) == 0:
        raise UserError(
            f"cannot tell the stages of {type(adapter.backbone).__name__}: set model.student.frozen_stages to -1 or 0"
        )
    frozen = [name for name in parameters if backbone_stage(name) <= frozen_stages]
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in frozen)
    logger.info("%d of %d backbone tensors frozen (frozen_stages %d)", len(frozen), len(parameters), frozen_stages)
    return frozen


# timm: layer1.0.conv1, s1.b1, stages_0.blocks, layers_0.blocks; Transformers: encoder.stages.0.layers.0,
# encoder.layers.0.blocks, hidden_states_norms.stage2. The first of these in a name is the stage.
_STAGE = re.compile(r"(?:^|\.)(?:(?:layer|stage|s)(?P<from_1>\d+)|(?:stages|layers)[._](?P<from_0>\d+))(?:\.|$)")


def backbone_stage(name: str) -> int:
    """Stage of a module or parameter by its name within the backbone: 0 is the stem, 1 the first stage."""
    match = _STAGE.search(name)
    if match is None:
        return 0
    return int(match["from_1"]) if match["from_1"] else int(match["from_0"]) + 1


def copy_weights(student: DetectorAdapter, teacher: DetectorAdapter) -> list[str]:
    """Copies the teacher's modules whose tensors all fit into the student, the backbone as a whole or not at all.

    Where the student has fewer layers, they take the weights of evenly spaced ones, the last always included
    (Shleifer and Rush, arXiv 2010.13002). Where it has fewer queries, it takes the first ones.

    Returns:
        Names of the student's modules that were copied.

    Raises:
        UserError: the two are of different families.
    """
    if student.spec.family != teacher.spec.family:
        raise UserError(
            f"model.student.copy_weights: a {student.spec.family} cannot take weights of a {teacher.spec.family}"
        )
    source, target = dict(teacher.model.named_modules()), dict(student.model.named_modules())
    backbone = {id(module) for module in student.backbone.modules()}
    pairs = {}
    for name, module in target.items():
        twin = source.get(_twin(name, student.layer_lists, teacher.layer_lists))
        if _tensors(module) and twin is not None and _fits(module, twin):
            pairs[name] = twin
    whole = all(
        name in pairs for name, module in target.items() if id(module) in backbone and _tensors(module)
    ) and len(_state(teacher.backbone)) == len(_state(student.backbone))
    copied = []
    with torch.no_grad():
        for name, twin in pairs.items():
            if whole or id(target[name]) not in backbone:
                theirs = _tensors(twin)
                for key, tensor in _tensors(target[name]).items():
                    tensor.copy_(theirs[key][: len(tensor)] if tensor.dim() else theirs[key])
                copied.append(name)
    return copied


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's own parameters and saved buffers, without those of its children."""
    return {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if "." not in name}


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}


def _fits(module: nn.Module, twin: nn.Module) -> bool:
    ours, theirs = _tensors(module), _tensors(twin)
    if isinstance(module, nn.Embedding) and isinstance(twin, nn.Embedding):  # queries: the first rows will do
        return len(module.weight) <= len(twin.weight) and module.weight.shape[1] == twin.weight.shape[1]
    return all(name in theirs and theirs[name].shape == tensor.shape for name, tensor in ours.items())


def _twin(name: str, student_lists: dict[str, int], teacher_lists: dict[str, int]) -> str:
    """The teacher's name of the student's module `name`."""
    for prefix, layers in student_lists.items():
        if name.startswith(f"{prefix}."):
            number, *rest = name[len(prefix) + 1 :].split(".")
            number, theirs = int(number), teacher_lists[prefix]
            if number >= layers:
                number += theirs - layers
            else:
                number = round(number * (theirs - 1) / (layers - 1)) if layers > 1 else theirs - 1
            return ".".join([prefix, str(number), *rest])
    return name


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


def _load_detector(name: str, key: str, **processor_options) -> DetectorAdapter:
    config = _load_config(name, key)
    try:
        open_vocabulary = adapter_class(config.model_type).open_vocabulary
    except UserError as error:
        raise UserError(f"{key}: {name} is of an {error}") from error
    if open_vocabulary and key.startswith("model.student"):
        raise UserError(f"{key}: {name} is a {config.model_type}, which can only be a teacher")
    auto_model = AutoModelForZeroShotObjectDetection if open_vocabulary else AutoModelForObjectDetection
    auto_processor = AutoProcessor if open_vocabulary else AutoImageProcessor
    try:
        # Half-precision weights would be loaded as such, and detectors need fp32 ones and autocast.
        model, report = auto_model.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        hint = f" ({UNPICKLE})" if isinstance(error, OSError) and "safetensors" in str(error) else ""
        raise UserError(f"{key}: {name} cannot be loaded as a detector: {_line(error)}{hint}") from error
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{key}: {name} lacks {len(missing)} weights of {type(model).__name__}: {short_list(missing)}")
    try:
        processor = auto_processor.from_pretrained(name, trust_remote_code=False, **processor_options)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {name} has no {_PROCESSOR[open_vocabulary]}: save one beside the model") from error
    return get_adapter(use_fast_deformable_attention(model), processor)


def _load_config(name: str, key: str) -> PreTrainedConfig:
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise UserError(f"{key}: folder {name} does not exist")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            reason = "needs code of its own, which is never run: name a detector that Transformers has"
            raise UserError(f"{key}: {name} {reason}") from error
        reason = "holds no model" if Path(name).is_dir() else "is neither a folder nor a model that the Hub gives"
        raise UserError(f"{key}: {name} {reason}: {_line(error)}") from error


def _architecture(
    config: StudentConfig, teacher: DetectorAdapter | None, class_names: tuple[str, ...]
) -> PreTrainedConfig:
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
        base = _load_config(name, "model.student.base")
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
        raise UserError(f"model.student: {base.model_type} cannot have this configuration: {_line(error)}") from error


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
    found = _load_config(backbone, "model.student.backbone").to_dict()
    if indices is None:
        return found
    return {k: v for k, v in found.items() if k not in ("out_features", "stage_names")} | {"out_indices": indices}


def _channels(backbone_config: dict[str, Any]) -> list[int]:
    """Of the feature maps that a backbone gives."""
    try:
        with torch.device("meta"):
            return list(AutoBackbone.from_config(AutoConfig.for_model(**backbone_config)).channels)
    except (StrictDataclassError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"model.student: no backbone can be built of {backbone_config}: {_line(error)}") from error


def _new_model(architecture: PreTrainedConfig) -> nn.Module:
    try:
        return AutoModelForObjectDetection.from_config(architecture, dtype=torch.float32)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = "Transformers needs at least 2 decoder layers" if "tie_weights_keys" in str(error) else _line(error)
        raise UserError(f"model.student cannot be built: {reason}") from error


def _known_processor(config: StudentConfig, teacher: DetectorAdapter | None):
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


def _new_processor(config: StudentConfig, model_type: str, known, size: dict[str, int]):
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
            logger.warning("no image processor with %s: normalised as %s (%s)", config.backbone, other, _line(error))
    if known is not None:
        for name in ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"):
            options[name] = getattr(known, name)
    return adapter_class(model_type).processor_class(**options)


def _load_backbone_weights(student: DetectorAdapter, backbone: str, backbone_config: PreTrainedConfig) -> None:
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
        student.backbone.load_state_dict(_state(donor))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"model.student: no weights of backbone {backbone}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return textwrap.shorten(str(error), 200, placeholder=" ...")
