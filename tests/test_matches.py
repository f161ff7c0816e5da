"""Matching, error kinds and confusion, beside pycocotools and loops written from the definitions."""

from __future__ import annotations

from statistics import fmean

import numpy as np
import pytest

from asd_hf.evaluation.bootstrap import RECALLS
from asd_hf.evaluation.coco import ImageResult, score
from asd_hf.evaluation.confusion import confusion_matrix
from asd_hf.evaluation.errors import KINDS, error_kinds
from asd_hf.evaluation.matches import IOUS, best_threshold, image_ap, match, precision_curves
from tests.test_evaluation import random_image

CLASSES = 5


def random_images(seed: int, count: int = 12, ties: bool = False) -> dict[int, ImageResult]:
    """Detections near objects of the right and of wrong classes, duplicates, false alarms, crowds, empty images."""
    images = {}
    for index in range(count):
        rows, truth = random_image(100 * seed + index, CLASSES + 2, 40)
        rng, rows = np.random.default_rng(1000 * seed + index), rows.astype(np.float64)
        if not ties:
            rows[:, 4] = rng.random(len(rows))
        wrong = rng.random(len(rows)) < 0.3
        rows[wrong, 5] = rng.integers(0, CLASSES, wrong.sum())
        rows[:, :2] += rng.normal(0, 12, (len(rows), 2)) * (rng.random((len(rows), 1)) < 0.5)
        images[index] = ImageResult(rows[rows[:, 5] < CLASSES], truth, (480, 640))
    return images


def iou(one, two, crowd=False) -> float:
    (x, y, w, h), (u, v, a, b) = one[:4], two[:4]
    inside = max(0.0, min(x + w, u + a) - max(x, u)) * max(0.0, min(y + h, v + b) - max(y, v))
    return inside / (w * h if crowd else w * h + a * b - inside)


@pytest.mark.parametrize("seed", range(3))
def test_the_curves_mean_is_cocos_ap(seed):
    images = random_images(seed, ties=True)
    curves = precision_curves([match(image) for image in images.values()], CLASSES)
    stats, per_class = score(images, CLASSES)
    assert curves.shape == (len(IOUS), CLASSES, len(RECALLS))
    assert np.nanmean(curves) == pytest.approx(stats["AP"], abs=1e-12)
    assert np.nanmean(curves[0]) == pytest.approx(stats["AP50"], abs=1e-12)
    assert np.nanmean(curves[5]) == pytest.approx(stats["AP75"], abs=1e-12)
    assert np.nanmean(curves, (0, 2)) == pytest.approx(per_class, abs=1e-12)


def test_classes_without_objects_have_no_curve():
    images = {0: ImageResult(np.array([[0, 0, 9, 9, 0.5, 1.0]]), np.array([[0, 0, 9, 9, 81, 0, 0.0]]), (9, 9))}
    curves = precision_curves([match(images[0])], 2)
    assert np.isnan(curves[:, 1]).all() and not curves[:, 0].any()


def test_image_ap_counts_false_alarms_of_every_class():
    truth = np.array([[0, 0, 10, 10, 100, 0, 0.0], [50, 50, 10, 10, 100, 0, 1.0]])
    hits = np.array([[0, 0, 10, 10, 0.9, 0.0], [50, 50, 10, 10, 0.7, 1.0]])
    alarm = np.array([[80, 80, 10, 10, 0.8, 2.0]])
    perfect, alarmed = (
        image_ap(match(ImageResult(rows, truth, (99, 99)))) for rows in (hits, np.vstack([hits, alarm]))
    )
    assert perfect == 1.0
    # Of 101 recalls, 51 are reached by the first detection; from there on two of three detections are right.
    assert alarmed == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert image_ap(match(ImageResult(alarm, truth[:0], (99, 99)))) is None


