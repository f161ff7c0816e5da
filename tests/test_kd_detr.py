"""KD-DETR on tiny detectors, against loops over the answers to the questions that it asks, in float64."""

import copy

import pytest
import torch

from asd_hf.detectors import get_adapter
from asd_hf.errors import UserError
from asd_hf.methods import get_method
from asd_hf.methods.kd_detr import KDDETR, KDDETRConfig
from tests import tiny
from tests.answers import ask_both, batch, best, detector, divergence, giou_distance, l1, specs

PAIRS = {  # student, teacher and the classes that it knows
    "other numbers": ("deformable_detr", "other", ("kite", "cat", "owl")),
    "boxes": ("rt_detr", "lw_detr", tiny.CLASSES),
    "softmax": ("detr", "rt_detr", tiny.CLASSES),
}
TEMPERATURES = {"softmax": 10, "bernoulli": 1}  # where none is set
TERMS = [f"{group}_{term}" for group in ("general", "specific") for term in ("class", "box", "giou")]


def make(pair, step=3, **options):
    student, teacher, classes = PAIRS[pair]
    student, teacher = detector(student), detector(teacher, 1, num_queries=9, classes=classes)
    torch.manual_seed(0)
    options = {"general_points": 7} | options
    method = KDDETR(KDDETRConfig(**options), *specs(student, teacher)).double()
    method.step = step
    return method, student, teacher


def reference(method, group, student, teacher):
    """The three losses of one group of points, of the answers of both."""
    config, softmax = method.config, method.softmax
    count, images = config.layers or len(student.logits), student.logits.shape[1]
    totals = dict.fromkeys(("class", "box", "giou"), 0.0)
    for back in range(1, count + 1):
        layer = -1 if config.teacher_layer == "last" else max(-back, -len(teacher.logits))
        if config.teacher_layer == "same" and back > len(teacher.logits):
            layer = -1
        for image in range(images):
            z_t, z_s = teacher.logits[layer, image].tolist(), student.logits[-back, image].tolist()
            b_t, b_s = teacher.boxes[layer, image].tolist(), student.boxes[-back, image].tolist()
            scores = [best(z, softmax) for z in z_t]
            for i, score in enumerate(scores):
                w, T = score / sum(scores) / images, config.temperature or TEMPERATURES[config.divergence]
                z = [z_t[i], z_s[i]]
                cooled = [[v / T for v in row] for row in z]
                totals["class"] += w * T**2 * divergence(*cooled, config.divergence == "softmax")
                totals["box"] += w * l1(b_t[i], b_s[i])
                totals["giou"] += w * giou_distance(b_t[i], b_s[i])
    return {f"kd_detr_{group}_{t}": getattr(config, f"{group}_{t}_weight") * v for t, v in totals.items()}


