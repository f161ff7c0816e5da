"""RT-DETRv2 (Lv et al., arXiv 2407.17140): RT-DETR with other sampling in its attention."""

from __future__ import annotations

from torch import nn

from .rt_detr import RTDetrAdapter


class RTDetrV2Adapter(RTDetrAdapter):
    """Adapter of `RTDetrV2ForObjectDetection`."""

    @property
    def layer_lists(self) -> dict[str, int]:
        heads = dict.fromkeys(("class_embed", "bbox_embed"), self.model.config.decoder_layers)
        return super().layer_lists | heads

    @property
    def class_heads(self) -> list[nn.Linear | nn.Embedding]:
        return [*self.model.class_embed, *super().class_heads]  # the model's are the decoder's
