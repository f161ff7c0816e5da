"""Pseudo-labels against loops written from the formulas."""

import math
import re
from dataclasses import replace

import pytest
import torch
from torchvision.ops import batched_nms

from asd_hf.detectors import get_adapter
from asd_hf.detectors.base import DetectorOutput, DetectorSpec
from asd_hf.distances import clip_to_image
from asd_hf.errors import UserError
from asd_hf.methods import get_method
from asd_hf.methods.pseudo_labels import PseudoLabels, PseudoLabelsConfig
from asd_hf.ops import cxcywh_to_xyxy
from tests import tiny
from tests.test_distances import iou_and_giou
from tests.test_index_pairing import clipped
from tests.test_matching import cheapest

CLASSES = ("a", "b", "c")


def spec(activation="sigmoid"):
    return DetectorSpec(
        family="deformable_detr",
        hidden_size=8,
        class_names=CLASSES,
        num_layers=2,
        num_queries=5,
        strides=(8,),
        pixel_mean=(0, 0, 0),
        pixel_std=(1, 1, 1),
        activation=activation,
        capabilities=frozenset(),
    )


def output(seed, num_queries=5, num_layers=2, columns=3, near=False, grad=False):
    """Three images. Where `near`, many boxes are duplicates, and none is sure in the last image."""
    g = torch.Generator().manual_seed(seed)
    shape = num_layers, 3, num_queries
    logits = 3 * torch.randn(*shape, columns, generator=g, dtype=torch.float64)
    centre = torch.rand(*shape, 2, generator=g, dtype=torch.float64)
    size = 0.2 + 0.3 * torch.rand(*shape, 2, generator=g, dtype=torch.float64)
    if near:
        centre, size = (0.45 + 0.1 * centre, 0.4 + 0.2 * size)
        logits[:, 2] = -5
        if columns > 3:
            logits[:, 2, :, 3] = 5
    boxes = torch.cat([centre, size], -1)
    return DetectorOutput(logits.requires_grad_(grad), boxes.requires_grad_(grad), torch.zeros(*shape, 8))


def method(activation="sigmoid", **options):
    return PseudoLabels(PseudoLabelsConfig(**options), spec(activation), spec(activation))


LABELS = [
    {"class_labels": torch.tensor([0, 1]), "boxes": torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.1, 0.1, 0.1, 0.1]])},
    {"class_labels": torch.tensor([2]), "boxes": torch.tensor([[0.52, 0.47, 0.45, 0.5]])},
    {"class_labels": torch.tensor([], dtype=torch.int64), "boxes": torch.empty(0, 4), "labelled": False},
]


def probabilities(row, softmax):
    if softmax:
        return [math.exp(v) / sum(map(math.exp, row)) for v in row]
    return [1 / (1 + math.exp(-v)) for v in row]


def reference_labels(config, teacher, labels, softmax):
    """[[(class, box)] an image], surest first."""
    images = []
    for image, label in enumerate(labels):
        found = []
        for row, box in zip(teacher.logits[-1, image].tolist(), teacher.boxes[-1, image].tolist(), strict=True):
            probs = probabilities(row, softmax)[: len(CLASSES)]
            found.append((max(probs), probs.index(max(probs)), clipped(box)))
        found.sort(reverse=True)
        kept = []
        for score, name, box in found:  # greedily: a duplicate is one of what is kept
            overlaps = [iou_and_giou(box, other)[0] for _, n, other in kept if n == name]
            if config.nms_iou is None or max(overlaps, default=0) <= config.nms_iou:
                kept.append((score, name, box))
        kept = [(score, name, box) for score, name, box in kept if score > config.threshold]
        if config.skip_known_iou is not None:
            known = label["boxes"].double().tolist()
            kept = [k for k in kept if all(iou_and_giou(k[2], b)[0] <= config.skip_known_iou for b in known)]
        images.append([(name, box) for _, name, box in kept][: config.max_labels])
    return images


