"""What keeps AP low: every false positive and every missed object has a kind, and each kind the AP that it costs.

After Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020, arXiv 2008.08115;
where the paper leaves a choice (the order of the tests, which of several detections a fix keeps), as in the authors'
tidecv.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from .matches import NOTHING, Matches, precisions

FOREGROUND, BACKGROUND = 0.5, 0.1  # IoU from which an object is found, and to which a box shows nothing
KINDS = {
    "classification": "a box that fits an object of another class",
    "localisation": "the right class, but an IoU between 0.1 and 0.5 with the object",
    "both": "the wrong class, and an IoU between 0.1 and 0.5",
    "duplicate": "the right class and place, but another detection found the object first",
    "background": "there is nothing of any class",
    "missed": "an object that no detection finds, nor would find with another class or a better box",
}
(CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, FALSE_ALARM, MISSED), RIGHT = range(6), -1
IGNORED = -2


class ErrorKind(NamedTuple):
    """Errors of one kind: how many, and by how much AP50 (0..1) rises when they alone are mended."""

    count: int
    gain: float


class _Judged(NamedTuple):
    """One image: kinds (D,) of its detections, the object (D,) that a mended detection would find, the missed (G,)."""

    kinds: np.ndarray
    mended: np.ndarray
    missed: np.ndarray


def error_kinds(matches: Iterable[Matches], num_classes: int) -> dict[str, ErrorKind]:
    """Errors by the `KINDS`.

    Mended means: the wrong class or box is made right, so that the detection finds its object, unless another did or
    a detection with a higher score would; the others are left out, as are "both", "duplicate" and "background";
    missed objects are not counted as objects.

    Args:
        matches: of all images, the first of whose IoU thresholds is 0.5.
        num_classes: class indices are below it.
    """
    matches = list(matches)
    judged = [_judge(m) for m in matches]
    scores, labels = (np.concatenate([getattr(m, name) for m in matches]) for name in ("scores", "labels"))
    objects = np.concatenate([m.objects for m in matches])
    first = np.cumsum([0, *(len(m.objects) for m in matches)])
    kinds, missed = (np.concatenate([getattr(j, name) for j in judged]) for name in ("kinds", "missed"))
    mended = np.concatenate(
        [np.where(j.mended == NOTHING, NOTHING, j.mended + start) for j, start in zip(judged, first, strict=False)]
    )
    counts = np.bincount(objects, minlength=num_classes)
    shown = np.flatnonzero(counts)

    def ap50(labels: np.ndarray, hits: np.ndarray, kept: np.ndarray, counts: np.ndarray) -> float:
        rows = ((kept & (labels == label), counts[label]) for label in shown)
        curves = [precisions(scores[row], hits[row], count) for row, count in rows]
        return float(np.mean(curves)) if curves else 0.0

    right, counted = kinds == RIGHT, kinds != IGNORED
    before = ap50(labels, right, counted, counts)
    found = {}
    for kind, name in enumerate(KINDS):
        own = kinds == kind
        if kind == MISSED:
            after = ap50(labels, right, counted, counts - np.bincount(objects[missed], minlength=num_classes))
            found[name] = ErrorKind(int(missed.sum()), max(0.0, after - before))
            continue
        mend = own & (mended != NOTHING)
        new_labels = np.where(mend, objects[mended], labels) if len(objects) else labels
        after = ap50(new_labels, right | mend, counted & (~own | mend), counts)
        found[name] = ErrorKind(int(own.sum()), max(0.0, after - before))  # the recalls' steps may cost a trifle
    return found


def _judge(image: Matches) -> _Judged:
    """Of one image. What is mended is one detection for an object, the best: of wrong classes and boxes together."""
    found, count = image.found[0], len(image.objects)
    kinds = np.where(found != NOTHING, RIGHT, FALSE_ALARM)
    mended = np.full(len(found), NOTHING)
    used = np.isin(np.arange(count), found)
    same = image.labels[:, None] == image.objects
    wrong = np.flatnonzero((found == NOTHING) & ~image.ignored[0]) if count else []
    best: dict[int, int] = {}  # detection by object
    for row in wrong:  # the best first
        own, others = np.where(same[row], image.ious[row], 0), np.where(same[row], 0, image.ious[row])
        if BACKGROUND <= own.max() <= FOREGROUND:
            kinds[row], target = LOCALISATION, own.argmax()
        elif others.max() >= FOREGROUND:
            kinds[row], target = CLASSIFICATION, others.argmax()
        else:
            if (own * used).max() >= FOREGROUND:
                kinds[row] = DUPLICATE
            elif image.ious[row].max() > BACKGROUND:
                kinds[row] = BOTH
            continue
        if not used[target]:
            best.setdefault(int(target), row)
    for target, row in best.items():
        mended[row] = target
    kinds[image.ignored[0]] = IGNORED
    missed = ~used
    missed[list(best)] = False
    return _Judged(kinds, mended, missed)
