"""A tiny random detector of every family: `FAMILIES[name](classes, num_queries, seed)` gives model and processor."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertTokenizerFast,
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    ConditionalDetrImageProcessor,
    DabDetrConfig,
    DabDetrForObjectDetection,
    DeformableDetrImageProcessor,
    Deimv2Config,
    Deimv2ForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    DFineConfig,
    DFineForObjectDetection,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    LwDetrConfig,
    LwDetrForObjectDetection,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    RfDetrConfig,
    RfDetrForObjectDetection,
    RfDetrImageProcessor,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
    TableTransformerConfig,
    TableTransformerForObjectDetection,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

from asd_hf.models import AdaMixerConfig, AdaMixerForObjectDetection, AdaMixerImageProcessor
from tests import tiny

EDGES = {"shortest_edge": 64, "longest_edge": 96}
SQUARE = {"height": 64, "width": 64}
CLASSIC = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 3,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "dropout": 0.0,
    "auxiliary_loss": True,
}
REAL_TIME = {
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [16, 16, 32],
    "decoder_in_channels": [32, 32, 32],
    "d_model": 32,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_layers": 3,
    "num_denoising": 10,
    "hidden_expansion": 0.5,
}
RT_RESNET = {
    "model_type": "rt_detr_resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_indices": [2, 3, 4],
}
HGNET = {
    "model_type": "hgnet_v2",
    "hidden_sizes": [32, 32, 32, 32],
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 16, 32, 32],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [16, 32, 32, 32],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_downsample": [False, True, True, True],
    "stage_light_block": [False, False, True, True],
    "stage_kernel_size": [3, 3, 3, 3],
    "stage_numb_of_layers": [1, 1, 1, 1],
    "out_indices": [2, 3, 4],
    "embedding_size": 8,
    "depths": [1, 1, 1, 1],
}
GROUP = {
    "d_model": 32,
    "decoder_ffn_dim": 32,
    "decoder_layers": 3,
    "decoder_self_attention_heads": 4,
    "decoder_cross_attention_heads": 4,
    "group_detr": 3,
    "c2f_num_blocks": 1,
    "dropout": 0.0,
}
VIT = {"image_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 16}


def _labels(classes) -> dict:
    return {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}


def _build(model_class, config_class, processor, classes, seed, **values):
    torch.manual_seed(seed)
    return model_class(config_class(**_labels(classes), **values)).eval(), processor


def _build_lively(*args, **values):
    """With noise on all but the backbone: Transformers starts heads, tokens and norms at zeros and ones, which would
    hide errors, and queries so close to each other that all answer the same."""
    model, processor = _build(*args, **values)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "backbone" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model, processor


def _resnet(*stages):
    return tiny.HF_RESNET | {"out_features": [f"stage{i}" for i in stages]}


def deformable_detr(classes=tiny.CLASSES, num_queries=12, seed=0, **values):
    return tiny.deformable_detr(seed, classes=classes, num_queries=num_queries, decoder_layers=3, **values), (
        tiny.processor()
    )


def deformable_detr_refine(classes=tiny.CLASSES, num_queries=12, seed=0):
    return deformable_detr(classes, num_queries, seed, with_box_refine=True)


def deformable_detr_two_stage(classes=tiny.CLASSES, num_queries=12, seed=0):
    return deformable_detr(classes, num_queries, seed, two_stage=True)


def detr(classes=tiny.CLASSES, num_queries=12, seed=0):
    values = CLASSIC | {"backbone_config": _resnet(4), "num_queries": num_queries}
    return _build_lively(DetrForObjectDetection, DetrConfig, DetrImageProcessor(size=EDGES), classes, seed, **values)


def table_transformer(classes=tiny.CLASSES, num_queries=12, seed=0):
    values = CLASSIC | {"backbone_config": _resnet(4), "num_queries": num_queries}
    processor = DetrImageProcessor(size=EDGES)
    return _build_lively(
        TableTransformerForObjectDetection, TableTransformerConfig, processor, classes, seed, **values
    )


def conditional_detr(classes=tiny.CLASSES, num_queries=12, seed=0):
    values = CLASSIC | {"backbone_config": _resnet(4), "num_queries": num_queries}
    processor = ConditionalDetrImageProcessor(size=EDGES)
    return _build_lively(ConditionalDetrForObjectDetection, ConditionalDetrConfig, processor, classes, seed, **values)


def dab_detr(classes=tiny.CLASSES, num_queries=12, seed=0):
    values = {name: value for name, value in CLASSIC.items() if name != "d_model"} | {"hidden_size": 32}
    values |= {"backbone_config": _resnet(4), "num_queries": num_queries}
    processor = ConditionalDetrImageProcessor(size=EDGES)
    return _build_lively(DabDetrForObjectDetection, DabDetrConfig, processor, classes, seed, **values)


def adamixer(classes=tiny.CLASSES, num_queries=12, seed=0):
    values = {
        "backbone_config": _resnet(1, 2, 3, 4),
        "num_queries": num_queries,
        "d_model": 32,
        "feature_channels": 32,
        "decoder_layers": 3,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 32,
        "in_points": 4,
        "out_points": 8,
    }
    processor = AdaMixerImageProcessor(size=EDGES)
    model, _ = _build_lively(AdaMixerForObjectDetection, AdaMixerConfig, processor, classes, seed, **values)
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            # The scale of a box is an exponent, and where nothing but zeros is read, beyond the image, the norms of
            # mixing blow up what rounding leaves.
            layer.box_head.out_proj.weight.mul_(0.05)
            layer.box_head.out_proj.bias.mul_(0.05)
            layer.sampling.offset_proj.weight.mul_(0.1)
    return model, processor


def yolos(classes=tiny.CLASSES, num_queries=12, seed=0):
    values = VIT | {"image_size": [64, 64], "num_hidden_layers": 3, "intermediate_size": 32}
    values |= {"num_detection_tokens": num_queries}
    return _build_lively(
        YolosForObjectDetection, YolosConfig, YolosImageProcessor(size=EDGES), classes, seed, **values
    )


def rt_detr(classes=tiny.CLASSES, num_queries=12, seed=0):
    values = REAL_TIME | {"backbone_config": dict(RT_RESNET), "num_queries": num_queries}
    return _build_lively(
        RTDetrForObjectDetection, RTDetrConfig, RTDetrImageProcessor(size=SQUARE), classes, seed, **values
    )


def rt_detr_v2(classes=tiny.CLASSES, num_queries=12, seed=0):
    values = REAL_TIME | {"backbone_config": dict(RT_RESNET), "num_queries": num_queries}
    processor = RTDetrImageProcessor(size=SQUARE)
    return _build_lively(RTDetrV2ForObjectDetection, RTDetrV2Config, processor, classes, seed, **values)


def d_fine(classes=tiny.CLASSES, num_queries=12, seed=0):
    values = REAL_TIME | {"backbone_config": dict(HGNET), "encoder_in_channels": [32, 32, 32], "depth_mult": 0.34}
    values |= {"num_queries": num_queries}
    return _build_lively(
        DFineForObjectDetection, DFineConfig, RTDetrImageProcessor(size=SQUARE), classes, seed, **values
    )


def deimv2(classes=tiny.CLASSES, num_queries=12, seed=0):
    values = REAL_TIME | {"backbone_config": dict(HGNET), "encoder_in_channels": [32, 32, 32], "depth_mult": 0.34}
    values |= {"num_queries": num_queries}
    return _build_lively(
        Deimv2ForObjectDetection, Deimv2Config, RTDetrImageProcessor(size=SQUARE), classes, seed, **values
    )


def lw_detr(classes=tiny.CLASSES, num_queries=12, seed=0):
    vit = VIT | {"model_type": "lw_detr_vit", "window_block_indices": [0, 2], "out_indices": [2, 4], "num_windows": 4}
    values = GROUP | {"backbone_config": vit, "projector_scale_factors": [1.0], "num_queries": num_queries}
    processor = DeformableDetrImageProcessor(size=SQUARE)
    return _build(LwDetrForObjectDetection, LwDetrConfig, processor, classes, seed, **values)


def rf_detr(classes=tiny.CLASSES, num_queries=12, seed=0):
    vit = VIT | {"model_type": "rf_detr_dinov2", "out_indices": [2, 4], "num_windows": 2}
    values = GROUP | {"backbone_config": vit, "num_queries": num_queries}
    return _build(RfDetrForObjectDetection, RfDetrConfig, RfDetrImageProcessor(size=SQUARE), classes, seed, **values)


def _grounding(model_class, config_class, num_queries, seed):
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        ".",
        "?",
        *["cat", "dog", "traffic", "light", "kite", "pizza", "square", "disc", "triangle"],
    ]
    vocabulary = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = BertTokenizerFast(tokenizer_object=inner)
    text = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    swin = {
        "model_type": "swin",
        "image_size": 64,
        "embed_dim": 8,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 1, 1],
        "window_size": 2,
        "out_features": ["stage2", "stage3", "stage4"],
    }
    values = CLASSIC | {"decoder_layers": 2, "num_queries": num_queries, "max_text_len": 32}
    torch.manual_seed(seed)
    model = model_class(config_class(backbone_config=swin, text_config=text, **values))
    processor = GroundingDinoProcessor(GroundingDinoImageProcessor(size=EDGES), tokenizer)
    return model.eval(), processor


def grounding_dino(classes=tiny.CLASSES, num_queries=12, seed=0):
    """Open-vocabulary: `classes` are what the caller will prompt for, the model does not know them."""
    return _grounding(GroundingDinoForObjectDetection, GroundingDinoConfig, num_queries, seed)


def mm_grounding_dino(classes=tiny.CLASSES, num_queries=12, seed=0):
    return _grounding(MMGroundingDinoForObjectDetection, MMGroundingDinoConfig, num_queries, seed)


FAMILIES = {
    function.__name__: function
    for function in (
        detr,
        table_transformer,
        conditional_detr,
        dab_detr,
        deformable_detr,
        deformable_detr_refine,
        deformable_detr_two_stage,
        adamixer,
        yolos,
        rt_detr,
        rt_detr_v2,
        d_fine,
        deimv2,
        lw_detr,
        rf_detr,
        grounding_dino,
        mm_grounding_dino,
    )
}
OPEN_VOCABULARY = ("grounding_dino", "mm_grounding_dino")
STUDENTS = [name for name in FAMILIES if name not in OPEN_VOCABULARY]
