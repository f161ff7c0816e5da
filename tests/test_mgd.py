"""Masked generation against loops in float64, and the noise that masks are made of."""

import math

import pytest
import torch

from asd_hf.errors import UserError
from asd_hf.features import pair_levels
from asd_hf.methods import get_method
from asd_hf.methods.mgd import MGD, MGDConfig
from asd_hf.ops import uniform_noise
from tests.maps import SPEC, canvas, in_frame_of, inside, output, spec

MASK = canvas(48, 40, (48, 24), (30, 40))
OTHER = canvas(64, 72, (64, 32), (45, 60))
LABELS = [{"image_id": torch.tensor(7)}, {"image_id": torch.tensor(123_456_789_012)}]


def method(student=SPEC, teacher=SPEC, step=5, **options):
    torch.manual_seed(0)
    mgd = MGD(MGDConfig(**options), student, teacher).double()
    mgd.step = step
    return mgd


# -- the noise: the same hash with Python's own integers --------------------------------------------------------------


def mix(x):
    x = (x + 0x9E3779B9) % 2**32
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) % 2**32
    x = ((x ^ (x >> 15)) * 0x735A2D97) % 2**32
    return x ^ (x >> 15)


def noise(image, step, place, stream=0):
    state = mix(mix(step) ^ stream)
    for number in (image % 2**32, image // 2**32 % 2**32, *place):
        state = mix(state ^ number)
    return (state >> 8) / 2**24


def test_noise_is_a_hash_of_image_step_stream_and_place():
    ids = torch.tensor([0, 7, 123_456_789_012, 2**62 + 3, -5])
    for step, stream in ((0, 0), (1, 0), (0, 1), (90_000, 3)):
        drawn = uniform_noise(ids, step, (3, 4), stream)
        assert drawn.dtype == torch.float32 and drawn.shape == (5, 3, 4)
        for b, image in enumerate(ids.tolist()):
            for i in range(3):
                for j in range(4):
                    assert drawn[b, i, j].item() == noise(image, step, (i, j), stream)
    assert uniform_noise(ids, 3, ()).shape == (5,)


def test_noise_does_not_depend_on_the_batch_its_order_or_its_size():
    ids = torch.tensor([5, 3, 9, 1])
    drawn = uniform_noise(ids, 11, (6, 8))
    assert torch.equal(uniform_noise(ids, 11, (6, 8), 0), drawn)
    assert torch.equal(uniform_noise(ids.flip(0), 11, (6, 8)), drawn.flip(0))
    assert torch.equal(uniform_noise(ids[1:2], 11, (6, 8)), drawn[1:2])
    assert torch.equal(uniform_noise(ids, 11, (9, 20))[:, :6, :8], drawn)
    state = torch.get_rng_state()
    uniform_noise(ids, 12, (6, 8))
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_uniform_and_draws_have_nothing_in_common():
    ids = torch.arange(64)
    drawn = {
        (step, stream): uniform_noise(ids, step, (50, 40), stream).double() for step in (0, 1) for stream in (0, 1)
    }
    count = 64 * 50 * 40
    for values in drawn.values():
        assert values.min() >= 0 and values.max() < 1
        counts = torch.histc(values, 100, 0, 1)
        chi_squared = ((counts - count / 100) ** 2 / (count / 100)).sum()
        assert 50 < chi_squared < 160  # 99 degrees of freedom: 99 +- 14
        # Neighbours in image, row, column, and those along each of the axes at once: correlation within 4 sigma.
        centred = values - 0.5
        for shifts in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 1, 1), (0, 2, 0), (2, 0, 0)):
            moved = centred.roll(shifts, (0, 1, 2))
            assert abs((centred * moved).mean() * 12) < 4 / math.sqrt(count)
        for axes in ((1, 2), (0, 2), (0, 1)):  # of each image, row and column
            mean = centred.mean(axes)
            assert mean.abs().max() < 5 / math.sqrt(12 * count / len(mean))
    one, *others = drawn.values()
    for other in others:
        assert abs(((one - 0.5) * (other - 0.5)).mean() * 12) < 4 / math.sqrt(count)


# -- the loss ---------------------------------------------------------------------------------------------------------


def convolve(x, layer):
    """3x3 convolution of (D, H, W) with zeros around, a loop over places."""
    width, height, length = len(layer.bias), *x.shape[1:]
    result = torch.zeros(width, height, length, dtype=torch.float64)
    for i in range(height):
        for j in range(length):
            total = layer.bias.clone()
            for u in (-1, 0, 1):
                for v in (-1, 0, 1):
                    if 0 <= i + u < height and 0 <= j + v < length:
                        total = total + layer.weight[:, :, u + 1, v + 1] @ x[:, i + u, j + v]
            result[:, i, j] = total
    return result


