"""From a detector's raw answers to COCO rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..classes import match_classes
from ..detectors.base import DetectorAdapter

TOP_K = 100  # detections kept of an image; COCO scores at most 100 of each class


class Predictor:
    """Asks a detector for COCO rows, in the classes of some data.

    Args:
        adapter: the detector, on `device`; it is put into eval mode.
        class_names: the data's, in the order of its class indices; the detector's are aligned with them by name. None
            for the detector's own.
        class_map: what the detector calls a class of the data, where the names differ.

    Attributes:
        class_names: what the class indices of the rows stand for.
        lacking: those of them that the detector does not know and never predicts.

    Raises:
        UserError: the detector knows no class of the data.
    """

    def __init__(
        self,
        adapter: DetectorAdapter,
        class_names: Sequence[str] | None = None,
        class_map: Mapping[str, str] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        adapter.model.eval()
        self.adapter, self.device = adapter, device
        self.class_names, self.lacking = list(adapter.spec.class_names), []
        self._columns = self._indices = None
        if class_names is not None:
            ours, theirs = match_classes(class_names, adapter.spec.class_names, class_map, "the data", "the model")
            self.class_names = list(class_names)
            self.lacking = [name for i, name in enumerate(class_names) if i not in ours]
            self._columns, self._indices = torch.tensor(theirs, device=device), torch.tensor(ours, device=device)

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor, pixel_mask: Tensor, sizes: Tensor) -> Tensor:
        """The best `TOP_K` detections of each image, best first: (B, K, 6) float32 rows as `postprocess` has them.

        Args:
            pixel_values, pixel_mask: a padded batch, as `collate` gives it.
            sizes: (B, 2), (height, width) of the image files.
        """
        output = self.adapter(pixel_values.to(self.device), pixel_mask.to(self.device))
        activation = self.adapter.spec.activation
        sizes = sizes.to(self.device)
        rows = postprocess(output.logits[-1], output.boxes[-1], sizes, activation, TOP_K, self._columns)
        if self._indices is not None:
            rows[..., 5] = self._indices[rows[..., 5].long()].to(rows)
        return rows


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
