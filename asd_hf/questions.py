"""A question to one detector's decoder, put to another's; and how much each point of it counts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .detectors.base import DetectorOutput, DetectorSpec, Question
from .phases import phase


def ask(output: DetectorOutput, question: Question) -> DetectorOutput:
    """The answer of the detector that gave `output`, on the same images."""
    with phase("decode"):
        return output.decode(*question)


@torch.no_grad()
def ask_teacher(output: DetectorOutput, question: Question) -> DetectorOutput:
    """The same of a teacher: without gradient."""
    return ask(output, question)


def point_scores(logits: Tensor, softmax: bool) -> Tensor:
    """(..., Q): the best class probability of logits (..., Q, C), without "no object" of softmax heads."""
    return (logits.softmax(-1)[..., :-1] if softmax else logits.sigmoid()).amax(-1)


def point_weights(logits: Tensor, softmax: bool) -> Tensor:
    """(..., Q): `point_scores` as shares, which sum to 1 in each image."""
    scores = point_scores(logits, softmax)
    return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


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
        self.reference_size = student.reference_size
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
            question: its references may be boxes also where the teacher asks for points or for none.
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
    """Sines and cosines (..., 4 * SINES) of coordinates (..., 4) in [0, 1], at wavelengths from 1 to almost 10,000.

    So does DETR embed the positions of an image (Carion et al., arXiv 2005.12872).
    """
    powers = torch.arange(SINES // 2, device=boxes.device, dtype=boxes.dtype) / (SINES // 2)
    angles = 2 * math.pi * boxes[..., None] * 10_000**-powers
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)
