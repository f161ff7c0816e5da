from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from asd_hf.data.shapes import CLASS_NAMES, _contrasting, make_shapes, render
from asd_hf.errors import UserError


def test_an_image_depends_on_seed_split_and_index_alone(tmp_path):
    make_shapes(tmp_path / "a", num_train=6, num_val=2, seed=5, progress=False)
    make_shapes(tmp_path / "b", num_train=3, num_val=4, seed=5, progress=False)
    make_shapes(tmp_path / "c", num_train=1, num_val=1, seed=6, progress=False)
    read = lambda folder, name: (tmp_path / folder / name).read_bytes()  # noqa: E731
    for name in ("train/000000.jpg", "train/000002.jpg", "val/000001.jpg"):
        assert read("a", name) == read("b", name)
    assert read("a", "train/000000.jpg") != read("a", "val/000000.jpg")
    assert read("a", "train/000000.jpg") != read("c", "train/000000.jpg")
    annotations = [json.loads(read(f, "annotations/instances_train.json"))["annotations"] for f in "ab"]
    assert annotations[1] == [a for a in annotations[0] if a["image_id"] <= 3]


def test_the_data_set_has_what_coco_has():
    images = [render(128, np.random.default_rng([0, 0, i])) for i in range(600)]
    objects = [o for _, found in images for o in found]
    areas = np.array([w * h for _, (_, _, w, h), crowd in objects if not crowd])
    assert {category for category, _, _ in objects} == set(range(len(CLASS_NAMES)))
    assert all(x >= 0 and y >= 0 and x + w <= 128 and y + h <= 128 for _, (x, y, w, h), _ in objects)
    assert (areas < 32**2).sum() > 300 and (areas >= 96**2).sum() > 10
    assert 0.01 < sum(crowd for *_, crowd in objects) / 600 < 0.06
    assert 0.01 < sum(not found for _, found in images) / 600 < 0.06
    assert max(len(found) for _, found in images) == 4


def test_boxes_fit_the_visible_shapes():
    # a box is tight on what can be seen: without noise, cutting one pixel off any side cuts the object
    for index in range(40):
        pixels, objects = render(128, np.random.default_rng([1, 0, index]))
        for _, (x, y, w, h), _ in objects[-1:]:  # the last one painted lies on top
            ring = np.concatenate(
                [
                    pixels[max(0, y - 4) : y, x : x + w].reshape(-1, 3),
                    pixels[y + h : y + h + 4, x : x + w].reshape(-1, 3),
                ]
            )
            inside = pixels[y + h // 2 - 1 : y + h // 2 + 1, x + w // 2 - 1 : x + w // 2 + 1].reshape(-1, 3)
            if len(ring):
                assert np.abs(np.median(inside, 0) - np.median(ring, 0)).sum() > 25


def test_a_folder_that_is_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        make_shapes(tmp_path, num_train=1, num_val=1, progress=False)
    with pytest.raises(UserError, match="at least one image"):
        make_shapes(tmp_path / "new", num_train=0, progress=False)


def test_images_are_of_the_stated_size(tmp_path):
    make_shapes(tmp_path / "s", num_train=2, num_val=1, image_size=48, progress=False)
    entry = json.loads((tmp_path / "s/annotations/instances_train.json").read_text())["images"][0]
    with Image.open(tmp_path / "s/train" / entry["file_name"]) as image:
        assert image.size == (entry["width"], entry["height"]) == (48, 48)


def test_images_can_be_made_harder():
    crowded = [render(128, np.random.default_rng([0, 0, i]), max_objects=8)[1] for i in range(60)]
    assert 4 < max(map(len, crowded)) <= 8
    least = {}
    for contrast in (30, 250):
        rng = np.random.default_rng(0)
        grounds = rng.integers(0, 256, (200, 3)).astype(np.float32)
        least[contrast] = min(np.abs(_contrasting(ground, contrast, rng) - ground).sum() for ground in grounds)
    assert 30 < least[30] < 110 and 250 < least[250] < 300


def test_a_contrast_that_no_colour_has_is_refused(tmp_path):
    with pytest.raises(UserError, match="contrast 400 is not to be had before every ground: at most 300"):
        make_shapes(tmp_path / "s", num_train=1, num_val=1, contrast=400)
