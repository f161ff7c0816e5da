"""Which detection found which object, as COCO matches them, and what follows for an image and for a class."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from pycocotools import mask

from .bootstrap import RECALLS
from .coco import ImageResult

IOUS = np.linspace(0.5, 0.95, 10)
NOTHING = -1  # in the place of an object's index


class Matches(NamedTuple):
    """One image: D detections, the best first, and G objects, without crowds, at T IoU thresholds.

    Attributes:
        scores, labels: (D,), of the detections.
        objects: (G,), class indices.
        ious: (D, G).
        found: (T, D), the object of each detection, or `NOTHING`.
        ignored: (T, D), true where a detection counts neither for nor against: it found a crowd of its class.
        boxes, object_boxes: (D, 4) and (G, 4), x, y, w, h in pixels of the image file.
    """

    scores: np.ndarray
    labels: np.ndarray
    objects: np.ndarray
    ious: np.ndarray
    found: np.ndarray
    ignored: np.ndarray
    boxes: np.ndarray
    object_boxes: np.ndarray


def match(image: ImageResult, thresholds: np.ndarray = IOUS, least_score: float = -np.inf) -> Matches:
    """Matches as pycocotools does, all areas, without a limit of detections.

    By falling score, each detection takes the object of its class with the highest IoU among those that are left, if
    that is at least the threshold; one that finds none may find a crowd, any number of times.

    Args:
        least_score: detections with a lower score are left out.
    """
    detections = image.predictions[image.predictions[:, 4] >= least_score]
    detections = detections[np.argsort(-detections[:, 4], kind="stable")]
    is_crowd = image.ground_truth[:, 5] != 0
    truth, crowds = image.ground_truth[~is_crowd], image.ground_truth[is_crowd]
    labels, objects = detections[:, 5].astype(np.int64), truth[:, 6].astype(np.int64)
    ious = box_ious(detections, truth)
    own = np.where(labels[:, None] == objects, ious, -1.0)
    found = np.full((len(thresholds), len(detections)), NOTHING)
    left, levels = np.ones((len(thresholds), len(objects)), bool), np.arange(len(thresholds))
    limits = np.minimum(thresholds, 1 - 1e-10)
    for row in np.flatnonzero(own.max(1, initial=-1.0) >= limits.min()):
        overlap = np.where(left, own[row], -1.0)
        best = overlap.shape[1] - 1 - overlap[:, ::-1].argmax(1)  # of equals the last, as pycocotools has it
        hit = overlap[levels, best] >= limits
        found[hit, row] = best[hit]
        left[hit, best[hit]] = False
    in_crowd = box_ious(detections, crowds, crowd=True) * (labels[:, None] == crowds[:, 6])
    ignored = (found == NOTHING) & (in_crowd.max(1, initial=-1.0) >= limits[:, None])
    return Matches(detections[:, 4], labels, objects, ious, found, ignored, detections[:, :4], truth[:, :4])


def box_ious(detections: np.ndarray, truth: np.ndarray, crowd: bool = False) -> np.ndarray:
    """(D, G) IoU of rows that begin with x, y, w, h; with `crowd` the share of the detection that is covered."""
    if not (len(detections) and len(truth)):
        return np.zeros((len(detections), len(truth)))
    sides = (np.ascontiguousarray(side[:, :4], dtype=np.float64) for side in (detections, truth))
    return mask.iou(*sides, [crowd] * len(truth))


def precisions(scores: np.ndarray, hits: np.ndarray, count: int) -> np.ndarray:
    """(101,) the best precision at each of COCO's recalls or above, 0 where none is reached.

    Args:
        scores: (D,) of the detections that count.
        hits: (D,) bool, true where one found an object.
        count: of the objects.
    """
    if not count:
        return np.zeros(len(RECALLS))
    hits = hits[np.argsort(-scores, kind="stable")].cumsum()
    best = np.zeros(len(hits) + 1)  # the last: recalls that are never reached
    best[:-1] = hits / (np.arange(1, len(hits) + 1) + np.spacing(1))
    best = np.maximum.accumulate(best[::-1])[::-1]
    return best[np.searchsorted(hits / count, RECALLS)]


def precision_curves(matches: Iterable[Matches], num_classes: int) -> np.ndarray:
    """(T, C, 101) of whole data sets; NaN for classes without objects. Its mean is COCO's AP, at IoU 0.50 AP50."""
    matches = list(matches)
    scores, labels = (np.concatenate([getattr(m, name) for m in matches]) for name in ("scores", "labels"))
    found, ignored = (np.concatenate([getattr(m, name) for m in matches], 1) for name in ("found", "ignored"))
    counts = np.bincount(np.concatenate([m.objects for m in matches]), minlength=num_classes)
    curves = np.full((len(found), num_classes, len(RECALLS)), np.nan)
    for label in np.flatnonzero(counts):
        rows = np.flatnonzero(labels == label)
        for level in range(len(found)):
            kept = rows[~ignored[level, rows]]
            curves[level, label] = precisions(scores[kept], found[level, kept] != NOTHING, counts[label])
    return curves


def image_ap(image: Matches) -> float | None:
    """AP of one image: all its detections, of whatever class, in one ranking; the mean over the IoU thresholds.

    A false alarm of a class that the image does not show counts as any other, which a mean over the classes of the
    image would miss. None without objects.
    """
    if not len(image.objects):
        return None
    levels = [
        precisions(image.scores[~ignored], found[~ignored] != NOTHING, len(image.objects)).mean()
        for found, ignored in zip(image.found, image.ignored, strict=True)
    ]
    return float(np.mean(levels))


def best_threshold(matches: Iterable[Matches]) -> float:
    """The score from which detections are to be shown for the best F1 at the first IoU threshold, over all classes.

    1 where nothing is ever found.
    """
    matches = list(matches)
    kept = [~m.ignored[0] for m in matches]
    scores = np.concatenate([m.scores[keep] for m, keep in zip(matches, kept, strict=True)])
    hits = np.concatenate([m.found[0][keep] != NOTHING for m, keep in zip(matches, kept, strict=True)])
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], hits[order].cumsum()
    if not len(hits) or not hits[-1]:
        return 1.0
    last = np.append(scores[1:] != scores[:-1], True)  # equal scores are shown together
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + sum(len(m.objects) for m in matches))
    return float(scores[np.where(last, f1, -1).argmax()])
