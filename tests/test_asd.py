"""Active sampling distillation against loops written from the formulas, in float64."""

import math

import pytest
import torch

from asd_hf.detectors.base import DetectorOutput, DetectorSpec
from asd_hf.errors import UserError
from asd_hf.methods import get_method
from asd_hf.methods.asd import ASD, ASDConfig

CLASSES = ("a", "b", "c")


def spec(num_layers=3, num_queries=7, activation="sigmoid"):
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


def output(num_queries, seed, num_layers=3, dtype=torch.float64, grad=False, columns=3):
    g = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(num_layers, 2, num_queries, columns, generator=g, dtype=torch.float64) - 1).to(dtype)
    centre = 0.25 + 0.5 * torch.rand(num_layers, 2, num_queries, 2, generator=g, dtype=torch.float64)
    size = 0.05 + 0.3 * torch.rand(num_layers, 2, num_queries, 2, generator=g, dtype=torch.float64)
    boxes = torch.cat([centre, size], -1).to(dtype)
    return DetectorOutput(
        logits.requires_grad_(grad), boxes.requires_grad_(grad), torch.zeros(num_layers, 2, num_queries, 8)
    )


def method(dtype=torch.float64, step=10_000, activation="sigmoid", **options):
    torch.manual_seed(0)
    specs = spec(activation=activation), spec(activation=activation)
    asd = ASD(ASDConfig(**{"hidden_dim": 16, "key_dim": 8} | options), *specs).to(dtype)
    with torch.no_grad():
        for p in asd.parameters():
            p.mul_(4 if p.dim() else 1.1)  # otherwise the attention is nearly uniform and hides errors
    asd.step = step
    return asd


# -- the reference: one image, one layer, one point at a time, plain floats -------------------------------------------


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def mlp(net, x):
    linears = [m for m in net if isinstance(m, torch.nn.Linear)]
    for depth, linear in enumerate(linears):
        w, b = linear.weight.tolist(), linear.bias.tolist()
        x = [sum(wi * xi for wi, xi in zip(row, x, strict=True)) + bi for row, bi in zip(w, b, strict=True)]
        if depth < len(linears) - 1:
            x = [max(v, 0.0) for v in x]
    return x


def softmax(row):
    top = max(row)
    e = [math.exp(v - top) for v in row]
    return [v / sum(e) for v in e]


def heads_of(x, config):
    d = len(x) // config.heads
    heads = [x[h * d : (h + 1) * d] for h in range(config.heads)]
    if config.normalize == "l2":
        return [[v / math.sqrt(sum(u * u for u in head)) for v in head] for head in heads]
    if config.normalize == "layer_norm":
        means = [sum(head) / d for head in heads]
        variances = [sum((v - m) ** 2 for v in head) / d for head, m in zip(heads, means, strict=True)]
        return [[(v - means[h]) / math.sqrt(variances[h] + 1e-5) for v in head] for h, head in enumerate(heads)]
    return heads


def score_rows(sampler, points, queries, config):
    """[head][point][query] scaled dot products."""
    q = [heads_of(mlp(sampler.query, p), config) for p in points]
    k = [heads_of(mlp(sampler.key or sampler.query, y), config) for y in queries]
    scale = math.exp(sampler.log_scale.item()) if config.normalize == "l2" else 1 / math.sqrt(len(q[0][0]))
    return [
        [[sum(a * b for a, b in zip(qi[h], kj[h], strict=True)) * scale for kj in k] for qi in q]
        for h in range(config.heads)
    ]


def attention(rows_by_head, config):
    scaled = [[[v / config.temperature for v in row] for row in rows] for rows in rows_by_head]
    weights = [[softmax(row) for row in rows] for rows in scaled]
    points, queries = len(weights[0]), len(weights[0][0])
    return [[sum(w[i][j] for w in weights) / len(weights) for j in range(queries)] for i in range(points)]


def corners(b):
    return [b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2]


def iou_and_giou(a, b):
    """Of boxes given by their corners."""
    inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    area = lambda c: (c[2] - c[0]) * (c[3] - c[1])  # noqa: E731
    union = area(a) + area(b) - inter
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return inter / union, inter / union - (hull - union) / hull


def giou(a, b):
    return iou_and_giou(corners(a), corners(b))[1]


def bernoulli_kl(p, q):
    return sum(a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b)) for a, b in zip(p, q, strict=True))


