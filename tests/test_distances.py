"""Distances of single predictions against formulas in plain floats."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asd_hf.distances import (
    box_distances,
    box_iou,
    class_divergence,
    clip_to_image,
    imitation_losses,
    pair_costs,
    pair_distances,
)


def predictions(count, seed, columns=3, layers=1):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(layers, 2, count, columns, generator=generator, dtype=torch.float64)
    centre = torch.rand(layers, 2, count, 2, generator=generator, dtype=torch.float64)
    size = 0.05 + 0.6 * torch.rand(layers, 2, count, 2, generator=generator, dtype=torch.float64)
    return logits, torch.cat([centre, size], -1)


def kl(student, teacher, softmax):
    if softmax:
        p, q = ([math.exp(v) / sum(map(math.exp, z)) for v in z] for z in (teacher, student))
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    total = 0.0
    for t, s in zip(teacher, student, strict=True):
        p, q = 1 / (1 + math.exp(-t)), 1 / (1 + math.exp(-s))
        total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return total


def entropy(logits, softmax):
    if softmax:
        p = [math.exp(v) / sum(map(math.exp, logits)) for v in logits]
    else:
        p = [x for v in logits for x in (1 / (1 + math.exp(-v)), 1 / (1 + math.exp(v)))]
    return -sum(x * math.log(x) for x in p)


def corners(box):
    x, y, w, h = box
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def iou_and_giou(a, b):
    a, b = corners(a), corners(b)
    both = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return both / union, both / union - (hull - union) / hull


@pytest.mark.parametrize("softmax", [False, True])
def test_distances_equal_the_formulas(softmax):
    (s_logits, s_boxes), (t_logits, t_boxes) = predictions(3, 0), predictions(3, 1)
    divergence, (l1, giou) = class_divergence(s_logits, t_logits, softmax), box_distances(s_boxes, t_boxes)
    iou = box_iou(s_boxes, t_boxes)
    for image in range(2):
        for i in range(3):
            s, t = s_boxes[0, image, i].tolist(), t_boxes[0, image, i].tolist()
            want = kl(s_logits[0, image, i].tolist(), t_logits[0, image, i].tolist(), softmax)
            assert divergence[0, image, i].item() == pytest.approx(want, rel=1e-12)
            assert l1[0, image, i].item() == pytest.approx(sum(abs(x - y) for x, y in zip(s, t, strict=True)))
            assert giou[0, image, i].item() == pytest.approx(1 - iou_and_giou(s, t)[1], rel=1e-12)
            assert iou[0, image, i].item() == pytest.approx(iou_and_giou(s, t)[0], rel=1e-12)


@pytest.mark.parametrize("softmax", [False, True])
def test_losses_are_means_over_pairs_and_images_and_sums_over_layers(softmax):
    student, teacher = predictions(4, 0, layers=3), predictions(4, 1, layers=3)
    want = [0.0, 0.0, 0.0]
    for layer in range(3):
        for image in range(2):
            for i in range(4):
                s_logits, s_box, t_logits, t_box = (x[layer, image, i].tolist() for x in (*student, *teacher))
                want[0] += kl(s_logits, t_logits, softmax) / 8
                want[1] += sum(abs(a - b) for a, b in zip(s_box, t_box, strict=True)) / 8
                want[2] += (1 - iou_and_giou(s_box, t_box)[1]) / 8
    assert [loss.item() for loss in imitation_losses(student, teacher, softmax)] == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("softmax", [False, True])
def test_divergence_is_0_where_the_two_agree_and_its_gradient_is_that_of_the_cross_entropy(softmax):
    (logits, _), (other, _) = predictions(3, 0), predictions(3, 1)
    assert class_divergence(logits, logits, softmax).abs().max() < 1e-12
    student = other.requires_grad_()
    (got,) = torch.autograd.grad(class_divergence(student, logits, softmax).sum(), student)
    difference = student.softmax(-1) - logits.softmax(-1) if softmax else student.sigmoid() - logits.sigmoid()
    torch.testing.assert_close(got, difference.detach())


def test_sure_predictions_have_finite_divergences():
    sure = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    for softmax in (False, True):
        loss = class_divergence(sure, torch.tensor([[-200.0, 200.0, 0.0]]), softmax).sum()
        (gradient,) = torch.autograd.grad(loss, sure)
        assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("softmax", [False, True])
def test_costs_of_all_pairs_equal_the_formulas(softmax):
    (s_logits, s_boxes), (t_logits, t_boxes) = predictions(3, 0), predictions(4, 1)
    cost = pair_costs((s_logits, s_boxes), (t_logits, t_boxes), softmax, 0.5, 3.0, 7.0)
    assert cost.shape == (1, 2, 3, 4)
    for image in range(2):
        for i in range(3):
            for j in range(4):
                s, t = s_boxes[0, image, i].tolist(), t_boxes[0, image, j].tolist()
                wanted = t_logits[0, image, j].tolist()
                cross = kl(s_logits[0, image, i].tolist(), wanted, softmax) + entropy(wanted, softmax)
                l1 = sum(abs(x - y) for x, y in zip(s, t, strict=True))
                want = 0.5 * cross + 3 * l1 + 7 * (1 - iou_and_giou(s, t)[1])
                assert cost[0, image, i, j].item() == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("softmax", [False, True])
def test_distances_of_all_pairs_are_those_of_single_ones(softmax):
    """Their gradients too."""
    student, teacher = ([x[0].requires_grad_() for x in predictions(*of)] for of in ((3, 0), (4, 1)))
    got = pair_distances(student, teacher, softmax)
    assert all(distance.shape == (2, 4, 3) for distance in got)
    for image in range(2):
        for i in range(4):
            for j in range(3):
                s, t = [x[image, j] for x in student], [x[image, i] for x in teacher]
                single = class_divergence(s[0], t[0], softmax), *box_distances(s[1], t[1])
                for distance, want in zip(got, single, strict=True):
                    torch.testing.assert_close(distance[image, i, j], want, rtol=1e-10, atol=0)
                    ours, theirs = (
                        torch.autograd.grad(x, (*student, *teacher), retain_graph=True, materialize_grads=True)
                        for x in (distance[image, i, j], want)
                    )
                    torch.testing.assert_close(ours, theirs)


def test_costs_take_no_tensor_larger_than_themselves():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            result = op(*args, **kwargs or {})
            self.size = max([self.size] + [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)])
            return result

    student, teacher = predictions(30, 0), predictions(40, 1)
    for softmax in (False, True):
        with Largest() as seen:
            cost = pair_costs(student, teacher, softmax, 1, 5, 2)
        assert seen.size == cost.numel() == 2 * 30 * 40


def test_costs_carry_no_gradient():
    logits, boxes = (x.requires_grad_() for x in predictions(3, 0))
    assert not pair_costs((logits, boxes), (logits, boxes), False, 1, 5, 2).requires_grad


def test_iou_of_boxes_without_area_is_finite():
    boxes = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.2, 0.0], [0.5, 0.5, 0.2, 0.2]])
    got = box_iou(boxes[:, None], boxes)
    assert torch.equal(got[:2], torch.zeros(2, 3)) and got[2, 2].item() == pytest.approx(1)


def test_boxes_are_clipped_to_the_image():
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.2], [0.1, 0.9, 0.4, 0.4], [0.5, 0.5, 3.0, 2.0], [1.5, 0.5, 0.2, 0.2]])
    want = torch.tensor([[0.5, 0.5, 0.4, 0.2], [0.15, 0.85, 0.3, 0.3], [0.5, 0.5, 1.0, 1.0], [1.0, 0.5, 0.0, 0.2]])
    torch.testing.assert_close(clip_to_image(boxes), want)
