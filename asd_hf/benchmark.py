"""What a step of training costs under each method, phase by phase, measured side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tqdm.auto import tqdm

from .build import Parts
from .config import NO_METHOD
from .errors import UserError
from .methods import get_method
from .phases import Stopwatch, phase
from .student import SELF_TAUGHT
from .trainer import DistillationTrainer

PHASES = {  # column -> phases of the step, see `Distiller` and `DistillationTrainer`
    "teacher": ("teacher",),
    "student": ("student",),
    "detection loss": ("detection loss", "detection loss/matching"),
    "extra decoding": ("method/decode",),
    "matching": ("method/matching",),
    "method's loss": ("method",),
    "backward": ("backward",),
}
SETTLED = 10**9  # a step at which every schedule has ended
EMA_DECAY = 0.9998  # of a student that teaches itself, if the run has none


@dataclass
class StepCost:
    """Of one method: milliseconds of a step by the columns of `PHASES`, medians over the rounds.

    Attributes:
        milliseconds: by column, and "step" for all of them together.
        ratio: of the whole step to one of plain training in the same round.
        parameters: trained with the student and thrown away.
        refused: why this pair cannot be trained by the method, if it cannot.
    """

    method: str
    milliseconds: dict[str, float]
    ratio: float
    parameters: int
    refused: str | None = None


def measure_steps(parts: Parts, methods: Sequence[str], rounds: int) -> list[StepCost]:
    """Measures one step of plain training and of each method on the same batch, in turn, `rounds` times.

    All have the same student and teacher, which do not learn meanwhile. The methods have their defaults, or the values
    that the run gives them. The first round warms up.

    Raises:
        UserError: plain training is refused.
    """
    trainers = {NO_METHOD: parts.under({}, None).trainer()}
    refused: dict[str, str] = {}
    for name in methods:
        try:
            trainers[name] = _trainer(parts, name)
        except UserError as error:
            refused[name] = str(error)
    # A batch that serves all: with the teacher's predictions, where they come from disk.
    *_, distilling = sorted(trainers.values(), key=lambda trainer: trainer.cache is not None)
    batch = distilling._prepare_inputs(next(iter(distilling.get_train_dataloader())))
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
    for _ in tqdm(range(rounds + 1), desc="rounds", unit="round", leave=False):
        for name, trainer in trainers.items():
            seconds[name].append(_one_step(trainer, batch))
    plain = [sum(step.values()) for step in seconds[NO_METHOD]]
    costs = []
    for name, trainer in trainers.items():
        steps = seconds[name][1:]
        columns = {
            column: 1e3 * median(sum(step.get(part, 0.0) for part in parts) for step in steps)
            for column, parts in PHASES.items()
        }
        whole = [sum(step.values()) for step in steps]
        columns["step"] = 1e3 * median(whole)
        ratio = median(step / base for step, base in zip(whole, plain[1:], strict=True))
        own = [] if trainer.method is None else trainer.method.parameters()
        costs.append(StepCost(name, columns, ratio, sum(p.numel() for p in own)))
    return costs + [StepCost(name, {}, math.nan, 0, reason) for name, reason in refused.items()]


def _trainer(parts: Parts, name: str) -> DistillationTrainer:
    kind, args = get_method(name), parts.run.training
    config, decay = parts.run.methods.get(name) or kind.config_class(), args.ema_decay
    args.ema_decay = (decay or EMA_DECAY) if kind.self_taught else 0.0
    try:
        return parts.under({name: config}, SELF_TAUGHT if kind.self_taught else parts.run.model.teacher).trainer()
    finally:
        args.ema_decay = decay


def _one_step(trainer: DistillationTrainer, batch: dict) -> dict[str, float]:
    """Seconds of each phase; the optimizer takes no step."""
    model = trainer.model.train()
    trainer.state.global_step, trainer.state.logging_steps = SETTLED, 2 * SETTLED  # gradients are not measured
    with Stopwatch(trainer.args.device) as watch:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, batch)
        with phase("backward"):
            loss.backward()
    model.zero_grad()
    return dict(watch.seconds)


def format_costs(costs: Sequence[StepCost]) -> str:
    """A Markdown table, which the terminal shows as well."""
    header = ["method", *(f"{column}, ms" for column in PHASES), "step, ms", "of plain", "own parameters"]
    rows = []
    for cost in costs:
        if cost.refused is None:
            numbers = [f"{cost.milliseconds[column]:.1f}" for column in (*PHASES, "step")]
            rows.append([cost.method, *numbers, f"{cost.ratio:.2f} x", f"{cost.parameters / 1e6:.2f}M"])
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for first, *others in (header, *rows):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
    lines.insert(1, "| " + " | ".join(["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]) + " |")
    lines += [f"\n{cost.method}: refused: {cost.refused}" for cost in costs if cost.refused is not None]
    return "\n".join(lines)
