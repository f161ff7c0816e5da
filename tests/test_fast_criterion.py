"""Transformers' detectors under asd_hf's loss against the same under their own."""

import copy
import sys
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import DetrForSegmentation, Trainer, TrainingArguments

import asd_hf
from asd_hf.config import TrainingConfig
from asd_hf.criterion import TransformersCriterion
from asd_hf.detectors import get_adapter
from asd_hf.distiller import Distiller
from asd_hf.errors import UserError
from asd_hf.fast_criterion import _cardinality_error, use_fast_criterion
from asd_hf.trainer import make_criterion
from tests import tiny
from tests.families import FAMILIES, STUDENTS

WEIGHTS = {
    "class_cost": 3,
    "bbox_cost": 2,
    "giou_cost": 4,
    "class_loss_coefficient": 0.7,
    "bbox_loss_coefficient": 3,
    "giou_loss_coefficient": 4,
    "eos_coefficient": 0.3,
    "focal_alpha": 0.4,
    "focal_loss_alpha": 0.6,
    "focal_loss_gamma": 1.5,
    "matcher_class_cost": 3.0,
    "matcher_bbox_cost": 2.0,
    "matcher_giou_cost": 4.0,
    "matcher_alpha": 0.3,
    "matcher_gamma": 1.5,
    "mal_alpha": 0.8,
    **{f"weight_loss_{name}": 0.5 + 0.1 * i for i, name in enumerate(("vfl", "mal", "bbox", "giou", "fgl", "ddf"))},
}
CASES = {  # training mode, boxes of the images, configuration
    "train": (True, (3, 0, 5, 1), {}),
    "eval": (False, (3, 0, 5, 1), {}),
    "no boxes": (True, (0,), {}),
    "more boxes than queries": (True, (14, 2, 0, 1), {}),
    "last layer alone": (False, (3, 0, 5, 1), {"auxiliary_loss": False}),
    "other weights": (True, (3, 0, 5, 1), WEIGHTS),
    "no denoising, sparse": (True, (3, 0, 5, 1), {"num_denoising": 0, "use_dense_one_to_one": False}),
}
ALL = {"train", "eval", "no boxes"}  # of every family; the other cases of one that each loss function knows
REPRESENTATIVES = ("detr", "deformable_detr", "rt_detr", "d_fine", "deimv2", "lw_detr")


@lru_cache
def original(family):
    return FAMILIES[family]()[0]


def detector(family, **values):
    """A trainable copy of the family's tiny model."""
    model = copy.deepcopy(original(family)).requires_grad_(True)
    model.config.update({name: value for name, value in values.items() if hasattr(model.config, name)})
    if family == "yolos":
        model.config.auxiliary_loss = False  # Transformers' own fails with it
    return model


def called_with(model, batch):
    """What the model calls its loss function with; the stock one is left in place."""
    calls, stock = [], model.loss_function
    model.loss_function = lambda *args, **kwargs: calls.append((args, kwargs)) or stock(*args, **kwargs)
    torch.manual_seed(0)
    model(pixel_values=batch["pixel_values"].float() / 255, labels=batch["labels"])
    model.loss_function = stock
    return stock, *calls[0]


def judged(loss_function, args, kwargs):
    """Loss, terms and gradients at all predictions, whose last layers are views of those of all layers."""
    leaves = {}

    def leaf(name, value):
        if torch.is_tensor(value) and value.requires_grad:
            value = leaves[name] = value.detach().clone().requires_grad_()
        return value

    args = [leaf(i, value) for i, value in enumerate(args)]
    kwargs = {name: leaf(name, value) for name, value in kwargs.items()}
    logits, labels, device, boxes, config, *layers = args
    if config.auxiliary_loss and layers[0] is not None:
        last = (slice(None), -1) if len(layers[0]) == len(labels) != config.decoder_layers else -1
        if torch.equal(args[0], layers[0][last]):  # DETR computes its last layer twice
            args[0], args[3] = layers[0][last], layers[1][last]
            del leaves[0], leaves[3]
    loss, terms, earlier = loss_function(*args, **kwargs)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return loss, terms, dict(zip(leaves, gradients, strict=True)), earlier


