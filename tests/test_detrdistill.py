"""DETRDistill against loops written from the formulas."""

import math
import re
from dataclasses import replace

import pytest
import torch

from asd_hf.classes import SharedClasses
from asd_hf.detectors import get_adapter
from asd_hf.detectors.base import DetectorOutput, DetectorSpec
from asd_hf.errors import UserError
from asd_hf.methods import get_method
from asd_hf.methods.detrdistill import DETRDistill, DETRDistillConfig
from tests import tiny
from tests.families import FAMILIES
from tests.test_distances import entropy, iou_and_giou, kl
from tests.test_index_pairing import clipped
from tests.test_matching import cheapest

CLASSES = ("a", "b", "c")
NO_FEATURES = {"feature_weight": 0.0}
NO_ASSIGNMENT = {f"assignment_{term}_weight": 0.0 for term in ("class", "box", "giou")}
NO_MATCHING = {"class_weight": 0.0, "box_weight": 0.0, "giou_weight": 0.0}
PREDICTIONS = NO_FEATURES | NO_ASSIGNMENT
FEATURES = NO_MATCHING | NO_ASSIGNMENT


def spec(num_layers=3, width=8, strides=(8, 16), activation="sigmoid", capabilities=("features",)):
    return DetectorSpec(
        family="deformable_detr",
        hidden_size=width,
        class_names=CLASSES,
        num_layers=num_layers,
        num_queries=5,
        strides=strides,
        pixel_mean=(0, 0, 0),
        pixel_std=(1, 1, 1),
        activation=activation,
        capabilities=frozenset(capabilities),
    )


CANVAS = torch.ones(2, 32, 48, dtype=torch.bool)  # the second image ends at 30 x 24 pixels
CANVAS[1, 24:], CANVAS[1, :, 30:] = False, False


