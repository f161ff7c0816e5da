"""From a detector's raw answers to COCO rows."""

from __future__ import annotations

import torch
from torch import Tensor


def postprocess(
    logits: Tensor,
    boxes: Tensor,
    orig_sizes: Tensor,
    activation: str,
    top_k: int = 100,
    columns: Tensor | None = None,
) -> Tensor:
    """The best detections of each image, in pixels of the image file, without a score threshold.

    A sigmoid head is ranked over all Q * C scores, as Transformers' `post_process_object_detection` does for
    Deformable DETR: one query may answer with several classes. A softmax head gives each query's best class other
    than "no object", its last column. Boxes are not clipped to the image, as in DETR's own evaluation.

    Args:
        logits: (B, Q, C) of one decoder layer; for softmax the last of the C columns is "no object".
        boxes: (B, Q, 4), (cx, cy, w, h) in [0, 1] of the valid image.
        orig_sizes: (B, 2), (height, width) of the image files.
        activation: "sigmoid" or "softmax".
        top_k: detections per image.
        columns: (K,) class columns to score, in this order; None for all.

    Returns:
        (B, K, 6) float32 rows (x, y, w, h, score, class index), best score first. K is top_k at most.
    """
    logits, boxes = logits.float(), boxes.float()
    num_queries = logits.shape[1]
    probabilities = logits.softmax(-1)[..., :-1] if activation == "softmax" else logits.sigmoid()
    if columns is not None:
        probabilities = probabilities[..., columns]
    if activation == "softmax":
        scores, classes = probabilities.max(-1)
        scores, queries = scores.topk(min(top_k, num_queries), dim=1)
        classes = classes.gather(1, queries)
    else:
        scores = probabilities.flatten(1)
        scores, best = scores.topk(min(top_k, scores.shape[1]), dim=1)
        queries, classes = best // probabilities.shape[2], best % probabilities.shape[2]
    boxes = boxes.gather(1, queries[..., None].expand(-1, -1, 4))
    corner = boxes[..., :2] - boxes[..., 2:] / 2
    scale = orig_sizes.to(boxes).flip(1).repeat(1, 2)  # (W, H, W, H)
    boxes = torch.cat([corner, boxes[..., 2:]], -1) * scale[:, None]
    return torch.cat([boxes, scores[..., None], classes[..., None].to(boxes)], -1)