def reference_losses(config, student, labels, softmax):
    """Focal loss, L1 and GIoU over the number of labels, cross entropy over the weights; layers are summed."""
    total, num_labels = {"class": 0.0, "box": 0.0, "giou": 0.0}, max(sum(map(len, labels)), 1)
    for layer in range(len(student.logits)):
        entropy, weight = 0.0, 0.0
        for image, objects in enumerate(labels):
            logits, boxes = student.logits[layer, image].tolist(), student.boxes[layer, image].tolist()

            def cost(i, name, box, logits=logits, boxes=boxes):
                p = probabilities(logits[i], softmax)[name]
                classes = -p if softmax else 0.25 * (1 - p) ** 2 * -math.log(p) - 0.75 * p**2 * -math.log(1 - p)
                l1 = sum(abs(a - b) for a, b in zip(boxes[i], box, strict=True))
                return 2 * classes + 5 * l1 - 2 * iou_and_giou(boxes[i], box)[1]

            pairs = set()
            if objects:
                costs = [[cost(i, *label) for label in objects] for i in range(len(boxes))]
                pairs = cheapest(torch.tensor(costs, dtype=torch.float64))
            wanted = {i: objects[j] for i, j in pairs}
            for i, (row, box) in enumerate(zip(logits, boxes, strict=True)):
                probs = probabilities(row, softmax)
                if softmax:
                    share = 1 if i in wanted else 0.1
                    entropy -= share * math.log(probs[wanted[i][0] if i in wanted else -1])
                    weight += share
                else:
                    for name, p in enumerate(probs):
                        hit = i in wanted and wanted[i][0] == name
                        right = p if hit else 1 - p
                        total["class"] += (0.25 if hit else 0.75) * (1 - right) ** 2 * -math.log(right) / num_labels
                if i in wanted:
                    total["box"] += sum(abs(a - b) for a, b in zip(box, wanted[i][1], strict=True)) / num_labels
                    total["giou"] += (1 - iou_and_giou(box, wanted[i][1])[1]) / num_labels
        total["class"] += entropy / weight if softmax else 0
    return {f"pseudo_labels_{name}": getattr(config, f"{name}_weight") * value for name, value in total.items()}


VARIANTS = {
    "default": {},
    "high threshold": {"threshold": 0.9},
    "with duplicates": {"nms_iou": None},
    "few duplicates": {"nms_iou": 0.4},
    "without known": {"skip_known_iou": 0.75},
    "few": {"max_labels": 2, "nms_iou": None},
    "any number": {"max_labels": None},
    "other weights": {"class_weight": 1.0, "box_weight": 3.0, "giou_weight": 4.0},
}


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("near", [False, True])
def test_equals_naive_loops(near, name, activation):
    teach, softmax = method(activation, **VARIANTS[name]), activation == "softmax"
    student = output(1, columns=3 + softmax)
    teacher = output(2, 6, num_layers=3, columns=3 + softmax, near=near)
    got = teach(student, teacher, LABELS)
    labels = reference_labels(teach.config, teacher, LABELS, softmax)
    want = reference_losses(teach.config, student, labels, softmax)
    assert got.keys() == want.keys() and labels[0] and (labels[2] == []) == near
    for key in want:
        assert got[key].item() == pytest.approx(want[key], rel=1e-9), key
    assert teach.statistics["pseudo_labels/per_image"].item() == pytest.approx(sum(map(len, labels)) / 3)


@pytest.mark.parametrize("name", ["few duplicates", "without known", "few", "high threshold"])
def test_every_option_leaves_out_some_labels(name):
    """So that the numbers above depend on it."""
    teacher = output(2, 6, num_layers=3, near=True)
    teach, all_of_them = method(**VARIANTS[name]), method(nms_iou=None)
    for each in (teach, all_of_them):
        each(output(1), teacher, LABELS)
    key = "pseudo_labels/per_image"
    assert 0 < teach.statistics[key] < all_of_them.statistics[key]


def test_near_duplicates_of_small_boxes_are_told_apart_in_large_batches():
    """The last of 40 images: what moves the boxes of images and classes apart must not round them."""
    boxes = torch.tensor([[0.5, 0.5, 0.01, 0.01], [0.502, 0.5, 0.01, 0.01]])  # IoU 0.667
    teacher = DetectorOutput(
        torch.full((1, 40, 2, 3), 3.0), boxes.expand(1, 40, 2, 4).clone(), torch.zeros(1, 40, 2, 8)
    )
    labels = [LABELS[2]] * 40
    for nms_iou, count in ((0.66, 1), (0.675, 2)):
        teach = method(nms_iou=nms_iou)
        teach(teacher, teacher, labels)
        assert teach.statistics["pseudo_labels/per_image"] == count


