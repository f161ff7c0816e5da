"""D3ETR on tiny detectors: matching by trying all, predictions and attention by loops in float64."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch

from asd_hf.detectors import get_adapter
from asd_hf.errors import UserError
from asd_hf.methods import get_method
from asd_hf.methods.d3etr import D3ETR, D3ETRConfig
from tests import tiny
from tests.answers import ask_both, batch, detector, divergence, giou_distance, l1, sigmoid, softmax, specs
from tests.maps import in_frame_of, inside

TERMS = ("class", "box", "giou", "self_attention", "cross_attention")
PAIRS = {  # student, its number of queries, teacher, its number, and the classes that it knows
    "more of the teacher": ("deformable_detr", 4, "other", 5, ("kite", "cat", "owl")),
    "more of the student": ("rt_detr", 5, "lw_detr", 4, tiny.CLASSES),
    "one map, softmax": ("detr", 4, "rt_detr", 5, tiny.CLASSES),
}
FLOOR = 0.01


def make(pair, **options):
    student, ours, teacher, theirs, classes = PAIRS[pair]
    student, teacher = detector(student, num_queries=ours), detector(teacher, 1, num_queries=theirs, classes=classes)
    for adapter in (student, teacher):
        adapter.watch_attention()
    torch.manual_seed(0)
    return D3ETR(D3ETRConfig(**options), *specs(student, teacher)).double(), student, teacher


def only(group, *terms):
    """Options that leave nothing but these terms of a group."""
    weights = {f"{g}_{t}_weight": 0.0 for g in ("adaptive", "fixed") for t in TERMS}
    return weights | {f"{group}_{term}_weight": 1.0 for term in terms}


# -- the reference ----------------------------------------------------------------------------------------------------


def layers_of(method, student, teacher):
    """(student layer, teacher layer) counted from the end, last first."""
    count = method.config.layers or len(student.logits)
    return [(-back, -back if back <= len(teacher.logits) else -1) for back in range(1, count + 1)]


def cost(z_s, z_t, b_s, b_t, head, config):
    """The class part is the cross entropy with the teacher's probabilities."""
    if head:
        entropy = -sum(p * math.log(q) for p, q in zip(softmax(z_t), softmax(z_s), strict=True))
    else:
        pairs = zip(sigmoid(z_t), sigmoid(z_s), strict=True)
        entropy = -sum(p * math.log(q) + (1 - p) * math.log(1 - q) for p, q in pairs)
    box = config.bbox_cost * l1(b_s, b_t) + config.giou_cost * giou_distance(b_s, b_t)
    return config.class_cost * entropy + box


def best_pairs(costs):
    """Student query -> teacher query of the cheapest assignment, by trying all."""
    rows, columns = len(costs), len(costs[0])
    if rows > columns:
        return {j: i for i, j in best_pairs([list(column) for column in zip(*costs, strict=True)]).items()}
    tried = itertools.permutations(range(columns), rows)
    best = min(tried, key=lambda chosen: sum(costs[i][j] for i, j in enumerate(chosen)))
    return dict(enumerate(best))


def attention_distance(method, student, teacher, total):
    """Of two lists of attention, made to sum to 1."""
    student, teacher = ([v / sum(x) for v in x] for x in (student, teacher))
    if method.config.attention_distance == "mse":
        return sum((total * (a - b)) ** 2 for a, b in zip(student, teacher, strict=True)) / len(teacher)
    student, teacher = ([(1 - FLOOR) * v + FLOOR / len(x) for v in x] for x in (student, teacher))
    return sum(t * math.log(t / s) for s, t in zip(student, teacher, strict=True))


def look_of_each(output):
    """[level][layer][query] -> (B, H, W), one query after the other."""
    layers, images, queries = output.attention.queries.shape[:3]
    levels = []
    for query in range(queries):
        weights = torch.zeros(layers, images, queries, dtype=torch.float64)
        weights[:, :, query] = 1
        levels.append(output.attention.look(weights))
    return [[[levels[q][level][n] for q in range(queries)] for n in range(layers)] for level in range(len(levels[0]))]