def output(seed, num_queries=4, num_layers=3, columns=3, width=8, strides=(8, 16), grad=False):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    logits = 2 * normal(num_layers, 2, num_queries, columns) - 1
    centre = torch.rand(num_layers, 2, num_queries, 2, generator=g, dtype=torch.float64)
    size = 0.1 + 0.4 * torch.rand(num_layers, 2, num_queries, 2, generator=g, dtype=torch.float64)
    queries = normal(num_layers, 2, num_queries, width)
    features = [normal(2, width, 32 // stride, 48 // stride) for stride in strides]
    boxes = torch.cat([centre, size], -1)
    leaves = [x.requires_grad_(grad) for x in (logits, boxes, queries, *features)]
    return DetectorOutput(*leaves[:3], leaves[3:], mask=CANVAS)


def method(activation="sigmoid", student=None, teacher=None, **options):
    torch.manual_seed(0)
    own, other = spec(activation=activation, **student or {}), spec(activation=activation, **teacher or {})
    return DETRDistill(DETRDistillConfig(**options), own, other).double()


LABELS = [
    {"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.3, 0.4, 0.3, 0.4], [0.7, 0.6, 0.4, 0.5]])},
    {"class_labels": torch.tensor([], dtype=torch.int64), "boxes": torch.empty(0, 4)},
]


def teacher_layer(back, teacher):
    """Index from the end of the teacher's layer for the student's layer `back` from the end."""
    return -back if back <= len(teacher.logits) else -1


# -- predictions ------------------------------------------------------------------------------------------------------


def pairs_by_trying_all(config, s_logits, s_boxes, t_logits, t_boxes, softmax):
    def cost(i, j):
        classes = kl(s_logits[i], t_logits[j], softmax) + entropy(t_logits[j], softmax)
        l1 = sum(abs(a - b) for a, b in zip(s_boxes[i], t_boxes[j], strict=True))
        giou = iou_and_giou(s_boxes[i], t_boxes[j])[1]
        return config.class_cost * classes + config.bbox_cost * l1 - config.giou_cost * giou

    return cheapest(torch.tensor([[cost(i, j) for j in range(len(t_boxes))] for i in range(len(s_boxes))]))


def all_pairs(config, student, teacher, softmax):
    """[(layer from the end, image, pairs, student's predictions, teacher's)], the teacher's boxes clipped."""
    for back in range(1, (config.layers or len(student.logits)) + 1):
        theirs = teacher_layer(back, teacher)
        for image in range(2):
            s = student.logits[-back, image].tolist(), student.boxes[-back, image].tolist()
            t = teacher.logits[theirs, image].tolist(), teacher.boxes[theirs, image].tolist()
            t = t[0], [clipped(box) if config.clip_boxes else box for box in t[1]]
            yield back, image, pairs_by_trying_all(config, *s, *t, softmax), s, t


def reference_predictions(config, student, teacher, softmax):
    total = {"class": 0.0, "box": 0.0, "giou": 0.0}
    for _, _, pairs, (s_logits, s_boxes), (t_logits, t_boxes) in all_pairs(config, student, teacher, softmax):
        for i, j in pairs:
            share = 1 / (2 * len(pairs))  # of both images
            l1 = sum(abs(a - b) for a, b in zip(s_boxes[i], t_boxes[j], strict=True))
            total["class"] += share * config.class_weight * kl(s_logits[i], t_logits[j], softmax)
            total["box"] += share * config.box_weight * l1
            total["giou"] += share * config.giou_weight * (1 - iou_and_giou(s_boxes[i], t_boxes[j])[1])
    return {f"detrdistill_{name}": value for name, value in total.items()}


VARIANTS = {
    "default": {},
    "two layers": {"layers": 2},
    "other weights": {"class_weight": 2.0, "box_weight": 3.0, "giou_weight": 0.5, "clip_boxes": False},
    "other costs": {"class_cost": 0.1, "bbox_cost": 1.0, "giou_cost": 9.0},
}


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("students", "teachers", "teacher_layers"), [(4, 4, 3), (3, 5, 2), (5, 3, 4)])
@pytest.mark.parametrize("name", VARIANTS)
def test_predictions_equal_naive_loops(name, students, teachers, teacher_layers, activation):
    distil, columns = method(activation, **PREDICTIONS | VARIANTS[name]), 4 if activation == "softmax" else 3
    student = output(1, students, columns=columns)
    teacher = output(2, teachers, teacher_layers, columns=columns)
    got = distil(student, teacher, LABELS)
    want = reference_predictions(distil.config, student, teacher, activation == "softmax")
    assert got.keys() == want.keys()
    for key in want:
        assert got[key].item() == pytest.approx(want[key], rel=1e-12), key


@pytest.mark.parametrize(("students", "teachers"), [(5, 5), (3, 6), (6, 3)])
def test_matching_as_released_gives_the_same_numbers(students, teachers):
    student, teacher = output(1, students), output(2, teachers)
    batched = method(**PREDICTIONS)
    apart = method(**PREDICTIONS, as_released=True, contrastive_weight=0.0)
    got, want = apart(student, teacher, LABELS), batched(student, teacher, LABELS)
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
    assert torch.equal(apart.statistics["detrdistill/kept_pairs"], batched.statistics["detrdistill/kept_pairs"])


@pytest.mark.parametrize(("students", "teachers"), [(4, 4), (3, 5), (5, 3)])
def test_statistic_counts_the_pairs_of_the_layer_before(students, teachers):
    student, teacher = output(1, students), output(2, teachers)
    for x, y in ((student, teacher),) * (students == teachers):  # so that some pairs do stay
        x.logits[1:], x.boxes[1:], y.logits[1:], y.boxes[1:] = x.logits[:1], x.boxes[:1], y.logits[:1], y.boxes[:1]
        x.boxes[2, 0, 0, :2] = 1 - x.boxes[2, 0, 0, :2]
    distil = method(**PREDICTIONS)
    distil(student, teacher, LABELS)
    seen = {(back, image): pairs for back, image, pairs, *_ in all_pairs(distil.config, student, teacher, False)}
    kept = [pair in seen[back + 1, image] for (back, image) in seen if back < 3 for pair in seen[back, image]]
    assert distil.statistics["detrdistill/kept_pairs"].item() == pytest.approx(sum(kept) / len(kept))
    distil = method(**PREDICTIONS, layers=1)
    distil(student, teacher, LABELS)
    assert not distil.statistics


# -- contrast ---------------------------------------------------------------------------------------------------------


def project(net, x):
    """Linear, linear, layer norm, ReLU, linear, of a list of floats; then to length 1."""
    first, second, norm, _, last = net

    def linear(layer, v):
        rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
        return [sum(a * b for a, b in zip(row, v, strict=True)) + bias for row, bias in rows]

    x = linear(second, linear(first, x))
    mean = sum(x) / len(x)
    scale = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + norm.eps)
    x = [(v - mean) / scale * w + b for v, w, b in zip(x, norm.weight.tolist(), norm.bias.tolist(), strict=True)]
    x = linear(last, [max(v, 0.0) for v in x])
    length = math.sqrt(sum(v * v for v in x))
    return [v / length for v in x]


@pytest.mark.parametrize(("students", "teachers"), [(4, 4), (3, 5), (5, 3)])
def test_contrast_equals_naive_loops(students, teachers):
    distil = method(
        student={"width": 6}, **PREDICTIONS, contrastive_weight=0.3, contrastive_temperature=0.2, contrastive_dim=5
    )
    student, teacher = output(1, students, width=6), output(2, teachers)
    got = distil(student, teacher, LABELS)["detrdistill_contrastive"]
    want = 0.0
    for back, image, pairs, *_ in all_pairs(distil.config, student, teacher, False):
        ours = [project(distil.contrast.student, student.queries[-back, image, i].tolist()) for i, _ in pairs]
        theirs = [project(distil.contrast.teacher, teacher.queries[-back, image, j].tolist()) for _, j in pairs]
        for own, t in enumerate(theirs):
            scores = [sum(a * b for a, b in zip(t, s, strict=True)) / 0.2 for s in ours]
            want += 0.3 * (math.log(sum(map(math.exp, scores))) - scores[own]) / len(pairs) / 2
    assert got.item() == pytest.approx(want, rel=1e-9)


# -- features ---------------------------------------------------------------------------------------------------------


def reference_features(distil, student, teacher, labels, softmax):
    config, mask, total = distil.config, teacher.mask, 0.0
    for back in range(1, (config.layers or len(student.logits)) + 1):
        layer = teacher_layer(back, teacher)
        for image in range(2):
            scored = []
            for i, row in enumerate(teacher.logits[layer, image].tolist()):
                if softmax:
                    probs = [math.exp(v) / sum(map(math.exp, row)) for v in row][:-1]
                else:
                    probs = [1 / (1 + math.exp(-v)) for v in row]
                scored += [(p, i) for p in probs]
            best = sorted(scored, reverse=True)[: config.top_predictions]
            quality = []
            for p, i in best:
                box = teacher.boxes[layer, image, i].tolist()
                ious = [iou_and_giou(box, gt)[0] for gt in labels[image]["boxes"].double().tolist()]
                quality.append(p * max(ious, default=1.0))
            for level, stride in enumerate((8, 16)):
                total += error_of_level(
                    distil, student, teacher, image, level, stride, best, quality, layer, mask[image]
                )
    return config.feature_weight * total / 2  # images


def error_of_level(distil, student, teacher, image, level, stride, best, quality, layer, mask):
    target, source = teacher.features[level][image], student.features[level][image]
    project = distil.maps.project[level]
    cells, likeness, errors = [], [], []
    for y in range(target.shape[1]):
        for x in range(target.shape[2]):
            if mask[int((y + 0.5) * stride), int((x + 0.5) * stride)]:
                cells.append((y, x))
    for y, x in cells:
        t, s = target[:, y, x], source[:, y, x]
        if isinstance(project, torch.nn.Conv2d):
            s = project.weight[:, :, 0, 0] @ s + project.bias
        total = 0.0
        for (_, i), q in zip(best, quality, strict=True):
            h = teacher.queries[layer, image, i]
            total += q * ((h @ t) / (h.norm() * t.norm())).item()
        likeness.append(max(total, distil.config.mask_floor))
        errors.append((t - s).square().mean().item())
    top = max(likeness)
    return sum((m / top) ** 2 * e for m, e in zip(likeness, errors, strict=True)) / len(cells)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("width", "teacher_layers"), [(8, 3), (6, 2)])