def class_distance(sampled_teacher, sampled_student, config, head):
    """KL of two sampled class parts, which are probabilities or logits as `config.value` says."""
    pair = [sampled_teacher, sampled_student]
    divergence = {"sigmoid": "bernoulli"}.get(head, head) if config.divergence == "auto" else config.divergence
    if divergence == "softmax" and config.value == "probs":
        pair = [[v / sum(x) for v in x] for x in pair]
    elif divergence == "softmax":
        pair = [softmax(x) for x in pair]
    elif config.value == "logits":
        pair = [[sigmoid(v) for v in x] for x in pair]
    p, q = pair if config.direction == "teacher_student" else pair[::-1]
    if divergence == "softmax":
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return bernoulli_kl(p, q)


def to_space(box, space):
    """A cxcywh box in the space that boxes are averaged in."""
    return {"cxcywh": box, "xyxy": corners(box), "logit": [math.log(v / (1 - v)) for v in box]}[space]


def corners_of(value, space):
    """The corners of the box that an average in that space means."""
    return {"cxcywh": corners(value), "xyxy": value, "logit": corners([sigmoid(v) for v in value])}[space]


def sampling_loss(rows_by_head, objects, boxes, config):
    """Eq. 16: -log of what a prediction gives to itself and to those that count as the same object."""
    count = len(boxes)

    def same(i, j):
        if i == j:
            return True
        if config.duplicate_iou is None or objects[i].index(max(objects[i])) != objects[j].index(max(objects[j])):
            return False
        return iou_and_giou(corners(boxes[i]), corners(boxes[j]))[0] > config.duplicate_iou

    loss = 0.0
    for rows in rows_by_head:
        for i in range(count):
            weights = softmax([v / config.sampling_temperature for v in rows[i]])
            loss -= math.log(sum(weights[j] for j in range(count) if same(i, j)))
    return loss / config.heads / (1 if config.sampling_reduction == "sum" else count)


def reference(asd, student, teacher):
    c = asd.config
    head = "softmax" if asd.softmax else "sigmoid"
    probs_of = {"softmax": softmax, "sigmoid": lambda z: [sigmoid(v) for v in z]}[head]
    totals = {"asd_sampling": 0.0, "asd_box": 0.0, "asd_class": 0.0, "asd_giou": 0.0}
    images = student.logits.shape[1]
    for layer in range(1, c.layers + 1):
        sampler = asd.samplers[0] if c.share_sampler else asd.samplers[c.layers - layer]
        for image in range(images):
            of_teacher = -1 if c.teacher_layer == "last" else -layer
            tz, tb = teacher.logits[of_teacher, image].tolist(), teacher.boxes[of_teacher, image].tolist()
            sz, sb = student.logits[-layer, image].tolist(), student.boxes[-layer, image].tolist()
            tp, sp = [probs_of(z) for z in tz], [probs_of(z) for z in sz]
            to, so = ([p[: len(CLASSES)] for p in probs] for probs in (tp, sp))  # without "no object"
            tc, sc = (tz, sz) if c.value == "logits" else (tp, sp)
            tk, sk = (tz, sz) if c.sampler_input == "logits" else (tp, sp)
            ty = [[c.box_scale * v for v in b] + k for b, k in zip(tb, tk, strict=True)]
            sy = [[c.box_scale * v for v in b] + k for b, k in zip(sb, sk, strict=True)]
            sampling = sampling_loss(score_rows(sampler, ty, ty, c), to, tb, c)
            if c.sampling_outputs == "both":
                sampling += sampling_loss(score_rows(sampler, sy, sy, c), so, sb, c)
            totals["asd_sampling"] += sampling / images
            points, scores = list(ty), [max(p) for p in to]
            if c.max_points is not None:
                best = sorted(range(len(ty)), key=lambda i: -scores[i])[: c.max_points]
                points, scores = [ty[i] for i in best], [scores[i] for i in best]
            if c.student_points:
                points, scores = points + sy, scores + [max(p) for p in so]
            wt = attention(score_rows(sampler, points, ty, c), c)
            ws = attention(score_rows(sampler, points, sy, c), c)
            share = [1 / len(points)] * len(points)
            if c.point_weight == "score":
                share = [s / sum(scores) for s in scores]
            for i, portion in enumerate(share):
                mix = lambda w, v: [sum(wj * vj[k] for wj, vj in zip(w, v, strict=True)) for k in range(len(v[0]))]  # noqa: E731
                bt = mix(wt[i], [to_space(b, c.box_space) for b in tb])
                bs = mix(ws[i], [to_space(b, c.box_space) for b in sb])
                ct, cs = mix(wt[i], tc), mix(ws[i], sc)
                box = sum(abs(a - b) for a, b in zip(bt, bs, strict=True))
                kl = class_distance(ct, cs, c, head)
                far = 1 - iou_and_giou(corners_of(bt, c.box_space), corners_of(bs, c.box_space))[1]
                totals["asd_box"] += portion * box / images
                totals["asd_class"] += portion * kl / images
                totals["asd_giou"] += portion * far / images
    weights = {"asd_sampling": c.sampling_weight, "asd_box": c.box_weight, "asd_class": c.class_weight}
    weights |= {"asd_giou": c.giou_weight} if c.giou_weight else {}
    return {name: weight * totals[name] for name, weight in weights.items()}