@torch.no_grad()
def reference(mgd, student, teacher, labels, pair):
    levels = []
    for level, (i, j) in enumerate(pair_levels(*pair)):
        project, generator = mgd.maps.project[level], mgd.generators[level]
        target, size = teacher.features[j], teacher.features[j].shape[2:]
        source = in_frame_of(student.features[i], student.mask, teacher.mask, size)
        if pair[0].hidden_size != pair[1].hidden_size:
            source = torch.einsum("td,bdhw->bthw", project.weight[:, :, 0, 0], source) + project.bias[:, None, None]
        valid, total = inside(teacher.mask, size), 0.0
        for b, label in enumerate(labels):
            masked = source[b].clone()
            for y in range(size[0]):
                for x in range(size[1]):
                    drop = noise(label["image_id"].item(), mgd.step, (y, x), level) < mgd.config.mask_ratio
                    if drop or not valid[b][y][x]:
                        masked[:, y, x] = 0
            generated = convolve(convolve(masked, generator[0]).clamp(min=0), generator[2])
            cells = [(y, x) for y in range(size[0]) for x in range(size[1]) if valid[b][y][x]]
            of_image = [float(generated[c, y, x] - target[b, c, y, x]) ** 2 for y, x in cells for c in range(6)]
            total += sum(of_image) / len(of_image)
        levels.append(total / len(labels))
    return sum(levels) / len(levels)


@pytest.mark.parametrize(
    ("student", "teacher", "masks", "options"),
    [
        (spec(), spec(), (MASK, MASK), {}),
        (spec(), spec(), (MASK, MASK), {"mask_ratio": 0.0, "generation_weight": 3.0}),
        (spec(hidden_size=5), spec(), (MASK, OTHER), {"mask_ratio": 0.3, "weight": 2.0, "step": 0}),
        (spec(strides=(8, 16, 32)), spec(strides=(14,)), (MASK, OTHER), {}),
    ],
)
def test_golden(student, teacher, masks, options):
    mgd = method(student, teacher, **options)
    ours = output(masks[0], student.strides, student.hidden_size, 1)
    theirs = output(masks[1], teacher.strides, teacher.hidden_size, 2)
    losses = mgd(ours, theirs, LABELS)
    assert list(losses) == ["mgd_generation"]
    weight = mgd.config.generation_weight * mgd.config.weight
    expected = weight * reference(mgd, ours, theirs, LABELS, (student, teacher))
    assert losses["mgd_generation"].item() == pytest.approx(expected, rel=1e-9)


def test_masks_change_with_the_step_and_not_with_the_batch():
    student, teacher = output(MASK, seed=1), output(MASK, seed=2)
    now, again, later = (method(step=s)(student, teacher, LABELS)["mgd_generation"] for s in (5, 5, 6))
    assert now == again != later
    state = torch.get_rng_state()
    mgd = method()
    torch.set_rng_state(state)
    mgd(student, teacher, LABELS)
    assert torch.equal(torch.get_rng_state(), state)


def test_two_ranks_are_one():
    student, teacher, mgd = output(MASK, seed=1), output(MASK, seed=2), method()

    def rank(x, part):
        mine = output(MASK[part])
        mine.features = [level[part] for level in x.features]
        return mine

    halves = [mgd(rank(student, p), rank(teacher, p), LABELS[p]) for p in (slice(0, 1), slice(1, 2))]
    whole = mgd(student, teacher, LABELS)["mgd_generation"]
    torch.testing.assert_close(sum(h["mgd_generation"] for h in halves) / 2, whole)


def test_it_starts_near_one_on_normalised_maps():
    big = canvas(256, 256, (256, 200), (180, 256))
    wide = spec(hidden_size=64)
    ours, theirs = output(big, width=64, seed=1), output(big, width=64, seed=2)
    assert 0.5 < method(wide, wide)(ours, theirs, LABELS)["mgd_generation"] < 2


def test_gradient_reaches_student_and_method_alone():
    mgd = method(student=spec(hidden_size=5))
    student, teacher = output(MASK, width=5, seed=1), output(MASK, seed=2)
    for level in (*student.features, *teacher.features):
        level.requires_grad_()
    mgd(student, teacher, LABELS)["mgd_generation"].backward()
    assert all(level.grad[b].any() for level in student.features for b in range(2))
    assert all(level.grad is None for level in teacher.features)
    parameters = list(mgd.parameters())
    assert len(parameters) == 12 and all(p.grad.any() for p in parameters)


def test_the_loss_is_in_full_precision_under_autocast():
    mgd = method().float()
    student, teacher = output(MASK, seed=1, dtype=torch.float32), output(MASK, seed=2, dtype=torch.float32)
    exact = mgd(student, teacher, LABELS)["mgd_generation"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mgd(student, teacher, LABELS)["mgd_generation"]
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-2)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_a_mask_leaves_something(ratio):
    with pytest.raises(UserError, match="method.mask_ratio must be from 0 to below 1, not"):
        MGDConfig(mask_ratio=ratio)


def test_a_detector_without_maps_is_refused():
    with pytest.raises(UserError, match="mgd needs features of the student, which detr cannot give"):
        method(student=spec(family="detr", capabilities=frozenset()))


def test_registered():
    assert get_method("mgd") is MGD
