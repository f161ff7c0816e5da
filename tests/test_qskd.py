"""QSKD against loops written from its description, in float64; attention and maps are those of real detectors."""

import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch

from asd_hf.detectors import get_adapter
from asd_hf.detectors.attention import Attention, sampled_look
from asd_hf.detectors.base import DetectorOutput, DetectorSpec
from asd_hf.errors import UserError
from asd_hf.methods import get_method, qskd
from asd_hf.methods.qskd import QSKD, QSKDConfig
from tests import tiny
from tests.families import FAMILIES

PREDICTION = ("qskd_class", "qskd_box", "qskd_giou")
TERMS = ("qskd_feature", *PREDICTION)
WEIGHTS = {"feature_weight": 3.0, "class_weight": 0.5, "box_weight": 1.5, "giou_weight": 2.5}


def method(student, teacher, **options):
    torch.manual_seed(0)
    return QSKD(QSKDConfig(**WEIGHTS | options), student, teacher).double()


# -- the reference: one image, one layer, one query at a time, plain floats -------------------------------------------


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def softmax(row):
    top = max(row)
    e = [math.exp(v - top) for v in row]
    return [v / sum(e) for v in e]


def giou(a, b):
    """Of cxcywh boxes."""
    ax1, ay1, ax2, ay2 = a[0] - a[2] / 2, a[1] - a[3] / 2, a[0] + a[2] / 2, a[1] + a[3] / 2
    bx1, by1, bx2, by2 = b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2
    inter = max(0.0, min(ax2, bx2) - max(ax1, bx1)) * max(0.0, min(ay2, by2) - max(ay1, by1))
    union = a[2] * a[3] + b[2] * b[3] - inter
    hull = (max(ax2, bx2) - min(ax1, bx1)) * (max(ay2, by2) - min(ay1, by1))
    return inter / union - (hull - union) / hull


def l1(a, b):
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


def cost(logits, box, kind, target, is_softmax):
    if is_softmax:
        of_class = -softmax(logits)[kind]
    else:
        p = sigmoid(logits[kind])
        of_class = 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8) - 0.75 * p**2 * -math.log(1 - p + 1e-8)
    return of_class + 5 * l1(box, target) - 2 * giou(box, target)


def divergence(student, teacher, is_softmax):
    if is_softmax:
        return sum(t * math.log(t / s) for t, s in zip(softmax(teacher), softmax(student), strict=True))
    pairs = [(sigmoid(t), sigmoid(s)) for t, s in zip(teacher, student, strict=True)]
    return sum(t * math.log(t / s) + (1 - t) * math.log((1 - t) / (1 - s)) for t, s in pairs)


def group(logits, boxes, objects, threshold, is_softmax):
    """For each object the (query, GIoU) that stand for it: the matched one, then hard negatives by falling GIoU."""
    queries = range(len(boxes))
    costs = [[cost(z, b, *o, is_softmax) for o in objects] for z, b in zip(logits, boxes, strict=True)]
    matched = min(
        permutations(queries, len(objects)), key=lambda chosen: sum(costs[q][g] for g, q in enumerate(chosen))
    )
    groups = [[(q, giou(boxes[q], target))] for q, (_, target) in zip(matched, objects, strict=True)]
    negatives = []
    for q in queries:
        if q not in matched:
            best, g = max((giou(boxes[q], target), g) for g, (_, target) in enumerate(objects))
            if best > threshold:
                negatives.append((best, q, g))
    for best, q, g in sorted(negatives, reverse=True):
        groups[g].append((q, best))
    return groups


def all_groups(output, layer, labels, threshold, is_softmax):
    """[image][object] -> (query, GIoU)."""
    found = []
    for image, label in enumerate(labels):
        objects = list(zip(label["class_labels"].tolist(), label["boxes"].tolist(), strict=True))
        logits, boxes = output.logits[layer, image].tolist(), output.boxes[layer, image].tolist()
        found.append(group(logits, boxes, objects, threshold, is_softmax) if objects else [])
    return found


