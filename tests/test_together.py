"""Questions that the student answers in the pass in which it predicts: the numbers of a pass of their own."""

import copy

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from asd_hf.classes import SharedClasses
from asd_hf.criterion import DetectionCriterion
from asd_hf.detectors import get_adapter
from asd_hf.distiller import Distiller
from asd_hf.methods import CombinedMethod, get_method
from asd_hf.methods.kd_detr import KDDETR
from tests import tiny
from tests.families import FAMILIES

TOGETHER = [name for name in FAMILIES if get_adapter(*FAMILIES[name]()).asks_together]
DOUBLE = {"rtol": 1e-9, "atol": 1e-9}


def double(name, attention="sdpa", checkpointing=False):
    """In training mode, where denoising queries stand first and layers may be checkpointed; noise is seeded."""
    adapter = get_adapter(*FAMILIES[name]())
    adapter.model.double().train()
    adapter.model.set_attn_implementation({"": attention})
    if checkpointing:
        adapter.model.activation_checkpointing_enable()
    return adapter


def double_batch():
    batch = tiny.batch(2)  # of unequal sizes
    return batch | {"labels": [label | {"boxes": label["boxes"].double()} for label in batch["labels"]]}


def see(adapter, questions=None, labels=False):
    batch = double_batch()
    torch.manual_seed(0)
    return adapter(batch["pixel_values"], batch["pixel_mask"], batch["labels"] if labels else None, questions)


def two_questions(adapter):
    """The first queries of its own question from the end, and one at random; with gradient."""
    contents, positions, references = see(adapter).decode.own
    torch.manual_seed(1)
    first = tuple(None if x is None else x[:, :7].flip(1).detach().requires_grad_() for x in (contents, positions))
    where = torch.rand(2, 4, references.shape[-1], dtype=torch.float64) * 0.6 + 0.2
    second = torch.randn_like(contents[:, :4]), None if positions is None else torch.randn_like(positions[:, :4])
    return {"first": (*first, references[:, :7].flip(1).detach()), "second": (*second, where)}


def parts(output):
    found = {key: getattr(output, key) for key in ("logits", "boxes", "queries", "sides", "side_frames")}
    return {key: x for key, x in found.items() if x is not None}


def total(*outputs):
    return sum((x**2).sum() for output in outputs for x in parts(output).values())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TOGETHER)
def test_answers_and_predictions_are_those_of_a_pass_each(name, attention):
    adapter = double(name, attention)
    questions = two_questions(adapter)
    places = [p for p in adapter.model.parameters() if p.requires_grad] + [questions["first"][0]]
    # With labels denoising queries stand first. Their own mask is in single precision, which SDPA takes for double.
    labels = adapter.own_loss and attention == "eager"
    adapter._losses = lambda *_: {}  # of Transformers: not for double precision

    def gradients(loss):
        return torch.autograd.grad(loss, places, allow_unused=True, materialize_grads=True)

    alone = see(adapter, labels=labels)
    answers = {name: alone.decode(*question) for name, question in questions.items()}
    losses = total(*answers.values()) + total(alone)
    expected = gradients(losses)
    together = see(adapter, lambda: questions, labels)
    assert together.answers.keys() == answers.keys() and not alone.answers
    for found, wanted in ((together, alone), *((together.answers[name], answers[name]) for name in answers)):
        for key, x in parts(wanted).items():
            torch.testing.assert_close(getattr(found, key), x, **DOUBLE)
    for found, wanted in zip(together.decode.own, alone.decode.own, strict=True):
        torch.testing.assert_close(found, wanted, **DOUBLE)
    again = together.answers["first"].decode(*questions["second"])  # an answer can be asked as well
    torch.testing.assert_close(again.boxes, answers["second"].boxes, **DOUBLE)
    losses = total(*together.answers.values()) + total(together)
    found = gradients(losses)
    slack = (1e-6 if name == "d_fine" else 1e-10) * max(
        x.abs().max() for x in expected
    )  # it casts to single precision
    assert all((x - y).abs().max() <= slack for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["deformable_detr", "rt_detr"])
def test_a_configuration_that_records_states_changes_nothing(name):
    adapter = double(name, "eager")
    questions = two_questions(adapter)
    expected = see(adapter, lambda: questions)
    adapter.model.config.output_hidden_states = adapter.model.config.output_attentions = True
    found = see(adapter, lambda: questions)
    for one, other in ((found, expected), (found.answers["second"], expected.answers["second"])):
        assert torch.equal(one.logits, other.logits) and torch.equal(one.boxes, other.boxes)


@pytest.mark.parametrize("name", ["deformable_detr_two_stage"])
def test_layers_computed_again_in_the_backward_pass_keep_the_queries_apart(name):
    found = []
    for checkpointing in (False, True):
        adapter = double(name, checkpointing=checkpointing)
        questions = two_questions(adapter)
        output = see(adapter, lambda questions=questions: questions)
        total(*output.answers.values(), output).backward()
        found.append([p.grad for p in adapter.model.parameters() if p.grad is not None])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **DOUBLE)


