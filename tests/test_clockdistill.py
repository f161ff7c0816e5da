"""CLoCKDistill: maps and questions at objects, against loops in float64."""

import copy
from dataclasses import replace

import pytest
import torch

from asd_hf.detectors import get_adapter
from asd_hf.errors import UserError
from asd_hf.methods import get_method
from asd_hf.methods.clockdistill import CLoCKDistill, CLoCKDistillConfig
from tests import maps, tiny
from tests.answers import ask_both, batch, best, detector, divergence, giou_distance, l1, specs

ONLY_MAPS = {"class_weight": 0.0, "box_weight": 0.0, "giou_weight": 0.0}
ONLY_QUESTIONS = {"foreground_weight": 0.0, "background_weight": 0.0}
PAIRS = {  # student, teacher and the classes that it knows
    "other numbers": ("deformable_detr", "other", ("kite", "cat", "owl")),
    "points teach boxes": ("rt_detr", "deformable_detr", tiny.CLASSES),
    "boxes teach points": ("deformable_detr_refine", "deformable_detr_two_stage", tiny.CLASSES),
}


def make(pair, step=3, **options):
    student, teacher, classes = PAIRS[pair]
    student, teacher = detector(student), detector(teacher, 1, num_queries=9, classes=classes)
    torch.manual_seed(0)
    method = CLoCKDistill(CLoCKDistillConfig(**{"points": 8} | options), *specs(student, teacher)).double()
    method.step = step
    return method, student, teacher


# -- maps -------------------------------------------------------------------------------------------------------------

CANVAS = maps.canvas(80, 96, (80, 96), (56, 40), (64, 96))
OBJECTS = [  # cxcywh of the valid image: one in another, a thin one across a border of cells, none, one without area
    [[0.4, 0.5, 0.6, 0.5], [0.45, 0.5, 0.2, 0.2], [0.9, 0.2, 0.02, 0.3]],
    [],
    [[0.3, 0.6, 0.0, 0.0]],
]


def label(boxes, number):
    boxes = torch.tensor(boxes, dtype=torch.float64).view(-1, 4)
    classes = torch.zeros(len(boxes), dtype=torch.int64)
    return {"class_labels": classes, "boxes": boxes, "image_id": torch.tensor(number)}


def covered(box, image, size):
    """Cells (row, column) that a box of the image touches; a point has one cell."""
    height, width = (int(CANVAS[image].any(axis).sum()) for axis in (1, 0))
    x, y, w, h = box
    ranges = []
    for centre, side, extent, canvas, count in (
        (x, w, width, CANVAS.shape[2], size[1]),
        (y, h, height, CANVAS.shape[1], size[0]),
    ):
        low, high = ((centre + sign * side / 2) * extent / canvas * count for sign in (-1, 1))
        ranges.append([i for i in range(count) if i + 1 > low and (i < high or i <= low)])
    return {(i, j) for i in ranges[1] for j in ranges[0]}


def reference_of_maps(method, student, teacher):
    inside = beside = 0.0
    for (ours, theirs), project in zip(method.maps.pairs, method.maps.project, strict=True):
        source, target = student.features[ours], teacher.features[theirs]
        size = target.shape[2:]
        if source.shape[2:] != size or student.mask is not teacher.mask:
            source = maps.in_frame_of(source, student.mask, teacher.mask, size)
        source, valid = project(source), maps.inside(teacher.mask, size)
        for image, boxes in enumerate(OBJECTS):
            cells = {(i, j) for i in range(size[0]) for j in range(size[1]) if valid[image][i][j]}
            scale = dict.fromkeys(cells, 0.0)
            for box in boxes:
                own = covered(box, image, size) & cells
                for cell in own:
                    scale[cell] = max(scale[cell], 1 / len(own))
            free = [cell for cell in cells if not scale[cell]]
            for i, j in cells:
                pairs = zip(source[image, :, i, j].tolist(), target[image, :, i, j].tolist(), strict=True)
                squares = [(a - b) ** 2 for a, b in pairs]
                squared = sum(squares) / len(squares) / len(OBJECTS)
                inside += scale[i, j] * squared
                beside += squared / len(free) if (i, j) in free else 0
    return {"clockdistill_foreground": inside, "clockdistill_background": beside}


