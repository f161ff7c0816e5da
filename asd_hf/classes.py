"""Classes by name: which ones teacher and student share, and class predictions brought into one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor

from .detectors.base import DetectorOutput, DetectorSpec
from .errors import UserError
from .registry import nearest


class SharedClasses:
    """The classes that teacher and student share, in the student's order, and both outputs reduced to them.

    A method sees nothing of the other classes: sigmoid columns are left out, softmax columns join "no object", which
    then means "nothing, or nothing that both know". So they are masked from the class terms, and boxes are compared
    as ever. The teacher's predictions also take the form of the student's head.

    Args:
        student, teacher: specs of the two.
        class_map: the teacher's name of a student's class, where they differ.

    Attributes:
        names: the shared classes, by the student's names.
        student_only, teacher_only: the others.

    Raises:
        UserError: nothing is shared, or `class_map` names a class that does not exist or one of the teacher's twice.
    """

    def __init__(
        self, student: DetectorSpec, teacher: DetectorSpec, class_map: Mapping[str, str] | None = None
    ) -> None:
        ours, theirs = match_classes(student.class_names, teacher.class_names, class_map)
        self.names = tuple(student.class_names[i] for i in ours)
        self.student_only = tuple(name for i, name in enumerate(student.class_names) if i not in ours)
        self.teacher_only = tuple(name for i, name in enumerate(teacher.class_names) if i not in theirs)
        self.activations = student.activation, teacher.activation
        self._columns = torch.tensor(ours), torch.tensor(theirs)
        self._all_of_student = len(ours) == len(student.class_names)
        self._same_columns = theirs == list(range(len(teacher.class_names)))
        self._labels = torch.full((len(student.class_names),), -1)  # shared index of each of the student's classes
        self._labels[ours] = torch.arange(len(ours))

    def specs(self, student: DetectorSpec, teacher: DetectorSpec) -> tuple[DetectorSpec, DetectorSpec]:
        """What a method may know of the two: the shared classes and the student's kind of head."""
        return tuple(
            replace(spec, class_names=self.names, activation=self.activations[0]) for spec in (student, teacher)
        )

    def student(self, output: DetectorOutput) -> DetectorOutput:
        """The student's output reduced to the shared classes."""
        if self._all_of_student:
            return output
        return output.map_logits(lambda logits: keep_classes(logits, self._columns[0], self.activations[0]))

    def teacher(self, output: DetectorOutput) -> DetectorOutput:
        """The teacher's output reduced to the shared classes, in the student's order and form."""
        if self._same_columns and self.activations[0] == self.activations[1]:
            return output

        def change(logits: Tensor) -> Tensor:
            kept = logits if self._same_columns else keep_classes(logits, self._columns[1], self.activations[1])
            return convert_logits(kept, self.activations[1], self.activations[0])

        return output.map_logits(change)

    def labels(self, labels: list[dict]) -> list[dict]:
        """The labels of the objects of shared classes alone, `class_labels` as indices of those."""
        if self._all_of_student:
            return labels
        shared = []
        for label in labels:
            classes = self._labels[label["class_labels"]]
            known = classes >= 0
            shared.append(label | {"class_labels": classes[known], "boxes": label["boxes"][known]})
        return shared

    def to(self, device: torch.device | str) -> SharedClasses:
        """Moves the indices, in place."""
        self._columns, self._labels = tuple(c.to(device) for c in self._columns), self._labels.to(device)
        return self


