"""Traps of LW-DETR and RF-DETR: groups of queries, windows, the frame of the boxes, Transformers' own loss."""

import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import LwDetrConfig, LwDetrForObjectDetection
from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher, LwDetrImageLoss

from asd_hf.detectors import get_adapter
from asd_hf.fast_criterion import use_fast_criterion
from asd_hf.model_config import StudentConfig
from asd_hf.student import build_student
from tests import tiny
from tests.families import FAMILIES, GROUP, SQUARE, VIT

NAMES = ("lw_detr", "rf_detr")
SIZES = ((64, 96), (96, 64))
LW_VIT = VIT | {"model_type": "lw_detr_vit", "window_block_indices": [0, 2], "out_indices": [2, 4], "num_windows": 4}
RF_VIT = VIT | {"model_type": "rf_detr_dinov2", "out_indices": [2, 4], "num_windows": 2}


@pytest.fixture(params=NAMES)
def adapter(request):
    return get_adapter(*FAMILIES[request.param]())


def two_levels(windows=4):
    """LW-DETR with maps of strides 8 and 32, as its large models have."""
    torch.manual_seed(0)
    vit, names = LW_VIT | {"num_windows": windows}, dict(enumerate(tiny.CLASSES))
    config = LwDetrConfig(
        **GROUP, backbone_config=vit, projector_scale_factors=[2.0, 0.5], num_queries=12, id2label=names
    )
    return get_adapter(LwDetrForObjectDetection(config).eval(), tiny.processor(size=SQUARE))


def ask(adapter, batch, labels=False):
    return adapter(batch["pixel_values"], batch["pixel_mask"], batch["labels"] if labels else None)


def still(adapter):
    """Boxes stay where the cells of the feature maps put the proposals."""
    core = adapter.model.model
    with torch.no_grad():
        for head in (adapter.model.bbox_embed, *core.enc_out_bbox_embed):
            for parameter in head.layers[-1].parameters():
                parameter.zero_()
        core.reference_point_embed.weight.zero_()
    return adapter


def off_grid(adapter, boxes, sizes):
    """How many pixels of the valid image a centre is away from that of a cell; the box's side tells its level."""
    worst = 0
    for image, (height, width) in zip(boxes[-1], sizes, strict=True):
        for cx, cy, w, _ in image.double().tolist():
            for level, stride in enumerate(adapter.spec.strides):
                whole = -(-width // max(adapter.spec.strides)) * max(adapter.spec.strides)
                if abs(w * width / whole - 0.05 * 2**level) < 1e-4:
                    cells = cx * width / stride - 0.5, cy * height / stride - 0.5
                    worst = max(worst, *(abs(c - round(c)) * stride for c in cells))
                    break
            else:
                raise AssertionError(f"a box of width {w} is of no level")
    return worst


@pytest.mark.parametrize("sizes", [SIZES, ((64, 90), (70, 64)), ((128, 107), (50, 77)), ((72, 75), (50, 77))])
def test_proposals_stand_at_their_cells_of_the_valid_image(adapter, sizes):
    for model in (still(adapter), still(two_levels()), still(two_levels(windows=1))):
        batch = tiny.batch(2, sizes=sizes)
        boxes = ask(model, batch).boxes
        assert off_grid(model, boxes, sizes) < 1e-3
        assert len(boxes[-1].unique(dim=1)[0]) > 8


def test_decode_has_the_frame_of_the_valid_image(adapter):
    batch = tiny.batch(2, sizes=((64, 90), (70, 64)))
    output = ask(still(adapter), batch)
    references = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(0))
    answer = output.decode(output.decode.own[0][:, :5], None, references)
    torch.testing.assert_close(answer.boxes[-1], references)


@pytest.mark.parametrize("name", NAMES)
def test_feature_maps_have_the_order_of_the_image(name):
    """With silent attention a cell of the map is its patch: windows are put together as they were taken apart."""
    adapter = get_adapter(*FAMILIES[name]())
    backbone = adapter.backbone
    with torch.no_grad():
        backbone.embeddings.position_embeddings.zero_()
        for layer in backbone.encoder.layer:
            for scale in (getattr(layer, n, None) for n in ("gamma_1", "gamma_2", "layer_scale1", "layer_scale2")):
                if scale is not None:
                    (scale.lambda1 if isinstance(scale, nn.Module) else scale).zero_()
    batch = tiny.batch(2, sizes=((64, 128), (60, 120)))
    pixels, mask = adapter.prepare(batch["pixel_values"], batch["pixel_mask"])
    assert mask.sum() == batch["pixel_mask"].sum() and pixels.shape[-2:] == mask.shape[-2:]
    with adapter.tap({"backbone": backbone}) as seen:
        ask(adapter, batch)
    patches = backbone.embeddings.projection if name == "lw_detr" else backbone.embeddings.patch_embeddings.projection
    expected = patches(pixels)
    if name == "rf_detr":
        expected = F.layer_norm(expected.permute(0, 2, 3, 1), expected.shape[1:2], eps=1e-6).permute(0, 3, 1, 2)
    for feature_map in seen["backbone"][2].feature_maps:
        torch.testing.assert_close(feature_map, expected, rtol=1e-4, atol=1e-5)