@pytest.mark.parametrize("widths", [(6, 6), (6, 4)])
@pytest.mark.parametrize("strides", [((8, 16), (8, 16)), ((8, 16, 32), (16, 32))])
def test_maps_equal_naive_loops(strides, widths):
    torch.manual_seed(0)
    config = CLoCKDistillConfig(foreground_weight=2.0, background_weight=0.5, weight=3.0, **ONLY_MAPS)
    both = [maps.spec(strides=s, hidden_size=width) for s, width in zip(strides, widths, strict=True)]
    method = CLoCKDistill(config, *both).double()
    outputs = [maps.output(CANVAS, s, width, seed) for s, width, seed in zip(strides, widths, (0, 1), strict=True)]
    losses = method(*outputs, [label(boxes, i) for i, boxes in enumerate(OBJECTS)])
    expected = reference_of_maps(method, *outputs)
    assert list(losses) == list(expected)
    for term, weight in (("clockdistill_foreground", 3 * 2.0), ("clockdistill_background", 3 * 0.5)):
        assert losses[term].item() == pytest.approx(weight * expected[term], rel=1e-12)


def test_images_full_of_objects_and_batches_without_any():
    config = CLoCKDistillConfig(foreground_weight=1.0, background_weight=1.0, **ONLY_MAPS)
    method = CLoCKDistill(config, maps.spec(), maps.spec())
    outputs = [maps.output(CANVAS, seed=seed) for seed in (0, 1)]
    empty = method(*outputs, [label([], i) for i in range(3)])
    assert empty["clockdistill_foreground"] == 0 and empty["clockdistill_background"] > 0
    full = method(*outputs, [label([[0.5, 0.5, 1, 1]], i) for i in range(3)])
    assert full["clockdistill_background"] == 0
    assert full["clockdistill_foreground"].item() == pytest.approx(empty["clockdistill_background"].item())


# -- questions --------------------------------------------------------------------------------------------------------


def reference_of_answers(method, student, teacher, counts):
    config, totals = method.config, dict.fromkeys(("class", "box", "giou"), 0.0)
    for back in range(1, (config.layers or len(student.logits)) + 1):
        layer = -back if back <= len(teacher.logits) else -1
        for image, count in enumerate(counts):
            z_t, z_s = teacher.logits[layer, image].tolist(), student.logits[-back, image].tolist()
            b_t, b_s = teacher.boxes[layer, image].tolist(), student.boxes[-back, image].tolist()
            scores = [best(z, method.softmax) for z in z_t]
            for i, score in enumerate(scores if count else []):
                w = score / sum(scores) / len(counts)
                totals["class"] += w * divergence(z_t[i], z_s[i], method.softmax)
                totals["box"] += w * l1(b_t[i], b_s[i])
                totals["giou"] += w * giou_distance(b_t[i], b_s[i])
    return {f"clockdistill_{term}": getattr(config, f"{term}_weight") * value for term, value in totals.items()}


@pytest.mark.parametrize("options", [{}, {"layers": 2}, {"class_weight": 3.0, "box_weight": 0.5, "giou_weight": 0.0}])
@pytest.mark.parametrize("pair", PAIRS)
def test_answers_equal_naive_loops(pair, options):
    method, student, teacher = make(pair, **ONLY_QUESTIONS | options)
    data = batch()
    ours, theirs = ask_both(student, teacher, data)
    losses = method(ours, theirs, data["labels"])
    ((_, told),), ((_, answer),) = ours.asked, theirs.asked
    expected = reference_of_answers(method, told, answer, [len(x["boxes"]) for x in data["labels"]])
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-9)


def test_softmax_heads_are_one_distribution():
    """No family with one asks at references, so its head is made of another's."""
    student, teacher = detector("rt_detr"), detector("lw_detr", 1, num_queries=9)
    head = [replace(spec, activation="softmax", class_names=spec.class_names[:-1]) for spec in specs(student, teacher)]
    method = CLoCKDistill(CLoCKDistillConfig(points=8, **ONLY_QUESTIONS), *head).double()
    data = batch()
    ours, theirs = ask_both(student, teacher, data)
    losses = method(ours, theirs, data["labels"])
    expected = reference_of_answers(method, ours.asked[0][1], theirs.asked[0][1], [3, 0, 1])
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-9)


def questions(pair, data, step=3, **options):
    """What was asked of the teacher and of the student, and the method."""
    method, student, teacher = make(pair, step, **ONLY_QUESTIONS | options)
    ours, theirs = ask_both(student, teacher, data)
    method(ours, theirs, data["labels"])
    return theirs.asked[0][0], ours.asked[0][0], method, theirs


