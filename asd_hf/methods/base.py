from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..detectors.base import DetectorOutput, DetectorSpec, Question
from ..errors import UserError
from ..features import pair_levels
from ..questions import ask
from ..registry import nearest
from ..trust import Trust


def option(default, text: str, choices: tuple[str, ...] | None = None):
    """A knob with its default, what it means, and its choices."""
    return field(default=default, metadata={"help": text, "choices": choices})


def name_of(part: MethodConfig | DistillationMethod) -> str:
    """The name of a method: its file's."""
    return type(part).__module__.rpartition(".")[2]


TRUST = (
    "Imitation counts trust * (1 - teacher's detection loss / student's), at most 1 and at least 0: it ends where the "
    "student has caught up; 0: it always counts 1"
)


@dataclass
class MethodConfig:
    """The knobs of one method; each method's own dataclass derives from it."""

    weight: float = option(1.0, "Factor on all losses of this method; 0 trains as if it were not there")
    trust: float = option(0.0, TRUST)

    def __post_init__(self) -> None:
        for name, spec in self.__dataclass_fields__.items():
            choices, value = spec.metadata.get("choices"), getattr(self, name)
            if choices and value not in choices:
                raise UserError(f"method.{name}: {value!r} is not a choice: {nearest(str(value), choices)}")
            counted = name.endswith(("weight", "_cost")) or name in ("ramp_start", "ramp_steps")
            if counted and isinstance(value, float | int) and not 0 <= value < math.inf:
                raise UserError(f"method.{name} must be 0 or above, not {value}")
            if name == "trust" and not 0 <= value < math.inf:
                raise UserError(f"method.trust must be 0 or above, not {value}")
            if name == "layers" and value is not None:
                self.require_positive(name)
        terms = [name.removesuffix("_weight") for name in self.__dataclass_fields__ if name.endswith("_weight")]
        weights = [weight for weight in map(self.term_weight, terms) if isinstance(weight, float | int)]
        if weights and not any(weights):
            raise UserError(f"all weights of {name_of(self)} are 0: give one a value, or set method.name=none")

    def term_weight(self, term: str) -> float | None:
        """Weight of the loss `<method>_<term>`: the knob `<term>_weight`; None if there is none.

        Overridden where a knob's default depends on another: it stays None, so that a saved configuration can be
        changed like the first one.
        """
        return getattr(self, f"{term}_weight", None)

    def term_knob(self, term: str) -> str:
        """The knob that scales the loss `<method>_<term>`, and others perhaps."""
        return f"{term}_weight"

    def require_positive(self, *names: str) -> None:
        """Raises a `UserError` for the first of these knobs that is not above 0."""
        for name in names:
            if not getattr(self, name) > 0:
                raise UserError(f"method.{name} must be above 0, not {getattr(self, name)}")


