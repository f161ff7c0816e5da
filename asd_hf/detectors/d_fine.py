"""D-FINE (Peng et al., arXiv 2410.13842): RT-DETR whose layers refine a distribution over each side of a box."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn
from transformers.models.d_fine.modeling_d_fine import weighting_function

from .base import DetectorOutput
from .rt_detr_v2 import RTDetrV2Adapter


class DFineAdapter(RTDetrV2Adapter):
    """Adapter of `DFineForObjectDetection`.

    Its first prediction, of the initial head before any refinement, is no layer and not shown. Boxes are not clamped:
    they may reach beyond the image. The loss is Transformers' to the letter, also where it pairs its lists of unequal
    length (boxes with the initial head, side distributions without) from the front: the initial boxes meet the first
    layer's distributions, and the layer before the last has no auxiliary loss.

    `sides` are logits over distances of each side from that of a box which all layers share, the initial head's
    (section 4.1 of the paper): `side_frames`. Each layer adds to the logits of the one before; the output shows the
    sums, of which the layer's boxes are computed.
    """

    derived_values = ("head_dim",)
    loss_names = ("loss_vfl", "loss_bbox", "loss_giou", "loss_fgl", "loss_ddf")
    decoder_loss_names = ("loss_fgl", "loss_ddf")

    def __init__(self, model: nn.Module, processor) -> None:
        super().__init__(model, processor)
        decoder = model.model.decoder
        distances = weighting_function(decoder.max_num_bins, decoder.up.float(), decoder.reg_scale.float())
        values = tuple((distances / decoder.reg_scale.float().abs()).tolist())
        self.spec = replace(self.spec, capabilities=self.spec.capabilities | {"sides"}, side_values=values)

    def _read(self, decoded, noised: int) -> DetectorOutput:
        sides = decoded.intermediate_predicted_corners[:, :, noised:].transpose(0, 1)
        return DetectorOutput(
            decoded.intermediate_logits[:, 1:, noised:].transpose(0, 1),
            decoded.intermediate_reference_points[:, 1:, noised:].transpose(0, 1),
            decoded.intermediate_hidden_states[:, :, noised:].to(self.model.dtype),
            sides=sides.unflatten(-1, (4, -1)),
            side_frames=decoded.intermediate_reference_points[:, 0, noised:].detach(),
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
