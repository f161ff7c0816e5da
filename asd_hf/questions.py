"""A question to one detector's decoder, put to another's."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .detectors.base import DetectorOutput, DetectorSpec
from .phases import phase

Question = tuple[Tensor, Tensor | None, Tensor | None]  # queries, positions, references: see `DetectorOutput.decode`


def ask(output: DetectorOutput, question: Question) -> DetectorOutput:
    """The answer of the detector that gave `output`, on the same images."""
    with phase("decode"):
        return output.decode(*question)


@torch.no_grad()
def ask_teacher(output: DetectorOutput, question: Question) -> DetectorOutput:
    """The same of a teacher: without gradient."""
    return ask(output, question)


class Translator(nn.Module):
    """Turns the teacher's questions into the student's.

    Contents and position embeddings go through a linear layer where the widths differ. References are taken as they
    are; where the teacher has none, or points where the student asks for boxes, the boxes of its first layer's answer
    stand for them, and where the student asks for points, their centres. Position embeddings that the teacher does not
    have are made of its references, as sines and a linear layer.

    Args:
        student, teacher: specs of the two.
    """

    def __init__(self, student: DetectorSpec, teacher: DetectorSpec) -> None:
        super().__init__()
        self.asks_positions, self.reference_size = student.asks_positions, student.reference_size
        widths = teacher.hidden_size, student.hidden_size
        same = widths[0] == widths[1]
        self.queries = nn.Identity() if same else nn.Linear(*widths)
        self.positions = None
        self.has_positions = teacher.asks_positions
        if student.asks_positions and teacher.asks_positions:
            self.positions = nn.Identity() if same else nn.Linear(*widths)
        elif student.asks_positions:
            self.positions = nn.Linear(4 * SINES, student.hidden_size)

    def forward(self, question: Question, answer: DetectorOutput) -> Question:
        """The student's form of a `question` (B, Q, .) to the teacher, which is detached.

        Args:
            answer: what the teacher answered.
        """
        queries, positions, references = (None if x is None else x.detach() for x in question)
        boxes = answer.boxes[0].detach()
        if references is not None and references.shape[-1] == 4:
            boxes = references
        elif references is not None and self.reference_size == 2:
            boxes = torch.cat([references, boxes[..., 2:]], -1)
        asked = None
        if self.positions is not None:
            asked = self.positions(positions if self.has_positions else sine_embedding(boxes))
        return self.queries(queries), asked, boxes[..., : self.reference_size] if self.reference_size else None


SINES = 64  # numbers that stand for one coordinate


def sine_embedding(boxes: Tensor) -> Tensor:
    """Sines and cosines (..., 4 * SINES) of coordinates (..., 4) in [0, 1], at wavelengths from 1 to 10,000 / 2 pi."""
    powers = torch.arange(SINES // 2, device=boxes.device, dtype=boxes.dtype) / (SINES // 2)
    angles = 2 * math.pi * boxes[..., None] * 10_000**-powers
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)
