"""OD-DETR against loops written from its description, in float64, on real decoders."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from asd_hf.detectors import get_adapter
from asd_hf.errors import UserError
from asd_hf.methods import get_method, od_detr
from asd_hf.methods.od_detr import ODDETR, ODDETRConfig
from tests import tiny
from tests.families import FAMILIES

# Points and positions; boxes alone; boxes of proposals; positions alone and a softmax head.
DECODERS = ("deformable_detr_refine", "dab_detr", "rt_detr", "detr")
IN_FP32 = ("dab_detr",)  # Transformers' code runs in nothing wider
MATCHING = ("od_detr_matching_class", "od_detr_matching_box", "od_detr_matching_giou")
PREDICTION = ("od_detr_class", "od_detr_box", "od_detr_giou")
AUXILIARY = ("od_detr_auxiliary_class", "od_detr_auxiliary_box", "od_detr_auxiliary_giou")
TERMS = MATCHING + PREDICTION + AUXILIARY


def adapters(name="deformable_detr_refine"):
    """A student and its moving average, which is a little behind."""
    student = get_adapter(*FAMILIES[name]())
    if name not in IN_FP32:
        student.model.double()
    teacher = get_adapter(copy.deepcopy(student.model), student.processor)
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in teacher.model.named_parameters():
            if "backbone" not in key:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return student, teacher


def scene(name="deformable_detr_refine", grad=False, **options):
    """Outputs of both and labels of images with and without objects."""
    student, teacher = adapters(name)
    batch = tiny.batch(**{"batch_size": 3, "boxes": (3, 0, 4)} | options)
    labels = [label | {"boxes": label["boxes"].double()} for label in batch["labels"]]
    pixels = batch["pixel_values"], batch["pixel_mask"]
    with torch.no_grad():
        taught = teacher(*pixels)
    with torch.set_grad_enabled(grad):
        return student(*pixels), taught, labels, student, teacher


def method(spec, step=10**9, **options):
    made = ODDETR(ODDETRConfig(**options), spec, spec)
    made.step = step
    return made


# -- the reference: one image, one layer, one query at a time, plain floats -------------------------------------------


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def softmax(row):
    top = max(row)
    e = [math.exp(v - top) for v in row]
    return [v / sum(e) for v in e]


def iou_giou(a, b):
    """Of cxcywh boxes."""
    ax1, ay1, ax2, ay2 = a[0] - a[2] / 2, a[1] - a[3] / 2, a[0] + a[2] / 2, a[1] + a[3] / 2
    bx1, by1, bx2, by2 = b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2
    inter = max(0.0, min(ax2, bx2) - max(ax1, bx1)) * max(0.0, min(ay2, by2) - max(ay1, by1))
    union = a[2] * a[3] + b[2] * b[3] - inter
    hull = (max(ax2, bx2) - min(ax1, bx1)) * (max(ay2, by2) - min(ay1, by1))
    return inter / union, inter / union - (hull - union) / hull


def l1(a, b):
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


def cost(logits, box, kind, target, is_softmax):
    """Of one prediction for one object, as the detection losses match."""
    if is_softmax:
        of_class = -softmax(logits)[kind]
    else:
        p = sigmoid(logits[kind])
        of_class = 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8) - 0.75 * p**2 * -math.log(1 - p + 1e-8)
    return of_class + 5 * l1(box, target) - 2 * iou_giou(box, target)[1]


def class_loss(logits, rated, is_softmax):
    """`rated`: what each class that the query is labelled with should be rated."""
    if is_softmax:
        log_p = [math.log(p) for p in softmax(logits)]
        if not rated:
            return -log_p[-1]
        return -sum(log_p[c] for c in rated) / len(rated)
    total = 0
    for c, z in enumerate(logits):
        p, y = sigmoid(z), rated.get(c, 0.0)
        total += abs(y - p) ** 2 * -(y * math.log(p) + (1 - y) * math.log(1 - p))
    return total


def divergence(student, teacher, is_softmax):
    if is_softmax:
        return sum(t * math.log(t / s) for t, s in zip(softmax(teacher), softmax(student), strict=True))
    pairs = [(sigmoid(t), sigmoid(s)) for t, s in zip(teacher, student, strict=True)]
    return sum(t * math.log(t / s) + (1 - t) * math.log((1 - t) / (1 - s)) for t, s in pairs)


def lists(output):
    return output.logits.tolist(), output.boxes.tolist()


def reference(student, taught, labels, is_softmax, per_object=2):
    """The nine terms without weights."""
    (s_logits, s_boxes), (t_logits, t_boxes) = lists(student), lists(taught)
    num_layers, num_images, num_queries = len(s_logits), len(s_logits[0]), len(s_logits[0][0])
    objects = [list(zip(label["class_labels"].tolist(), label["boxes"].tolist(), strict=True)) for label in labels]
    num_objects = max(sum(len(o) for o in objects), 1)
    total = dict.fromkeys(TERMS, 0.0)

    def match(logits, boxes, image):
        if not objects[image]:
            return {}
        costs = [[cost(z, b, *o, is_softmax) for o in objects[image]] for z, b in zip(logits, boxes, strict=True)]
        return dict(zip(*linear_sum_assignment(costs), strict=True))

    for layer in range(num_layers):
        class_total, weights = 0.0, 0.0
        for image in range(num_images):
            if not labels[image].get("labelled", True):
                continue
            own = match(s_logits[layer][image], s_boxes[layer][image], image)
            theirs = match(t_logits[layer][image], t_boxes[layer][image], image)
            for q in range(num_queries):
                box, rated = s_boxes[layer][image][q], {}
                for found in (own, theirs):
                    if q in found:
                        kind, target = objects[image][found[q]]
                        rated[kind] = max(rated.get(kind, 0.0), iou_giou(box, target)[0])
                weight = 0.1 if is_softmax and not rated else 1.0
                class_total += weight * class_loss(s_logits[layer][image][q], rated, is_softmax)
                weights += weight
                if q in theirs and q not in own:
                    target = objects[image][theirs[q]][1]
                    total["od_detr_matching_box"] += l1(box, target) / num_objects
                    total["od_detr_matching_giou"] += (1 - iou_giou(box, target)[1]) / num_objects
        total["od_detr_matching_class"] += class_total / (weights if is_softmax else num_objects)

    answer_logits, answer_boxes = lists(student.decode(*taught.decode.own))
    for layer in range(num_layers):
        for image in range(num_images):
            for q in range(num_queries):
                share = 1 / (num_images * num_queries)
                z, b = answer_logits[layer][image][q], answer_boxes[layer][image][q]
                z_t, b_t = t_logits[layer][image][q], t_boxes[layer][image][q]
                total["od_detr_class"] += share * divergence(z, z_t, is_softmax)
                total["od_detr_box"] += share * l1(b, b_t)
                total["od_detr_giou"] += share * (1 - iou_giou(b, b_t)[1])

    question = [None if x is None else x.clone() for x in taught.decode.own]
    asked = []  # image, place in the group, object
    for image in range(num_images):
        place = 0
        for kind, target in objects[image]:
            candidates = [  # each query once, of the layer where it fits best
                min(
                    (cost(t_logits[layer][image][q], t_boxes[layer][image][q], kind, target, is_softmax), layer, q)
                    for layer in range(num_layers)
                )
                for q in range(num_queries)
            ]
            for _, layer, q in sorted(candidates)[:per_object]:
                if place == num_queries:
                    break
                question[0][image, place] = taught.queries[layer, image, q]
                if question[1] is not None:
                    question[1][image, place] = taught.decode.own[1][image, q]
                if question[2] is not None:
                    question[2][image, place] = taught.boxes[layer, image, q, : question[2].shape[-1]]
                asked.append((image, place, kind, target))
                place += 1
    answer_logits, answer_boxes = lists(student.decode(*question))
    for layer in range(num_layers):
        for image, place, kind, target in asked:
            share = 1 / (per_object * num_objects)
            z, b = answer_logits[layer][image][place], answer_boxes[layer][image][place]
            iou, giou = iou_giou(b, target)
            total["od_detr_auxiliary_class"] += share * class_loss(z, {kind: iou}, is_softmax)
            total["od_detr_auxiliary_box"] += share * l1(b, target)
            total["od_detr_auxiliary_giou"] += share * (1 - giou)
    return total


WEIGHTS = {f"{term.removeprefix('od_detr_')}_weight": 0.5 + number for number, term in enumerate(TERMS)}


def check(losses, expected, precision=1e-9):
    for (name, loss), weight in zip(losses.items(), WEIGHTS.values(), strict=True):
        assert loss.item() == pytest.approx(weight * expected[name], rel=precision, abs=1e-12), name


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_golden(name):
    student, taught, labels, adapter, _ = scene(name)
    made = method(adapter.spec, **WEIGHTS)
    losses = made(student, taught, labels)
    assert tuple(losses) == TERMS
    expected = reference(student, taught, labels, adapter.spec.activation == "softmax")
    assert all(value > 1e-6 for value in expected.values())
    check(losses, expected, 1e-4 if name in IN_FP32 else 1e-9)


def test_golden_with_several_labels_of_one_query():
    """Both matches name an object, of one class or of two."""
    for classes in ([2, 2], [1, 3]):
        student, taught, labels, adapter, _ = scene(batch_size=1, boxes=(2,))
        labels[0]["class_labels"] = torch.tensor(classes)
        # A student whose queries are the teacher's, but for two that have changed places.
        order = torch.arange(12)
        pair = method(adapter.spec).criterion.assign([taught], labels)[0][0][-2:] % 12
        order[pair] = order[pair.flip(0)]
        student.logits, student.boxes = taught.logits[:, :, order], taught.boxes[:, :, order]
        check(method(adapter.spec, **WEIGHTS)(student, taught, labels), reference(student, taught, labels, False))


def test_golden_with_another_number_of_queries_per_object():
    student, taught, labels, adapter, _ = scene()
    made = method(adapter.spec, queries_per_object=3, **WEIGHTS)  # 12 queries for 4 objects: just as many as there are
    check(made(student, taught, labels), reference(student, taught, labels, False, per_object=3))


def test_golden_with_more_objects_than_the_group_holds():
    student, taught, labels, adapter, _ = scene(boxes=(8, 1, 0))
    check(method(adapter.spec, **WEIGHTS)(student, taught, labels), reference(student, taught, labels, False))


@pytest.mark.parametrize("name", ["deformable_detr_refine", "detr"])
def test_golden_with_unlabelled_images(name):
    student, taught, labels, adapter, _ = scene(name, boxes=(2, 0, 0))
    labels[1]["labelled"] = False
    expected = reference(student, taught, labels, name == "detr")
    check(method(adapter.spec, **WEIGHTS)(student, taught, labels), expected)


@pytest.mark.parametrize("name", ["deformable_detr_refine", "detr"])
def test_batches_without_objects(name):
    student, taught, labels, adapter, _ = scene(name, boxes=(0,))
    losses = method(adapter.spec, **WEIGHTS)(student, taught, labels)
    check(losses, reference(student, taught, labels, name == "detr"))
    assert losses["od_detr_matching_class"] > 0  # the background, as in the detection loss
    assert not any(losses[term] for term in AUXILIARY)
    unlabelled = [label | {"labelled": False} for label in labels]
    losses = method(adapter.spec)(student, taught, unlabelled)
    assert not losses["od_detr_matching_class"] and losses["od_detr_class"] > 0


def test_equal_models_agree():
    """Of the terms that imitate; the others are losses against labels."""
    student, _, labels, adapter, _ = scene()
    made = method(adapter.spec)
    losses = made(student, student, labels)
    assert all(losses[term].abs() < 1e-12 for term in PREDICTION + MATCHING[1:])
    assert made.statistics["od_detr/same_match"] == 1


def test_share_of_same_matches():
    student, taught, labels, adapter, _ = scene()
    made = method(adapter.spec)
    made(student, taught, labels)
    mine, theirs = made.criterion.assign([student, taught], labels)
    pairs = [set(zip(*(x.tolist() for x in pair), strict=True)) for pair in (mine, theirs)]
    assert 0 < len(pairs[0] & pairs[1]) < len(pairs[1])
    assert made.statistics["od_detr/same_match"].item() == pytest.approx(len(pairs[0] & pairs[1]) / len(pairs[1]))


def test_ramp():
    student, taught, labels, adapter, _ = scene()
    whole = method(adapter.spec)(student, taught, labels)
    for step, part in ((0, 0), (500, 0.25), (2000, 1), (3000, 1)):
        losses = method(adapter.spec, step=step, ramp_steps=2000)(student, taught, labels)
        assert all(losses[term].item() == pytest.approx(part * whole[term].item()) for term in TERMS)
    assert method(adapter.spec, ramp_steps=2000).settled_at == 2000
    assert method(adapter.spec, step=0, ramp_steps=0)(student, taught, labels) == whole


# -- what is not done -------------------------------------------------------------------------------------------------


def test_terms_of_no_weight_cost_nothing():
    student, taught, labels, adapter, _ = scene()
    groups = (MATCHING, PREDICTION, AUXILIARY)
    off = {group: {f"{term.removeprefix('od_detr_')}_weight": 0.0 for term in group} for group in groups}
    asked, decode = [], student.decode

    def counted(*question):
        asked.append(1)
        return decode(*question)

    student.decode = counted
    for group, decoded in ((MATCHING, 2), (PREDICTION, 1), (AUXILIARY, 1)):
        asked.clear()
        losses = method(adapter.spec, **off[group])(student, taught, labels)
        assert set(losses) == set(TERMS) - set(group) and len(asked) == decoded
    without = method(replace(adapter.spec, capabilities=frozenset()), **off[PREDICTION], **off[AUXILIARY])
    student.decode = taught.decode = None
    assert set(without(student, taught, labels)) == set(MATCHING)


@pytest.mark.parametrize("name", ["deformable_detr_refine", "detr"])
def test_two_ranks_train_as_one(name, monkeypatch):
    """An image's losses do not depend on the others of its batch, and divisors are those of all ranks."""
    options = {"batch_size": 4, "boxes": (1, 0, 5, 2), "sizes": ((64, 64),)}
    student, taught, labels, adapter, _ = scene(name, **options)
    whole = method(adapter.spec)(student, taught, labels)
    student_adapter, teacher_adapter = adapters(name)
    batch, halves = tiny.batch(**options), []
    for rows in (slice(0, 2), slice(2, 4)):
        pixels = batch["pixel_values"][rows], batch["pixel_mask"][rows]
        with torch.no_grad():
            halves.append((student_adapter(*pixels), teacher_adapter(*pixels), labels[rows]))
    sums = []
    monkeypatch.setattr(od_detr, "sum_over_ranks", lambda count: (sums[-1].append(count) or count, 1))
    for half in halves:
        sums.append([])
        method(adapter.spec)(*half)
    ranks = []
    for half in halves:
        totals = iter([sum(counts) for counts in zip(*sums, strict=True)])
        monkeypatch.setattr(od_detr, "sum_over_ranks", lambda count, totals=totals: (next(totals), 2))
        ranks.append(method(adapter.spec)(*half))
    for term in TERMS:
        assert sum(rank[term].item() for rank in ranks) / 2 == pytest.approx(whole[term].item(), rel=1e-9), term


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_gradients_reach_the_student_alone(name):
    student_adapter, teacher_adapter = adapters(name)
    student_adapter.model.train()
    batch = tiny.batch(2, boxes=(2, 0))
    pixels = batch["pixel_values"], batch["pixel_mask"]
    made = method(student_adapter.spec)
    student, taught = student_adapter(*pixels), teacher_adapter(*pixels)
    labels = [label | {"boxes": label["boxes"].double()} for label in batch["labels"]]
    reached = {}
    for term, loss in made(student, taught, labels).items():
        student_adapter.model.zero_grad()
        loss.backward(retain_graph=True)
        encoder = [p for key, p in student_adapter.model.named_parameters() if ".encoder" in key and "weight" in key]
        reached[term] = sum(p.grad.abs().sum().item() for p in encoder if p.grad is not None)
    assert all(reached[term] > 0 for term in TERMS), reached
    assert all(p.grad is None for p in teacher_adapter.model.parameters())


