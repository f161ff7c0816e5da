from __future__ import annotations

from typing import Any

import torch
from transformers import DeformableDetrImageProcessor
from transformers.models.deformable_detr.image_processing_deformable_detr import DeformableDetrImageProcessorKwargs


class AdaMixerImageProcessor(DeformableDetrImageProcessor):
    """Deformable DETR's, with the boxes of labels relative to the valid image, as the model has its own.

    Deformable DETR's makes them relative to the padded canvas, but takes those of predictions as relative to the
    valid image.
    """

    valid_kwargs = DeformableDetrImageProcessorKwargs

    def pad(
        self,
        image: torch.Tensor,
        padded_size: tuple[int, int],
        annotation: dict[str, Any] | list[dict[str, Any]] | None = None,
        update_bboxes: bool = True,
        fill: int = 0,
    ):
        return super().pad(image, padded_size, annotation, update_bboxes=False, fill=fill)

    def post_process_object_detection(
        self, outputs, threshold: float = 0.5, target_sizes=None, top_k: int | None = None
    ) -> list[dict[str, torch.Tensor]]:
        """Scores, labels and boxes (x1, y1, x2, y2) of each image, best first.

        Args:
            outputs: of `AdaMixerForObjectDetection`.
            threshold: least score.
            target_sizes: (height, width) of each image, in whose pixels the boxes then are; None: in [0, 1].
            top_k: the best so many pairs of a query and a class; default: as many as there are queries. A query may
                have several classes.
        """
        top_k = outputs.logits.shape[1] if top_k is None else top_k
        return super().post_process_object_detection(outputs, threshold, target_sizes, top_k)


__all__ = ["AdaMixerImageProcessor"]
