import itertools
import sys

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DeformableDetrConfig, DetrConfig
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher
from transformers.loss.loss_for_object_detection import HungarianMatcher

from asd_hf.criterion import DetectionCriterion
from asd_hf.detectors import get_adapter
from asd_hf.detectors.base import DetectorOutput
from tests import tiny
from tests.families import FAMILIES

ACTIVATIONS = ("sigmoid", "softmax")
VARIANTS = {"plain": {}, "refine": {"with_box_refine": True}, "two_stage": {"two_stage": True}}


def detector(dtype=torch.float32, **options):
    return get_adapter(tiny.deformable_detr(decoder_layers=3, **options).to(dtype), tiny.processor())


def in_dtype(batch, dtype):
    return batch | {"labels": [label | {"boxes": label["boxes"].to(dtype)} for label in batch["labels"]]}


def predictions(
    num_layers=3, num_images=4, num_queries=12, num_classes=5, seed=0, proposals=None, dtype=torch.float64
):
    """Random predictions, leaves of the graph."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        logits = torch.randn(*shape, num_classes, generator=g, dtype=dtype).requires_grad_()
        return logits, torch.rand(*shape, 4, generator=g, dtype=dtype).mul(0.9).add(0.05).requires_grad_()

    logits, boxes = draw(num_layers, num_images, num_queries)
    output = DetectorOutput(logits, boxes, torch.zeros(num_layers, num_images, num_queries, 1))
    if proposals:
        output.proposals = draw(num_images, proposals)
    return output


def decoder_loss(losses):
    return sum(loss for name, loss in losses.items() if not name.endswith("_enc"))


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_loss_and_gradients_equal_transformers(config, dtype, tolerance):
    adapter = detector(dtype, **config)
    adapter.model.config.update({"class_cost": 2, "focal_alpha": 0.4, "bbox_loss_coefficient": 3})
    adapter.model.requires_grad_(True)
    batch = in_dtype(tiny.batch(4), dtype)
    pixels = adapter.normalize(batch["pixel_values"], batch["pixel_mask"]).to(dtype)
    theirs = adapter.model(pixel_values=pixels, pixel_mask=batch["pixel_mask"], labels=batch["labels"]).loss
    parameters = dict(adapter.model.named_parameters())
    expected = torch.autograd.grad(theirs, parameters.values(), allow_unused=True)

    output = adapter(batch["pixel_values"], batch["pixel_mask"])
    ours = decoder_loss(DetectionCriterion.from_config(adapter.model.config)(output, batch["labels"]))
    gradients = torch.autograd.grad(ours, parameters.values(), allow_unused=True)
    assert_same_training(ours, theirs, parameters, gradients, expected, tolerance)


def assert_same_training(ours, theirs, parameters, gradients, expected, tolerance):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)
    largest = max(g.abs().max().item() for g in expected if g is not None)
    for name, gradient, reference in zip(parameters, gradients, expected, strict=True):
        assert (gradient is None) == (reference is None), name
        if gradient is not None:
            torch.testing.assert_close(gradient, reference, rtol=tolerance, atol=tolerance * largest, msg=name)


@pytest.fixture
def default_dtype(dtype):
    """DAB-DETR makes its queries in the default precision."""
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize("name", ["detr", "table_transformer", "conditional_detr", "dab_detr", "yolos"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_loss_and_gradients_of_the_other_families_equal_transformers(name, dtype, tolerance):
    model, processor = FAMILIES[name]()
    model.to(dtype).requires_grad_(True)
    model.config.update({"class_cost": 2, "bbox_cost": 4, "giou_cost": 3, "bbox_loss_coefficient": 3})
    adapter = get_adapter(model, processor)
    model.config.update({"focal_alpha": 0.4} if adapter.spec.activation == "sigmoid" else {"eos_coefficient": 0.3})
    batch = in_dtype(tiny.batch(4, sizes=((96, 96),)), dtype)  # no padding: YOLOS would know it by no mask
    pixels, mask = adapter.prepare(batch["pixel_values"], batch["pixel_mask"])
    inputs = {} if name == "yolos" else {"pixel_mask": mask}
    theirs = model(pixel_values=pixels, labels=batch["labels"], **inputs).loss
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(theirs, parameters.values(), allow_unused=True)

    output = adapter(batch["pixel_values"], batch["pixel_mask"])
    losses = DetectionCriterion.from_config(model.config, adapter.spec.activation)(output, batch["labels"])
    gradients = torch.autograd.grad(sum(losses.values()), parameters.values(), allow_unused=True)
    assert_same_training(sum(losses.values()), theirs, parameters, gradients, expected, tolerance)


def test_terms_equal_a_loop_in_float64():
    """Also those of the proposals, which Transformers does not have: class 0 against all objects."""
    output, labels = predictions(proposals=30), in_dtype(tiny.batch(4), torch.float64)["labels"]
    criterion = DetectionCriterion(class_cost=2, class_loss_weight=2, focal_alpha=0.4)
    losses = criterion(output, labels)
    count = sum(len(label["boxes"]) for label in labels)
    layers = [("", logits, boxes) for logits, boxes in zip(output.logits, output.boxes, strict=True)]
    expected = dict.fromkeys(losses, 0.0)
    matcher = DeformableDetrHungarianMatcher(2, 5, 2)
    for stage, logits, boxes in [*layers, ("_enc", *output.proposals)]:
        targets = [{"boxes": t["boxes"], "class_labels": t["class_labels"] * (0 if stage else 1)} for t in labels]
        matched = matcher({"logits": logits, "pred_boxes": boxes}, targets)
        for image, (queries, order) in enumerate(matched):
            wanted = dict(zip(queries.tolist(), order.tolist(), strict=True))
            for query, (scores, box) in enumerate(zip(logits[image], boxes[image], strict=True)):
                target = wanted.get(query)
                for c, p in enumerate(scores.sigmoid().tolist()):
                    hit = target is not None and targets[image]["class_labels"][target] == c
                    focal = -0.4 * (1 - p) ** 2 * torch.tensor(p, dtype=torch.float64).log()
                    background = -0.6 * p**2 * torch.tensor(1 - p, dtype=torch.float64).log()
                    expected["loss_ce" + stage] += 2 * (focal if hit else background) / count
                if target is not None:
                    aim = targets[image]["boxes"][target]
                    expected["loss_bbox" + stage] += 5 * (box - aim).abs().sum() / count
                    expected["loss_giou" + stage] += 2 * (1 - naive_giou(box.tolist(), aim.tolist())) / count
    assert set(losses) == {f"loss_{n}{s}" for n in ("ce", "bbox", "giou") for s in ("", "_enc")}
    for name, value in losses.items():
        reference = torch.as_tensor(expected[name], dtype=torch.float64)
        torch.testing.assert_close(value, reference, rtol=1e-10, atol=0, msg=name)


def test_terms_of_softmax_heads_equal_a_loop_in_float64():
    output, labels = predictions(), in_dtype(tiny.batch(4, num_classes=4), torch.float64)["labels"]
    criterion = DetectionCriterion("softmax", class_cost=2, class_loss_weight=3, no_object_weight=0.3)
    losses = criterion(output, labels)
    expected = dict.fromkeys(("loss_ce", "loss_bbox", "loss_giou"), 0.0)
    matcher = HungarianMatcher(2, 5, 2)
    for logits, boxes in zip(output.logits, output.boxes, strict=True):
        entropy = weights = 0.0
        for image, (queries, order) in enumerate(matcher({"logits": logits, "pred_boxes": boxes}, labels)):
            wanted = dict(zip(queries.tolist(), order.tolist(), strict=True))
            for query in range(12):
                target = wanted.get(query)
                right = 4 if target is None else labels[image]["class_labels"][target].item()
                weight = 0.3 if target is None else 1.0
                entropy -= weight * logits[image, query].softmax(-1)[right].log().item()
                weights += weight
                if target is not None:
                    box, aim = boxes[image, query], labels[image]["boxes"][target]
                    expected["loss_bbox"] += 5 * (box - aim).abs().sum().item() / 9
                    expected["loss_giou"] += 2 * (1 - naive_giou(box.tolist(), aim.tolist())) / 9
        expected["loss_ce"] += 3 * entropy / weights
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        torch.testing.assert_close(value.item(), expected[name], rtol=1e-10, atol=0, msg=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_unlabelled_images_take_no_part(activation):
    """The loss is that of the labelled images alone; their predictions alone get a gradient."""
    output = predictions(proposals=30 if activation == "sigmoid" else None)
    batch = in_dtype(tiny.batch(4, num_classes=4, boxes=(3, 0, 2, 0)), torch.float64)
    flags = (True, False, True, True)  # the last one is an image without objects
    labels = [label | {"labelled": flag} for label, flag in zip(batch["labels"], flags, strict=True)]
    criterion = DetectionCriterion(activation)
    losses = criterion(output, labels)
    sum(losses.values()).backward()

    rows = [0, 2, 3]
    alone = DetectorOutput(output.logits[:, rows], output.boxes[:, rows], output.queries[:, rows])
    if output.proposals is not None:
        alone.proposals = tuple(part[rows] for part in output.proposals)
    expected = criterion(alone, [batch["labels"][i] for i in rows])
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-12, atol=0, msg=name)
    parts = {"logits": output.logits, "boxes": output.boxes}
    references = torch.autograd.grad(sum(expected.values()), list(parts.values()))
    for (name, part), reference in zip(parts.items(), references, strict=True):
        torch.testing.assert_close(part.grad, reference, rtol=1e-12, atol=1e-15, msg=name)
        assert not part.grad[:, 1].any()
    for part in output.proposals or ():
        assert part.grad[0].any() and not part.grad[1].any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_any_labelled_image_the_loss_is_zero(activation):
    output, batch = predictions(), in_dtype(tiny.batch(4, boxes=(0,)), torch.float64)
    labels = [label | {"labelled": False} for label in batch["labels"]]
    losses = DetectionCriterion(activation)(output, labels)
    assert all(loss == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert not output.logits.grad.any() and not output.boxes.grad.any()


def naive_giou(a, b):
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    left, right = max(ax - aw / 2, bx - bw / 2), min(ax + aw / 2, bx + bw / 2)
    top, bottom = max(ay - ah / 2, by - bh / 2), min(ay + ah / 2, by + bh / 2)
    intersection = max(right - left, 0) * max(bottom - top, 0)
    union = aw * ah + bw * bh - intersection
    width = max(ax + aw / 2, bx + bw / 2) - min(ax - aw / 2, bx - bw / 2)
    height = max(ay + ah / 2, by + bh / 2) - min(ay - ah / 2, by - bh / 2)
    return intersection / union - (width * height - union) / (width * height)


def pairs_of(output, labels, criterion):
    """{(layer, image, query): target of the image}, from the flat indices."""
    counts = [len(label["boxes"]) for label in labels]
    classes, boxes = (torch.cat([label[key] for label in labels]) for key in ("class_labels", "boxes"))
    [(query, target)] = criterion.match([(output.logits, output.boxes, classes, boxes)], counts)
    _, num_images, num_queries, _ = output.logits.shape
    starts = [sum(counts[:i]) for i in range(num_images)]
    found = {}
    for q, t in zip(query.tolist(), target.tolist(), strict=True):
        image = q // num_queries % num_images
        found[q // num_queries // num_images, image, q % num_queries] = t - starts[image]
    return found


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("num_queries", [12, 4])  # of 4 queries, some of 5 boxes stay unmatched
def test_assignments_equal_transformers(activation, num_queries):
    criterion = DetectionCriterion(activation, class_cost=2)
    matcher = {"sigmoid": DeformableDetrHungarianMatcher, "softmax": HungarianMatcher}[activation](2, 5, 2)
    for seed in range(10):
        output = predictions(num_queries=num_queries, seed=seed)
        labels = in_dtype(tiny.batch(4, seed=seed, num_classes=4), torch.float64)["labels"]
        expected = {}
        for layer, (logits, boxes) in enumerate(zip(output.logits, output.boxes, strict=True)):
            for image, (queries, targets) in enumerate(matcher({"logits": logits, "pred_boxes": boxes}, labels)):
                expected |= {(layer, image, q): t for q, t in zip(queries.tolist(), targets.tolist(), strict=True)}
        assert pairs_of(output, labels, criterion) == expected


def test_matching_has_the_least_cost_of_all():
    output, labels = predictions(1, 1, 5, seed=3), in_dtype(tiny.batch(1), torch.float64)["labels"]
    classes, boxes = labels[0]["class_labels"], labels[0]["boxes"]
    cost = torch.empty(5, 3, dtype=torch.float64)
    for q, t in itertools.product(range(5), range(3)):
        p, box = output.logits[0, 0, q, classes[t]].sigmoid(), output.boxes[0, 0, q]
        cost[q, t] = -0.25 * (1 - p) ** 2 * (p + 1e-8).log() + 0.75 * p**2 * (1 - p + 1e-8).log()
        cost[q, t] += 5 * (box - boxes[t]).abs().sum() - 2 * naive_giou(box.tolist(), boxes[t].tolist())
    best = min(itertools.permutations(range(5), 3), key=lambda order: sum(cost[q, t] for t, q in enumerate(order)))
    assert pairs_of(output, labels, DetectionCriterion()) == {(0, 0, q): t for t, q in enumerate(best)}


def test_a_prediction_that_is_not_finite_is_matched_last():
    output, labels = predictions(1, 1, 5), in_dtype(tiny.batch(1), torch.float64)["labels"]
    with torch.no_grad():
        output.boxes[0, 0, :2] = torch.nan
    assert {query for _, _, query in pairs_of(output, labels, DetectionCriterion())} == {2, 3, 4}


@pytest.mark.parametrize("family", ["detr", "deformable_detr", "deformable_detr_refine", "deformable_detr_two_stage"])
@pytest.mark.parametrize("boxes", [(0,), (0, 2, 0)])
def test_empty_images_give_finite_losses_that_touch_every_head(family, boxes):
    adapter, batch = get_adapter(*FAMILIES[family]()), tiny.batch(3, boxes=boxes)
    criterion = DetectionCriterion(adapter.spec.activation)
    losses = criterion(adapter(batch["pixel_values"], batch["pixel_mask"]), batch["labels"])
    sum(losses.values()).backward()
    if boxes == (0,):
        assert all(loss == 0 for name, loss in losses.items() if "ce" not in name) and losses["loss_ce"] > 0
    heads = ("class_embed", "bbox_embed", "class_labels_classifier", "bbox_predictor")
    found = [p for name, p in adapter.model.named_parameters() if any(head in name for head in heads)]
    assert len(found) >= 8
    for parameter in found:
        assert parameter.grad is not None and parameter.grad.isfinite().all()


def test_defaults_are_those_of_transformers_configurations():
    for activation, config in (("sigmoid", DeformableDetrConfig()), ("softmax", DetrConfig())):
        ours, theirs = (
            vars(criterion) | {"class_loss": vars(criterion.class_loss)}
            for criterion in (DetectionCriterion(activation), DetectionCriterion.from_config(config, activation))
        )
        assert ours == theirs and ours["class_loss"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bf16_predictions_are_judged_in_fp32_inside_autocast(activation):
    output, labels = predictions(dtype=torch.float32), tiny.batch(4, num_classes=4)["labels"]
    halves = DetectorOutput(output.logits.bfloat16(), output.boxes.bfloat16(), output.queries)
    exact = DetectorOutput(halves.logits.float(), halves.boxes.float(), output.queries)
    criterion = DetectionCriterion(activation)
    with torch.autocast("cpu", torch.bfloat16):
        losses = criterion(halves, labels)
    for name, loss in criterion(exact, labels).items():
        assert losses[name].dtype == torch.float32
        torch.testing.assert_close(losses[name], loss, rtol=0, atol=0)


class HostReads(TorchDispatchMode):
    """Counts what would make the host wait for a device: scalar reads and sizes that depend on data."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.name() in (
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::masked_select",
            "aten::equal",
        )
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_known_assignment_takes_the_place_of_matching(activation):
    criterion = DetectionCriterion(activation)
    output = predictions(proposals=30 if activation == "sigmoid" else None)
    labels = tiny.batch(4, num_classes=4)["labels"]
    whole = criterion(output, labels)
    pairs, again = criterion.assign([output, output], labels)
    assert torch.equal(pairs[0], again[0]) and torch.equal(pairs[1], again[1])
    known = criterion(output, labels, pairs=pairs)
    assert set(known) == {"loss_ce", "loss_bbox", "loss_giou"}  # proposals are left out
    assert all(torch.equal(known[name], whole[name]) for name in known)
    query, target = pairs
    other = criterion(output, labels, pairs=(query, target.flip(0)))
    assert other["loss_bbox"] > known["loss_bbox"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_copy_to_the_host_a_step(monkeypatch, activation):
    copies = []
    to = torch.Tensor.to

    def spy(self, *args, **kwargs):
        copies.extend([self.shape] if args[:1] == ("cpu",) else [])
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", spy)
    output = predictions(proposals=30 if activation == "sigmoid" else None)
    labels = [label | {"labelled": True} for label in tiny.batch(4, num_classes=4)["labels"]]
    with HostReads() as reads:
        sum(DetectionCriterion(activation)(output, labels).values()).backward()
    assert len(copies) == 1 and reads.count == 0


def work(rank, world, path, family, seeds, boxes):
    """One rank: the gradients of its part of the batch, averaged over ranks as DistributedDataParallel does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/{world}", rank=rank, world_size=world)
    model, processor = FAMILIES[family]()
    adapter = get_adapter(model.double().requires_grad_(True), processor)
    batches = []
    for i in range(rank * len(seeds) // world, (rank + 1) * len(seeds) // world):
        counts = [count or 0 for count in boxes[i]]
        batches.append(in_dtype(tiny.batch(2, seed=seeds[i], sizes=((96, 96),), boxes=counts), torch.float64))
        for label, count in zip(batches[-1]["labels"], boxes[i], strict=True):
            label["labelled"] = count is not None
    labels = [label for batch in batches for label in batch["labels"]]
    pixels, masks = (torch.cat([batch[key] for batch in batches]) for key in ("pixel_values", "pixel_mask"))
    losses = DetectionCriterion(adapter.spec.activation)(adapter(pixels, masks), labels)
    sum(losses.values()).backward()
    values = {name: loss.detach() for name, loss in losses.items()}
    values |= {n: p.grad for n, p in adapter.model.named_parameters() if p.grad is not None}
    for value in values.values():
        dist.all_reduce(value)
        value /= world
    if rank == 0:
        torch.save(values, f"{path}/{world}.pt")
    dist.destroy_process_group()


BATCHES = {  # family, and boxes of two images a rank; None: not labelled
    "uneven": ("deformable_detr", ((3, 5), (1, 0))),
    "one": ("deformable_detr", ((0, 0), (4, 1))),
    "few": ("deformable_detr", ((0, 0), (1, 0))),
    "none": ("deformable_detr", ((0, 0), (0, 0))),
    "unlabelled": ("deformable_detr", ((3, None), (1, 0))),
    "softmax": ("detr", ((3, 5), (1, 0))),
    "softmax, unlabelled": ("detr", ((3, None), (4, 0))),
    "softmax, one unlabelled": ("detr", ((None, None), (2, 1))),
}


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over a file store")
@pytest.mark.parametrize(("family", "boxes"), BATCHES.values(), ids=BATCHES)
def test_two_ranks_equal_one_with_the_doubled_batch(tmp_path, family, boxes):
    for world in (1, 2):
        torch.multiprocessing.start_processes(
            work, (world, str(tmp_path), family, (0, 1), boxes), nprocs=world, start_method="fork"
        )
    one, two = (torch.load(tmp_path / f"{world}.pt", weights_only=True) for world in (1, 2))
    assert one.keys() == two.keys() and len(one) > 50
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-9, atol=1e-12 + 1e-9 * value.abs().max().item(), msg=name)
