"""Tiny random detectors and batches for the tests: nothing is downloaded, everything is seeded."""

from __future__ import annotations

import torch
from torch import nn
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, DeformableDetrImageProcessor

torch.set_num_threads(1)  # for tensors this small more threads only cost

CLASSES = ("cat", "dog", "traffic light", "kite", "pizza")
SIZES = ((64, 96), (96, 64), (80, 80), (96, 96))  # height, width of the valid images, in turn
HF_RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
TIMM_RESNET = {
    "model_type": "timm_backbone",
    "backbone": "resnet18",
    "features_only": True,
    "use_pretrained_backbone": False,
    "out_indices": [2, 3, 4],
}


def deformable_detr(
    seed: int = 0,
    with_box_refine: bool = False,
    two_stage: bool = False,
    num_queries: int = 12,
    classes: tuple[str, ...] = CLASSES,
    d_model: int = 32,
    encoder_layers: int = 1,
    decoder_layers: int = 2,
    backbone_config: dict | None = None,
    **config,
) -> DeformableDetrForObjectDetection:
    """In eval mode and without dropout, with random heads, because heads of zeros would hide errors."""
    torch.manual_seed(seed)
    model = DeformableDetrForObjectDetection(
        DeformableDetrConfig(
            backbone_config=dict(backbone_config or HF_RESNET),
            with_box_refine=with_box_refine or two_stage,
            two_stage=two_stage,
            num_queries=num_queries,
            two_stage_num_proposals=num_queries,
            id2label=dict(enumerate(classes)),
            label2id={name: i for i, name in enumerate(classes)},
            d_model=d_model,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers,
            **{
                "encoder_ffn_dim": d_model,
                "decoder_ffn_dim": d_model,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "auxiliary_loss": True,
                "dropout": 0.0,
            }
            | config,
        )
    )
    heads = [model.class_embed, model.bbox_embed]
    if not two_stage:  # spread over the image: Transformers starts all queries at its centre
        heads.append(model.model.query_position_embeddings)
    with torch.no_grad():
        for parameter in nn.ModuleList(heads).parameters():
            parameter.normal_(0, 0.3)
    return model.eval()


def processor(**options) -> DeformableDetrImageProcessor:
    return DeformableDetrImageProcessor(**{"size": {"shortest_edge": 64, "longest_edge": 96}} | options)


def batch(
    batch_size: int = 2,
    seed: int = 0,
    sizes: tuple[tuple[int, int], ...] = SIZES,
    num_classes: int = len(CLASSES),
    boxes: tuple[int, ...] = (3, 0, 1, 5),
) -> dict:
    """Images of unequal valid `sizes` (height, width) with unequal numbers of `boxes`, both taken in turn."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [sizes[i % len(sizes)] for i in range(batch_size)]
    height, width = (max(side) for side in zip(*shapes, strict=True))
    pixel_values = torch.zeros(batch_size, 3, height, width, dtype=torch.uint8)
    pixel_mask = torch.zeros(batch_size, height, width, dtype=torch.bool)
    labels = []
    for i, (h, w) in enumerate(shapes):
        pixel_values[i, :, :h, :w] = torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8)
        pixel_mask[i, :h, :w] = True
        count = boxes[i % len(boxes)]
        size = torch.rand(count, 2, generator=generator) * 0.4 + 0.05
        centre = size / 2 + torch.rand(count, 2, generator=generator) * (1 - size)
        classes = torch.randint(0, num_classes, (count,), generator=generator)
        corner_size = torch.cat([centre - size / 2, size], -1).double() * torch.tensor([2 * w, 2 * h] * 2)
        area = corner_size[:, 2:].prod(-1, keepdim=True)
        labels.append(
            {
                "class_labels": classes,
                "boxes": torch.cat([centre, size], -1),
                "image_id": torch.tensor(i),
                "orig_size": torch.tensor([2 * h, 2 * w]),
                "ground_truth": torch.cat([corner_size, area, torch.zeros_like(area), classes[:, None]], -1),
            }
        )
    return {"pixel_values": pixel_values, "pixel_mask": pixel_mask, "labels": labels}