@pytest.mark.parametrize("pair", PAIRS)
def test_both_are_asked_at_the_objects(pair):
    """Objects in turn, first as they are; then near where they are."""
    data = batch()
    to_teacher, to_student, method, theirs = questions(pair, data)
    boxes = data["labels"][0]["boxes"]
    for asked in (to_teacher, to_student):
        references = asked[2]
        at = boxes[:, : references.shape[-1]]
        torch.testing.assert_close(references[0, :3], at)
        torch.testing.assert_close(references[2, :1], data["labels"][2]["boxes"][:, : references.shape[-1]])
        assert not torch.isclose(references[2, 1:], references[2, :1]).any()
        moved = references[0, 3:6]
        assert not torch.isclose(moved, at).any()
        assert ((moved - at)[:, :2].abs() <= 0.2 * boxes[:, 2:]).all()
    own = theirs.decode.own
    for slot in range(8):  # the mean of the teacher's contents, image by image
        torch.testing.assert_close(to_teacher[0][:, slot], sum(own[0].unbind(1)) / 9)
    for tensor, expected in zip(to_student[:1], method.translate.queries(to_teacher[0])[None], strict=True):
        torch.testing.assert_close(tensor, expected)


def test_sizes_are_moved_too_and_stay_in_the_image():
    data = batch()
    data["labels"][0]["boxes"][1] = torch.tensor([0.6, 0.6, 0.8, 0.8])
    references = questions("points teach boxes", data, points=303, jitter=0.9)[1][2]
    assert references.min() > 0 and references.max() == 1
    assert (references[1] == 0.5).all()  # without objects, for no loss: a box that every decoder can take
    boxes, moved = data["labels"][0]["boxes"], references[0, 3:].view(100, 3, 4)
    factors = moved[..., 2:] / boxes[:, 2:]
    shifts = 2 * (moved - boxes)[..., :2] / boxes[:, 2:]
    whole = ((moved > 0) & (moved < 1)).all(-1)
    for noise in (factors[whole] - 1, shifts[whole]):
        assert -0.9 <= noise.min() < -0.8 and 0.6 < noise.max() <= 0.9 and abs(noise.mean()) < 0.15
    draws = torch.cat([factors, shifts], -1)[whole]
    assert (torch.corrcoef(draws.T) - torch.eye(4)).abs().max() < 0.3  # each of the four has its own


def test_position_embeddings_are_those_of_the_nearest_of_the_teachers_queries():
    data = batch()
    (_, positions, references), _, _, theirs = questions("points teach boxes", data)
    _, own, places = theirs.decode.own
    for image in (0, 2):
        for slot in range(8):
            distances = [(places[image, q] - references[image, slot]).norm().item() for q in range(9)]
            assert torch.equal(positions[image, slot], own[image, distances.index(min(distances))])


def test_not_moved_without_jitter_and_the_first_where_there_are_too_many():
    data = batch()
    references = questions("points teach boxes", data, jitter=0.0)[1][2]
    torch.testing.assert_close(references[0], data["labels"][0]["boxes"][[0, 1, 2, 0, 1, 2, 0, 1]])
    references = questions("points teach boxes", data, points=2)[1][2]
    torch.testing.assert_close(references[0], data["labels"][0]["boxes"][:2])


def test_draws_depend_on_step_and_image_alone():
    data = batch()
    torch.manual_seed(1)
    first = questions("other numbers", data)[0][2]
    torch.manual_seed(2)
    assert torch.equal(questions("other numbers", data)[0][2], first)
    later = questions("other numbers", data, step=4)[0][2]
    assert torch.equal(later[0, :3], first[0, :3]) and not torch.isclose(later[0, 3:], first[0, 3:]).any()
    # The same boxes in another image are moved otherwise.
    data["labels"][2] |= {key: data["labels"][0][key] for key in ("boxes", "class_labels")}
    asked = questions("other numbers", data)[0][2]
    assert torch.equal(asked[2, :3], asked[0, :3]) and not torch.isclose(asked[2, 3:], asked[0, 3:]).any()


def test_an_images_losses_do_not_depend_on_the_others_of_its_batch():
    sizes = ((96, 96),)  # the canvas would depend on them
    data = tiny.batch(3, sizes=sizes, boxes=(3, 0, 5))
    method, student, teacher = make("other numbers")
    together = method(*ask_both(student, teacher, data), data["labels"])
    alone = [{key: value[i : i + 1] for key, value in data.items()} for i in range(3)]
    alone = [method(*ask_both(student, teacher, part), part["labels"]) for part in alone]
    for term, loss in together.items():
        assert loss.item() == pytest.approx(sum(part[term].item() for part in alone) / 3, rel=1e-6), term