@pytest.mark.parametrize(
    "options", [{}, {"layers": 1, "feature_weight": 3.0}, {"top_predictions": 5}, {"mask_floor": 0.5}]
)
def test_features_equal_naive_loops(options, width, teacher_layers, activation):
    distil, columns = method(activation, {"width": width}, **FEATURES | options), 4 if activation == "softmax" else 3
    student = output(1, width=width, columns=columns)
    teacher = output(2, 6, teacher_layers, columns=columns)
    got = distil(student, teacher, LABELS)
    want = reference_features(distil, student, teacher, LABELS, activation == "softmax")
    assert got.keys() == {"detrdistill_feature"}
    assert got["detrdistill_feature"].item() == pytest.approx(want, rel=1e-9)


# -- assignment, of real detectors -----------------------------------------------------------------------------------


def run(adapter, batch):
    return adapter(batch["pixel_values"], batch["pixel_mask"])


def detectors(**student):
    """A student of another width, other queries and fewer layers than its teacher."""
    own = tiny.deformable_detr(seed=1, num_queries=7, **{"d_model": 64, "decoder_layers": 2} | student)
    teacher = tiny.deformable_detr(seed=2, num_queries=9, decoder_layers=3)
    return tuple(get_adapter(model, tiny.processor()) for model in (own, teacher))


