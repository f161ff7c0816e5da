"""What detectors tell methods beyond their predictions: the canvas, and answers to other questions."""

import pytest
import torch
from transformers.models.d_fine.modeling_d_fine import distance2bbox, weighting_function

from asd_hf.detectors import get_adapter
from tests import tiny
from tests.families import FAMILIES, OPEN_VOCABULARY

ASKED = [name for name in FAMILIES if name != "yolos"]  # it has no decoder


def adapter_of(name, training=False):
    adapter = get_adapter(*FAMILIES[name]())
    adapter.model.train(training)
    if name in OPEN_VOCABULARY:
        adapter.prompt(tiny.CLASSES)
    return adapter


def ask(adapter, batch):
    return adapter(batch["pixel_values"], batch["pixel_mask"])


def same(one, other, **tolerance):
    for key in ("logits", "boxes", "queries"):
        torch.testing.assert_close(getattr(one, key), getattr(other, key), **tolerance)


# -- the canvas -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_mask_is_the_canvas_as_the_model_saw_it(name):
    adapter, batch = adapter_of(name), tiny.batch(3, sizes=((64, 88), (90, 64), (48, 48)))
    prepared, prepare = [], adapter.prepare
    adapter.prepare = lambda *inputs: prepared.append(prepare(*inputs)) or prepared[-1]
    output = ask(adapter, batch)
    assert output.mask is prepared[0][1] and output.mask.dtype == torch.bool
    assert output.mask.shape == prepared[0][0][:, 0].shape
    height, width = output.mask.shape[1:]
    assert height >= 90 and width >= 88 and output.mask.sum() == 64 * 88 + 90 * 64 + 48 * 48
    assert output.map_logits(lambda x: x + 1).mask is output.mask
    assert output.map_boxes(torch.ones(3, 1, 4)).mask is output.mask
    for level, stride in zip(output.features, adapter.spec.strides, strict=True):
        assert level.shape[2:] == (-(-height // stride), -(-width // stride))


def test_one_view_is_one_mask():
    """Where the canvas needs no padding: so a method sees that teacher and student had the same pixels."""
    batch = tiny.batch(2, sizes=((96, 96),))
    masks = [ask(adapter_of(name), batch).mask for name in FAMILIES]
    assert all(mask is batch["pixel_mask"] for mask in masks)


# -- other questions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ASKED)
def test_spec_says_what_a_question_consists_of(name):
    adapter = adapter_of(name)
    contents, positions, references = ask(adapter, tiny.batch(2)).decode.own
    spec = adapter.spec
    assert contents.shape == (2, spec.num_queries, spec.hidden_size)
    assert spec.asks_positions == (positions is not None)
    assert positions is None or positions.shape == contents.shape
    assert spec.reference_size == (0 if references is None else references.shape[-1])


def test_yolos_is_asked_nothing():
    spec = adapter_of("yolos").spec
    assert not spec.asks_positions and not spec.reference_size


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ASKED)
def test_asked_again_and_asked_twice_it_answers_the_same(name, training):
    """Twice as many queries, each one twice, answer as each one: attention does not count copies."""
    adapter = adapter_of(name, training)
    output = ask(adapter, tiny.batch(4))
    own = output.decode.own
    same(output.decode(*own), output, rtol=1e-5, atol=1e-5)
    twice = output.decode(*(None if t is None else torch.cat([t, t], 1) for t in own))
    assert twice.logits.shape[2] == 24
    for key in ("logits", "boxes", "queries"):
        for half in getattr(twice, key).chunk(2, 2):
            torch.testing.assert_close(half, getattr(output, key), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ASKED)
def test_gradient_reaches_the_question_and_the_encoded_image(name, training):
    adapter = adapter_of(name, training)
    with torch.no_grad():
        for parameter in adapter.model.parameters():
            if not parameter.any():  # through zeros nothing passes
                parameter.normal_(0, 0.1)
    output = ask(adapter, tiny.batch(3))
    own = output.decode.own
    question = [None if t is None else t[:, :5].detach().clone().requires_grad_() for t in own]
    answer = output.decode(*question)
    assert answer.queries.shape == (adapter.spec.num_layers, 3, 5, 32) and answer.boxes.isfinite().all()
    sources = [*(t for t in question if t is not None), *output.features]
    generator = torch.Generator().manual_seed(0)
    for tensor in (answer.logits[-1], answer.boxes[-1]):
        weights = torch.randn(tensor.shape, generator=generator)
        gradients = torch.autograd.grad((tensor * weights).sum(), sources, retain_graph=True)
        assert all(g.isfinite().all() and g.any() for g in gradients)


# -- distributions over the sides of boxes ----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["d_fine", "deimv2"])
def test_boxes_follow_from_the_distributions_over_their_sides(name, training):
    adapter, batch = adapter_of(name, training), tiny.batch(4)
    decoder, count = adapter.model.model.decoder, adapter.spec.num_layers
    with adapter.tap({"decoder": decoder}) as seen:
        output = adapter(batch["pixel_values"], batch["pixel_mask"], batch["labels"] if training else None)
        # The initial boxes, without denoising queries, which stand first; of the padded canvas.
        initial = seen["decoder"][2].initial_reference_points[:, 0, -12:]
        denoised = seen["decoder"][2].initial_reference_points.shape[2] > 12
        contents, _, references = (None if t is None else t[:, :5].flip(1) for t in output.decode.own)
        answer = output.decode(contents, None, references)
        asked = seen["decoder"][2].initial_reference_points[:, 0]
    assert denoised == training
    height, width = output.mask.shape[1:]
    sizes = torch.tensor([[width / w, height / h] * 2 for h, w in tiny.SIZES])[:, None]
    project = weighting_function(decoder.max_num_bins, decoder.up, decoder.reg_scale)
    for told, boxes, queries in ((output, initial, 12), (answer, asked, 5)):
        assert told.sides.shape == (count, 4, queries, 4, adapter.spec.side_bins) == (count, 4, queries, 4, 33)
        for layer in range(count):
            distances = decoder.integral(told.sides[layer].flatten(2), project)
            torch.testing.assert_close(told.boxes[layer], distance2bbox(boxes, distances, decoder.reg_scale) * sizes)
    assert (output.sides[0] - output.sides[1]).abs().max() > 1e-2
    if not training:  # denoising is seen by no other query
        again = output.decode(*output.decode.own)
        torch.testing.assert_close(again.sides, output.sides, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(output.sides[-1].square().sum(), output.features[0])
    assert gradient.any()


@pytest.mark.parametrize("name", FAMILIES)
def test_only_those_with_distributions_show_them(name):
    adapter = adapter_of(name)
    known = name in ("d_fine", "deimv2")
    assert ("sides" in adapter.spec.capabilities) == known == bool(adapter.spec.side_bins)
    assert (ask(adapter, tiny.batch(1)).sides is not None) == known
