"""AdaMixer (Gao et al., CVPR 2022, arXiv 2203.16507): no encoder; every query samples the feature maps at points of
its own and mixes what it found with weights that it generates.

Letters in the shapes of this file: B images, Q queries, D width of contents, C channels of the feature maps, of which
a group has c = C / G, S cells of all feature maps together, L levels, H heads, P sampled and O mixed points.

A query is a content (B, Q, D) and a position (x, y, z, r) in pixels of the valid image: the centre of its box, the
binary logarithm of the root of its area, and that of its height over its width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import load_backbone
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from ...ops import full
from .configuration_adamixer import AdaMixerConfig

SINE_TEMPERATURE = 10_000
SINE_UNIT = 1000  # pixels; only x and y are pixels
LEAST_SIDE = 1e-3  # pixels, of a box that becomes a position


@dataclass
class AdaMixerModelOutput(ModelOutput):
    """Predictions of all layers but the classes.

    Args:
        last_hidden_state: contents (B, Q, D) of the last layer.
        intermediate_hidden_states: contents (B, layers, Q, D).
        intermediate_positions: (B, layers, Q, 4) as x, y, z, r.
        intermediate_boxes: (B, layers, Q, 4) as cx, cy, w, h in [0, 1] of the valid image.
        hidden_states: with `output_hidden_states=True`, the contents (B, Q, D) before the first and after each layer.
        attentions: with `output_attentions=True` and eager attention, the weights (B, H, Q, Q) of each layer.
    """

    last_hidden_state: Tensor | None = None
    intermediate_hidden_states: Tensor | None = None
    intermediate_positions: Tensor | None = None
    intermediate_boxes: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class AdaMixerObjectDetectionOutput(ModelOutput):
    """Predictions, and the loss where labels were given.

    Args:
        loss: the sum of `loss_dict`.
        loss_dict: `loss_ce`, `loss_bbox` and `loss_giou`, weighted, summed over layers.
        logits: (B, Q, classes) of the last layer, for sigmoid; there is no "no object".
        pred_boxes: (B, Q, 4) of the last layer as cx, cy, w, h in [0, 1] of the valid image.
        auxiliary_outputs: with labels, `logits` and `pred_boxes` of each earlier layer.
        last_hidden_state, intermediate_hidden_states, intermediate_boxes, hidden_states, attentions: see
            `AdaMixerModelOutput`.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    auxiliary_outputs: list[dict[str, Tensor]] | None = None
    last_hidden_state: Tensor | None = None
    intermediate_hidden_states: Tensor | None = None
    intermediate_boxes: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def position_sides(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Width and height (..., 2) in pixels, and the scale (..., 1) in pixels, of positions (..., 4)."""
    z, r = positions[..., 2:3], positions[..., 3:4]
    return torch.cat([torch.exp2(z - r / 2), torch.exp2(z + r / 2)], -1), torch.exp2(z)


def positions_to_boxes(positions: Tensor) -> Tensor:
    """cx, cy, w, h in pixels of positions (..., 4)."""
    return torch.cat([positions[..., :2], position_sides(positions)[0]], -1)


def boxes_to_positions(boxes: Tensor) -> Tensor:
    """Positions of boxes (..., 4) as cx, cy, w, h in pixels; no side is shorter than `LEAST_SIDE`."""
    width, height = boxes[..., 2:].clamp(min=LEAST_SIDE).log2().split(1, -1)
    return torch.cat([boxes[..., :2], (width + height) / 2, height - width], -1)


def refine_positions(positions: Tensor, offsets: Tensor) -> Tensor:
    """Positions moved by `offsets` (..., 4), the centre in units of the scale along both axes."""
    scale = position_sides(positions)[1]
    return torch.cat([positions[..., :2] + offsets[..., :2] * scale, positions[..., 2:] + offsets[..., 2:]], -1)


def intersection_over_first(positions: Tensor) -> Tensor:
    """(B, Q, Q): the share of each query's box (rows) that lies in each other's (columns)."""
    sides = position_sides(positions)[0]
    low, high = positions[..., :2] - sides / 2, positions[..., :2] + sides / 2
    overlap = torch.minimum(high[:, :, None], high[:, None]) - torch.maximum(low[:, :, None], low[:, None])
    return overlap.clamp(min=0).prod(-1) / sides.prod(-1).clamp(min=1e-6)[..., None]


def position_embedding(positions: Tensor, width: int) -> Tensor:
    """Sines and cosines in turn (..., width) of positions (..., 4), a quarter of them for each coordinate."""
    steps = torch.arange(width // 8, device=positions.device, dtype=torch.float32)
    periods = SINE_TEMPERATURE ** (steps / (width // 8))
    coordinates = torch.cat([positions[..., :2] / SINE_UNIT, positions[..., 2:]], -1)
    angles = coordinates[..., None] / periods
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-3)


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **kwargs
) -> tuple[Tensor, Tensor]:
    weights = ((query * scaling) @ key.transpose(-1, -2) + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class AdaMixerSelfAttention(nn.Module):
    """Attention among queries, drawn towards boxes that hold the query's own."""

    is_causal = False

    def __init__(self, config: AdaMixerConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.decoder_attention_heads
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)
        self.iof_scale = nn.Parameter(torch.empty(self.num_heads))

    def forward(self, hidden_states: Tensor, overlap: Tensor, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Args: hidden_states: (B, Q, D). overlap: (B, Q, Q), see `intersection_over_first`."""
        query, key, value = (
            proj(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        # fp32 up to here: the logarithm of 1e-7 is the answer to two boxes that do not meet.
        bias = full(self.iof_scale)[:, None, None] * (overlap + 1e-7).log()[:, None]
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        mixed, weights = attend(
            self, query, key, value, bias.to(query.dtype), scaling=query.shape[-1] ** -0.5, dropout=0.0, **kwargs
        )
        return self.out_proj(mixed.flatten(2)), weights


class AdaMixerSampling(nn.Module):
    """Reads the feature maps at points in and around the box of each query, and at scales around its own."""

    def __init__(self, config: AdaMixerConfig) -> None:
        super().__init__()
        self.num_groups, self.temperature = config.num_groups, config.level_temperature
        self.offset_proj = nn.Linear(config.d_model, config.num_groups * config.in_points * 3)

    def forward(
        self, hidden_states: Tensor, positions: Tensor, cells: Tensor, levels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reads all points of all levels in one go.

        Args:
            hidden_states: (B, Q, D).
            positions: (B, Q, 4).
            cells: (B, G, S, c), the cells of all feature maps one after another, finest first, row by row.
            levels: (L, 3) int64, the stride, width and height of each map.

        Returns:
            What was read, (B, Q, G, P, c); where, (B, Q, G, P, 3) as x, y in pixels and z; and the weight of each
            level there, (B, Q, G, P, L).
        """
        offsets = full(self.offset_proj(hidden_states)).unflatten(-1, (self.num_groups, -1, 3))
        sides = position_sides(positions)[0][:, :, None, None]
        centre, scale = positions[:, :, None, None, :2], positions[:, :, None, None, 2:3]
        points = torch.cat([centre + offsets[..., :2] * sides, scale + offsets[..., 2:]], -1)
        octaves = levels[:, 0].to(points.dtype).log2()
        shares = (-((points[..., 2:] - octaves) ** 2) / self.temperature).softmax(-1)
        index, weight = self._corners(points[..., :2], levels)
        weight = weight * shares[..., None]
        num_images, num_groups, num_cells, width = cells.shape
        first = torch.arange(num_images * num_groups, device=cells.device).view(num_images, 1, num_groups, 1, 1, 1)
        index = index + first * num_cells
        sampled = _bag_sums(
            cells.reshape(-1, width), index.flatten(4).flatten(0, 3), weight.flatten(4).flatten(0, 3).to(cells.dtype)
        )
        return sampled.view(*points.shape[:-1], width), points, shares

    @staticmethod
    def _corners(points: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Cells around points (..., 2) on each level and their bilinear weights, both (..., L, 4).

        Cells are counted over all levels; a corner beyond the map has the weight 0.
        """
        extent = levels[:, 1:, None]
        place = points[..., None, :] / levels[:, :1] - 0.5  # the centre of a cell is half a cell from its corner
        corner = place.detach().floor()
        share = place - corner
        steps = corner.long()[..., None] + torch.arange(2, device=points.device)  # (..., L, x or y, 2)
        inside = (steps >= 0) & (steps < extent)
        shares = torch.stack([1 - share, share], -1) * inside
        x, y = torch.minimum(steps.clamp(min=0), extent - 1).unbind(-2)
        counts = extent.prod(1)
        starts = counts.cumsum(0) - counts
        index = starts[..., None] + y[..., :, None] * extent[:, 0, None] + x[..., None, :]
        weight = shares[..., 1, :, None] * shares[..., 0, None, :]
        return index.flatten(-2), weight.flatten(-2)


def _bag_sums(rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums (N, c) of the `rows` (., c) of each bag; `index` and `weight` are (N, 4 L)."""
    if torch.compiler.is_exporting():  # ONNX has no bags: they would become a loop over points
        return (weight[:, None] @ rows[index]).squeeze(1)
    # Without ever gathering the rows.
    return F.embedding_bag(index, rows, per_sample_weights=weight, mode="sum")


class AdaMixerMixing(nn.Module):
    """Mixes the channels, then the points, of what a query sampled, with matrices generated of its content."""

    def __init__(self, config: AdaMixerConfig) -> None:
        super().__init__()
        self.num_groups, self.out_points = config.num_groups, config.out_points
        self.chunk_size = config.mixing_chunk_size
        self.group_channels = config.feature_channels // config.num_groups
        generated = self.group_channels**2 + config.in_points * config.out_points
        self.parameter_proj = nn.Linear(config.d_model, config.num_groups * generated)
        self.out_proj = nn.Linear(config.num_groups * config.out_points * self.group_channels, config.d_model)

    def forward(self, hidden_states: Tensor, sampled: Tensor) -> Tensor:
        """(B, Q, D) of contents (B, Q, D) and samples (B, Q, G, P, c)."""
        if self.chunk_size is None or not (self.training and torch.is_grad_enabled()):
            return self._mix(hidden_states, sampled)
        queries = zip(
            hidden_states.flatten(0, 1).split(self.chunk_size),
            sampled.flatten(0, 1).split(self.chunk_size),
            strict=True,
        )
        mixed = [checkpoint(self._mix, *part, use_reentrant=False) for part in queries]
        return torch.cat(mixed).view_as(hidden_states)

    def _mix(self, hidden_states: Tensor, sampled: Tensor) -> Tensor:
        parameters = self.parameter_proj(hidden_states).unflatten(-1, (self.num_groups, -1))
        channels, points = parameters.tensor_split([self.group_channels**2], -1)
        mixed = _norm_relu(sampled.to(channels.dtype) @ channels.unflatten(-1, (self.group_channels, -1)))
        mixed = _norm_relu(points.unflatten(-1, (self.out_points, -1)) @ mixed)
        return self.out_proj(mixed.flatten(-3))


def _norm_relu(x: Tensor) -> Tensor:
    """Over points and channels jointly."""
    return F.layer_norm(x, x.shape[-2:]).relu()


class AdaMixerHead(nn.Module):
    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.layer_norm = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, outputs)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.out_proj(self.layer_norm(self.dense(hidden_states)).relu())


class AdaMixerDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: AdaMixerConfig) -> None:
        super().__init__()
        self.self_attn = AdaMixerSelfAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.sampling = AdaMixerSampling(config)
        self.mixing = AdaMixerMixing(config)
        self.mixing_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.decoder_ffn_dim)
        self.fc2 = nn.Linear(config.decoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.box_head = AdaMixerHead(config.d_model, 4)

    def forward(
        self, hidden_states: Tensor, positions: Tensor, cells: Tensor, levels: Tensor, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """New contents and positions."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            overlap = intersection_over_first(positions)
            embedding = position_embedding(positions, hidden_states.shape[-1]).to(hidden_states.dtype)
        # The embedding joins the values and the residual too: a slip of the original, which all its results have.
        hidden_states = hidden_states + embedding
        hidden_states = self.self_attn_layer_norm(hidden_states + self.self_attn(hidden_states, overlap, **kwargs)[0])
        sampled = self.sampling(hidden_states, positions, cells, levels)[0]
        hidden_states = self.mixing_layer_norm(hidden_states + self.mixing(hidden_states, sampled))
        hidden_states = self.final_layer_norm(hidden_states + self.fc2(self.fc1(hidden_states).relu()))
        return hidden_states, refine_positions(positions, full(self.box_head(hidden_states)))


class AdaMixerDecoder(nn.Module):
    def __init__(self, config: AdaMixerConfig) -> None:
        super().__init__()
        self.num_groups, self.strides = config.num_groups, tuple(config.feature_strides)
        self.layers = nn.ModuleList(AdaMixerDecoderLayer(config) for _ in range(config.decoder_layers))

    def forward(
        self, hidden_states: Tensor, positions: Tensor, feature_maps: list[Tensor], **kwargs
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Contents (B, Q, D) and positions (B, Q, 4) of each layer.

        Args:
            hidden_states, positions: of the queries, before the first layer.
            feature_maps: one (B, C, height, width) a level, finest first.
        """
        maps = [level.unflatten(1, (self.num_groups, -1)).flatten(3) for level in feature_maps]
        cells = torch.cat(maps, -1).transpose(2, 3).contiguous()  # once for all layers
        sizes = [(s, level.shape[3], level.shape[2]) for s, level in zip(self.strides, feature_maps, strict=True)]
        levels = torch.tensor(sizes, device=cells.device)
        contents, places = [], []
        for layer in self.layers:
            hidden_states, refined = layer(hidden_states, positions, cells, levels, **kwargs)
            positions = refined.detach()  # each layer learns to refine, not to be refined
            contents.append(hidden_states)
            places.append(refined)
        return contents, places


class AdaMixerNeck(nn.Module):
    """Brings the backbone's maps to one number of channels, and all of them under one norm."""

    def __init__(self, channels: list[int], config: AdaMixerConfig) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Conv2d(c, config.feature_channels, 1) for c in channels)
        self.group_norm = nn.GroupNorm(32, config.feature_channels)

    def forward(self, feature_maps: list[Tensor]) -> list[Tensor]:
        return [self.group_norm(proj(level)) for proj, level in zip(self.projections, feature_maps, strict=True)]


class AdaMixerPreTrainedModel(PreTrainedModel):
    config_class = AdaMixerConfig
    config: AdaMixerConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # the bias of the attention needs a gradient, which flash attention does not give
    _no_split_modules = ["AdaMixerDecoderLayer", "AdaMixerNeck"]

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: of custom code Transformers would initialise no module that merely sets weights of its children."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The original's initial values. A module sets what its children are to have otherwise: they come first."""
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            bound = module.in_features**-0.5
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Conv2d):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, AdaMixerSelfAttention):
            for proj in (module.q_proj, module.k_proj, module.v_proj):
                # The original has the three in one matrix, whose fans are 1 and 3 times the width.
                init.xavier_uniform_(proj.weight, gain=2**-0.5)
                init.zeros_(proj.bias)
            init.uniform_(module.iof_scale, 0, 4)
        elif isinstance(module, AdaMixerSampling):
            init.zeros_(module.offset_proj.weight)
            init.copy_(module.offset_proj.bias, _initial_offsets(module.offset_proj.bias, module.num_groups))
        elif isinstance(module, AdaMixerMixing):
            init.zeros_(module.parameter_proj.weight)
        elif isinstance(module, AdaMixerDecoderLayer):
            init.zeros_(module.box_head.out_proj.weight)
            init.zeros_(module.box_head.out_proj.bias)
        elif isinstance(module, AdaMixerModel):
            whole_image = module.query_boxes.new_tensor([0.5, 0.5, 1, 1])
            init.copy_(module.query_boxes, whole_image.expand_as(module.query_boxes))
        elif isinstance(module, AdaMixerForObjectDetection):
            for head in module.class_heads:
                init.constant_(head.out_proj.bias, -math.log((1 - 0.01) / 0.01))
        else:
            super()._init_weights(module)