def reference_assignment(config, answer, matched, labels):
    """Focal, L1 and GIoU losses of `answer`, its queries assigned as those of `matched`, layers from the end."""
    total = {"class": 0.0, "box": 0.0, "giou": 0.0}
    num_boxes = max(sum(len(label["boxes"]) for label in labels), 1)
    for back in range(1, (config.layers or len(answer.logits)) + 1):
        for image, label in enumerate(labels):
            objects = list(zip(label["class_labels"].tolist(), label["boxes"].tolist(), strict=True))
            logits, boxes = matched.logits[-back, image].tolist(), matched.boxes[-back, image].tolist()

            def cost(i, wanted, box, logits=logits, boxes=boxes):
                p = 1 / (1 + math.exp(-logits[i][wanted]))
                focal = 0.25 * (1 - p) ** 2 * -math.log(p) - 0.75 * p**2 * -math.log(1 - p)
                l1 = sum(abs(a - b) for a, b in zip(boxes[i], box, strict=True))
                return 2 * focal + 5 * l1 - 2 * iou_and_giou(boxes[i], box)[1]

            pairs = set()
            if objects:
                pairs = cheapest(torch.tensor([[cost(i, *gt) for gt in objects] for i in range(len(boxes))]))
            wanted = {i: objects[j] for i, j in pairs}
            rows = zip(answer.logits[-back, image].tolist(), answer.boxes[-back, image].tolist(), strict=True)
            for i, (row, box) in enumerate(rows):
                for column, logit in enumerate(row):
                    hit = i in wanted and wanted[i][0] == column
                    p = 1 / (1 + math.exp(-logit if hit else logit))  # of the right answer
                    total["class"] += (0.25 if hit else 0.75) * (1 - p) ** 2 * -math.log(p) / num_boxes
                if i in wanted:
                    total["box"] += sum(abs(a - b) for a, b in zip(box, wanted[i][1], strict=True)) / num_boxes
                    total["giou"] += (1 - iou_and_giou(box, wanted[i][1])[1]) / num_boxes
    return {f"detrdistill_assignment_{k}": getattr(config, f"assignment_{k}_weight") * v for k, v in total.items()}


