"""A teacher's question in the student's form, between real tiny detectors of all families; weights of its points."""

import math
from functools import cache

import pytest
import torch

from asd_hf.detectors import get_adapter
from asd_hf.detectors.base import DetectorOutput
from asd_hf.phases import Stopwatch
from asd_hf.questions import Translator, ask, ask_teacher, point_scores, point_weights, sine_embedding
from tests import tiny
from tests.families import FAMILIES, OPEN_VOCABULARY, STUDENTS

TEACHERS = [*(name for name in FAMILIES if name != "yolos"), "wide"]  # it has no decoder
LEARNERS = [*(name for name in STUDENTS if name != "yolos"), "wide"]


@cache
def answered(name, seed=0):
    """A detector and its output; 9 queries for teachers (seed 1), 12 for students, and `wide` is twice as wide."""
    values = {"num_queries": 9 if seed else 12, "seed": seed}
    if name == "wide":
        adapter = get_adapter(*FAMILIES["deformable_detr"](d_model=64, **values))
    else:
        adapter = get_adapter(*FAMILIES[name](**values))
    if name in OPEN_VOCABULARY:
        adapter.prompt(tiny.CLASSES)
    batch = tiny.batch(2)
    return adapter, adapter(batch["pixel_values"], batch["pixel_mask"])


def translator(student, teacher):
    torch.manual_seed(0)
    return Translator(student.spec, teacher.spec)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_every_student_answers_questions_of_every_teacher(teacher):
    """Two images of unequal sizes. Between families that no linear layer joins there are no parameters to look at."""
    theirs, told = answered(teacher, 1)
    for name in LEARNERS:
        ours, output = answered(name)
        translate = translator(ours, theirs)
        question = translate(told.decode.own, told)
        for tensor, width in zip(
            question, (ours.spec.hidden_size, ours.spec.hidden_size, ours.spec.reference_size), strict=True
        ):
            assert tensor is None or tensor.shape == (2, 9, width)
        assert (question[1] is not None) == ours.spec.asks_positions, name
        assert (question[2] is not None) == bool(ours.spec.reference_size), name
        answer = ask(output, question)
        assert answer.boxes.shape == (ours.spec.num_layers, 2, 9, 4), name
        assert answer.logits.isfinite().all() and answer.boxes.isfinite().all(), name
        learnt = dict(translate.named_parameters())
        places = [output.features[0], *learnt.values()]
        loss = answer.logits.square().mean() + answer.boxes.square().mean()
        gradients = torch.autograd.grad(loss, places, retain_graph=True)
        assert all(g.isfinite().all() for g in gradients), name
        silent = {"queries.weight"} if not told.decode.own[0].any() else set()  # contents of zeros
        for place, gradient in zip(["student", *learnt], gradients, strict=True):
            assert gradient.any() or place in silent, (name, place)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_teacher_that_is_the_student_reproduces_its_own_answer(name):
    adapter, output = answered(name)
    translate = translator(adapter, adapter)
    assert not list(translate.parameters())
    answer = ask(output, translate(output.decode.own, output))
    for key in ("logits", "boxes", "queries"):
        torch.testing.assert_close(getattr(answer, key), getattr(output, key), rtol=1e-5, atol=1e-5)


def test_no_gradient_reaches_the_teacher():
    """Nor through its question, nor through its answer, nor when it is asked."""
    (theirs, told), (ours, _) = answered("deformable_detr_two_stage", 1), answered("wide")
    assert told.decode.own[0].requires_grad and told.boxes.requires_grad
    references = translator(ours, theirs)(told.decode.own, told)[2]
    assert not references.requires_grad
    contents, *_ = translator(theirs, theirs)(told.decode.own, told)
    assert not contents.requires_grad
    (theirs, answer), (ours, _) = answered("detr", 1), answered("dab_detr")
    assert answer.boxes.requires_grad
    assert not translator(ours, theirs)(answer.decode.own, answer)[2].requires_grad
    assert not ask_teacher(told, told.decode.own).logits.requires_grad


