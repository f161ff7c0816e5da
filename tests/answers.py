"""Real tiny detectors in float64 whose questions are written down, and distances of single answers as plain floats."""

from __future__ import annotations

import math
from functools import cache

from asd_hf.classes import SharedClasses
from asd_hf.detectors import get_adapter
from tests import tiny
from tests.families import FAMILIES


@cache
def detector(name, seed=0, **values):
    """A family of tests/families.py, or "other": twice as wide, with two decoder layers, and refined boxes."""
    if name == "other":
        values |= {"d_model": 64, "decoder_layers": 2, "with_box_refine": True}
        adapter = get_adapter(tiny.deformable_detr(seed, **values), tiny.processor())
    else:
        adapter = get_adapter(*FAMILIES[name](seed=seed, **values))
    adapter.model.double()
    return adapter


def ask_both(student, teacher, batch, view=None):
    """Both outputs as a method sees them; `asked` on each is the list of (question, answer) so far.

    The teacher sees another `view` of the images if there is one.
    """
    shared = SharedClasses(student.spec, teacher.spec)
    views = (student, batch), (teacher, view or batch)
    ours, theirs = (adapter(x["pixel_values"], x["pixel_mask"]) for adapter, x in views)
    ours, theirs = shared.student(ours), shared.teacher(theirs)
    for output in (ours, theirs):
        write_down(output)
    return ours, theirs


def write_down(output):
    decode, output.asked = output.decode, []

    def written(*question):
        output.asked.append((question, decode(*question)))
        return output.asked[-1][1]

    written.own = decode.own
    output.decode = written


def specs(student, teacher):
    return SharedClasses(student.spec, teacher.spec).specs(student.spec, teacher.spec)


def batch(size=3, boxes=(3, 0, 1)):
    """Images of unequal sizes and numbers of objects, one without any."""
    found = tiny.batch(size, boxes=boxes)
    for label in found["labels"]:
        label["boxes"] = label["boxes"].double()
    return found


# -- distances, one answer at a time ----------------------------------------------------------------------------------


def softmax(row):
    top = max(row)
    exponents = [math.exp(z - top) for z in row]
    return [e / sum(exponents) for e in exponents]


def sigmoid(row):
    return [1 / (1 + math.exp(-z)) for z in row]


def divergence(teacher, student, as_one):
    """KL(teacher || student) of two rows of logits: of one distribution, or of each class on its own, summed."""
    if as_one:
        return sum(p * math.log(p / q) for p, q in zip(softmax(teacher), softmax(student), strict=True))
    pairs = list(zip(sigmoid(teacher), sigmoid(student), strict=True))
    return sum(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)) for p, q in pairs)


def best(row, softmax_head):
    return max(softmax(row)[:-1]) if softmax_head else max(sigmoid(row))


def l1(a, b):
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


def giou_distance(a, b):
    """1 - GIoU of two cxcywh boxes."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = (
        [c - s / 2, d - t / 2, c + s / 2, d + t / 2] for c, d, s, t in (a, b)
    )
    inside = max(0, min(ax2, bx2) - max(ax1, bx1)) * max(0, min(ay2, by2) - max(ay1, by1))
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inside
    hull = (max(ax2, bx2) - min(ax1, bx1)) * (max(ay2, by2) - min(ay1, by1))
    return 1 - (inside / union - (hull - union) / hull)