class DistillationMethod(nn.Module):
    """One paper: how a student imitates a teacher. Its parameters are trained with the student and thrown away after.

    A method gives `compare`, and in `__init__` the modules that it trains.

    Class attributes:
        config_class: dataclass of the knobs.
        requires: capabilities that both detectors must have (see `DetectorSpec`); a property where it depends on
            `config`. A method that requires nothing reaches the student through the predictions of its own queries
            alone.
        teacher_requires: capabilities that the teacher must have beyond those.
        trains_itself: losses that train the method alone; they are not scaled by `trust`.
        self_taught: the teacher must be the student's own moving average (`model.teacher: ema`).
        paper: title, id and BibTeX of the source, for the model card; empty for a control.

    Attributes:
        teacher_layers: how many of the teacher's last decoder layers `compare` reads. Those that the knob `layers`
            aligns with; all for a method without that knob, unless its `__init__` says otherwise.
        teacher_levels: which of the teacher's feature maps `compare` reads, if any: those that `AlignedMaps` pairs
            with the student's, unless its `__init__` says otherwise.
    """

    config_class: type[MethodConfig]
    requires: frozenset[str] = frozenset()
    teacher_requires: frozenset[str] = frozenset()
    trains_itself: frozenset[str] = frozenset()
    self_taught = False
    paper: dict[str, str] = {}

    def __init__(self, config: MethodConfig, student: DetectorSpec, teacher: DetectorSpec) -> None:
        super().__init__()
        self.config = config
        self.class_names = student.class_names
        layers = getattr(config, "layers", teacher.num_layers)
        self.teacher_layers = min(student.num_layers if layers is None else layers, teacher.num_layers)
        self.teacher_levels = frozenset(level for _, level in pair_levels(student, teacher))
        self.trust = Trust(config.trust, student.activation) if config.trust else None
        self.step = 0  # optimizer steps done so far, set by the trainer; schedules and random draws read it
        self.statistics: dict[str, Tensor] = {}  # detached scalars of the last call: logged, never optimised
        needed = self.requires
        for role, spec, capabilities in (
            ("student", student, needed),
            ("teacher", teacher, needed | self.teacher_requires),
        ):
            if missing := capabilities - spec.capabilities:
                raise UserError(
                    f"{name_of(self)} needs {', '.join(sorted(missing))} of the {role}, which {spec.family} cannot "
                    "give"
                )

    @property
    def teacher_reads(self) -> frozenset[str]:
        """What `compare` reads of the teacher's output: it can be trained by predictions on disk that hold this.

        "logits", "boxes", "queries", "sides" (with their frames), "question" (`decode.own`) and "features" (with
        `mask`) can be held; "attention" and "decode" (answers to questions that the method asks itself) cannot. By
        default the predictions and all that `requires` says, which may be more than is read: "decode" may be required
        of the student alone.
        """
        return frozenset({"logits", "boxes"}) | self.requires | self.teacher_requires

    @property
    def settled_at(self) -> int:
        """The optimizer step from which the losses have their full weight."""
        return 0

    def forward(self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict]) -> dict[str, Tensor]:
        """Named, weighted scalar losses. Their sum is added to the detection loss; each is logged by its name.

        Args:
            student, teacher: outputs of the same images. Both have the classes of the `student` spec, in its order
                and in its form of logits, see `asd_hf.classes.SharedClasses`.
            labels: a dictionary an image with `class_labels` (G,) and `boxes` (G, 4) of its objects of those classes,
                and `image_id`; images without labels have no objects and a false `labelled`.
        """
        losses, trust = self.compare(student, teacher, labels), 1.0
        if self.trust is not None:
            trust = self.trust(student, teacher, labels, self.step)
            self.statistics[f"{name_of(self)}/trust"] = trust
        return {
            name: self.config.weight * (loss if name in self.trains_itself else trust * loss)
            for name, loss in losses.items()
        }

    def compare(self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict]) -> dict[str, Tensor]:
        """The losses of `forward`, before `config.weight` and trust: `<method>_<term>`, each with its term's weight.

        No gradient may reach `teacher`. Losses are means over images, so that several ranks train as one; what is
        divided by a number that differs between ranks is divided by the mean of all (`detectors.base.sum_over_ranks`).
        """
        raise NotImplementedError

    def question(self, teacher: DetectorOutput) -> Question | None:
        """What `compare` asks the student's decoder beside its own queries, if that follows from the teacher's output
        alone: the student may then answer in the pass in which it predicts. None by default; `answer` is the answer.
        """
        return None

    @property
    def asks(self) -> bool:
        """Whether it may have a `question`."""
        return bool(self.config.weight) and type(self).question is not DistillationMethod.question

    def questions(self, teacher: DetectorOutput) -> dict[str, Question]:
        """The `question` by the name of the class, if there is one and the method is to change anything."""
        question = self.question(teacher) if self.asks else None
        return {} if question is None else {self._asker: question}

    def answer(self, student: DetectorOutput, teacher: DetectorOutput) -> DetectorOutput:
        """The student's answer to the `question`, which is asked now if it was not asked together with its own."""
        answer = student.answers.get(self._asker)
        return ask(student, self.question(teacher)) if answer is None else answer

    @property
    def _asker(self) -> str:
        """A name that no other method has, as `name_of` may where several stand in one file."""
        return f"{type(self).__module__}:{type(self).__qualname__}"

    def matrices(self, student: DetectorOutput, teacher: DetectorOutput) -> dict[str, Tensor]:
        """For a report: how a method without matching samples both models' queries in their last decoder layer.

        Args:
            student, teacher: as in `forward`.

        Returns:
            weights (B, P, Q) by whose Q queries they are of, "teacher" or "student"; the points P are the teacher's
            queries, and those of a point sum to 1. Empty by default: the method has no such weights.
        """
        return {}


def align_layers(student: DetectorOutput, teacher: DetectorOutput, count: int | None) -> list[tuple[int, int]]:
    """(student layer, teacher layer) of the student's last `count` decoder layers, or of all of them.

    Layers are counted from the end; where the teacher has fewer, the student's earlier ones imitate its last.
    """
    ours, theirs = len(student.logits), len(teacher.logits)
    count = ours if count is None else count
    return [(ours - back, theirs - back if back <= theirs else theirs - 1) for back in range(count, 0, -1)]


def take_layers(output: DetectorOutput, layers: Sequence[int]) -> DetectorOutput:
    """`output` with the predictions and states of these decoder layers alone."""
    logits, boxes, queries = (
        None if x is None else torch.stack([x[layer] for layer in layers])
        for x in (output.logits, output.boxes, output.queries)
    )
    return replace(output, logits=logits, boxes=boxes, queries=queries)


def take_queries(x: Tensor, index: Tensor) -> Tensor:
    """(..., P, D): of `x` (..., Q, D) the queries `index` (..., P)."""
    return x.gather(-2, index[..., None].expand(*index.shape, x.shape[-1]))  # the index is a view: none is kept


def check_layers(count: int | None, student: DetectorSpec, key: str = "layers") -> None:
    """Raises a `UserError` if the student has not `count` decoder layers."""
    if count is not None and not 1 <= count <= student.num_layers:
        raise UserError(f"method.{key} is {count}, but the student has {student.num_layers} decoder layers")
