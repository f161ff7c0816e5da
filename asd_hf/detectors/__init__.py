from __future__ import annotations

from torch import nn

from ..registry import resolve
from .base import DetectorAdapter

ADAPTERS = {  # Transformers' config.model_type -> adapter
    "deformable_detr": "asd_hf.detectors.deformable_detr:DeformableDetrAdapter",
}


def adapter_class(model_type: str) -> type[DetectorAdapter]:
    """The adapter of a family.

    Raises:
        UserError: no adapter knows `model_type`.
    """
    return resolve(model_type, ADAPTERS, "detector family")


def get_adapter(model: nn.Module, processor) -> DetectorAdapter:
    """Wraps a Transformers `...ForObjectDetection` and its image processor.

    Raises:
        UserError: no adapter knows the model's family.
    """
    return adapter_class(model.config.model_type)(model, processor)
