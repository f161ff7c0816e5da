"""Conditional DETR (Meng et al., arXiv 2108.06152)."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

from torch import Tensor, nn
from transformers import ConditionalDetrImageProcessor
from transformers.models.conditional_detr.modeling_conditional_detr import inverse_sigmoid

from .detr import DetrAdapter


class ConditionalDetrAdapter(DetrAdapter):
    """Adapter of `ConditionalDetrForObjectDetection`.

    Every box starts from a reference point of the valid image, which the decoder derives from the query's position
    embedding: `decode` takes none.
    """

    processor_class = ConditionalDetrImageProcessor
    class_loss_weight = 2.0
    activation = "sigmoid"

    def _place(self, offsets: Tensor, decoded) -> Tensor:
        points = decoded.reference_points.transpose(0, 1).to(offsets.dtype)  # (B, Q, 2), the same for every layer
        return super()._place(offsets + nn.functional.pad(inverse_sigmoid(points), (0, 2)), decoded)

    def _precise(self) -> AbstractContextManager:
        return self.outside_autocast([self.model.model.decoder.ref_point_head])

    def reset_heads(self, prior: float = 0.01) -> None:
        """Gives fresh heads the original initial values: each class at probability `prior`, each box at its reference,
        with sides of half the image where that is a point."""
        super().reset_heads(prior)
        nn.init.constant_(self.class_head.bias, -math.log((1 - prior) / prior))
        nn.init.zeros_(self.model.bbox_predictor.layers[-1].weight)
        nn.init.zeros_(self.model.bbox_predictor.layers[-1].bias)
