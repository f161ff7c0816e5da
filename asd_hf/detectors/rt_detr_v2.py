"""RT-DETRv2 (Lv et al., arXiv 2407.17140): RT-DETR with other sampling in its attention."""

from __future__ import annotations

import torch
from torch import nn

from .attention import Look, sampled_look
from .rt_detr import RTDetrAdapter


class RTDetrV2Adapter(RTDetrAdapter):
    """Adapter of `RTDetrV2ForObjectDetection`."""

    def attention_modules(self, layer: nn.Module) -> dict[str, nn.Module]:
        reader = layer.encoder_attn
        return {"queries": layer.self_attn, "image": reader, "offsets": reader.sampling_offsets}

    def read_look(self, taps: list[dict[str, tuple]], sizes: list[torch.Size], shown: slice) -> Look:
        config, levels = self.model.config, len(sizes)
        counts = config.decoder_n_points
        counts = counts if isinstance(counts, list) else [counts] * levels
        points, weights = [], []
        for tap in taps:
            attention = tap["image"][2][1][:, shown]  # (B, Q, heads, N): N points, all of one level, then the next
            offsets = tap["offsets"][2][:, shown].unflatten(-1, (*attention.shape[2:], 2))
            centres, sides = tap["image"][1]["reference_points"][:, shown, None].split(2, -1)  # (B, Q, 1, 1, 2)
            # An offset counts in sides of the reference box, divided by how many points its level has.
            offsets = torch.cat([o / n for o, n in zip(offsets.split(counts, 3), counts, strict=True)], 3)
            points.append(centres + offsets * sides * config.decoder_offset_scale)
            weights.append(attention)
        points, weights = torch.stack(points).split(counts, 4), torch.stack(weights).split(counts, 4)
        return sampled_look(points, weights, sizes, nearest=config.decoder_method == "discrete")

    @property
    def layer_lists(self) -> dict[str, int]:
        heads = dict.fromkeys(("class_embed", "bbox_embed"), self.model.config.decoder_layers)
        return super().layer_lists | heads

    @property
    def class_heads(self) -> list[nn.Linear | nn.Embedding]:
        return [*self.model.class_embed, *super().class_heads]  # the model's are the decoder's
