"""Focal and global distillation against loops in float64."""

import math

import pytest
import torch

from asd_hf.errors import UserError
from asd_hf.features import pair_levels
from asd_hf.methods import get_method
from asd_hf.methods.fgd import FGD, FGDConfig
from tests.maps import SPEC, canvas, in_frame_of, inside, output, spec

MASK = canvas(48, 40, (48, 24), (30, 40), (48, 40), (3, 3))  # no cell of the last image has its centre in it
OTHER = canvas(64, 72, (64, 32), (45, 60), (56, 56), (64, 72))
TERMS = ("fgd_foreground", "fgd_background", "fgd_attention", "fgd_relation")


def labels(*boxes):
    return [
        {"class_labels": torch.zeros(len(b), dtype=torch.int64), "boxes": torch.tensor(b).double().reshape(-1, 4)}
        for b in boxes
    ]


LABELS = labels(
    [[0.52, 0.31, 0.6, 0.33], [0.61, 0.4, 0.13, 0.1], [0.93, 0.9, 0.1, 0.15]],  # the second lies within the first
    [],
    [[0.3, 0.3, 0.1, 0.7]],
    [[0.5, 0.5, 0.4, 0.4]],
)


def method(student=SPEC, teacher=SPEC, opened=True, **options):
    """`opened`: with contexts that add something, as they do after the first step."""
    torch.manual_seed(0)
    fgd = FGD(FGDConfig(**options), student, teacher).double()
    if opened:
        with torch.no_grad():
            for parameter in fgd.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return fgd


# -- the reference: one image at a time, places by loops --------------------------------------------------------------


def softmax(values):
    top = max(values, default=0)
    total = sum(math.exp(v - top) for v in values)
    return [math.exp(v - top) / total for v in values]


def attention(x, cells, temperature):
    """{place: weight} and a weight a channel, of the map [channel][row][column] of an image."""
    channels = range(len(x))
    strength = [sum(abs(x[c][i][j]) for c in channels) / len(x) / temperature for i, j in cells]
    over_cells = {cell: len(cells) * w for cell, w in zip(cells, softmax(strength), strict=True)}
    strength = [sum(abs(x[c][i][j]) for i, j in cells) / len(cells) / temperature for c in channels]
    return over_cells, [len(x) * w for w in softmax(strength)]


def masks(boxes, cells, image, size):
    """{place: weight} of objects and of background; `image`: height and width in cells of the valid image."""
    foreground = dict.fromkeys(cells, 0.0)
    for cx, cy, w, h in boxes:
        left, right = math.floor((cx - w / 2) * image[1]), math.ceil((cx + w / 2) * image[1])
        top, bottom = math.floor((cy - h / 2) * image[0]), math.ceil((cy + h / 2) * image[0])
        share = 1 / ((right + 1 - left) * (bottom + 1 - top))
        for i in range(top, bottom + 1):
            for j in range(left, right + 1):
                if (i, j) in foreground:
                    foreground[i, j] = max(foreground[i, j], share)
    empty = [cell for cell in cells if not foreground[cell]]
    return foreground, {cell: 1 / len(empty) if cell in empty else 0.0 for cell in cells}


def with_context(x, cells, block):
    """{place: (D,)} of the map (D, H, W) of an image."""
    scores = [float(block.score.weight[0, :, 0, 0] @ x[:, i, j]) for i, j in cells]
    context = sum(w * x[:, i, j] for w, (i, j) in zip(softmax(scores), cells, strict=True))
    first, norm, _, last = block.transform
    hidden = first.weight @ context + first.bias
    hidden = (hidden - hidden.mean()) / ((hidden - hidden.mean()).square().mean() + 1e-5).sqrt()
    added = last.weight @ (hidden * norm.weight + norm.bias).clamp(min=0) + last.bias
    return {(i, j): x[:, i, j] + added for i, j in cells}


