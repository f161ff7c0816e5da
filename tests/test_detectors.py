import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from asd_hf.detectors import ADAPTERS, get_adapter
from asd_hf.errors import UserError
from asd_hf.ops import cxcywh_to_xyxy, generalized_iou
from tests import tiny

VARIANTS = {"plain": {}, "refine": {"with_box_refine": True}, "two_stage": {"two_stage": True}}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def adapter(request):
    return get_adapter(tiny.deformable_detr(decoder_layers=3, **request.param), tiny.processor())


def run(adapter):
    batch = tiny.batch(3)
    return adapter(batch["pixel_values"], batch["pixel_mask"]), batch


def run_transformers(adapter, batch):
    """The model itself, given each layer's predictions through its own auxiliary outputs."""
    pixels = adapter.normalize(batch["pixel_values"], batch["pixel_mask"])
    return adapter.model(pixel_values=pixels, pixel_mask=batch["pixel_mask"], labels=batch["labels"])


def random_boxes(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(*shape, 2, generator=generator, dtype=torch.float64)
    return torch.cat([torch.rand(*shape, 2, generator=generator, dtype=torch.float64), size], -1)


def test_generalized_iou_equals_torchvision():
    a, b = cxcywh_to_xyxy(random_boxes(7)), cxcywh_to_xyxy(random_boxes(9, seed=1))
    torch.testing.assert_close(
        cxcywh_to_xyxy(random_boxes(7)), torchvision.ops.box_convert(random_boxes(7), "cxcywh", "xyxy")
    )
    torch.testing.assert_close(generalized_iou(a[:, None], b), torchvision.ops.generalized_box_iou(a, b))


def test_generalized_iou_of_degenerate_boxes_is_finite():
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.2, 0.6], [0.1, 0.1, 0.3, 0.4], [1, 1, 0, 0]])
    boxes.requires_grad_()
    value = generalized_iou(boxes[:, None], boxes)
    value.sum().backward()
    assert value.isfinite().all() and boxes.grad.isfinite().all()
    assert value[2, 2] == 1 and value[0, 0] == -1


def test_every_layer_equals_transformers_without_labels(adapter):
    output, batch = run(adapter)
    own = run_transformers(adapter, batch)
    logits = torch.stack([*(a["logits"] for a in own.auxiliary_outputs), own.logits])
    boxes = torch.stack([*(a["pred_boxes"] for a in own.auxiliary_outputs), own.pred_boxes])
    assert output.logits.shape == (3, 3, 12, 5) and output.queries.shape == (3, 3, 12, 32)
    torch.testing.assert_close(output.logits, logits, rtol=0, atol=0)
    torch.testing.assert_close(output.boxes, boxes, rtol=0, atol=0)
    if adapter.model.config.two_stage:
        torch.testing.assert_close(output.proposals[0], own.enc_outputs_class)
        torch.testing.assert_close(output.proposals[1], own.enc_outputs_coord_logits.sigmoid())
    else:
        assert output.proposals is None


def test_features_are_the_normalised_neck_maps(adapter):
    output, batch = run(adapter)
    assert [f.shape[-1] for f in output.features] == [12, 6, 3, 2]  # of 96 pixels
    assert adapter.spec.strides == (8, 16, 32, 64)
    for features in output.features:  # group norm, at d_model 32 one channel a group, starts without scale and shift
        torch.testing.assert_close(features.mean((-1, -2)), torch.zeros(features.shape[:2]), atol=1e-4, rtol=0)