# -- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS)
def test_gradient_reaches_student_and_adapters_and_not_the_teacher(pair):
    method, student, teacher = make(pair)
    data = batch(2)
    ours, theirs = ask_both(student, teacher, data)
    places = [p for p in student.model.parameters() if p.requires_grad]
    targets = [p for p in teacher.model.parameters() if p.requires_grad]
    losses = method(ours, theirs, data["labels"])
    for term, loss in losses.items():
        gradients = torch.autograd.grad(loss, places, retain_graph=True, allow_unused=True)
        share = 3 if term in ("clockdistill_class", "clockdistill_box", "clockdistill_giou") else 50
        assert sum(g is not None and g.any().item() for g in gradients) > len(places) / share, term
        gradients = torch.autograd.grad(loss, targets, retain_graph=True, allow_unused=True)
        assert all(g is None for g in gradients), term
    learnt = list(method.parameters())
    if learnt:
        gradients = torch.autograd.grad(sum(losses.values()), learnt, retain_graph=True)
        assert all(g.any() for g in gradients)
    for part in data["labels"]:
        part |= {"boxes": part["boxes"][:0], "class_labels": part["class_labels"][:0]}
    losses = method(ours, theirs, data["labels"])
    assert all(losses[f"clockdistill_{term}"] == 0 for term in ("foreground", "class", "box", "giou"))
    gradients = torch.autograd.grad(sum(losses.values()), [*learnt, ours.features[0]])
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("name", ["deformable_detr_refine", "rt_detr"])
def test_a_teacher_that_is_the_student_has_nothing_to_teach(name):
    student = detector(name)
    teacher = get_adapter(copy.deepcopy(student.model), student.processor)
    method = CLoCKDistill(CLoCKDistillConfig(points=8), *specs(student, teacher))
    data = batch()
    losses = method(*ask_both(student, teacher, data), data["labels"])
    assert len(losses) == 5 and all(abs(loss) < 1e-9 for loss in losses.values())


def test_a_part_without_weights_is_left_out_with_what_it_requires():
    data = batch()
    method, student, teacher = make("other numbers", **ONLY_MAPS)
    ours, theirs = ask_both(student, teacher, data)
    assert set(method(ours, theirs, data["labels"])) == {"clockdistill_foreground", "clockdistill_background"}
    assert not ours.asked and not theirs.asked and method.requires == {"features"} and method.translate is None
    method, *_ = make("other numbers", **ONLY_QUESTIONS)
    ours.features = theirs.features = None
    losses = method(ours, theirs, data["labels"])
    assert set(losses) == {f"clockdistill_{term}" for term in ("class", "box", "giou")}
    assert method.requires == {"decode"} and method.maps is None
    detr = detector("detr")
    assert CLoCKDistill(CLoCKDistillConfig(**ONLY_MAPS), *specs(detr, detr)).requires == {"features"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 0}, "method.points must be above 0"),
        ({"jitter": 1.0}, r"method.jitter must be in \[0, 1\), not 1.0"),
        ({"jitter": -0.1}, r"method.jitter must be in \[0, 1\), not -0.1"),
        ({"foreground_weight": -1.0}, "method.foreground_weight must be 0 or above"),
        (ONLY_MAPS | ONLY_QUESTIONS, "all weights of clockdistill are 0"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        CLoCKDistillConfig(**options)


def test_pairs_that_cannot_be():
    dab, conditional = detector("dab_detr"), detector("conditional_detr")
    for pair, message in (((dab, conditional), "conditional_detr, the teacher"), ((conditional, dab), "the student")):
        with pytest.raises(UserError, match=f"{message}, takes no references: set method.class_weight"):
            CLoCKDistill(CLoCKDistillConfig(), *specs(*pair))
    with pytest.raises(UserError, match="needs decode of the teacher, which yolos cannot give"):
        CLoCKDistill(CLoCKDistillConfig(), *specs(dab, detector("yolos")))
    with pytest.raises(UserError, match="method.layers is 4, but the student has 3"):
        CLoCKDistill(CLoCKDistillConfig(layers=4), *specs(dab, dab))


def test_registered():
    assert get_method("clockdistill") is CLoCKDistill
