"""Index pairing against loops written from the formulas, in float64."""

import re
from dataclasses import replace

import pytest
import torch

from asd_hf.detectors.base import DetectorOutput, DetectorSpec
from asd_hf.errors import UserError
from asd_hf.methods import get_method
from asd_hf.methods.index_pairing import IndexPairing, IndexPairingConfig
from tests.test_distances import iou_and_giou, kl

CLASSES = ("a", "b", "c")


def spec(num_layers=3, num_queries=5, activation="sigmoid"):
    return DetectorSpec(
        family="deformable_detr",
        hidden_size=8,
        class_names=CLASSES,
        num_layers=num_layers,
        num_queries=num_queries,
        strides=(8,),
        pixel_mean=(0, 0, 0),
        pixel_std=(1, 1, 1),
        activation=activation,
        capabilities=frozenset(),
    )


def output(seed, num_layers=3, images=2, num_queries=5, columns=3, grad=False):
    g = torch.Generator().manual_seed(seed)
    shape = num_layers, images, num_queries
    logits = 2 * torch.randn(*shape, columns, generator=g, dtype=torch.float64) - 1
    centre = torch.rand(*shape, 2, generator=g, dtype=torch.float64)  # many boxes reach beyond the image
    size = 0.1 + 0.4 * torch.rand(*shape, 2, generator=g, dtype=torch.float64)
    boxes = torch.cat([centre, size], -1)
    return DetectorOutput(
        logits.requires_grad_(grad), boxes.requires_grad_(grad), torch.zeros(*shape, 8, dtype=torch.float64)
    )


def method(activation="sigmoid", num_layers=3, **options):
    return IndexPairing(IndexPairingConfig(**options), spec(num_layers, activation=activation), spec(4))


def clipped(box):
    x1, y1, x2, y2 = (min(max(v, 0), 1) for v in (box[i] + sign * box[i + 2] / 2 for sign in (-1, 1) for i in (0, 1)))
    return [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]


def reference(config, student, teacher, softmax):
    """One layer, image and query at a time; layers are counted from the end."""
    layers, images, queries = student.logits.shape[:3]
    total = {"class": 0.0, "box": 0.0, "giou": 0.0}
    for back in range(1, (config.layers or layers) + 1):
        theirs = max(len(teacher.logits) - back, -1) if back <= len(teacher.logits) else -1
        for image in range(images):
            for i in range(queries):
                s_logits, s_box = student.logits[-back, image, i].tolist(), student.boxes[-back, image, i].tolist()
                t_logits, t_box = teacher.logits[theirs, image, i].tolist(), teacher.boxes[theirs, image, i].tolist()
                t_box = clipped(t_box) if config.clip_boxes else t_box
                share = 1 / (images * queries)
                total["class"] += config.class_weight * kl(s_logits, t_logits, softmax) * share
                total["box"] += config.box_weight * sum(abs(a - b) for a, b in zip(s_box, t_box, strict=True)) * share
                total["giou"] += config.giou_weight * (1 - iou_and_giou(s_box, t_box)[1]) * share
    return {f"index_pairing_{name}": value for name, value in total.items()}


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("teacher_layers", [2, 3, 5])
@pytest.mark.parametrize(
    "options", [{}, {"layers": 1}, {"clip_boxes": False, "class_weight": 2.0, "box_weight": 3.0, "giou_weight": 0.5}]
)
def test_equals_naive_loops(options, teacher_layers, activation):
    pairing = method(activation, **options)
    columns = 4 if activation == "softmax" else 3
    student, teacher = output(1, columns=columns), output(2, teacher_layers, columns=columns)
    got = pairing(student, teacher, [])
    want = reference(pairing.config, student, teacher, activation == "softmax")
    assert got.keys() == want.keys()
    for key in want:
        assert got[key].item() == pytest.approx(want[key], rel=1e-12), key


def test_equal_predictions_cost_nothing():
    same = output(1)
    assert all(abs(loss.item()) < 1e-12 for loss in method(clip_boxes=False)(same, same, []).values())
    assert abs(method()(same, same, [])["index_pairing_class"].item()) < 1e-12


def test_the_student_learns_and_the_teacher_does_not():
    student, teacher = output(1, grad=True), output(2, grad=True)
    sum(method(layers=2)(student, teacher, []).values()).backward()
    assert teacher.logits.grad is None and teacher.boxes.grad is None
    for gradient in (student.logits.grad, student.boxes.grad):
        assert (gradient[-2:].abs().sum((1, 3)) > 0).all() and not gradient[:-2].any()


def test_halves_of_a_batch_average_to_the_whole():
    student, teacher = output(1, images=4), output(2, images=4)
    whole = method()(student, teacher, [])

    def part(x, images):
        return replace(x, logits=x.logits[:, images], boxes=x.boxes[:, images])

    halves = [method()(part(student, i), part(teacher, i), []) for i in (slice(0, 2), slice(2, 4))]
    for key in whole:
        assert whole[key].item() == pytest.approx((halves[0][key] + halves[1][key]).item() / 2)


def test_low_precision_is_compared_in_fp32_under_autocast():
    def cast(x, dtype):
        return replace(x, logits=x.logits.to(dtype), boxes=x.boxes.to(dtype))

    half = cast(output(1), torch.bfloat16), cast(output(2), torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = method()(*half, [])
    want = method()(*(cast(x, torch.float32) for x in half), [])
    assert all(torch.equal(got[key], want[key]) and got[key].dtype == torch.float32 for key in want)


def test_unequal_query_counts_and_too_many_layers_are_refused():
    with pytest.raises(UserError, match=re.escape("set model.student.num_queries to 9")):
        IndexPairing(IndexPairingConfig(), spec(num_queries=7), spec(num_queries=9))
    with pytest.raises(UserError, match="method.layers is 4"):
        method(layers=4)


def test_is_found_by_its_name():
    assert get_method("index_pairing") is IndexPairing