@pytest.mark.parametrize("seed", range(4))
def test_the_best_threshold_has_the_best_f1(seed):
    matches = [match(image, IOUS[:1]) for image in random_images(seed, count=6, ties=seed < 2).values()]
    objects = sum(len(m.objects) for m in matches)

    def f1(least):
        shown = [(m.scores >= least) & ~m.ignored[0] for m in matches]
        hits = sum((m.found[0][keep] >= 0).sum() for m, keep in zip(matches, shown, strict=True))
        return 2 * hits / (sum(keep.sum() for keep in shown) + objects)

    scores = np.unique(np.concatenate([m.scores for m in matches]))
    assert f1(best_threshold(matches)) == max(map(f1, scores)) > min(map(f1, scores))
    assert best_threshold([match(ImageResult(np.zeros((0, 6)), np.zeros((0, 7)), (9, 9)))]) == 1.0


def naive_errors(images: dict[int, ImageResult]) -> dict[str, tuple[int, float]]:
    """TIDE's definitions, one detection at a time: counts and dAP50."""
    entries = []  # [class, score, right, kind, (class when mended, whether it then is right)]
    objects = []  # [class, found, mendable]
    for image in images.values():
        truth = [[row, False, False, None] for row in image.ground_truth if not row[5]]
        crowds = [row for row in image.ground_truth if row[5]]
        rows = sorted(image.predictions.tolist(), key=lambda row: -row[4])
        right = {}
        for number, row in enumerate(rows):
            free = [t for t in truth if not t[1] and t[0][6] == row[5] and iou(row, t[0]) >= 0.5]
            if free:
                best = max(free, key=lambda t: iou(row, t[0]))
                best[1], right[number] = True, best
        for number, row in enumerate(rows):
            if number in right:
                entries.append([row[5], row[4], True, "right", None])
                continue
            if any(c[6] == row[5] and iou(row, c, crowd=True) >= 0.5 for c in crowds):
                continue
            same = max((t for t in truth if t[0][6] == row[5]), key=lambda t: iou(row, t[0]), default=None)
            other = max((t for t in truth if t[0][6] != row[5]), key=lambda t: iou(row, t[0]), default=None)
            near_same = iou(row, same[0]) if same else 0.0
            near_other = iou(row, other[0]) if other else 0.0
            mended = None
            if 0.1 <= near_same <= 0.5:
                kind, mended = "localisation", same
            elif near_other >= 0.5:
                kind, mended = "classification", other
            elif near_same > 0.5:
                kind = "duplicate"
            elif near_other > 0.1:
                kind = "both"
            else:
                kind = "background"
            becomes = None
            if mended is not None and not mended[1]:
                becomes = (mended[0][6], not mended[2])  # only the first, the best, finds it
                mended[2] = True
            entries.append([row[5], row[4], False, kind, becomes])
        objects += [(t[0][6], t[1], t[2]) for t in truth]

    def ap50(rows, counts):
        aps = []
        for label in sorted({label for label, *_ in objects}):
            own = sorted((r for r in rows if r[0] == label), key=lambda r: -r[1])
            points, hits = [], 0
            for place, r in enumerate(own, 1):
                hits += r[2]
                points.append((hits / counts[label] if counts[label] else 0.0, hits / place))
            aps.append(fmean(max((p for recall, p in points if recall >= level), default=0.0) for level in RECALLS))
        return fmean(aps)

    counts = {label: sum(o[0] == label for o in objects) for label, *_ in objects}
    before, found = ap50(entries, counts), {}
    for kind in KINDS:
        if kind == "missed":
            lost = [o for o in objects if not o[1] and not o[2]]
            left = {label: count - sum(o[0] == label for o in lost) for label, count in counts.items()}
            found[kind] = len(lost), max(0.0, ap50(entries, left) - before)
            continue
        rows = [r for r in entries if r[3] != kind]
        rows += [[r[4][0], r[1], True] for r in entries if r[3] == kind and r[4] is not None and r[4][1]]
        found[kind] = sum(r[3] == kind for r in entries), max(0.0, ap50(rows, counts) - before)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_error_kinds_are_those_of_a_naive_loop(seed):
    images = random_images(seed)
    found = error_kinds([match(image) for image in images.values()], CLASSES)
    wanted = naive_errors(images)
    assert {kind: own.count for kind, own in found.items()} == {kind: count for kind, (count, _) in wanted.items()}
    assert [own.gain for own in found.values()] == pytest.approx([gain for _, gain in wanted.values()], abs=1e-9)
    assert all(own.count for own in found.values())