def distiller(adapter, teacher, names, weight=1.0):
    torch.manual_seed(0)
    methods = {}
    for name in names:
        kind = get_method(name)
        methods[name] = kind(kind.config_class(weight=weight), adapter.spec, teacher.spec).double()
    method = CombinedMethod(methods) if len(methods) > 1 else next(iter(methods.values()))
    criterion = None if adapter.own_loss else DetectionCriterion(adapter.spec.activation)
    return Distiller(adapter, criterion, method, SharedClasses(adapter.spec, teacher.spec))


def losses(module, told):
    batch = double_batch()
    torch.manual_seed(0)
    return module(batch["pixel_values"], batch["pixel_mask"], batch["labels"], told, measure_gradients="terms")


@pytest.mark.parametrize(
    "names", [["balanced_pairs"], ["detrdistill", "balanced_pairs"], ["kd_detr"]], ids=lambda names: "+".join(names)
)
@pytest.mark.parametrize("student", ["deformable_detr", "rt_detr"])
def test_methods_have_the_losses_of_a_pass_of_their_own(student, names, monkeypatch):
    adapter, teacher = (
        double(student, "eager"),
        get_adapter(*FAMILIES["deformable_detr"](num_queries=9, d_model=64, seed=1)),
    )
    teacher.model.double()
    told = see(teacher)
    joint = losses(distiller(adapter, teacher, names), told)
    monkeypatch.setattr(type(adapter), "asks_together", False)
    module = distiller(adapter, teacher, names)
    apart = losses(module, told)
    assert joint.losses.keys() == apart.losses.keys()
    for name, loss in apart.losses.items():
        torch.testing.assert_close(joint.losses[name], loss, rtol=1e-7, atol=1e-9)
        if name in joint.gradient_norms:
            torch.testing.assert_close(joint.gradient_norms[name], apart.gradient_norms[name], rtol=1e-6, atol=1e-8)


class First(KDDETR):
    def compare(self, *inputs):
        return {f"first_{name}": loss for name, loss in super().compare(*inputs).items()}


class Second(KDDETR):
    def compare(self, *inputs):
        return {f"second_{name}": loss for name, loss in super().compare(*inputs).items()}


def test_methods_of_one_file_have_each_their_own_answer(monkeypatch):
    adapter = double("deformable_detr", "eager")
    teacher = get_adapter(*FAMILIES["deformable_detr"](num_queries=9, d_model=64, seed=1))  # each translates
    teacher.model.double()
    told, names = see(teacher), [f"{__name__}:{kind.__name__}" for kind in (First, Second)]
    joint = losses(distiller(adapter, teacher, names), told).losses
    monkeypatch.setattr(type(adapter), "asks_together", False)
    apart = losses(distiller(adapter, teacher, names), told).losses
    assert apart["first_kd_detr_specific_box"] != apart["second_kd_detr_specific_box"]
    for name in ("first_kd_detr_specific_box", "second_kd_detr_specific_box"):
        torch.testing.assert_close(joint[name], apart[name], **DOUBLE)


def test_the_teacher_is_waited_for_before_it_is_read():
    adapter, order = double("deformable_detr"), []
    teacher = get_adapter(copy.deepcopy(adapter.model), adapter.processor)
    module = distiller(adapter, teacher, ["balanced_pairs"])
    adapter.model.model.encoder.register_forward_hook(lambda *_: order.append("encoded"))
    module.method.translator.register_forward_hook(lambda *_: order.append("asked"))
    batch = double_batch()
    module(batch["pixel_values"], batch["pixel_mask"], batch["labels"], see(teacher), lambda: order.append("joined"))
    assert order == ["encoded", "joined", "asked", "joined"]


def test_flash_attention_which_takes_no_such_mask_answers_in_a_pass_of_its_own(monkeypatch):
    adapter = double("deformable_detr")
    questions = two_questions(adapter)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", ALL_ATTENTION_FUNCTIONS["sdpa"])
    adapter.model.config._attn_implementation_internal = "flash_attention_2"  # as if it were installed
    assert not see(adapter, lambda: questions).answers


def test_who_is_watched_or_has_nothing_to_say_is_not_asked_together():
    adapter = double("deformable_detr")
    teacher = get_adapter(copy.deepcopy(adapter.model), adapter.processor)
    told = see(teacher)
    idle = distiller(adapter, teacher, ["balanced_pairs"], weight=0.0)
    assert not idle.method.questions(told)
    questions = distiller(adapter, teacher, ["balanced_pairs"]).method.questions(told)
    assert len(questions) == 1 and see(adapter, lambda: questions).answers
    adapter.watch_attention()
    watched = see(adapter, lambda: questions)
    assert not watched.answers and watched.attention.queries.shape[-1] == adapter.spec.num_queries
