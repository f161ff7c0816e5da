"""RT-DETR, RT-DETRv2, D-FINE and DEIMv2: what `test_families` cannot know of them."""

import copy
import functools
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import Deimv2Config, DFineConfig, RTDetrConfig, RTDetrImageProcessor
from transformers.loss.loss_d_fine import DFineLoss
from transformers.loss.loss_deimv2 import Deimv2Loss
from transformers.loss.loss_rt_detr import RTDetrLoss
from transformers.models.d_fine.modeling_d_fine import distance2bbox, inverse_sigmoid, weighting_function

from asd_hf.detectors import get_adapter
from asd_hf.fast_criterion import use_fast_criterion
from asd_hf.model_config import StudentConfig
from asd_hf.student import build_student
from tests import tiny
from tests.families import FAMILIES, HGNET, REAL_TIME, RT_RESNET

NAMES = ("rt_detr", "rt_detr_v2", "d_fine", "deimv2")
FULL = ((96, 96),)
LOSSES = {"rt_detr": RTDetrLoss, "rt_detr_v2": RTDetrLoss, "d_fine": DFineLoss, "deimv2": Deimv2Loss}
DINOV3 = {
    "model_type": "dinov3_vit",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 16,
    "out_indices": [1, 2, 3],
    "reshape_hidden_states": True,
    "apply_layernorm": True,
}


@functools.cache
def original(name):
    return FAMILIES[name]()


@pytest.fixture(params=NAMES)
def adapter(request):
    model, processor = original(request.param)
    return get_adapter(copy.deepcopy(model), processor)


def ask(adapter, batch, labels=False):
    return adapter(batch["pixel_values"], batch["pixel_mask"], batch["labels"] if labels else None)


def train(adapter):
    """Training mode; batch norm as in evaluation, so that images do not see each other."""
    for module in adapter.model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return adapter


def without_noise(adapter):
    """Denoising becomes deterministic; its queries are the objects themselves."""
    adapter.model.config.label_noise_ratio = adapter.model.config.box_noise_scale = 0.0
    return adapter


# -- frame ------------------------------------------------------------------------------------------------------------


def test_boxes_of_idle_heads_are_the_cells_of_the_feature_maps(adapter):
    """Where heads move no box, the boxes of every layer are anchors: cells of the padded canvas, 5 % of it wide."""
    with torch.no_grad():
        for head in adapter.box_heads:
            head.layers[-1].weight.zero_()
            head.layers[-1].bias.zero_()
    batch = tiny.batch(4)  # canvas of 96 x 96
    output = ask(adapter, batch)
    for image, (height, width) in enumerate(tiny.SIZES):
        boxes = output.boxes[:, image].double() * torch.tensor([width, height] * 2)  # pixels
        level = (boxes[..., 2] / (0.05 * 96)).log2().round()
        stride = 8 * 2**level
        cells = boxes[..., :2] / stride[..., None] - 0.5
        torch.testing.assert_close(cells, cells.round(), rtol=0, atol=1e-3)
        torch.testing.assert_close(
            boxes[..., 2:], (0.05 * 96 * 2**level)[..., None].expand(-1, -1, 2), rtol=1e-4, atol=0
        )
        torch.testing.assert_close(
            output.decode.own[2][image].double() * torch.tensor([width, height] * 2), boxes[0], rtol=1e-4, atol=1e-3
        )


