"""What a step of training costs under each method, phase by phase, measured side by side."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import process_time

import torch
from torch import nn

from ..build import Parts
from ..config import NO_METHOD
from ..deformable_attention import FastDeformableAttention
from ..errors import UserError
from ..loading import SELF_TAUGHT
from ..methods import MethodConfig, get_method
from ..phases import Stopwatch, phase
from ..trainer import DistillationTrainer
from .sidebyside import Row, format_table, spread, take_turns

PHASES = {  # column -> phases of the step, see `Distiller` and `DistillationTrainer`
    "teacher": ("teacher",),
    "student": ("student",),
    "detection loss": ("detection loss", "detection loss/matching", "student/detection loss"),
    "extra decoding": ("method/decode",),
    "matching": ("method/matching",),
    "method's loss": ("method",),
    "backward": ("backward",),
    "optimizer": ("optimizer",),
}
OWN_FORWARD = ("extra decoding", "matching", "method's loss")
STOCK = "Transformers' own"  # its model, its loss, its labels: what its example of detection trains with
TEACHER_TOO = f"{NO_METHOD} + teacher"  # plain training, with a teacher that is asked and not heard
SETTLED = 10**9  # a step at which every schedule has ended; one of those in which `trust` compares
EMA_DECAY = 0.9998  # of a student that teaches itself, if the run has none

Seconds = dict[str, float]  # of a step, by phase


@dataclass(frozen=True, kw_only=True)
class StepCost(Row):
    """Of one method: its step against plain training's, in the same rounds.

    Attributes:
        milliseconds: by the columns of `PHASES`, medians over the rounds.
        of_teacher_too: ratio of the step to that of plain training with a bare forward pass of the teacher; None
            without a pretrained teacher.
        own_ms: what the method adds to plain training beside the teacher's forward pass: in the losses, the backward
            pass and the optimizer. The difference of whole steps: believe it only where it is well above its spread.
        own_spread_ms: from the first to the third quartile.
        own_forward_ms: the part of it before the backward pass, which is measured by itself; without answers that
            the student gives in the pass in which it predicts.
        parameters: trained with the student and thrown away.
    """

    milliseconds: dict[str, float]
    of_teacher_too: float | None
    own_ms: float
    own_spread_ms: float
    own_forward_ms: float
    parameters: int


def measure_steps(
    parts: Parts, methods: Mapping[str, Mapping[str, MethodConfig]], rounds: int, cpu_time: bool = False
) -> tuple[list[StepCost], dict[str, str]]:
    """Measures whole steps on one batch in turn, `rounds` times: Transformers' own, plain training, and each method.

    All train the same student under the same teacher, at a learning rate of 0. The first round warms up.

    Args:
        methods: by the name of the row, what `RunConfig.methods` is.
        cpu_time: counts the time that the CPU spends on this process and not what passes meanwhile.

    Returns:
        the costs, and of the methods that this pair cannot be trained by the reason, by name.

    Raises:
        UserError: plain training is refused, or `cpu_time` is asked of a GPU.
    """
    device = parts.run.training.device
    watch = make_watch(device, cpu_time)
    plain = parts.under({}, None).trainer()
    checkpoint_activations(plain)
    trainers: dict[str, DistillationTrainer] = {}
    refused: dict[str, str] = {}
    for name, configs in methods.items():
        try:
            trainers[name] = make_trainer(parts, configs)
        except UserError as error:
            refused[name] = str(error)
    taught = next((t for t in trainers.values() if t.teacher is parts.teacher), None)
    seen = taught or plain
    batch = seen._prepare_inputs(next(iter(seen.get_train_dataloader())))
    steps: dict[str, Callable[[], Seconds]] = {
        STOCK: _stock_step(plain, batch, watch),
        NO_METHOD: partial(one_step, plain, batch, watch),
    }
    if taught is not None:
        steps[TEACHER_TOO] = partial(one_step, plain, batch, watch, taught)
    for name, trainer in trainers.items():
        steps[name] = partial(one_step, trainer, batch, watch)
    for trainer in (plain, *trainers.values()):
        stand_still(trainer.create_optimizer())
    seconds = take_turns(steps, rounds)
    whole = {name: [sum(step.values()) for step in measured] for name, measured in seconds.items()}
    costs = []
    for name, measured in seconds.items():
        columns = {
            column: 1e3 * median(sum(step.get(part, 0.0) for part in parts) for step in measured)
            for column, parts in PHASES.items()
        }
        of_teacher_too = None
        if taught is not None:
            of_teacher_too = median(a / b for a, b in zip(whole[name], whole[TEACHER_TOO], strict=True))
        own = [
            step - parts.get("teacher", 0.0) - base
            for step, parts, base in zip(whole[name], measured, whole[NO_METHOD], strict=True)
        ]
        method = trainers[name].method if name in trainers else None
        costs.append(
            StepCost.of(
                name,
                whole[name],
                whole[NO_METHOD],
                str(device),
                milliseconds=columns,
                of_teacher_too=of_teacher_too,
                own_ms=1e3 * median(own),
                own_spread_ms=1e3 * spread(own),
                own_forward_ms=sum(columns[column] for column in OWN_FORWARD),
                parameters=0 if method is None else sum(p.numel() for p in method.parameters()),
            )
        )
    return costs, refused


def make_watch(device: torch.device, cpu_time: bool) -> Callable[[], Stopwatch]:
    """
    Raises:
        UserError: the CPU's time is asked of a GPU.
    """
    if cpu_time and device.type != "cpu":
        raise UserError(f"--cpu-time says nothing of work on {device}: leave it out")
    return partial(Stopwatch, device, process_time if cpu_time else None)


def make_trainer(parts: Parts, methods: Mapping[str, MethodConfig]) -> DistillationTrainer:
    """Of the same models and data under `methods`; it watches no attention yet."""
    args, self_taught = parts.run.training, any(get_method(name).self_taught for name in methods)
    decay = args.ema_decay
    args.ema_decay = (decay or EMA_DECAY) if self_taught else 0.0
    try:
        trainer = parts.under(methods, SELF_TAUGHT if self_taught else parts.run.model.teacher).trainer()
    finally:
        args.ema_decay = decay
    trainer.watch_attention(False)  # the models are shared: each step asks for what it needs
    return trainer


def checkpoint_activations(trainer: DistillationTrainer) -> None:
    """As `Trainer.train` does before its first step; of the student, which other trainers may share."""
    args = trainer.args
    if args.activation_checkpointing:
        options = dict(args.activation_checkpointing_kwargs or {})
        own = {key: options.pop(key) for key in ("every_n_layers", "offload") if key in options}
        trainer.model.activation_checkpointing_enable(activation_checkpointing_kwargs=options or None, **own)


def stand_still(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.0


def one_step(
    trainer: DistillationTrainer,
    batch: dict,
    watch: Callable[[], Stopwatch],
    taught: DistillationTrainer | None = None,
) -> Seconds:
    """Of each phase; the teacher of `taught` is asked too."""
    model = trainer.model.train()
    trainer.state.global_step, trainer.state.logging_steps = SETTLED, 2 * SETTLED  # gradients are not measured
    trainer.watch_attention()
    with watch() as measured:
        if taught is not None:
            taught.ask_teacher(batch)
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, batch)
        with phase("backward"):
            loss.backward()
        trainer._clip_grad_norm(model)
        with phase("optimizer"):
            trainer.optimizer.step()
            model.zero_grad()
    trainer.watch_attention(False)
    return dict(measured.seconds)


def _stock_step(trainer: DistillationTrainer, batch: dict, watch: Callable[[], Stopwatch]) -> Callable[[], Seconds]:
    """The step of Transformers' example of object detection on the student of `trainer` and the same batch.

    The pixels are normalised beforehand, as its image processor does while loading.
    """
    adapter, args = trainer.adapter, trainer.args
    model = adapter.model
    pixels, mask = adapter.prepare(batch["pixel_values"], batch["pixel_mask"])
    labels = [{key: label[key] for key in ("class_labels", "boxes")} for label in batch["labels"]]
    inputs = {"pixel_values": pixels, "pixel_mask": mask, "labels": labels}
    inputs = {key: value for key, value in inputs.items() if key in inspect.signature(model.forward).parameters}
    kind, options = trainer.get_optimizer_cls_and_kwargs(args, model)
    optimizer = kind([p for p in model.parameters() if p.requires_grad], **options)
    stand_still(optimizer)

    def step() -> Seconds:
        model.train()
        with watch() as measured:
            with phase("student"), trainer.compute_loss_context_manager(), _timed_loss(model), _stock_attention(model):
                loss = model(**inputs).loss
            with phase("backward"):
                loss.backward()
            with phase("optimizer"):
                nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                model.zero_grad()
        return dict(measured.seconds)

    return step


@contextmanager
def _stock_attention(model: nn.Module) -> Iterator[None]:
    """Lets Transformers' own deformable attention run during the block."""
    replaced = [module for module in model.modules() if isinstance(module, FastDeformableAttention)]
    for module in replaced:
        module.forward = module.stock.forward
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


