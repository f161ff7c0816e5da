"""Checkpoints of the original code, which is written for mmdetection, as this model's."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ...errors import UserError
from .configuration_adamixer import AdaMixerConfig

_LAYER, _HEAD = r"roi_head\.bbox_head\.(\d+)\.", r"model.decoder.layers.\1."
_ATTENTION, _SAMPLING = rf"{_LAYER}attention\.attn\.", rf"{_LAYER}sampling_n_mixing\."
RULES = (  # names there, whole, and here; None: of no use. The first that fits
    (r"neck\.lateral_convs\.(\d+)\.conv\.(.*)", r"model.neck.projections.\1.\2"),
    (r"neck\.gn_out\.(.*)", r"model.neck.group_norm.\1"),
    (r"rpn_head\.init_proposal_bboxes\.weight", r"model.query_boxes"),
    (r"rpn_head\.init_content_features\.weight", r"model.query_content.weight"),
    (rf"{_LAYER}iof_tau", rf"{_HEAD}self_attn.iof_scale"),
    (rf"{_ATTENTION}in_proj_(.*)", rf"{_HEAD}self_attn.[qkv]_proj.\2"),
    (rf"{_ATTENTION}out_proj\.(.*)", rf"{_HEAD}self_attn.out_proj.\2"),
    (rf"{_LAYER}attention_norm\.(.*)", rf"{_HEAD}self_attn_layer_norm.\2"),
    (rf"{_SAMPLING}sampling_offset_generator\.0\.(.*)", rf"{_HEAD}sampling.offset_proj.\2"),
    (rf"{_SAMPLING}adaptive_mixing\.parameter_generator\.0\.(.*)", rf"{_HEAD}mixing.parameter_proj.\2"),
    (rf"{_SAMPLING}adaptive_mixing\.out_proj\.(.*)", rf"{_HEAD}mixing.out_proj.\2"),
    (rf"{_SAMPLING}norm\.(.*)", rf"{_HEAD}mixing_layer_norm.\2"),
    (rf"{_LAYER}ffn\.layers\.0\.0\.(.*)", rf"{_HEAD}fc1.\2"),
    (rf"{_LAYER}ffn\.layers\.1\.(.*)", rf"{_HEAD}fc2.\2"),
    (rf"{_LAYER}ffn_norm\.(.*)", rf"{_HEAD}final_layer_norm.\2"),
    (rf"{_LAYER}reg_fcs\.0\.(.*)", rf"{_HEAD}box_head.dense.\2"),
    (rf"{_LAYER}reg_fcs\.1\.(.*)", rf"{_HEAD}box_head.layer_norm.\2"),
    (rf"{_LAYER}fc_reg\.(.*)", rf"{_HEAD}box_head.out_proj.\2"),
    (rf"{_LAYER}cls_fcs\.0\.(.*)", r"class_heads.\1.dense.\2"),
    (rf"{_LAYER}cls_fcs\.1\.(.*)", r"class_heads.\1.layer_norm.\2"),
    (rf"{_LAYER}fc_cls\.(.*)", r"class_heads.\1.out_proj.\2"),
    (
        rf"{_LAYER}instance_interactive_conv_norm\..*",
        None,
    ),  # in checkpoints of the first public code, and unused there
    (r"backbone\.(.*)", r"model.backbone._backbone.\1"),  # the names of torchvision, and so of timm
)


def convert_state_dict(original: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """The weights under this model's names, with a timm backbone.

    Returns:
        The weights, and what became of each original name: the names that it has here, none where it is of no use.

    Raises:
        UserError: names that no AdaMixer with a ResNet has.
    """
    state, report = {}, {}
    for name, tensor in original.items():
        for pattern, new in RULES:
            if match := re.fullmatch(pattern, name.removeprefix("module.")):
                report[name] = [] if new is None else _expand(match.expand(new))
                parts = tensor.chunk(3) if len(report[name]) == 3 else [tensor] * len(report[name])
                state |= zip(report[name], parts, strict=True)
                break
    if unknown := [name for name in original if name not in report]:
        raise UserError(f"{len(unknown)} names that no AdaMixer has, {unknown[0]} the first")
    if deformed := [name for name in original if ".conv_offset." in name]:
        raise UserError(f"the backbone has deformable convolutions, which timm's has not: {deformed[0]}")
    return state, report


def _expand(name: str) -> list[str]:
    return [name.replace("[qkv]", part) for part in "qkv"] if "[qkv]" in name else [name]


def config_of(state: Mapping[str, Tensor]) -> AdaMixerConfig:
    """The configuration that the shapes of converted weights tell.

    Raises:
        UserError: the weights are no whole AdaMixer, or its backbone is no ResNet-50 or 101.
    """
    blocks = {re.match(r"model\.backbone\._backbone\.(layer\d\.\d+)\.", name) for name in state} - {None}
    depth = {16: 50, 33: 101}.get(len({match[1] for match in blocks}))
    if depth is None or "model.backbone._backbone.layer1.0.conv3.weight" not in state:
        raise UserError("its backbone is neither a ResNet-50 nor a ResNet-101")
    try:
        layer = "model.decoder.layers.0."
        channels = len(state["model.neck.group_norm.weight"])
        out_points = state[f"{layer}mixing.out_proj.weight"].shape[1] // channels
        points = len(state[f"{layer}sampling.offset_proj.bias"]) // 3  # of all groups
        # Of G groups all matrices together have C^2 / G numbers for channels, and out_points for each point.
        num_groups = channels**2 // (len(state[f"{layer}mixing.parameter_proj.bias"]) - points * out_points)
        num_queries, d_model = state["model.query_content.weight"].shape
        return AdaMixerConfig(
            backbone_config={
                "model_type": "timm_backbone",
                "backbone": f"resnet{depth}",
                "use_pretrained_backbone": False,
                "out_indices": [1, 2, 3, 4],
            },
            num_queries=num_queries,
            d_model=d_model,
            feature_channels=channels,
            decoder_layers=len({name.split(".")[3] for name in state if name.startswith("model.decoder.layers.")}),
            decoder_attention_heads=len(state[f"{layer}self_attn.iof_scale"]),
            decoder_ffn_dim=len(state[f"{layer}fc1.weight"]),
            num_groups=num_groups,
            in_points=points // num_groups,
            out_points=out_points,
            num_labels=len(state["class_heads.0.out_proj.bias"]),
        )
    except KeyError as error:
        raise UserError(f"it lacks what should become {error}") from error
