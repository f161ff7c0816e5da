"""Balanced pairs against loops written from the formulas, in float64, and the weights of the pairs."""

import math
from collections import defaultdict
from dataclasses import replace
from itertools import product

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from asd_hf.classes import SharedClasses
from asd_hf.errors import UserError
from asd_hf.methods.balanced_pairs import BalancedPairs, BalancedPairsConfig, balance
from tests import tiny
from tests.answers import ask_both, batch, best, detector, divergence, giou_distance, l1, sigmoid, softmax, specs
from tests.test_asd import output, score_rows, spec

PAIRS = {  # student and its queries, teacher, its queries and the classes that it knows
    "other numbers": ("deformable_detr", 8, "other", 11, ("kite", "cat", "owl")),
    "boxes": ("rt_detr", 12, "lw_detr", 9, tiny.CLASSES),
    "softmax": ("detr", 7, "rt_detr", 9, tiny.CLASSES),
}
TERMS = ("class", "box", "giou")
PAIR_TERMS = [f"balanced_pairs_{term}" for term in TERMS]
ASKED_TERMS = [f"balanced_pairs_asked_{term}" for term in TERMS]
SAMPLING = "balanced_pairs_sampling"


def build(student, teacher, **options):
    """In float64; without trust unless it is asked for."""
    torch.manual_seed(0)
    options = {"hidden_dim": 16, "key_dim": 8, "trust": 0.0} | options
    method = BalancedPairs(BalancedPairsConfig(**options), student, teacher).double()
    if method.sampler is not None:
        with torch.no_grad():
            for p in method.sampler.parameters():
                p.mul_(4)  # otherwise the attention is nearly uniform and hides errors
    return method


def make(pair, **options):
    student, s_queries, teacher, t_queries, classes = PAIRS[pair]
    student = detector(student, num_queries=s_queries)
    teacher = detector(teacher, 1, num_queries=t_queries, classes=classes)
    return build(*specs(student, teacher), **options), student, teacher


# -- the reference: one image, one layer, one pair at a time, plain floats --------------------------------------------


def sinkhorn(rows, iterations):
    """exp of the scores, its columns scaled to sum to 1, then its rows, again and again; its rows at least once."""
    top = max(max(row) for row in rows)
    w = [[math.exp(v - top) for v in row] for row in rows]
    for _ in range(iterations):
        columns = [sum(row[j] for row in w) for j in range(len(w[0]))]
        w = [[v / column for v, column in zip(row, columns, strict=True)] for row in w]
        w = [[v / sum(row) for v in row] for row in w]
    return [[v / sum(row) for v in row] for row in w]


def predictions(output, layer, image):
    return list(zip(output.logits[layer, image].tolist(), output.boxes[layer, image].tolist(), strict=True))


def distances(teacher, student, method):
    (t_z, t_b), (s_z, s_b), c = teacher, student, method.config
    classes, giou = divergence(t_z, s_z, method.softmax), giou_distance(t_b, s_b)
    return [c.class_weight * classes, c.box_weight * l1(t_b, s_b), c.giou_weight * giou]


def attention(method, teacher, other):
    """Of the sampler, between the teacher's predictions and others."""
    probs = softmax if method.softmax else sigmoid
    points, keys = ([box + probs(logits) for logits, box in side] for side in (teacher, other))
    return score_rows(method.sampler, points, keys, method.sampler)[0]


def pair_weights(method, teacher, student):
    c = method.config
    rows = [[0.0] * len(student) for _ in teacher]
    if c.score != "sampler":
        rows = [[-sum(distances(t, s, method)) for s in student] for t in teacher]
    if c.score != "distance":
        more = attention(method, teacher, student)
        rows = [[a + b for a, b in zip(row, other, strict=True)] for row, other in zip(rows, more, strict=True)]
    return sinkhorn([[v / c.temperature for v in row] for row in rows], c.balance_iterations)


