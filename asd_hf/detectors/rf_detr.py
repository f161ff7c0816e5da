"""RF-DETR (Robinson et al., arXiv 2511.09554): LW-DETR with a windowed DINOv2."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import RfDetrImageProcessor

from .lw_detr import LwDetrAdapter


class RfDetrAdapter(LwDetrAdapter):
    """Adapter of `RfDetrForObjectDetection`.

    Images are padded to squares: Transformers' windows are sound for squares only. Of other images it puts the patches
    of the feature map in a wrong order, as the original does.
    """

    processor_class = RfDetrImageProcessor
    backbone_type = "rf_detr_dinov2"
    default_values = {}
    derived_values = ()

    @property
    def scales(self) -> tuple[float, ...]:
        return (1.0,)

    @property
    def size_divisor(self) -> int:
        vit = self.model.config.backbone_config
        return vit.patch_size * vit.num_windows

    def prepare(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        pixels, mask = super().prepare(pixel_values, pixel_mask)
        height, width = mask.shape[1:]
        if self.model.config.backbone_config.num_windows == 1 or height == width:
            return pixels, mask
        side = max(height, width)
        missing = (0, side - width, 0, side - height)
        return nn.functional.pad(pixels, missing), nn.functional.pad(mask, missing)
