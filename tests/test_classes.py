import math
from dataclasses import replace

import pytest
import torch

from asd_hf.classes import SharedClasses, align_classes, convert_logits
from asd_hf.detectors import get_adapter
from asd_hf.detectors.base import DetectorOutput
from asd_hf.distiller import Distiller
from asd_hf.errors import UserError
from asd_hf.evaluation import evaluate_detector
from asd_hf.methods.asd import ASD, ASDConfig
from tests import tiny
from tests.test_asd import spec as detector_spec


def spec(*names, activation="sigmoid"):
    return replace(detector_spec(activation=activation), class_names=names)


def output(num_columns, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, 2, 5, num_columns, generator=g, dtype=torch.float64)
    boxes = 0.2 + 0.5 * torch.rand(3, 2, 5, 4, generator=g, dtype=torch.float64)
    return DetectorOutput(logits, boxes, torch.zeros(3, 2, 5, 8))


def distil(student, teacher, student_output, teacher_output, class_map=None):
    """The losses of a method between two detectors, through the alignment as a run has it."""
    shared = SharedClasses(student, teacher, class_map)
    torch.manual_seed(0)
    method = ASD(ASDConfig(ramp_steps=0), *shared.specs(student, teacher)).double()
    losses = method(shared.student(student_output), shared.teacher(teacher_output), [])
    return {name: loss.item() for name, loss in losses.items()}


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_a_teacher_with_permuted_and_extra_classes_gives_the_same_loss(activation):
    none = activation == "softmax"
    student = spec("cat", "dog", "kite", activation=activation)
    ours, theirs = output(3 + none), output(3 + none, seed=1)
    expected = distil(student, student, ours, theirs)
    more = spec("zebra", "Kite", "bus", "dog", "cat", activation=activation)
    absent = torch.full_like(theirs.logits[..., :1], -50.0)  # certain that there is no zebra and no bus
    columns = [absent, theirs.logits[..., [2]], absent, theirs.logits[..., [1]], theirs.logits[..., [0]]]
    permuted = replace(theirs, logits=torch.cat([*columns, *([theirs.logits[..., 3:]] if none else [])], -1))
    assert distil(student, more, ours, permuted) == pytest.approx(expected, rel=1e-9)
    wrong = replace(permuted, logits=permuted.logits.roll(1, -1))
    assert distil(student, more, ours, wrong) != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_classes_that_the_teacher_lacks_are_masked_from_the_class_term_alone(activation):
    none = activation == "softmax"
    student, teacher = spec("cat", "emu", "dog", activation=activation), spec("dog", "cat", activation=activation)
    ours, theirs = output(3 + none), output(2 + none, seed=1)
    before = distil(student, teacher, ours, theirs)
    shared = SharedClasses(student, teacher)
    assert shared.names == ("cat", "dog") and shared.student_only == ("emu",) and shared.teacher_only == ()
    ours.logits.requires_grad_(), ours.boxes.requires_grad_()
    method = ASD(ASDConfig(ramp_steps=0), *shared.specs(student, teacher)).double()
    losses = method(shared.student(ours), shared.teacher(theirs), [])
    logits, boxes = torch.autograd.grad(losses["asd_class"] + losses["asd_box"], (ours.logits, ours.boxes))
    assert boxes[-2:].abs().sum() > 0 and logits[-2:, ..., [0, 2]].abs().sum() > 0
    if activation == "sigmoid":
        assert not logits[..., 1].any()
        ours.logits.data[..., 1] += 3
        assert distil(student, teacher, ours, theirs) == pytest.approx(before)
    else:  # an emu is as good as nothing where the teacher sees nothing: only their sum counts
        total = ours.logits.data[..., [1, 3]].logsumexp(-1)
        ours.logits.data[..., 1], ours.logits.data[..., 3] = total - math.log(4), total + math.log(0.75)
        assert distil(student, teacher, ours, theirs) == pytest.approx(before)


