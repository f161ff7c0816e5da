"""COCO's AP on resamples of the images: each image is matched once, a resample only counts its detections anew."""

from __future__ import annotations

import contextlib
import io
from typing import NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..errors import UserError
from .coco import ImageResult, coco_datasets

RECALLS = np.linspace(0, 1, 101)


class _ClassMatches(NamedTuple):
    """One class at T IoU thresholds: D detections in all N images, in the order of falling score."""

    image: np.ndarray  # (D,): index of each detection's image
    rows: np.ndarray  # (S,): detections that are a hit or ignored at some threshold; the others never are
    hits: np.ndarray  # (T, S): matched with an object
    ignored: np.ndarray  # (T, S): matched with a crowd
    objects: np.ndarray  # (N,): objects in each image, without crowds


def bootstrap_ap(images: dict[int, ImageResult], num_classes: int, replicates: int = 500, seed: int = 0) -> np.ndarray:
    """AP (IoU .50:.95, all areas, 100 detections) of resamples: as many images as there are, drawn with replacement.

    The draws depend on `seed` and the number of images alone (and on the version of NumPy): the r-th values of two
    models that were scored on the same images are of the same resample, however many replicates each has, and may be
    subtracted.

    Args:
        images: predictions and ground truth by image id.
        num_classes: class indices are below it.
        replicates: number of resamples, R.
        seed: of the draws.

    Returns:
        (R,) float64 in 0..1, each the mean over the classes that the resample has objects of; -1 where it has none.
        What pycocotools would give for a data set with copies of the images; where scores tie, their order is that of
        the image ids, and copies of one detection stay together.

    Raises:
        UserError: there is no image.
    """
    if not images:
        raise UserError("the evaluation split has no image")
    matches = _match(images, num_classes)
    rng, share = np.random.default_rng(seed), np.full(len(images), 1 / len(images))
    draws = (rng.multinomial(len(images), share) for _ in range(replicates))  # one at a time: (R, N) may be large
    return np.fromiter((_average_precision(matches, weights) for weights in draws), np.float64, replicates)


def _match(images: dict[int, ImageResult], num_classes: int) -> list[_ClassMatches]:
    """Matches as pycocotools does, and sorts as it does. Classes without objects are left out: they have no AP."""
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        sides = [COCO(), COCO()]
        for side, dataset in zip(sides, coco_datasets(images, num_classes), strict=True):
            side.dataset = dataset
            side.createIndex()
        judge = COCOeval(*sides, "bbox")
        judge.params.areaRng, judge.params.maxDets = judge.params.areaRng[:1], [100]  # all areas alone
        judge.evaluate()

    matches, count = [], len(images)
    for start in range(0, num_classes * count, count):
        found = [(i, e) for i, e in enumerate(judge.evalImgs[start : start + count]) if e is not None]
        objects = np.zeros(count, np.int64)
        for i, e in found:
            objects[i] = np.count_nonzero(e["gtIgnore"] == 0)
        if not objects.any():
            continue
        order = np.argsort(-np.concatenate([e["dtScores"] for _, e in found]), kind="mergesort")
        image = np.repeat([i for i, _ in found], [len(e["dtScores"]) for _, e in found])[order]
        ignored = np.concatenate([e["dtIgnore"] for _, e in found], axis=1)[:, order]
        hits = (np.concatenate([e["dtMatches"] for _, e in found], axis=1)[:, order] > 0) & ~ignored
        rows = np.flatnonzero((hits | ignored).any(0))
        matches.append(_ClassMatches(image, rows, hits[:, rows], ignored[:, rows], objects))
    return matches


def _average_precision(matches: list[_ClassMatches], weights: np.ndarray) -> float:
    """AP when the i-th image counts `weights[i]` times, an (N,) array of integers; -1 without objects.

    Only the points of the curve at `rows` are computed, and one for all copies of a detection. The others cannot
    matter: a point is read for a recall (the first that reaches it) and for the best precision from there on. A false
    alarm, an ignored detection or one of weight 0 leaves the recall as it is and does not raise the precision, so that
    the point before it serves as well; before the first hit, precision is 0. The copies of a hit raise precision and
    recall one after the other, so that the last of them serves for all.
    """
    per_class = []
    for image, rows, hits, ignored, objects in matches:
        if not (total := weights @ objects):
            continue
        counts = weights[image]
        hit = (counts[rows] * hits).cumsum(1)
        seen = counts.cumsum()[rows] - (counts[rows] * ignored).cumsum(1)
        best = np.zeros((len(hits), len(rows) + 1))  # the last column: recalls that are never reached
        best[:, :-1] = hit / (seen + np.spacing(1))
        best = np.maximum.accumulate(best[:, ::-1], axis=1)[:, ::-1]
        points = [np.searchsorted(recall, RECALLS) for recall in hit / total]
        per_class.append(np.take_along_axis(best, np.stack(points), 1).mean())
    return float(np.mean(per_class)) if per_class else -1.0
