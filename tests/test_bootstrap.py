from __future__ import annotations

import numpy as np
import pytest

from asd_hf.errors import UserError
from asd_hf.evaluation.bootstrap import _average_precision, _match, bootstrap_ap
from asd_hf.evaluation.coco import ImageResult, score

CLASSES = 5  # the last never occurs, and the last but one in a single image


def random_images(seed: int, detections: int, ties: bool, count: int = 24) -> dict[int, ImageResult]:
    """Ground truth is the same for all seeds, with crowds and images without objects; some images have no prediction.

    Without `ties`, all scores differ; with them, they tie within and between images.
    """
    images = {}
    for image_id in np.random.default_rng(7).permutation(1000)[:count].tolist():
        rng = np.random.default_rng(image_id)
        objects = int(rng.integers(0, 9))
        boxes = np.column_stack([rng.uniform(0, 300, (objects, 2)), rng.uniform(10, 150, (objects, 2))])
        labels = rng.integers(0, CLASSES - 2, objects)
        if not any((image.ground_truth[:, 6] == CLASSES - 2).any() for image in images.values()):
            labels[:1] = CLASSES - 2
        truth = np.column_stack([boxes, boxes[:, 2:].prod(1), rng.random(objects) < 0.2, labels])
        rng = np.random.default_rng([seed, image_id])
        found = np.column_stack([rng.uniform(0, 300, (detections, 2)), rng.uniform(10, 150, (detections, 2))])
        found = np.column_stack([found, rng.random(detections), rng.integers(0, CLASSES, detections)])
        near = rng.random(detections) < (0.6 if objects else 0)
        chosen = rng.integers(0, max(objects, 1), detections)[near]
        found[near, :4] = boxes[chosen] + rng.normal(0, 5, (near.sum(), 4))
        found[near, 5] = labels[chosen]
        if ties:
            found[:, 4] = found[:, 4].round(1)
        images[image_id] = ImageResult(found[: 0 if image_id % 7 == 0 else None], truth, (480, 640))
    return images


@pytest.mark.parametrize("detections", [30, 400])
def test_each_image_once_is_the_score(detections):
    images = random_images(0, detections, ties=True)
    counts = [np.bincount(image.predictions[:, 5].astype(int), minlength=1).max() for image in images.values()]
    assert (max(counts) > 100) == (detections == 400) and min(counts) == 0
    assert min(len(image.ground_truth) for image in images.values()) == 0
    expected = score(images, CLASSES)[0]["AP"]
    assert 0.1 < expected < 0.9
    assert _average_precision(_match(images, CLASSES), np.ones(len(images), int)) == pytest.approx(expected, abs=1e-12)


def test_a_replicate_is_the_score_of_copied_images():
    draws = np.random.default_rng(3).multinomial(24, [1 / 24] * 24, size=6)
    for model, detections in ((1, 30), (2, 20)):  # two models, the same draws
        images = random_images(model, detections, ties=False)
        rare = [(images[i].ground_truth[:, 6] == CLASSES - 2).any() for i in sorted(images)]
        assert 0 < np.count_nonzero(draws[:, rare]) < 6  # a class is absent from some resamples
        expected = []
        for weights in draws:
            drawn = np.repeat(sorted(images), weights).tolist()
            expected.append(score({n: images[i] for n, i in enumerate(drawn)}, CLASSES)[0]["AP"])
        assert np.ptp(expected) > 0.01
        assert bootstrap_ap(images, CLASSES, 6, seed=3) == pytest.approx(expected, abs=1e-9)


def test_values_of_one_number_are_of_one_resample():
    images = random_images(1, 30, ties=False)
    values = bootstrap_ap(images, CLASSES, 8)
    assert values.shape == (8,) and values.dtype == np.float64
    assert (bootstrap_ap(images, CLASSES, 3) == values[:3]).all()
    assert (bootstrap_ap(dict(reversed(images.items())), CLASSES, 8) == values).all()
    assert (bootstrap_ap(images, CLASSES, 8, seed=1) != values).all()


def test_a_perfect_model_is_perfect_in_all_replicates():
    images = {}
    for image_id, (_, truth, size) in random_images(1, 0, ties=False).items():
        found = np.column_stack([truth[:, :4], np.ones(len(truth)), truth[:, 6]])
        images[image_id] = ImageResult(found, truth, size)
    assert bootstrap_ap(images, CLASSES, 20) == pytest.approx(1, abs=1e-12)


def test_without_objects():
    images = random_images(1, 30, ties=False)
    empty = {i: image._replace(ground_truth=np.zeros((0, 7))) for i, image in images.items()}
    assert (bootstrap_ap(empty, CLASSES, 4) == -1).all()
    with_object = next(i for i in images if len(images[i].ground_truth))
    values = bootstrap_ap(empty | {with_object: images[with_object]}, CLASSES, 20)
    assert 0 < np.count_nonzero(values == -1) < 20  # drawn by some resamples only
    with pytest.raises(UserError, match="no image"):
        bootstrap_ap({}, CLASSES)
