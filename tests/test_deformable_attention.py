"""Deformable attention on a CPU gives what Transformers' own gives, and so do its gradients."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

from asd_hf import deformable_attention, use_fast_deformable_attention
from asd_hf.deformable_attention import FastDeformableAttention, sample_levels
from tests import tiny
from tests.families import FAMILIES

SIZES = [(5, 7), (3, 2), (1, 1)]
BATCH, QUERIES, HEADS, CHANNELS, POINTS = 2, 9, 3, 4, 2
CONCERNED = ("deformable_detr", "grounding_dino", "lw_detr", "rf_detr", "rt_detr")


def inputs(seed=0, dtype=torch.float64):
    """Maps, points in and around them, weights."""
    generator = torch.Generator().manual_seed(seed)
    cells = sum(height * width for height, width in SIZES)
    value = torch.randn(BATCH, cells, HEADS, CHANNELS, generator=generator, dtype=torch.float64)
    points = torch.rand(BATCH, QUERIES, HEADS, len(SIZES), POINTS, 2, generator=generator, dtype=torch.float64) * 3 - 1
    weights = torch.randn(points.shape[:-1], generator=generator, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (value, points, weights)]


def stock(value, points, weights):
    return MultiScaleDeformableAttention()(value, None, SIZES, None, points, weights, 64)


def with_gradients(function, tensors):
    found = function(*tensors)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return found, *torch.autograd.grad(found, tensors, direction.to(found.dtype))


def fast(value, points, weights):
    return sample_levels(value, SIZES, points, weights)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_transformers_own(seed):
    tensors = inputs(seed)
    torch.testing.assert_close(with_gradients(fast, tensors), with_gradients(stock, tensors), rtol=1e-12, atol=1e-12)


def test_on_the_borders_and_far_outside():
    value, points, weights = inputs()
    width, height = (torch.tensor([size[i] for size in SIZES], dtype=torch.float64)[:, None] for i in (1, 0))
    edges = torch.tensor([-1e30, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1e30, 0.25], dtype=torch.float64)  # one a query
    for place, at in ((0.0, points), (1.0, points.flip(-1))):  # before the first cell; behind the last one
        with torch.no_grad():
            for axis, size in ((0, width), (1, height)):
                at[..., axis] = ((edges[:, None, None, None] + place * size) + 0.5) / size
        mine, theirs = (with_gradients(f, [value, at, weights]) for f in (fast, stock))
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_at_the_centre_of_a_cell_it_takes_the_same_side():
    """There the slope jumps, and there the points of a new model lie: offsets are whole cells, but for rounding."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(13, 17), (7, 9)]
    scale = torch.tensor([(width, height) for height, width in sizes])[:, None]
    cells = torch.rand(1, 400, 2, 2, 4, 2, generator=generator).mul(scale).floor()
    points = ((cells + 0.5) / scale + torch.randint(-2, 3, cells.shape, generator=generator) / scale).requires_grad_()
    value = torch.randn(1, sum(h * w for h, w in sizes), 2, 8, generator=generator)
    weights = torch.rand(points.shape[:-1], generator=generator)
    mine = sample_levels(value, sizes, points, weights)
    theirs = MultiScaleDeformableAttention()(value, None, sizes, None, points, weights, 64)
    direction = torch.randn(mine.shape, generator=generator)
    mine, theirs = (torch.autograd.grad(x, points, direction)[0] for x in (mine, theirs))
    assert torch.isclose(mine, theirs, rtol=1e-3, atol=1e-3).float().mean() > 0.999


def test_only_what_is_asked_for_has_a_gradient():
    for asked in ((True, False, False), (False, True, False), (False, False, True)):
        tensors = [x.detach().requires_grad_(wanted) for x, wanted in zip(inputs(), asked, strict=True)]
        (mine,), (theirs,) = (
            torch.autograd.grad(f(*tensors).sum(), [x for x in tensors if x.requires_grad]) for f in (fast, stock)
        )
        torch.testing.assert_close(mine, theirs)


def test_what_is_not_a_number_stays_in_its_query():
    value, points, weights = (x.detach() for x in inputs())
    points[1, 4] = torch.nan
    found = fast(value, points, weights)
    assert found[1, 4].isnan().all() and found.isnan().sum() == found[1, 4].numel()


