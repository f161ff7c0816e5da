"""DAB-DETR (Liu et al., arXiv 2201.12329): queries are boxes, refined from layer to layer."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers.models.dab_detr.modeling_dab_detr import inverse_sigmoid

from .conditional_detr import ConditionalDetrAdapter


class DabDetrAdapter(ConditionalDetrAdapter):
    """Adapter of `DabDetrForObjectDetection`.

    A question to `decode` is contents and reference boxes; position embeddings follow from the boxes in every layer.
    """

    backbone_path = "model.backbone.conv_encoder.model"
    config_names = ConditionalDetrAdapter.config_names | {"d_model": ("hidden_size",)}
    class_loss_weight = 1.0
    asks_positions = False
    reference_size = 4
    auxiliary_loss = True  # a mere loss here: all layers are there without it

    @property
    def backbone(self) -> nn.Module:
        """The backbone itself: unlike its kin, this family keeps Transformers' wrapper around timm's."""
        backbone = super().backbone
        return backbone._backbone if self.model.config.backbone_config.model_type == "timm_backbone" else backbone

    @property
    def num_queries(self) -> int:
        """Each pattern asks at every anchor."""
        config = self.model.config
        return config.num_queries * max(config.num_patterns, 1)

    def _ask(self, queries: Tensor, positions: None, references: Tensor) -> dict[str, Tensor]:
        return {"inputs_embeds": queries, "query_position_embeddings": inverse_sigmoid(references)}

    def _asked(self, context: dict[str, Tensor]) -> tuple[Tensor, None, Tensor]:
        return context["inputs_embeds"], None, context["query_position_embeddings"].sigmoid()

    def attention_modules(self, layer: nn.Module) -> dict[str, nn.Module]:
        return {"queries": layer.self_attn.self_attn, "image": layer.cross_attn.cross_attn}

    def _hidden(self, decoded, states: list[tuple[Tensor]]) -> Tensor:
        return decoded.intermediate_hidden_states

    def _place(self, offsets: Tensor, decoded) -> Tensor:
        # All layers at once, as this model does.
        return (offsets + inverse_sigmoid(decoded.reference_points.to(offsets.dtype))).sigmoid()  # (L, B, Q, 4)

    def _precise(self) -> AbstractContextManager:
        return self.outside_autocast([self.model.model.decoder.bbox_embed])

    @property
    def class_head(self) -> nn.Linear:
        return self.model.class_embed

    @property
    def query_embeddings(self) -> list[nn.Embedding]:
        core = self.model.model
        return [core.query_refpoint_embeddings, *([core.patterns] if self.model.config.num_patterns else [])]

    def reset_transformer(self) -> None:
        super().reset_transformer()
        if self.model.config.random_refpoints_xy:
            with torch.no_grad():
                centres = self.model.model.query_refpoint_embeddings.weight[:, :2]
                centres.copy_(inverse_sigmoid(torch.rand_like(centres)))