def test_mapped_names():
    student, teacher = spec("motorbike", "cat"), spec("cat", "motorcycle")
    shared = SharedClasses(student, teacher, {"motorbike": "motorcycle"})
    assert shared.names == ("motorbike", "cat") and not shared.student_only
    theirs = output(2)
    assert torch.equal(shared.teacher(theirs).logits, theirs.logits[..., [1, 0]])
    assert SharedClasses(student, teacher, {" Motorbike": "MOTORCYCLE"}).names == ("motorbike", "cat")
    with pytest.raises(UserError, match="the student has no class 'motorbik': did you mean 'motorbike'"):
        SharedClasses(student, teacher, {"motorbik": "motorcycle"})
    with pytest.raises(UserError, match="the teacher has no class 'motorcycl': did you mean 'motorcycle'"):
        SharedClasses(student, teacher, {"motorbike": "motorcycl"})
    with pytest.raises(UserError, match="two classes of the student, one of them 'motorbike', are 'cat' of the teac"):
        SharedClasses(student, teacher, {"motorbike": "cat"})


def test_nothing_is_touched_where_both_agree():
    same, ours = spec("cat", "dog"), output(2)
    shared = SharedClasses(same, spec("Cat", "dog_"))
    assert shared.student(ours) is ours and shared.teacher(ours) is ours
    labels = [{"class_labels": torch.tensor([1, 0])}]
    assert shared.labels(labels) is labels


def test_objects_of_unshared_classes_are_left_out_of_the_labels():
    shared = SharedClasses(spec("cat", "emu", "dog"), spec("dog", "cat"))
    labels = [
        {"class_labels": torch.tensor([2, 1, 0]), "boxes": torch.rand(3, 4)},
        {"class_labels": torch.zeros(0).long(), "boxes": torch.zeros(0, 4), "labelled": False},
    ]
    known = shared.labels(labels)
    assert [label["class_labels"].tolist() for label in known] == [[1, 0], []]
    assert torch.equal(known[0]["boxes"], labels[0]["boxes"][[0, 2]]) and known[1]["boxes"].shape == (0, 4)
    assert known[1]["labelled"] is False and len(labels[0]["class_labels"]) == 3


def test_what_decode_answers_is_reduced_too():
    adapter = get_adapter(tiny.deformable_detr(0), tiny.processor())
    shared = SharedClasses(spec("kite", "cat"), adapter.spec)
    batch = tiny.batch()
    with torch.no_grad():
        whole = adapter(batch["pixel_values"], batch["pixel_mask"])
        reduced = shared.teacher(whole)
        again = reduced.decode(*reduced.decode.own)
    assert torch.equal(reduced.logits, whole.logits[..., [3, 0]])
    torch.testing.assert_close(again.logits, reduced.logits)
    assert torch.equal(reduced.boxes, whole.boxes)


def test_softmax_to_sigmoid_keeps_each_probability():
    logits = torch.tensor([[2.0, -1.0, 0.5], [30.0, 0.0, 0.0], [-40.0, 5.0, 3.0]])
    sigmoid = convert_logits(logits, "softmax", "sigmoid")
    assert sigmoid.shape == (3, 2) and sigmoid.isfinite().all()
    torch.testing.assert_close(sigmoid.sigmoid(), logits.softmax(-1)[:, :-1], rtol=1e-4, atol=1e-6)


def test_sigmoid_to_softmax_keeps_the_best_probability_and_the_order():
    logits = torch.tensor([[2.0, -1.0, 0.5], [-4.6, -4.6, -4.6], [6.0, 5.9, -9.0]])
    softmax = convert_logits(logits, "sigmoid", "softmax").softmax(-1)
    p = logits.sigmoid()
    for row, probabilities in zip(softmax.tolist(), p.tolist(), strict=True):
        odds = [q / (1 - q) for q in probabilities]
        expected = [max(probabilities) * o / sum(odds) for o in odds]
        assert row == pytest.approx([*expected, 1 - max(probabilities)], rel=1e-4)
    # 80 absent classes of 1 % each are no object
    assert convert_logits(torch.full((1, 80), math.log(0.01 / 0.99)), "sigmoid", "softmax").softmax(-1)[0, -1] > 0.98


