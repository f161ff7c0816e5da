"""Localization distillation against loops in float64: matching by trying every assignment."""

import logging
import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch

from asd_hf.detectors import get_adapter
from asd_hf.detectors.base import DetectorOutput, DetectorSpec
from asd_hf.errors import UserError
from asd_hf.methods import get_method
from asd_hf.methods.ld import LD, LDConfig
from tests import tiny
from tests.families import FAMILIES

SPEC = DetectorSpec(
    family="deformable_detr",
    hidden_size=8,
    class_names=("a", "b", "c"),
    num_layers=3,
    num_queries=6,
    strides=(8,),
    pixel_mean=(0, 0, 0),
    pixel_std=(1, 1, 1),
    activation="sigmoid",
    capabilities=frozenset({"decode", "features"}),
)
VALUES = (-1.0, -0.375, -0.125, 0.0, 0.125, 0.375, 1.0)
OTHERS = (-0.75, -0.25, 0.0, 0.25, 0.75)
SIDES = replace(SPEC, family="d_fine", capabilities=frozenset({"sides"}), side_values=VALUES)
TERMS = ("ld_main", "ld_region", "ld_class")


def label(*objects):
    rows = torch.tensor(objects, dtype=torch.float64).reshape(-1, 5)
    return {"class_labels": rows[:, 0].long(), "boxes": rows[:, 1:]}


LABELS = [
    label([1, 0.4, 0.4, 0.3, 0.3], [2, 0.6, 0.5, 0.2, 0.5], [0, 0.5, 0.6, 0.4, 0.2]),
    label(),
    label([0, 0.5, 0.5, 0.35, 0.3]),
]