@pytest.mark.parametrize("as_released", [False, True])
@pytest.mark.parametrize("layers", [None, 1])
def test_assignment_equals_naive_loops(layers, as_released):
    (own, other), batch = detectors(), tiny.batch(3, boxes=(2, 0, 1))
    weights = {"assignment_class_weight": 3.0, "assignment_box_weight": 4.0}
    config = DETRDistillConfig(
        **NO_FEATURES, **NO_MATCHING, **weights, layers=layers, as_released=as_released, contrastive_weight=0
    )
    distil = DETRDistill(config, own.spec, other.spec)
    with torch.no_grad():
        student, teacher = run(own, batch), run(other, batch)
        got = distil(student, teacher, batch["labels"])
        queries, positions, points = teacher.decode.own
        translated = distil.translator.queries(queries), distil.translator.positions(positions), points
        answer = student.decode(*translated)
    assert answer.logits.shape == (2, 3, 9, 5)
    want = reference_assignment(config, answer, answer if as_released else teacher, batch["labels"])
    assert got.keys() == want.keys()
    for key in want:
        assert got[key].item() == pytest.approx(want[key], rel=1e-4), key


ALL = {"contrastive_weight": 0.2, "contrastive_dim": 16}


@pytest.mark.parametrize("boxes", [(3, 0), (0, 0)])
@pytest.mark.parametrize("as_released", [False, True])
def test_student_and_every_parameter_learn_and_the_teacher_does_not(as_released, boxes):
    (own, other), batch = detectors(), tiny.batch(2, boxes=boxes)
    distil = DETRDistill(DETRDistillConfig(**ALL, as_released=as_released), own.spec, other.spec)
    losses = distil(run(own, batch), run(other, batch), batch["labels"])
    assert losses.keys() == {
        *(f"detrdistill_{x}" for x in ("class", "box", "giou", "feature", "contrastive")),
        *(f"detrdistill_assignment_{x}" for x in ("class", "box", "giou")),
    }
    assert all(loss.isfinite() and loss.shape == () for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is None for p in other.model.parameters())
    for name, parameter in distil.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # A bias before the layer norm of equal vectors, or of keys alone, may rightly have none.
        assert parameter.grad.abs().sum() > 0 or parameter.dim() == 1, name
    touched = [n for n, p in own.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    for part in ("input_proj", "encoder", "decoder", "class_embed", "bbox_embed"):
        assert any(part in name for name in touched), part


def test_images_without_labels_learn_from_the_teacher_alone():
    (own, other), batch = detectors(), tiny.batch(2, boxes=(0, 0))
    distil = DETRDistill(DETRDistillConfig(), own.spec, other.spec)
    labels = [label | {"labelled": False} for label in batch["labels"]]
    losses = distil(run(own, batch), run(other, batch), labels)
    for name, loss in losses.items():
        assert loss.item() == 0 if "assignment" in name else loss.item() > 0, name


@pytest.mark.parametrize("pair", [("detr", "deformable_detr"), ("deformable_detr_two_stage", "conditional_detr")])
def test_other_families_teach(pair):
    own, other = (get_adapter(*FAMILIES[name](seed=seed)) for seed, name in enumerate(pair))
    classes, batch = SharedClasses(own.spec, other.spec), tiny.batch(2)
    distil = DETRDistill(DETRDistillConfig(), *classes.specs(own.spec, other.spec))
    losses = distil(run(own, batch), classes.teacher(run(other, batch)), batch["labels"])
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in distil.parameters())


# -- all parts --------------------------------------------------------------------------------------------------------


def test_equal_outputs_cost_nothing():
    same = output(1)
    losses = method(**NO_ASSIGNMENT, clip_boxes=False)(same, same, LABELS)
    assert losses.keys() == {f"detrdistill_{x}" for x in ("class", "box", "giou", "feature")}
    assert all(abs(loss.item()) < 1e-12 for loss in losses.values())


def test_predictions_and_features_of_the_teacher_get_no_gradient():
    student, teacher = output(1, grad=True), output(2, grad=True)
    sum(method(**NO_ASSIGNMENT, **ALL)(student, teacher, LABELS).values()).backward()
    for x in (teacher.logits, teacher.boxes, teacher.queries, *teacher.features):
        assert x.grad is None
    for x in (student.logits, student.boxes, student.queries, *student.features):
        assert x.grad.abs().sum() > 0


