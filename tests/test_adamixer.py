"""AdaMixer against the original's numbers, a slow float64 reading of its description, and itself.

tests/golden/adamixer.npz holds what the original code computed in fp32 for random weights of a tiny model: inputs,
every intermediate of every layer, predictions, matching, losses, gradients and the statistics of fresh weights.
"""

import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForObjectDetection,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.modeling_outputs import BackboneOutput

from asd_hf import commands
from asd_hf.criterion import DetectionCriterion
from asd_hf.detectors import get_adapter
from asd_hf.detectors.base import DetectorOutput
from asd_hf.errors import UserError
from asd_hf.models import AdaMixerConfig, AdaMixerForObjectDetection, AdaMixerImageProcessor, AdaMixerModel
from asd_hf.models.adamixer import modeling_adamixer as modeling
from asd_hf.models.adamixer.convert_adamixer import convert_state_dict
from asd_hf.models.adamixer.loss_adamixer import adamixer_loss
from asd_hf.ops import cxcywh_to_xyxy
from tests import tiny

GOLDEN = np.load(Path(__file__).parent / "golden" / "adamixer.npz")
SHAPE = json.loads(str(GOLDEN["config_json"]))
LAYERS = range(SHAPE["num_stages"])
PADDED = tuple(GOLDEN["in/pad_shape_hw"].tolist())
WEIGHTS = {key[3:]: torch.from_numpy(GOLDEN[key]) for key in GOLDEN.files if key.startswith("sd/")}


def golden(key):
    return torch.from_numpy(GOLDEN[key])


def assert_golden(actual, key, tolerance=1e-5):
    expected = golden(key)
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=tolerance * scale, msg=lambda m: f"{key}: {m}")


def backbone(*channels):
    return tiny.HF_RESNET | {"hidden_sizes": list(channels), "out_features": [f"stage{i}" for i in (1, 2, 3, 4)]}


def golden_config(**options):
    return AdaMixerConfig(
        backbone_config=backbone(*SHAPE["backbone_channels"]),
        num_queries=SHAPE["num_query"],
        d_model=SHAPE["content_dim"],
        feature_channels=SHAPE["feat_channels"],
        feature_strides=SHAPE["strides"],
        decoder_layers=SHAPE["num_stages"],
        decoder_attention_heads=SHAPE["num_heads"],
        decoder_ffn_dim=SHAPE["ffn_dim"],
        num_groups=SHAPE["n_groups"],
        in_points=SHAPE["in_points"],
        out_points=SHAPE["out_points"],
        num_labels=SHAPE["num_classes"],
        **options,
    )


class GivenMaps(nn.Module):
    """In the place of the backbone, of which the golden numbers know the feature maps alone."""

    def __init__(self, maps):
        super().__init__()
        self.maps = maps

    def forward(self, pixel_values):
        return BackboneOutput(feature_maps=tuple(m.to(pixel_values.dtype) for m in self.maps))


def golden_model(attention="eager", **options):
    model = AdaMixerForObjectDetection._from_config(golden_config(**options), attn_implementation={"": attention})
    state, report = convert_state_dict(WEIGHTS)
    assert len(report) == len(WEIGHTS) and all(report.values())
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("model.backbone.") for name in missing)
    model.model.backbone = GivenMaps([golden(f"in/backbone_feat_{i}") for i in range(4)])
    return model.eval()


def golden_inputs():
    sizes = GOLDEN["in/img_shapes_hw"]
    mask = torch.zeros(len(sizes), *PADDED, dtype=torch.bool)
    for image, (height, width) in enumerate(sizes):
        mask[image, :height, :width] = True
    return {"pixel_values": torch.zeros(len(sizes), 3, *PADDED), "pixel_mask": mask}


def golden_labels(boxes, classes, sizes):
    """Of images of these (height, width), from the keys of their corners and classes."""
    return [
        {"boxes": relative(golden(f"{boxes}{i}"), size), "class_labels": golden(f"{classes}{i}")}
        for i, size in enumerate(torch.from_numpy(sizes))
    ]


def relative(corners, size):
    """Boxes in [0, 1] of corners in pixels of an image of `size` (..., 2), height and width."""
    corners = corners / size[..., [1, 0, 1, 0]]
    return torch.cat([(corners[..., :2] + corners[..., 2:]) / 2, corners[..., 2:] - corners[..., :2]], -1)


def golden_maps():
    return [golden(f"neck/out_{i}") for i in range(4)]


def corners_of(positions):
    return cxcywh_to_xyxy(modeling.positions_to_boxes(positions))


def spy(module, seen, name):
    """Keeps the inputs and the output of `module`."""
    module.register_forward_hook(lambda _, args, output: seen.__setitem__(name, (args, output)))


# -- the original's numbers -------------------------------------------------------------------------------------------


def test_neck_and_initial_queries():
    model, inputs = golden_model(), golden_inputs()
    core = model.model
    for level, out in enumerate(core.neck(core.backbone.maps)):
        assert_golden(out, f"neck/out_{level}")
    size = core.valid_sizes(**inputs)
    assert_golden(size, "query/imgs_whwh", 0)
    content, positions = core.initial_queries(size)
    assert_golden(content, "query/content")
    assert_golden(positions, "query/xyzr")


def test_queries_begin_at_the_stored_boxes():
    model = golden_model().model
    model.query_boxes[:] = torch.tensor([0.3, 0.4, 0.5, 0.6])
    size = model.valid_sizes(**golden_inputs())
    boxes = modeling.positions_to_boxes(model.initial_queries(size)[1]) / size
    torch.testing.assert_close(boxes, model.query_boxes.expand_as(boxes))