@pytest.mark.parametrize("num_queries", [40, 300])  # torchvision takes one way for few boxes, another for many
def test_duplicates_are_those_of_torchvision(num_queries):
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 8, num_queries, 5, generator=g) + 2
    boxes = torch.rand(1, 8, num_queries, 4, generator=g) * 0.3 + 0.4  # some beyond the image
    teacher = DetectorOutput(logits, boxes, torch.zeros(1, 8, num_queries, 8))
    found = method(nms_iou=0.7, max_labels=None)._labels_of(teacher, [LABELS[2]] * 8)
    scores, classes = logits[0].sigmoid().max(-1)
    for image, labels in enumerate(found):
        corners = cxcywh_to_xyxy(clip_to_image(boxes[0, image]).double())
        kept = batched_nms(corners, scores[image].double(), classes[image], 0.7)  # surest first
        kept = kept[scores[image, kept] > 0.5]
        assert torch.equal(labels["class_labels"], classes[image, kept])
        assert torch.equal(labels["boxes"], clip_to_image(boxes[0, image, kept]))
        assert len(kept) < (scores[image] > 0.5).sum()


def test_the_student_learns_and_the_teacher_does_not():
    student, teacher = output(1, grad=True), output(2, grad=True)
    sum(method()(student, teacher, LABELS).values()).backward()
    assert teacher.logits.grad is None and teacher.boxes.grad is None
    assert (student.logits.grad.abs().sum((2, 3)) > 0).all()  # every layer and image, also the one without labels
    assert (student.boxes.grad.abs().sum((1, 2, 3)) > 0).all()


def test_without_any_sure_prediction_the_student_learns_the_background():
    student, teacher = output(1, grad=True), output(2)
    teacher.logits[:] = -3
    losses = method(skip_known_iou=0.5)(student, teacher, [LABELS[2]] * 3)
    assert losses["pseudo_labels_box"] == losses["pseudo_labels_giou"] == 0 < losses["pseudo_labels_class"]
    sum(losses.values()).backward()
    assert student.logits.grad.abs().sum() > 0 and student.boxes.grad.isfinite().all()


def test_labels_are_left_as_they_are():
    labels = [dict(label) for label in LABELS]
    method()(output(1), output(2), labels)
    assert [label.keys() for label in labels] == [label.keys() for label in LABELS]
    assert all(a[key] is b[key] for a, b in zip(labels, LABELS, strict=True) for key in a)


def test_proposals_take_no_part():
    """Of a two-stage student the decoder's layers alone are trained."""
    own = get_adapter(tiny.deformable_detr(seed=1, two_stage=True), tiny.processor())
    other = get_adapter(tiny.deformable_detr(seed=2, num_queries=9, decoder_layers=3), tiny.processor())
    teach = PseudoLabels(PseudoLabelsConfig(threshold=0.3), own.spec, other.spec)
    batch = tiny.batch(2)
    student, teacher = (a(batch["pixel_values"], batch["pixel_mask"]) for a in (own, other))
    assert student.proposals is not None
    got = teach(student, teacher, batch["labels"])
    assert got.keys() == {f"pseudo_labels_{x}" for x in ("class", "box", "giou")}
    want = teach(replace(student, proposals=("not", "read")), teacher, batch["labels"])
    assert all(torch.equal(got[key], want[key]) for key in got)
    assert teach.statistics["pseudo_labels/per_image"] > 0


def test_low_precision_is_compared_in_fp32_under_autocast():
    def cast(x, dtype):
        return replace(x, logits=x.logits.to(dtype), boxes=x.boxes.to(dtype))

    half = cast(output(1), torch.bfloat16), cast(output(2), torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = method()(*half, LABELS)
    want = method()(*(cast(x, torch.float32) for x in half), LABELS)
    assert all(torch.equal(got[key], want[key]) and got[key].dtype == torch.float32 for key in want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, "method.threshold must be between 0 and 1"),
        ({"nms_iou": 1.0}, "method.nms_iou must be between 0 and 1"),
        ({"skip_known_iou": -0.5}, "method.skip_known_iou must be between 0 and 1"),
        ({"max_labels": 0}, "method.max_labels must be above 0"),
        ({"box_weight": -1.0}, "method.box_weight must be 0 or above"),
    ],
)
def test_mistakes_are_refused(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        method(**options)


def test_is_found_by_its_name():
    assert get_method("pseudo_labels") is PseudoLabels
