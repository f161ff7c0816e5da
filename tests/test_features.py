"""Maps of two detectors in one frame, and objects on them, against loops in float64."""

import math

import pytest
import torch

from asd_hf.features import AlignedMaps, cell_boxes, covered_cells, map_distance, pair_levels, valid_cells
from asd_hf.targets import pad_labels
from tests.maps import SPEC, canvas, in_frame_of, inside, output, spec

# -- levels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "pairs"),
    [
        ((8, 16, 32, 64), (8, 16, 32, 64), [(0, 0), (1, 1), (2, 2), (3, 3)]),
        ((8, 16, 32), (16, 32, 64), [(1, 0), (2, 1)]),  # those that both have, and no other
        ((32,), (8, 16, 32, 64), [(0, 2)]),
        ((8, 16, 32), (32,), [(2, 0)]),
        ((16,), (8, 32, 64), [(0, 0)]),  # as near to 8 as to 32: the finer one
        ((14,), (8, 16, 32), [(0, 1)]),
        ((8, 16, 32), (14,), [(1, 0)]),
        ((8, 16, 32), (14, 28), [(1, 0), (2, 1)]),
        ((12,), (8, 16), [(0, 1)]),  # as a ratio
        ((8, 16), (14, 40), [(0, 0), (1, 0)]),  # of as many levels, the student's
        ((4,), (64,), [(0, 0)]),
    ],
)
def test_levels_are_paired_by_stride(ours, theirs, pairs):
    assert pair_levels(spec(strides=ours), spec(strides=theirs)) == pairs


# -- aligned maps -----------------------------------------------------------------------------------------------------


def test_one_view_of_one_width_is_left_as_it_is():
    mask = canvas(48, 40, (48, 24), (30, 40))
    student, teacher = output(mask, seed=1), output(mask, seed=2)
    maps = AlignedMaps(SPEC, SPEC)
    assert not list(maps.parameters())
    for level, (source, target, valid) in enumerate(maps(student, teacher)):
        wanted = torch.tensor(inside(mask, source.shape[2:])).double()[:, None]
        assert torch.equal(valid, wanted) and 0 < valid.mean() < 1
        assert torch.equal(source, student.features[level] * wanted)
        assert torch.equal(target, teacher.features[level] * wanted)


@pytest.mark.parametrize("always", [False, True])
def test_widths_meet_in_a_convolution_of_each_level(always):
    mask = canvas(48, 40, (48, 24), (30, 40))
    width = 6 if always else 5
    student, teacher = output(mask, width=width, seed=1), output(mask, seed=2)
    maps = AlignedMaps(spec(hidden_size=width), SPEC, always=always).double()
    for level, (source, _, valid) in enumerate(maps(student, teacher)):
        weight, bias = maps.project[level].weight[:, :, 0, 0], maps.project[level].bias
        wanted = torch.einsum("td,bdhw->bthw", weight, student.features[level]) + bias[:, None, None]
        torch.testing.assert_close(source, wanted * valid)


@pytest.mark.parametrize(
    ("ours", "theirs", "strides"),
    [
        # The same images, larger for the teacher, and its canvas padded further.
        (canvas(48, 40, (48, 24), (30, 40)), canvas(80, 96, (72, 36), (45, 60)), ((8, 16), (8, 16))),
        # The teacher's canvas is a square into which the image was stretched.
        (canvas(48, 40, (48, 24), (30, 40)), canvas(64, 64, (64, 64), (64, 64)), ((8, 16), (8, 16))),
        # Canvases of one size, which the images fill by different parts.
        (canvas(48, 40, (48, 24), (30, 40)), canvas(48, 40, (40, 20), (33, 40)), ((8, 16), (8, 16))),
        # One view, other strides.
        (canvas(48, 40, (48, 24), (30, 40)), None, ((8, 16), (14,))),
        (canvas(48, 40, (48, 24), (30, 40)), canvas(56, 56, (56, 28), (35, 47)), ((8, 16), (14,))),
    ],
)
def test_maps_of_two_views_meet_in_the_frame_of_the_image(ours, theirs, strides):
    theirs = ours if theirs is None else theirs
    student, teacher = output(ours, strides[0], seed=1), output(theirs, strides[1], seed=2)
    pair = spec(strides=strides[0]), spec(strides=strides[1])
    maps = AlignedMaps(*pair)(student, teacher)
    assert len(maps) == len(pair_levels(*pair))
    for (source, target, valid), (i, j) in zip(maps, pair_levels(*pair), strict=True):
        size = teacher.features[j].shape[2:]
        wanted = torch.tensor(inside(theirs, size)).double()[:, None]
        assert torch.equal(valid, wanted)
        assert torch.equal(target, teacher.features[j] * wanted)
        torch.testing.assert_close(source, in_frame_of(student.features[i], ours, theirs, size) * wanted)


def test_what_is_one_for_image_is_one_for_both():
    """A picture that is the sum of its coordinates in the image reads the same in every view."""
    ours, theirs = canvas(64, 64, (64, 48), (40, 64)), canvas(96, 128, (96, 72), (60, 96))

    def ramp(mask):
        picture = output(mask, (8, 16), 1)
        for level in picture.features:
            height, width = level.shape[2:]
            for b in range(2):
                for i in range(height):
                    for j in range(width):
                        y = (i + 0.5) / height * mask.shape[1] / mask[b, :, 0].sum()
                        x = (j + 0.5) / width * mask.shape[2] / mask[b, 0].sum()
                        level[b, 0, i, j] = y + 2 * x
        return picture

    one = spec(hidden_size=1)
    for source, target, valid in AlignedMaps(one, one)(ramp(ours), ramp(theirs)):
        # At the outermost cells the other map ends half a cell earlier.
        inner = valid.bool() & (torch.nn.functional.avg_pool2d(valid, 3, 1, 1) > 0.99)
        assert inner.any()
        torch.testing.assert_close(source[inner], target[inner])


