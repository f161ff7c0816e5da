"""What detectors tell methods beyond their predictions: the canvas, and answers to other questions."""

from copy import deepcopy
from functools import cache

import pytest
import torch
from transformers.models.d_fine.modeling_d_fine import distance2bbox, weighting_function

from asd_hf.detectors import get_adapter
from asd_hf.detectors.attention import splat
from asd_hf.errors import UserError
from tests import tiny
from tests.families import FAMILIES, OPEN_VOCABULARY
from tests.test_families import Waits

ASKED = [name for name in FAMILIES if name != "yolos"]  # it has no decoder


built = cache(lambda name: FAMILIES[name]())


def adapter_of(name, training=False):
    adapter = get_adapter(*deepcopy(built(name)))
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
        assert told.sides.shape == (count, 4, queries, 4, 33)
        torch.testing.assert_close(told.side_frames, boxes * sizes)
        torch.testing.assert_close(torch.tensor(adapter.spec.side_values) * decoder.reg_scale, project)
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
    assert ("sides" in adapter.spec.capabilities) == known == bool(adapter.spec.side_values)
    output = ask(adapter, tiny.batch(1))
    assert (output.sides is not None) == (output.side_frames is not None) == known


# -- where the decoder looks ------------------------------------------------------------------------------------------

VARIANTS = {
    "rt_detr_v2": {"decoder_method": "discrete", "decoder_offset_scale": 0.7},
    "d_fine": {"decoder_n_points": [3, 1, 2]},
    "deimv2": {"decoder_method": "discrete", "decoder_n_points": [1, 3, 2]},
}


def watching(name, training=False, variant=False):
    model, processor = deepcopy(built(name))
    if variant:
        torch.manual_seed(0)
        model = type(model)(type(model.config)(**model.config.to_dict() | VARIANTS[name]))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not parameter.any() or "decoder.layers" in key and "attn" in key and parameter.dim() > 1:
                parameter.normal_(0, 0.3)  # fresh attention hardly depends on the query
    adapter = get_adapter(model.train(training), processor)
    if name in OPEN_VOCABULARY:
        adapter.prompt(tiny.CLASSES)
    adapter.watch_attention()
    return adapter


def readers(adapter):
    """Of each decoder layer: the module that attends among queries, and the one that reads the image."""
    modules = {}
    for i, layer in enumerate(adapter.model.model.decoder.layers):
        cross = next(getattr(layer, n) for n in ("encoder_attn", "cross_attn", "sampling") if hasattr(layer, n))
        for part, module in (("queries", layer.self_attn), ("image", cross)):
            modules[i, part] = getattr(module, "self_attn", getattr(module, "cross_attn", module))  # DAB-DETR wraps
    return modules


def read_values(module, args, kwargs):
    """What each query reads (B, Q, D), and the values (B, S, D) that it reads from, of a call of Transformers' own."""
    if hasattr(module, "offset_proj"):  # AdaMixer's sampling, which has no values but the cells (B, G, S, c)
        contents, positions, cells, levels = args
        values = cells.detach().transpose(1, 2).flatten(2).requires_grad_()
        cells = values.unflatten(2, (cells.shape[1], -1)).transpose(1, 2)
        return module(contents, positions, cells, levels)[0].flatten(2), values
    value = next((getattr(module, n) for n in ("v_proj", "value_proj", "value") if hasattr(module, n)), None)
    output = next((getattr(module, n) for n in ("o_proj", "out_proj", "output_proj") if hasattr(module, n)), None)
    probes, hooks = [], []
    if hasattr(module, "sampling_offsets"):
        kwargs = kwargs | {"attention_mask": None}  # it empties the padding and directs no attention
    if value is None:
        key = "value_states" if "value_states" in kwargs else "encoder_hidden_states"
        probes.append(kwargs[key].detach().clone().requires_grad_())
        kwargs = kwargs | {key: probes[0]}
    else:

        def probe(_, inputs, projected):
            probes.append(projected.detach().clone().requires_grad_())
            return probes[0]

        hooks.append(value.register_forward_hook(probe))
    if output is not None:
        hooks.append(output.register_forward_hook(lambda _, inputs, projected: inputs[0]))
    read = module(*args, **kwargs)[0]
    for hook in hooks:
        hook.remove()
    return read, probes[0]


