"""Loss functions for Transformers' detectors: the numbers of Transformers' own in a fraction of the time.

Each has the signature of the one whose place it takes, see `transformers.loss`: a model calls its `loss_function` with
the predictions of all layers, and gets the loss, its terms by name, and the predictions of the earlier layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_d_fine import weighting_function
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING

from .criterion import DetectionCriterion, Stage
from .errors import UserError
from .losses import IoUAwareLoss, MatchabilityAwareLoss, SigmoidLoss, VarifocalLoss
from .registry import nearest

Result = tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]


def use_fast_criterion(model: PreTrainedModel) -> PreTrainedModel:
    """Lets a Transformers detector compute its loss with asd_hf's criterion: all layers and images in one pass.

    `model(pixel_values, labels=labels)` then gives the same `loss` and `loss_dict` as before, in a plain loop and in
    `Trainer`, for every family in `LOSSES`. It differs from Transformers' where that depends on how many processes
    train: the number of boxes is the mean over all of them. (Transformers divides by the number of processes twice, or
    counts each one's own boxes.) In eval mode, LW-DETR and RF-DETR match the one group of queries that they show.
    Degenerate boxes are no error. The setting is not saved with the model. AdaMixer has no other loss and stays as it
    is.

    Args:
        model: a `...ForObjectDetection`, before it is wrapped (DistributedDataParallel, ...).

    Returns:
        The same model.

    Raises:
        UserError: `model` is no detector of a family in `LOSSES`.
    """
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family is None:
        raise UserError(f"use_fast_criterion takes a Transformers detector itself, not a {type(model).__name__}")
    if getattr(getattr(model, "loss_function", None), "__module__", "").startswith(f"{__package__}."):
        return model
    if family not in LOSSES:
        raise UserError(f"use_fast_criterion: no loss for {family!r}: {nearest(family, LOSSES)}")
    if not isinstance(model, MODEL_FOR_OBJECT_DETECTION_MAPPING[type(model.config)]):
        raise UserError(f"use_fast_criterion: {type(model).__name__} is not the family's ...ForObjectDetection")
    model.loss_function = LOSSES[family]
    return model


def detr_loss(
    logits: Tensor,
    labels: list[dict],
    device: torch.device,
    pred_boxes: Tensor,
    config,
    outputs_class: Tensor | None = None,
    outputs_coord: Tensor | None = None,
    *,
    activation: str,
    **_,
) -> Result:
    """Of DETR and its kin: layers (L, B, Q, .), the last of which are `logits` and `pred_boxes`."""
    criterion = DetectionCriterion.from_config(config, activation)
    stages, names = _decoder(logits, pred_boxes, config, outputs_class, outputs_coord)
    earlier = _outputs((outputs_class[:-1], outputs_coord[:-1])) if config.auxiliary_loss else None
    return *_judged(criterion, stages, names, labels), earlier


def lw_detr_loss(
    logits: Tensor,
    labels: list[dict],
    device: torch.device,
    pred_boxes: Tensor,
    config,
    outputs_class: Tensor | None = None,
    outputs_coord: Tensor | None = None,
    enc_outputs_class: Tensor | None = None,
    enc_outputs_coord: Tensor | None = None,
    **_,
) -> Result:
    """Of LW-DETR and RF-DETR: layers (L, B, Q, .) and proposals (B, Q, .), in training of groups of queries."""
    criterion = DetectionCriterion.from_config(config, class_loss_weight=config.class_loss_coefficient)
    criterion.class_loss = IoUAwareLoss(config.focal_alpha)
    stages, names = _decoder(logits, pred_boxes, config, outputs_class, outputs_coord)
    stages.append(Stage(enc_outputs_class[None], enc_outputs_coord[None]))
    for stage in stages:
        stage.copies = logits.shape[1] // config.num_queries
    earlier = _outputs((outputs_class[:-1], outputs_coord[:-1])) if config.auxiliary_loss else None
    return *_judged(criterion, stages, [*names, ["_enc"]], labels), earlier


def _decoder(
    logits: Tensor, boxes: Tensor, config, all_logits: Tensor | None, all_boxes: Tensor | None
) -> tuple[list[Stage], list[list[str]]]:
    """The decoder layers that have a loss, and what the names of their terms end with."""
    if not config.auxiliary_loss:
        return [Stage(logits[None], boxes[None])], [[""]]
    earlier = [f"_{i}" for i in range(len(all_logits) - 1)]
    if logits.data_ptr() == all_logits[-1].data_ptr() and boxes.data_ptr() == all_boxes[-1].data_ptr():
        return [Stage(all_logits, all_boxes)], [[*earlier, ""]]
    # Some models compute the last layer twice, and DETR, with another layer norm before its heads, differently.
    return [Stage(all_logits[:-1], all_boxes[:-1]), Stage(logits[None], boxes[None])], [earlier, [""]]


def _judged(
    criterion: DetectionCriterion,
    stages: list[Stage],
    names: list[list[str]],
    labels: list[dict],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its terms, which are without their weights; and how wrong the number of objects is, no loss."""
    terms = criterion.terms(stages, labels)
    weights = {
        "loss_ce": criterion.class_loss_weight,
        "loss_bbox": criterion.bbox_loss_weight,
        "loss_giou": criterion.giou_loss_weight,
    }
    loss = sum(weights[name] * values.sum() for stage in terms for name, values in stage.items())
    counts = torch.tensor([len(label["class_labels"]) for label in labels]).to(loss, non_blocking=True)
    for stage, term in zip(stages, terms, strict=True):
        term["cardinality_error"] = _cardinality_error(stage.logits, counts, criterion.activation)
    return loss, _named(terms, names)


@torch.no_grad()
def _cardinality_error(logits: Tensor, counts: Tensor, activation: str) -> Tensor:
    """(L,) mean over images of by how many the predictions of an object differ from the objects, (B,)."""
    best = (logits[..., :-1] if activation == "softmax" else logits).amax(-1)
    found = best >= logits[..., -1] if activation == "softmax" else best > 0
    return (found.sum(2) - counts).abs().mean(1)


def rt_detr_loss(
    logits: Tensor,
    labels: list[dict],
    device: torch.device,
    pred_boxes: Tensor,
    config,
    outputs_class: Tensor | None = None,
    outputs_coord: Tensor | None = None,
    enc_topk_logits: Tensor | None = None,
    enc_topk_bboxes: Tensor | None = None,
    denoising_meta_values: dict | None = None,
    **_,
) -> Result:
    """Of RT-DETR and RT-DETRv2: layers (B, L, Q, .), in training behind denoising queries, and proposals (B, Q, .)."""
    criterion, weights = _real_time_criterion(config, VarifocalLoss(config.focal_loss_alpha, config.focal_loss_gamma))
    if not config.auxiliary_loss:
        _, found = _split(denoising_meta_values, logits[:, None], pred_boxes[:, None])
        return _weighted_result(criterion, [Stage(*found)], [[""]], labels, weights, None)
    noised, found = _split(denoising_meta_values, outputs_class, outputs_coord)
    count = outputs_class.shape[1]
    stages, names = [Stage(*found)], [[*(f"_aux_{i}" for i in range(count - 1)), ""]]
    stages.append(Stage(enc_topk_logits[None], enc_topk_bboxes[None]))
    names.append([f"_aux_{count - 1}"])
    earlier = _outputs((found[0][:-1], found[1][:-1]), (stages[1].logits, stages[1].boxes))
    if noised is not None:
        stages.append(_denoising(Stage(*noised), denoising_meta_values, labels))
        names.append([f"_dn_{i}" for i in range(count)])
    return _weighted_result(criterion, stages, names, labels, weights, earlier)


def d_fine_loss(
    logits: Tensor,
    labels: list[dict],
    device: torch.device,
    pred_boxes: Tensor,
    config,
    outputs_class: Tensor | None = None,
    outputs_coord: Tensor | None = None,
    enc_topk_logits: Tensor | None = None,
    enc_topk_bboxes: Tensor | None = None,
    denoising_meta_values: dict | None = None,
    predicted_corners: Tensor | None = None,
    initial_reference_points: Tensor | None = None,
    **_,
) -> Result:
    """Of D-FINE and DEIMv2, which predict once before the first layer and distributions of sides in each layer.

    Transformers pairs the two lists from the front: the first boxes meet the first layer's distributions, and the
    layer before the last has no loss.
    """
    if config.model_type == "deimv2":
        scale = 1 if config.mal_alpha is None else config.mal_alpha
        class_loss = MatchabilityAwareLoss(scale, config.focal_loss_gamma)
    else:
        class_loss = VarifocalLoss(config.focal_loss_alpha, config.focal_loss_gamma)
    criterion, weights = _real_time_criterion(config, class_loss)
    criterion.dense = config.model_type == "deimv2" and config.use_dense_one_to_one
    weights |= {"loss_fgl": config.weight_loss_fgl, "loss_ddf": config.weight_loss_ddf}
    criterion.side_values = _side_values(config.max_num_bins, config.up, config.reg_scale)
    _, found = _split(denoising_meta_values, logits[:, None], pred_boxes[:, None].clamp(0, 1))
    stages, names = [Stage(*found)], [[""]]
    if not config.auxiliary_loss:
        return _weighted_result(criterion, stages, names, labels, weights, None)
    parts = outputs_class, outputs_coord.clamp(0, 1), predicted_corners, initial_reference_points
    noised, found = _split(denoising_meta_values, *parts)
    # The last prediction has no distributions in the list, and the last distributions imitate nothing.
    if count := min(len(found[0]), len(found[2])) - 1:
        stages.append(_refined(*(part[:count] for part in found), last=(found[2][-1], found[0][-1])))
        names.append([f"_aux_{i}" for i in range(count)])
    stages.append(Stage(enc_topk_logits[None], enc_topk_bboxes[None].clamp(0, 1)))
    names.append([f"_aux_{count}"])
    earlier = _outputs(*((stage.logits, stage.boxes) for stage in stages[1:]))
    if noised is not None:
        count = min(len(noised[0]), len(noised[2]))
        stage = _refined(*(part[:count] for part in noised), last=(noised[2][-1], noised[0][-1]))
        stage.ends = len(noised[2]) == count
        stages.append(_denoising(stage, denoising_meta_values, labels))
        names.append([f"_dn_{i}" for i in range(count)])
    return _weighted_result(criterion, stages, names, labels, weights, earlier)


def _real_time_criterion(config, class_loss: SigmoidLoss) -> tuple[DetectionCriterion, dict[str, float]]:
    criterion = DetectionCriterion(
        "sigmoid" if config.use_focal_loss else "softmax",  # of the matching cost alone
        config.matcher_class_cost,
        config.matcher_bbox_cost,
        config.matcher_giou_cost,
        class_loss=class_loss,
        cost_alpha=config.matcher_alpha,
        cost_gamma=config.matcher_gamma,
    )
    names = (class_loss.name, "loss_bbox", "loss_giou")
    return criterion, {name: getattr(config, f"weight_{name}") for name in names}


@lru_cache
def _side_values(max_num_bins: int, up: float, reg_scale: float) -> Tensor:
    return weighting_function(max_num_bins, torch.tensor([up]), reg_scale) / abs(reg_scale)


def _split(denoising: dict | None, *parts: Tensor) -> tuple[list[Tensor] | None, list[Tensor]]:
    """Of predictions (B, L, Q, .) those of denoising queries, if there are any, and the others; layers first."""
    parts = [part.transpose(0, 1) for part in parts]
    if denoising is None:
        return None, parts
    first, _ = denoising["dn_num_split"]
    return [part[:, :, :first] for part in parts], [part[:, :, first:] for part in parts]


def _refined(logits: Tensor, boxes: Tensor, sides: Tensor, frames: Tensor, last: tuple[Tensor, Tensor]) -> Stage:
    last = last[0].unflatten(-1, (4, -1)), last[1]
    return Stage(logits, boxes, sides=sides.unflatten(-1, (4, -1)), frames=frames, last=last)


def _denoising(stage: Stage, meta: dict, labels: list[dict]) -> Stage:
    """The stage with its pairs: the positive queries of each group are those of the targets, in their order."""
    counts, groups = np.array([len(label["class_labels"]) for label in labels]), meta["dn_num_group"]
    starts = np.cumsum(counts) - counts
    target = [np.tile(np.arange(start, start + count), groups) for start, count in zip(starts, counts, strict=True)]
    image = np.repeat(np.arange(len(counts)), counts * groups)
    known = torch.from_numpy(np.stack([image * stage.logits.shape[2], np.concatenate(target)]))
    shift, target = known.to(stage.logits.device, non_blocking=True)
    stage.pairs, stage.copies = (torch.cat(meta["dn_positive_idx"]) + shift, target), groups
    return stage


def _weighted_result(
    criterion: DetectionCriterion,
    stages: list[Stage],
    names: list[list[str]],
    labels: list[dict],
    weights: dict[str, float],
    earlier: list[dict[str, Tensor]] | None,
) -> Result:
    """With terms as they enter the loss."""
    terms = [
        {name: weights[name] * values for name, values in stage.items()} for stage in criterion.terms(stages, labels)
    ]
    return sum(values.sum() for stage in terms for values in stage.values()), _named(terms, names), earlier


def _named(terms: list[dict[str, Tensor]], names: list[list[str]]) -> dict[str, Tensor]:
    """Each layer's terms by Transformers' names."""
    return {
        name + suffix: value
        for stage, suffixes in zip(terms, names, strict=True)
        for name, values in stage.items()
        for suffix, value in zip(suffixes, values.unbind(), strict=True)
    }


def _outputs(*stages: tuple[Tensor, Tensor]) -> list[dict[str, Tensor]]:
    """Logits and boxes of stages, layer by layer, as Transformers' `auxiliary_outputs` have them."""
    return [{"logits": logits, "pred_boxes": boxes} for stage in stages for logits, boxes in zip(*stage, strict=True)]


DETR_LOSS, DEFORMABLE_DETR_LOSS = (partial(detr_loss, activation=name) for name in ("softmax", "sigmoid"))
LOSSES: dict[str, Callable[..., Result]] = {  # Transformers' config.model_type -> loss
    "conditional_detr": DEFORMABLE_DETR_LOSS,
    "d_fine": d_fine_loss,
    "dab-detr": DEFORMABLE_DETR_LOSS,
    "deformable_detr": DEFORMABLE_DETR_LOSS,
    "deimv2": d_fine_loss,
    "detr": DETR_LOSS,
    "lw_detr": lw_detr_loss,
    "rf_detr": lw_detr_loss,
    "rt_detr": rt_detr_loss,
    "rt_detr_v2": rt_detr_loss,
    "table-transformer": DETR_LOSS,
    "yolos": DETR_LOSS,
}
