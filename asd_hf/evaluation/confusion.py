"""Which class is taken for which."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .matches import NOTHING, Matches

IOU = 0.5  # from which a detection is of an object of another class


def confusion_matrix(matches: Iterable[Matches], num_classes: int) -> np.ndarray:
    """(C + 1, C + 1) counts: the class of the object by the class of the detection; the last of both is "nothing".

    Detections that found an object of their class at the first IoU threshold come first; then each of the others, by
    falling score, takes the object with the highest IoU of those that are left, whatever its class. Detections of
    crowds count nowhere.

    Args:
        matches: of all images, of the detections that shall be counted alone (`match`'s `least_score`), at one
            threshold.
        num_classes: class indices are below it.
    """
    counts = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    for image in matches:
        found, ignored = image.found[0], image.ignored[0]
        left = ~np.isin(np.arange(len(image.objects)), found)
        partner = found.copy()
        for row in np.flatnonzero((found == NOTHING) & ~ignored):
            overlap = np.where(left, image.ious[row], -1.0)
            if overlap.max(initial=-1.0) >= IOU:
                partner[row] = overlap.argmax()
                left[partner[row]] = False
        classes = np.append(image.objects, num_classes)[partner]  # NOTHING is -1: the last
        np.add.at(counts, (classes[~ignored], image.labels[~ignored]), 1)
        np.add.at(counts, (image.objects[left], num_classes), 1)
    return counts