def predictions(student, teacher, labels, layers, threshold=0.0, is_softmax=False):
    """The three terms of LAPD without weights, and the number of pairs of each layer."""
    total, sizes = dict.fromkeys(PREDICTION, 0.0), []
    for ours, theirs in layers:
        pairs = []
        s_groups = all_groups(student, ours, labels, threshold, is_softmax)
        t_groups = all_groups(teacher, theirs, labels, threshold, is_softmax)
        for image, (s_objects, t_objects) in enumerate(zip(s_groups, t_groups, strict=True)):
            for s_group, t_group in zip(s_objects, t_objects, strict=True):
                pairs += [(image, s, t) for (s, _), (t, _) in zip(s_group, t_group, strict=False)]
        for image, s, t in pairs:
            s_logits, s_box = student.logits[ours, image, s].tolist(), student.boxes[ours, image, s].tolist()
            t_logits, t_box = teacher.logits[theirs, image, t].tolist(), teacher.boxes[theirs, image, t].tolist()
            total["qskd_class"] += divergence(s_logits, t_logits, is_softmax) / len(pairs)
            total["qskd_box"] += l1(s_box, t_box) / len(pairs)
            total["qskd_giou"] += (1 - giou(s_box, t_box)) / len(pairs)
        sizes.append(len(pairs))
    return total, sizes


def valid(mask, size):
    """Cells (y, x) of a map of `size` whose centres lie in the image, of its mask (H, W)."""
    (height, width), (rows, columns) = size, mask.shape
    cells = [(y, x) for y in range(height) for x in range(width)]
    return [(y, x) for y, x in cells if mask[int((y + 0.5) / height * rows), int((x + 0.5) / width * columns)]]


def features(student, teacher, labels, layers, levels, project, threshold=0.0, is_softmax=False):
    """AGFD without weight; `levels`: (student level, teacher level) of one stride; `project`: maps (D, H, W)."""
    loss, num_images = 0.0, len(labels)
    for _, layer in layers:
        groups = all_groups(teacher, layer, labels, threshold, is_softmax)
        for image in range(num_images):
            masks = [torch.zeros(level.shape[2:]).double() for level in teacher.features]
            for q, overlap in (pair for members in groups[image] for pair in members):
                alone = torch.zeros(teacher.boxes.shape[:3]).double()
                alone[layer, image, q] = 1
                for mask, look in zip(masks, teacher.attention.look(alone), strict=True):
                    mask += (1 + overlap) * look[layer, image]
            inside = teacher.mask[image]
            peak = max(mask[cell].item() for mask in masks for cell in valid(inside, mask.shape))
            total, count = 0.0, 0
            for number, (ours, theirs) in enumerate(levels):
                s_map, t_map = project(number, student.features[ours][image]), teacher.features[theirs][image]
                for y, x in valid(inside, t_map.shape[1:]):
                    share = masks[theirs][y, x].item() / peak if peak else 0.0
                    cell = zip(s_map[:, y, x].tolist(), t_map[:, y, x].tolist(), strict=True)
                    squares = [(share * s - share * t) ** 2 for s, t in cell]
                    total += sum(squares) / len(squares)
                    count += 1
            loss += total / count / num_images
    return loss


# -- predictions: any boxes -------------------------------------------------------------------------------------------


