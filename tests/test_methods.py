"""The contract that every method of the registry keeps, on tiny detectors of several families."""

from __future__ import annotations

import ast
import copy
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from asd_hf.classes import SharedClasses
from asd_hf.config import TrainingConfig
from asd_hf.criterion import DetectionCriterion
from asd_hf.data import DetectionStream, RowTransform, open_training_source
from asd_hf.detectors import get_adapter
from asd_hf.distiller import Distiller
from asd_hf.errors import UserError
from asd_hf.freezing import freeze_backbone
from asd_hf.loading import SELF_TAUGHT
from asd_hf.methods import METHODS, CombinedMethod, get_method
from asd_hf.trainer import DistillationTrainer
from tests import tiny
from tests.families import FAMILIES
from tests.matrix import make_data
from tests.tiny_data import NAMES

ROOT = Path(__file__).parents[1]
# What makes a method small enough for a test. Unknown options are errors, so a renamed one is noticed.
OPTIONS = {"asd": {"hidden_dim": 16, "key_dim": 16}, "balanced_pairs": {"trust": 0.0}}
SETTLED = 10**6  # a step at which every schedule has ended
MORE = ("kite", "owl", "dog", "pizza", "cat")  # of the student's five it knows four, in another order

PAIRS = {  # teacher, student
    "alike": ("deformable_detr", "deformable_detr"),
    "other numbers": ("wide", "deformable_detr"),
    "one map": ("detr", "deformable_detr_refine"),
    "softmax": ("rt_detr", "detr"),
    "boxes": ("lw_detr", "dab_detr"),
    "two stages": ("deformable_detr_two_stage", "rt_detr"),
    "sides": ("d_fine", "d_fine"),
    "mixers": ("adamixer", "adamixer"),
    "to a mixer": ("deformable_detr", "adamixer"),
    "no decoder": ("yolos", "conditional_detr"),
}
EQUAL = ("alike", "sides", "mixers")  # numbers of queries
UNEQUAL = [pair for pair in PAIRS if pair not in EQUAL]
NO_DECODER = {"no decoder": "which yolos cannot give"}
REFUSED: dict[str, dict[str, str]] = {  # method -> pair -> a part of the reason
    "asd": {"no decoder": "the teacher has 1 decoder layers"},
    "balanced_pairs": NO_DECODER,
    "clockdistill": NO_DECODER | dict.fromkeys(("one map", "softmax"), "takes no references"),
    "d3etr": NO_DECODER,
    "detrdistill": NO_DECODER,
    "index_pairing": dict.fromkeys(UNEQUAL, "set model.student.num_queries"),
    "kd_detr": NO_DECODER,
    "od_detr": dict.fromkeys(UNEQUAL, "set model.teacher: ema") | NO_DECODER,
    "qskd": NO_DECODER,
}


def make_detector(name, seed, **options):
    if name == "wide":
        model = tiny.deformable_detr(seed, classes=MORE, num_queries=9, d_model=64, decoder_layers=2)
        adapter = get_adapter(model, tiny.processor())
    else:
        adapter = get_adapter(*FAMILIES[name](seed=seed, **options))
    with torch.no_grad():
        for part, parameter in adapter.model.named_parameters():
            if "sampling_offsets" in part or "attention_weights" in part:  # fresh ones are the same in every model
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return adapter


def make_pair(name):
    """Student and teacher; of unequal numbers of queries unless they are to be `EQUAL`."""
    teacher_name, student_name = PAIRS[name]
    student = make_detector(student_name, 0)
    queries = {} if name in EQUAL or teacher_name == "wide" else {"num_queries": 9}
    return student, make_detector(teacher_name, 1, **queries)


def make_method(name, student, teacher, seed=0, **options):
    torch.manual_seed(seed)
    shared = SharedClasses(student.spec, teacher.spec)
    kind = get_method(name)
    method = kind(kind.config_class(**OPTIONS.get(name, {}) | options), *shared.specs(student.spec, teacher.spec))
    method.step = SETTLED
    if "attention" in method.requires:
        student.watch_attention()
    if "attention" in method.requires | method.teacher_requires:
        teacher.watch_attention()
    return method, shared