@pytest.mark.parametrize("family", ["d_fine", "lw_detr"])
def test_precision_is_that_of_fp32_or_of_wider_predictions(family):
    model = use_fast_criterion(detector(family).train())
    _, args, kwargs = called_with(model, tiny.batch(4, sizes=((96, 96),)))

    def loss_of(args, kwargs):
        return model.loss_function(*args, **kwargs)[0]

    def cast(dtype, args, kwargs):
        def to(value):
            return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value

        labels = [label | {"boxes": label["boxes"].to(dtype)} for label in args[1]]
        return [labels if value is args[1] else to(value) for value in args], {k: to(v) for k, v in kwargs.items()}

    exact = loss_of(*cast(torch.float64, args, kwargs))
    assert exact.dtype == torch.float64 and exact.item() == pytest.approx(loss_of(args, kwargs).item(), rel=1e-5)
    args, kwargs = cast(torch.bfloat16, args, kwargs)
    assert torch.equal(loss_of(args, kwargs), loss_of(*cast(torch.float32, args, kwargs)))


def test_cardinality_error_equals_a_loop():
    logits, counts = torch.randn(2, 3, 10, 4, generator=torch.Generator().manual_seed(0)), [0, 3, 7]
    for activation in ("sigmoid", "softmax"):
        found = _cardinality_error(logits, torch.tensor(counts).float(), activation)
        for layer, error in zip(logits, found.tolist(), strict=True):
            objects = [
                sum(max(query) > 0 if activation == "sigmoid" else query.index(max(query)) < 3 for query in image)
                for image in layer.tolist()
            ]
            assert error == pytest.approx(sum(abs(n - c) for n, c in zip(objects, counts, strict=True)) / 3)


STOCK = [name for name in STUDENTS if name != "adamixer"]  # whose loss is in Transformers
PAIRS = [(f, c) for f in STOCK for c in CASES if c in ALL or f in REPRESENTATIVES]


@pytest.mark.parametrize(("family", "case"), PAIRS)
def test_terms_and_gradients_equal_transformers(family, case):
    training, boxes, values = CASES[case]
    model = detector(family, **values).train(training)
    if not training and family in ("lw_detr", "rf_detr"):
        model.config.group_detr = 1  # Transformers' own matches all groups in eval mode too, which are not there
    stock, args, kwargs = called_with(model, tiny.batch(4, sizes=((96, 96),), boxes=boxes))
    use_fast_criterion(model)
    theirs = judged(stock, args, kwargs)
    ours = judged(model.loss_function, args, kwargs)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    assert ours[1].keys() == theirs[1].keys()
    for name, value in theirs[1].items():
        torch.testing.assert_close(ours[1][name], value, rtol=1e-5, atol=1e-6, msg=name)
    for name, gradient in theirs[2].items():
        tolerance = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(ours[2][name], gradient, rtol=1e-5, atol=tolerance, msg=str(name))
    assert (ours[3] is None) == (theirs[3] is None)
    for mine, reference in zip(ours[3] or (), theirs[3] or (), strict=True):
        assert all(torch.equal(mine[key], reference[key]) for key in ("logits", "pred_boxes"))


