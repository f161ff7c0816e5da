"""Repeats a step that was left out, on the weights and batches that were kept of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from .bad_steps import BATCHES, read_batches
from .build import Parts
from .errors import UserError


def replay(parts: Parts, folder: Path) -> list[list[str]]:
    """What came out of each batch of the step in `folder`: rows of (rank and batch, what, value).

    Raises:
        UserError: the folder is not whole, or of another student or method than `parts`.
    """
    files = sorted(folder.glob(BATCHES.format(rank="*")))
    if not files or not (folder / "step.json").is_file():
        raise UserError(f"{folder} holds no step that was left out")
    trainer = parts.trainer()
    trainer._load_from_checkpoint(str(folder))
    trainer.state.global_step = json.loads((folder / "step.json").read_text(encoding="utf-8"))["step"]
    trainer.state.logging_steps = trainer.state.global_step + 2  # gradients are not measured
    model, rows = trainer.model.to(trainer.args.device).train(), []
    for file in files:
        random, batches = read_batches(file)
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["cuda"])
        for index, batch in enumerate(batches):
            name = f"{file.stem.removeprefix('batches_')}/{index}"
            with first_bad_output(model) as found, trainer.compute_loss_context_manager():
                loss, outputs = trainer.compute_loss(model, trainer._prepare_inputs(batch), return_outputs=True)
            rows += [[name, term, f"{value.item():.6g}"] for term, value in outputs.losses.items()]
            rows.append([name, "first output that is not finite", found[0] if found else "none"])
            rows.append([name, "first backward function", _backward(loss)])
            bad = [key for key, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            rows.append([name, "gradients that are not finite", f"{len(bad)}{f', as {bad[0]}' if bad else ''}"])
            model.zero_grad()
    return rows


@contextmanager
def first_bad_output(model: nn.Module) -> Iterator[list[str]]:
    """Within, gathers the names of modules that give what is not finite, in the order in which they are done."""
    found: list[str] = []

    def look(name: str):
        return lambda module, inputs, output: (
            found.append(name) if not all(map(_is_finite, _tensors(output))) else None
        )

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(output) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict | list | tuple):
        for item in output.values() if isinstance(output, dict) else output:
            yield from _tensors(item)


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _backward(loss: Tensor) -> str:
    """Of the function whose gradient is the first to be NaN, if one is."""
    if not loss.isfinite():
        return "none: the loss itself is not finite"
    loss.backward(retain_graph=True)
    try:
        with torch.autograd.detect_anomaly():
            loss.backward()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "none"