def references_between(student, teacher, references):
    """What the student is told of a teacher whose first layer answers boxes 0, 1, ... 11."""
    (ours, _), (theirs, told) = answered(student), answered(teacher, 1)
    boxes = torch.arange(2.0 * 9 * 4).view(1, 2, 9, 4) / 100
    answer = DetectorOutput(told.logits, torch.cat([boxes, told.boxes[1:]]), told.queries)
    contents, positions, own = told.decode.own
    return translator(ours, theirs)((contents, positions, references(own)), answer)[2], boxes[0], own


def test_references_in_the_form_that_the_student_asks():
    keep = lambda own: own  # noqa: E731
    found, _, own = references_between("deformable_detr", "deformable_detr", keep)
    assert torch.equal(found, own)
    found, _, own = references_between("dab_detr", "rt_detr", keep)
    assert torch.equal(found, own)
    found, _, own = references_between("deformable_detr", "rt_detr", keep)
    assert torch.equal(found, own[..., :2])
    found, boxes, _ = references_between("dab_detr", "deformable_detr", keep)  # points are not enough
    assert torch.equal(found, boxes)
    found, boxes, _ = references_between("dab_detr", "detr", keep)
    assert torch.equal(found, boxes)
    found, boxes, _ = references_between("deformable_detr", "detr", keep)
    assert torch.equal(found, boxes[..., :2])
    found, _, _ = references_between("detr", "rt_detr", keep)
    assert found is None
    # Boxes may be given to any teacher.
    given = torch.rand(2, 9, 4)
    for teacher in ("detr", "deformable_detr", "rt_detr"):
        found, _, _ = references_between("dab_detr", teacher, lambda own: given)
        assert torch.equal(found, given)


def test_positions_that_the_teacher_lacks_are_made_of_its_references():
    (ours, _), (theirs, told) = answered("detr"), answered("rt_detr", 1)
    translate = translator(ours, theirs)
    _, positions, _ = translate(told.decode.own, told)
    references = told.decode.own[2].tolist()
    weight, bias = translate.positions.weight.tolist(), translate.positions.bias.tolist()
    for image, query in ((0, 0), (1, 7)):
        sines = []
        for value in references[image][query]:
            angles = [2 * math.pi * value / 10_000 ** (k / 32) for k in range(32)]
            sines += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert sine_embedding(torch.tensor(references[image][query])).tolist() == pytest.approx(sines, abs=1e-5)
        for row in (0, 31):
            wanted = sum(w * s for w, s in zip(weight[row], sines, strict=True)) + bias[row]
            assert positions[image, query, row].item() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("softmax", [False, True])
def test_points_weigh_as_the_teacher_scores_them(softmax):
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[0, 0, :, -1] = 9  # "no object" of a softmax head must not count
    for layer in range(2):
        for image in range(3):
            scores = []
            for row in logits[layer, image].tolist():
                exponents = [math.exp(z) for z in row]
                if softmax:
                    scores.append(max(exponents[:-1]) / sum(exponents))
                else:
                    scores.append(max(e / (1 + e) for e in exponents))
            assert point_scores(logits, softmax)[layer, image].tolist() == pytest.approx(scores, rel=1e-12)
            shares = [score / sum(scores) for score in scores]
            assert point_weights(logits, softmax)[layer, image].tolist() == pytest.approx(shares, rel=1e-12)


def test_points_that_the_teacher_scores_nothing_weigh_nothing():
    weights = point_weights(torch.full((1, 2, 3), -torch.inf), softmax=False)
    assert torch.equal(weights, torch.zeros(1, 2))


def test_answers_are_timed():
    _, output = answered("detr")
    with Stopwatch(torch.device("cpu")) as watch:
        ask(output, output.decode.own)
    first = watch.seconds["decode"]
    with watch:
        ask_teacher(output, output.decode.own)
    assert 0 < first < watch.seconds["decode"]