VARIANTS = {
    "default": {},
    "cool softmax": {"temperature": 1.0},
    "bernoulli": {"divergence": "bernoulli"},
    "warm bernoulli": {"divergence": "bernoulli", "temperature": 2.0},
    "same layers": {"teacher_layer": "same"},
    "two layers": {"layers": 2, "teacher_layer": "same"},
    "weights": {name + "_weight": 0.5 + i for i, name in enumerate(TERMS)} | {"weight": 3.0},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("pair", PAIRS)
def test_equals_naive_loops(pair, name):
    if pair == "softmax" and "bernoulli" in name:
        pytest.skip("refused")
    method, student, teacher = make(pair, **VARIANTS[name])
    ours, theirs = ask_both(student, teacher, batch())
    losses = method(ours, theirs, [])
    (_, told_general), (_, told_specific) = ours.asked
    ((_, answer),) = theirs.asked
    expected = reference(method, "general", told_general, answer) | reference(
        method, "specific", told_specific, theirs
    )
    assert list(losses) == list(expected)
    for term, value in expected.items():
        assert losses[term].item() == pytest.approx(method.config.weight * value, rel=1e-9), term
    seen = {}
    for group, output in (("general", answer), ("specific", theirs)):
        scores = [best(z, method.softmax) for image in output.logits[-1].tolist() for z in image]
        seen[f"kd_detr/{group}_score"] = sum(scores) / len(scores)
    assert {key: value.item() for key, value in method.statistics.items()} == pytest.approx(seen)


@pytest.mark.parametrize("pair", PAIRS)
def test_both_answer_the_same_questions(pair):
    """Each group apart: general points first, then the teacher's own, in the student's form."""
    method, student, teacher = make(pair)
    ours, theirs = ask_both(student, teacher, batch())
    method(ours, theirs, [])
    ((general, answer),) = theirs.asked
    assert not answer.logits.requires_grad  # no graph is kept of the teacher's decoder
    own = theirs.decode.own
    for asked, (question, told) in zip(ours.asked, ((general, answer), (own, theirs)), strict=True):
        for tensor, expected in zip(asked[0], method.translate(question, told), strict=True):
            assert (tensor is None) == (expected is None)
            assert tensor is None or torch.equal(tensor, expected)
    for tensor, like in zip(general, own, strict=True):
        assert (tensor is None) == (like is None)
        assert tensor is None or tensor.shape == (3, 7, like.shape[2]) and tensor.dtype == like.dtype
        assert tensor is None or torch.equal(tensor, tensor[:1].expand_as(tensor))  # the same for all images


def general_question(step, seed, pair="other numbers", **options):
    method, student, teacher = make(pair, step, **options)
    torch.manual_seed(seed)
    ours, theirs = ask_both(student, teacher, batch(2))
    method(ours, theirs, [])
    return theirs.asked[0][0]


def test_general_points_are_drawn_afresh_every_step_and_by_it_alone():
    first, again, later = general_question(3, 0), general_question(3, 1), general_question(4, 0)
    for one, same, other in zip(first, again, later, strict=True):
        assert torch.equal(one, same)
        assert not (one == other).any()


@pytest.mark.parametrize("pair", ["other numbers", "boxes"])
def test_general_points_are_normal_numbers_and_references_their_sigmoid(pair):
    question = general_question(3, 0, pair, general_points=500)
    references = question[2]
    assert (references > 0).all() and (references < 1).all()
    for tensor in (question[0], question[1], references.logit()):
        if tensor is not None:
            points = tensor[0]
            assert points.mean(0).abs().max() < 0.2 and (points.std(0) - 1).abs().max() < 0.15
            together = torch.corrcoef(points.T) - torch.eye(points.shape[1])
            assert together.abs().max() < 0.2


@pytest.mark.parametrize("group", ["general", "specific"])
def test_a_group_without_weights_is_not_asked(group):
    other = {"general": "specific", "specific": "general"}[group]
    options = {f"{group}_{term}_weight": 0.0 for term in ("class", "box", "giou")}
    method, student, teacher = make("other numbers", **options)
    ours, theirs = ask_both(student, teacher, batch())
    losses = method(ours, theirs, [])
    assert set(losses) == {f"kd_detr_{other}_{term}" for term in ("class", "box", "giou")}
    assert len(ours.asked) == 1 and len(theirs.asked) == (other == "general")
    whole, *_ = make("other numbers")
    both = whole(*ask_both(student, teacher, batch()), [])
    assert all(losses[term].item() == pytest.approx(both[term].item(), rel=1e-12) for term in losses)


@pytest.mark.parametrize("pair", PAIRS)
def test_gradient_reaches_student_and_adapters_and_not_the_teacher(pair):
    method, student, teacher = make(pair)
    ours, theirs = ask_both(student, teacher, batch(1))
    places = [p for p in student.model.parameters() if p.requires_grad]
    for term, loss in method(ours, theirs, []).items():
        gradients = torch.autograd.grad(loss, places, retain_graph=True, allow_unused=True)
        assert sum(g is not None and g.any().item() for g in gradients) > len(places) / 3, term
        learnt = list(method.parameters())
        assert not learnt or all(g.any() for g in torch.autograd.grad(loss, learnt, retain_graph=True)), term
        targets = [p for p in teacher.model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, targets, retain_graph=True, allow_unused=True)
        assert all(g is None for g in gradients), term


def test_a_teacher_that_is_the_student_has_nothing_to_teach():
    student = detector("deformable_detr_two_stage")
    teacher = get_adapter(copy.deepcopy(student.model), student.processor)
    method = KDDETR(KDDETRConfig(general_points=7), *specs(student, teacher))
    losses = method(*ask_both(student, teacher, batch()), [])
    # The layers before the last one imitate the last.
    assert all(loss > 1e-4 for loss in losses.values())
    method.config.teacher_layer = "same"
    losses = method(*ask_both(student, teacher, batch()), [])
    assert all(abs(loss) < 1e-9 for loss in losses.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"general_points": 0}, "method.general_points must be above 0"),
        ({"temperature": 0.0}, "method.temperature must be above 0"),
        ({"specific_box_weight": -1.0}, "method.specific_box_weight must be 0 or above"),
        ({"divergence": "kl"}, "method.divergence: 'kl' is not a choice"),
        ({f"{name}_weight": 0.0 for name in TERMS}, "all weights of kd_detr are 0"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        KDDETRConfig(**options)


def test_pairs_that_cannot_be():
    detr, yolos = detector("detr"), detector("yolos")
    with pytest.raises(UserError, match="needs decode of the teacher, which yolos cannot give"):
        KDDETR(KDDETRConfig(), *specs(detr, yolos))
    with pytest.raises(UserError, match="needs a class head of sigmoids, detr has a softmax: set method.divergence"):
        KDDETR(KDDETRConfig(divergence="bernoulli"), *specs(detr, detr))
    with pytest.raises(UserError, match="method.layers is 4, but the student has 3"):
        KDDETR(KDDETRConfig(layers=4), *specs(detr, detr))


def test_one_class_is_taught_by_its_own_logit():
    """Its softmax would be 1 whatever the logit, and its divergence 0."""
    student, teacher = detector("rt_detr"), detector("other", 1, classes=("kite", "owl"))
    both = specs(student, teacher)
    message = "rt_detr has a single logit for the one class that both know: set method.divergence=bernoulli"
    for group in ("general", "specific"):
        with pytest.raises(UserError, match=message):
            KDDETR(KDDETRConfig(**{f"{group}_class_weight": 0.0}), *both)
    KDDETR(KDDETRConfig(general_class_weight=0.0, specific_class_weight=0.0), *both)
    losses = KDDETR(KDDETRConfig(divergence="bernoulli"), *both).double()(*ask_both(student, teacher, batch()), [])
    places = list(student.model.parameters())
    for group in ("general", "specific"):
        loss = losses[f"kd_detr_{group}_class"]
        gradients = torch.autograd.grad(loss, places, retain_graph=True, allow_unused=True)
        assert loss > 1e-3 and any(g is not None and g.any() for g in gradients)
    # A softmax head also has "no object", to which the class is compared.
    detr = detector("detr")
    KDDETR(KDDETRConfig(), *specs(detr, teacher))


def test_registered():
    assert get_method("kd_detr") is KDDETR