@contextmanager
def _timed_loss(model: nn.Module) -> Iterator[None]:
    """Lets Transformers' loss train the model during the block, and marks it as a phase."""
    replaced = vars(model).pop("_loss_function", None)
    own = model.loss_function

    def timed(*args, **kwargs):
        with phase("detection loss"):
            return own(*args, **kwargs)

    model.loss_function = timed
    try:
        yield
    finally:
        del model._loss_function
        if replaced is not None:
            model.loss_function = replaced


def format_costs(costs: Sequence[StepCost], refused: Mapping[str, str]) -> str:
    """Two tables, the phases and the comparison, and the methods that were refused.

    The first method's own work is what that of the others is compared with, "-" where its spread hides it.
    """
    phases = [[cost.name, *(f"{cost.milliseconds[column]:.1f}" for column in PHASES)] for cost in costs]
    methods = [cost for cost in costs if cost.name not in (STOCK, NO_METHOD, TEACHER_TOO)]
    header = [
        "method",
        "step, ms",
        "spread",
        "of plain",
        "of plain + teacher",
        "own parameters",
        "own work, ms",
        "spread",
    ]
    header += ["own forward, ms", "of plain"]
    header += [f"of {cost.name}'s own {what}" for cost in methods[:1] for what in ("work", "forward")]
    rows = []
    for cost in costs:
        row = [cost.name, f"{cost.ours_ms:.1f}", f"{cost.ours_spread_ms:.1f}", f"{cost.ratio:.2f} x"]
        row.append("-" if cost.of_teacher_too is None else f"{cost.of_teacher_too:.2f} x")
        row += [f"{cost.parameters / 1e6:.2f}M", f"{cost.own_ms:.1f}", f"{cost.own_spread_ms:.1f}"]
        row += [f"{cost.own_forward_ms:.1f}", f"{cost.own_forward_ms / cost.reference_ms:.2%}"]
        for first in methods[:1]:
            seen = cost in methods and first.own_ms > first.own_spread_ms
            row.append(f"{cost.own_ms / first.own_ms:.1f} x" if seen else "-")
            row.append(f"{cost.own_forward_ms / first.own_forward_ms:.1f} x" if cost in methods else "-")
        rows.append(row)
    lines = [format_table(["method", *(f"{column}, ms" for column in PHASES)], phases), format_table(header, rows)]
    lines += [f"{name}: refused: {reason}" for name, reason in refused.items()]
    return "\n\n".join(lines)
