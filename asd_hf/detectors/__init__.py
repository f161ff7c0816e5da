from __future__ import annotations

from torch import nn

from ..registry import resolve
from .base import DetectorAdapter

ADAPTERS = {  # Transformers' config.model_type -> adapter
    "adamixer": "asd_hf.detectors.adamixer:AdaMixerAdapter",
    "conditional_detr": "asd_hf.detectors.conditional_detr:ConditionalDetrAdapter",
    "d_fine": "asd_hf.detectors.d_fine:DFineAdapter",
    "dab-detr": "asd_hf.detectors.dab_detr:DabDetrAdapter",
    "deformable_detr": "asd_hf.detectors.deformable_detr:DeformableDetrAdapter",
    "deimv2": "asd_hf.detectors.deimv2:Deimv2Adapter",
    "detr": "asd_hf.detectors.detr:DetrAdapter",
    "grounding-dino": "asd_hf.detectors.grounding_dino:GroundingDinoAdapter",
    "lw_detr": "asd_hf.detectors.lw_detr:LwDetrAdapter",
    "mm-grounding-dino": "asd_hf.detectors.mm_grounding_dino:MMGroundingDinoAdapter",
    "rf_detr": "asd_hf.detectors.rf_detr:RfDetrAdapter",
    "rt_detr": "asd_hf.detectors.rt_detr:RTDetrAdapter",
    "rt_detr_v2": "asd_hf.detectors.rt_detr_v2:RTDetrV2Adapter",
    "table-transformer": "asd_hf.detectors.table_transformer:TableTransformerAdapter",
    "yolos": "asd_hf.detectors.yolos:YolosAdapter",
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
