"""DETR, Table Transformer, Conditional DETR, DAB-DETR and YOLOS: what is theirs alone."""

import itertools

import pytest
import timm
import torch
from transformers import AutoModelForObjectDetection, DabDetrConfig, DabDetrForObjectDetection

from asd_hf.copying import state_of
from asd_hf.detectors import get_adapter
from asd_hf.errors import UserError
from asd_hf.freezing import freeze_backbone
from asd_hf.model_config import StudentConfig
from asd_hf.student import build_student
from tests import tiny
from tests.families import EDGES, FAMILIES

KIN = ("detr", "table_transformer", "conditional_detr", "dab_detr")
TYPES = {name: name.replace("_t", "-t").replace("dab_", "dab-") for name in (*KIN, "yolos")}
FULL = ((96, 96),)


def adapter_of(name, auxiliary_loss=False):
    adapter = get_adapter(*FAMILIES[name]())
    adapter.model.config.auxiliary_loss = auxiliary_loss
    return adapter


def ask(adapter, batch):
    return adapter(batch["pixel_values"], batch["pixel_mask"])


def ask_transformers(adapter, batch):
    pixels, mask = adapter.prepare(batch["pixel_values"], batch["pixel_mask"])
    return adapter.model(pixel_values=pixels, **({} if adapter.sees_padding else {"pixel_mask": mask}))


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


# -- predictions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KIN)
def test_each_layer_is_the_answer_of_the_model_that_ends_there(name):
    adapter, batch = adapter_of(name), tiny.batch(3)
    output = ask(adapter, batch)
    decoder = adapter.model.model.decoder
    layers = decoder.layers
    for count in (1, 2, 3):
        decoder.layers, decoder.num_layers = layers[:count], count
        own = ask_transformers(adapter, batch)
        assert_same(output.logits[count - 1], own.logits)
        assert_same(output.boxes[count - 1], own.pred_boxes)


@pytest.mark.parametrize("name", KIN)
def test_the_option_auxiliary_loss_may_be_another_network_and_is_left_alone(name):
    batch, outputs = tiny.batch(3), []
    for option in (False, True):
        adapter = adapter_of(name, option)
        outputs.append(ask(adapter, batch))
        own = ask_transformers(adapter, batch)
        assert_same(outputs[-1].logits[-1], own.logits)
        assert_same(outputs[-1].boxes[-1], own.pred_boxes)
        assert adapter.model.config.auxiliary_loss == option
        assert adapter.auxiliary_loss == (option or name == "dab_detr")
    difference = (outputs[0].logits[-1] - outputs[1].logits[-1]).abs().max()
    assert difference == 0 if name == "dab_detr" else difference > 0.01


