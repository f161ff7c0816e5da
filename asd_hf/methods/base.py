from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..detectors.base import DetectorOutput, DetectorSpec
from ..errors import UserError


@dataclass
class MethodConfig:
    """The knobs of one method; each method's own dataclass derives from it."""


class DistillationMethod(nn.Module):
    """One paper: how a student imitates a teacher. Its parameters are trained with the student and thrown away after.

    Class attributes:
        config_class: dataclass of the knobs.
        requires: capabilities that both detectors must have (see `DetectorSpec`).
        paper: title, id and BibTeX of the source, for the model card.
    """

    config_class: type[MethodConfig]
    requires: frozenset[str] = frozenset()
    paper: dict[str, str] = {}

    def __init__(self, config: MethodConfig, student: DetectorSpec, teacher: DetectorSpec) -> None:
        super().__init__()
        self.config = config
        self.class_names = student.class_names
        self.step = 0  # optimizer steps done so far, set by the trainer; schedules read it
        self.statistics: dict[str, Tensor] = {}  # detached scalars of the last call: logged, never optimised
        for role, spec in (("student", student), ("teacher", teacher)):
            if missing := self.requires - spec.capabilities:
                raise UserError(
                    f"{type(self).__name__} needs {', '.join(sorted(missing))} of the {role}, "
                    f"which {spec.family} cannot give"
                )

    @property
    def settled_at(self) -> int:
        """The optimizer step from which the losses have their full weight."""
        return 0

    def forward(self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict]) -> dict[str, Tensor]:
        """Named scalar losses, already weighted. Their sum is added to the detection loss; each is logged by its name.

        Both outputs have the classes of the `student` spec, in its order and in its form of logits, see
        `asd_hf.classes.SharedClasses`; an object of another class has the class label -1. No gradient may reach
        `teacher`.
        """
        raise NotImplementedError
