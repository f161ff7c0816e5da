"""Transformers' detectors under asd_hf's loss against the same under their own."""


import pytest
import torch

from asd_hf.fast_criterion import use_fast_criterion
from tests import tiny
from tests.families import FAMILIES, STUDENTS

CASES = {  # mode, boxes of the images, configuration
    "train": (True, (3, 0, 5, 1), {}),
    "eval": (False, (3, 0, 5, 1), {}),
    "no boxes": (True, (0,), {}),
    "many boxes": (True, (14, 2, 0, 1), {}),  # more than queries
    "last layer alone": (False, (3, 0, 5, 1), {"auxiliary_loss": False}),
    "other weights": (True, (3, 0, 5, 1), {}),
}
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


def called_with(model, batch):
    """What the model calls its loss function with; the stock one is left in place."""
    calls, stock = [], model.loss_function
    model.loss_function = lambda *args, **kwargs: calls.append((args, kwargs)) or stock(*args, **kwargs)
    torch.manual_seed(0)
    model(pixel_values=batch["pixel_values"].float() / 255, labels=batch["labels"])
    del model._loss_function
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
        args[0], args[3] = layers[0][last], layers[1][last]
        del leaves[0], leaves[3]
    loss, terms, earlier = loss_function(*args, **kwargs)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return loss, terms, dict(zip(leaves, gradients, strict=True)), earlier


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", STUDENTS)
def test_terms_and_gradients_equal_transformers(family, case):
    training, boxes, values = CASES[case]
    model, _ = FAMILIES[family]()
    if case == "other weights":
        values = {name: value for name, value in WEIGHTS.items() if hasattr(model.config, name)}
    model.config.update(values if family != "yolos" else values | {"auxiliary_loss": False})
    model.requires_grad_(True).train(training)
    if not training and "group_detr" in model.config.to_dict():
        model.config.group_detr = 1  # Transformers' own matches all groups in eval mode too, which are not there
    stock, args, kwargs = called_with(model, tiny.batch(4, sizes=((96, 96),), boxes=boxes))
    assert use_fast_criterion(model) is model
    theirs = judged(stock, args, kwargs)
    ours = judged(model.loss_function, args, kwargs)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    assert ours[1].keys() == theirs[1].keys()
    for name, value in theirs[1].items():
        torch.testing.assert_close(ours[1][name], value, rtol=1e-5, atol=1e-6, msg=name)
    largest = max(gradient.abs().max() for gradient in theirs[2].values())
    for name, gradient in theirs[2].items():
        torch.testing.assert_close(ours[2][name], gradient, rtol=1e-5, atol=1e-5 * largest, msg=str(name))
    assert (ours[3] is None) == (theirs[3] is None)
    for mine, reference in zip(ours[3] or (), theirs[3] or (), strict=True):
        assert all(torch.equal(mine[key], reference[key]) for key in ("logits", "pred_boxes"))