def test_halves_of_a_batch_average_to_the_whole():
    """As two ranks do; the assignment's losses are divided by the boxes of all ranks, see the criterion."""
    student, teacher = output(1), output(2)
    distil = method(**NO_ASSIGNMENT, **ALL)
    whole = distil(student, teacher, LABELS)

    def part(x, image):
        def cut(y):
            return y[:, image : image + 1]

        features = [f[image : image + 1] for f in x.features]
        tensors = {"logits": cut(x.logits), "boxes": cut(x.boxes), "queries": cut(x.queries)}
        return replace(x, **tensors, features=features, mask=x.mask[image : image + 1])

    halves = [distil(part(student, i), part(teacher, i), LABELS[i : i + 1]) for i in (0, 1)]
    for key in whole:
        assert whole[key].item() == pytest.approx((halves[0][key] + halves[1][key]).item() / 2), key


def test_low_precision_is_compared_in_fp32_under_autocast():
    def cast(x, dtype):
        tensors = {name: getattr(x, name).to(dtype) for name in ("logits", "boxes", "queries")}
        return replace(x, **tensors, features=[f.to(dtype) for f in x.features])

    distil = method(**NO_ASSIGNMENT, **ALL).float()
    half = cast(output(1), torch.bfloat16), cast(output(2), torch.bfloat16)
    want = distil(*(cast(x, torch.float32) for x in half), LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = distil(*half, LABELS)
    assert all(torch.equal(got[key], want[key]) and got[key].dtype == torch.float32 for key in want)


def test_a_part_without_weight_is_neither_computed_nor_required():
    assert method(**PREDICTIONS).requires == frozenset() and not list(method(**PREDICTIONS).parameters())
    assert method(**FEATURES).requires == {"features"}
    assert method(**FEATURES)(output(1), output(2), LABELS).keys() == {"detrdistill_feature"}
    with pytest.raises(UserError, match="needs decode of the student"):
        method()
    only = replace(output(1), features=[], mask=None)
    assert len(method(**PREDICTIONS)(only, only, LABELS)) == 3


def test_contrast_is_on_as_released_and_off_otherwise():
    for options, weight in (({}, 0), ({"as_released": True}, 0.2), ({"contrastive_weight": 0.5}, 0.5)):
        config = DETRDistillConfig(**options)
        assert config.term_weight("contrastive") == weight and config.contrasts == (weight > 0)
    assert not DETRDistillConfig(as_released=True, contrastive_weight=0.0).contrasts
    saved = DETRDistillConfig(as_released=True)
    assert not replace(saved, as_released=False).contrasts  # as a saved configuration is changed
    assert saved.term_weight("box") == 5 and saved.term_weight("assignment_class") == 2


def test_contrast_alone_acts_on_more_than_predictions():
    alone = method(**FEATURES | NO_FEATURES, contrastive_weight=0.3, contrastive_dim=5)
    assert alone.requires == {"features"}  # so that gradients are measured where it acts
    student, teacher = output(1, grad=True), output(2)
    loss = sum(alone(student, teacher, LABELS).values())
    loss.backward()
    assert not student.logits.grad.any() and not student.boxes.grad.any() and student.queries.grad.any()
    assert alone.maps is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_floor": 0.0}, "method.mask_floor must be above 0"),
        ({"top_predictions": 0}, "method.top_predictions must be above 0"),
        ({"contrastive_temperature": 0.0}, "method.contrastive_temperature must be above 0"),
        ({"contrastive_weight": -1.0}, "method.contrastive_weight must be 0 or above"),
        ({"layers": 4, **PREDICTIONS}, "method.layers is 4, but the student has 3 decoder layers"),
    ],
)
def test_mistakes_are_refused(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        method(**options)


def test_is_found_by_its_name():
    assert get_method("detrdistill") is DETRDistill