def labels_of(counts, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = []
    for image, count in enumerate(counts):
        centre, size = torch.rand(2, count, 2, generator=g, dtype=torch.float64)
        boxes = torch.cat([0.3 + 0.4 * centre, 0.2 + 0.2 * size], -1)
        classes = torch.randint(0, 3, (count,), generator=g)
        labels.append({"class_labels": classes, "boxes": boxes, "image_id": torch.tensor(image)})
    return labels


def predicted(num_queries, seed, num_layers=2, num_images=3, columns=3, grad=False):
    """Boxes in the middle of the image, where the objects are: some are hard negatives of each."""
    g = torch.Generator().manual_seed(seed)
    shape = (num_layers, num_images, num_queries)
    logits = 2 * torch.randn(*shape, columns, generator=g, dtype=torch.float64) - 1
    centre = 0.2 + 0.6 * torch.rand(*shape, 2, generator=g, dtype=torch.float64)
    size = 0.1 + 0.4 * torch.rand(*shape, 2, generator=g, dtype=torch.float64)
    boxes = torch.cat([centre, size], -1)
    return DetectorOutput(logits.requires_grad_(grad), boxes.requires_grad_(grad), torch.zeros(*shape, 8))


def specs(activation="sigmoid", num_layers=2):
    adapter = get_adapter(tiny.deformable_detr(classes=("a", "b", "c")), tiny.processor())
    return replace(adapter.spec, activation=activation, num_layers=num_layers, capabilities=frozenset())


def lapd(spec, **options):
    return method(spec, spec, **{"feature_weight": 0} | options)


def check(losses, expected, terms=TERMS):
    assert set(losses) == set(terms)
    for name in terms:
        weight = WEIGHTS[f"{name.removeprefix('qskd_')}_weight"]
        assert losses[name].item() == pytest.approx(weight * expected[name], rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("threshold", [0.0, 0.1, -0.6])
def test_golden_predictions(activation, threshold):
    is_softmax, labels = activation == "softmax", labels_of((3, 0, 2))
    student, teacher = (predicted(n, seed, columns=3 + is_softmax) for n, seed in ((11, 0), (8, 1)))
    made = lapd(specs(activation), giou_threshold=threshold)
    expected, sizes = predictions(student, teacher, labels, [(0, 0), (1, 1)], threshold, is_softmax)
    check(made(student, teacher, labels), expected, PREDICTION)
    assert made.statistics["qskd/pairs_per_image"].item() == pytest.approx(sum(sizes) / 2 / 3)
    assert min(sizes) > 5  # hard negatives as well as matched queries
    groups = [all_groups(output, 1, labels, threshold, is_softmax)[0] for output in (student, teacher)]
    assert [len(members) for members in groups[0]] != [len(members) for members in groups[1]]


@pytest.mark.parametrize(
    ("ours", "theirs", "count", "layers"),
    [
        (3, 2, None, [(0, 1), (1, 0), (2, 1)]),
        (2, 3, None, [(0, 1), (1, 2)]),
        (3, 3, 1, [(2, 2)]),
    ],
)
def test_golden_layers(ours, theirs, count, layers):
    labels, student, teacher = labels_of((2, 1, 0)), predicted(9, 2, ours), predicted(7, 3, theirs)
    losses = lapd(specs(num_layers=ours), layers=count)(student, teacher, labels)
    check(losses, predictions(student, teacher, labels, layers)[0], PREDICTION)


def test_a_query_belongs_to_the_object_that_it_is_matched_with():
    """Also where it overlaps another one more."""
    box = [0.5, 0.5, 0.2, 0.2]
    labels = [{"class_labels": torch.tensor([0, 1]), "boxes": torch.tensor([box, [0.55, 0.5, 0.2, 0.2]]).double()}]
    student, teacher = predicted(2, 0, 1, 1), predicted(2, 1, 1, 1)
    for output in (student, teacher):
        output.logits[:] = torch.tensor([[5.0, -5, -5], [-5, 5, -5]])
        output.boxes[:] = torch.tensor([[0.54, 0.5, 0.2, 0.2], [0.51, 0.5, 0.2, 0.2]])  # each nearer to the other
    made = lapd(specs(num_layers=1))
    found = made._select(student, made.criterion.assign([student], labels)[0], labels)
    matched = made.criterion.assign([student], labels)[0]
    assert found.objects[0, 0, matched[0]].tolist() == matched[1].tolist()
    check(made(student, teacher, labels), predictions(student, teacher, labels, [(0, 0)])[0], PREDICTION)


def test_equal_outputs_agree():
    student, labels = predicted(9, 0), labels_of((3, 0, 2))
    made = lapd(specs())
    assert all(loss.abs() < 1e-12 for loss in made(student, student, labels).values())
    assert made.statistics["qskd/pairs_per_image"] > 5 / 3


@pytest.mark.parametrize("counts", [(0, 0, 0), (1, 0, 0), (0, 0, 4)])
def test_images_without_objects(counts):
    labels = [label | {"labelled": bool(count)} for label, count in zip(labels_of(counts), counts, strict=True)]
    student, teacher = predicted(9, 0, grad=True), predicted(7, 1, grad=True)
    losses = lapd(specs())(student, teacher, labels)
    check(losses, predictions(student, teacher, labels, [(0, 0), (1, 1)])[0], PREDICTION)
    sum(losses.values()).backward()
    assert student.logits.grad.any() == student.boxes.grad.any() == (sum(counts) > 0)
    assert teacher.logits.grad is None and teacher.boxes.grad is None


def test_two_ranks_train_as_one(monkeypatch):
    labels, made = labels_of((3, 0, 2, 1)), lapd(specs())
    student, teacher = predicted(9, 0, num_images=4), predicted(7, 1, num_images=4)
    whole = made(student, teacher, labels)
    halves = [
        [replace(x, logits=x.logits[:, rows], boxes=x.boxes[:, rows]) for x in (student, teacher)] + [labels[rows]]
        for rows in (slice(0, 2), slice(2, 4))
    ]
    counts = []
    monkeypatch.setattr(qskd, "sum_over_ranks", lambda count: (counts.append(count.clone()) or count, 1))
    for half in halves:
        made(*half)
    monkeypatch.setattr(qskd, "sum_over_ranks", lambda count: (sum(counts), 2))
    ranks = [made(*half) for half in halves]
    for term in PREDICTION:
        assert sum(rank[term].item() for rank in ranks) / 2 == pytest.approx(whole[term].item(), rel=1e-9)


# -- maps: real detectors ---------------------------------------------------------------------------------------------


def coarse(num_queries, seed):
    """A Deformable DETR of strides 16 and 32, another width and fewer layers."""
    backbone = tiny.HF_RESNET | {"out_features": ["stage3", "stage4"]}
    sizes = {"d_model": 64, "decoder_layers": 2, "num_feature_levels": 2}
    return tiny.deformable_detr(seed, num_queries=num_queries, backbone_config=backbone, **sizes), tiny.processor()


PAIRS = {
    # student, teacher, (student level, teacher level), (student layer, teacher layer), softmax
    "widths, levels and layers": (
        lambda: FAMILIES["deformable_detr_refine"](),
        lambda: coarse(8, 1),
        [(1, 0), (2, 1)],
        [(0, 1), (1, 0), (2, 1)],
        False,
    ),
    "one width": (
        lambda: FAMILIES["deformable_detr"](num_queries=9),
        lambda: FAMILIES["deformable_detr_refine"](num_queries=8, seed=1),
        [(0, 0), (1, 1), (2, 2), (3, 3)],
        [(0, 0), (1, 1), (2, 2)],
        False,
    ),
    "dense attention": (
        lambda: FAMILIES["detr"](num_queries=9),
        lambda: FAMILIES["detr"](num_queries=8, seed=1),
        [(0, 0)],
        [(0, 0), (1, 1), (2, 2)],
        True,
    ),
}


def detectors(name):
    student, teacher = (get_adapter(*make()) for make in PAIRS[name][:2])
    for adapter in (student, teacher):
        adapter.model.double()
    teacher.watch_attention()
    return student, teacher


def seen(student, teacher, boxes=(2, 0), sizes=((64, 88), (56, 64))):
    batch = tiny.batch(2, boxes=boxes, sizes=sizes)
    pixels = batch["pixel_values"], batch["pixel_mask"]
    labels = [label | {"boxes": label["boxes"].double()} for label in batch["labels"]]
    with torch.no_grad():
        taught = teacher(*pixels)
    return student(*pixels), taught, labels


@pytest.mark.parametrize("name", PAIRS)
def test_golden_features(name):
    _, _, levels, layers, is_softmax = PAIRS[name]
    student_adapter, teacher_adapter = detectors(name)
    made = method(student_adapter.spec, teacher_adapter.spec, giou_threshold=-0.7)
    student, teacher, labels = seen(student_adapter, teacher_adapter, boxes=(2, 1))

    def project(level, single):
        convolution = made.maps.project[level]
        if isinstance(convolution, torch.nn.Identity):
            return single
        weight, bias = convolution.weight[:, :, 0, 0], convolution.bias
        return torch.einsum("dc,chw->dhw", weight, single) + bias[:, None, None]

    expected, _ = predictions(student, teacher, labels, layers, -0.7, is_softmax)
    with torch.no_grad():
        expected["qskd_feature"] = features(student, teacher, labels, layers, levels, project, -0.7, is_softmax)
        losses = made(student, teacher, labels)
    check(losses, expected)
    assert expected["qskd_feature"] > 1e-3
    assert any(len(members) > 1 for members in all_groups(teacher, 0, labels, -0.7, is_softmax)[0])
    # An image without objects has no mask; it counts as 0 in the mean over images.
    student, teacher, labels = seen(student_adapter, teacher_adapter)
    expected, _ = predictions(student, teacher, labels, layers, -0.7, is_softmax)
    with torch.no_grad():
        expected["qskd_feature"] = features(student, teacher, labels, layers, levels, project, -0.7, is_softmax)
        check(made(student, teacher, labels), expected)


def test_padding_changes_nothing():
    """Queries look beyond the border of the image, where a wider canvas has cells of padding."""
    spec = DetectorSpec(
        "any", 8, ("a", "b", "c"), 1, 4, (8,), (0.0,) * 3, (1.0,) * 3, "sigmoid", frozenset({"features", "attention"})
    )
    made, labels = method(spec, spec), labels_of((2,))
    g = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 1, 8, 8, 8, generator=g, dtype=torch.float64)
    points = torch.rand(1, 1, 4, 2, 6, 2, generator=g, dtype=torch.float64) * 0.4 + torch.tensor([0.85, 0.3]).double()
    shares, found = torch.full((1, 1, 4, 2, 6), 1 / 6, dtype=torch.float64), []
    for times in (1, 2):
        mask = torch.arange(64 * times).expand(1, 64, -1) < 64
        look = sampled_look([points / torch.tensor([times, 1.0])], [shares], [(8, 8 * times)])
        pair = (
            replace(
                predicted(4, seed, num_layers=1, num_images=1),
                features=[torch.nn.functional.pad(maps[seed], (0, 8 * times - 8))],
                mask=mask,
                attention=Attention(shares[..., 0, :4], look),
            )
            for seed in (0, 1)
        )
        found.append(made(*pair, labels)["qskd_feature"].item())
    assert found[0] == pytest.approx(found[1], rel=1e-12) and found[0] > 0.1


def test_equal_maps_agree():
    _, adapter = detectors("one width")
    made = method(adapter.spec, adapter.spec)
    batch = tiny.batch(2, boxes=(2, 1))
    output = adapter(batch["pixel_values"], batch["pixel_mask"])
    labels = [label | {"boxes": label["boxes"].double()} for label in batch["labels"]]
    assert all(loss.abs() < 1e-12 for loss in made(output, output, labels).values())


@pytest.mark.parametrize("boxes", [(2, 0), (0, 0)])
def test_gradients_reach_the_student_and_the_method_alone(boxes):
    student_adapter, teacher_adapter = detectors("widths, levels and layers")
    made = method(student_adapter.spec, teacher_adapter.spec)
    student_adapter.model.train()
    batch = tiny.batch(2, boxes=boxes)
    pixels = batch["pixel_values"], batch["pixel_mask"]
    labels = [label | {"boxes": label["boxes"].double()} for label in batch["labels"]]
    student, teacher = student_adapter(*pixels), teacher_adapter(*pixels)
    losses = made(student, teacher, labels)
    for loss in losses.values():
        student_adapter.model.zero_grad()
        loss.backward(retain_graph=True)
        reached = [p.grad.abs().sum().item() for p in student_adapter.model.model.parameters() if p.grad is not None]
        assert (sum(reached) > 0) == (boxes != (0, 0))
    assert all(p.grad is not None for p in made.parameters())  # also without objects, as several ranks want
    assert all(p.grad.any() for p in made.parameters()) == (boxes != (0, 0))
    assert all(p.grad is None for p in teacher_adapter.model.parameters())


def test_bf16_autocast():
    student_adapter, teacher_adapter = detectors("widths, levels and layers")
    made = method(student_adapter.spec, teacher_adapter.spec)
    exact = made(*seen(student_adapter, teacher_adapter))
    made.float()
    for adapter in (student_adapter, teacher_adapter):
        adapter.model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student, teacher, labels = seen(student_adapter, teacher_adapter)
        labels = [label | {"boxes": label["boxes"].float()} for label in labels]
        rounded = made(student, teacher, labels)
    for term in TERMS:
        assert rounded[term].dtype == torch.float32
        assert rounded[term].item() == pytest.approx(exact[term].item(), rel=0.3), term


def test_losses_of_half_predictions_are_fp32():
    half, same = (
        [replace(x, logits=x.logits.bfloat16().to(dtype), boxes=x.boxes.bfloat16().to(dtype)) for x in outputs]
        for outputs in [(predicted(9, 0), predicted(7, 1))]
        for dtype in (torch.bfloat16, torch.float32)
    )
    labels, made = labels_of((3, 0, 2)), lapd(specs())
    losses, expected = made(*half, labels), made(*same, labels)
    assert all(losses[term].dtype == torch.float32 and losses[term] == expected[term] for term in PREDICTION)


# -- configuration ----------------------------------------------------------------------------------------------------


def test_registered():
    assert get_method("qskd") is QSKD


def test_what_it_requires():
    spec = specs()
    with pytest.raises(UserError, match="needs features of the student"):
        QSKD(QSKDConfig(), spec, spec)
    maps = replace(spec, capabilities=frozenset({"features"}))
    with pytest.raises(UserError, match="needs attention of the teacher"):
        QSKD(QSKDConfig(), maps, maps)
    plain = QSKD(QSKDConfig(feature_weight=0), spec, replace(spec, hidden_size=16))
    assert not list(plain.parameters())  # no convolution that would have no gradient
    assert plain.requires == plain.teacher_requires == frozenset()
    able = replace(spec, capabilities=frozenset({"attention", "features"}))
    made = QSKD(QSKDConfig(class_weight=0, box_weight=0, giou_weight=0), maps, able)
    assert not made.config.predicts and not list(made.parameters())


def test_no_predictions_without_their_weights():
    student_adapter, teacher_adapter = detectors("one width")
    off = dict.fromkeys(("class_weight", "box_weight", "giou_weight"), 0.0)
    made = method(student_adapter.spec, teacher_adapter.spec, **off)
    assert set(made(*seen(student_adapter, teacher_adapter))) == {"qskd_feature"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"giou_threshold": 1.0}, r"method.giou_threshold must be in \[-1, 1\), not 1.0"),
        ({"giou_threshold": -1.1}, "method.giou_threshold must be in"),
        ({"layers": 0}, "method.layers must be above 0"),
        ({"layers": 3}, "method.layers is 3, but the student has 2 decoder layers"),
        ({"box_weight": -1}, "method.box_weight must be 0 or above"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(UserError, match=message):
        lapd(specs(), **options)