def test_maps_are_in_full_precision_and_only_the_student_has_gradient():
    mask = canvas(32, 32, (32, 24))
    student, teacher = output(mask, width=5, dtype=torch.bfloat16), output(mask, dtype=torch.bfloat16)
    maps = AlignedMaps(spec(hidden_size=5), SPEC)
    for level in (*student.features, *teacher.features):
        level.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        levels = maps(student, teacher)
    for one, other in zip(levels, maps(student, teacher), strict=True):
        assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(one, other, strict=True))
    assert not any(target.requires_grad for _, target, _ in levels)
    sum(source.square().sum() for source, _, _ in levels).backward()
    assert all(level.grad.any() for level in student.features)
    assert all(p.grad.any() for p in maps.parameters())


def test_distance_is_a_mean_over_what_each_image_has():
    mask = canvas(48, 40, (48, 24), (30, 40), (3, 3))  # the last image has no cell
    size = (6, 5)
    g = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 3, 6, *size, generator=g, dtype=torch.float64)
    valid, expected = inside(mask, size), 0.0
    for b in range(3):
        cells = [(i, j) for i in range(size[0]) for j in range(size[1]) if valid[b][i][j]]
        total = sum(float(one[b, c, i, j] - other[b, c, i, j]) ** 2 for i, j in cells for c in range(6))
        expected += total / (6 * len(cells)) / 3 if cells else 0
    assert not any(any(row) for row in valid[2])
    distance = map_distance(one, other, valid_cells(mask, size).double())
    assert distance.item() == pytest.approx(expected, rel=1e-12)


# -- objects ----------------------------------------------------------------------------------------------------------

BOXES = torch.tensor(
    [[0.5, 0.5, 0.31, 0.23], [0.9, 0.1, 0.2, 0.2], [0.33, 0.71, 0.0, 0.0], [0.5, 0.5, 1.2, 1.0]], dtype=torch.float64
)


def test_boxes_in_cells():
    mask = canvas(48, 40, (48, 24), (30, 40))
    corners = cell_boxes(torch.stack([BOXES, BOXES.flip(0)]), mask, (6, 5))
    for b, (boxes, (h, w)) in enumerate(((BOXES, (48, 24)), (BOXES.flip(0), (30, 40)))):
        for box, corner in zip(boxes.tolist(), corners[b].tolist(), strict=True):
            cx, cy, bw, bh = box
            pixels = [(cx - bw / 2) * w, (cy - bh / 2) * h, (cx + bw / 2) * w, (cy + bh / 2) * h]
            wanted = [p * n / side for p, n, side in zip(pixels, (5, 6, 5, 6), (40, 48, 40, 48), strict=True)]
            assert corner == pytest.approx(wanted, abs=1e-12)


def test_cells_that_boxes_touch():
    g = torch.Generator().manual_seed(0)
    centre, size = 5 * torch.rand(2, 20, 2, generator=g), 4 * torch.rand(2, 20, 2, generator=g)
    corners = torch.cat([centre - size / 2, centre + size / 2], -1)
    corners[0, :4] = torch.tensor([[1.0, 2, 3, 4], [2.5, 2.5, 2.5, 2.5], [2, 2, 2, 2], [0, 1.2, 0, 3.7]])
    covered = covered_cells(corners, (6, 5))
    for b in range(2):
        for k, (x1, y1, x2, y2) in enumerate(corners[b].tolist()):
            columns = range(math.floor(x1), max(math.ceil(x2), math.floor(x1) + 1))
            rows = range(math.floor(y1), max(math.ceil(y2), math.floor(y1) + 1))
            wanted = [[i in rows and j in columns for j in range(5)] for i in range(6)]
            assert covered[b, k].tolist() == wanted
    assert covered[0, :4].sum((1, 2)).tolist() == [4, 1, 1, 3]


# -- the ground truth -------------------------------------------------------------------------------------------------


def label(*classes):
    return {
        "class_labels": torch.tensor(classes, dtype=torch.int64),
        "boxes": torch.arange(4.0 * len(classes)).reshape(-1, 4) + 1,
        "image_id": torch.tensor(7),
    }


def test_labels_are_padded():
    classes, boxes, there = pad_labels([label(2, 0, 2), label(), label(4)])
    assert classes.tolist() == [[2, 0, 2], [0, 0, 0], [4, 0, 0]]
    assert there.tolist() == [[True, True, True], [False] * 3, [True, False, False]]
    assert boxes[0].tolist() == label(2, 0, 2)["boxes"].tolist() and boxes[2, 0].tolist() == [1, 2, 3, 4]
    assert not boxes[1].any() and not boxes[2, 1:].any()


def test_no_labels_at_all_leave_an_empty_place():
    classes, boxes, there = pad_labels([label(), label()])
    assert classes.tolist() == [[0], [0]] and boxes.shape == (2, 1, 4) and not boxes.any()
    assert there.dtype == torch.bool and there.tolist() == [[False], [False]]
    assert classes.dtype == torch.int64