@pytest.mark.parametrize("number", LAYERS)
def test_every_intermediate_of_a_layer(number, monkeypatch):
    """Of the original's own inputs of the layer."""
    model, seen = golden_model(), {}
    layer, head = model.model.decoder.layers[number], model.class_heads[number]
    before = f"stage{number - 1}" if number else "query"
    content, positions = golden(f"{before}/content"), golden(f"{before}/xyzr")
    key = f"stage{number}/{{}}".format
    assert_golden(modeling.position_embedding(positions, content.shape[-1]), key("pe"))
    assert_golden(modeling.intersection_over_first(positions), key("iof"))
    for name in ("self_attn_layer_norm", "sampling", "mixing_layer_norm", "box_head"):
        spy(getattr(layer, name), seen, name)
    eager = modeling.eager_attention_forward

    def attend(module, query, key, value, attention_mask, **options):
        seen["bias"] = attention_mask
        return eager(module, query, key, value, attention_mask, **options)

    monkeypatch.setattr(modeling, "eager_attention_forward", attend)
    decoder = model.model.decoder
    decoder.layers = nn.ModuleList([layer])
    (out,), (refined,) = decoder(content, positions, golden_maps())
    assert_golden(seen["bias"], key("attn_bias"))
    assert_golden(seen["self_attn_layer_norm"][1], key("after_attn"))
    sampled, points, _ = seen["sampling"][1]
    assert_golden(points.flatten(2, 3), key("sample_points"))
    assert_golden(sampled, key("sampled_feature"))
    assert_golden(seen["mixing_layer_norm"][0][0], key("mixing_out"))
    assert_golden(seen["mixing_layer_norm"][1], key("after_mixing"))
    assert_golden(out, key("content"))
    assert_golden(head(out), key("cls_logits"))
    assert_golden(seen["box_head"][1], key("delta_xyzr"))
    assert_golden(refined, key("xyzr"))
    assert_golden(corners_of(refined), key("boxes_xyxy"))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_all_layers_in_turn(attention):
    model, inputs = golden_model(attention), golden_inputs()
    output = model.model(**inputs)
    for number in LAYERS:
        content = output.intermediate_hidden_states[:, number]
        assert_golden(content, f"stage{number}/content")
        assert_golden(model.class_heads[number](content), f"stage{number}/cls_logits")
        assert_golden(output.intermediate_positions[:, number], f"stage{number}/xyzr")
        size = model.model.valid_sizes(**inputs)
        assert_golden(cxcywh_to_xyxy(output.intermediate_boxes[:, number] * size), f"stage{number}/boxes_xyxy")
    whole = model(**inputs)
    assert_golden(whole.logits, f"stage{LAYERS[-1]}/cls_logits")
    assert torch.equal(whole.pred_boxes, output.intermediate_boxes[:, -1])
    assert torch.equal(output.last_hidden_state, content)


def test_extreme_queries():
    """Beyond the image, of a few pixels and of more than the image, thin and flat."""
    model = golden_model()
    contents, places = model.model.decoder(golden("caseB/content"), golden("caseB/xyzr"), golden_maps())
    for number in LAYERS:
        assert_golden(contents[number], f"caseB/stage{number}/content")
        assert_golden(model.class_heads[number](contents[number]), f"caseB/stage{number}/cls_logits")
        assert_golden(places[number], f"caseB/stage{number}/xyzr")
        assert_golden(corners_of(places[number]), f"caseB/stage{number}/boxes_xyxy")
        if number == 0:
            delta = model.model.decoder.layers[0].box_head(contents[0])
            assert_golden(delta, "caseB/stage0/delta_xyzr")


@pytest.mark.parametrize("number", LAYERS)
def test_extreme_offsets(number):
    model = golden_model()
    delta = model.model.decoder.layers[number].box_head(golden(f"caseB/stage{number}/content"))
    assert_golden(delta, f"caseB/stage{number}/delta_xyzr")


@pytest.mark.parametrize("kind", ["post", "post_rescaled", "post_direct"])
def test_post_processing(kind):
    valid = golden("in/img_shapes_hw").double()
    sizes = valid if kind == "post" else valid / golden("in/scale_factor")[:, :2].flip(1)
    if kind == "post_direct":
        boxes = relative(golden("post_direct/boxes_xyxy"), valid[:, None])
        output = modeling.AdaMixerObjectDetectionOutput(logits=golden("post_direct/logits"), pred_boxes=boxes)
    else:
        output = golden_model()(**golden_inputs())
    results = AdaMixerImageProcessor().post_process_object_detection(output, threshold=0.0, target_sizes=sizes)
    for image, result in enumerate(results):
        assert len(result["scores"]) == SHAPE["num_query"]
        assert_golden(result["boxes"].float(), f"{kind}/img{image}_boxes")
        assert_golden(result["scores"].float(), f"{kind}/img{image}_scores")
        assert torch.equal(result["labels"], golden(f"{kind}/img{image}_labels"))
    top = AdaMixerImageProcessor().post_process_object_detection(output, threshold=0.0, top_k=3)
    assert all(len(result["scores"]) == 3 for result in top)


def assigned(pairs, layer, image, num_images, num_queries, counts):
    """The ground truth of each query of an image, -1 for the background."""
    query, target = (index.numpy() for index in pairs)
    found = np.full(num_queries, -1)
    first = (layer * num_images + image) * num_queries
    mine = (query >= first) & (query < first + num_queries)
    found[query[mine] - first] = target[mine] - sum(counts[:image])
    return found


def top_1(logits, pairs, labels):
    query, target = pairs
    classes = torch.cat([label["class_labels"] for label in labels])[target]
    return 100 * (logits.flatten(0, -2)[query].argmax(-1) == classes).float().mean()