def test_labels_carry_no_gradient():
    """The IoU that a class is to be rated with is a label: the class loss does not move boxes."""
    student, taught, labels, adapter, _ = scene()
    student.boxes.requires_grad_()
    student.logits.requires_grad_()
    losses = method(adapter.spec)(student, taught, labels)
    inputs = student.logits, student.boxes
    of_logits, of_boxes = torch.autograd.grad(losses["od_detr_matching_class"], inputs, allow_unused=True)
    assert of_logits.any() and of_boxes is None


def test_losses_of_half_predictions_are_fp32():
    student, taught, labels, adapter, _ = scene()
    half, same = (
        [replace(x, logits=x.logits.bfloat16().to(dtype), boxes=x.boxes.bfloat16().to(dtype)) for x in outputs]
        for outputs in [(student, taught)]
        for dtype in (torch.bfloat16, torch.float32)
    )
    losses, expected = method(adapter.spec)(*half, labels), method(adapter.spec)(*same, labels)
    assert all(losses[term].dtype == torch.float32 and losses[term] == expected[term] for term in MATCHING)


def test_bf16_autocast():
    student, taught, labels, adapter, _ = scene()
    exact = method(adapter.spec)(student, taught, labels)
    adapter.model.float()
    teacher = get_adapter(copy.deepcopy(adapters()[1].model).float(), adapter.processor)
    batch = tiny.batch(3, boxes=(3, 0, 4))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        pixels = batch["pixel_values"], batch["pixel_mask"]
        rounded = method(adapter.spec)(adapter(*pixels), teacher(*pixels), batch["labels"])
    for term in TERMS:
        assert rounded[term].dtype == torch.float32
        assert rounded[term].item() == pytest.approx(exact[term].item(), rel=0.2, abs=0.05), term


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_registered():
    assert get_method("od_detr") is ODDETR


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("family", "rt_detr"),
        ("num_layers", 5),
        ("num_queries", 7),
        ("hidden_size", 48),
        ("asks_positions", False),
        ("reference_size", 4),
    ],
)
def test_refuses_another_teacher(field, value):
    spec = adapters()[0].spec
    with pytest.raises(UserError, match=f"{field} is .* set model.teacher: ema and training.ema_decay"):
        ODDETR(ODDETRConfig(), spec, replace(spec, **{field: value}))


def test_refuses_what_cannot_be():
    spec = adapters()[0].spec
    with pytest.raises(UserError, match="method.queries_per_object must be above 0"):
        ODDETRConfig(queries_per_object=0)
    with pytest.raises(UserError, match="method.queries_per_object is 13, but the student has 12 queries"):
        ODDETR(ODDETRConfig(queries_per_object=13), spec, spec)
    with pytest.raises(UserError, match="needs decode of the student"):
        ODDETR(ODDETRConfig(), replace(spec, capabilities=frozenset()), spec)