def _initial_offsets(bias: Tensor, num_groups: int) -> Tensor:
    """One octave finer than the box, and spread over it: on a grid where the number of points is a square."""
    offsets = torch.full_like(bias, -1.0).view(num_groups, -1, 3)
    num_points = offsets.shape[1]
    side = math.isqrt(num_points)
    if side**2 == num_points:
        centres = (torch.arange(side, device=bias.device, dtype=bias.dtype) + 0.5) / side - 0.5
        offsets[..., :2] = torch.cartesian_prod(centres, centres)
    else:
        offsets[..., :2].uniform_(-0.5, 0.5)
    return offsets.flatten()


class AdaMixerModel(AdaMixerPreTrainedModel):
    """Backbone, neck and decoder, whose layers refine the boxes.

    Raises:
        ValueError: the backbone gives another number of feature maps than `config.feature_strides` has.
    """

    _can_record_outputs = {"hidden_states": AdaMixerDecoderLayer, "attentions": AdaMixerSelfAttention}

    def __init__(self, config: AdaMixerConfig) -> None:
        super().__init__(config)
        self.backbone = load_backbone(config)
        channels = self.backbone.channels
        if len(channels) != len(config.feature_strides):
            raise ValueError(
                f"the backbone gives {len(channels)} feature maps, feature_strides has {len(config.feature_strides)}"
            )
        # Of timm's some (MambaOut) give (B, height, width, channels).
        self.channels_last = getattr(getattr(self.backbone, "_backbone", None), "output_fmt", None) == "NHWC"
        self.freeze_batch_norms = config.freeze_backbone_batch_norms
        self.neck = AdaMixerNeck(channels, config)
        self.query_content = nn.Embedding(config.num_queries, config.d_model)
        # cx, cy, w, h in [0, 1] of the valid image; a buffer, because no gradient reaches it.
        self.register_buffer("query_boxes", torch.empty(config.num_queries, 4))
        self.decoder = AdaMixerDecoder(config)
        self.post_init()

    def train(self, mode: bool = True) -> AdaMixerModel:
        """Batch norms of the backbone keep their statistics where those, or their scale and shift, are frozen."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d) and (self.freeze_batch_norms or not module.weight.requires_grad):
                module.eval()
        return self

    @capture_outputs
    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> AdaMixerModelOutput:
        """Runs the model.

        Args:
            pixel_values: normalised images (B, 3, height, width), padded at the bottom and the right.
            pixel_mask: (B, height, width), 1 where the image is and 0 in the padding; None: images without padding.

        Raises:
            ValueError: the backbone's feature maps have other strides than `config.feature_strides`.
        """
        feature_maps = self.neck(self._read_backbone(pixel_values))
        size = self.valid_sizes(pixel_values, pixel_mask)
        return self.decode(*self.initial_queries(size), feature_maps, size, **kwargs)

    def _read_backbone(self, pixel_values: Tensor) -> list[Tensor]:
        maps = list(self.backbone(pixel_values).feature_maps)
        if self.channels_last:
            maps = [level.permute(0, 3, 1, 2) for level in maps]
        if not torch.compiler.is_compiling():  # the program of one size is to serve another
            for stride, level in zip(self.config.feature_strides, maps, strict=True):
                width, cells = pixel_values.shape[3], level.shape[3]
                # Backbones round up or down. With wrong strides every point would be read in a wrong place.
                if abs(cells - width / stride) > max(1, 0.3 * width / stride):
                    raise ValueError(
                        f"the backbone makes {cells} cells of {width} pixels, which is not a stride of {stride}: set "
                        f"feature_strides to those of its maps, in place of {list(self.config.feature_strides)}"
                    )
        return maps

    def decode(
        self, hidden_states: Tensor, positions: Tensor, feature_maps: list[Tensor], size: Tensor, **kwargs
    ) -> AdaMixerModelOutput:
        """Answers any queries.

        Args:
            hidden_states, positions: (B, Q, D) and (B, Q, 4).
            feature_maps: of the neck.
            size: see `valid_sizes`.
        """
        contents, places = self.decoder(hidden_states.to(feature_maps[0].dtype), positions, feature_maps, **kwargs)
        places = torch.stack(places, 1)
        return AdaMixerModelOutput(
            last_hidden_state=contents[-1],
            intermediate_hidden_states=torch.stack(contents, 1),
            intermediate_positions=places,
            intermediate_boxes=positions_to_boxes(places) / size[:, None],
        )

    def valid_sizes(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor:
        """Width, height, width and height (B, 1, 4) in pixels of each image, without its padding."""
        dtype = torch.promote_types(self.query_boxes.dtype, torch.float32)
        if pixel_mask is None:
            pixel_mask = torch.ones_like(pixel_values[:, 0])
        return torch.stack([pixel_mask[:, 0].sum(-1, dtype=dtype), pixel_mask[:, :, 0].sum(-1, dtype=dtype)] * 2, -1)[
            :, None
        ]

    def initial_queries(self, size: Tensor) -> tuple[Tensor, Tensor]:
        """Contents (B, Q, D) and positions (B, Q, 4), the same for every image but for its `valid_sizes`."""
        content = F.layer_norm(self.query_content.weight, self.query_content.weight.shape[-1:])
        return content.expand(size.shape[0], -1, -1), self.box_positions(self.query_boxes, size)

    @staticmethod
    def box_positions(boxes: Tensor, size: Tensor) -> Tensor:
        """Positions (B, Q, 4) of boxes (Q, 4) or (B, Q, 4) as cx, cy, w, h in [0, 1] of images of `valid_sizes`."""
        return boxes_to_positions(full(boxes) * size)


class AdaMixerForObjectDetection(AdaMixerPreTrainedModel):
    """`AdaMixerModel` with a head for the classes on each layer, and the loss."""

    def __init__(self, config: AdaMixerConfig) -> None:
        super().__init__(config)
        self.model = AdaMixerModel(config)
        self.class_heads = nn.ModuleList(
            AdaMixerHead(config.d_model, config.num_labels) for _ in range(config.decoder_layers)
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AdaMixerObjectDetectionOutput:
        """Detects objects.

        Args:
            pixel_values, pixel_mask: see `AdaMixerModel.forward`.
            labels: for each image `class_labels` (T,) and `boxes` (T, 4) as cx, cy, w, h in [0, 1] of the valid image,
                as `AdaMixerImageProcessor` has them.
        """
        # Whatever the configuration says of `return_dict`, which is meant for what the user gets.
        outputs = self.model(pixel_values, pixel_mask, return_dict=True, **kwargs)
        logits = self.classify(outputs.intermediate_hidden_states)
        boxes = outputs.intermediate_boxes.transpose(0, 1)
        loss = loss_dict = auxiliary = None
        if labels is not None:
            loss, loss_dict, auxiliary = self.loss_function(
                logits[-1], labels, self.device, boxes[-1], self.config, logits, boxes
            )
        return AdaMixerObjectDetectionOutput(
            loss=loss,
            loss_dict=loss_dict,
            logits=logits[-1],
            pred_boxes=boxes[-1],
            auxiliary_outputs=auxiliary,
            last_hidden_state=outputs.last_hidden_state,
            intermediate_hidden_states=outputs.intermediate_hidden_states,
            intermediate_boxes=outputs.intermediate_boxes,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def classify(self, hidden_states: Tensor) -> Tensor:
        """Logits (layers, B, Q, classes) of contents (B, layers, Q, D)."""
        states = hidden_states.unbind(1)
        return torch.stack([head(state) for head, state in zip(self.class_heads, states, strict=True)])


__all__ = ["AdaMixerForObjectDetection", "AdaMixerModel", "AdaMixerPreTrainedModel"]
