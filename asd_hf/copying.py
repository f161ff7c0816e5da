"""The teacher's weights in a student of its family, where they fit."""

from __future__ import annotations

import torch
from torch import nn

from .detectors.base import DetectorAdapter
from .errors import UserError


def copy_weights(student: DetectorAdapter, teacher: DetectorAdapter) -> list[str]:
    """Copies the teacher's modules whose tensors all fit into the student, the backbone as a whole or not at all.

    Where the student has fewer layers, they take the weights of evenly spaced ones, the last always included
    (Shleifer and Rush, arXiv 2010.13002). Where it has fewer queries, it takes the first ones.

    Returns:
        Names of the student's modules that were copied.

    Raises:
        UserError: the two are of different families.
    """
    if student.spec.family != teacher.spec.family:
        raise UserError(
            f"model.student.copy_weights: a {student.spec.family} cannot take weights of a {teacher.spec.family}"
        )
    source, target = dict(teacher.model.named_modules()), dict(student.model.named_modules())
    backbone = {id(module) for module in student.backbone.modules()}
    pairs = {}
    for name, module in target.items():
        twin = source.get(_twin(name, student.layer_lists, teacher.layer_lists))
        if _tensors(module) and twin is not None and _fits(module, twin):
            pairs[name] = twin
    whole = all(
        name in pairs for name, module in target.items() if id(module) in backbone and _tensors(module)
    ) and len(state_of(teacher.backbone)) == len(state_of(student.backbone))
    copied = []
    with torch.no_grad():
        for name, twin in pairs.items():
            if whole or id(target[name]) not in backbone:
                theirs = _tensors(twin)
                for key, tensor in _tensors(target[name]).items():
                    tensor.copy_(theirs[key][: len(tensor)] if tensor.dim() else theirs[key])
                copied.append(name)
    return copied


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's own parameters and saved buffers, without those of its children."""
    return {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if "." not in name}


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Its tensors without the counters of batch norms, which frozen ones lack."""
    return {k: v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}


def _fits(module: nn.Module, twin: nn.Module) -> bool:
    ours, theirs = _tensors(module), _tensors(twin)
    if isinstance(module, nn.Embedding) and isinstance(twin, nn.Embedding):  # queries: the first rows will do
        return len(module.weight) <= len(twin.weight) and module.weight.shape[1] == twin.weight.shape[1]
    return all(name in theirs and theirs[name].shape == tensor.shape for name, tensor in ours.items())


def _twin(name: str, student_lists: dict[str, int], teacher_lists: dict[str, int]) -> str:
    """The teacher's name of the student's module `name`."""
    for prefix, layers in student_lists.items():
        if name.startswith(f"{prefix}."):
            number, *rest = name[len(prefix) + 1 :].split(".")
            number, theirs = int(number), teacher_lists[prefix]
            if number >= layers:
                number += theirs - layers
            else:
                number = round(number * (theirs - 1) / (layers - 1)) if layers > 1 else theirs - 1
            return ".".join([prefix, str(number), *rest])
    return name