def reference(method, student, teacher, told=None, weighed=None):
    """Losses and statistics, also of the student's answers `told`; the weights may be those of another student."""
    c, images = method.config, student.logits.shape[1]
    layers = c.layers or len(student.logits)
    losses, seen = defaultdict(float), defaultdict(float)
    for back, image in product(range(1, layers + 1), range(images)):
        # Layers are counted from the end; the student's earlier ones imitate the last one of a shorter teacher.
        layer = -back if back <= len(teacher.logits) else -1
        t, s = predictions(teacher, layer, image), predictions(student, -back, image)
        if c.pair_weight:
            w = pair_weights(method, t, s if weighed is None else predictions(weighed, -back, image))
            share = 1 / len(t) / images
            for (i, one), (j, other) in product(enumerate(t), enumerate(s)):
                for name, far in zip(PAIR_TERMS, distances(one, other, method), strict=True):
                    losses[name] += c.pair_weight * w[i][j] * far * share
            entropies = [-sum(v * math.log(v) for v in row if v) for row in w]
            seen["balanced_pairs/queries_per_point"] += sum(map(math.exp, entropies)) * share / layers
            if c.score != "distance":
                own = [softmax(row)[i] for i, row in enumerate(attention(method, t, t))]
                seen["balanced_pairs/w_ii"] += sum(own) * share / layers
                losses[SAMPLING] -= c.sampling_weight * sum(map(math.log, own)) * share
        if c.asked_weight:
            scores = [best(z, method.softmax) if c.asked_points == "score" else 1.0 for z, _ in t]
            for score, *pair in zip(scores, t, predictions(told, -back, image), strict=True):
                for name, far in zip(ASKED_TERMS, distances(*pair, method), strict=True):
                    losses[name] += c.asked_weight * score / sum(scores) * far / images
    return losses, seen


def check(method, losses, expected, seen):
    assert losses.keys() == expected.keys()
    for term, value in expected.items():
        assert losses[term].item() == pytest.approx(method.config.weight * value, rel=1e-10), term
    assert {key: value.item() for key, value in method.statistics.items()} == pytest.approx(seen, rel=1e-10)


