"""COCO's numbers of made-up detections: ours side by side with pycocotools, from the same arrays."""

from __future__ import annotations

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..evaluation.coco import STATS, ImageResult, coco_datasets, score
from .sidebyside import Row, seconds, take_turns

SIZE = (480, 640)  # (height, width) of every image, as most of COCO's
OBJECTS, CROWDS = 7.3, 0.012  # an image, and their share: as COCO's val2017
WARM_UP_IMAGES = 20


def make_detections(
    num_images: int, num_detections: int, num_classes: int = 80, seed: int = 0
) -> dict[int, ImageResult]:
    """Objects like COCO's, and what a detector of middling skill makes of them, best score first.

    Classes are of unequal frequency, sides log-normal; two detections an object lie near it and have scores of their
    own, the others lie anywhere with low ones.
    """
    rng, images = np.random.default_rng(seed), {}
    extent = np.array(SIZE[::-1])

    def boxes(count: int) -> np.ndarray:
        sides = np.exp(rng.normal(4.2, 1.0, (count, 2))).clip(4, extent)
        return np.column_stack([rng.random((count, 2)) * (extent - sides), sides])

    for image_id in range(1, num_images + 1):
        count = int(rng.poisson(OBJECTS))
        objects, labels = boxes(count), (rng.zipf(1.4, count) - 1) % num_classes
        area = objects[:, 2:].prod(1) * rng.uniform(0.4, 1, count)  # of a mask
        truth = np.column_stack([objects, area, rng.random(count) < CROWDS, labels])
        found, classes = boxes(num_detections), rng.integers(0, num_classes, num_detections)
        scores = rng.beta(0.5, 6, num_detections)
        near = min(2 * count, num_detections)
        chosen = rng.permutation(2 * count)[:near] // 2
        found[:near] = objects[chosen] * rng.normal(1, 0.08, (near, 4))
        classes[:near], scores[:near] = labels[chosen], rng.beta(2, 2, near)
        rows = np.column_stack([found, scores, classes])[np.argsort(-scores)]
        # A detector's answers are float32
        images[image_id] = ImageResult(rows.astype(np.float32).astype(np.float64), truth, SIZE)
    return images


def pycocotools_score(images: dict[int, ImageResult], num_classes: int) -> tuple[dict[str, float], list[float]]:
    """What `score` gives, by pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        sides = [COCO(), COCO()]
        for side, dataset in zip(sides, coco_datasets(images, num_classes), strict=True):
            side.dataset = dataset
            side.createIndex()
        judge = COCOeval(*sides, "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    precision = judge.eval["precision"][:, :, :, 0, -1]
    per_class = [float(p[p > -1].mean()) if (p > -1).any() else -1.0 for p in np.moveaxis(precision, 2, 0)]
    return dict(zip(STATS, map(float, judge.stats), strict=True)), per_class


def measure_evaluation(num_images: int, num_detections: int, rounds: int, num_classes: int = 80) -> tuple[Row, float]:
    """The time of both evaluations, and the largest difference among the twelve numbers and the classes' AP."""
    images = make_detections(num_images, num_detections, num_classes)
    few = {image_id: images[image_id] for image_id in list(images)[:WARM_UP_IMAGES]}
    sides, numbers = {"ours": score, "pycocotools": pycocotools_score}, {}

    def timed(name: str) -> float:
        return seconds(lambda: numbers.__setitem__(name, sides[name](images, num_classes)))

    for side in sides.values():
        side(few, num_classes)
    # pycocotools takes a minute or more for what it takes whole: a round to warm up would double that
    times = take_turns({name: lambda name=name: timed(name) for name in sides}, rounds, warm_up=0)
    ours, theirs = (np.array([*numbers[name][0].values(), *numbers[name][1]]) for name in sides)
    name = f"COCO evaluation, {num_images} images x {num_detections} detections"
    return Row.of(name, times["ours"], times["pycocotools"], "cpu"), float(abs(ours - theirs).max())
