"""Feature imitation against loops in float64."""

import pytest
import torch

from asd_hf.errors import UserError
from asd_hf.features import pair_levels
from asd_hf.methods import get_method
from asd_hf.methods.fitnet import FitNet, FitNetConfig
from tests.maps import SPEC, canvas, in_frame_of, inside, output, spec

MASK = canvas(48, 40, (48, 24), (30, 40), (3, 3))  # no cell of the last image has its centre in it
OTHER = canvas(64, 72, (64, 32), (45, 60), (56, 56))


def method(student=SPEC, teacher=SPEC, **options):
    torch.manual_seed(0)
    return FitNet(FitNetConfig(**options), student, teacher).double()


@torch.no_grad()
def reference(fitnet, student, teacher, pair):
    levels = []
    for (i, j), project in zip(pair_levels(*pair), fitnet.maps.project, strict=True):
        target, size = teacher.features[j], teacher.features[j].shape[2:]
        source = in_frame_of(student.features[i], student.mask, teacher.mask, size)
        if pair[0].hidden_size != pair[1].hidden_size or fitnet.config.always_adapt:
            source = torch.einsum("td,bdhw->bthw", project.weight[:, :, 0, 0], source) + project.bias[:, None, None]
        valid, total = inside(teacher.mask, size), 0.0
        for b in range(len(target)):
            cells = [(y, x) for y in range(size[0]) for x in range(size[1]) if valid[b][y][x]]
            of_image = [float(source[b, c, y, x] - target[b, c, y, x]) ** 2 for y, x in cells for c in range(6)]
            total += sum(of_image) / max(len(of_image), 1)
        levels.append(total / len(target))
    return sum(levels) / len(levels)


@pytest.mark.parametrize(
    ("student", "teacher", "masks", "options"),
    [
        (spec(), spec(), (MASK, MASK), {}),
        (spec(), spec(), (MASK, MASK), {"always_adapt": True, "features_weight": 3.0}),
        (spec(), spec(), (MASK, OTHER), {}),
        (spec(hidden_size=5), spec(), (MASK, MASK), {}),
        (spec(hidden_size=5, strides=(8, 16, 32)), spec(strides=(14,)), (MASK, OTHER), {"weight": 2.0}),
        (spec(strides=(16,)), spec(strides=(4, 8, 16)), (MASK, MASK), {}),
    ],
)
def test_golden(student, teacher, masks, options):
    fitnet = method(student, teacher, **options)
    ours = output(masks[0], student.strides, student.hidden_size, 1)
    theirs = output(masks[1], teacher.strides, teacher.hidden_size, 2)
    losses = fitnet(ours, theirs, [])
    weight = fitnet.config.features_weight * fitnet.config.weight
    assert list(losses) == ["fitnet_features"]
    expected = weight * reference(fitnet, ours, theirs, (student, teacher))
    assert losses["fitnet_features"].item() == pytest.approx(expected, rel=1e-9)


def test_equal_maps_have_no_loss():
    assert method()(output(MASK), output(MASK), [])["fitnet_features"] == 0
    assert method()(output(MASK), output(MASK, seed=1), [])["fitnet_features"] > 1


def test_it_starts_near_one_on_normalised_maps():
    big = canvas(640, 640, (640, 480), (400, 640))
    wide = spec(hidden_size=64)
    for student in (wide, spec(hidden_size=48)):
        ours, theirs = output(big, width=student.hidden_size, seed=1), output(big, width=64, seed=2)
        assert 0.5 < method(student, wide)(ours, theirs, [])["fitnet_features"] < 2.1


@pytest.mark.parametrize("options", [{}, {"always_adapt": True}])
def test_gradient_reaches_student_and_method_alone(options):
    fitnet = method(**options)
    student, teacher = output(MASK, seed=1), output(MASK, seed=2)
    for level in (*student.features, *teacher.features):
        level.requires_grad_()
    fitnet(student, teacher, [])["fitnet_features"].backward()
    assert all(level.grad[:2].any() for level in student.features)
    assert all(level.grad is None for level in teacher.features)
    parameters = list(fitnet.parameters())
    assert len(parameters) == (4 if options else 0) and all(p.grad.any() for p in parameters)


def test_two_ranks_are_one():
    fitnet = method()
    mask = canvas(48, 40, (48, 24), (30, 40), (10, 10), (48, 40))
    student, teacher = output(mask, seed=1), output(mask, seed=2)

    def rank(x, part):
        mine = output(mask[part])
        mine.features = [level[part] for level in x.features]
        return mine

    halves = [fitnet(rank(student, p), rank(teacher, p), []) for p in (slice(0, 2), slice(2, 4))]
    whole = fitnet(student, teacher, [])["fitnet_features"]
    torch.testing.assert_close(sum(h["fitnet_features"] for h in halves) / 2, whole)


def test_a_detector_without_maps_is_refused():
    with pytest.raises(UserError, match="fitnet needs features of the teacher, which detr cannot give"):
        method(teacher=spec(family="detr", capabilities=frozenset()))
    with pytest.raises(UserError, match="method.features_weight must be 0 or above"):
        FitNetConfig(features_weight=-1.0)


def test_registered():
    assert get_method("fitnet") is FitNet