VARIANTS = {
    "default": {},
    "one layer": {"layers": 1},
    "own samplers": {"share_sampler": False, "layers": 3},
    "shared MLP": {"shared_qk": True},
    "deep MLP": {"mlp_layers": 3},
    "four heads": {"heads": 4},
    "sum, T 1": {"sampling_reduction": "sum", "temperature": 1.0},
    "score-weighted": {"point_weight": "score"},
    "best points": {"max_points": 3, "point_weight": "score"},
    "student points": {"student_points": True, "point_weight": "score"},
    "giou": {"giou_weight": 2.0},
    "sampled logits": {"value": "logits"},
    "reverse": {"direction": "student_teacher"},
    "softmax": {"divergence": "softmax"},
    "softmax of logits": {"divergence": "softmax", "value": "logits"},
    "reverse softmax": {"divergence": "softmax", "direction": "student_teacher"},
    "corners": {"box_space": "xyxy", "giou_weight": 2.0},
    "box logits": {"box_space": "logit", "giou_weight": 2.0},
    "logits in": {"sampler_input": "logits"},
    "scaled boxes in": {"box_scale": 3.0},
    "l2, two heads": {"normalize": "l2", "heads": 2},
    "layer norm, two heads": {"normalize": "layer_norm", "heads": 2},
    "duplicates": {"duplicate_iou": 0.2, "heads": 2},
    "duplicates of both, T 2": {
        "duplicate_iou": 0.2,
        "sampling_outputs": "both",
        "sampling_temperature": 2.0,
        "sampling_reduction": "sum",
    },
    "sampling T": {"sampling_temperature": 3.0},
    "both outputs": {"sampling_outputs": "both"},
    "last teacher layer": {"teacher_layer": "last", "layers": 3, "share_sampler": False},
}


@pytest.mark.parametrize(("student_queries", "teacher_queries"), [(6, 6), (4, 9), (9, 5)])
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_naive_loops(name, student_queries, teacher_queries):
    asd = method(**VARIANTS[name])
    student, teacher = output(student_queries, 1), output(teacher_queries, 2)
    got, want = asd(student, teacher, []), reference(asd, student, teacher)
    assert got.keys() == want.keys()
    for key in want:
        assert got[key].item() == pytest.approx(want[key], rel=1e-12), key


SOFTMAX_HEADS = {
    "default": {},
    "score-weighted": {"point_weight": "score", "student_points": True},
    "best points": {"max_points": 3, "sampler_input": "logits"},
    "sampled logits": {"value": "logits"},
    "each class on its own": {"divergence": "bernoulli"},
    "reverse": {"direction": "student_teacher"},
    "duplicates": {"duplicate_iou": 0.2},
}


@pytest.mark.parametrize("name", SOFTMAX_HEADS)
def test_softmax_heads_equal_naive_loops(name):
    asd = method(activation="softmax", **SOFTMAX_HEADS[name])
    student, teacher = output(6, 1, columns=4), output(8, 2, columns=4)
    got, want = asd(student, teacher, []), reference(asd, student, teacher)
    for key in want:
        assert got[key].item() == pytest.approx(want[key], rel=1e-12), key
    assert got["asd_class"] > 0
    same = asd(teacher, teacher, [])
    if not asd.config.student_points:
        assert abs(same["asd_class"].item()) < 1e-12 and same["asd_box"] < 1e-12