def test_losses_matching_and_gradients():
    model, inputs = golden_model(), golden_inputs()
    labels = golden_labels("loss/gt_boxes_xyxy_img", "loss/gt_labels_img", GOLDEN["in/img_shapes_hw"])
    seen = {}

    def keep(*args):
        seen["layers"] = args[5], args[6]
        return adamixer_loss(*args)

    model.loss_function = keep
    output = model(**inputs, labels=labels)
    assert_golden(output.loss, "loss/total")
    assert len(output.auxiliary_outputs) == len(LAYERS) - 1
    criterion = DetectionCriterion.from_config(model.config, class_loss_weight=model.config.class_loss_coefficient)
    counts = [len(label["boxes"]) for label in labels]
    for number in LAYERS:
        logits, boxes = (x[number : number + 1] for x in seen["layers"])
        answer = DetectorOutput(logits, boxes, logits)
        for part, name in (("loss_ce", "cls"), ("loss_bbox", "bbox"), ("loss_giou", "iou")):
            assert_golden(criterion(answer, labels)[part], f"loss/stage{number}_loss_{name}")
        (pairs,) = criterion.assign([answer], labels)
        for image in range(2):
            found = assigned(pairs, 0, image, 2, SHAPE["num_query"], counts)
            assert (found == GOLDEN[f"loss/stage{number}_img{image}_assigned_gt"]).all()
        assert_golden(top_1(logits[0], pairs, labels), f"loss/stage{number}_pos_acc")
    output.loss.backward()
    norms = json.loads(str(GOLDEN["loss/grad_l2_norm_json"]))
    _, report = convert_state_dict(WEIGHTS)
    parameters = dict(model.named_parameters())
    for name, expected in norms.items():
        if expected is None:
            assert name == "rpn_head.init_proposal_bboxes.weight" and not set(report[name]) & parameters.keys()
            continue
        gradient = torch.cat([parameters[new].grad for new in report[name]])
        assert gradient.norm().item() == pytest.approx(expected, rel=1e-4, abs=1e-4), name
    for key in GOLDEN.files:
        if key.startswith("loss/grad/"):
            gradient = torch.cat([parameters[new].grad for new in report[key.removeprefix("loss/grad/")]])
            assert_golden(gradient, key, 1e-4)


def test_criterion_alone():
    sizes = GOLDEN["crit/img_shapes_hw"]
    labels = golden_labels("crit/gt_boxes_img", "crit/gt_labels_img", sizes)
    logits, corners = golden("crit/logits").requires_grad_(), golden("crit/boxes_xyxy").requires_grad_()
    boxes = relative(corners, torch.from_numpy(sizes)[:, None])
    config = AdaMixerConfig(backbone_config=backbone(8, 8, 8, 8))
    criterion = DetectionCriterion.from_config(config, class_loss_weight=config.class_loss_coefficient)
    answer = DetectorOutput(logits[None], boxes[None], logits[None])
    counts = [len(label["boxes"]) for label in labels]
    for image in range(2):
        label = labels[image]
        cost = criterion.cost(
            logits[None, image : image + 1],
            boxes[None, image : image + 1],
            label["class_labels"][None],
            label["boxes"][None],
        )
        assert_golden(cost[0, 0], f"crit/cost_img{image}")
    (pairs,) = criterion.assign([answer], labels)
    for image in range(3):
        assert (assigned(pairs, 0, image, 3, 9, counts) == GOLDEN[f"crit/assigned_gt_img{image}"]).all()
    losses = criterion(answer, labels)
    for part, name in (("loss_ce", "cls"), ("loss_bbox", "bbox"), ("loss_giou", "iou")):
        assert_golden(losses[part], f"crit/loss_{name}")
    assert_golden(top_1(logits, pairs, labels), "crit/pos_acc")
    assert_golden(sum(losses.values()), "crit/total")
    sum(losses.values()).backward()
    assert_golden(logits.grad, "crit/grad_logits", 1e-4)
    assert_golden(corners.grad, "crit/grad_boxes", 1e-4)


# -- fresh weights and sizes ------------------------------------------------------------------------------------------


def original_names(num_layers):
    """Names of the original, without the backbone's, for the number of layers."""
    return {name for name in WEIGHTS if not name.startswith("roi_head") or int(name.split(".")[2]) < num_layers}


def test_initial_weights():
    statistics = json.loads(str(GOLDEN["init_stats_json"]))
    torch.manual_seed(0)
    wide = backbone(256, 512, 1024, 2048) | {"layer_type": "bottleneck"}
    model = AdaMixerForObjectDetection(AdaMixerConfig(backbone_config=wide, decoder_layers=1, num_labels=80))
    _, report = convert_state_dict({name: WEIGHTS[name] for name in original_names(1)})
    state = model.state_dict()
    xyz = statistics.pop("__offset_bias_xyz_mean_std_min_max")
    offsets = state["model.decoder.layers.0.sampling.offset_proj.bias"].view(-1, 3)
    assert statistics.keys() == report.keys()
    tensors = {name: torch.cat([state[new] for new in report[name]]) for name in statistics}
    checks = [(name, tensors[name], numbers) for name, numbers in statistics.items()]
    checks += [(f"offset {axis}", offsets[:, i], xyz[i]) for i, axis in enumerate("xyz")]
    for name, tensor, (mean, std, low, high) in checks:
        if name.endswith("sampling_offset_generator.0.bias"):
            continue  # axis by axis
        drawn = max(tensor.numel(), 2) ** -0.5  # the error of a mean, in standard deviations
        assert tensor.mean().item() == pytest.approx(mean, abs=6 * std * drawn * 1.5 + 1e-5), name
        assert tensor.std(correction=0).item() == pytest.approx(std, rel=3 * drawn + 1e-3, abs=1e-6), name
        if "iof_tau" in name:
            assert tensor.min() >= 0 and 2 < tensor.max() <= 4
        elif "content_features" not in name:
            spread = (high - low) * min(0.5, 8 / tensor.numel()) + 1e-5
            assert tensor.min().item() == pytest.approx(low, abs=spread), name
            assert tensor.max().item() == pytest.approx(high, abs=spread), name


def test_initial_offsets_of_a_square_number_of_points_are_a_grid():
    config = (
        golden_config()
        if SHAPE["in_points"] == 16
        else AdaMixerConfig(
            backbone_config=backbone(8, 8, 8, 8),
            in_points=16,
            num_groups=1,
            d_model=32,
            feature_channels=32,
            out_points=4,
        )
    )
    model = AdaMixerModel(config)
    for layer in model.decoder.layers:
        assert_golden(layer.sampling.offset_proj.bias, "init/offset_bias_in_points16", 1e-6)


