"""DEIMv2 (Huang et al., arXiv 2509.20787): D-FINE with other losses, on HGNetV2 or DINOv3."""

from __future__ import annotations

from torch import nn

from .d_fine import DFineAdapter


class Deimv2Adapter(DFineAdapter):
    """Adapter of `Deimv2ForObjectDetection`."""

    frozen_stages = -1
    loss_names = ("loss_mal", "loss_bbox", "loss_giou", "loss_fgl", "loss_ddf")

    def __init__(self, model: nn.Module, processor) -> None:
        self.dinov3 = model.config.backbone_config.model_type == "dinov3_vit"
        self.backbone_path = "model.conv_encoder.backbone" if self.dinov3 else "model.conv_encoder.model"
        super().__init__(model, processor)

    def _measure_neck(self) -> tuple[int, ...]:
        if self.dinov3:  # all maps of the ViT have one size: they are resized to those of a convolutional stem
            return 8, 16, 32
        strides = self.backbone_strides()
        if self.model.config.encoder_type == "lite":  # two maps, of which it makes the missing ones
            return (*strides, 2 * strides[-1])[:2]
        return strides
