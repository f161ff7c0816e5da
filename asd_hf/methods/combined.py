"""Several methods on one student."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..detectors.base import DetectorOutput, Question
from ..errors import UserError
from .base import DistillationMethod


class CombinedMethod(nn.Module):
    """Methods that share one teacher, each with its own weight. To the trainer it is one `DistillationMethod`.

    Args:
        methods: the methods by name.

    Raises:
        UserError: two methods were made for different classes.
    """

    def __init__(self, methods: Mapping[str, DistillationMethod]) -> None:
        super().__init__()
        # By name, so that a checkpoint finds its own; a module's name has no dots, as "package.module:Class" may.
        self.by_name = nn.ModuleDict({name.replace(".", "/"): method for name, method in methods.items()})
        self.class_names = self.methods[0].class_names
        if any(method.class_names != self.class_names for method in self.methods):
            raise UserError(f"{', '.join(methods)} were made for different classes and cannot be combined")

    @property
    def methods(self) -> list[DistillationMethod]:
        return list(self.by_name.values())

    @property
    def requires(self) -> frozenset[str]:
        return frozenset().union(*(method.requires for method in self.methods))

    @property
    def teacher_requires(self) -> frozenset[str]:
        return frozenset().union(*(method.teacher_requires for method in self.methods))

    @property
    def teacher_reads(self) -> frozenset[str]:
        return frozenset().union(*(method.teacher_reads for method in self.methods))

    @property
    def teacher_layers(self) -> int:
        return max(method.teacher_layers for method in self.methods)

    @property
    def teacher_levels(self) -> frozenset[int]:
        return frozenset().union(*(method.teacher_levels for method in self.methods))

    @property
    def self_taught(self) -> bool:
        return any(method.self_taught for method in self.methods)

    @property
    def settled_at(self) -> int:
        return max(method.settled_at for method in self.methods)

    @property
    def step(self) -> int:
        return self.methods[0].step

    @step.setter
    def step(self, step: int) -> None:
        for method in self.methods:
            method.step = step

    @property
    def statistics(self) -> dict[str, Tensor]:
        return {name: value for method in self.methods for name, value in method.statistics.items()}

    @property
    def asks(self) -> bool:
        return any(method.asks for method in self.methods)

    def questions(self, teacher: DetectorOutput) -> dict[str, Question]:
        return {name: question for method in self.methods for name, question in method.questions(teacher).items()}

    def forward(self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict]) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for method in self.methods:
            own = method(student, teacher, labels)
            if twice := own.keys() & losses.keys():
                raise UserError(f"two of the methods give a loss {min(twice)}: give each a name of its own")
            losses |= own
        return losses
