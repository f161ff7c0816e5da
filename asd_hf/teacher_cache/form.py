"""How a teacher's output is stored, brought back, and carried from the whole image to a crop of it.

Logits, decoder states, contents, positions and feature maps are in half precision. Boxes and references are not: it
would move a box of ten pixels in an image of a thousand by several per cent of its width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..detectors.base import DetectorOutput, DetectorSpec
from ..errors import UserError
from ..ops import cxcywh_to_xyxy, full
from ..questions import point_scores
from .manifest import Contents

HALF = ("logits", "rest", "queries", "sides", "contents", "positions")
LAYERED = ("logits", "boxes", "queries", "sides")
QUESTION = ("contents", "positions", "references")
MAP = "map_"  # and the level
LEAST_SHARE = 1e-4  # of a box within a crop: below it lies outside, and no logit falls without end


def learnt_question(output: DetectorOutput) -> dict[str, Tensor]:
    """Those of `contents` and `positions` (Q, D) that the teacher asks of every image alike, as they are stored."""
    question = zip(QUESTION[:2], output.decode.own, strict=False)
    return {name: _stored(name, x[0]) for name, x in question if x is not None and (x == x[:1]).all()}


def encode(
    output: DetectorOutput, contents: Contents, softmax: bool, learnt: Collection[str] = ()
) -> dict[str, Tensor]:
    """The tensors to store of a batch, on the CPU, each with an image a row.

    Args:
        learnt: parts of the question to leave out, because they are the same for every image.

    Returns:
        `logits` (B, L, Q, C), or of the best classes alone `logits` and `classes` (B, L, Q, M) and `rest` (B, L, Q, 1)
        (see `_keep_classes`); `boxes` (B, L, Q, 4); and, as `contents.fields` asks, `queries` (B, L, Q, D), `sides`
        (B, L, Q, 4, bins) and `side_frames` (B, Q, 4), `contents`, `positions` (B, Q, D) and `references` (B, Q, 2 or
        4), each unless the teacher asks without it; `kept` (B, Q), which queries these are, where some of the
        question is learnt and some queries are left out; and a `map_<level>` (B, D, H, W) for each of
        `contents.levels`.
    """
    layers = contents.layers
    tensors = {"logits": full(output.logits[layers]), "boxes": output.boxes[layers]}
    for name in ("queries", "sides"):
        if name in contents.fields:
            tensors[name] = getattr(output, name)[layers]
    tensors = {name: x.transpose(0, 1) for name, x in tensors.items()}
    if "sides" in contents.fields:
        tensors["side_frames"] = output.side_frames
    if "question" in contents.fields:
        question = dict(zip(QUESTION, output.decode.own, strict=True))
        tensors |= {name: x for name, x in question.items() if x is not None and name not in learnt}
    if contents.top_queries is not None:
        best = point_scores(tensors["logits"][:, -1], softmax).topk(contents.top_queries).indices.sort().values
        tensors = {name: _take_queries(x, best, name in LAYERED) for name, x in tensors.items()}
        if learnt:
            tensors["kept"] = best.to(torch.int16)
    if contents.top_classes is not None:
        tensors |= _keep_classes(tensors["logits"], contents.top_classes, softmax)
    tensors |= {f"{MAP}{level}": output.features[level] for level in contents.levels}
    return {name: _stored(name, x) for name, x in tensors.items()}


def _take_queries(x: Tensor, best: Tensor, has_layers: bool) -> Tensor:
    """Of (B, L, Q, ...) or (B, Q, ...) the queries `best` (B, K)."""
    images = torch.arange(len(best), device=best.device)[:, None]
    return x.transpose(1, 2)[images, best].transpose(1, 2) if has_layers else x[images, best]


def _keep_classes(logits: Tensor, count: int, softmax: bool) -> dict[str, Tensor]:
    """The best `count` classes of each query, "no object" beside them, and one logit for all others.

    That is the mean of theirs; of a softmax head the one that leaves them the probability that they have together.
    """
    num_classes = logits.shape[-1]
    ranked = logits
    if softmax:
        count += 1
        ranked = logits.index_fill(-1, torch.tensor([num_classes - 1], device=logits.device), torch.inf)
    classes = ranked.topk(count, dim=-1).indices
    others = num_classes - count
    if softmax:
        rest = logits.scatter(-1, classes, -torch.inf).logsumexp(-1, keepdim=True) - torch.tensor(others).log()
    else:
        rest = logits.scatter(-1, classes, 0).sum(-1, keepdim=True) / others
    classes_type = torch.uint8 if num_classes <= 256 else torch.int16
    return {"logits": logits.gather(-1, classes), "classes": classes.to(classes_type), "rest": rest}


def _stored(name: str, x: Tensor) -> Tensor:
    if name in HALF or name.startswith(MAP):
        limit = torch.finfo(torch.float16).max
        x = x.clamp(-limit, limit).half()
    elif x.is_floating_point():
        x = x.float()
    return x.detach().cpu().contiguous()


def restore(
    stored: Mapping[str, Tensor], spec: DetectorSpec, learnt: Mapping[str, Tensor], mask: Tensor | None = None
) -> DetectorOutput:
    """The output of a batch from its tensors: those of `encode` and, of predictions on whole images, `window`.

    Its decoder cannot be asked, but `decode.own` is the teacher's question. A level of `features` that was not kept is
    None.

    Args:
        learnt: what `learnt_question` gave, on the device of the batch.
        mask: the teacher's canvas, which belongs to feature maps.
    """
    tensors = {name: x if name in ("classes", "kept") else x.float() for name, x in stored.items()}
    logits = tensors["logits"]
    for name, x in learnt.items():
        kept = tensors.get("kept")
        tensors[name] = (x.expand(logits.shape[0], *x.shape) if kept is None else x[kept.long()]).float()
    if "classes" in tensors:
        num_classes = len(spec.class_names) + (spec.activation == "softmax")
        rest = tensors["rest"].expand(*logits.shape[:-1], num_classes)
        logits = rest.scatter(-1, tensors["classes"].long(), logits)
    tensors["logits"] = logits
    layered = {name: tensors[name].transpose(0, 1) if name in tensors else None for name in LAYERED}
    features = [tensors.get(f"{MAP}{level}") for level in range(len(spec.strides))]
    output = DetectorOutput(**layered, features=features, mask=mask, side_frames=tensors.get("side_frames"))
    question = tuple(tensors.get(name) for name in QUESTION)
    if "window" in tensors:
        contents, positions, references = question
        if references is not None:
            references = _carry_boxes(references, tensors["window"])
        question = contents, positions, references
        output = carry(output, tensors["window"], spec.activation == "softmax")
    if "contents" in tensors:

        def decode(*_) -> DetectorOutput:
            raise UserError("a teacher on disk answers no questions: train with itself (model.teacher_cache=null)")

        output.decode, decode.own = decode, question
    return output


def carry(output: DetectorOutput, window: Tensor, softmax: bool) -> DetectorOutput:
    """Predictions on whole images as those on a view of each: flipped, then cropped.

    Boxes are clipped to the crop, and the probability of each class is multiplied by the share of the box's area that
    is left; what is lost goes to "no object" of softmax heads. Decoder states stay as they are.

    Args:
        window: (B, 5): 1 for a flip or 0; then left, top, width and height of the crop in parts of the image.
    """
    is_cut = ((window[:, 3:] < 1).any(-1))[:, None]  # (B, 1)
    whole = torch.cat([window[:, :1], window.new_tensor([0, 0, 1, 1]).expand(len(window), 4)], 1)
    before, after = (_lengths(_corners(output.boxes, w)) for w in (whole, window))
    share = (after * window[:, None, 3:]).prod(-1) / before.prod(-1).clamp(min=torch.finfo(before.dtype).tiny)
    share = torch.where(is_cut, share.clamp(LEAST_SHARE, 1), 1)[..., None]  # (L, B, Q, 1)
    logits = output.logits
    if softmax:
        log_p = logits.log_softmax(-1)
        classes, nothing = log_p[..., :-1], log_p[..., -1:]
        lowered = torch.cat([classes + share.log(), torch.log1p(share * torch.expm1(nothing))], -1)
    else:
        log_p = F.logsigmoid(logits) + share.log()
        lowered = log_p - torch.log(-torch.expm1(log_p))
    return replace(output, logits=torch.where(share < 1, lowered, logits), boxes=_carry_boxes(output.boxes, window))


def _carry_boxes(boxes: Tensor, window: Tensor) -> Tensor:
    """Boxes (..., B, Q, 4) or points (..., B, Q, 2) of whole images in [0, 1] of their windows; crops clip them."""
    is_cut = ((window[:, 3:] < 1).any(-1))[:, None, None]
    flip, start, size = window[:, None, :1], window[:, None, 1:3], window[:, None, 3:]
    x, y = boxes[..., :1], boxes[..., 1:2]
    centre = (torch.cat([torch.where(flip > 0, 1 - x, x), y], -1) - start) / size
    if boxes.shape[-1] == 2:
        return torch.where(is_cut, centre.clamp(0, 1), centre)
    corners = _corners(boxes, window)
    clipped = torch.cat([(corners[..., :2] + corners[..., 2:]) / 2, _lengths(corners)], -1)
    return torch.where(is_cut, clipped, torch.cat([centre, boxes[..., 2:] / size], -1))


def _corners(boxes: Tensor, window: Tensor) -> Tensor:
    """(x1, y1, x2, y2) of boxes (..., B, Q, 4), in [0, 1] of their windows and clipped to them."""
    flip, start, size = window[:, None, :1], window[:, None, 1:3], window[:, None, 3:]
    centre = torch.cat([torch.where(flip > 0, 1 - boxes[..., :1], boxes[..., :1]), boxes[..., 1:2]], -1)
    corners = cxcywh_to_xyxy(torch.cat([centre, boxes[..., 2:]], -1))
    return ((corners - torch.cat([start, start], -1)) / torch.cat([size, size], -1)).clamp(0, 1)


def _lengths(corners: Tensor) -> Tensor:
    return corners[..., 2:] - corners[..., :2]