def test_each_kind_by_hand():
    truth = np.array([[0, 0, 10, 10, 100, 0, 0.0], [50, 0, 10, 10, 100, 0, 0.0], [0, 50, 10, 10, 100, 0, 1.0]])
    rows = np.array(
        [
            [0, 0, 10, 10, 0.9, 0],  # right
            [0, 1, 10, 10, 0.8, 0],  # once more: duplicate
            [50, 6, 10, 10, 0.7, 0],  # IoU 0.25: localisation
            [0, 50, 10, 10, 0.6, 2],  # another class: classification
            [0, 6, 10, 10, 0.5, 2],  # both
            [80, 80, 10, 10, 0.4, 0],  # background
        ]
    )
    found = error_kinds([match(ImageResult(rows, truth, (99, 99)))], 3)
    assert {kind: own.count for kind, own in found.items()} == dict.fromkeys(KINDS, 1) | {"missed": 0}
    missed = error_kinds([match(ImageResult(rows[:1], truth, (99, 99)))], 3)["missed"]
    assert missed.count == 2  # without them class 0 is perfect, and class 1 has nothing to find
    assert missed.gain == pytest.approx((1 - 51 / 101) / 2)
    nothing = error_kinds([match(ImageResult(rows[:0], truth[:0], (99, 99)))], 3)
    assert set(nothing.values()) == {(0, 0.0)}


def test_the_confusion_matrix_pairs_right_classes_first():
    truth = np.array([[0, 0, 10, 10, 100, 0, 0.0], [50, 0, 10, 10, 100, 0, 1.0], [0, 80, 9, 9, 81, 1, 0.0]])
    rows = np.array(
        [
            [0, 0, 10, 10, 0.9, 1],  # of another class, but the best
            [0, 1, 10, 10, 0.8, 0],  # finds the object all the same
            [50, 1, 10, 10, 0.7, 2],  # taken for another class
            [80, 80, 10, 10, 0.6, 2],  # where nothing is
            [1, 81, 5, 5, 0.5, 0],  # in a crowd: counts nowhere
            [0, 0, 10, 10, 0.1, 0],
        ]
    )
    image = ImageResult(rows, truth, (99, 99))
    counts = confusion_matrix([match(image, IOUS[:1], least_score=0.3)], 3)
    assert counts.tolist() == [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 0]]
    counts = confusion_matrix([match(image, IOUS[:1], least_score=0.95)], 3)
    assert counts[0, 3] == counts[1, 3] == counts.sum() / 2 == 1


@pytest.mark.parametrize("seed", range(2))
def test_confusion_counts_every_object_and_every_box_once(seed):
    matches = [match(image, IOUS[:1], 0.4) for image in random_images(seed, ties=True).values()]
    counts = confusion_matrix(matches, CLASSES)
    objects = np.bincount(np.concatenate([m.objects for m in matches]), minlength=CLASSES)
    boxes = np.bincount(np.concatenate([m.labels[~m.ignored[0]] for m in matches]), minlength=CLASSES)
    assert counts[:CLASSES].sum(1).tolist() == objects.tolist()
    assert counts[:, :CLASSES].sum(0).tolist() == boxes.tolist()
    right = sum((m.found[0] >= 0).sum() for m in matches)
    assert np.trace(counts) == right