def attention_of(read, values, weights):
    """Attention (B, S) of all queries together, each with its weight (B, Q): how what they read depends on what the
    cells hold. Every channel is read by the attention of its head, so the mean over channels is that over heads."""
    (gradient,) = torch.autograd.grad((read.mean(-1) * weights).sum(), values, retain_graph=True)
    return gradient.sum(-1)


def check(attention, calls, modules, features, num_layers, hidden):
    """`hidden`: how many queries the model has before (denoising) and behind (groups) those that are shown."""
    before, behind = hidden
    num_images, count = attention.queries.shape[1:3]
    assert attention.queries.shape == (num_layers, num_images, count, count)
    torch.testing.assert_close(attention.queries.sum(-1), torch.ones(num_layers, num_images, count))
    generator = torch.Generator().manual_seed(0)
    questions = [torch.eye(count)[i].expand(num_layers, num_images, -1) for i in (0, 2, count - 1)]
    questions.append(torch.randn(num_layers, num_images, count, generator=generator))
    answers = [attention.look(weights) for weights in questions]
    for maps in answers:
        assert [m.shape for m in maps] == [(num_layers, num_images, *f.shape[2:]) for f in features]
    for layer in range(num_layers):
        read, values = read_values(modules[layer, "queries"], *calls[layer, "queries"][:2])
        for query in range(count):
            row = attention_of(read, values, torch.eye(read.shape[1])[before + query])[:num_images]
            torch.testing.assert_close(attention.queries[layer, :, query], row[:, before:], rtol=1e-4, atol=1e-6)
            assert not row[:, :before].any()
        read, values = read_values(modules[layer, "image"], *calls[layer, "image"][:2])
        for weights, maps in zip(questions, answers, strict=True):
            want = attention_of(read, values, torch.nn.functional.pad(weights[layer], (before, behind)))
            want = want.split([f[0, 0].numel() for f in features], 1)
            for level, expected in zip(maps, want, strict=True):
                torch.testing.assert_close(level[layer].flatten(1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [*ASKED, *(f"{name} variant" for name in VARIANTS)])
def test_attention_is_what_transformers_reads(name, training):
    family, _, variant = name.partition(" ")
    adapter, batch = watching(family, training, bool(variant)), tiny.batch(3, sizes=((64, 128), (96, 80), (64, 64)))
    modules = readers(adapter)
    with adapter.tap(modules) as calls:
        labels = batch["labels"] if training and adapter.own_loss else None
        output = adapter(batch["pixel_values"], batch["pixel_mask"], labels)
    count = calls[0, "queries"][2][0].shape[1]
    hidden = (0, count - 12) if "group_detr" in adapter.model.config.to_dict() else (count - 12, 0)
    assert any(hidden) == (training and adapter.own_loss)
    layers = adapter.spec.num_layers
    assert name.startswith("rf_detr") or output.features[0].shape[2] != output.features[0].shape[3]
    check(output.attention, calls, modules, output.features, layers, hidden)
    with adapter.tap(modules) as calls:
        answer = output.decode(*(None if t is None else t[:, :5].flip(1) for t in output.decode.own))
    if hidden[1]:
        adapter.model.config.group_detr = 1  # one group is asked, in training mode as well
    check(answer.attention, calls, modules, output.features, layers, (0, 0))


def test_splat_is_what_bilinear_sampling_reads():
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(2, 40, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3
    points[0, :3] = torch.tensor([[0.0, 0.0], [0.5, 0.125], [1.0, 1.0]])  # a corner, the centre of a cell, a corner
    mass = torch.rand(2, 40, generator=generator, dtype=torch.float64)
    want = torch.zeros(2, 4, 7, dtype=torch.float64)
    for i in range(2):
        for (x, y), m in zip(points[i].tolist(), mass[i].tolist(), strict=True):
            for row in range(4):
                for column in range(7):
                    down, across = 1 - abs(y * 4 - 0.5 - row), 1 - abs(x * 7 - 0.5 - column)
                    want[i, row, column] += m * max(down, 0) * max(across, 0)
    torch.testing.assert_close(splat(points, mass, (4, 7)), want)
    points[0, :3] += 1e-3  # where cells meet, there is no derivative
    assert torch.autograd.gradcheck(lambda *x: splat(*x, (4, 7)), (points.requires_grad_(), mass.requires_grad_()))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_point_that_is_not_finite_shows_in_its_map_alone(value):
    points, mass = torch.full((2, 3, 2), 0.4), torch.ones(2, 3)
    for axis in (0, 1):
        bad = points.clone()
        bad[1, 2, axis] = value
        maps = splat(bad, mass, (4, 7))
        assert torch.equal(maps[0], splat(points, mass, (4, 7))[0]) and maps[1].sum().isnan()


@pytest.mark.parametrize("name", ASKED)
def test_attention_carries_gradient(name):
    adapter = watching(name, training=True)
    adapter.model.requires_grad_(True)
    output = ask(adapter, tiny.batch(2))
    weights = torch.rand(output.queries.shape[:3], generator=torch.Generator().manual_seed(0)).requires_grad_()
    parameters = dict(adapter.model.named_parameters())
    layer = output.queries.shape[0] - 1

    def reached(tensor):
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
        sources = [*parameters.values(), weights]
        gradients = torch.autograd.grad((tensor * noise).sum(), sources, retain_graph=True, allow_unused=True)
        return {key for key, g in zip([*parameters, "weights"], gradients, strict=True) if g is not None and g.any()}

    found = reached(output.attention.queries[-1])
    assert any("backbone" in key or "conv_encoder" in key for key in found)
    assert any(f"decoder.layers.{layer}.self_attn" in key for key in found)
    for level in output.attention.look(weights):
        found = reached(level)
        assert "weights" in found and any("backbone" in key or "conv_encoder" in key for key in found)
        crosses = [key for key in found if f"decoder.layers.{layer}." in key and ("attn" in key or "sampling" in key)]
        if name == "adamixer":
            assert any("offset_proj" in key for key in crosses)
        elif output.features[1:]:
            assert {"sampling_offsets", "attention_weights"} <= {key.split(".")[-2] for key in crosses}
        else:
            assert any("encoder_attn" in key or "cross_attn" in key for key in crosses)


@pytest.mark.parametrize("name", ASKED)
def test_watching_changes_neither_predictions_nor_what_is_saved(name, tmp_path):
    adapter, batch = adapter_of(name), tiny.batch(3)
    attention = adapter.model.config._attn_implementation
    before = ask(adapter, batch)
    assert before.attention is None and not adapter.with_attention
    assert before.decode(*before.decode.own).attention is None
    adapter.model.save_pretrained(tmp_path / "before")
    adapter.watch_attention()
    same(ask(adapter, batch), before, rtol=1e-5, atol=1e-5)
    adapter.watch_attention()  # again is no harm
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in adapter.model.modules()]
    after = ask(adapter, batch)
    same(after.decode(*after.decode.own), before, rtol=1e-5, atol=1e-5)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in adapter.model.modules()]
    adapter.model.save_pretrained(tmp_path / "after")
    configs = [(tmp_path / folder / "config.json").read_text() for folder in ("before", "after")]
    assert configs[0] == configs[1]
    assert type(adapter.model).from_pretrained(tmp_path / "after").config._attn_implementation == attention


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_is_a_capability(name):
    adapter = adapter_of(name)
    assert ("attention" in adapter.spec.capabilities) == (name in ASKED)
    if name not in ASKED:
        with pytest.raises(UserError, match="yolos has no decoder whose attention could be watched"):
            adapter.watch_attention()


