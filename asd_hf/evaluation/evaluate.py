from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..detectors.base import DetectorAdapter
from ..student import align_classes
from .coco import CocoEvaluator
from .predict import postprocess

TOP_K = 100  # detections kept of an image; COCO scores at most 100 of each class


@torch.no_grad()
def evaluate_detector(
    adapter: DetectorAdapter,
    loader: DataLoader,
    class_names: Sequence[str],
    category_ids: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> tuple[dict, CocoEvaluator]:
    """COCO's numbers of a detector on a data set; every rank brings its own part and all get the numbers.

    Args:
        adapter: the detector; it is put into eval mode. Its classes are aligned with the data's by name.
        loader: batches of uint8 images with labels that hold their ground truth.
        class_names: the data's, in the order of its class indices.
        category_ids: the data's own id of each class index, for result files.

    Returns:
        `CocoEvaluator.compute()`'s numbers, and the evaluator, which holds the predictions.

    Raises:
        UserError: the detector lacks a class of the data.
    """
    adapter.model.eval()
    columns = align_classes(class_names, adapter.spec.class_names, "the data", "the model").to(device)
    evaluator = CocoEvaluator(class_names, category_ids)
    for batch in tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=not progress):
        labels = batch["labels"]
        output = adapter(batch["pixel_values"].to(device), batch["pixel_mask"].to(device))
        sizes = torch.stack([label["orig_size"] for label in labels])
        predictions = postprocess(
            output.logits[-1], output.boxes[-1], sizes.to(device), adapter.spec.activation, TOP_K, columns
        )
        ids = torch.stack([label["image_id"] for label in labels])
        evaluator.add(ids, predictions, [label["ground_truth"] for label in labels], sizes)
    return evaluator.compute(), evaluator
