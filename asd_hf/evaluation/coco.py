"""COCO's twelve numbers, exactly: collecting over ranks, the `evaluate` metric, and the table for the terminal.

Backend: hotcoco, whose numbers are those of pycocotools bit for bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import datasets
import evaluate
import hotcoco
import numpy as np
import torch.distributed as dist
from torch import Tensor

from asd_hf.errors import UserError  # absolute: `evaluate.load` runs a copy of this file outside the package

STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


class ImageResult(NamedTuple):
    """One image's predictions and ground truth; boxes are (x, y, w, h) in pixels of the image file."""

    predictions: np.ndarray  # (K, 6): box, score, class index
    ground_truth: np.ndarray  # (G, 7): box, area, iscrowd, class index
    size: tuple[int, int]  # (height, width)


class CocoEvaluator:
    """Collects predictions and ground truth by image id, on any number of ranks, and scores them.

    It keeps the rows that it is given and nothing else: K * 48 bytes an image, where K is `postprocess`'s top_k.
    `gather` moves them to rank 0.

    Args:
        class_names: name of each class index.
        category_ids: the data's own category id of each class index, for result files; 1 to C by default.

    Attributes:
        num_images: different images gathered so far from all ranks; the same on every rank.
        images: the gathered images by id, on rank 0; empty on the others.
    """

    def __init__(self, class_names: Sequence[str], category_ids: Sequence[int] | None = None) -> None:
        self.class_names = list(class_names)
        self.category_ids = list(category_ids) if category_ids is not None else list(range(1, len(class_names) + 1))
        self.num_images = 0
        self.images: dict[int, ImageResult] = {}
        self._added: list[tuple[int, ImageResult]] = []  # on this rank, since the last `gather`

    def add(
        self,
        image_ids: Tensor,
        predictions: Tensor,
        ground_truth: Sequence[Tensor | np.ndarray],
        sizes: Tensor,
    ) -> None:
        """Takes one batch.

        Args:
            image_ids: (B,), unique over the whole split: an id that comes again is the same image and counts once.
            predictions: (B, K, 6) rows (x, y, w, h, score, class index) as `postprocess` gives them.
            ground_truth: B arrays (G, 7) of rows (x, y, w, h, area, iscrowd, class index), in the file's order.
            sizes: (B, 2), (height, width) of the image files.

        Raises:
            UserError: a prediction is not a finite number, or a class index has no name.
        """
        rows = np.array(predictions.detach().double().cpu())
        ids = image_ids.tolist()
        if not (finite := np.isfinite(rows).all((1, 2))).all():
            raise UserError(f"image {ids[finite.argmin()]}: predictions are not finite numbers: the model diverged")
        truth = [np.array(boxes, dtype=np.float64).reshape(-1, 7) for boxes in ground_truth]
        if (top := max(array[..., -1].max(initial=0) for array in (rows, *truth))) >= (known := len(self.class_names)):
            raise UserError(f"class index {top:.0f} in the batch of image {ids[0]}: the data has {known} classes")
        results = map(ImageResult, rows, truth, map(tuple, sizes.tolist()))
        self._added.extend(zip(ids, results, strict=True))

    def gather(self) -> None:
        """Brings the images of all ranks to rank 0, and their number to all. Collective: all ranks must call it.

        Raises:
            UserError: one image id names two different images; on every rank.
        """
        is_distributed, rank = _world()
        parts = [self._added]
        if is_distributed:
            parts = [None] * dist.get_world_size() if rank == 0 else None
            dist.gather_object(self._added, parts)
        self._added = []
        outcome: list[int | UserError] = [0]
        if rank == 0:
            try:
                merge(self.images, chain.from_iterable(parts))
                outcome = [len(self.images)]
            except UserError as error:  # the other ranks wait: they must hear of it
                outcome = [error]
        if is_distributed:
            dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], UserError):
            raise outcome[0]
        self.num_images = outcome[0]

    def compute(self) -> dict[str, float | dict[str, float]]:
        """Scores all images of all ranks. Collective: all ranks must call it, and all get the answer.

        Returns:
            The twelve `STATS` in 0..1, and under "per_class" the AP of each class name. -1 stands for "no such object
            in the ground truth", as in pycocotools.

        Raises:
            UserError: there is no image, or one image id names two different images.
        """
        self.gather()
        if not self.num_images:
            raise UserError("the evaluation split has no image")
        answer = [None]
        is_distributed, rank = _world()
        if rank == 0:
            stats, per_class = score(self.images, len(self.class_names))
            answer = [{**stats, "per_class": dict(zip(self.class_names, per_class, strict=True))}]
        if is_distributed:
            dist.broadcast_object_list(answer)
        return answer[0]

    def predictions(self) -> list[dict]:
        """All gathered predictions in COCO's result format, unrounded, by image id. On rank 0; others have none."""
        return [
            {
                "image_id": image_id,
                "category_id": self.category_ids[int(row[5])],
                "bbox": row[:4],
                "score": row[4],
            }
            for image_id in sorted(self.images)
            for row in self.images[image_id].predictions.tolist()
        ]

    def protocol(self, *, resolution: dict, top_k: int, source: str, split: str) -> dict:
        """How the numbers were made, to be stored beside them: numbers of unequal protocols cannot be compared.

        For rank 0: the others do not have the images.

        Args:
            resolution: the image processor's `size`.
            top_k: what `postprocess` was given.
            source: the data set's name or folder.
            split: its split.
        """
        digest = hashlib.sha256()
        for image_id in sorted(self.images):
            _, truth, size = self.images[image_id]
            digest.update(repr((image_id, size, truth.tolist())).encode())
        return {
            "source": source,
            "split": split,
            "num_images": self.num_images,
            "fingerprint": digest.hexdigest()[:16],  # of image ids, sizes and ground truth
            "resolution": dict(resolution),
            "top_k": top_k,
            "max_detections": 100,
            "score_threshold": 0.0,
            "backend": f"hotcoco {hotcoco.__version__}",
        }


