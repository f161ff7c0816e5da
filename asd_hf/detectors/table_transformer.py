"""Table Transformer (Smock et al., arXiv 2110.00061): DETR whose layers normalise first."""

from __future__ import annotations

from torch import Tensor

from .detr import DetrAdapter


class TableTransformerAdapter(DetrAdapter):
    """Adapter of `TableTransformerForObjectDetection`."""

    backbone_path = "model.backbone.conv_encoder.model"
    question = ("inputs_embeds", "query_position_embeddings")

    def _hidden(self, decoded, states: list[tuple[Tensor]]) -> Tensor:
        return super()._hidden(decoded, [state for (state,) in states])