def test_strides_follow_the_backbone():
    dilated = tiny.TIMM_RESNET | {"output_stride": 16}
    adapter = get_adapter(tiny.deformable_detr(backbone_config=dilated), tiny.processor())
    output, _ = run(adapter)
    assert adapter.spec.strides == (8, 16, 16, 32)
    assert [96 // f.shape[-1] for f in output.features] == [8, 16, 16, 32]


def test_decode_repeats_the_models_own_answer(adapter):
    output, _ = run(adapter)
    again = output.decode(*output.decode.own)
    torch.testing.assert_close(again.logits, output.logits, rtol=0, atol=0)
    torch.testing.assert_close(again.boxes, output.boxes, rtol=0, atol=0)
    torch.testing.assert_close(again.queries, output.queries, rtol=0, atol=0)


def test_decode_answers_other_questions_and_carries_gradient(adapter):
    output, _ = run(adapter)
    queries, positions, references = (t[:, :4].detach().clone().requires_grad_() for t in output.decode.own)
    adapter.model.zero_grad()
    answer = output.decode(queries, positions, references)
    assert answer.logits.shape == (3, 3, 4, 5) and answer.boxes.shape == (3, 3, 4, 4)
    (answer.logits.sum() + answer.boxes.sum()).backward()
    assert all(t.grad.abs().sum() > 0 for t in (queries, positions, references))
    for module in (adapter.model.model.decoder.layers, adapter.model.model.encoder, adapter.model.model.input_proj):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_nothing_stays_on_the_model(adapter):
    modules = list(adapter.model.modules())
    before = [sorted(vars(m)) for m in modules]
    output, _ = run(adapter)
    output.decode(*output.decode.own)
    assert [sorted(vars(m)) for m in modules] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    with pytest.raises(Exception, match="."):  # neither after a failure
        adapter(torch.zeros(1, 1, 64, 64, dtype=torch.uint8), torch.ones(1, 64, 64, dtype=torch.bool))
    assert [sorted(vars(m)) for m in modules] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_heads_and_references_keep_full_precision_under_autocast(adapter):
    """On the same hidden states, boxes under bf16 autocast are those of fp32, bit by bit."""
    with torch.autocast("cpu", torch.bfloat16):
        output, batch = run(adapter)
        own = run_transformers(adapter, batch)
    assert own.pred_boxes.dtype == torch.bfloat16
    assert output.logits.dtype == output.boxes.dtype == output.queries.dtype == torch.float32
    references = output.decode.own[2]
    assert references.dtype == torch.float32
    if not adapter.model.config.two_stage:
        positions = output.decode.own[1]
        expected = adapter.model.model.reference_points(positions.float()).sigmoid()
        torch.testing.assert_close(references, expected, rtol=0, atol=0)
    for layer in range(3):
        state = output.queries[layer]
        offset = adapter.model.bbox_embed[layer](state)
        refined = layer > 0 and adapter.model.config.with_box_refine
        reference = output.boxes[layer - 1] if refined else references
        origin = torch.special.logit(reference, eps=1e-5)
        expected = torch.cat([offset[..., : origin.shape[-1]] + origin, offset[..., origin.shape[-1] :]], -1).sigmoid()
        torch.testing.assert_close(output.boxes[layer], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.logits[layer], adapter.model.class_embed[layer](state), rtol=0, atol=0)


def test_pixels_are_normalised_as_the_processor_does():
    image = torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8)
    for options in ({}, {"do_normalize": False}, {"rescale_factor": 1 / 127.5}, {"do_rescale": False}):
        processor = tiny.processor(do_resize=False, do_pad=False, **options)
        adapter = get_adapter(tiny.deformable_detr(), processor)
        ours = adapter.normalize(image[None], torch.ones(1, 64, 80, dtype=torch.bool))
        theirs = processor(Image.fromarray(image.permute(1, 2, 0).numpy()), return_tensors="pt")["pixel_values"]
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_spec_describes_the_model(adapter):
    spec, config = adapter.spec, adapter.model.config
    assert spec.class_names == tiny.CLASSES and spec.family == "deformable_detr" and spec.activation == "sigmoid"
    assert (spec.hidden_size, spec.num_layers, spec.num_queries) == (32, 3, 12)
    assert ("proposals" in spec.capabilities) == config.two_stage and {"decode", "features"} <= spec.capabilities


def test_reset_heads_gives_the_original_initial_values(adapter):
    adapter.reset_heads(prior=0.01)
    config = adapter.model.config
    for head in adapter.model.class_embed:
        torch.testing.assert_close(head.bias.sigmoid(), torch.full((5,), 0.01))
    sides = [head.layers[-1].bias[2:].tolist() for head in adapter.model.bbox_embed]
    if config.two_stage:
        assert sides == [[0, 0]] * 4
    elif config.with_box_refine:
        assert sides == [[-2, -2], [0, 0], [0, 0]]
    else:
        assert sides == [[-2, -2]] * 3
    output, _ = run(adapter)
    references = output.decode.own[2]
    torch.testing.assert_close(output.boxes[0, ..., :2], references[..., :2])  # every box starts at its reference
    if not config.two_stage:
        torch.testing.assert_close(output.boxes[-1, ..., 2:], torch.full((3, 12, 2), -2.0).sigmoid())


def test_reset_transformer_spreads_the_reference_points():
    adapter = get_adapter(tiny.deformable_detr(num_queries=300, d_model=64), tiny.processor())
    offsets = {n: p.clone() for n, p in adapter.model.named_parameters() if "sampling_offsets" in n}
    adapter.reset_transformer()
    references = run(adapter)[0].decode.own[2]
    assert references.std((0, 1)).min() > 0.15 and references.min() < 0.1 and references.max() > 0.9
    assert all(torch.equal(p, offsets[n]) for n, p in adapter.model.named_parameters() if n in offsets)
    std = adapter.model.model.encoder.layers[0].mlp.fc1.weight.std()
    torch.testing.assert_close(std, torch.tensor((2 / 128) ** 0.5), rtol=0.1, atol=0)


def test_unknown_family_is_one_clear_line():
    model = tiny.deformable_detr()
    model.config.model_type = "deformable_detrr"
    with pytest.raises(UserError, match="detector family 'deformable_detrr': did you mean 'deformable_detr'"):
        get_adapter(model, tiny.processor())
    assert "deformable_detr" in ADAPTERS