@torch.no_grad()
def reference(fgd, student, teacher, labels, pair):
    config, losses = fgd.config, dict.fromkeys(TERMS, 0.0)
    for level, (k, m) in enumerate(pair_levels(*pair)):
        project, target = fgd.maps.project[level], teacher.features[m]
        size = target.shape[2:]
        source = in_frame_of(student.features[k], student.mask, teacher.mask, size)
        if pair[0].hidden_size != pair[1].hidden_size:
            source = torch.einsum("td,bdhw->bthw", project.weight[:, :, 0, 0], source) + project.bias[:, None, None]
        valid = inside(teacher.mask, size)
        for b, label in enumerate(labels):
            cells = [(i, j) for i in range(size[0]) for j in range(size[1]) if valid[b][i][j]]
            if not cells:
                continue
            height, width = int(teacher.mask[b, :, 0].sum()), int(teacher.mask[b, 0].sum())
            image = size[0] * height / teacher.mask.shape[1], size[1] * width / teacher.mask.shape[2]
            foreground, background = masks(label["boxes"].tolist(), cells, image, size)
            s, t = source[b].tolist(), target[b].tolist()
            s_cells, s_channels = attention(s, cells, config.temperature)
            t_cells, t_channels = attention(t, cells, config.temperature)
            for i, j in cells:
                squared = sum((s[c][i][j] - t[c][i][j]) ** 2 * t_channels[c] for c in range(len(t))) * t_cells[i, j]
                losses["fgd_foreground"] += config.foreground_weight * foreground[i, j] * squared
                losses["fgd_background"] += config.background_weight * background[i, j] * squared
                losses["fgd_attention"] += config.attention_weight * abs(s_cells[i, j] - t_cells[i, j])
            channels = sum(abs(a - b) for a, b in zip(s_channels, t_channels, strict=True))
            losses["fgd_attention"] += config.attention_weight * channels
            if config.relation_weight:
                ours = with_context(source[b], cells, fgd.student_context[level])
                theirs = with_context(target[b], cells, fgd.teacher_context[level])
                squared = sum(float((ours[cell] - theirs[cell]).square().sum()) for cell in cells)
                losses["fgd_relation"] += config.relation_weight * squared
    return {name: config.weight * loss / len(labels) for name, loss in losses.items()}


@pytest.mark.parametrize(
    ("student", "teacher", "views", "options"),
    [
        (spec(), spec(), (OTHER, OTHER), {}),
        (spec(), spec(), (OTHER, OTHER), {"temperature": 2.0, "weight": 3.0}),
        (spec(), spec(), (MASK, OTHER), {"foreground_weight": 2.0, "background_weight": 3.0, "attention_weight": 5.0}),
        (spec(hidden_size=5), spec(), (OTHER, OTHER), {"relation_weight": 0.7}),
        (spec(), spec(), (MASK, OTHER), {"relation_weight": 0.0}),
        (spec(strides=(8, 16, 32)), spec(strides=(14,)), (MASK, OTHER), {}),
    ],
)
def test_golden(student, teacher, views, options):
    fgd = method(student, teacher, **options)
    ours = output(views[0], student.strides, student.hidden_size, 1)
    theirs = output(views[1], teacher.strides, teacher.hidden_size, 2)
    losses = fgd(ours, theirs, LABELS)
    expected = reference(fgd, ours, theirs, LABELS, (student, teacher))
    assert tuple(losses) == (TERMS if fgd.config.relation_weight else TERMS[:3])
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name], rel=1e-9) and loss > 0


def test_an_image_without_a_cell_takes_no_part():
    """At the channels its attention is even for both, and so is every other part of it."""
    fgd, student, teacher = method(), output(MASK, seed=1), output(MASK, seed=2)
    losses = fgd(student, teacher, LABELS)
    for name, expected in reference(fgd, student, teacher, LABELS, (SPEC, SPEC)).items():
        assert losses[name].item() == pytest.approx(expected, rel=1e-9)