def test_what_a_decoded_question_asks_is_a_box_of_the_valid_image(adapter):
    """A query about a box of an image answers the same in a batch that pads the image at the bottom and the right."""
    with torch.no_grad():
        for head in adapter.box_heads:
            head.layers[-1].weight.zero_()
            head.layers[-1].bias.zero_()
    output = ask(adapter, tiny.batch(4))
    references = torch.rand(4, 7, 4, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.05
    answer = output.decode(output.decode.own[0][:, :7], None, references)
    torch.testing.assert_close(answer.boxes, references.expand(3, -1, -1, -1), rtol=1e-4, atol=1e-5)


def test_decode_in_training_mode_knows_nothing_of_denoising(adapter):
    output = ask(without_noise(train(adapter)), tiny.batch(4), labels=True)
    assert output.losses["loss_bbox_dn"] > 0
    again = output.decode(*output.decode.own)
    for key in ("logits", "boxes", "queries"):
        torch.testing.assert_close(getattr(again, key), getattr(output, key), rtol=1e-4, atol=1e-4)


def test_the_model_is_left_as_it_was(adapter):
    core = adapter.model.model

    def state():
        return [m.training for m in adapter.model.modules()], [sorted(vars(m)) for m in (core, core.decoder)]

    before = state()
    output = ask(adapter, tiny.batch(1))
    assert state() == before
    output.decode(*output.decode.own)
    assert state() == before
    with pytest.raises(RuntimeError):
        output.decode(*(None if t is None else t[..., :3] for t in output.decode.own))
    assert state() == before


def test_images_are_padded_to_the_coarsest_map(adapter):
    assert adapter.size_divisor == 32
    small = ask(adapter, tiny.batch(1, sizes=((72, 80),)))
    batch = tiny.batch(2, sizes=((72, 80), (96, 96)))
    large = ask(adapter, batch)
    torch.testing.assert_close(small.boxes[:, 0], large.boxes[:, 0], rtol=1e-4, atol=1e-4)


# -- losses -----------------------------------------------------------------------------------------------------------


def test_losses_are_grouped_by_layer_proposal_and_denoising(adapter):
    batch = tiny.batch(2, sizes=FULL)
    torch.manual_seed(0)
    losses = ask(train(adapter), batch, labels=True).losses
    torch.manual_seed(0)
    pixels, _ = adapter.prepare(batch["pixel_values"], batch["pixel_mask"])
    out = adapter.model(pixel_values=pixels, labels=batch["labels"])
    criterion = LOSSES[adapter.spec.family](adapter.model.config)
    if adapter.spec.family == "deimv2":
        criterion.use_dense_one_to_one = False  # it matches boxes by the union over layers
    proposals = criterion(
        {"logits": out.enc_topk_logits, "pred_boxes": out.enc_topk_bboxes.clamp(0, 1)}, batch["labels"]
    )
    for name in adapter.loss_names:
        parts = {part: loss for part, loss in out.loss_dict.items() if part.startswith(name)}
        denoising = [loss for part, loss in parts.items() if "_dn" in part]
        torch.testing.assert_close(losses[f"{name}_dn"], sum(denoising), msg=name)
        if name in adapter.decoder_loss_names:
            assert f"{name}_enc" not in losses
        elif adapter.spec.family != "deimv2" or name == "loss_mal":
            torch.testing.assert_close(losses[f"{name}_enc"], proposals[name], msg=name)
        everything = sum(loss for key, loss in losses.items() if key.startswith(name))
        torch.testing.assert_close(everything, sum(parts.values()), msg=name)
    assert all(loss > 0 for loss in losses.values())


def test_losses_have_the_weights_of_the_configuration(adapter):
    batch = tiny.batch(2, sizes=FULL)
    without_noise(train(adapter))
    one = ask(adapter, batch, labels=True).losses
    for name in adapter.loss_names:
        weight = f"weight_{name}"
        setattr(adapter.model.config, weight, 3.0 * getattr(adapter.model.config, weight))
    three = ask(adapter, batch, labels=True).losses
    for name, loss in one.items():
        torch.testing.assert_close(three[name], 3 * loss, msg=name)


def test_unlabelled_images_are_cut_out_of_all_that_the_loss_sees(adapter):
    without_noise(train(adapter))
    batch = tiny.batch(3, sizes=FULL, boxes=(2, 0, 4))
    for label, flag in zip(batch["labels"], (True, False, True), strict=True):
        label["labelled"] = flag
    mixed = ask(adapter, batch, labels=True)
    kept = {"labels": [batch["labels"][0], batch["labels"][2]]}
    kept |= {key: batch[key][[0, 2]] for key in ("pixel_values", "pixel_mask")}
    expected = ask(adapter, kept, labels=True)
    assert mixed.logits.shape[1] == 3
    for name, loss in expected.losses.items():
        torch.testing.assert_close(mixed.losses[name], loss, rtol=1e-4, atol=1e-5, msg=name)


def test_every_parameter_takes_part_in_every_step(adapter):
    """DistributedDataParallel waits for parameters without gradient. Ranks average losses by their order."""
    names = set()
    for boxes, flags in (((3, 1), (1, 1)), ((0, 0), (1, 1)), ((0, 0), (0, 0)), ((0, 2), (0, 1))):
        batch = tiny.batch(2, sizes=((64, 64),), boxes=boxes)
        for label, flag in zip(batch["labels"], flags, strict=True):
            label["labelled"] = bool(flag)
        adapter.model.zero_grad()
        losses = ask(train(adapter), batch, labels=True).losses
        sum(losses.values()).backward()
        names.add(tuple(losses))
        trained = {name: p for name, p in adapter.model.named_parameters() if p.requires_grad}
        assert len(trained) > 100 and not [name for name, p in trained.items() if p.grad is None]
    assert len(names) == 1


def test_a_student_without_denoising(adapter):
    config = type(adapter.model.config)(**(adapter.model.config.to_dict() | {"num_denoising": 0}))
    adapter = train(get_adapter(type(adapter.model)(config), adapter.processor))
    batch = tiny.batch(2, sizes=FULL)
    output = ask(adapter, batch, labels=True)
    pixels, _ = adapter.prepare(batch["pixel_values"], batch["pixel_mask"])
    torch.testing.assert_close(
        sum(output.losses.values()), adapter.model(pixel_values=pixels, labels=batch["labels"]).loss
    )
    assert all(loss == 0 for name, loss in output.losses.items() if name.endswith("_dn"))
    adapter.replace_classes(("a", "b"), [None, None])
    assert ask(adapter, tiny.batch(2, num_classes=2), labels=True).logits.shape[-1] == 2


def work(rank, world, path, boxes, fast):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/{world}", rank=rank, world_size=world)
    adapter = get_adapter(*FAMILIES["rt_detr"]())  # eval mode: without denoising, whose noise is random
    adapter.model.double()
    adapter.fast_loss = fast
    if fast:
        use_fast_criterion(adapter.model)
    batch = tiny.batch(4, sizes=((64, 64),), boxes=boxes)
    for label in batch["labels"]:
        label["boxes"] = label["boxes"].double()
    # Two images a rank: of one, PyTorch 2.14 gives wrong gradients on CPU (batch norm, gradients in odd strides).
    parts = slice(rank * 4 // world, (rank + 1) * 4 // world)
    losses = ask(adapter, {key: value[parts] for key, value in batch.items()}, labels=True).losses
    total = sum(losses.values())
    total.backward()
    gradients = [p.grad for p in adapter.model.parameters() if p.grad is not None]
    for value in (total.detach(), *gradients):
        dist.all_reduce(value)
        value /= world
    if rank == 0:
        torch.save([total.detach(), *gradients], f"{path}/{world}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over a file store")
@pytest.mark.parametrize("boxes", [(0, 0, 3, 1), (0, 0, 1, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("fast", [False, True])
def test_two_ranks_equal_one_with_the_doubled_batch(tmp_path, boxes, fast):
    for world in (1, 2):
        arguments = world, str(tmp_path), boxes, fast
        torch.multiprocessing.start_processes(work, arguments, nprocs=world, start_method="fork")
    one, two = (torch.load(tmp_path / f"{world}.pt", weights_only=True) for world in (1, 2))
    assert len(one) == len(two) > 50
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-12 + 1e-6 * a.abs().max().item())


# -- precision --------------------------------------------------------------------------------------------------------


def test_anchors_and_heads_are_exact_under_autocast(adapter):
    """In bf16 boxes would be off by up to a pixel; here they are those of the hidden states, computed in fp32."""
    core = adapter.model.model
    with torch.autocast("cpu", torch.bfloat16):
        output = ask(adapter, tiny.batch(2, sizes=FULL))
        with adapter.tap({"classes": core.enc_score_head, "boxes": core.enc_bbox_head}) as seen:
            ask(adapter, tiny.batch(2, sizes=FULL))
    assert all(proposals.dtype == torch.float32 for _, _, proposals in seen.values())
    decoder, reference = core.decoder, output.decode.own[2]
    corners = previous = 0
    for layer, state in enumerate(output.queries):
        logits = decoder.class_embed[layer](state)
        if adapter.spec.family in ("rt_detr", "rt_detr_v2"):
            boxes = (decoder.bbox_embed[layer](state) + inverse_sigmoid(reference)).sigmoid()
            reference = boxes
        else:
            if layer == 0:
                reference = (decoder.pre_bbox_head(state) + inverse_sigmoid(reference)).sigmoid()
            corners = decoder.bbox_embed[layer](state + previous) + corners
            project = weighting_function(decoder.max_num_bins, decoder.up, decoder.reg_scale)
            boxes = distance2bbox(reference, decoder.integral(corners, project), decoder.reg_scale)
            logits, previous = decoder.lqe_layers[layer](logits, corners), state
        torch.testing.assert_close(output.boxes[layer], boxes, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.logits[layer], logits, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        core.enc_bbox_head.layers[-1].weight.zero_()
        core.enc_bbox_head.layers[-1].bias.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        anchors = ask(adapter, tiny.batch(2, sizes=FULL)).decode.own[2]
    cells = anchors[..., :2] * 96 / (8 * 2 ** (anchors[..., 2:3] / 0.05).log2().round()) - 0.5
    torch.testing.assert_close(cells, cells.round(), rtol=0, atol=1e-4)


def test_losses_are_those_of_fp32_predictions(adapter):
    without_noise(train(adapter))
    with torch.autocast("cpu", torch.bfloat16):
        output = ask(adapter, tiny.batch(2, sizes=FULL), labels=True)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in output.losses.values())


# -- variants ---------------------------------------------------------------------------------------------------------


def build(name, **values):
    """A tiny random model of other shape."""
    config_class = {"rt_detr": RTDetrConfig, "d_fine": DFineConfig, "deimv2": Deimv2Config}[name]
    backbone = RT_RESNET if name == "rt_detr" else HGNET
    more = {} if name == "rt_detr" else {"encoder_in_channels": [32, 32, 32], "depth_mult": 0.34}
    values = REAL_TIME | {"backbone_config": dict(backbone), "num_queries": 12, "num_labels": 5} | more | values
    model_class = type(FAMILIES[name]()[0])
    torch.manual_seed(0)
    model = model_class(config_class(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return get_adapter(model.eval(), RTDetrImageProcessor(size={"height": 64, "width": 64}))


LITE = {
    "encoder_type": "lite",
    "backbone_config": HGNET | {"out_indices": [3]},
    "encoder_in_channels": [32],
    "decoder_in_channels": [32, 32],
    "num_feature_levels": 2,
}
VARIANTS = {
    "extra level": ("rt_detr", {"num_feature_levels": 4}, (8, 16, 32, 64)),
    "trained batch norm": ("rt_detr", {"freeze_backbone_batch_norms": False}, (8, 16, 32)),
    "projected": ("d_fine", {"encoder_hidden_dim": 64, "decoder_in_channels": [64, 64, 64]}, (8, 16, 32)),
    "lite": ("deimv2", LITE, (16, 32)),
    "shared box head": ("deimv2", {"share_bbox_head": True}, (8, 16, 32)),
    "no gateway": ("deimv2", {"use_gateway": False}, (8, 16, 32)),
    "dinov3": ("deimv2", {"backbone_config": dict(DINOV3), "freeze_backbone_batch_norms": False}, (8, 16, 32)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant):
    name, values, strides = VARIANTS[variant]
    adapter = build(name, **values)
    batch = tiny.batch(2, sizes=((64, 64),))
    output = ask(adapter, batch)
    assert adapter.spec.strides == strides == tuple(64 // f.shape[-1] for f in output.features)
    assert adapter.size_divisor == 32
    assert {f.shape[1] for f in output.features} == {adapter.spec.hidden_size}
    pixels, _ = adapter.prepare(batch["pixel_values"], batch["pixel_mask"])
    own = adapter.model(pixel_values=pixels)
    torch.testing.assert_close(output.logits[-1], own.logits, rtol=0, atol=0)
    torch.testing.assert_close(output.boxes[-1], own.pred_boxes, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert ask(adapter, tiny.batch(2)).boxes.dtype == torch.float32
    train(adapter)
    torch.manual_seed(0)
    losses = ask(adapter, batch, labels=True).losses
    torch.manual_seed(0)
    torch.testing.assert_close(
        sum(losses.values()), adapter.model(pixel_values=pixels, labels=batch["labels"]).loss, rtol=1e-5, atol=1e-5
    )
    assert adapter.backbone is not adapter.model and len(list(adapter.backbone.parameters())) > 10
    adapter.reset_transformer()
    adapter.reset_heads()
    assert ask(adapter, batch).logits.isfinite().all()


# -- student ----------------------------------------------------------------------------------------------------------

SMALL = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "hidden_expansion": 0.5, "num_denoising": 10}


@functools.cache
def fresh_student(name):
    torch.manual_seed(0)
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "num_queries": 20, "d_model": 32}
    config = StudentConfig(base=name, backbone="resnet18", **sizes, config=SMALL)
    return build_student(config, None, ("a", "b"), {"height": 64, "width": 64})


def student(name):
    adapter = fresh_student(name)
    return get_adapter(copy.deepcopy(adapter.model), adapter.processor)


@pytest.mark.parametrize("name", NAMES)
def test_student_is_built_runs_and_is_saved(name, tmp_path):
    adapter = student(name)
    spec, config = adapter.spec, adapter.model.config
    assert (spec.num_layers, spec.num_queries, spec.hidden_size) == (2, 20, 32)
    assert len(adapter.model.model.encoder.aifi[0].layers) == config.encoder_layers == 2
    assert config.encoder_in_channels == [128, 256, 512] and config.decoder_in_channels == [32] * 3
    assert type(adapter.backbone).__name__ == "TimmBackbone"
    batch = tiny.batch(2, num_classes=2)
    sum(ask(adapter, batch, labels=True).losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in adapter.model.parameters() if p.grad is not None)
    adapter.model.eval().save_pretrained(tmp_path)
    again = get_adapter(type(adapter.model).from_pretrained(tmp_path).eval(), adapter.processor)
    torch.testing.assert_close(ask(again, batch).boxes, ask(adapter, batch).boxes, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_fresh_student_has_the_original_initial_values(name):
    adapter = student(name)
    adapter.model.eval()
    output = ask(adapter, tiny.batch(2))
    core = adapter.model.model
    heads = [*core.decoder.class_embed, core.enc_score_head]
    assert all(torch.allclose(head.bias.sigmoid(), torch.tensor(0.01)) for head in heads)
    assert 0.003 < output.logits.sigmoid().median() < 0.03
    torch.testing.assert_close(output.boxes[-1], output.decode.own[2], rtol=1e-4, atol=1e-4)  # boxes at the anchors
    norms = [m for n, m in core.named_modules() if isinstance(m, nn.BatchNorm2d) and not n.startswith("backbone")]
    assert len(norms) > 20 and all((norm.weight == 1).all() for norm in norms)
    attention = core.decoder.layers[0].encoder_attn
    assert not attention.sampling_offsets.weight.any() and attention.sampling_offsets.bias.any()
    adapter.model.train()
    assert all(feature.std() > 0.3 for feature in ask(adapter, tiny.batch(2)).features)
    embedding = core.denoising_class_embed
    assert embedding.weight[:-1].std() > 0.7 and not embedding.weight[-1].any()


@pytest.mark.parametrize("name", NAMES)
def test_student_with_fewer_layers_takes_weights_of_its_teacher(name):
    teacher = get_adapter(*FAMILIES[name]())
    torch.manual_seed(1)
    own = build_student(
        StudentConfig(base="teacher", decoder_layers=2, copy_weights=True),
        teacher,
        tiny.CLASSES,
        {"height": 64, "width": 64},
    )
    mine, theirs = own.model.model.decoder, teacher.model.model.decoder
    for number, other in enumerate((0, 2)):
        for ours, its in ((mine.layers, theirs.layers), (mine.class_embed, theirs.class_embed)):
            for a, b in zip(ours[number].parameters(), its[other].parameters(), strict=True):
                assert torch.equal(a, b)
    assert ask(own, tiny.batch(2)).logits.shape[0] == 2