def reference(method, student, teacher, pairs_of, specs):
    """The losses of one group; `pairs_of(student layer, teacher layer, image)` gives its pairs."""
    layers, images = layers_of(method, student, teacher), student.logits.shape[1]
    totals = dict.fromkeys(TERMS, 0.0)
    ours, theirs = look_of_each(student), look_of_each(teacher)
    strides = specs[0].strides, specs[1].strides
    levels = [(i, strides[1].index(stride)) for i, stride in enumerate(strides[0]) if stride in strides[1]]
    for m, n in layers:
        for image in range(images):
            pairs = pairs_of(m, n, image)
            portion = 1 / len(pairs) / images
            for i, j in pairs.items():
                z = teacher.logits[n, image, j].tolist(), student.logits[m, image, i].tolist()
                b = teacher.boxes[n, image, j].tolist(), student.boxes[m, image, i].tolist()
                totals["class"] += portion * divergence(*z, method.softmax)
                totals["box"] += portion * l1(*b)
                totals["giou"] += portion * giou_distance(*b)
                a_s, a_t = (
                    student.attention.queries[m, image, i].tolist(),
                    teacher.attention.queries[n, image, j].tolist(),
                )
                a_s, a_t = [a_s[k] for k in pairs], [a_t[k] for k in pairs.values()]
                totals["self_attention"] += portion * attention_distance(method, a_s, a_t, 1)
            cells_s, cells_t = [], []
            for source, target in levels:
                map_s = sum(ours[source][m][i] for i in pairs)[image : image + 1, None]
                map_t = sum(theirs[target][n][j] for j in pairs.values())[image]
                masks = student.mask[image : image + 1], teacher.mask[image : image + 1]
                if student.mask is not teacher.mask:
                    map_s = in_frame_of(map_s, *masks, map_t.shape)
                valid = inside(masks[1], map_t.shape)[0]
                for y, x in itertools.product(*map(range, map_t.shape)):
                    if valid[y][x]:
                        cells_s.append(map_s[0, 0, y, x].item())
                        cells_t.append(map_t[y, x].item())
            totals["cross_attention"] += attention_distance(method, cells_s, cells_t, len(pairs)) / images
    return totals


VARIANTS = {
    "default": {},
    "squared": {"attention_distance": "mse"},
    "last two": {"layers": 2},
    "costs": {"class_cost": 0.1, "bbox_cost": 9.0, "giou_cost": 0.0},
    "weights": {
        f"{g}_{t}_weight": 0.5 + i for i, (g, t) in enumerate(itertools.product(("adaptive", "fixed"), TERMS))
    },
}


@pytest.mark.parametrize(
    ("pair", "name"),
    [
        *(("more of the teacher", name) for name in VARIANTS),
        *itertools.product(list(PAIRS)[1:], ("default", "squared")),
    ],
)
def test_equals_naive_loops(pair, name):
    method, student, teacher = make(pair, **VARIANTS[name])
    data, view = batch(2), None
    if name == "default":  # another resolution for the teacher: its canvas ends elsewhere, too
        view = tiny.batch(2, sizes=((128, 96), (96, 128)))
    ours, theirs = ask_both(student, teacher, data, view)
    with torch.no_grad():
        losses = method(ours, theirs, [])
    assert not theirs.asked
    ((_, told),) = ours.asked
    config, both = method.config, specs(student, teacher)

    def adaptive(m, n, image):
        z_s, z_t = ours.logits[m, image].tolist(), theirs.logits[n, image].tolist()
        b_s, b_t = ours.boxes[m, image].tolist(), theirs.boxes[n, image].tolist()
        return best_pairs(
            [
                [cost(z, w, b, c, method.softmax, config) for w, c in zip(z_t, b_t, strict=True)]
                for z, b in zip(z_s, b_s, strict=True)
            ]
        )

    def fixed(m, n, image):
        return {i: i for i in range(theirs.logits.shape[2])}

    expected = {}
    for group, output, pairs in (("adaptive", ours, adaptive), ("fixed", told, fixed)):
        output.mask = ours.mask
        found = reference(method, output, theirs, pairs, both)
        expected |= {f"d3etr_{group}_{t}": config.term_weight(f"{group}_{t}") * found[t] for t in TERMS}
    assert {term: loss.item() for term, loss in losses.items()} == pytest.approx(expected, rel=1e-8)


def test_the_fixed_group_is_asked_the_teachers_question():
    method, student, teacher = make("more of the teacher")
    ours, theirs = ask_both(student, teacher, batch(2))
    method(ours, theirs, [])
    for asked, expected in zip(ours.asked[0][0], method.translate(theirs.decode.own, theirs), strict=True):
        assert torch.equal(asked, expected)


# -- what it needs and leaves alone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["kl", "mse"])
@pytest.mark.parametrize("pair", PAIRS)
def test_gradient_reaches_student_and_adapters_and_not_the_teacher(pair, distance):
    method, student, teacher = make(pair, attention_distance=distance)
    ours, theirs = ask_both(student, teacher, batch(2))
    places = [p for p in student.model.parameters() if p.requires_grad]
    targets = [p for p in teacher.model.parameters() if p.requires_grad]
    losses = method(ours, theirs, [])
    for term, loss in losses.items():
        gradients = torch.autograd.grad(loss, places, retain_graph=True, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in gradients), term
        # Where sampling offsets and weights start at zeros, attention to the image has no gradient beyond them.
        reached = sum(g is not None and g.any().item() for g in gradients)
        assert reached > (5 if "cross_attention" in term else len(places) / 3), term
        gradients = torch.autograd.grad(loss, targets, retain_graph=True, allow_unused=True)
        assert all(g is None for g in gradients), term
    if learnt := list(method.parameters()):
        assert all(g.any() for g in torch.autograd.grad(sum(losses.values()), learnt))