@pytest.mark.parametrize("family", STOCK)
def test_a_plain_model_trains_as_before(family):
    """Loss and gradients of all parameters, of the model as Transformers calls it."""
    results = []
    for fast in (False, True):
        model = detector(family).train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # on maps so small it magnifies the last digits
                module.eval()
        if fast:
            assert asd_hf.use_fast_criterion(model) is model
            model = copy.deepcopy(model)  # as a moving average does
        batch = tiny.batch(4, sizes=((96, 96),))
        torch.manual_seed(0)
        output = model(pixel_values=batch["pixel_values"].float() / 255, labels=batch["labels"])
        output.loss.backward()
        results.append((output, {name: p.grad for name, p in model.named_parameters()}))
    (theirs, expected), (ours, gradients) = results
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
    assert ours.loss_dict.keys() == theirs.loss_dict.keys()
    largest = max(gradient.abs().max() for gradient in expected.values() if gradient is not None)
    for name, reference in expected.items():
        assert (gradients[name] is None) == (reference is None), name
        if reference is not None:
            torch.testing.assert_close(gradients[name], reference, rtol=1e-3, atol=1e-4 * largest, msg=name)


@pytest.mark.parametrize("family", ["conditional_detr", "rt_detr"])
def test_transformers_trainer_takes_it(family, tmp_path):
    batch = tiny.batch(4, sizes=((96, 96),))
    rows = [
        {"pixel_values": image.float() / 255, "labels": {key: label[key] for key in ("class_labels", "boxes")}}
        for image, label in zip(batch["pixel_values"], batch["labels"], strict=True)
    ]

    def collate(rows):
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": [row["labels"] for row in rows],
        }

    losses = []
    for fast in (False, True):
        model = detector(family)
        args = TrainingArguments(
            str(tmp_path), use_cpu=True, max_steps=3, logging_steps=1, report_to=[], save_strategy="no", seed=0
        )
        trainer = Trainer(use_fast_criterion(model) if fast else model, args, collate, rows)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        trainer.save_model(str(tmp_path / "saved"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and len(losses[0]) == 3
    assert "asd_hf" not in (tmp_path / "saved" / "config.json").read_text()
    saved = type(model).from_pretrained(tmp_path / "saved")
    assert saved.loss_function is original(family).loss_function is not model.loss_function


def test_adamixer_stays_as_it_is():
    model = detector("adamixer")
    before = model.loss_function
    assert use_fast_criterion(model).loss_function is before


def test_what_is_no_detector_is_refused():
    grounding, _ = FAMILIES["grounding_dino"]()
    detr = original("detr")
    masks = copy.deepcopy(detr.config)
    masks.update({"decoder_attention_heads": 8, "encoder_attention_heads": 8})
    masks.backbone_config.out_features = ["stage1", "stage2", "stage3", "stage4"]
    for model, message in (
        (nn.Linear(2, 2), "takes a Transformers detector itself, not a Linear"),
        (nn.DataParallel(detr), "takes a Transformers detector itself, not a DataParallel"),
        (detr.model, "DetrModel is not the family's ...ForObjectDetection"),
        (DetrForSegmentation(masks), "DetrForSegmentation is not the family's ...ForObjectDetection"),
        (grounding, "no loss for 'grounding-dino': choose one of conditional_detr, d_fine,"),
    ):
        with pytest.raises(UserError, match="use_fast_criterion") as error:
            use_fast_criterion(model)
        assert message in str(error.value)


@pytest.mark.parametrize("family", ["conditional_detr", "detr", "yolos", "rt_detr", "deimv2", "rf_detr"])
def test_the_trainer_takes_either_loss(family, tmp_path):
    """With an image that takes no part, and one without objects."""
    batch, results = tiny.batch(4, sizes=((96, 96),), boxes=(3, 0, 5, 0)), []
    for label, flag in zip(batch["labels"], (True, False, True, True), strict=True):
        label["labelled"] = flag
    for fast in (False, True):
        student = get_adapter(detector(family), FAMILIES[family]()[1])
        args = TrainingConfig(str(tmp_path), use_cpu=True, fast_criterion=fast, report_to=[])
        criterion = make_criterion(student, args)
        assert isinstance(criterion, TransformersCriterion) == (not fast and not student.own_loss)
        torch.manual_seed(0)
        output = Distiller(student, criterion).eval()(**batch)
        output.loss.backward()
        results.append((output.losses, {name: p.grad for name, p in student.model.named_parameters()}))
    (theirs, expected), (ours, gradients) = results
    assert list(ours) == list(theirs)  # ranks average them by their order
    for name, loss in theirs.items():
        torch.testing.assert_close(ours[name], loss, rtol=1e-5, atol=1e-6, msg=name)
    assert any(gradient is not None for gradient in expected.values())
    largest = max(gradient.abs().max() for gradient in expected.values() if gradient is not None)
    for name, reference in expected.items():
        gradient = torch.zeros(()) if gradients[name] is None else gradients[name]
        reference = torch.zeros_like(gradient) if reference is None else reference
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-4 * largest, msg=name)


def test_a_family_of_our_own_has_no_other_loss(tmp_path):
    student = get_adapter(detector("adamixer"), FAMILIES["adamixer"]()[1])
    args = TrainingConfig(str(tmp_path), use_cpu=True, fast_criterion=False, report_to=[])
    with pytest.raises(UserError, match="Transformers has no loss for adamixer"):
        make_criterion(student, args)


def test_without_labelled_images_transformers_loss_is_zero():
    student = get_adapter(detector("detr"), FAMILIES["detr"]()[1])
    batch = tiny.batch(2, boxes=(0,))
    output = student(batch["pixel_values"], batch["pixel_mask"])
    labels = [label | {"labelled": False} for label in batch["labels"]]
    losses = TransformersCriterion(student.model)(output, labels)
    assert set(losses) == {"loss_ce", "loss_bbox", "loss_giou"} and not any(losses.values())


def test_transformers_loss_of_bf16_predictions_is_computed_in_fp32():
    student = get_adapter(detector("detr"), FAMILIES["detr"]()[1])
    batch = tiny.batch(2)
    output = student(batch["pixel_values"], batch["pixel_mask"])
    halves = replace(output, logits=output.logits.bfloat16(), boxes=output.boxes.bfloat16())
    exact = replace(output, logits=halves.logits.float(), boxes=halves.boxes.float())
    losses, expected = (TransformersCriterion(student.model)(x, batch["labels"]) for x in (halves, exact))
    assert all(torch.equal(losses[name], value) for name, value in expected.items())


def work(rank, world, path):
    """Each rank's terms of models in training mode, of images of which the first rank's have no objects."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=world)
    terms = {}
    for family in ("detr", "deformable_detr", "rt_detr", "deimv2", "lw_detr"):
        model = use_fast_criterion(detector(family, use_dense_one_to_one=False).train())
        batch = tiny.batch(2, sizes=((96, 96),), boxes=((0,), (3, 1))[rank])
        torch.manual_seed(0)
        output = model(pixel_values=batch["pixel_values"].float() / 255, labels=batch["labels"])
        terms[family] = {name: value.detach() for name, value in output.loss_dict.items()}
    torch.save(terms, f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over a file store")
def test_the_number_of_boxes_is_the_mean_of_all_ranks(tmp_path):
    """The 4 boxes of one rank are 2 a rank: its terms are twice those of one process, and nobody waits for ever."""
    torch.multiprocessing.start_processes(work, (2, str(tmp_path)), nprocs=2, start_method="fork")
    empty, full = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for family, terms in full.items():
        model = detector(family, use_dense_one_to_one=False).train()
        batch = tiny.batch(2, sizes=((96, 96),), boxes=(3, 1))
        torch.manual_seed(0)
        output = model(pixel_values=batch["pixel_values"].float() / 255, labels=batch["labels"])
        assert terms.keys() == output.loss_dict.keys()
        for name, value in output.loss_dict.items():
            if name.startswith(("loss_bbox", "loss_giou", "loss_vfl", "loss_mal", "loss_fgl")):
                torch.testing.assert_close(terms[name], 2 * value, rtol=1e-4, atol=1e-6, msg=f"{family} {name}")
        assert all(value.isfinite() for value in empty[family].values())
        assert all(value == 0 for name, value in empty[family].items() if name.startswith("loss_bbox"))