def test_one_window_needs_no_square():
    torch.manual_seed(0)
    model, processor = FAMILIES["rf_detr"]()
    config = type(model.config)(**model.config.to_dict() | {"backbone_config": RF_VIT | {"num_windows": 1}})
    adapter = get_adapter(type(model)(config).eval(), processor)
    batch = tiny.batch(1, sizes=((64, 90),))
    assert adapter.prepare(batch["pixel_values"], batch["pixel_mask"])[1].shape == (1, 64, 96)


def test_strides_of_two_levels():
    adapter = two_levels()
    features = ask(adapter, tiny.batch(1, sizes=((128, 128),))).features
    assert adapter.spec.strides == (8, 32) and [f.shape[-1] for f in features] == [16, 4]


def train(adapter):
    adapter.model.train()
    for module in adapter.model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Dropout):
            module.eval()
    return adapter


def test_in_training_mode_decode_asks_one_group(adapter):
    output = ask(train(adapter), tiny.batch(2, sizes=SIZES), labels=True)
    again = output.decode(*output.decode.own)
    for key in ("logits", "boxes", "queries"):
        torch.testing.assert_close(getattr(again, key), getattr(output, key), rtol=1e-4, atol=1e-5)
    queries, _, references = output.decode.own
    # Groups of Transformers would cut twelve queries into three that do not see each other.
    changed = output.decode(torch.cat([queries[:, :-1], -queries[:, -1:]], 1), None, references)
    assert (changed.queries - output.queries)[:, :, 0].abs().max() > 1e-6
    assert adapter.model.config.group_detr == 3
    with pytest.raises(RuntimeError):
        output.decode(queries[:, :4], None, references)
    assert adapter.model.config.group_detr == 3


def parts_of(adapter, batch):
    """Transformers' criterion, told that it does not train: one group. Its parts by name, without weights."""
    model, config, seen = adapter.model, adapter.model.config, {}

    def record(logits, labels, device, boxes, config, outputs_class, outputs_coord, enc_class, enc_coord):
        seen["outputs"] = {
            "logits": logits,
            "pred_boxes": boxes,
            "auxiliary_outputs": [
                {"logits": c, "pred_boxes": b} for c, b in zip(outputs_class[:-1], outputs_coord[:-1], strict=True)
            ],
            "enc_outputs": {"logits": enc_class, "pred_boxes": enc_coord},
        }
        return logits.sum(), {}, None

    pixels, mask = adapter.prepare(batch["pixel_values"], batch["pixel_mask"])
    model.loss_function = record
    model(pixel_values=pixels, pixel_mask=mask, labels=batch["labels"])
    matcher = LwDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
    criterion = LwDetrImageLoss(matcher, config.num_labels, config.focal_alpha, ["labels", "boxes"], config.group_detr)
    del model._loss_function
    return criterion.eval()(seen["outputs"], batch["labels"])


def test_in_eval_mode_the_loss_is_that_of_one_group(adapter):
    batch = tiny.batch(2, sizes=((96, 96),), boxes=(3, 5))
    weights = {"loss_ce": 3.0, "loss_bbox": 7.0, "loss_giou": 11.0}
    config = adapter.model.config
    config.class_loss_coefficient, config.bbox_loss_coefficient, config.giou_loss_coefficient = weights.values()
    losses, parts = ask(adapter, batch, labels=True).losses, parts_of(adapter, batch)
    assert losses.keys() == {*weights, *(f"{name}_enc" for name in weights)}
    for name, weight in weights.items():
        torch.testing.assert_close(losses[name], weight * (parts[name] + parts[f"{name}_0"] + parts[f"{name}_1"]))
        torch.testing.assert_close(losses[f"{name}_enc"], weight * parts[f"{name}_enc"])


def test_labels_of_ragged_images_are_in_the_frame_of_the_model(adapter):
    """A box of the labels that is exactly a prediction costs no box loss in that layer, whatever the sides."""
    batch = tiny.batch(2, sizes=((64, 90), (70, 50)), boxes=(1,))
    output = ask(still(adapter), batch)
    for boxes, label in zip(output.boxes[-1], batch["labels"], strict=True):
        label["boxes"] = boxes[:1].detach()
    losses = ask(adapter, batch, labels=True).losses
    assert losses["loss_bbox"] < 1e-5 and losses["loss_giou"] < 1e-4


def test_without_labelled_images_the_loss_is_asked_all_the_same(adapter):
    """Boxes are counted over all ranks: one that does not ask lets the others wait for ever."""
    batch, calls, original = tiny.batch(2, sizes=((96, 96),), boxes=(0,)), [], adapter.model.loss_function
    for label in batch["labels"]:
        label["labelled"] = False
    adapter.model.loss_function = lambda *inputs: calls.append(inputs) or original(*inputs)
    losses = ask(train(adapter), batch, labels=True).losses
    assert len(calls) == 1 and all(loss == 0 for loss in losses.values())