def test_tensors_may_lie_in_any_order():
    value, points, weights = (x.detach() for x in inputs())
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in (value, points, weights)]
    torch.testing.assert_close(with_gradients(fast, turned), with_gradients(stock, turned), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_has_the_same_type(autocast):
    value, points, weights = (x.detach() for x in inputs(dtype=torch.float32 if autocast else torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = value.to(torch.bfloat16)
        mine, theirs = fast(value, points, weights), stock(value, points, weights)
    assert mine.dtype == theirs.dtype
    torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=5e-2)


@pytest.fixture
def gains(monkeypatch):
    """Small as they are, the tests' models and maps are taken to gain."""
    monkeypatch.setattr(deformable_attention, "CELLS", 8)
    monkeypatch.setattr(deformable_attention, "CHANNELS", 1)


@pytest.mark.parametrize("family", CONCERNED)
def test_a_detector_answers_and_learns_the_same(family, gains):
    usual, processor = FAMILIES[family](tiny.CLASSES, 12, 0)
    model = use_fast_deformable_attention(copy.deepcopy(usual.double()))
    replaced = [m for m in model.modules() if isinstance(m, FastDeformableAttention)]
    assert replaced and use_fast_deformable_attention(model) is model
    assert [m for m in model.modules() if isinstance(m, FastDeformableAttention)] == replaced
    assert list(model.state_dict()) == list(usual.state_dict())
    seen = []
    for detector in (usual, model):
        pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        extra = {}
        if hasattr(processor, "tokenizer"):
            extra = processor.tokenizer(["cat. dog."] * 2, return_tensors="pt")
        output = detector(pixel_values=pixels, **extra)
        (output.logits.clamp(-20, 20).sigmoid().sum() + output.pred_boxes.square().sum()).backward()
        gradients = {name: p.grad for name, p in detector.named_parameters() if p.grad is not None}
        seen.append((output.logits, output.pred_boxes, gradients))
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-6, atol=1e-7)


def test_what_has_only_the_name_stays():
    foreign = type("MultiScaleDeformableAttention", (torch.nn.Linear,), {})(2, 2)
    assert type(use_fast_deformable_attention(torch.nn.Sequential(foreign))[0]) is type(foreign)


def test_compiled_it_is_left_to_transformers(gains):
    module = FastDeformableAttention(MultiScaleDeformableAttention())
    tensors = [x.detach().float() for x in inputs()]
    ran = []
    module.stock.register_forward_hook(lambda *_: ran.append("stock"))
    value, points, weights = tensors
    arguments = (value, None, SIZES, None, points, weights, 64)
    usual = module(*arguments)
    assert not ran
    exported = torch.export.export(FastDeformableAttention(MultiScaleDeformableAttention()), arguments)
    assert any("grid_sampler" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(*arguments), usual)


def test_few_queries_and_few_channels_are_left_to_transformers(gains, monkeypatch):
    module = FastDeformableAttention(MultiScaleDeformableAttention())
    ran = []
    module.stock.register_forward_hook(lambda *_: ran.append("stock"))
    value, points, weights = inputs()
    least = -(-value.shape[1] // deformable_attention.CELLS)
    for queries, stock_runs in ((least, 0), (least - 1, 1)):
        module(value, None, SIZES, None, points[:, :queries], weights[:, :queries], 64)
        assert len(ran) == stock_runs
    monkeypatch.setattr(deformable_attention, "CHANNELS", CHANNELS + 1)
    module(value, None, SIZES, None, points, weights, 64)
    assert len(ran) == 2


def test_what_is_empty_or_too_much_for_its_indices_is_left_to_transformers(gains, monkeypatch):
    module = FastDeformableAttention(MultiScaleDeformableAttention())
    value, points, weights = inputs()
    for part in ((value[:0], points[:0], weights[:0]), (value, points[:, :0], weights[:, :0])):
        found = module(part[0], None, SIZES, None, *part[1:], 64)
        assert found.shape == (len(part[0]), part[1].shape[1], HEADS * CHANNELS)
        found.sum().backward()
    ran = []
    module.stock.register_forward_hook(lambda *_: ran.append("stock"))
    for most, stock_runs in ((4 * weights.numel() + 1, 0), (4 * weights.numel(), 1), (value.numel(), 1)):
        ran.clear()
        monkeypatch.setattr(deformable_attention, "MOST", most)
        module(value, None, SIZES, None, points, weights, 64)
        assert len(ran) == stock_runs


def test_what_python_shows_once_is_not_shown_in_each_step():
    fast(*inputs()).sum().backward()
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(3):
            warnings.warn("once", stacklevel=1)
            fast(*inputs()).sum().backward()
    assert [str(warning.message) for warning in shown] == ["once"]
