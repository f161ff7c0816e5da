"""Balanced pairs against loops written from the formulas, in float64; the weights, and the trust in the teacher."""

import math
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from scipy.optimize import linear_sum_assignment

from asd_hf.classes import SharedClasses
from asd_hf.criterion import DetectionCriterion
from asd_hf.errors import UserError
from asd_hf.methods import get_method
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
    """Losses and statistics.

    Args:
        told: the student's answers to the teacher's queries.
        weighed: the student of which the weights are made, where it is another one.
    """
    c, images = method.config, student.logits.shape[1]
    layers = c.layers or len(student.logits)
    losses, seen = {}, {}

    def add(totals, name, value):
        totals[name] = totals.get(name, 0.0) + value

    for back in range(1, layers + 1):
        # Layers are counted from the end; the student's earlier ones imitate the last one of a shorter teacher.
        layer = -back if back <= len(teacher.logits) else -1
        for image in range(images):
            t, s = predictions(teacher, layer, image), predictions(student, -back, image)
            if c.pair_weight:
                w = pair_weights(method, t, s if weighed is None else predictions(weighed, -back, image))
                for i, row in enumerate(w):
                    entropy = -sum(v * math.log(v) for v in row if v)
                    add(seen, "balanced_pairs/queries_per_point", math.exp(entropy) / len(t) / images / layers)
                    for j, v in enumerate(row):
                        for name, far in zip(PAIR_TERMS, distances(t[i], s[j], method), strict=True):
                            add(losses, name, c.pair_weight * v * far / len(t) / images)
            if method.sampler is not None:
                own = [softmax(row)[i] for i, row in enumerate(attention(method, t, t))]
                add(seen, "balanced_pairs/w_ii", sum(own) / len(t) / images / layers)
                for p in own:
                    add(losses, SAMPLING, c.sampling_weight * -math.log(p) / len(t) / images)
            if c.asked_weight:
                scores = [best(z, method.softmax) if c.asked_points == "score" else 1.0 for z, _ in t]
                for score, *pair in zip(scores, t, predictions(told, -back, image), strict=True):
                    for name, far in zip(ASKED_TERMS, distances(*pair, method), strict=True):
                        add(losses, name, c.asked_weight * score / sum(scores) * far / images)
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
    "warm": {"temperature": 2.0},
    "warm attention": {"temperature": 2.0, "score": "both"},
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
    if asks:  # the teacher's own queries, in the student's form
        for tensor, expected in zip(ours.asked[0][0], method.translator(theirs.decode.own, theirs), strict=True):
            assert (tensor is None) == (expected is None)
            assert tensor is None or torch.equal(tensor, expected)


def test_a_detector_whose_decoder_cannot_be_asked():
    student, teacher = detector("conditional_detr"), detector("yolos", 1, num_queries=9)
    with pytest.raises(UserError, match="needs decode of the student, which yolos cannot give"):
        build(*specs(teacher, student))
    shared, seen = SharedClasses(student.spec, teacher.spec), batch()
    method = build(*specs(student, teacher), asked_weight=0.0, trust=2.0)
    assert method.requires == set()
    ours, theirs = (x(seen["pixel_values"], seen["pixel_mask"]) for x in (student, teacher))
    ours, theirs = shared.student(ours), shared.teacher(theirs)
    losses = method(ours, theirs, seen["labels"])
    expected, statistics = reference(method, ours, theirs)
    trust = method.statistics["balanced_pairs/trust"].item()
    check(method, losses, {k: trust * v for k, v in expected.items()}, statistics | {"balanced_pairs/trust": trust})


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
    weights = balance(-far / 1e-3, 4000)
    torch.testing.assert_close(weights, torch.eye(6).double()[partners], rtol=0, atol=1e-3)


# -- gradients --------------------------------------------------------------------------------------------------------


def outputs(softmax=False, grad=False, teacher_layers=3):
    """Of a student and a teacher, without a detector."""
    columns = 3 + softmax
    return output(5, 1, grad=grad, columns=columns), output(7, 2, teacher_layers, grad=grad, columns=columns)


def alone(softmax=False, **options):
    """A method of pairs alone, for these."""
    like = spec(activation="softmax" if softmax else "sigmoid")
    return build(like, like, **{"asked_weight": 0.0} | options)