@pytest.mark.parametrize(("ours", "theirs"), [("sigmoid", "softmax"), ("softmax", "sigmoid")])
def test_heads_of_two_kinds_are_compared_in_the_students_form(ours, theirs):
    student, teacher = spec("cat", "dog", activation=ours), spec("dog", "cat", activation=theirs)
    outputs = output(2 + (ours == "softmax")), output(2 + (theirs == "softmax"), seed=1)
    shared = SharedClasses(student, teacher)
    assert [s.activation for s in shared.specs(student, teacher)] == [ours, ours]
    columns = [1, 0, 2] if theirs == "softmax" else [1, 0]
    expected = convert_logits(outputs[1].logits[..., columns], theirs, ours)
    torch.testing.assert_close(shared.teacher(outputs[1]).logits, expected)
    assert all(math.isfinite(loss) for loss in distil(student, teacher, *outputs).values())


def test_the_distiller_gives_the_method_what_is_shared():
    student = get_adapter(tiny.deformable_detr(0), tiny.processor())
    teacher = get_adapter(tiny.deformable_detr(1, classes=("kite", "yak", "cat"), num_queries=9), tiny.processor())
    shared = SharedClasses(student.spec, teacher.spec)
    seen = []

    class Spy(ASD):
        def forward(self, student, teacher, labels):
            seen.append((student.logits.shape, teacher.logits.shape, labels))
            return super().forward(student, teacher, labels)

    method = Spy(ASDConfig(ramp_steps=0), *shared.specs(student.spec, teacher.spec))
    batch = tiny.batch()
    answer = shared.teacher(teacher(batch["pixel_values"], batch["pixel_mask"]))
    loss = Distiller(student, _no_loss, method, shared)(**batch, teacher=answer).loss
    ours, theirs, labels = seen[0]
    assert ours[-1] == theirs[-1] == 2 and loss.isfinite()
    known = {0: 0, 3: 1}  # cat and kite of the student's five
    expected = [[known[c] for c in label["class_labels"].tolist() if c in known] for label in batch["labels"]]
    assert [label["class_labels"].tolist() for label in labels] == expected


def _no_loss(output, labels):
    return {"none": output.logits.sum() * 0}


def test_a_detector_that_lacks_classes_is_evaluated_on_the_others(caplog):
    adapter = get_adapter(tiny.deformable_detr(0, classes=("pizza", "yak", "cat")), tiny.processor())
    batch = tiny.batch(4, boxes=(5,))
    numbers, evaluator = evaluate_detector(adapter, [batch], tiny.CLASSES, progress=False)
    assert numbers["classes_lacking"] == ["dog", "traffic light", "kite"]
    found = {row[5] for image in evaluator.images.values() for row in image.predictions}
    assert found == {0, 4}
    assert "the deformable_detr that is evaluated lacks 3 of the 5 classes of the data" in caplog.text
    assert "finds none of them: dog, traffic light, kite" in caplog.text
    adapter = get_adapter(tiny.deformable_detr(0, classes=("pizza", "yak", "cat")), tiny.processor())
    _, evaluator = evaluate_detector(adapter, [batch], tiny.CLASSES, class_map={"dog": "yak"}, progress=False)
    assert {row[5] for image in evaluator.images.values() for row in image.predictions} == {0, 1, 4}


def test_classes_are_aligned_by_normalised_name():
    columns = align_classes(("Traffic Light", "dog ", "hair-drier"), ("dog", "hair drier", "cat", "traffic_light"))
    assert columns.tolist() == [3, 0, 1] and columns.dtype == torch.int64


def test_classes_that_cannot_be_aligned_are_one_clear_line():
    with pytest.raises(
        UserError, match="share no class: the teacher has cat, the student a, b, c, d, e, ... .6 in all."
    ):
        align_classes(tuple("abcdef"), ("cat",))
    with pytest.raises(
        UserError, match="share no class: .* say in model.class_map .asd-hf evaluate: --class-map. which"
    ):
        SharedClasses(spec("cat"), spec("dog"))
    with pytest.raises(UserError, match="the teacher lacks 1 of the 2 classes of the student: horse"):
        align_classes(("cat", "horse"), ("cat", "dog"))
    with pytest.raises(UserError, match="'cat' stands more than once"):
        align_classes(("cat",), ("cat", "Cat"))
    assert align_classes(("cat",), ("N/A", "cat", "N/A")).tolist() == [1]
