"""D3ETR: predictions and attention of matched queries, and of the teacher's queries in both decoders.

Letters beside the usual: N layers that are distilled, P pairs of queries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..detectors.base import DetectorOutput, DetectorSpec, Question
from ..distances import imitation_losses, pair_costs
from ..features import AlignedMaps
from ..matching import match_sets
from ..ops import full
from ..questions import Translator
from .base import DistillationMethod, MethodConfig, align_layers, check_layers, option, take_queries

ATTENTION = {"self_attention": {"kl": 1.0, "mse": 1e4}, "cross_attention": {"kl": 1.0, "mse": 1e3}}
# This part of every distribution is spread evenly: cells that no sampling point touches would have no logarithm.
FLOOR = 0.01


@dataclass
class D3ETRConfig(MethodConfig):
    """Options of D3ETR. Weights and costs are those of TPRD, see the class. A group without weights is not asked."""

    layers: int | None = option(None, "Last decoder layers to distil, aligned from the end; default: all")

    # Adaptive matching: the student's queries and those of the teacher that they match
    adaptive_class_weight: float = option(1.0, "Weight of the divergence of the classes, summed over them")
    adaptive_box_weight: float = option(5.0, "Weight of L1, summed over coordinates")
    adaptive_giou_weight: float = option(2.0, "Weight of 1 - GIoU")
    adaptive_self_attention_weight: float | None = option(
        None, "Weight of the attention among matched queries; default: 1, or 1e4 with attention_distance mse"
    )
    adaptive_cross_attention_weight: float | None = option(
        None, "Weight of their attention to the image; default: 1, or 1e3 with attention_distance mse"
    )
    class_cost: float = option(1.0, "Weight of the classes' cross entropy in the matching")
    bbox_cost: float = option(5.0, "Weight of the L1 distance in the matching")
    giou_cost: float = option(2.0, "Weight of 1 - GIoU in the matching")

    # Fixed matching: the teacher's queries, asked of both
    fixed_class_weight: float = option(1.0, "Weight of the divergence of the classes, summed over them")
    fixed_box_weight: float = option(5.0, "Weight of L1, summed over coordinates")
    fixed_giou_weight: float = option(2.0, "Weight of 1 - GIoU")
    fixed_self_attention_weight: float | None = option(
        None, "Weight of the attention among these queries; default: 1, or 1e4 with attention_distance mse"
    )
    fixed_cross_attention_weight: float | None = option(
        None, "Weight of their attention to the image; default: 1, or 1e3 with attention_distance mse"
    )

    # The squared error of attention is about 1e-5 and asks for weights that hang on the number of queries and cells.
    attention_distance: str = option(
        "kl", "KL of attention as a distribution, or its mean squared error (TPRD)", ("kl", "mse")
    )

    def term_weight(self, term: str) -> float | None:
        weight, (_, _, kind) = super().term_weight(term), term.partition("_")
        if weight is None and kind in ATTENTION:
            return ATTENTION[kind][self.attention_distance]
        return weight

    def weights(self, group: str) -> dict[str, float]:
        """Those of a group that are not 0, by their terms."""
        terms = ("class", "box", "giou", *ATTENTION)
        return {term: weight for term in terms if (weight := self.term_weight(f"{group}_{term}"))}


class D3ETR(DistillationMethod):
    """The student's decoder imitates what the teacher's predicts and where it looks, query by query.

    Which queries correspond is settled in two ways (MixMatcher). Adaptive matching pairs the predictions of each layer
    at the least cost. Fixed matching asks the teacher's queries of the student's decoder, in a group of their own, so
    that each corresponds to itself. In both groups the pairs' classes and boxes are brought together, their attention
    to each other, and their attention to the image.

    Source: Chen et al., "D3ETR: Decoder Distillation for Detection Transformer", IJCAI 2024, arXiv 2211.09768. No code
    is public, and of the text we know the abstract and secondary accounts. Weights, costs, and attention to the image
    as the sum over queries are those of the re-implementation for Deformable DETR in github.com/xingyitong1/TPRD.

    Requires: the decoders and the attention of both; the decoders for fixed matching alone. Any widths, layers, heads
    and levels, and any two query counts: of the larger set some queries have no partner and are left out.

    Differs from the paper in (as far as we know it), and from TPRD in: attention is the mean over heads, for their
    numbers may differ, and its distance is a KL divergence by default. Attention among queries is a distribution over
    those with a partner; attention to the image one over the cells of all levels that both have, at the teacher's.
    Where a family samples points, what each reads is put on the cells around it. The class term lacks the teacher's
    entropy, so that equal predictions give 0.
    """

    config_class = D3ETRConfig
    paper = {
        "title": "D3ETR: Decoder Distillation for Detection Transformer",
        "id": "arXiv 2211.09768",
        "bibtex": "@inproceedings{chen2024d3etr,\n"
        "  title={{D3ETR}: Decoder Distillation for Detection Transformer},\n"
        "  author={Chen, Xiaokang and Chen, Jiahui and Liu, Yan and Tang, Jiaxiang and Zeng, Gang},\n"
        "  booktitle={Proceedings of the Thirty-Third International Joint Conference on Artificial Intelligence},\n"
        "  pages={668--676},\n"
        "  year={2024}\n"
        "}",
    }

    def __init__(self, config: D3ETRConfig, student: DetectorSpec, teacher: DetectorSpec) -> None:
        super().__init__(config, student, teacher)
        check_layers(config.layers, student)
        self.softmax = student.activation == "softmax"
        self.translate = Translator(student, teacher) if config.weights("fixed") else None
        # Maps of attention are aligned as feature maps are, with layers for channels, of which both have as many.
        self.maps = AlignedMaps(replace(student, hidden_size=1), replace(teacher, hidden_size=1))

    @property
    def requires(self) -> frozenset[str]:
        fixed, adaptive = (self.config.weights(group) for group in ("fixed", "adaptive"))
        needs = {"decode": fixed, "attention": ATTENTION.keys() & (fixed | adaptive).keys()}
        return frozenset(name for name, needed in needs.items() if needed)

    @property
    def teacher_reads(self) -> frozenset[str]:
        asked = {"question"} if "decode" in self.requires else set()
        return frozenset({"logits", "boxes"} | asked | (self.requires - {"decode"}))

    def compare(self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict]) -> dict[str, Tensor]:
        config, losses = self.config, {}
        layers = [theirs for _, theirs in align_layers(student, teacher, config.layers)]
        if weights := config.weights("adaptive"):
            with torch.autocast(student.logits.device.type, enabled=False):
                costs = config.class_cost, config.bbox_cost, config.giou_cost
                predictions = _predictions(student, range(-len(layers), 0)), _predictions(teacher, layers)
                pairs = match_sets(pair_costs(*predictions, self.softmax, *costs))
            losses |= self._imitate("adaptive", weights, student, teacher, layers, pairs)
        if weights := config.weights("fixed"):
            answer = self.answer(student, teacher)
            answer.mask = student.mask
            num_images, num_queries = teacher.logits.shape[1:3]
            same = torch.arange(num_queries, device=teacher.logits.device).expand(len(layers), num_images, -1)
            losses |= self._imitate("fixed", weights, answer, teacher, layers, (same, same))
        return losses

    def question(self, teacher: DetectorOutput) -> Question | None:
        return self.translate(teacher.decode.own, teacher) if self.translate else None

    def _imitate(
        self,
        group: str,
        weights: dict[str, float],
        student: DetectorOutput,
        teacher: DetectorOutput,
        layers: list[int],
        pairs: tuple[Tensor, Tensor],
    ) -> dict[str, Tensor]:
        """Weighted losses of one group: means over pairs and images, sums over layers.

        Args:
            layers: of the teacher, for the last N of the student.
            pairs: queries (N, B, P) of the student and of the teacher.
        """
        with torch.autocast(student.logits.device.type, enabled=False):
            ours = [take_queries(x, pairs[0]) for x in _predictions(student, range(-len(layers), 0))]
            theirs = [take_queries(x, pairs[1]).detach() for x in _predictions(teacher, layers)]
            losses = dict(zip(("class", "box", "giou"), imitation_losses(ours, theirs, self.softmax), strict=True))
            if "self_attention" in weights:
                losses["self_attention"] = self._self_attention(student, teacher, layers, pairs)
            if "cross_attention" in weights:
                losses["cross_attention"] = self._cross_attention(student, teacher, pairs)
            return {f"d3etr_{group}_{term}": weight * losses[term] for term, weight in weights.items()}

    def _self_attention(
        self, student: DetectorOutput, teacher: DetectorOutput, layers: list[int], pairs: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Distance of the attention of each matched query to all matched ones: rows and columns are those of pairs."""
        ours = full(student.attention.queries[-len(layers) :])
        theirs = torch.stack([full(teacher.attention.queries[layer].detach()) for layer in layers])
        ours, theirs = (
            take_queries(x, index).take_along_dim(index[:, :, None], 3)  # (N, B, P, P)
            for x, index in zip((ours, theirs), pairs, strict=True)
        )
        return self._distance(ours, theirs, torch.ones_like(theirs)).mean((1, 2)).sum()

    def _cross_attention(
        self, student: DetectorOutput, teacher: DetectorOutput, pairs: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Distance of where the matched queries look, together."""
        ours, theirs = (
            replace(output, features=[look.transpose(0, 1) for look in _looks(output, index)])  # (B, N, H, W)
            for output, index in zip((student, teacher), pairs, strict=True)
        )
        levels = zip(*self.maps(ours, theirs), strict=True)
        source, target, valid = (torch.cat([level.flatten(2) for level in side], -1) for side in levels)
        # Each query's attention sums to 1, theirs to P, as far as it falls on these levels.
        return self._distance(source, target, valid.expand_as(target), pairs[0].shape[-1]).mean(0).sum()

    def _distance(self, student: Tensor, teacher: Tensor, valid: Tensor, total: int = 1) -> Tensor:
        """(...) of attention (..., K) to K queries or cells, of which those that are `valid`, 1 and not 0, count.

        Args:
            total: what attention sums to in the squared error.
        """
        smallest = torch.finfo(teacher.dtype).tiny
        student, teacher = (x / (x * valid).sum(-1, keepdim=True).clamp(min=smallest) for x in (student, teacher))
        count = valid.sum(-1, keepdim=True).clamp(min=1)
        if self.config.attention_distance == "mse":
            return ((total * (student - teacher)) ** 2 * valid / count).sum(-1)
        student, teacher = ((1 - FLOOR) * x + FLOOR / count for x in (student, teacher))
        return (teacher * (teacher / student).log() * valid).sum(-1)


def _predictions(output: DetectorOutput, layers: list[int] | range) -> tuple[Tensor, Tensor]:
    """Logits (N, B, Q, C) and boxes (N, B, Q, 4) of these layers."""
    return tuple(torch.stack([full(x[layer]) for layer in layers]) for x in (output.logits, output.boxes))


def _looks(output: DetectorOutput, index: Tensor) -> list[Tensor]:
    """Where the queries `index` (N, B, P) look, together: (N, B, H, W) a level.

    Of fewer than N layers the last one stands for the first of the N as well, as in `align_layers`.
    """
    num_layers, _, num_queries = output.attention.queries.shape[:3]
    weights = torch.zeros(*index.shape[:2], num_queries, device=index.device).scatter(2, index, 1.0)
    repeated = len(index) - num_layers
    rounds = [weights[i : i + 1] for i in range(repeated)] + [weights[max(repeated, 0) :]]
    maps = []
    for part in rounds:  # one, unless the student has more layers
        before = num_layers - len(part)
        maps.append([level[before:] for level in output.attention.look(F.pad(part, (0, 0, 0, 0, before, 0)))])
    return [torch.cat(levels) for levels in zip(*maps, strict=True)]