VARIANTS = {
    "default": {},
    "sampler": {"score": "sampler"},
    "both": {"score": "both"},
    "warm": {"temperature": 2.0, "score": "both"},
    "softmax alone": {"balance_iterations": 0},
    "three iterations": {"balance_iterations": 3},
    "one layer": {"layers": 1, "score": "both"},
    "weights": {
        **{"class_weight": 0.5, "box_weight": 1.5, "giou_weight": 0.7, "sampling_weight": 3.0},
        **{"pair_weight": 2.0, "asked_weight": 0.6, "score": "both", "weight": 3.0},
    },
    "uniform": {"asked_points": "uniform"},
    "answers alone": {"pair_weight": 0.0, "score": "both"},
    "pairs alone": {"asked_weight": 0.0},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("pair", PAIRS)
def test_equals_naive_loops(pair, name):
    method, student, teacher = make(pair, **VARIANTS[name])
    ours, theirs = ask_both(student, teacher, batch())
    losses = method(ours, theirs, [])
    asks = method.config.asked_weight > 0
    assert len(ours.asked) == asks and not theirs.asked
    check(method, losses, *reference(method, ours, theirs, ours.asked[0][1] if asks else None))
    assert method.requires == ({"decode"} if asks else set())
    # Parameters that no loss reaches would stop training on several ranks.
    assert (method.sampler is not None) == (SAMPLING in losses) and (method.translator is not None) == asks
    if asks:  # the teacher's own queries, in the student's form
        for tensor, expected in zip(ours.asked[0][0], method.translator(theirs.decode.own, theirs), strict=True):
            assert (tensor is None) == (expected is None)
            assert tensor is None or torch.equal(tensor, expected)


def test_a_detector_whose_decoder_cannot_be_asked():
    student, teacher = detector("conditional_detr"), detector("yolos", 1, num_queries=9)
    with pytest.raises(UserError, match="needs decode of the student, which yolos cannot give"):
        build(*specs(teacher, student))
    shared, seen = SharedClasses(student.spec, teacher.spec), batch()
    method = build(*specs(student, teacher), asked_weight=0.0)
    assert method.requires == set()
    ours, theirs = (x(seen["pixel_values"], seen["pixel_mask"]) for x in (student, teacher))
    ours, theirs = shared.student(ours), shared.teacher(theirs)
    check(method, method(ours, theirs, []), *reference(method, ours, theirs))


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("teacher", "student"), [(5, 5), (4, 7), (8, 3)])
def test_balanced_weights(teacher, student):
    scores = 2 * torch.randn(6, teacher, student, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(balance(scores, 0), scores.softmax(-1))
    weights = balance(scores, 500)
    torch.testing.assert_close(weights.sum(-1), torch.ones(6, teacher).double())
    torch.testing.assert_close(weights.sum(-2), torch.full((6, student), teacher / student).double())
    # Rows and columns are scaled and nothing else.
    change = weights.log() - scores
    change = change - change.mean(-1, keepdim=True)
    torch.testing.assert_close(change, change.mean(-2, keepdim=True).expand_as(change))
    # Rows come last: however few the iterations, they sum to 1.
    torch.testing.assert_close(balance(scores, 1).sum(-1), torch.ones(6, teacher).double())
    assert (balance(scores, 1).sum(-2) - teacher / student).abs().max() > 1e-3


def test_cold_weights_are_the_hungarian_assignment():
    far = torch.rand(8, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    partners = torch.stack([torch.tensor(linear_sum_assignment(matrix)[1]) for matrix in far])
    assert (partners != far.argmin(-1)).any(-1).sum() > 4  # each to its nearest is another thing
    assert torch.equal(balance(-far / 5e-3, 2000).argmax(-1), partners)


# -- gradients --------------------------------------------------------------------------------------------------------


def alone(softmax=False, **options):
    """A method of pairs alone, for outputs without a detector."""
    like = spec(activation="softmax" if softmax else "sigmoid")
    return build(like, like, **{"asked_weight": 0.0} | options)


@pytest.mark.parametrize("score", ["distance", "sampler", "both"])
def test_weights_carry_no_gradient(score):
    method = alone(score=score, temperature=1.0)
    student, teacher = output(5, 1, grad=True), output(7, 2, grad=True)
    losses = method(student, teacher, [])
    gradients = torch.autograd.grad(sum(losses[name] for name in PAIR_TERMS), (student.logits, student.boxes))
    generator = torch.Generator().manual_seed(3)
    way = [torch.randn(g.shape, dtype=torch.float64, generator=generator) for g in gradients]

    def slope(moved_weights):
        """Of the losses along `way`, by differences."""
        values = []
        for step in (1e-6, -1e-6):
            moved = replace(student, logits=student.logits + step * way[0], boxes=student.boxes + step * way[1])
            losses, _ = reference(method, moved, teacher, weighed=moved if moved_weights else student)
            values.append(sum(losses[name] for name in PAIR_TERMS))
        return (values[0] - values[1]) / 2e-6

    got = sum((g * w).sum().item() for g, w in zip(gradients, way, strict=True))
    assert got == pytest.approx(slope(False), rel=1e-6)
    assert abs(got - slope(True)) > 1e-3 * abs(got)  # they would carry something


@pytest.mark.parametrize("pair", PAIRS)
def test_what_each_loss_teaches(pair):
    method, student, teacher = make(pair, score="both")
    ours, theirs = ask_both(student, teacher, batch(1))
    parts = {
        "student": [p for p in student.model.parameters() if p.requires_grad],
        "sampler": list(method.sampler.parameters()),
        "translator": list(method.translator.parameters()),
        "teacher": [p for p in teacher.model.parameters() if p.requires_grad],
    }
    losses = method(ours, theirs, [])
    assert losses.keys() == {SAMPLING, *PAIR_TERMS, *ASKED_TERMS}
    for term, loss in losses.items():
        reached = {}
        for part, places in parts.items():
            gradients = torch.autograd.grad(loss, places, retain_graph=True, allow_unused=True) if places else ()
            reached[part] = sum(g is not None and g.any().item() for g in gradients)
        assert reached["teacher"] == 0, term
        assert reached["sampler"] >= 7 if term == SAMPLING else reached["sampler"] == 0, term
        assert reached["translator"] == (len(parts["translator"]) if term in ASKED_TERMS else 0), term
        assert reached["student"] == 0 if term == SAMPLING else reached["student"] > len(parts["student"]) / 3, term


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["distance", "sampler", "both"])
def test_matrices_are_the_weights_of_the_last_layers_pairs(score):
    method = alone(score=score)
    student, teacher = output(5, 0), output(7, 1, num_layers=2)
    found = method.matrices(student, teacher)
    assert set(found) == {"student"}
    for image in range(2):
        rows = pair_weights(method, predictions(teacher, -1, image), predictions(student, -1, image))
        assert found["student"][image].tolist() == [pytest.approx(row) for row in rows]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "method.temperature must be above 0, not 0.0"),
        ({"key_dim": 0}, "method.key_dim must be above 0, not 0"),
        ({"hidden_dim": 0}, "method.hidden_dim must be above 0, not 0"),
        ({"score": "distanc"}, "method.score: 'distanc' is not a choice: did you mean 'distance'?"),
        (
            {f"{name}_weight": 0.0 for name in (*TERMS, "pair", "sampling", "asked")},
            "all weights of balanced_pairs are 0: give one a value, or set method.name=none",
        ),
        (
            {f"{name}_weight": 0.0 for name in TERMS},
            "all weights of balanced_pairs are 0: give one a value, or set method.name=none",
        ),
        (
            {"pair_weight": 0.0, "asked_weight": 0.0},
            "method.pair_weight and method.asked_weight are both 0: give one a value",
        ),
        ({"trust": -1.0}, "method.trust must be 0 or above, not -1.0"),
        ({"balance_iterations": -3}, "method.balance_iterations must be 0 or above, not -3"),
        ({"layers": 4}, "method.layers is 4, but the student has 3 decoder layers"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UserError) as caught:
        alone(**options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