@pytest.mark.parametrize("name", VARIANTS)
def test_fp32_is_close_to_float64(name):
    wide, narrow = method(**VARIANTS[name]), method(**VARIANTS[name]).float()
    pair = output(6, 1, dtype=torch.float32), output(8, 2, dtype=torch.float32)
    got = narrow(*pair, [])
    want = wide(*(DetectorOutput(o.logits.double(), o.boxes.double(), o.queries) for o in pair), [])
    for key in want:
        assert got[key].item() == pytest.approx(want[key].item(), rel=1e-6), key


def test_low_precision_inputs_are_compared_in_fp32_under_autocast():
    asd = method(torch.float32)
    pair = output(6, 1, dtype=torch.bfloat16), output(8, 2, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = asd(*pair, [])
    want = asd(*(DetectorOutput(o.logits.float(), o.boxes.float(), o.queries) for o in pair), [])
    assert all(torch.equal(got[key], want[key]) and got[key].dtype == torch.float32 for key in want)


def gradients(asd, names=("asd_box", "asd_class", "asd_giou")):
    student, teacher = output(6, 1, grad=True), output(8, 2, grad=True)
    losses = asd(student, teacher, [])
    loss = sum(losses[n] for n in names if n in losses)
    asd.zero_grad()
    if loss.requires_grad:
        loss.backward()
    return student, teacher


def test_distillation_reaches_the_student_and_neither_teacher_nor_sampler():
    asd = method()
    student, teacher = gradients(asd)
    assert student.logits.grad[-2:].abs().sum() > 0
    assert student.boxes.grad[-2:].abs().sum() > 0
    assert student.logits.grad[:-2].abs().sum() == 0  # `layers` is 2 of 3
    assert teacher.logits.grad is None
    assert teacher.boxes.grad is None
    assert all(p.grad is None for p in asd.parameters())


def test_gradient_passes_through_keys_and_through_values():
    def finite_difference(asd, through_keys, through_values):
        """d loss / d one student logit, moved in the keys, in the values, or in both."""
        teacher, results = output(8, 2), []
        for sign in (1, -1):
            moved = output(6, 1)
            moved.logits[-1, 0, 0, 0] += sign * 1e-6
            keys, values = moved if through_keys else output(6, 1), moved if through_values else output(6, 1)
            results.append(loss_of(asd, keys, values, teacher))
        return (results[0] - results[1]) / 2e-6

    def loss_of(asd, keys, values, teacher):
        """`asd`, with the weights taken from `keys` and what is sampled from `values`."""

        class Split(ASD):
            def _compare_samples(self, t_w, s_w, t_logits, t_boxes, s_logits, s_boxes):
                k = self.config.layers
                values_logits, values_boxes = values.logits[-k:].flatten(0, 1), values.boxes[-k:].flatten(0, 1)
                return super()._compare_samples(t_w, s_w, t_logits, t_boxes, values_logits, values_boxes)

        asd.__class__ = Split
        losses = asd(keys, teacher, [])
        asd.__class__ = ASD
        return (losses["asd_box"] + losses["asd_class"]).item()

    for weight_gradient, through_keys in ((True, True), (False, False)):
        asd = method(weight_gradient=weight_gradient)
        student, _ = gradients(asd)
        want = finite_difference(asd, through_keys, True)
        assert student.logits.grad[-1, 0, 0, 0].item() == pytest.approx(want, rel=1e-4)
    assert abs(finite_difference(method(), True, False)) > 1e-4  # the keys do carry something


def test_sampler_learns_from_the_sampling_loss_and_from_distillation_only_when_asked():
    asd = method()
    student, _ = gradients(asd, ["asd_sampling"])
    assert all(p.grad.abs().sum() > 0 for p in asd.parameters() if p.dim() > 1)
    assert student.logits.grad is None
    asd = method(sampler_gradient=True)
    gradients(asd)
    assert all(p.grad.abs().sum() > 0 for p in asd.parameters() if p.dim() > 1)


def test_sampling_on_both_outputs_never_pushes_the_student():
    asd = method(sampling_outputs="both")
    student, teacher = output(6, 1, grad=True), output(8, 2)
    loss = asd(student, teacher, [])["asd_sampling"]
    assert loss.item() > method()(student, teacher, [])["asd_sampling"].item()
    loss.backward()
    assert student.logits.grad is None


@pytest.mark.parametrize("name", [n for n in VARIANTS if n not in ("pair", "last teacher layer")])
def test_equal_predictions_cost_nothing(name):
    same = output(6, 1)
    losses = method(**VARIANTS[name])(same, same, [])
    assert sum(v.item() for n, v in losses.items() if n != "asd_sampling") == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_teaches_boxes_and_classes(name):
    student, _ = gradients(method(**VARIANTS[name]))
    for gradient in (student.logits.grad, student.boxes.grad):
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_duplicates_count_as_one_positive_set():
    teacher = output(6, 2)
    for x in (teacher.logits, teacher.boxes):
        x[:, :, 1] = x[:, :, 0]
    plain, merged = method(), method(duplicate_iou=0.95)
    assert merged(teacher, teacher, [])["asd_sampling"] < plain(teacher, teacher, [])["asd_sampling"]


def test_ramp_scales_distillation_and_not_sampling():
    student, teacher = output(6, 1), output(8, 2)
    full = method(step=10_000)(student, teacher, [])
    for step, factor in ((0, 0.0), (100, 0.0), (300, 0.5), (500, 1.0)):
        losses = method(step=step, ramp_start=100, ramp_steps=400)(student, teacher, [])
        assert losses["asd_sampling"].item() == full["asd_sampling"].item()
        assert losses["asd_box"].item() == pytest.approx(factor * full["asd_box"].item())
        assert losses["asd_class"].item() == pytest.approx(factor * full["asd_class"].item())
    losses = method(step=100, ramp_steps=400)(student, teacher, [])  # which begins with the training
    assert losses["asd_box"].item() == pytest.approx(0.25 * full["asd_box"].item())


def test_statistics():
    asd = method()
    student, teacher = output(6, 1), output(8, 2)
    asd(student, teacher, [])
    seen = {name: value.item() for name, value in asd.statistics.items()}
    assert set(seen) == {"asd/w_ii", "asd/w_ii_foreground", "asd/w_ii_background", "asd/queries_per_point"}
    seen = {name.removeprefix("asd/"): value for name, value in seen.items()}
    layers = []
    for layer in (-2, -1):
        y = torch.cat([teacher.boxes[layer], teacher.logits[layer].sigmoid()], -1)
        layers.append(asd.samplers[0](y, y)[:, 0].softmax(-1).diagonal(dim1=1, dim2=2))
    w, score = torch.stack(layers), teacher.logits[-2:].sigmoid().amax(-1)
    assert seen["w_ii"] == pytest.approx(w.mean().item())
    assert seen["w_ii_foreground"] == pytest.approx(((w * score).sum() / score.sum()).item())
    assert seen["w_ii_background"] == pytest.approx(((w * (1 - score)).sum() / (1 - score).sum()).item())
    assert 1 <= seen["queries_per_point"] <= 6


def test_matrices_are_the_attention_of_the_last_layer():
    asd = method(heads=2, layers=2, temperature=2.0, share_sampler=False)
    student, teacher = output(5, 0), output(7, 1)
    found = asd.matrices(student, teacher)
    inputs = {
        who: torch.cat([x.boxes[-1], x.logits[-1].sigmoid()], -1).tolist()
        for who, x in (("teacher", teacher), ("student", student))
    }
    for who, queries in inputs.items():
        for image, points in enumerate(inputs["teacher"]):
            rows = attention(score_rows(asd.samplers[-1], points, queries[image], asd.config), asd.config)
            assert found[who][image].tolist() == [pytest.approx(row) for row in rows]


def test_bad_options_are_one_line():
    with pytest.raises(UserError, match="method.value: 'prob' is not a choice: did you mean 'probs'?"):
        ASDConfig(value="prob")
    with pytest.raises(UserError, match="method.temperature must be above 0"):
        ASDConfig(temperature=0)
    with pytest.raises(UserError, match="cannot be split"):
        ASDConfig(key_dim=10, heads=4)
    with pytest.raises(UserError, match="the teacher has 2 decoder layers"):
        ASD(ASDConfig(layers=3), spec(), spec(num_layers=2))


def test_registry():
    assert get_method("asd") is ASD
    assert get_method("asd_hf.methods.asd:ASD") is ASD
    with pytest.raises(UserError, match="did you mean 'asd'"):
        get_method("ads")
    with pytest.raises(UserError, match="cannot be imported"):
        get_method("nowhere:Method")