def compare(method, shared, student, teacher, batch):
    inputs = batch["pixel_values"], batch["pixel_mask"]
    ours, theirs = shared.student(student(*inputs)), shared.teacher(teacher(*inputs))
    return method(ours, theirs, shared.labels(batch["labels"]))


def served(name, pair):
    return pair not in REFUSED.get(name, {})


SERVED = [(name, pair) for name in METHODS for pair in PAIRS if served(name, pair)]


@pytest.mark.parametrize(("name", "pair"), SERVED)
def test_losses_are_finite_and_their_gradient_reaches_student_and_method_and_not_the_teacher(name, pair):
    student, teacher = make_pair(pair)
    method, shared = make_method(name, student, teacher)
    with torch.no_grad():
        for parameter in method.parameters():  # some start at zero, and shut off others
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for model in (student.model, teacher.model):
        model.requires_grad_(True)
    with_objects, without = tiny.batch(2), tiny.batch(2, seed=1, boxes=(0,))
    without["labels"][0]["labelled"] = False
    for batch in (with_objects, without):
        losses = compare(method, shared, student, teacher, batch)
        assert losses and all(loss.shape == () and loss.isfinite() for loss in losses.values()), losses
        assert all(term.startswith(name + "_") for term in losses)
        assert all(value.shape == () and not value.requires_grad for value in method.statistics.values())
        student.model.zero_grad()
        method.zero_grad()
        sum(losses.values()).backward()
        # DistributedDataParallel waits for the gradient of every parameter, whatever the batch holds.
        assert [n for n, p in method.named_parameters() if p.grad is None] == []
        assert all(p.grad is None for p in teacher.model.parameters())
        gradients = [p.grad for p in student.model.parameters() if p.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)
        if batch is with_objects:
            assert sum(bool(gradient.any()) for gradient in gradients) > 0.2 * len(gradients)
            assert [n for n, p in method.named_parameters() if not p.grad.any()] == []


@pytest.mark.parametrize(("name", "pair"), [(n, p) for n in REFUSED for p in REFUSED[n]])
def test_a_pair_that_cannot_serve_is_refused_in_one_line(name, pair):
    with pytest.raises(UserError, match=REFUSED[name][pair]) as caught:
        make_method(name, *make_pair(pair))
    assert "\n" not in str(caught.value)


# Losses against labels, or of what is generated: they are not zero where teacher and student agree.
NOT_IMITATION: dict[str, tuple[str, ...]] = {
    "asd": ("sampling",),
    "detrdistill": ("assignment_class", "assignment_box", "assignment_giou"),
    "mgd": ("generation",),
    "od_detr": ("matching_class", "auxiliary_class", "auxiliary_box", "auxiliary_giou"),
    "pseudo_labels": ("class", "box", "giou"),
}
# Each layer beside the same one, and boxes that reach beyond the image as they are.
ALIKE: dict[str, dict] = {
    "balanced_pairs": {"temperature": 1e-3},  # as good as one to one
    "detrdistill": {"clip_boxes": False},
    "index_pairing": {"clip_boxes": False},
    "kd_detr": {"teacher_layer": "same"},
}


@pytest.mark.parametrize("name", METHODS)
def test_equal_teacher_and_student_have_nothing_to_imitate(name):
    student = make_detector("deformable_detr", 0)
    teacher = get_adapter(copy.deepcopy(student.model), student.processor)
    method, shared = make_method(name, student, teacher, **ALIKE.get(name, {}))
    losses = compare(method, shared, student, teacher, tiny.batch(3))
    exempt = {f"{name}_{term}" for term in NOT_IMITATION.get(name, ())}
    assert exempt <= losses.keys()
    for term in losses.keys() - exempt:
        assert losses[term].abs() < 1e-5, term
    teacher = make_detector("deformable_detr", 1)
    method, shared = make_method(name, student, teacher)
    for term, loss in compare(method, shared, student, teacher, tiny.batch(3)).items():
        # Other teachers have something; but no query of this one has a box as near to an object as LD's region asks.
        assert loss.abs() > 1e-5 or term == "ld_region", term


