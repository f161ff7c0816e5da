from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch.utils.data import DataLoader

from ..classes import short_list
from ..detectors.base import DetectorAdapter
from ..progress import tqdm
from .coco import CocoEvaluator
from .predict import Predictor

logger = logging.getLogger(__name__)


def evaluate_detector(
    adapter: DetectorAdapter,
    loader: DataLoader,
    class_names: Sequence[str],
    category_ids: Sequence[int] | None = None,
    class_map: Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> tuple[dict, CocoEvaluator]:
    """COCO's numbers of a detector on a data set; every rank brings its own part and all get the numbers.

    Args:
        adapter: the detector; it is put into eval mode. Its classes are aligned with the data's by name; those that it
            lacks it never predicts, which counts against it. They are named in the log.
        loader: batches of uint8 images with labels that hold their ground truth.
        class_names: the data's, in the order of its class indices.
        category_ids: the data's own id of each class index, for result files.
        class_map: what the detector calls a class of the data, where the names differ.

    Returns:
        `CocoEvaluator.compute()`'s numbers, with "classes_lacking" if there are any, and the evaluator, which holds
        the predictions.

    Raises:
        UserError: the detector knows no class of the data.
    """
    predictor = Predictor(adapter, class_names, class_map, device)
    if lacking := predictor.lacking:
        logger.warning(
            "the %s that is evaluated lacks %d of the %d classes of the data and finds none of them: %s",
            adapter.spec.family,
            len(lacking),
            len(class_names),
            short_list(lacking),
        )
    evaluator = CocoEvaluator(class_names, category_ids)
    for batch in tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=not progress):
        labels = batch["labels"]
        sizes = torch.stack([label["orig_size"] for label in labels])
        predictions = predictor(batch["pixel_values"], batch["pixel_mask"], sizes)
        ids = torch.stack([label["image_id"] for label in labels])
        evaluator.add(ids, predictions, [label["ground_truth"] for label in labels], sizes)
    return evaluator.compute() | ({"classes_lacking": lacking} if lacking else {}), evaluator