def test_unlabelled_images_take_no_part(adapter):
    """With confident heads, since at the initial ones the background costs next to nothing."""
    with torch.no_grad():
        for head in adapter.class_heads:
            head.bias.zero_()
    batch, losses = tiny.batch(2, sizes=((96, 96),), boxes=(3, 0)), []
    for flag in (False, True):
        batch["labels"][1]["labelled"] = flag
        for _ in range(2):
            batch["pixel_values"][1] = 255 - batch["pixel_values"][1]
            losses.append(ask(train(adapter), batch, labels=True).losses)
    for name, loss in losses[0].items():
        torch.testing.assert_close(loss, losses[1][name], rtol=1e-6, atol=0)
    assert (losses[2]["loss_ce"] - losses[3]["loss_ce"]).abs() > 1e-3
    assert losses[0]["loss_ce"] < 0.7 * losses[2]["loss_ce"]


def work(rank, world, path, boxes, fast):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/{world}", rank=rank, world_size=world)
    adapter = train(get_adapter(*FAMILIES["lw_detr"]()))
    adapter.model.double()
    adapter.fast_loss = fast
    if fast:
        use_fast_criterion(adapter.model)
    batch = tiny.batch(4, sizes=((64, 64),), boxes=boxes)
    for label in batch["labels"]:
        label["boxes"] = label["boxes"].double()
    parts = slice(rank * 4 // world, (rank + 1) * 4 // world)
    total = sum(ask(adapter, {key: value[parts] for key, value in batch.items()}, labels=True).losses.values())
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


def test_the_loss_sees_heads_in_full_precision(adapter):
    batch, seen, original = tiny.batch(2, sizes=((96, 96),)), [], adapter.model.loss_function
    adapter.model.loss_function = lambda *inputs: seen.extend(inputs) or original(*inputs)
    core = adapter.model.model
    chosen = {"classes": core.enc_out_class_embed[0], "boxes": core.enc_out_bbox_embed[0]}
    with torch.autocast("cpu", torch.bfloat16), adapter.tap(chosen) as proposals:
        losses = ask(train(adapter), batch, labels=True).losses
    assert all(x.dtype == torch.float32 for _, _, x in proposals.values())
    floats = [x for x in seen if isinstance(x, torch.Tensor)]
    assert len(floats) == 6 and all(x.dtype == torch.float32 for x in (*floats, *losses.values()))
    for logits in (floats[0], floats[4]):
        assert (logits != logits.bfloat16()).any()


@pytest.mark.parametrize("name", NAMES)
def test_student_is_built_saved_and_loaded(name, tmp_path):
    teacher = FAMILIES[name]()
    options = StudentConfig(decoder_layers=2, num_queries=6, d_model=64, config={"group_detr": 2})
    adapter = build_student(options, get_adapter(*teacher), ("a", "b"), dict(SQUARE))
    batch, model = tiny.batch(2, num_classes=2), adapter.model
    losses = ask(adapter, batch, labels=True).losses
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert adapter.spec.num_queries == 6 and adapter.spec.num_layers == 2 and adapter.spec.hidden_size == 64
    model.eval().save_pretrained(tmp_path)
    again = get_adapter(type(model).from_pretrained(tmp_path).eval(), adapter.processor)
    assert again.spec == adapter.spec
    torch.testing.assert_close(ask(again, batch).boxes, ask(adapter, batch).boxes, rtol=0, atol=0)


def test_rf_detr_is_built_from_its_type_alone():
    options = StudentConfig(base="rf_detr", num_queries=6, config={"group_detr": 2, "backbone_config": RF_VIT})
    adapter = build_student(options, None, ("a", "b"), dict(SQUARE))
    model = adapter.model
    assert ask(adapter, tiny.batch(1, sizes=((64, 64),), num_classes=2), labels=True).losses
    assert all(p.requires_grad for p in model.parameters())
    embeddings = model.model.query_feat.weight.detach(), model.model.reference_point_embed.weight
    assert embeddings[0].std().item() == pytest.approx(1, abs=0.1) and not embeddings[1].any()
    attention = model.model.decoder.layers[0].cross_attn
    assert not attention.sampling_offsets.weight.any() and attention.sampling_offsets.bias.any()


@pytest.mark.parametrize("name", NAMES)
def test_fewer_layers_and_queries_take_the_teachers_first_group(name):
    teacher = FAMILIES[name]()
    options = StudentConfig(decoder_layers=2, num_queries=6, copy_weights=True)
    student = build_student(options, get_adapter(*teacher), tiny.CLASSES, dict(SQUARE))
    ours, theirs = student.model.model, teacher[0].model
    torch.testing.assert_close(ours.query_feat.weight[:6], theirs.query_feat.weight[:6])
    for mine, other in ((0, 0), (1, 2)):
        for a, b in zip(
            ours.decoder.layers[mine].parameters(), theirs.decoder.layers[other].parameters(), strict=True
        ):
            torch.testing.assert_close(a, b)