@pytest.mark.parametrize("name", METHODS)
def test_state_round_trips_and_nothing_hangs_on_the_global_random_state(name):
    student, teacher = make_pair("other numbers" if served(name, "other numbers") else "alike")
    batch, results = tiny.batch(2), []
    first, shared = make_method(name, student, teacher)
    second, _ = make_method(name, student, teacher, seed=5)
    second.load_state_dict(first.state_dict())
    for seed, method in enumerate((first, second, first)):
        torch.manual_seed(seed)
        results.append(compare(method, shared, student, teacher, batch))
    assert all(torch.equal(results[0][term], other[term]) for other in results[1:] for term in results[0])


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_computed_in_full_precision_under_autocast(name):
    student, teacher = make_pair("other numbers" if served(name, "other numbers") else "alike")
    method, shared = make_method(name, student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        losses = compare(method, shared, student, teacher, tiny.batch(2))
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("name", METHODS)
def test_weight_scales_every_loss(name):
    student, teacher = make_pair("alike")
    half, shared = make_method(name, student, teacher, weight=0.5)
    whole, _ = make_method(name, student, teacher)
    half, whole = (compare(method, shared, student, teacher, tiny.batch(2)) for method in (half, whole))
    assert half.keys() == whole.keys()
    assert all(half[term].item() == pytest.approx(0.5 * whole[term].item()) for term in whole)


def train(name, folder, weight=None, attention=False):
    """Weights of a student with dropout after two steps under method `name`, or without any."""
    classes = tuple(NAMES)
    student = make_detector("deformable_detr", 0, classes=classes, dropout=0.1)
    freeze_backbone(student, -1)
    teacher = method = None
    if attention:
        student.watch_attention()
    if name is not None:
        teacher = make_detector("deformable_detr", 1, classes=classes)
        method, _ = make_method(name, student, teacher, weight=weight)
        teacher = SELF_TAUGHT if name == "od_detr" else teacher
    args = TrainingConfig(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        ema_decay=0.9,
        logging_steps=1,
    )
    data = replace(make_data(folder), unlabelled=None, teacher_size=None)
    stream = DetectionStream(open_training_source(data), RowTransform(data, training=True), batch_size=2)
    DistillationTrainer(student, teacher, method, args, train_dataset=stream).train()
    return student.model.state_dict()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Of training without a method, by whether attention is computed step by step: its last bits differ then."""
    return {
        attention: train(None, tmp_path_factory.mktemp("plain"), attention=attention) for attention in (False, True)
    }


@pytest.mark.parametrize("name", METHODS)
def test_weight_zero_is_plain_training_to_the_last_bit(name, plain, tmp_path):
    nothing, something = (train(name, tmp_path / str(weight), weight) for weight in (0.0, 1.0))
    method, _ = make_method(name, *make_pair("alike"))
    expected = plain["attention" in method.requires]
    assert all(torch.equal(expected[key], nothing[key]) for key in expected)
    assert not all(torch.equal(expected[key], something[key]) for key in expected)


def work(rank, world, path):
    """The gradients of each method on one rank's part of the batch, averaged as DistributedDataParallel does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/{world}", rank=rank, world_size=world)
    values = {}
    for boxes, name in product(((3, 0, 1, 5), (0, 0, 1, 5)), METHODS):  # an image without objects, a rank without
        # Images of one size, for the canvas would depend on the others.
        batch = tiny.batch(4, sizes=((96, 96),), boxes=boxes)
        part = slice(rank * 4 // world, (rank + 1) * 4 // world)
        batch = {key: value[part] for key, value in batch.items()}
        for label in batch["labels"]:
            label["boxes"] = label["boxes"].double()
        student, teacher = make_pair("alike")
        method, shared = make_method(name, student, teacher)
        for module in (student.model.double().requires_grad_(True), teacher.model.double(), method.double()):
            module.eval()
        losses = compare(method, shared, student, teacher, batch)
        sum(losses.values()).backward()
        values |= {f"{boxes} {term}": loss.detach() for term, loss in losses.items()}
        for module in (student.model, method):
            grads = {f"{boxes} {name} {n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
            values |= grads
    for value in values.values():
        dist.all_reduce(value)
        value /= world
    if rank == 0:
        torch.save(values, f"{path}/{world}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_with_the_doubled_batch(tmp_path):
    for world in (1, 2):
        torch.multiprocessing.start_processes(work, (world, str(tmp_path)), nprocs=world, start_method="fork")
    one, two = (torch.load(tmp_path / f"{world}.pt", weights_only=True) for world in (1, 2))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-8, atol=1e-12 + 1e-8 * value.abs().max().item(), msg=name)


def test_methods_add_up_and_keep_their_names():
    student, teacher = make_pair("other numbers")
    parts = {name: make_method(name, student, teacher)[0] for name in ("asd", "fgd")}
    shared = SharedClasses(student.spec, teacher.spec)
    alone = {}
    for method in parts.values():
        alone |= compare(method, shared, student, teacher, tiny.batch(2))
    both = CombinedMethod(parts)
    both.step = 7
    assert all(method.step == 7 for method in parts.values())
    both.step = SETTLED
    assert both.requires == parts["fgd"].requires and both.settled_at == parts["asd"].settled_at
    together = compare(both, shared, student, teacher, tiny.batch(2))
    assert together.keys() == alone.keys() and all(torch.equal(together[term], alone[term]) for term in alone)
    assert set(both.statistics) == set(parts["asd"].statistics) | set(parts["fgd"].statistics)
    with pytest.raises(UserError, match="two of the methods give a loss fgd_.*: give each a name of its own"):
        compare(CombinedMethod({"fgd": parts["fgd"], "mine": parts["fgd"]}), shared, student, teacher, tiny.batch(2))


def test_gradients_are_measured_beyond_the_predictions_where_a_method_acts_there():
    student, teacher = make_pair("alike")
    method, shared = make_method("fgd", student, teacher)
    batch = tiny.batch(2)
    with torch.no_grad():
        answer = teacher(batch["pixel_values"], batch["pixel_mask"])
    criterion = DetectionCriterion.from_config(student.model.config)
    out = Distiller(student, criterion, method, shared)(**batch, teacher=answer, measure_gradients="terms")
    losses = method(student(batch["pixel_values"], batch["pixel_mask"]), answer, batch["labels"])
    losses["distillation"] = sum(losses.values())
    assert set(out.gradient_norms) == losses.keys() | {"detection"}
    trained = [p for name, p in student.model.named_parameters() if p.requires_grad and "backbone" not in name]
    for term, loss in losses.items():
        gradients = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        norm = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]).norm()
        torch.testing.assert_close(out.gradient_norms[term], norm, rtol=1e-4, atol=0)
    assert out.gradient_norms["detection"] > 0


# -- what each method brings with it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_documentation_paper_configuration_and_table(name):
    kind = get_method(name)
    assert METHODS[name].split(":")[0] == f"asd_hf.methods.{name}"
    for heading in ("Requires:", "Differs from the paper in"):
        assert heading in kind.__doc__, heading
    assert not kind.paper or set(kind.paper) == {"title", "id", "bibtex"}
    assert list((ROOT / "configs").glob(f"*/{name}_*.yaml"))
    table = (ROOT / "docs" / "methods.md").read_text()
    assert f"| [{name}](../asd_hf/methods/{name}.py) |" in table


def test_every_file_of_methods_is_registered():
    files = {path.stem for path in (ROOT / "asd_hf" / "methods").glob("*.py")}
    assert files - {"__init__", "base", "combined"} == set(METHODS)
    for path in (ROOT / "asd_hf" / "methods").glob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())) or path.stem in ("base", "__init__"), path