def keep_classes(logits: Tensor, columns: Tensor, activation: str) -> Tensor:
    """Logits (..., C) of the classes `columns`; those of a softmax head's others join "no object"."""
    kept = logits[..., columns]
    if activation == "sigmoid":
        return kept
    rest = logits.index_fill(-1, columns, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([kept, rest], -1)


def convert_logits(logits: Tensor, source: str, target: str) -> Tensor:
    """Logits of one kind of head as those of the other, in probability space.

    From softmax (C + 1 columns, the last "no object") to sigmoid (C columns): the same probability of each class. From
    sigmoid to softmax: "no object" has 1 minus the best probability, and the classes share the rest as the softmax of
    their logits does. (Focal heads rate each of C absent classes at some per cent, so neither the sum nor the product
    of their probabilities tells how likely an object is; the best one does.)

    Args:
        source, target: "sigmoid" or "softmax".
    """
    if source == target:
        return logits
    if source == "softmax":
        # Probabilities within 1e-7 of 1 have no finite logit in fp32.
        log_p = logits.log_softmax(-1)[..., :-1].clamp(max=-1e-7)
        return log_p - torch.log(-torch.expm1(log_p))
    best = logits.amax(-1, keepdim=True)
    return torch.cat([F.logsigmoid(best) + logits.log_softmax(-1), F.logsigmoid(-best)], -1)


def match_classes(
    names: Sequence[str],
    known: Sequence[str],
    class_map: Mapping[str, str] | None = None,
    asker: str = "the student",
    owner: str = "the teacher",
) -> tuple[list[int], list[int]]:
    """Positions of the classes that two lists share, in the first and in the second one, in the order of the first.

    Args:
        class_map: the second list's name of a class of the first, where they differ.
        asker, owner: whose `names` and `known` are, for the message.

    Raises:
        UserError: nothing is shared, or `class_map` names a class that does not exist or one of `known` twice.
    """
    class_map = dict(class_map or {})
    for who, mapped, existing in ((asker, class_map.keys(), names), (owner, class_map.values(), known)):
        for name, found in zip(mapped, find_classes(list(mapped), existing), strict=True):
            if found is None:
                raise UserError(f"model.class_map: {who} has no class {name!r}: {nearest(name, existing)}")
    rows = find_classes(rename_classes(names, class_map), known)
    ours = [i for i, row in enumerate(rows) if row is not None]
    theirs = [row for row in rows if row is not None]
    if not ours:
        raise UserError(
            f"{owner} and {asker} share no class: {owner} has {short_list(known)}, {asker} {short_list(names)}: "
            "say in model.class_map (asd-hf evaluate: --class-map) which are the same"
        )
    for i, row in zip(ours, theirs, strict=True):
        if theirs.count(row) > 1:
            raise UserError(
                f"two classes of {asker}, one of them {names[i]!r}, are {known[row]!r} of {owner}: correct "
                "model.class_map"
            )
    return ours, theirs


def align_classes(
    names: Sequence[str], known: Sequence[str], asker: str = "the student", owner: str = "the teacher"
) -> LongTensor:
    """Which of the `known` classes each of `names` is: case, outer spaces, `_` and `-` make no difference.

    Args:
        asker, owner: whose `names` and `known` are, for the message.

    Raises:
        UserError: some of `names` are not known, or one stands twice among the known.
    """
    rows = find_classes(names, known)
    missing = [name for name, row in zip(names, rows, strict=True) if row is None]
    if len(missing) == len(names):
        raise UserError(
            f"{owner} and {asker} share no class: {owner} has {short_list(known)}, {asker} {short_list(names)}"
        )
    if missing:
        raise UserError(f"{owner} lacks {len(missing)} of the {len(names)} classes of {asker}: {short_list(missing)}")
    return torch.tensor(rows)


def rename_classes(names: Sequence[str], class_map: Mapping[str, str] | None) -> list[str]:
    """`names`, those in `class_map` by their other name."""
    renamed = {class_key(name): other for name, other in (class_map or {}).items()}
    return [renamed.get(class_key(name), name) for name in names]


def find_classes(wanted: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """Where each of `wanted` stands in `known`, or None."""
    keys = [class_key(name) for name in known]
    for name in wanted:
        if keys.count(class_key(name)) > 1:
            raise UserError(f"class {name!r} stands more than once among {short_list(known)}: give it one name only")
    return [keys.index(class_key(name)) if class_key(name) in keys else None for name in wanted]


def class_key(name: str) -> str:
    """What two names of one class have in common."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def short_list(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")