@pytest.mark.parametrize("score", ["distance", "sampler", "both"])
def test_weights_carry_no_gradient(score):
    method = alone(score=score, temperature=1.0)
    student, teacher = outputs(grad=True)
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
    assert abs(got - slope(True)) > 1e-2 * abs(got)  # they would carry something


@pytest.mark.parametrize("pair", PAIRS)
def test_what_each_loss_teaches(pair):
    method, student, teacher = make(pair, score="both")
    ours, theirs = ask_both(student, teacher, batch(1))
    theirs.logits.retain_grad(), theirs.boxes.retain_grad()
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


# -- trust ------------------------------------------------------------------------------------------------------------


def labels(*counts, seed=0):
    """Of an image for each of the counts of objects; None: it is not labelled."""
    found = tiny.batch(len(counts), seed=seed, num_classes=3, boxes=[count or 0 for count in counts])["labels"]
    for label, count in zip(found, counts, strict=True):
        label["boxes"] = label["boxes"].double()
        label["labelled"] = count is not None
    return found


def nearer(guess, truth, share):
    """`guess`, in its last layer moved by a share of the way to the truth; with proposals, which do not count."""
    right = replace(guess, logits=guess.logits.clone(), boxes=guess.boxes.clone())
    for image, label in enumerate(truth):
        count, wanted = len(label["boxes"]), torch.full(guess.logits.shape[2:], -9.0).double()
        wanted[:, 3:] = 9  # of softmax heads: no object
        wanted[:count] = -9
        wanted[torch.arange(count), label["class_labels"]] = 9
        right.logits[-1, image].lerp_(wanted, share)
        right.boxes[-1, image, :count].lerp_(label["boxes"], share)
    right.proposals = right.logits[0] - 3, right.boxes[0]
    return right


def detection_loss(output, truth, softmax=False):
    criterion = DetectionCriterion("softmax" if softmax else "sigmoid", class_cost=2, class_loss_weight=2)
    last = replace(output, logits=output.logits[-1:], boxes=output.boxes[-1:], proposals=None)
    return sum(criterion(last, truth).values()).item()


def trust_of(method, *batch):
    losses = method(*batch)
    assert all(loss.isfinite() for loss in losses.values())
    return method.statistics["balanced_pairs/trust"].item()


@pytest.mark.parametrize("softmax", [False, True], ids=["sigmoid", "softmax"])
def test_trust_is_full_before_a_good_teacher_and_0_before_a_worse_one(softmax):
    (student, teacher), truth = outputs(softmax, teacher_layers=2), labels(2, 3)
    good, perfect = nearer(student, truth, 0.9), nearer(teacher, truth, 1)
    assert trust_of(alone(softmax, trust=2.0), student, perfect, truth) == 1
    assert trust_of(alone(softmax, trust=2.0), good, teacher, truth) == 0
    assert trust_of(alone(softmax, trust=2.0), student, student, truth) == 0
    for share in (0.3, 0.6, 0.9):
        some = nearer(teacher, truth, share)
        lead = 1 - detection_loss(some, truth, softmax) / detection_loss(student, truth, softmax)
        assert lead > 0.01
        for trust in (0.5, 1.0, 2.0):
            got = trust_of(alone(softmax, trust=trust), student, some, truth)
            assert got == pytest.approx(min(1, trust * lead), rel=1e-10)


def step_of(i, softmax=False):
    """The i-th of some batches: student, teacher and labels, one of them without objects, some not labelled."""
    truth = labels(*[(2, 3), (0, 0), (None, 4), (1, None)][i % 4], seed=i)
    guesses = (output(5 + j, 10 * i + j, columns=3 + softmax) for j in (1, 2))
    student, teacher = (nearer(x, truth, share) for x, share in zip(guesses, (0.1 + 0.02 * (i % 7), 0.4), strict=True))
    return student, teacher, truth


@pytest.mark.parametrize("softmax", [False, True], ids=["sigmoid", "softmax"])
def test_trust_is_of_running_means_which_batches_without_labels_leave_alone(softmax):
    method, means = alone(softmax, trust=1.0), [0.0, 0.0]
    student, teacher, _ = step_of(100, softmax)
    nothing = student, teacher, labels(None, None)
    assert trust_of(method, *nothing) == 1  # nothing is known against the teacher
    for i in range(30):
        *both, truth = step_of(i, softmax)
        step = max(1 / (i + 1), 0.05)
        means = [m + step * (detection_loss(x, truth, softmax) - m) for m, x in zip(means, both, strict=True)]
        trust = trust_of(method, *both, truth)
        assert 0 < trust < 1 and trust == pytest.approx(1 - means[1] / means[0], rel=1e-10)
        assert trust_of(method, *nothing) == trust