@pytest.mark.parametrize("name", ASKED)
def test_attention_under_autocast_is_fp32(name):
    adapter = watching(name)
    with torch.autocast("cpu", torch.bfloat16):
        output = ask(adapter, tiny.batch(2))
        maps = output.attention.look(torch.ones(output.queries.shape[:3]))
    assert output.attention.queries.dtype == torch.float32 and all(m.dtype == torch.float32 for m in maps)
    sums = output.attention.queries.sum(-1)  # the weights themselves may be of bf16
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=5e-3)
    if not adapter.spec.strides[1:] and "group_detr" not in adapter.model.config.to_dict():
        torch.testing.assert_close(maps[0].sum((2, 3)), torch.full(output.queries.shape[:2], 12.0), rtol=5e-3, atol=0)


@pytest.mark.parametrize("name", ASKED)
def test_the_host_waits_for_no_attention(name):
    adapter, batch = adapter_of(name), tiny.batch(2)
    ask(adapter, batch)  # caches of constants may grow once
    with Waits() as without:
        ask(adapter, batch)
    adapter.watch_attention()
    with Waits() as watched:
        output = ask(adapter, batch)
    assert watched.count <= without.count
    weights = torch.ones(output.queries.shape[:3])
    with Waits() as looking:
        output.attention.look(weights)
    assert not looking.count