def _world() -> tuple[bool, int]:
    """Whether there are several ranks, and this one's."""
    is_distributed = dist.is_available() and dist.is_initialized()
    return is_distributed, dist.get_rank() if is_distributed else 0


def merge(images: dict[int, ImageResult], results: Iterable[tuple[int, ImageResult]]) -> None:
    """Adds `results` to `images`, each image once: samplers repeat images to fill the last batch of a rank.

    Raises:
        UserError: one id names images of unequal size or ground truth.
    """
    for image_id, result in results:
        first = images.setdefault(image_id, result)
        same = first.size == result.size and np.array_equal(first.ground_truth, result.ground_truth)
        if first is not result and not same:
            raise UserError(f"image id {image_id} names two different images: ids must be unique in a split")


def coco_datasets(images: dict[int, ImageResult], num_classes: int) -> tuple[dict, dict]:
    """Ground truth and predictions as COCO writes them, for pycocotools; a class index stands for its category."""
    ids = sorted(images)
    truth, predictions = [], []
    for image_id in ids:
        for *box, area, iscrowd, label in images[image_id].ground_truth.tolist():
            truth.append({"image_id": image_id, "category_id": int(label), "bbox": box, "area": area})
            truth[-1]["iscrowd"] = int(iscrowd)
        for *box, confidence, label in images[image_id].predictions.tolist():
            predictions.append({"image_id": image_id, "category_id": int(label), "bbox": box, "score": confidence})
            predictions[-1] |= {"area": box[2] * box[3], "iscrowd": 0}
    for boxes in (truth, predictions):
        for number, box in enumerate(boxes, start=1):  # the matching marks "unmatched" by id 0
            box["id"] = number
    common = {"images": [{"id": i} for i in ids], "categories": [{"id": c} for c in range(num_classes)]}
    return common | {"annotations": truth}, common | {"annotations": predictions}


def score(images: dict[int, ImageResult], num_classes: int) -> tuple[dict[str, float], list[float]]:
    """COCO's numbers of `images`, the same as pycocotools' `COCOeval(..., "bbox")`.

    The rows go to the backend as they are, N x 100 of them in one array, and never become a dictionary a box.

    Returns:
        the twelve `STATS`, and the AP of each class index. -1 stands for "no such object in the ground truth".
    """
    ordered = [images[image_id] for image_id in sorted(images)]  # an image's number is its place: ids may be any int64
    owners, rows = _joined([image.ground_truth for image in ordered])
    truth = hotcoco.COCO.from_arrays(
        images=[{"id": number} for number in range(len(ordered))],
        categories=[{"id": label, "name": str(label)} for label in range(num_classes)],
        image_ids=owners,
        category_ids=rows[:, 6].astype(np.int64),
        boxes=rows[:, :4],
        area=rows[:, 4],
        iscrowd=rows[:, 5] != 0,
    )
    owners, rows = _joined([image.predictions for image in ordered])
    judge = hotcoco.COCOeval(truth, truth.load_res(np.column_stack([owners, rows])), "bbox")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its table
        judge.run()
    # (IoU thresholds, recalls, classes) for all areas and 100 detections
    precision = judge.eval["precision"][:, :, :, 0, -1]
    per_class = [float(p[p > -1].mean()) if (p > -1).any() else -1.0 for p in np.moveaxis(precision, 2, 0)]
    return dict(zip(STATS, map(float, judge.stats), strict=True)), per_class


