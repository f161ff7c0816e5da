"""D-FINE (Peng et al., arXiv 2410.13842): RT-DETR whose layers refine a distribution over each side of a box."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .base import DetectorOutput
from .rt_detr_v2 import RTDetrV2Adapter


class DFineAdapter(RTDetrV2Adapter):
    """Adapter of `DFineForObjectDetection`.

    Its first prediction, of the initial head before any refinement, is no layer and not shown. Boxes are not clamped:
    they may reach beyond the image. The loss is Transformers' to the letter, also where it pairs its lists of unequal
    length (boxes with the initial head, side distributions without) from the front: the initial boxes meet the first
    layer's distributions, and the layer before the last has no auxiliary loss.
    """

    derived_values = ("head_dim",)
    loss_names = ("loss_vfl", "loss_bbox", "loss_giou", "loss_fgl", "loss_ddf")
    decoder_loss_names = ("loss_fgl", "loss_ddf")

    def _read(self, decoded, noised: int) -> DetectorOutput:
        # The side distributions (B, L, Q, 4 * bins) would be `decoded.intermediate_predicted_corners[:, :, noised:]`.
        return DetectorOutput(
            decoded.intermediate_logits[:, 1:, noised:].transpose(0, 1),
            decoded.intermediate_reference_points[:, 1:, noised:].transpose(0, 1),
            decoded.intermediate_hidden_states[:, :, noised:].to(self.model.dtype),
        )

    @contextmanager
    def _asking(self) -> Iterator[None]:
        decoder = self.model.model.decoder
        training, decoder.training = decoder.training, True  # its own flag alone: in evaluation it gives one layer
        try:
            with super()._asking():
                yield
        finally:
            decoder.training = training

    def _precise_modules(self) -> list[nn.Module]:
        decoder = self.model.model.decoder
        quality = [layer.reg_conf for layer in decoder.lqe_layers]
        return [*super()._precise_modules(), decoder.pre_bbox_head, decoder.integral, *quality]

    @property
    def layer_lists(self) -> dict[str, int]:
        return super().layer_lists | {"model.decoder.lqe_layers": self.model.config.decoder_layers}

    @property
    def box_heads(self) -> list[nn.Module]:
        decoder = self.model.model.decoder
        return [*super().box_heads, decoder.pre_bbox_head, *(layer.reg_conf for layer in decoder.lqe_layers)]