@pytest.mark.parametrize("name", KIN)
def test_boxes_are_relative_to_the_valid_image_and_padding_is_not_seen(name):
    """The same features of the neck, alone or in the corner of a larger canvas with noise around."""
    adapter, outputs = adapter_of(name), []
    features = torch.randn(1, 32, 2, 3, generator=torch.Generator().manual_seed(0))
    for size, canvas in (((64, 96), (64, 96)), ((64, 96), (128, 160))):
        batch = tiny.batch(2, sizes=(size, canvas))

        def replace(_, args, neck):
            neck = torch.randn_like(neck)
            neck[:1, :, :2, :3] = features
            return neck

        handle = adapter.model.model.input_projection.register_forward_hook(replace)
        outputs.append(ask(adapter, batch))
        handle.remove()
    alone, padded = outputs
    assert alone.features[0].shape[2:] == (2, 3) and padded.features[0].shape[2:] == (4, 5)
    torch.testing.assert_close(padded.logits[:, 0], alone.logits[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded.boxes[:, 0], alone.boxes[:, 0], rtol=1e-4, atol=1e-5)
    assert alone.boxes[:, 0].std(-2).amax() > 1e-2  # queries differ


@pytest.mark.parametrize("name", ["conditional_detr", "dab_detr"])
def test_without_offsets_boxes_stand_at_their_references(name):
    adapter, batch = adapter_of(name), tiny.batch(4)
    with torch.no_grad():
        for parameter in adapter.model.bbox_predictor.layers[-1].parameters():
            parameter.zero_()
    output = ask(adapter, batch)
    _, positions, references = output.decode.own
    if name == "dab_detr":
        expected = adapter.model.model.query_refpoint_embeddings.weight.sigmoid().expand(4, -1, -1)
        torch.testing.assert_close(references, expected)
    else:
        centres = adapter.model.model.decoder.ref_point_head(positions).sigmoid()
        expected = torch.cat([centres, torch.full_like(centres, 0.5)], -1)
    torch.testing.assert_close(output.boxes, expected.expand(3, -1, -1, -1), rtol=1e-4, atol=1e-5)
    if name == "dab_detr":
        other = torch.rand(4, 5, 4).mul(0.8).add(0.1)
        boxes = output.decode(torch.zeros(4, 5, 32), None, other).boxes
        torch.testing.assert_close(boxes, other.expand(3, -1, -1, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("auxiliary_loss", [False, True])
@pytest.mark.parametrize("name", KIN)
def test_decode_answers_other_questions_and_carries_gradient(name, auxiliary_loss):
    adapter = adapter_of(name, auxiliary_loss)
    output = ask(adapter, tiny.batch(3))
    own = output.decode.own
    assert [t is None for t in own] == ([False, True, False] if name == "dab_detr" else [False, False, True])
    again = output.decode(*own)
    for key in ("logits", "boxes", "queries"):
        torch.testing.assert_close(getattr(again, key), getattr(output, key), rtol=1e-5, atol=1e-5)
    turned = output.decode(*(None if t is None else t.flip(1) for t in own))
    torch.testing.assert_close(turned.boxes.flip(2), output.boxes, rtol=1e-4, atol=1e-4)
    assert (turned.boxes - output.boxes).abs().max() > 1e-2
    question = [None if t is None else t[:, :4].detach().clone().requires_grad_() for t in own]
    answer = output.decode(*question)
    assert answer.logits.shape[:3] == (3, 3, 4) and answer.decode.own is own
    adapter.model.zero_grad()
    (answer.logits.sum() + answer.boxes.sum()).backward()
    assert all(t.grad.abs().sum() > 0 for t in question if t is not None)
    core = adapter.model.model
    for module in (core.decoder.layers, core.encoder, core.input_projection):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_every_pattern_of_dab_detr_asks_at_every_anchor(tmp_path):
    config = FAMILIES["dab_detr"]()[0].config.to_dict() | {"num_patterns": 3}
    torch.manual_seed(0)
    model = DabDetrForObjectDetection(DabDetrConfig(**config)).eval()
    adapter, batch = get_adapter(model, FAMILIES["dab_detr"]()[1]), tiny.batch(2)
    adapter.reset_transformer()
    output = ask(adapter, batch)
    assert adapter.spec.num_queries == output.logits.shape[2] == 36
    assert_same(output.logits[-1], ask_transformers(adapter, batch).logits)
    contents, _, references = output.decode.own
    assert_same(references[:, :12], references[:, 12:24])
    assert (contents[:, 0] - contents[:, 12]).abs().max() > 0.5 and model.model.patterns.weight.std() > 0.8


@pytest.mark.parametrize("name", [*KIN, "yolos"])
def test_heads_and_references_keep_full_precision_under_autocast(name):
    adapter, batch = adapter_of(name), tiny.batch(2, sizes=FULL)
    taps = {} if name == "yolos" else {"decoder": adapter.model.model.decoder}
    with torch.autocast("cpu", torch.bfloat16):
        with adapter.tap(taps) as seen:
            output = ask(adapter, batch)
        assert ask_transformers(adapter, batch).logits.dtype == torch.bfloat16
    assert output.logits.dtype == output.boxes.dtype == output.queries.dtype == torch.float32
    head = adapter.model.class_embed if name == "dab_detr" else adapter.model.class_labels_classifier
    offsets = torch.stack([adapter.model.bbox_predictor(state) for state in output.queries])
    assert_same(output.logits, torch.stack([head(state) for state in output.queries]))
    if name in ("conditional_detr", "dab_detr"):
        points = seen["decoder"][2].reference_points
        assert points.dtype == torch.float32 and (points[-1] != points[-1].bfloat16()).float().mean() > 0.9
        points = points if name == "dab_detr" else points.transpose(0, 1).expand(3, -1, -1, -1)
        offsets[..., : points.shape[-1]] += torch.special.logit(points, eps=1e-5)
    torch.testing.assert_close(output.boxes, offsets.sigmoid(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["detr", "conditional_detr", "yolos"])  # Transformers has it for no others
def test_checkpointing_of_activations_changes_no_gradient(name):
    adapter, batch, gradients = adapter_of(name), tiny.batch(2, sizes=FULL), []
    adapter.model.train().requires_grad_(True)
    for _ in range(2):
        output = ask(adapter, batch)
        loss = (output.logits**2).sum() + (output.boxes**2).sum() + sum((f**2).sum() for f in output.features)
        gradients.append(torch.autograd.grad(loss, list(adapter.model.parameters()), allow_unused=True))
        adapter.model.activation_checkpointing_enable()
    for before, after in zip(*gradients, strict=True):
        assert before is None if after is None else torch.allclose(before, after, rtol=1e-4, atol=1e-4)


# -- YOLOS ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [tiny.SIZES, ((50, 90), (70, 41))])  # the latter's canvas is padded to patches
def test_yolos_sees_the_canvas(sizes):
    adapter, batch = adapter_of("yolos"), tiny.batch(2, sizes=sizes)
    own, output = ask_transformers(adapter, batch), ask(adapter, batch)
    height, width = adapter.prepare(batch["pixel_values"], batch["pixel_mask"])[1].shape[1:]
    assert height % 16 == width % 16 == 0
    assert_same(output.logits[-1], own.logits)
    for image, (h, w) in enumerate(sizes[:2]):
        pixels = output.boxes[-1, image] * torch.tensor([w, h, w, h])
        torch.testing.assert_close(pixels, own.pred_boxes[image] * torch.tensor([width, height, width, height]))


def test_features_of_yolos_are_what_the_last_layer_reads():
    adapter, batch = adapter_of("yolos"), tiny.batch(2, sizes=((64, 96),))
    output, vit = ask(adapter, batch), adapter.model.vit
    assert output.logits.shape[0] == adapter.spec.num_layers == 1
    pixels, _ = adapter.prepare(batch["pixel_values"], batch["pixel_mask"])
    hidden = vit.embeddings(pixels)
    for layer, position in zip(vit.encoder.layer[:-1], vit.encoder.interpolation((64, 96)), strict=True):
        hidden = layer(hidden) + position
    tokens = vit.encoder.layer[-1].layernorm_before(hidden)
    for row, column in itertools.product(range(4), range(6)):
        assert_same(output.features[0][:, :, row, column], tokens[:, 1 + row * 6 + column])
    assert output.features[0].shape == (2, 32, 4, 6)


# -- students ---------------------------------------------------------------------------------------------------------


def new_student(name, teacher=None, **options):
    torch.manual_seed(1)
    if teacher is None:
        sizes = {"encoder_layers": 2, "num_queries": 7, "d_model": 64}
        if name == "yolos":
            options["config"] = {"num_attention_heads": 4, "intermediate_size": 32, "image_size": [64, 64]}
        else:
            sizes |= {"decoder_layers": 3, "backbone": "test_resnet"}
            options["config"] = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
        options = sizes | {"base": TYPES[name]} | options
    return build_student(StudentConfig(**options), teacher, ("a", "b"), dict(EDGES))


@pytest.mark.parametrize("name", TYPES)
def test_new_student_runs_trains_and_is_saved(name, tmp_path):
    student, batch = new_student(name), tiny.batch(2)
    spec = student.spec
    layers = 1 if name == "yolos" else 3
    assert (spec.num_layers, spec.num_queries, spec.hidden_size) == (layers, 7, 64)
    assert spec.class_names == ("a", "b") and spec.strides == ((16,) if name == "yolos" else (32,))
    assert student.model.training and student.model.config.auxiliary_loss == (name == "dab_detr")
    output = ask(student, batch)
    (output.logits.sum() + output.boxes.sum()).backward()
    assert all(p.grad is not None for n, p in student.model.named_parameters() if "backbone" not in n)
    student.model.eval().save_pretrained(tmp_path)
    loaded, report = AutoModelForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_same(ask(get_adapter(loaded.eval(), student.processor), batch).logits, ask(student, batch).logits)


@pytest.mark.parametrize("name", KIN)
def test_backbone_takes_timm_weights_and_is_frozen_by_stages(name):
    student = new_student(name)
    donor = timm.create_model("test_resnet", features_only=True, out_indices=student.backbone.feature_info.out_indices)
    student.backbone.load_state_dict(state_of(donor))
    assert student.frozen_stages == 1
    frozen = freeze_backbone(student, student.frozen_stages)
    assert {n.split(".")[0] for n in frozen} == {"conv1", "layer1"}  # frozen batch norm has no parameters
    assert not any(student.backbone.get_parameter(n).requires_grad for n in frozen)
    assert all(p.requires_grad for n, p in student.model.named_parameters() if "backbone" not in n)


def test_yolos_has_no_backbone_to_exchange_or_freeze_in_part():
    with pytest.raises(UserError, match="model.student.backbone: a yolos"):
        new_student("yolos", backbone="test_resnet")
    with pytest.raises(UserError, match="decoder_layers: Yolos has no such size"):
        new_student("yolos", decoder_layers=2)
    with pytest.raises(UserError, match="cannot tell the stages"):
        new_student("yolos", frozen_stages=1)
    assert new_student("yolos").frozen_stages == -1
    assert freeze_backbone(new_student("yolos"), 0) == ["projection.weight", "projection.bias"]


@pytest.mark.parametrize("name", TYPES)
def test_a_smaller_student_copies_evenly_spaced_layers(name):
    model, processor = FAMILIES[name]()
    if name == "yolos":
        student = new_student(name, get_adapter(model, processor), encoder_layers=2, copy_weights=True)
        layers, own = model.vit.encoder.layer, student.model.vit.encoder.layer
        assert_same(student.model.vit.embeddings.detection_tokens, model.vit.embeddings.detection_tokens)
    else:
        student = new_student(name, get_adapter(model, processor), decoder_layers=2, num_queries=5, copy_weights=True)
        layers, own = model.model.decoder.layers, student.model.model.decoder.layers
        for mine, theirs in zip(student.query_embeddings, get_adapter(model, processor).query_embeddings, strict=True):
            assert_same(mine.weight, theirs.weight[:5])
        assert_same(student.backbone.state_dict(), get_adapter(model, processor).backbone.state_dict())
        assert student.model.config.auxiliary_loss  # as the teacher's, whose weights fit no other network
    assert len(own) == 2
    for mine, theirs in zip(own, (layers[0], layers[2]), strict=True):
        assert_same(mine.state_dict(), theirs.state_dict())
    assert_same(student.model.bbox_predictor.state_dict(), model.bbox_predictor.state_dict())


@pytest.mark.parametrize("name", TYPES)
def test_fresh_heads_and_queries_start_as_in_the_original(name):
    student = new_student(name, num_queries=100)
    output = ask(student, tiny.batch(1))
    if name in ("conditional_detr", "dab_detr"):
        torch.testing.assert_close(student.class_head.bias.sigmoid(), torch.full((2,), 0.01))
        assert not student.model.bbox_predictor.layers[-1].weight.any()
        assert output.logits.sigmoid().mean() < 0.05 and output.boxes[..., :2].std(2).amin() > 0.05
    heads = student.model.bbox_predictor.layers[0]
    assert heads.weight.abs().max() <= 64**-0.5 and heads.weight.std() > 0.9 * (3 * 64) ** -0.5
    if name == "yolos":
        for parameter in (student.model.vit.embeddings.detection_tokens, student.model.vit.embeddings.cls_token):
            assert 0.01 < parameter.std() < 0.03
        embeddings = (student.model.vit.embeddings, student.model.vit.encoder.interpolation)
        assert 0.01 < embeddings[0].position_embeddings.std() < 0.03
        assert 0.01 < embeddings[1].mid_position_embeddings.std() < 0.03
        return
    assert all(0.9 < e.weight.std() < 1.1 for e in student.query_embeddings)
    core = student.model.model
    ffn = [p for n, p in core.decoder.layers.named_parameters() if p.shape == (32, 64)]  # width 64, inner width 32
    assert len(ffn) == 3
    for weight in ffn:
        limit = (6 / 96) ** 0.5
        assert 0.9 * limit < weight.abs().max() <= limit
    limit = core.input_projection.in_channels**-0.5
    assert 0.9 * limit < core.input_projection.weight.abs().max() <= limit


def test_fixed_random_anchors_of_dab_detr_are_spread_over_the_image():
    config = FAMILIES["dab_detr"]()[0].config.to_dict() | {"num_queries": 400, "random_refpoints_xy": True}
    adapter = get_adapter(DabDetrForObjectDetection(DabDetrConfig(**config)), FAMILIES["dab_detr"]()[1])
    adapter.reset_transformer()
    centres = adapter.model.model.query_refpoint_embeddings.weight[:, :2].sigmoid()
    counts = torch.histc(centres, 4, 0, 1)
    assert counts.min() > 150  # of 800 coordinates, 200 in each quarter
