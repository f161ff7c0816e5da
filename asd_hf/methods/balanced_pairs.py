"""Balanced pairs: soft pairs of all predictions, and answers to the teacher's own queries, whose pairs are known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..detectors.base import DetectorOutput, DetectorSpec, Question
from ..distances import box_distances, class_divergence, pair_distances
from ..errors import UserError
from ..ops import full
from ..questions import Translator, point_scores
from ..sampling import Sampler
from .base import TRUST, DistillationMethod, MethodConfig, align_layers, check_layers, option, take_layers

Predictions = tuple[Tensor, Tensor]  # logits (N, Q, C) and boxes (N, Q, 4)


@dataclass
class BalancedPairsConfig(MethodConfig):
    """Options of balanced pairs. The defaults are those of docs/evidence.md."""

    layers: int | None = option(None, "Last decoder layers to distil, aligned from the end; default: all")

    # The distance of two predictions
    class_weight: float = option(1.0, "Weight of the divergence of the classes, summed over them")
    box_weight: float = option(5.0, "Weight of the L1 distance of the boxes, summed over coordinates")
    giou_weight: float = option(2.0, "Weight of 1 - GIoU of the boxes")

    # Soft pairs of the student's own predictions
    pair_weight: float = option(1.0, "Factor on the distances of soft pairs; 0 leaves them out")
    score: str = option(
        "distance",
        "What weighs the pairs: their distance; the attention of a sampler that learns as in active sampling "
        "distillation; or both",
        ("distance", "sampler", "both"),
    )
    temperature: float = option(0.3, "Of the weights: towards 0 each prediction has one partner")
    balance_iterations: int = option(
        20, "Sinkhorn iterations, after which all student predictions have nearly the same weight; 0: softmax alone"
    )
    sampling_weight: float = option(1.0, "Weight of the loss that trains the sampler")
    hidden_dim: int = option(256, "Width of the sampler's hidden layers")
    key_dim: int = option(256, "Width of the sampler's queries and keys")

    # Answers to the teacher's queries
    asked_weight: float = option(1.0, "Factor on the distances of answers; 0 leaves them out, and the extra decoding")
    asked_points: str = option(
        "score", "Share of each of the teacher's queries: its best class probability, or equal", ("score", "uniform")
    )

    trust: float = option(2.0, TRUST)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("temperature", "hidden_dim", "key_dim")
        if not self.balance_iterations >= 0:
            raise UserError(f"method.balance_iterations must be 0 or above, not {self.balance_iterations}")
        if not any((self.class_weight, self.box_weight, self.giou_weight)):
            raise UserError("all weights of balanced_pairs are 0: give one a value, or set method.name=none")
        if not (self.pair_weight or self.asked_weight):
            raise UserError("method.pair_weight and method.asked_weight are both 0: give one a value")

    def term_weight(self, term: str) -> float | None:
        if (knob := self.term_knob(term)) in ("asked_weight", "pair_weight"):
            return getattr(self, knob) * super().term_weight(term.removeprefix("asked_"))
        return super().term_weight(term)

    def term_knob(self, term: str) -> str:
        group, _, distance = term.rpartition("_")
        if distance in ("class", "box", "giou"):
            return "asked_weight" if group == "asked" else "pair_weight"
        return super().term_knob(term)


class BalancedPairs(DistillationMethod):
    """Every prediction of the teacher teaches all of the student's, by weights; and both answer the same questions.

    This project's own method, which goes beyond active sampling distillation (`asd`): nothing is matched, no order of
    queries is supposed, and their numbers may differ. Two kinds of imitation, in every decoder layer, of the teacher's
    layer that is as far from its end:

    Soft pairs. `asd` compares averages of predictions, which a blurred student satisfies too. Here the distance of
    single predictions is averaged: sum_ij w_ij d(t_i, s_j) / T, d = divergence of the classes + 5 L1 + 2 (1 - GIoU),
    T the number of the teacher's. The weights w carry no gradient; those of a teacher's prediction sum to 1. A softmax
    of -d over the student's predictions, balanced so that each of those gets the same total, makes them: near 1 where
    two predictions name one object, and what finds no object is taught to be background. `score: sampler` takes the
    attention of active sampling in its place.

    Answers. Which of the student's predictions a teacher's query stands for is known when the query itself is put to
    the student's decoder, on the image that it has encoded: its answer imitates the teacher's own. Queries count as
    much as the teacher finds an object there.

    Where the teacher is weak, it should not hold the student back: imitation fades as the student comes near the
    teacher (`trust`).

    What it owes: the sampler, the points and doing without matching to active sampling distillation (OpenReview
    hYAPU5qrwY). The weights of `score: distance` are an entropic optimal transport plan between the two sets of
    predictions (Cuturi, NeurIPS 2013, arXiv 1306.0895), cut short after some iterations; with a temperature towards 0
    it becomes the Hungarian matching of DETRDistill (Chang et al., arXiv 2211.10156), whose distance it takes. To put
    the teacher's queries to the student is KD-DETR's (Wang et al., arXiv 2211.08071, "specific sampling"); its classes
    are a softmax at a temperature, here each class stands on its own.

    Requires: the student's decoder (`decode`), unless `asked_weight` is 0. Any two query counts, widths and heads.

    Differs from the paper in: there is none.

    With equal predictions the losses of answers need not be 0 (the student's decoder has other weights), nor those of
    pairs: weights of a temperature above 0 reach neighbours too.
    """

    config_class = BalancedPairsConfig
    trains_itself = frozenset({"balanced_pairs_sampling"})

    def __init__(self, config: BalancedPairsConfig, student: DetectorSpec, teacher: DetectorSpec) -> None:
        super().__init__(config, student, teacher)
        check_layers(config.layers, student)
        self.softmax = student.activation == "softmax"
        self.sampler = None
        if config.pair_weight and config.score != "distance":
            self.sampler = Sampler(4 + len(student.class_names) + self.softmax, config.hidden_dim, config.key_dim)
        self.translator = Translator(student, teacher) if config.asked_weight else None

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"decode"} if self.config.asked_weight else ())

    @property
    def teacher_reads(self) -> frozenset[str]:
        return frozenset({"logits", "boxes"} | ({"question"} if self.config.asked_weight else set()))

    def compare(self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict]) -> dict[str, Tensor]:
        config, layers = self.config, align_layers(student, teacher, self.config.layers)
        theirs = take_layers(teacher, [layer for _, layer in layers])
        targets = full(theirs.logits).detach(), full(theirs.boxes).detach()  # (L, B, T, .)
        losses: dict[str, Tensor] = {}
        self.statistics = {}
        if config.pair_weight:
            with torch.autocast(student.logits.device.type, enabled=False):
                losses |= self._pairs(_last(student, len(layers)), targets)
        if config.asked_weight:
            told = self.answer(student, teacher)
            with torch.autocast(student.logits.device.type, enabled=False):
                losses |= self._answers(_last(told, len(layers)), targets)
        return losses

    def question(self, teacher: DetectorOutput) -> Question | None:
        return self.translator(teacher.decode.own, teacher) if self.config.asked_weight else None

    def _pairs(self, student: Predictions, teacher: Predictions) -> dict[str, Tensor]:
        """Expected distances of the pairs under the balanced weights, summed over layers, averaged over images."""
        config, count = self.config, len(student[0])
        ours, theirs = (tuple(x.flatten(0, 1) for x in side) for side in (student, teacher))  # (N, Q, .)
        distances = self._weighted(pair_distances(ours, theirs, self.softmax))  # (N, T, S) each
        losses = {}
        if self.sampler is not None:
            points = self._sampler_input(theirs)
            own = self.sampler(points, points)[:, 0].log_softmax(-1).diagonal(dim1=-2, dim2=-1)
            losses["balanced_pairs_sampling"] = config.sampling_weight * count * -own.mean()
            self.statistics["balanced_pairs/w_ii"] = own.detach().exp().mean()
        weights = self._plan(ours, theirs, distances)
        # The weights of a teacher's prediction sum to 1: all together are T an image.
        means = {name: (weights * distance).sum(-1).mean() for name, distance in distances.items()}
        self.statistics["balanced_pairs/queries_per_point"] = torch.special.entr(weights).sum(-1).exp().mean()
        return losses | {f"balanced_pairs_{name}": config.pair_weight * count * mean for name, mean in means.items()}

    def _plan(self, student: Predictions, teacher: Predictions, distances: dict[str, Tensor]) -> Tensor:
        """The weights (N, T, S) of the pairs, without gradient; `distances` are weighted."""
        config, scores = self.config, 0.0
        if config.score != "sampler":
            scores = -sum(distances.values()).detach()
        if self.sampler is not None:
            points, keys = self._sampler_input(teacher), self._sampler_input(student)
            scores = scores + self.sampler.frozen(points, keys.detach())[:, 0].detach()
        return balance(scores / config.temperature, config.balance_iterations)

    def matrices(self, student: DetectorOutput, teacher: DetectorOutput) -> dict[str, Tensor]:
        if not self.config.pair_weight:
            return {}
        ours, theirs = (tuple(full(x[-1]) for x in (side.logits, side.boxes)) for side in (student, teacher))
        distances = self._weighted(pair_distances(ours, theirs, self.softmax))
        return {"student": self._plan(ours, theirs, distances)}

    def _answers(self, student: Predictions, teacher: Predictions) -> dict[str, Tensor]:
        """Distances of the student's answers to the teacher's queries from the teacher's own, query by query."""
        (s_logits, s_boxes), (t_logits, t_boxes) = student, teacher
        shares = torch.ones_like(t_logits[..., 0])
        if self.config.asked_points == "score":
            shares = point_scores(t_logits, self.softmax)
        shares = shares / shares.sum(-1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)
        distances = class_divergence(s_logits, t_logits, self.softmax), *box_distances(s_boxes, t_boxes)
        return {
            f"balanced_pairs_asked_{name}": self.config.asked_weight * (shares * distance).sum(-1).mean(1).sum()
            for name, distance in self._weighted(distances).items()
        }

    def _weighted(self, distances: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        classes, l1, giou = distances
        config = self.config
        return {
            "class": config.class_weight * classes,
            "box": config.box_weight * l1,
            "giou": config.giou_weight * giou,
        }

    def _sampler_input(self, predictions: Predictions) -> Tensor:
        logits, boxes = predictions
        return torch.cat([boxes, logits.softmax(-1) if self.softmax else logits.sigmoid()], -1)


def balance(scores: Tensor, iterations: int) -> Tensor:
    """Weights (N, T, S) of scores: rows sum to 1; with iterations, columns to nearly T / S.

    Sinkhorn and Knopp's scaling, in logarithms (Cuturi, arXiv 1306.0895).
    """
    for _ in range(iterations):
        scores = scores.log_softmax(-2)
        scores = scores.log_softmax(-1)
    return scores.softmax(-1)


def _last(output: DetectorOutput, count: int) -> Predictions:
    """Of the last `count` layers, in fp32 at least."""
    return full(output.logits[-count:]), full(output.boxes[-count:])
