"""Detectors by name: a Hub id, a folder, or one that ships with the package."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
    PreTrainedConfig,
)

from .classes import rename_classes, short_list
from .deformable_attention import use_fast_deformable_attention
from .detectors import adapter_class, get_adapter
from .detectors.base import DetectorAdapter
from .errors import UserError

SELF_TAUGHT = "ema"  # as model.teacher: the student's own moving average
# Teachers that ship with the package, by the name of the data set they know.
PACKAGED = {"shapes": Path(__file__).parent / "assets" / "shapes_teacher"}

UNPICKLE = (
    "pickled weights, as in pytorch_model.bin, are never read: where you trust them, convert them by "
    "AutoModelForObjectDetection.from_pretrained(...).save_pretrained(...)"
)
_PROCESSOR = {False: "image processor", True: "processor with a tokenizer"}


def load_teacher(name: str, key: str = "model.teacher") -> DetectorAdapter:
    """A frozen detector in eval mode, of a Hub id, a folder or a key of `PACKAGED`.

    Args:
        key: where the name stands, for the message.

    Raises:
        UserError: no such model, or it is no detector of a known family, lacks weights or a processor.
    """
    teacher = load_detector(str(PACKAGED.get(name, name)), key)
    teacher.model.requires_grad_(False).eval()
    return teacher


def prompt_teacher(
    teacher: DetectorAdapter, class_names: Sequence[str], class_map: Mapping[str, str] | None = None
) -> None:
    """Tells a teacher of open vocabulary to look for `class_names`, by the names that `class_map` has for it."""
    if teacher.open_vocabulary:
        teacher.prompt(rename_classes(class_names, class_map))


def load_detector(name: str, key: str, **processor_options) -> DetectorAdapter:
    """A detector as it is saved, in fp32, with its image processor; see `load_teacher`."""
    config = load_config(name, key)
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
        raise UserError(f"{key}: {name} cannot be loaded as a detector: {brief(error)}{hint}") from error
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{key}: {name} lacks {len(missing)} weights of {type(model).__name__}: {short_list(missing)}")
    try:
        processor = auto_processor.from_pretrained(name, trust_remote_code=False, **processor_options)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {name} has no {_PROCESSOR[open_vocabulary]}: save one beside the model") from error
    return get_adapter(use_fast_deformable_attention(model), processor)


def load_config(name: str, key: str) -> PreTrainedConfig:
    """The configuration of a model, of whose code none is run."""
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise UserError(f"{key}: folder {name} does not exist")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            reason = "needs code of its own, which is never run: name a detector that Transformers has"
            raise UserError(f"{key}: {name} {reason}") from error
        reason = "holds no model" if Path(name).is_dir() else "is neither a folder nor a model that the Hub gives"
        raise UserError(f"{key}: {name} {reason}: {brief(error)}") from error


def brief(error: Exception) -> str:
    """Its message, cut to a line."""
    return textwrap.shorten(str(error), 200, placeholder=" ...")
