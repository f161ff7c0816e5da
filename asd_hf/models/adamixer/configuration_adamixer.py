# No `from __future__ import annotations`: `@strict` cannot check types that are strings, and lets everything pass.
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


@strict
class AdaMixerConfig(PreTrainedConfig):
    """What an AdaMixer is built of. The defaults are those of the paper's R50 with 100 queries.

    Args:
        backbone_config: of a timm or Transformers backbone with a feature map for each of `feature_strides`; default:
            timm's resnet50 without pretrained weights.
        num_queries: the most objects that are found in an image.
        d_model: width of a query's content, a multiple of 8.
        feature_channels: of the feature maps, a multiple of 32 and of `num_groups`.
        feature_strides: of the backbone's maps in pixels, finest first.
        num_groups: of channels; each samples at points of its own and mixes by itself.
        in_points: sampled by a group.
        out_points: of a group after mixing.
        level_temperature: by which squared distances between scales, in octaves, are divided.
        freeze_backbone_batch_norms: keep the statistics of batch norm as they are in training; scale and shift are
            trained all the same.
        mixing_chunk_size: in training, mix so many queries (of all images together) at once and compute them again in
            the backward pass, so that generated weights of no more than these are in memory. None: all at once.
        auxiliary_loss: supervise every layer, as the original does, and not the last alone.
        class_cost, bbox_cost, giou_cost: weights of the matching cost.
        class_loss_coefficient, bbox_loss_coefficient, giou_loss_coefficient: weights of the losses.
        focal_alpha: of the focal loss.
        corner_l1: the L1 cost and loss compare corners, as in the original; false: centre and size, as in DETR.
    """

    model_type = "adamixer"
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="timm_backbone",
            init_kwargs={"backbone": "resnet50", "use_pretrained_backbone": False, "out_indices": [1, 2, 3, 4]},
        )
    }
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "decoder_attention_heads",
        "num_hidden_layers": "decoder_layers",
    }

    backbone_config: dict | PreTrainedConfig | None = None
    num_queries: int = 100
    d_model: int = 256
    feature_channels: int = 256
    feature_strides: list[int] | tuple[int, ...] = (4, 8, 16, 32)
    decoder_layers: int = 6
    decoder_attention_heads: int = 8
    decoder_ffn_dim: int = 2048
    num_groups: int = 4
    in_points: int = 32
    out_points: int = 128
    level_temperature: float | int = 2.0
    freeze_backbone_batch_norms: bool = True
    mixing_chunk_size: int | None = None
    auxiliary_loss: bool = True
    class_cost: float | int = 2
    bbox_cost: float | int = 5
    giou_cost: float | int = 2
    class_loss_coefficient: float | int = 2
    bbox_loss_coefficient: float | int = 5
    giou_loss_coefficient: float | int = 2
    focal_alpha: float | int = 0.25
    corner_l1: bool = True

    def validate_architecture(self) -> None:
        """Part of the validation of `@strict`."""
        if self.d_model % 8 or self.d_model % self.decoder_attention_heads:
            raise ValueError(
                f"d_model is {self.d_model}: it must be a multiple of 8 and of decoder_attention_heads "
                f"({self.decoder_attention_heads})"
            )
        if self.feature_channels % 32 or self.feature_channels % self.num_groups:
            raise ValueError(
                f"feature_channels is {self.feature_channels}: it must be a multiple of 32 and of num_groups "
                f"({self.num_groups})"
            )


__all__ = ["AdaMixerConfig"]
