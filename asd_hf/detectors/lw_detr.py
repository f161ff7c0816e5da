"""LW-DETR (Chen et al., arXiv 2406.03458): a windowed ViT, proposals of two stages, groups of queries in training."""

from __future__ import annotations

import math
from copy import copy

import torch
from torch import Tensor, nn
from transformers import DeformableDetrImageProcessor
from transformers.models.lw_detr.modeling_lw_detr import refine_bboxes

from .base import DetectorAdapter, DetectorOutput, DetectorSpec, class_names_of, pixel_statistics, sum_over_ranks


class LwDetrAdapter(DetectorAdapter):
    """Adapter of `LwDetrForObjectDetection`.

    In training mode the model answers for all its groups of queries; the output shows the first one, which is the one
    of evaluation, and the loss takes all. The loss of eval mode is that of the first group.
    """

    processor_class = DeformableDetrImageProcessor
    backbone_path = "model.backbone.backbone"
    backbone_type = "lw_detr_vit"
    config_names = {"decoder_layers": ("decoder_layers",), "num_queries": ("num_queries",), "d_model": ("d_model",)}
    default_values = {"projector_scale_factors": [1.0]}
    derived_values = ("num_feature_levels", "projector_in_channels", "projector_out_channels")
    frozen_stages = -1  # the original trains all of its ViT
    own_loss = True
    two_stage = True

    def __init__(self, model: nn.Module, processor) -> None:
        super().__init__(model, processor)
        config = model.config
        self.spec = DetectorSpec(
            family=config.model_type,
            hidden_size=config.d_model,
            class_names=class_names_of(config),
            num_layers=config.decoder_layers,
            num_queries=config.num_queries,
            strides=tuple(round(config.backbone_config.patch_size / scale) for scale in self.scales),
            **pixel_statistics(processor),
            activation="sigmoid",
            capabilities=frozenset({"decode", "features", "attention"}),
            reference_size=4,
        )

    @property
    def scales(self) -> tuple[float, ...]:
        """Sizes of the feature maps as multiples of the ViT's."""
        return tuple(self.model.config.projector_scale_factors)

    @property
    def size_divisor(self) -> int:
        vit = self.model.config.backbone_config
        return math.lcm(vit.patch_size * vit.num_windows_side, *self.spec.strides)

    def forward(self, pixels: Tensor, mask: Tensor, labels: list[dict] | None) -> DetectorOutput:
        core, config = self.model.model, self.model.config
        mask, scale = self._whole_cells(mask)
        if labels is not None:
            labels = [label | {"boxes": label["boxes"] / s} for label, s in zip(labels, scale, strict=True)]
        precise = [*core.enc_out_class_embed, *core.enc_out_bbox_embed]
        # The proposals are computed in the precision of the feature maps, which in bf16 has steps of 1/256.
        precise += [m for name, m in core.backbone.projector.named_modules() if name.endswith("layer_norm")]
        with (
            self.tap({"features": core.backbone.projector, "decoder": core.decoder}) as seen,
            self.outside_autocast(precise),
            self.attending() as attention,
        ):
            # The core and not the whole model: that would run the heads a second time, and in autocast.
            out = core(pixel_values=pixels, pixel_mask=mask)
        _, context, _ = seen["decoder"]
        features = seen["features"][2]
        features = features if isinstance(features, list) else [features]
        first = slice(config.num_queries)

        def decode(queries: Tensor, positions: None, references: Tensor) -> DetectorOutput:
            """Puts other questions to the encoded images.

            Args:
                queries: contents (B, Q, D). `decode.own` is the triple that the model asked by itself.
                positions: None, the decoder derives them from the references.
                references: (B, Q, 4) boxes in [0, 1] of the valid image.
            """
            groups, config.group_detr = config.group_detr, 1  # in training mode attention is split into groups
            try:
                with self.attending() as attention:
                    decoded = core.decoder(**(context | {"inputs_embeds": queries, "reference_points": references}))
            finally:
                config.group_detr = groups
            hidden = decoded.intermediate_hidden_states.to(self.model.dtype)
            output = DetectorOutput(*self._predict(hidden, references), hidden, decode=decode)
            output.attention = attention(features, slice(None))
            return output

        decode.own = context["inputs_embeds"][:, first], None, context["reference_points"][:, first]
        hidden = out.intermediate_hidden_states.to(self.model.dtype)
        logits, boxes = self._predict(hidden, out.init_reference_points)
        output = DetectorOutput(logits[:, :, first], boxes[:, :, first], hidden[:, :, first], decode=decode)
        output.features, output.attention = features, attention(features, first)
        if labels is not None:
            with torch.autocast(pixels.device.type, enabled=False):
                output.losses = self._losses(out, logits, boxes, labels)
        return output.map_boxes(scale)

    def attention_modules(self, layer: nn.Module) -> dict[str, nn.Module]:
        return {"queries": layer.self_attn, "image": layer.cross_attn.attn}

    def _whole_cells(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """`mask` with its sides rounded up to the coarsest stride, and how much larger they are, (B, 1, 4).

        The model counts the valid cells of each feature map and has its boxes relative to so many: with sides in
        between, to a larger image than the valid one, and to another one in each map.
        """
        stride, (height, width) = max(self.spec.strides), mask.shape[1:]
        valid = torch.stack([mask[:, 0].sum(1), mask[:, :, 0].sum(1)], 1)  # width, height
        whole = (valid + stride - 1).div(stride, rounding_mode="floor") * stride
        columns = torch.arange(width, device=mask.device) < whole[:, :1]
        rows = torch.arange(height, device=mask.device) < whole[:, 1:]
        return rows[:, :, None] & columns[:, None], (whole / valid).repeat(1, 2)[:, None]

    def _predict(self, hidden: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (L, B, Q, C) and boxes (L, B, Q, 4) of hidden states (L, B, Q, D); no layer moves the references."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.model.class_embed(hidden), refine_bboxes(references[None], self.model.bbox_embed(hidden))

    def _losses(self, out, logits: Tensor, boxes: Tensor, labels: list[dict]) -> dict[str, Tensor]:
        config = copy(self.model.config)
        config.auxiliary_loss = True
        # Transformers matches `group_detr` groups even in eval mode, where the model answers for one.
        config.group_detr = boxes.shape[2] // config.num_queries
        heads = self.model.model.enc_out_class_embed
        states = out.enc_outputs_class.to(self.model.dtype).split(config.num_queries, dim=1)
        proposals = torch.cat([head(state) for head, state in zip(heads, states, strict=False)], 1)
        labelled = [i for i, label in enumerate(labels) if self.fast_loss or label.get("labelled", True)]
        # Every rank must ask for the loss, which counts boxes over ranks: without labels it is multiplied by 0.
        rows, corners = labelled or [0], out.enc_outputs_coord_logits
        if len(rows) < len(labels):
            logits, boxes, proposals, corners = logits[:, rows], boxes[:, rows], proposals[rows], corners[rows]
        _, parts, _ = self.model.loss_function(
            logits[-1],
            [labels[i] for i in rows],
            logits.device,
            boxes[-1],
            config,
            logits,
            boxes,
            proposals,
            corners,
        )
        share = 1
        if not self.fast_loss:
            # Transformers raises the mean number of boxes of a rank to 1, and not that of all: with fewer boxes than
            # ranks W ranks would not train as one with all their images.
            own = sum(len(labels[i]["class_labels"]) for i in rows) * config.group_detr
            total, num_ranks = sum_over_ranks(logits.new_full((), own))
            share = (total / num_ranks).clamp(min=1) / (total.clamp(min=1) / num_ranks)
        losses = {}
        for name, weight in (
            ("loss_ce", config.class_loss_coefficient),
            ("loss_bbox", config.bbox_loss_coefficient),
            ("loss_giou", config.giou_loss_coefficient),
        ):
            weight = weight * bool(labelled) * share
            layers = [f"_{i}" for i in range(len(logits) - 1)]
            losses[name] = weight * sum(parts[name + layer] for layer in ("", *layers))
            losses[f"{name}_enc"] = weight * parts[f"{name}_enc"]
        return losses

    @property
    def layer_lists(self) -> dict[str, int]:
        return {"model.decoder.layers": self.model.config.decoder_layers}

    @property
    def class_heads(self) -> list[nn.Linear]:
        return [self.model.class_embed, *self.model.model.enc_out_class_embed]

    def reset_transformer(self) -> None:
        """Gives a fresh transformer and its queries the original initial values, where Transformers has N(0, 0.02)."""
        core = self.model.model
        for module in (core.decoder, core.enc_output):
            for name, parameter in module.named_parameters():
                # Sampling offsets and attention weights start at values of their own, the same in Transformers.
                if parameter.dim() > 1 and not any(n in name for n in ("sampling_offsets", "attention_weights")):
                    nn.init.xavier_uniform_(parameter)
        nn.init.normal_(core.query_feat.weight)
        nn.init.zeros_(core.reference_point_embed.weight)
