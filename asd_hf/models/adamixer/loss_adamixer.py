from __future__ import annotations

import torch
from torch import Tensor

from ...criterion import DetectionCriterion
from ...detectors.base import DetectorOutput


def adamixer_loss(
    logits: Tensor,
    labels: list[dict[str, Tensor]],
    device: torch.device,
    pred_boxes: Tensor,
    config,
    outputs_class: Tensor,
    outputs_coord: Tensor,
) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]:
    """Focal, L1 and generalised IoU losses of every layer after a matching of its own, with Transformers' arguments.

    Args:
        logits, pred_boxes: (B, Q, classes) and (B, Q, 4) of the last layer.
        labels: see `AdaMixerForObjectDetection.forward`.
        outputs_class, outputs_coord: the same of all layers, (layers, B, Q, .).

    Returns:
        The loss; its weighted parts; and logits and boxes of the earlier layers, unless `config.auxiliary_loss` is
        false: then they have no loss either.
    """
    if not config.auxiliary_loss:
        outputs_class, outputs_coord = logits[None], pred_boxes[None]
    criterion = DetectionCriterion.from_config(config, class_loss_weight=config.class_loss_coefficient)
    labels = [{key: label[key].to(device) for key in ("class_labels", "boxes")} for label in labels]
    parts = criterion(DetectorOutput(outputs_class, outputs_coord, outputs_class), labels)
    earlier = None
    if config.auxiliary_loss:
        pairs = zip(outputs_class[:-1], outputs_coord[:-1], strict=True)
        earlier = [{"logits": layer, "pred_boxes": boxes} for layer, boxes in pairs]
    return sum(parts.values()), parts, earlier