def test_single_precision_with_attention_of_exact_zeros():
    """As from points that sample few cells, and from softmax that underflows."""
    method, student, teacher = make("more of the teacher", **only("adaptive", "self_attention", "cross_attention"))
    ours, theirs = ask_both(student, teacher, batch(2))
    for output, seed in ((ours, 0), (theirs, 1)):
        attention, generator = output.attention.queries, torch.Generator().manual_seed(seed)
        hard = torch.rand(attention.shape, generator=generator)
        hard = (hard == hard.amax(-1, keepdim=True)).float().requires_grad_()
        output.attention.queries = hard
    ours.logits, ours.boxes = ours.logits.float(), ours.boxes.float()
    theirs.logits, theirs.boxes = theirs.logits.float(), theirs.boxes.float()
    losses = method(ours, theirs, [])
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    assert torch.autograd.grad(sum(losses.values()), ours.attention.queries)[0].isfinite().all()


@pytest.mark.parametrize("distance", ["kl", "mse"])
@pytest.mark.parametrize("name", ["deformable_detr_two_stage", "detr"])
def test_a_teacher_that_is_the_student_has_nothing_to_teach(name, distance):
    student = detector(name)
    teacher = get_adapter(copy.deepcopy(student.model), student.processor)
    student.watch_attention(), teacher.watch_attention()
    method = D3ETR(D3ETRConfig(attention_distance=distance), *specs(student, teacher))
    losses = method(*ask_both(student, teacher, batch(2)), [])
    assert len(losses) == 10 and all(abs(loss) < 1e-8 for loss in losses.values())


def test_what_has_no_weight_is_left_out_with_what_it_requires():
    method, student, teacher = make("more of the teacher")
    assert method.requires == {"decode", "attention"}
    ours, theirs = ask_both(student, teacher, batch(2))
    with torch.no_grad():
        whole = method(ours, theirs, [])
        for group, term in itertools.product(("adaptive", "fixed"), TERMS):
            attends = {"attention"} if "attention" in term else set()
            method, *_ = make("more of the teacher", **only(group, term))
            assert method.requires == attends | ({"decode"} if group == "fixed" else set())
            ours.asked.clear()
            seen = [output if attends else replace(output, attention=None) for output in (ours, theirs)]
            losses = method(*seen, [])
            assert list(losses) == [f"d3etr_{group}_{term}"] and len(ours.asked) == (group == "fixed")
            full = whole[f"d3etr_{group}_{term}"] / D3ETRConfig().term_weight(f"{group}_{term}")
            assert losses[f"d3etr_{group}_{term}"].item() == pytest.approx(full.item(), rel=1e-6)


def test_weights_of_attention_go_with_its_distance():
    def weights(config):
        return {f"{g}_{t}": config.term_weight(f"{g}_{t}") for g in ("adaptive", "fixed") for t in TERMS if "_" in t}

    config = D3ETRConfig()
    assert set(weights(config).values()) == {1}
    changed = replace(config, attention_distance="mse")  # as a saved configuration is changed
    own = {"adaptive_self_attention": 1e4, "adaptive_cross_attention": 1e3}
    own |= {"fixed_self_attention": 1e4, "fixed_cross_attention": 1e3}
    assert weights(changed) == own
    assert weights(replace(changed, fixed_self_attention_weight=7.0)) == own | {"fixed_self_attention": 7}
    assert weights(replace(changed, fixed_self_attention_weight=0.0)) == own | {"fixed_self_attention": 0}
    assert config.term_weight("adaptive_box") == 5 and config.term_weight("other") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_distance": "l1"}, "method.attention_distance: 'l1' is not a choice"),
        ({"fixed_box_weight": -1.0}, "method.fixed_box_weight must be 0 or above"),
        ({"layers": 0}, "method.layers must be above 0"),
        (only("fixed"), "all weights of d3etr are 0"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        D3ETRConfig(**options)


def test_pairs_that_cannot_be():
    detr, yolos = detector("detr"), detector("yolos")
    with pytest.raises(UserError, match="needs attention, decode of the teacher, which yolos cannot give"):
        D3ETR(D3ETRConfig(), *specs(detr, yolos))
    with pytest.raises(UserError, match="method.layers is 4, but the student has 3"):
        D3ETR(D3ETRConfig(layers=4), *specs(detr, detr))


def test_registered():
    assert get_method("d3etr") is D3ETR