@pytest.mark.parametrize(("num_queries", "size"), [(100, 134_790_904), (300, 134_842_904)])
def test_number_of_weights(num_queries, size):
    """The original's, which counts the initial boxes too."""
    with torch.device("meta"):
        model = AdaMixerForObjectDetection(AdaMixerConfig(num_queries=num_queries, num_labels=80))
    assert sum(p.numel() for p in model.parameters()) + model.model.query_boxes.numel() == size
    assert sum(p.numel() for p in model.model.decoder.layers[0].parameters()) == 18_378_716 - 66_304 - 20_560


def test_at_first_every_box_is_the_whole_valid_image():
    model = AdaMixerForObjectDetection(golden_config()).eval()
    output = model(**golden_inputs())
    boxes = output.intermediate_boxes
    torch.testing.assert_close(boxes, torch.tensor([0.5, 0.5, 1, 1]).expand_as(boxes))


# -- a slow reading of the description --------------------------------------------------------------------------------


def slow_layer(weights, config, content, position, maps):
    """One layer for the queries of one image: `content` (Q, D), `position` (Q, 4), `maps` of (C, height, width)."""
    num_queries, width = content.shape
    sides = [(2 ** (z - r / 2), 2 ** (z + r / 2)) for _, _, z, r in position.tolist()]
    boxes = [
        (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        for (x, y, _, _), (w, h) in zip(position.tolist(), sides, strict=True)
    ]
    embedding = torch.zeros_like(content)
    for query in range(num_queries):
        for place, value in enumerate(position[query].tolist()):
            for k in range(width // 8):
                period = (torch.tensor(10000.0) ** (torch.tensor(float(k)) / (width // 8))).item()
                angle = (value / 1000 if place < 2 else value) / period
                embedding[query, place * width // 4 + 2 * k] = math.sin(angle)
                embedding[query, place * width // 4 + 2 * k + 1] = math.cos(angle)
    text = content + embedding
    heads, size = config.decoder_attention_heads, width // config.decoder_attention_heads
    q, k, v = (
        F.linear(text, weights[f"self_attn.{n}_proj.weight"], weights[f"self_attn.{n}_proj.bias"]) for n in "qkv"
    )
    mixed = torch.zeros_like(content)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(num_queries):
            score = torch.zeros(num_queries, dtype=content.dtype)
            for j in range(num_queries):
                a, b = boxes[i], boxes[j]
                overlap = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
                share = overlap / max((a[2] - a[0]) * (a[3] - a[1]), 1e-6)
                score[j] = q[i, part] @ k[j, part] / size**0.5
                score[j] += weights["self_attn.iof_scale"][head] * math.log(share + 1e-7)
            mixed[i, part] = score.softmax(0) @ v[:, part]

    def norm(x, name):
        return F.layer_norm(x, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    content = norm(text + linear(mixed, "self_attn.out_proj"), "self_attn_layer_norm")
    groups, c = config.num_groups, config.feature_channels // config.num_groups
    rows = []
    for i in range(num_queries):
        offsets = linear(content[i], "sampling.offset_proj").view(groups, config.in_points, 3)
        generated = linear(content[i], "mixing.parameter_proj").view(groups, -1)
        flat = []
        for g in range(groups):
            read = torch.zeros(config.in_points, c, dtype=content.dtype)
            for p in range(config.in_points):
                x = position[i, 0] + offsets[g, p, 0] * sides[i][0]
                y = position[i, 1] + offsets[g, p, 1] * sides[i][1]
                z = position[i, 2] + offsets[g, p, 2]
                levels = torch.stack(
                    [-((z - math.log2(s)) ** 2) / config.level_temperature for s in config.feature_strides]
                ).softmax(0)
                for level, stride in enumerate(config.feature_strides):
                    image = maps[level][None, g * c : (g + 1) * c]
                    extent = torch.tensor([image.shape[3] * stride, image.shape[2] * stride])
                    grid = 2 * torch.stack([x, y]) / extent - 1
                    value = F.grid_sample(image, grid.view(1, 1, 1, 2), align_corners=False)
                    read[p] = read[p] + levels[level] * value.flatten()
            channels = generated[g, : c * c].view(c, c)
            points = generated[g, c * c :].view(config.out_points, config.in_points)
            read = F.layer_norm(read @ channels, (config.in_points, c)).relu()
            flat.append(F.layer_norm(points @ read, (config.out_points, c)).relu().flatten())
        rows.append(linear(torch.cat(flat), "mixing.out_proj"))
    content = norm(content + torch.stack(rows), "mixing_layer_norm")
    content = norm(content + linear(linear(content, "fc1").relu(), "fc2"), "final_layer_norm")
    head = linear(norm(linear(content, "box_head.dense"), "box_head.layer_norm").relu(), "box_head.out_proj")
    scale = 2 ** position[:, 2:3]
    return content, torch.cat([position[:, :2] + head[:, :2] * scale, position[:, 2:] + head[:, 2:]], -1)


def test_equals_the_slow_reading_in_float64():
    model = golden_model("sdpa").double()
    core, inputs = model.model, golden_inputs()
    output = core(inputs["pixel_values"].double(), inputs["pixel_mask"])
    maps = core.neck([m.double() for m in core.backbone.maps])
    contents, positions = core.initial_queries(core.valid_sizes(inputs["pixel_values"].double(), inputs["pixel_mask"]))
    for image in range(2):
        content, position = contents[image], positions[image]
        for number, layer in enumerate(core.decoder.layers):
            content, position = slow_layer(
                layer.state_dict(), model.config, content, position, [m[image] for m in maps]
            )
            torch.testing.assert_close(
                output.intermediate_hidden_states[image, number], content, rtol=1e-10, atol=1e-10
            )
            torch.testing.assert_close(output.intermediate_positions[image, number], position, rtol=1e-10, atol=1e-10)


# -- precision, memory and speed --------------------------------------------------------------------------------------


def lively(attention="sdpa", seed=0, **options):
    """A whole tiny model with weights that are not zero."""
    torch.manual_seed(seed)
    config = golden_config(**options)
    model = AdaMixerForObjectDetection._from_config(config, attn_implementation={"": attention})
    state, _ = convert_state_dict(WEIGHTS)
    model.load_state_dict(state, strict=False)
    return model


def example(model, seed=0):
    """Two images of unequal sizes, and labels."""
    generator = torch.Generator().manual_seed(seed)
    inputs = golden_inputs()
    inputs["pixel_values"] = torch.randn(inputs["pixel_values"].shape, generator=generator).to(model.dtype)
    inputs["pixel_values"] *= inputs["pixel_mask"][:, None]
    labels = golden_labels("loss/gt_boxes_xyxy_img", "loss/gt_labels_img", GOLDEN["in/img_shapes_hw"])
    return inputs | {"labels": labels}


def gradients(model, **options):
    model.zero_grad()
    loss = model(**example(model), **options).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs, tolerance):
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=0)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        scale = max(gradient.abs().max().item(), 1e-6)  # of equal boxes the overlap has none but rounding
        torch.testing.assert_close(
            ours[1][name], gradient, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_eager_and_sdpa_have_the_same_gradients():
    eager, sdpa = (gradients(lively(attention).double().train()) for attention in ("eager", "sdpa"))
    assert any("iof_scale" in name and gradient.any() for name, gradient in sdpa[1].items())
    assert_same_gradients(eager, sdpa, 1e-9)


def test_every_parameter_has_a_gradient():
    model = lively().train()
    _, found = gradients(model)
    assert {name for name, gradient in found.items() if gradient.any()} == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("how", ["checkpointing", "chunks of 1", "chunks of 5", "one large chunk"])
def test_less_memory_with_the_same_gradients(how):
    plain, model = lively().double().train(), lively().double().train()
    if how == "checkpointing":
        model.activation_checkpointing_enable()
        assert all(layer.gradient_checkpointing for layer in model.model.decoder.layers)
    else:
        for layer in model.model.decoder.layers:
            layer.mixing.chunk_size = {"chunks of 1": 1, "chunks of 5": 5, "one large chunk": 99}[how]
    kept = []
    for each in (plain, model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            each(**example(each))
        kept.append(sum(sizes))
    assert kept[1] < 0.8 * kept[0]
    assert_same_gradients(gradients(model), gradients(plain), 1e-9)


def test_chunks_are_an_option_of_the_configuration():
    model = AdaMixerForObjectDetection(golden_config(mixing_chunk_size=3)).train()
    assert all(layer.mixing.chunk_size == 3 for layer in model.model.decoder.layers)
    assert model(**example(model)).loss.isfinite()


def test_bf16_is_near_fp32():
    """Positions, logarithms of overlaps and boxes stay in fp32: in bf16 a coordinate of 80 pixels is off by 0.25."""
    exact = lively().eval()
    inputs = example(exact)
    expected = exact(**inputs)
    assert expected.pred_boxes.dtype == torch.float32
    half = lively().eval().bfloat16()
    output = half(**example(half))
    assert output.logits.dtype == torch.bfloat16
    for answer in (output, None):
        if answer is None:
            with torch.autocast("cpu", torch.bfloat16):
                answer = exact(**inputs)
        assert answer.intermediate_boxes.dtype == torch.float32 and answer.loss.dtype == torch.float32
        gaps = (answer.intermediate_boxes - expected.intermediate_boxes).abs()
        assert gaps[:, 0].max() < 0.02 and gaps.median() < 0.01
        torch.testing.assert_close(answer.loss, expected.loss, rtol=0.05, atol=0)


def test_positions_do_not_overflow_in_half_precision():
    positions = torch.tensor([[[600.0, 400, 10, 0], [20, 30, -9, 0], [5000, 400, 8, 2]]])
    overlap = modeling.intersection_over_first(positions)
    assert overlap.isfinite().all() and torch.equal(overlap[0, 0, 0], torch.tensor(1.0))
    assert overlap[0, 0, 2] == 0


def test_the_logarithm_of_overlaps_is_taken_in_fp32(monkeypatch):
    """In fp16 1e-7 is 1.2e-7 at best: boxes that do not meet would attract each other more."""
    model, seen = golden_model().half(), []
    eager = modeling.eager_attention_forward

    def attend(module, query, key, value, attention_mask, **options):
        seen.append((module.iof_scale, attention_mask))
        return eager(module, query, key, value, attention_mask, **options)

    monkeypatch.setattr(modeling, "eager_attention_forward", attend)
    positions = golden("caseB/xyzr")
    model.model.decoder(golden("caseB/content").half(), positions, [level.half() for level in golden_maps()])
    overlap = modeling.intersection_over_first(positions)
    assert (overlap == 0).any()
    scale, bias = seen[0]
    expected = scale.float()[:, None, None] * (overlap + 1e-7).log()[:, None]
    torch.testing.assert_close(bias.float(), expected, rtol=1e-3, atol=1e-3)


def test_of_boxes_without_area_positions_are_finite():
    boxes = torch.tensor([[10.0, 20, 0, 0], [10, 20, 5, 0], [10, 20, -3, 4], [10, 20, 8, 2]])
    positions = modeling.boxes_to_positions(boxes)
    assert positions.isfinite().all()
    torch.testing.assert_close(modeling.positions_to_boxes(positions)[3], boxes[3])


@pytest.fixture(scope="module")
def exported():
    """A model of one layer, inputs, and its program for any number of images of any size."""
    model = lively("eager").eval()
    model.model.decoder.layers, model.class_heads = model.model.decoder.layers[:1], model.class_heads[:1]
    inputs = example(model)
    del inputs["labels"]
    auto = torch.export.Dim.AUTO
    shapes = {"pixel_values": {0: auto, 2: auto, 3: auto}, "pixel_mask": dict.fromkeys(range(3), auto)}
    return model, inputs, torch.export.export(model, (), inputs, dynamic_shapes=shapes)


def another_batch():
    return {"pixel_values": torch.randn(3, 3, 96, 128), "pixel_mask": torch.ones(3, 96, 128, dtype=torch.bool)}


def test_compiled_and_exported_it_answers_the_same(exported):
    model, inputs, program = exported
    torch.compiler.reset()
    compiled, program = torch.compile(model, backend="aot_eager", fullgraph=True), program.module()
    with torch.no_grad():
        for each, batch in ((compiled, inputs), (program, inputs), (program, another_batch())):
            output, expected = each(**batch), model(**batch)
            torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(output.pred_boxes, expected.pred_boxes, rtol=1e-4, atol=1e-4)


def test_onnx_answers_the_same_without_a_loop_over_points(exported, tmp_path):
    pytest.importorskip("onnxscript", reason="it writes the file")
    runtime = pytest.importorskip("onnxruntime", reason="it runs the file")
    model, inputs, program = exported
    names = ["logits", "pred_boxes"]
    program = torch.onnx.export(program, dynamo=True, output_names=names, verbose=False)
    assert not {"Loop", "Scan", "SequenceEmpty"} & {node.op_type for node in program.model.graph}
    program.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (inputs, another_batch()):
        with torch.no_grad():
            expected = model(**batch)
        found = session.run(names, {name: tensor.numpy() for name, tensor in batch.items()})
        for name, array in zip(names, found, strict=True):
            torch.testing.assert_close(torch.from_numpy(array), expected[name], rtol=1e-4, atol=1e-4)


# -- in Transformers --------------------------------------------------------------------------------------------------


def test_importing_the_package_is_enough():
    """In a process of its own: this one has imported more."""
    command = "import asd_hf; from transformers import AutoConfig as C; print(C.for_model('adamixer').num_queries)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.stdout == "100\n", done.stderr


def test_saved_and_loaded_through_the_auto_classes(tmp_path, caplog, monkeypatch):
    model = lively().eval()
    model.model.query_boxes[0] = torch.tensor([0.3, 0.4, 0.5, 0.6])
    with torch.no_grad():
        for parameter in model.class_heads.parameters():
            parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    AdaMixerImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), AdaMixerConfig)
    loaded, report = AutoModelForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is AdaMixerForObjectDetection and not any(report.values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    inputs = example(model)
    ours, theirs = model(**inputs), loaded(**inputs)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.pred_boxes, theirs.pred_boxes)
    core = AutoModel.from_pretrained(tmp_path)
    assert type(core) is AdaMixerModel
    assert torch.equal(core(inputs["pixel_values"], inputs["pixel_mask"]).last_hidden_state, ours.last_hidden_state)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is AdaMixerImageProcessor
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    detect = pipeline("object-detection", model=str(tmp_path))
    assert "not supported" not in caplog.text
    found = detect(Image.new("RGB", (90, 60)), threshold=0.0)
    assert len(found) == SHAPE["num_query"] and found[0]["box"].keys() == {"xmin", "ymin", "xmax", "ymax"}


def test_its_loss_is_the_one_that_transformers_finds():
    """As for its own models: `asd-hf benchmark step` times what is left when a model's replaced loss is taken away."""
    model = lively()
    assert "_loss_function" not in vars(model) and model.loss_function is adamixer_loss


def test_hidden_states_and_attentions_are_given_where_asked_for():
    model = lively("eager").eval()
    inputs = example(model)
    plain = model(**inputs)
    assert plain.hidden_states is None and plain.attentions is None
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    first, *later = output.hidden_states
    assert torch.equal(first, model.model.initial_queries(model.model.valid_sizes(**golden_inputs()))[0])
    assert torch.equal(torch.stack(later, 1), plain.intermediate_hidden_states)
    assert len(output.attentions) == len(LAYERS)
    for weights in output.attentions:
        assert weights.shape == (2, SHAPE["num_heads"], SHAPE["num_query"], SHAPE["num_query"])
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_a_configuration_without_return_dict_gives_tuples():
    model = lively().eval()
    inputs = example(model)
    expected = model(**inputs)
    model.config.return_dict = False
    for output in (model(**inputs), model(**inputs, return_dict=True).to_tuple()):
        assert isinstance(output, tuple) and len(output) == len(expected)
        assert torch.equal(output[2], expected.logits)


def test_the_trainer_of_transformers_trains_it(tmp_path):
    model, processor = lively(), AdaMixerImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})

    def picture(number):
        image, boxes = np.zeros((60, 80 + number, 3), np.uint8), [[9, 6, 18, 30], [40, 20, 20, 20]][: number % 3]
        for x, y, width, height in boxes:
            image[y : y + height, x : x + width] = 255
        objects = [{"image_id": number, "category_id": 1, "bbox": b, "area": b[2] * b[3], "iscrowd": 0} for b in boxes]
        return image, {"image_id": number, "annotations": objects}

    def collate(pictures):
        images, annotations = zip(*pictures, strict=True)
        batch = processor(list(images), annotations=list(annotations), return_tensors="pt")
        return {name: batch[name] for name in ("pixel_values", "pixel_mask", "labels")}

    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=6,
        learning_rate=1e-3,
        per_device_train_batch_size=3,
        activation_checkpointing=True,
        remove_unused_columns=False,
        eval_do_concat_batches=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    pictures = [picture(i) for i in range(3)]
    trainer = Trainer(model, arguments, collate, pictures, pictures, processing_class=processor)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    trainer.save_model()
    assert pipeline("object-detection", model=str(tmp_path))(Image.fromarray(pictures[1][0]), threshold=0.0)


def test_missing_weights_are_drawn_as_at_first_and_loaded_ones_stay(tmp_path):
    """New heads for other classes, which is how a checkpoint is tuned."""
    model = lively()
    model.save_pretrained(tmp_path)
    tuned = AutoModelForObjectDetection.from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
    for head, old in zip(tuned.class_heads, model.class_heads, strict=True):
        torch.testing.assert_close(head.out_proj.bias, torch.full((9,), -math.log(99)))
        assert head.out_proj.weight.shape == (9, SHAPE["content_dim"]) and head.out_proj.weight.any()
        assert torch.equal(head.dense.weight, old.dense.weight)
    assert torch.equal(
        tuned.model.decoder.layers[0].sampling.offset_proj.bias,
        model.model.decoder.layers[0].sampling.offset_proj.bias,
    )


def test_labels_of_the_processor_are_relative_to_the_valid_image():
    images = [Image.new("RGB", (90, 60)), Image.new("RGB", (70, 64))]
    annotations = [
        {"image_id": i, "annotations": [{"image_id": i, "category_id": 1, "bbox": [9, 6, 18, 12], "area": 1.0}]}
        for i in range(2)
    ]
    for annotation in annotations:
        annotation["annotations"][0]["iscrowd"] = 0
    batch = AdaMixerImageProcessor(do_resize=False)(images, annotations=annotations, return_tensors="pt")
    assert batch["pixel_values"].shape[2:] == (64, 90)
    for (width, height), label in zip([(90, 60), (70, 64)], batch["labels"], strict=True):
        expected = torch.tensor([[18 / width, 12 / height, 18 / width, 12 / height]])
        torch.testing.assert_close(torch.as_tensor(label["boxes"]).float(), expected)


def test_padding_moves_nothing():
    """Of the same feature maps: boxes hang on the valid image alone."""
    model, inputs = golden_model(), golden_inputs()
    wide = {"pixel_values": F.pad(inputs["pixel_values"], (0, 16)), "pixel_mask": F.pad(inputs["pixel_mask"], (0, 16))}
    expected = model(**inputs)
    assert torch.equal(model(**wide).pred_boxes, expected.pred_boxes)
    whole = {"pixel_values": inputs["pixel_values"], "pixel_mask": torch.ones(2, *PADDED)}
    assert torch.equal(model(inputs["pixel_values"]).pred_boxes, model(**whole).pred_boxes)
    assert not torch.equal(model(**whole).pred_boxes, expected.pred_boxes)


def test_without_the_auxiliary_loss_only_the_last_layer_is_supervised():
    model = lively(auxiliary_loss=False).train()
    output = model(**example(model))
    assert output.auxiliary_outputs is None
    output.loss.backward()
    assert not model.class_heads[0].out_proj.weight.grad.any()
    assert model.class_heads[-1].out_proj.weight.grad.any()


def test_a_batch_without_objects_has_a_finite_loss():
    model = lively().train()
    inputs = example(model)
    for label in inputs["labels"]:
        label["boxes"], label["class_labels"] = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    loss = model(**inputs).loss
    loss.backward()
    assert loss.isfinite() and loss > 0


@pytest.mark.parametrize(
    "config",
    [
        tiny.TIMM_RESNET | {"out_indices": [1, 2, 3, 4]},
        tiny.TIMM_RESNET | {"backbone": "test_mambaout", "out_indices": [0, 1, 2, 3]},
        {
            "model_type": "swin",
            "image_size": 64,
            "embed_dim": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 1, 1],
            "window_size": 2,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
    ],
    ids=["timm", "channels last", "swin"],
)
def test_backbones(config, tmp_path):
    values = {"d_model": 32, "feature_channels": 32, "decoder_layers": 1, "in_points": 4, "out_points": 4}
    model = AdaMixerForObjectDetection(AdaMixerConfig(backbone_config=config, num_labels=5, **values))
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 64, 96)
    assert torch.equal(model(pixels).logits, loaded(pixels).logits)
    assert get_adapter(model, AdaMixerImageProcessor()).spec.strides == (4, 8, 16, 32)
    with pytest.raises(ValueError, match="4 feature maps, feature_strides has 3"):
        AdaMixerModel(AdaMixerConfig(backbone_config=config, feature_strides=[8, 16, 32]))


@pytest.mark.parametrize("size", [(64, 96), (33, 33), (7, 300)])
def test_strides_are_those_of_the_feature_maps(size):
    """With the stem's map in the place of the last stage's, all strides are half of what is said."""
    values = {"d_model": 32, "feature_channels": 64, "decoder_layers": 1, "in_points": 4, "out_points": 4}
    right, wrong = (
        AdaMixerModel(AdaMixerConfig(backbone_config=tiny.TIMM_RESNET | {"out_indices": indices}, **values)).eval()
        for indices in ([1, 2, 3, 4], [0, 1, 2, 3])
    )
    pixels = torch.rand(1, 3, *size)
    assert right(pixels).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match="not a stride of 4: set feature_strides"):
        wrong(pixels)


def test_batch_norm_keeps_its_statistics_and_trains_its_scale():
    model = lively().train()
    norms = [m for m in model.model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [m.running_mean.clone() for m in norms]
    _, found = gradients(model)
    assert norms and all(torch.equal(m.running_mean, b) for m, b in zip(norms, before, strict=True))
    assert any("backbone" in name and "normalization.weight" in name for name in found)
    model = lively(freeze_backbone_batch_norms=False)
    norms = [m for m in model.model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    norms[0].requires_grad_(False)
    model.train()
    assert [m.training for m in norms] == [False] + [True] * (len(norms) - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 36}, "d_model is 36: it must be a multiple of 8"),
        ({"d_model": 24, "decoder_attention_heads": 5}, "of decoder_attention_heads"),
        ({"feature_channels": 48}, "feature_channels is 48: it must be a multiple of 32"),
        ({"feature_channels": 64, "num_groups": 3}, "of num_groups"),
        ({"num_queries": "many"}, "'num_queries' expected int, got str"),
        ({"auxiliary_loss": 1}, "'auxiliary_loss' expected bool, got int"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(Exception, match=message):
        AdaMixerConfig(backbone_config=backbone(8, 8, 8, 8), **options)


# -- as a detector among others ---------------------------------------------------------------------------------------


def test_strides_of_another_backbone_must_be_told():
    dilated = tiny.TIMM_RESNET | {"out_indices": [1, 2, 3, 4], "output_stride": 16}
    values = {"d_model": 32, "feature_channels": 32, "decoder_layers": 1, "in_points": 4, "out_points": 4}
    model = AdaMixerForObjectDetection(AdaMixerConfig(backbone_config=dilated, **values))
    with pytest.raises(UserError, match=r"have strides \[4, 8, 16, 16\]: set feature_strides"):
        get_adapter(model, AdaMixerImageProcessor())
    model = AdaMixerForObjectDetection(
        AdaMixerConfig(backbone_config=dilated, **values, feature_strides=[4, 8, 16, 16])
    )
    assert get_adapter(model, AdaMixerImageProcessor()).spec.strides == (4, 8, 16, 16)


def test_feature_maps_of_another_width_than_the_queries_are_not_shown_to_methods():
    adapter = get_adapter(lively().eval(), AdaMixerImageProcessor())  # 64 and 32
    assert adapter.spec.hidden_size == 32 and adapter.spec.capabilities == {"decode", "attention"}


def test_boxes_and_logits_keep_full_precision_under_autocast():
    """On the same hidden states they are those of fp32."""
    adapter, batch = get_adapter(lively().eval(), AdaMixerImageProcessor()), tiny.batch(2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = adapter(batch["pixel_values"], batch["pixel_mask"])
    size = torch.tensor([[width, height] * 2 for height, width in tiny.SIZES[:2]])[:, None]
    before = output.decode.own[2]
    for number, layer in enumerate(adapter.model.model.decoder.layers):
        offsets = layer.box_head(output.queries[number])
        positions = modeling.refine_positions(modeling.boxes_to_positions(before * size), offsets)
        before = output.boxes[number]
        torch.testing.assert_close(before, modeling.positions_to_boxes(positions) / size, rtol=1e-4, atol=1e-5)
        logits = adapter.model.class_heads[number](output.queries[number])
        torch.testing.assert_close(output.logits[number], logits, rtol=1e-5, atol=1e-5)


def test_batch_norm_of_a_student_from_scratch_is_trained_and_saved_frozen(tmp_path):
    adapter = get_adapter(lively(), AdaMixerImageProcessor())
    norms = [m for m in adapter.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert adapter.train_batch_norm(lambda name: "stages.0" not in name) < len(norms)
    adapter.backbone.encoder.stages[0].requires_grad_(False)
    adapter.model.train()
    trained = {name for name, m in adapter.backbone.named_modules() if isinstance(m, nn.BatchNorm2d) and m.training}
    assert trained and not any("stages.0" in name for name in trained)
    adapter.model.save_pretrained(tmp_path)
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path).train()
    assert not any(m.training for m in loaded.modules() if isinstance(m, nn.BatchNorm2d))


# -- from the original's checkpoints ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original():
    """A state dict under the original's names, made of a model by the inverse of the table, with a ResNet-50."""
    torch.manual_seed(0)
    config = AdaMixerConfig(num_queries=6, d_model=32, feature_channels=32, decoder_layers=2, decoder_ffn_dim=48)
    config.in_points, config.out_points, config.num_groups, config.num_labels = 5, 6, 2, 3
    model = AdaMixerForObjectDetection(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "backbone" not in name:
                parameter.normal_(0, 0.1)
    ours = model.state_dict()
    layers = {name for name in WEIGHTS if not name.startswith("roi_head.bbox_head.2.")}
    _, report = convert_state_dict({name: WEIGHTS[name] for name in layers})
    state = {name: torch.cat([ours.pop(new) for new in names]) for name, names in report.items()}
    return model, state | {name.replace("model.backbone._backbone", "backbone"): t for name, t in ours.items()}


def convert(checkpoint, folder, *arguments, capsys=None):
    torch.save(checkpoint, folder / "original.pth")
    return commands.run(
        "convert-adamixer",
        ["--checkpoint", str(folder / "original.pth"), "--output", str(folder / "model"), *arguments],
    )


def test_a_checkpoint_is_converted(original, tmp_path, capsys):
    model, state = original
    unused = {
        f"roi_head.bbox_head.{i}.instance_interactive_conv_norm.{n}": torch.ones(32) for i in (0, 1) for n in "wb"
    }
    checkpoint = {
        "state_dict": {f"module.{n}": t for n, t in (state | unused).items()},
        "meta": {"CLASSES": ("a", "b", "c")},
    }
    assert convert(checkpoint, tmp_path) == 0
    shown = capsys.readouterr().out
    assert f"{len(state)} tensors became {len(model.state_dict())}, 4 were left out" in shown
    assert shown.count("left out: module.roi_head") == 4
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path / "model")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"} and loaded.config.num_groups == 2
    assert type(AutoImageProcessor.from_pretrained(tmp_path / "model")) is AdaMixerImageProcessor


def test_names_of_classes_come_from_a_file(original, tmp_path):
    (tmp_path / "names").write_text("x\ny\nz\n")
    assert convert(original[1], tmp_path, "--classes", str(tmp_path / "names")) == 0
    assert AutoConfig.from_pretrained(tmp_path / "model").id2label[2] == "z"


def without(state, key):
    return {name: tensor for name, tensor in state.items() if name != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s, "no names of classes for a model of 3"),
        (lambda s: {"state_dict": s, "meta": {"CLASSES": ("a",)}}, "1 names of classes for a model of 3"),
        (lambda s: s | {"rpn_head.extra": torch.ones(1)}, "1 names that no AdaMixer has, rpn_head.extra"),
        (lambda s: s | {"backbone.layer2.0.conv2.conv_offset.weight": torch.ones(1)}, "deformable convolutions"),
        (lambda s: without(s, "neck.gn_out.weight"), "lacks what should become 'model.neck.group_norm.weight'"),
        (
            lambda s: {"state_dict": without(s, "neck.gn_out.bias"), "meta": {"CLASSES": ("a", "b", "c")}},
            "1 weights are missing, 0 have no place: model.neck.group_norm.bias",
        ),
        (lambda s: {n: t for n, t in s.items() if "layer4.2" not in n}, "neither a ResNet-50 nor a ResNet-101"),
        (lambda s: {"epoch": 12}, "holds no state_dict"),
        (lambda s: Path("unsafe"), "cannot be read"),
    ],
)
def test_a_checkpoint_that_is_none_is_one_clear_line(original, tmp_path, capsys, change, message):
    assert convert(change(original[1]), tmp_path) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1