def test_weight_of_objects_by_hand():
    """One cell differs by 1 in one channel; the teacher's maps are even, so that its attention is 1 everywhere."""
    one = spec(strides=(8,), hidden_size=2)
    mask = canvas(64, 64, (64, 64))
    teacher, student = output(mask, (8,), 2), output(mask, (8,), 2)
    teacher.features[0].fill_(1)
    boxes = labels([[0.5, 0.5, 0.4, 0.4], [0.29, 0.29, 0.05, 0.05]])
    # In cells: 2.4 to 5.6 are 2, ..., 6, five by five; 2.12 to 2.52 are 2 and 3, two by two.
    for (i, j), foreground in (((5, 6), 1 / 25), ((3, 3), 1 / 4), ((2, 4), 1 / 25), ((7, 7), 0), ((1, 2), 0)):
        student.features[0].fill_(1)
        student.features[0][0, 1, i, j] = 2
        fgd = method(one, one, foreground_weight=1.0, background_weight=1.0, opened=False)
        losses = fgd(student, teacher, boxes)
        assert losses["fgd_foreground"].item() == pytest.approx(foreground)
        assert losses["fgd_background"].item() == pytest.approx(0 if foreground else 1 / (64 - 25))
        assert losses["fgd_relation"].item() == pytest.approx(5e-6)


@pytest.mark.parametrize("there", [LABELS, labels([], [], [], [])])
def test_equal_maps_have_no_loss(there):
    losses = method(opened=False)(output(OTHER), output(OTHER), there)
    assert all(loss == 0 for loss in losses.values())


@pytest.mark.parametrize("there", [LABELS, labels([], [], [], [])])
def test_gradient_reaches_student_and_method_alone(there):
    fgd = method(student=spec(hidden_size=5))
    student, teacher = output(OTHER, width=5, seed=1), output(OTHER, seed=2)
    for level in (*student.features, *teacher.features):
        level.requires_grad_()
    losses = fgd(student, teacher, there)
    sum(losses.values()).backward()
    assert (losses["fgd_foreground"] > 0) == (there is LABELS)
    assert all(level.grad[b].any() for level in student.features for b in range(4))
    assert all(level.grad is None for level in teacher.features)
    parameters = list(fgd.parameters())
    assert len(parameters) == 2 * (2 + 2 * 7) and all(p.grad.any() for p in parameters)


@pytest.mark.parametrize("term", ["foreground", "background", "attention", "relation"])
def test_every_parameter_takes_part_in_any_batch(term):
    off = {f"{name}_weight": 0.0 for name in ("foreground", "background", "attention", "relation") if name != term}
    fgd = method(student=spec(hidden_size=5), opened=False, **off)
    assert len(fgd.student_context) == len(fgd.teacher_context) == (2 if term == "relation" else 0)
    losses = fgd(output(MASK, width=5, seed=1), output(MASK, seed=2), labels([], [], [], []))
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fgd.parameters())


def test_two_ranks_are_one():
    fgd, student, teacher = method(), output(OTHER, seed=1), output(OTHER, seed=2)

    def rank(x, part):
        mine = output(OTHER[part])
        mine.features = [level[part] for level in x.features]
        return mine

    halves = [fgd(rank(student, p), rank(teacher, p), LABELS[p]) for p in (slice(0, 2), slice(2, 4))]
    for name, whole in fgd(student, teacher, LABELS).items():
        torch.testing.assert_close(sum(half[name] for half in halves) / 2, whole)


def test_precision_is_full_under_autocast():
    fgd = method(student=spec(hidden_size=5)).float()
    student, teacher = output(OTHER, width=5, seed=1, dtype=torch.float32), output(OTHER, dtype=torch.float32)
    there = [label | {"boxes": label["boxes"].float()} for label in LABELS]
    exact = fgd(student, teacher, there)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = fgd(student, teacher, there)
    assert all(losses[name] == loss and loss.dtype == torch.float32 for name, loss in exact.items())


def test_refusals():
    with pytest.raises(UserError, match="fgd needs features of the student, which detr cannot give"):
        method(student=spec(family="detr", capabilities=frozenset()))
    with pytest.raises(UserError, match="method.temperature must be above 0, not 0"):
        FGDConfig(temperature=0.0)


def test_registered():
    assert get_method("fgd") is FGD