def test_trust_is_saved():
    first, fresh, second = (alone(trust=1.0) for _ in range(3))
    for i in range(3):
        trust_of(first, *step_of(i))
    second.load_state_dict(first.state_dict())
    known, unknown, loaded = (trust_of(method, *step_of(3)) for method in (first, fresh, second))
    assert loaded == known != unknown


def test_without_trust_there_is_no_state():
    method = alone()
    assert not method.state_dict()
    losses = [method(*step_of(i)[:2], step_of(j)[2]) for i, j in ((0, 0), (1, 1), (0, 1))]
    assert all(torch.equal(losses[0][name], losses[2][name]) for name in losses[0])
    assert "balanced_pairs/trust" not in method.statistics


@pytest.mark.parametrize("pair", PAIRS)
def test_trust_scales_imitation_and_not_what_the_sampler_learns(pair):
    (method, student, teacher), seen = make(pair, trust=0.5, score="both", weight=2.0), batch()
    shared = SharedClasses(student.spec, teacher.spec).labels(seen["labels"])
    ours, theirs = ask_both(student, teacher, seen)
    theirs = nearer(theirs, shared, 0.7)
    got, plain = method(ours, theirs, shared), make(pair, score="both", weight=2.0)[0](ours, theirs, shared)
    trust = method.statistics["balanced_pairs/trust"].item()
    assert 0.01 < trust < 0.5 and got.keys() == plain.keys()
    for name in plain:
        expected = plain[name].item() * (1 if name == SAMPLING else trust)
        assert got[name].item() == pytest.approx(expected, rel=1e-12), name


def work(rank, world, path):
    """Trust after each of some batches, of which a rank sees its part."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/{world}", rank=rank, world_size=world)
    method, trusts = alone(trust=1.0), []
    for i, counts in enumerate(((3, 2, 0, 1), (None, None, 4, 0), (None,) * 4, (0, None, 0, 1))):
        truth = labels(*counts, seed=i)
        images = slice(rank * 4 // world, (rank + 1) * 4 // world)
        both = []
        for j, share in ((1, 0.1), (2, 0.4)):
            parts = output(5, 20 * i + j), output(5, 20 * i + j + 10)
            whole = [torch.cat([getattr(x, name) for x in parts], 1) for name in ("logits", "boxes", "queries")]
            whole = nearer(
                replace(parts[0], **dict(zip(("logits", "boxes", "queries"), whole, strict=True))), truth, share
            )
            both.append(
                replace(whole, **{name: getattr(whole, name)[:, images] for name in ("logits", "boxes", "queries")})
            )
        trusts.append(trust_of(method, *both, truth[images]))
    torch.save(trusts, f"{path}/{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over a file store")
def test_two_ranks_trust_as_one_with_both_batches(tmp_path):
    for world in (1, 2):
        torch.multiprocessing.start_processes(work, (world, str(tmp_path)), nprocs=world, start_method="fork")
    one, first, second = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert first == second and first == pytest.approx(one, rel=1e-12)
    assert all(0 < trust < 1 for trust in one) and len(set(one)) == 3  # the batch without labels changes nothing


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "method.temperature must be above 0, not 0.0"),
        ({"key_dim": 0}, "method.key_dim must be above 0, not 0"),
        ({"hidden_dim": 0}, "method.hidden_dim must be above 0, not 0"),
        ({"asked_weight": -1.0}, "method.asked_weight must be 0 or above, not -1.0"),
        ({"score": "distanc"}, "method.score: 'distanc' is not a choice: did you mean 'distance'?"),
        ({"asked_points": "scores"}, "method.asked_points: 'scores' is not a choice: did you mean 'score'?"),
        (
            {f"{name}_weight": 0.0 for name in (*TERMS, "pair", "sampling", "asked")},
            "all weights of balanced_pairs are 0: give one a value, or set method.name=none",
        ),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UserError) as caught:
        BalancedPairsConfig(**options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_layers_that_the_student_lacks_and_the_registry():
    assert get_method("balanced_pairs") is BalancedPairs
    with pytest.raises(UserError, match="method.layers is 4, but the student has 3 decoder layers"):
        alone(layers=4)