def output(num_queries, seed, columns=3, num_layers=3, bins=0, images=3, grad=False):
    """Boxes near the middle, so that some overlap the objects and each other."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    shape = num_layers, images, num_queries
    logits = 6 * random(*shape, columns) - 4
    boxes = torch.cat([0.3 + 0.4 * random(*shape, 2), 0.15 + 0.35 * random(*shape, 2)], -1)
    sides = frames = None
    if bins:
        sides = (5 * random(*shape, 4, bins)).requires_grad_(grad)
        frames = torch.cat([0.3 + 0.4 * random(*shape[1:], 2), 0.1 + 0.4 * random(*shape[1:], 2)], -1)
    tensors = [t.requires_grad_(grad) for t in (logits, boxes)]
    return DetectorOutput(*tensors, torch.zeros(*shape, 8), sides=sides, side_frames=frames)


def method(student=SPEC, teacher=SPEC, **options):
    return LD(LDConfig(**options), student, teacher)


# -- the reference: one layer, one image, one query at a time ---------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def softmax(row):
    top = max(row)
    total = sum(math.exp(v - top) for v in row)
    return [math.exp(v - top) / total for v in row]


def corners(box):
    return box[0] - box[2] / 2, box[1] - box[3] / 2, box[0] + box[2] / 2, box[1] + box[3] / 2


def giou(one, other):
    a, b = corners(one), corners(other)
    overlap = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = one[2] * one[3] + other[2] * other[3] - overlap
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return overlap / union - (hull - union) / hull


def l1(one, other):
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


def matched(class_cost, logits, boxes, label, softmax_head):
    """{object: query} of the cheapest assignment."""
    classes, objects = label["class_labels"].tolist(), label["boxes"].tolist()

    def cost(q, g):
        if softmax_head:
            of_class = -softmax(logits[q])[classes[g]]
        else:
            p = sigmoid(logits[q][classes[g]])
            of_class = -0.25 * (1 - p) ** 2 * math.log(p + 1e-8) + 0.75 * p**2 * math.log(1 - p + 1e-8)
        return class_cost * of_class + 5 * l1(boxes[q], objects[g]) - 2 * giou(boxes[q], objects[g])

    if len(objects) <= len(boxes):
        choices = [dict(enumerate(c)) for c in permutations(range(len(boxes)), len(objects))]
    else:
        choices = [{g: q for q, g in enumerate(c)} for c in permutations(range(len(objects)), len(boxes))]
    return min(choices, key=lambda choice: sum(cost(q, g) for g, q in choice.items()))


def divergence(teacher, student, t):
    """T^2 KL of distributions given as probabilities."""
    p, q = (softmax([math.log(v) / t for v in shares]) for shares in (teacher, student))
    return t * t * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def intervals(values, side, frame):
    """Where each bin of a side lies in the image, as pairs of falling or rising ends."""
    middles = [(a + b) / 2 for a, b in zip(values, values[1:], strict=False)]
    edges = [2 * values[0] - middles[0], *middles, 2 * values[-1] - middles[-1]]
    centre, size = frame[side % 2], frame[2 + side % 2]
    places = [centre + (-1 if side < 2 else 1) * (0.5 + edge) * size for edge in edges]
    return list(zip(places, places[1:], strict=False))


def carried_over(shares, values, frame, side, other_values, other_frame):
    """By the overlap of every bin with every other, in the image."""
    others = intervals(other_values, side, other_frame)
    others[0] = (math.inf if side < 2 else -math.inf, others[0][1])
    others[-1] = (others[-1][0], -math.inf if side < 2 else math.inf)
    result = [0.0] * len(others)
    for share, ends in zip(shares, intervals(values, side, frame), strict=True):
        low, high = sorted(ends)
        for i, other in enumerate(others):
            left, right = sorted(other)
            result[i] += share * max(min(high, right) - max(low, left), 0) / (high - low)
    return result


def side_divergence(config, ours, theirs, place, values):
    """`place`: layers, image and queries of both."""
    s_layer, t_layer, image, s, t = place
    total = 0.0
    for side in range(4):
        if values is None:
            shares = []
            for x, layer, query in ((ours, s_layer, s), (theirs, t_layer, t)):
                value = corners(x.boxes[layer, image, query].tolist())[side]
                count = config.bins - 1
                shares.append(softmax([-abs(value - n / count) * count for n in range(config.bins)]))
        else:
            shares = [softmax(ours.sides[s_layer, image, s, side].tolist())]
            target = softmax(theirs.sides[t_layer, image, t, side].tolist())
            if config.rebin:
                frames = theirs.side_frames[image, t].tolist(), ours.side_frames[image, s].tolist()
                target = carried_over(target, values[1], frames[0], side, values[0], frames[1])
                shares, target = [[v + 1e-4 for v in shares[0]]], [v + 1e-4 for v in target]
            shares.append(target)
        total += divergence(shares[1], shares[0], config.temperature) / 4
    return total


def class_divergence(config, s_logits, t_logits, softmax_head):
    t = config.class_temperature
    if softmax_head:
        return divergence(softmax(t_logits), softmax(s_logits), t)
    total = 0.0
    for a, b in zip(t_logits, s_logits, strict=True):
        p, q = sigmoid(a / t), sigmoid(b / t)
        total += t * t * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    return total


def reference(config, ours, theirs, labels, softmax_head=False, values=None, found=None):
    losses = dict.fromkeys(TERMS, 0.0)
    count = config.layers or len(ours.logits)
    for back in range(1, count + 1):
        s_layer, t_layer = len(ours.logits) - back, len(theirs.logits) - (back if back <= len(theirs.logits) else 1)
        for image, label in enumerate(labels):
            s_logits, s_boxes = ours.logits[s_layer, image].tolist(), ours.boxes[s_layer, image].tolist()
            t_logits, t_boxes = theirs.logits[t_layer, image].tolist(), theirs.boxes[t_layer, image].tolist()
            s_match = matched(config.class_cost, s_logits, s_boxes, label, softmax_head)
            t_match = matched(config.class_cost, t_logits, t_boxes, label, softmax_head)
            for g in set(s_match) & set(t_match):
                s, t = s_match[g], t_match[g]
                place = s_layer, t_layer, image, s, t
                score = max(softmax(s_logits[s])[:-1]) if softmax_head else max(sigmoid(v) for v in s_logits[s])
                losses["ld_main"] += score * side_divergence(config, ours, theirs, place, values)
                losses["ld_class"] += class_divergence(config, s_logits[s], t_logits[t], softmax_head)
            for t, box in enumerate(t_boxes):
                best = max((giou(box, other) for other in label["boxes"].tolist()), default=-1)
                inside = config.region_threshold / 4 <= best < config.region_threshold
                free = [s for s in range(len(s_boxes)) if s not in s_match.values()]
                if not inside or t in t_match.values() or not free:
                    continue
                s = min(free, key=lambda s: l1(box, s_boxes[s]))
                place = s_layer, t_layer, image, s, t
                losses["ld_region"] += best * side_divergence(config, ours, theirs, place, values)
                if found is not None:
                    found.append(place)
    number = max(sum(len(label["boxes"]) for label in labels), 1)
    weights = dict(zip(TERMS, (config.main_weight, config.region_weight, config.class_weight), strict=True))
    return {name: config.weight * weights[name] * loss / number for name, loss in losses.items()}


# -- golden numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "activation", "queries"),
    [
        ({}, "sigmoid", (6, 6)),
        ({"layers": None, "weight": 2.0}, "sigmoid", (5, 6)),
        ({"layers": 2, "bins": 9, "temperature": 2.0, "class_temperature": 3.0}, "softmax", (6, 5)),
        ({"region_threshold": 0.9, "main_weight": 3.0, "region_weight": 5.0, "class_weight": 7.0}, "softmax", (6, 5)),
        ({"form": "discretised", "region_threshold": 0.8}, "sigmoid", (4, 6)),
        ({"region_threshold": 1.0}, "sigmoid", (2, 2)),  # three objects, two queries
        ({"region_threshold": 1.0}, "sigmoid", (6, 2)),
        ({"region_threshold": 1.0}, "softmax", (2, 6)),
        ({"region_threshold": 1.0}, "sigmoid", (3, 6)),  # no student's query is free
    ],
)
def test_golden_of_coordinates(options, activation, queries):
    one = replace(SPEC, activation=activation)
    ld = method(one, one, **options)
    columns = 3 + (activation == "softmax")
    ours, theirs = output(queries[0], 1, columns), output(queries[1], 2, columns)
    losses = ld(ours, theirs, LABELS)
    found = []
    expected = reference(ld.config, ours, theirs, LABELS, activation == "softmax", found=found)
    assert tuple(losses) == TERMS
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name], rel=1e-9)
    share = len(found) / (3 * (ld.config.layers or 3))
    assert ld.statistics["ld/region_queries"].item() == pytest.approx(share)
    assert bool(found) == (min(queries) > 2 or queries == (2, 6))
    assert losses["ld_main"] > 0 < losses["ld_class"]


@pytest.mark.parametrize(
    ("options", "values", "layers"),
    [
        ({}, (VALUES, VALUES), (3, 3)),
        ({"layers": None, "temperature": 3.0}, (VALUES, OTHERS), (3, 2)),
        ({"layers": 2, "region_threshold": 0.9}, (OTHERS, VALUES), (2, 3)),
        ({"rebin": False, "region_threshold": 0.9}, (VALUES, VALUES), (3, 3)),
        ({"form": "distribution", "rebin": False, "temperature": 1.0}, (VALUES, VALUES), (3, 3)),
    ],
)
def test_golden_of_distributions(options, values, layers):
    student, teacher = (replace(SIDES, side_values=v, num_layers=n) for v, n in zip(values, layers, strict=True))
    ld = method(student, teacher, **options)
    ours = output(6, 1, num_layers=layers[0], bins=len(values[0]))
    theirs = output(5, 2, num_layers=layers[1], bins=len(values[1]))
    losses, found = ld(ours, theirs, LABELS), []
    expected = reference(ld.config, ours, theirs, LABELS, values=values, found=found)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name], rel=1e-8) and loss > 0
    assert found


def test_form_is_chosen_by_what_both_show_and_told(caplog):
    caplog.set_level(logging.INFO, "asd_hf")
    lacking = "discretised form, because deformable_detr shows no distributions over sides"
    for student, teacher, told in (
        (SIDES, SIDES, "distribution form"),
        (SIDES, SPEC, lacking),
        (SPEC, SIDES, lacking),
    ):
        ld, known = method(student, teacher), told == "distribution form"
        assert ld.uses_sides == known and ld.requires == ({"sides"} if known else set())
        assert caplog.messages[-1] == f"ld: {told}"
    assert not method(SIDES, SIDES, form="discretised").uses_sides
    assert caplog.messages[-1] == "ld: discretised form, because method.form says so"
    ours, theirs = output(6, 1, bins=7), output(6, 2)
    for name, loss in method(SIDES, SPEC)(ours, theirs, LABELS).items():
        assert torch.equal(loss, method()(output(6, 1), theirs, LABELS)[name])


# -- what must hold ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"rebin": False}, {"form": "discretised"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_predictions_have_no_loss(options, dtype):
    """Main region and classes; in the valuable region the nearest query need not be the same one."""
    ld = method(SIDES, SIDES, **options, layers=None)
    one = output(6, 1, bins=7)
    one = DetectorOutput(
        one.logits.to(dtype), one.boxes.to(dtype), one.queries, sides=one.sides.to(dtype), side_frames=one.side_frames
    )
    losses = ld(one, one, LABELS)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert all(abs(loss.item()) < tolerance for loss in losses.values())


@pytest.mark.parametrize("start", [None, 0.5])
def test_a_side_is_where_the_teacher_says_whatever_the_boxes_it_counts_from(start):
    """Also where the student is sure of another place, `start`, at first.

    Descending the loss, the student's mean side comes to lie where the teacher's does in the image.
    """
    values = tuple(n / 16 for n in range(-16, 17))
    one = replace(SIDES, side_values=values, num_layers=1)
    ours, theirs = (output(1, seed, num_layers=1, bins=33, images=1) for seed in (1, 2))
    places = torch.tensor(values, dtype=torch.float64)
    frames = [torch.tensor([[[0.5, 0.5, 0.4, 0.4]]]).double(), torch.tensor([[[0.55, 0.45, 0.5, 0.3]]]).double()]
    means = torch.tensor([-0.1, 0.05, 0.1, 0.3]).double()
    theirs.sides = -200 * (places - means[:, None]).square()[None, None, None]
    ours.sides, ours.side_frames, theirs.side_frames = torch.zeros(1, 1, 1, 4, 33).double(), *frames
    if start is not None:
        ours.sides -= 80 * (places - start).abs()  # 5 a bin
    ours.sides.requires_grad_()
    ld = method(one, one, temperature=1.0, region_weight=0.0, class_weight=0.0)
    optimizer = torch.optim.Adam([ours.sides], 0.3)
    for _ in range(300):
        optimizer.zero_grad()
        ld(ours, theirs, [label([0, 0.5, 0.5, 0.4, 0.4])])["ld_main"].backward()
        optimizer.step()

    def places_of(sides, frame):
        distance = 0.5 + (sides[0, 0, 0].detach().softmax(-1) * places).sum(-1)
        (cx, cy, w, h), (left, top, right, bottom) = frame.flatten().tolist(), distance.tolist()
        return [cx - left * w, cy - top * h, cx + right * w, cy + bottom * h]

    assert places_of(ours.sides, frames[0]) == pytest.approx(places_of(theirs.sides, frames[1]), abs=5e-3)


@pytest.mark.parametrize("labels", [LABELS, [label(), label(), label()]])
@pytest.mark.parametrize("spec", [SPEC, SIDES])
def test_gradient_reaches_the_student_alone(spec, labels):
    ld = method(spec, spec, region_threshold=1.0, layers=None)
    bins = len(spec.side_values)
    ours, theirs = output(6, 1, bins=bins, grad=True), output(6, 2, bins=bins, grad=True)
    losses = ld(ours, theirs, labels)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    reached = [ours.logits, ours.sides if bins else ours.boxes]
    assert all(t.grad is not None and t.grad.isfinite().all() for t in reached)
    assert all(bool(t.grad.any()) == (labels is LABELS) for t in reached)
    assert (losses["ld_main"] == 0) == (labels is not LABELS)
    assert all(t is None or t.grad is None for t in (theirs.logits, theirs.boxes, theirs.sides))


def test_the_score_that_weighs_is_not_trained():
    ours = output(6, 1, grad=True)
    losses = method(main_weight=1.0)(ours, output(6, 2), LABELS)
    assert torch.autograd.grad(losses["ld_main"], ours.logits, allow_unused=True) == (None,)


def test_class_term_has_the_published_size_at_80_classes_and_no_more_at_fewer():
    """10 times the mean over 80 classes; classes on which both agree add nothing."""
    ours, theirs = output(6, 1), output(6, 2)
    ld = method(class_cost=0.0)  # matched by the boxes alone
    few = ld(ours, theirs, LABELS)["ld_class"]
    expected = reference(replace(ld.config, class_weight=10 / 80), ours, theirs, LABELS)["ld_class"]
    assert few.item() == pytest.approx(expected, rel=1e-9) and few > 0
    spec = replace(SPEC, class_names=tuple(map(str, range(80))))
    ours, theirs = (replace(x, logits=torch.nn.functional.pad(x.logits, (0, 77))) for x in (ours, theirs))
    many = method(spec, spec, class_cost=0.0)(ours, theirs, LABELS)["ld_class"]
    assert many.item() == pytest.approx(few.item(), rel=1e-9)


def test_what_has_no_weight_is_not_computed():
    for name in TERMS:
        weights = {f"{term.removeprefix('ld_')}_weight": 0.0 for term in TERMS if term != name}
        ld = method(**weights)
        losses = ld(output(6, 1), output(6, 2), LABELS)
        assert list(losses) == [name]
        assert torch.equal(losses[name], method()(output(6, 1), output(6, 2), LABELS)[name])


def test_precision_is_full_under_autocast():
    halves, wide = [], []
    for seed in (1, 2):
        one = output(6, seed, bins=7)
        one = replace(one, boxes=one.boxes.float(), side_frames=one.side_frames.float())
        halves.append(replace(one, logits=one.logits.bfloat16(), sides=one.sides.bfloat16()))
        wide.append(replace(one, logits=halves[-1].logits.float(), sides=halves[-1].sides.float()))
    ld = method(SIDES, SIDES)
    exact = ld(*wide, LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = ld(*halves, LABELS)
    assert all(losses[name].dtype == torch.float32 and torch.equal(losses[name], exact[name]) for name in TERMS)


def test_two_ranks_are_one(monkeypatch):
    ld = method(layers=None, region_threshold=1.0)
    ours, theirs = output(6, 1), output(6, 2)
    whole = ld(ours, theirs, LABELS)
    # Of 4 objects the first rank has 3 and the second 1; the number is averaged over both.
    monkeypatch.setattr("asd_hf.methods.ld.sum_over_ranks", lambda x: (torch.full_like(x, 4), 2))
    parts = []
    for rows in (slice(0, 1), slice(1, 3)):
        half = [DetectorOutput(x.logits[:, rows], x.boxes[:, rows], x.queries[:, rows]) for x in (ours, theirs)]
        parts.append(ld(*half, LABELS[rows]))
    for name in TERMS:
        torch.testing.assert_close((parts[0][name] + parts[1][name]) / 2, whole[name])


# -- real detectors ---------------------------------------------------------------------------------------------------


PAIRS = [("d_fine", "d_fine"), ("d_fine", "deimv2"), ("deformable_detr", "d_fine")]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_real_detectors(ours, theirs):
    batch = tiny.batch(3)
    adapters = [get_adapter(*FAMILIES[name](seed=seed)) for seed, name in enumerate((ours, theirs))]
    student, teacher = (adapter(batch["pixel_values"], batch["pixel_mask"]) for adapter in adapters)
    labels = []
    for boxes in teacher.boxes[-1].tolist():  # an object where one query finds it and another nearly does
        nearest = [max(giou(a, b) for b in boxes if b != a) for a in boxes]
        labels.append(label([0, *boxes[nearest.index(max(nearest))]]))
    ld = method(*(adapter.spec for adapter in adapters), layers=None, region_threshold=1.0)
    losses = ld(student, teacher, labels)
    assert tuple(losses) == TERMS and all(loss.isfinite() for loss in losses.values())
    heads = {"ld_class": "class_embed", "ld_main": "bbox_embed", "ld_region": "bbox_embed"}
    for term, loss in losses.items():
        if term == "ld_region" and theirs == "deimv2":  # no two boxes of the tiny one overlap
            assert loss == 0
            continue
        adapters[0].model.zero_grad()
        loss.backward(retain_graph=True)
        reached = [name for name, p in adapters[0].model.named_parameters() if p.grad is not None and p.grad.any()]
        assert loss > 0 and any(heads[term] in name for name in reached)
    ld = method(adapters[1].spec, adapters[1].spec, layers=None, region_threshold=1.0)
    assert all(abs(loss) < 1e-5 for loss in ld(teacher, teacher, labels).values())


def test_boxes_of_a_real_detector_are_where_its_distributions_are_carried_to():
    adapter, batch = get_adapter(*FAMILIES["d_fine"]()), tiny.batch(3)
    output = adapter(batch["pixel_values"], batch["pixel_mask"])
    values = adapter.spec.side_values
    for image in range(3):
        for query in range(4):
            frame, box = output.side_frames[image, query].tolist(), output.boxes[-1, image, query].tolist()
            for side in range(4):
                shares = softmax(output.sides[-1, image, query, side].tolist())
                distance = 0.5 + sum(v * share for v, share in zip(values, shares, strict=True))
                place = frame[side % 2] + (-1 if side < 2 else 1) * distance * frame[2 + side % 2]
                assert place == pytest.approx(corners(box)[side], abs=1e-5)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        (SPEC, SIDES, {"form": "distribution"}, "ld needs sides of the student, which deformable_detr cannot give"),
        (
            replace(SIDES, side_values=OTHERS),
            SIDES,
            {"rebin": False},
            "method.rebin is false, but the student has 5 bins a side and the teacher 7: set method.rebin=true",
        ),
        (SPEC, SPEC, {"layers": 4}, "method.layers is 4, but the student has 3 decoder layers"),
        (SPEC, SPEC, {"bins": 1}, "method.bins must be 2 or more, not 1"),
        (SPEC, SPEC, {"region_threshold": 1.5}, "method.region_threshold must be above 0 and at most 1, not 1.5"),
        (SPEC, SPEC, {"temperature": 0.0}, "method.temperature must be above 0"),
        (SPEC, SPEC, {"class_temperature": -1.0}, "method.class_temperature must be above 0"),
        (SPEC, SPEC, {"form": "laplace"}, "method.form: 'laplace' is not a choice"),
    ],
)
def test_refusals(student, teacher, options, message):
    with pytest.raises(UserError, match=message):
        method(student, teacher, **options)


def test_registered():
    assert get_method("ld") is LD