def _joined(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The rows of all images, and the number of each row's image."""
    return np.repeat(np.arange(len(arrays)), [len(array) for array in arrays]), np.concatenate(arrays)


class CocoMetric(evaluate.Metric):
    """COCO's twelve numbers as an `evaluate` metric: `CocoMetric()`, or offline `evaluate.load("<this file>")`.

    Boxes are COCO's (x, y, w, h) in pixels of the image file. In several processes, `evaluate`'s own arguments
    `num_process`, `process_id` and `experiment_id` join the parts, and process 0 gets the answer. An image that
    comes twice counts once.

    Example:
        >>> metric = CocoMetric()
        >>> metric.add_batch(
        ...     predictions=[{"image_id": 7, "boxes": [[10, 10, 50, 40]], "scores": [0.9], "labels": [0]}],
        ...     references=[
        ...         {"image_id": 7, "boxes": [[10, 10, 50, 40]], "labels": [0], "area": [1500], "iscrowd": [0]}
        ...     ],
        ... )
        >>> metric.compute()["AP"]
        1.0
    """

    def _info(self) -> evaluate.MetricInfo:
        number, integer = datasets.Value("float64"), datasets.Value("int64")
        common = {"image_id": integer, "boxes": datasets.List(datasets.List(number)), "labels": datasets.List(integer)}
        return evaluate.MetricInfo(
            description="Average precision and recall of COCO's detection evaluation.",
            citation="Lin et al., Microsoft COCO: Common Objects in Context, 2014, arXiv:1405.0312",
            inputs_description=self.__doc__,
            features=datasets.Features(
                {
                    "predictions": common | {"scores": datasets.List(number)},
                    "references": common | {"area": datasets.List(number), "iscrowd": datasets.List(integer)},
                }
            ),
        )

    def _compute(self, predictions: Iterable[dict], references: Iterable[dict]) -> dict[str, float]:
        images: dict[int, ImageResult] = {}
        num_classes = 1
        for found, truth in zip(predictions, references, strict=True):
            if found["image_id"] != truth["image_id"]:
                raise UserError(f"prediction of image {found['image_id']} beside reference {truth['image_id']}")
            rows = np.column_stack([np.reshape(found["boxes"], (-1, 4)), found["scores"], found["labels"]])
            boxes = np.reshape(truth["boxes"], (-1, 4))
            boxes = np.column_stack([boxes, truth["area"], truth["iscrowd"], truth["labels"]])
            merge(images, [(truth["image_id"], ImageResult(rows, boxes, (0, 0)))])
            num_classes = max([num_classes - 1, *found["labels"], *truth["labels"]]) + 1
        return score(images, num_classes)[0]


def table_rows(results: dict[str, dict[str, float]]) -> list[list[str]]:
    """The numbers of several models as cells, header first: parameters in millions, AP as per cent, time in ms.

    Args:
        results: by model name: "parameters" (a count), the AP numbers in 0..1 and "ms_per_image". What is missing, or
            -1, is shown as "-".
    """
    columns = {"params (M)": ("parameters", 1e-6), **{name: (name, 100) for name in STATS[:6]}}
    columns["ms/image"] = ("ms_per_image", 1)
    rows = [["model", *columns]]
    for name, values in results.items():
        shown = [(values.get(key, -1), scale) for key, scale in columns.values()]
        rows.append([name, *("-" if value < 0 else f"{value * scale:.1f}" for value, scale in shown)])
    return rows


def format_table(results: dict[str, dict[str, float]]) -> str:
    """`table_rows` as one aligned table for the terminal."""
    rows = table_rows(results)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
