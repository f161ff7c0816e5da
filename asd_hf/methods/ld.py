"""LD: the student's distributions over the sides of its boxes imitate the teacher's.

Source: Zheng et al., "Localization Distillation for Dense Object Detection" (arXiv 2102.12252) and its code,
github.com/HikariTJU/LD, for dense detectors. No DETR of its own is public: how its parts carry over is ours.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..criterion import DetectionCriterion
from ..detectors.base import DetectorOutput, DetectorSpec, sum_over_ranks
from ..distances import class_divergence
from ..errors import UserError
from ..ops import cxcywh_to_xyxy, full, generalized_iou
from ..questions import point_scores
from ..targets import pad_labels
from .base import DistillationMethod, MethodConfig, align_layers, check_layers, option

logger = logging.getLogger(__name__)

EPSILON = 1e-4  # added to the share of each bin: rebinning leaves some with none


@dataclass
class LDConfig(MethodConfig):
    """Options of localization distillation."""

    layers: int | None = option(1, "Last decoder layers of the student to distil; null: all")  # a dense head is one
    form: str = option(
        "auto",
        "distribution: of the sides, as D-FINE and DEIMv2 predict them. discretised: a distribution made of each "
        "coordinate, far from the paper. auto: distribution if both detectors have it",
        ("auto", "distribution", "discretised"),
    )
    rebin: bool = option(
        True, "(distribution form) Bring the teacher's to the student's bins; otherwise compare bin by bin"
    )
    bins: int = option(33, "(discretised form) Bins from one edge of the image to the other")
    # The code takes the mean over bins and the sum over the many places of an object, with weights of 0.25. An object
    # has one query here, so divergences are whole and count once an object; the region has a quarter of the weight, as
    # in the code, which divides its sum by 16 and not by 4.
    main_weight: float = option(1.0, "Divergence of the sides of matched queries")
    region_weight: float = option(0.25, "Divergence of the sides in the valuable region")
    # The code's 10 is for a mean over 80 classes. As a sum the divergence of one class counts the same in any number.
    class_weight: float = option(0.125, "Divergence of the classes of matched queries, summed over classes")
    temperature: float = option(10.0, "T of the distributions of sides (code: 10)")
    class_temperature: float = option(2.0, "T of the class logits (code: 2)")
    region_threshold: float = option(
        0.5, "GIoU with an object that bounds the valuable region above; a quarter of it bounds it below"
    )

    class_cost: float = option(2.0, "Weight of the class cost when matching objects: Deformable DETR 2, DETR 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("temperature", "class_temperature")
        if self.bins < 2:
            raise UserError(f"method.bins must be 2 or more, not {self.bins}")
        if not 0 < self.region_threshold <= 1:
            raise UserError(f"method.region_threshold must be above 0 and at most 1, not {self.region_threshold}")


class LD(DistillationMethod):
    """The student learns from the teacher where the sides of a box may be, as a distribution over bins.

    Main region: the queries that teacher and student match with the same object, each weighed by the student's score.
    Valuable region: the teacher's queries without object whose best GIoU with one lies in [threshold / 4, threshold),
    weighed by it, each paired with the student's query without object whose box is nearest in L1. Classes: of the main
    region. Divergences are KL(teacher || student) at temperature T, times T^2, a mean over the four sides; they are
    summed over queries and layers and divided by the number of objects.

    Distributions of D-FINE and DEIMv2 are over distances from a box that each query chose for itself. With `rebin` the
    teacher's probability is carried over to the student's bins, whatever the boxes and bins of the two. That leaves
    bins with none, so every share of either counts as 1e-4 more. Without it the bins are compared by their number, as
    if both boxes were one.

    Other detectors predict no distribution. Their discretised form makes one of each coordinate of the corners: it
    falls off as exp(-distance / width of a bin) from the value. It knows nothing of the teacher's doubt and is no more
    than a smoothed distance of the boxes, so little is to be expected of it. With T = 10 its gradient on a sure match
    is 5 at a centre 0.01 away, 22 at 0.05 and 68 at 0.3, where the L1 of detection has a constant 5: while the student
    is far from the teacher this form outweighs its own labels. `asd-hf doctor` shows by how much.

    Requires: labels, and side distributions of both for `form: distribution`.

    Differs from the paper in: objects take the place of anchors, as told above; the threshold of the valuable region
    is fixed, where the code takes mean and deviation of the overlaps of anchors (ATSS), and GIoU stands for DIoU; the
    class divergence of sigmoid heads is one of each class apart. The code's imitation of features is left out.
    """

    config_class = LDConfig
    uses_sides = False
    paper = {
        "title": "Localization Distillation for Dense Object Detection",
        "id": "arXiv 2102.12252",
        "bibtex": "@inproceedings{ld,\n"
        "  title={Localization Distillation for Dense Object Detection},\n"
        "  author={Zheng, Zhaohui and Ye, Rongguang and Wang, Ping and Ren, Dongwei and Zuo, Wangmeng and Hou, Qibin "
        "and Cheng, Ming-Ming},\n"
        "  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},\n"
        "  year={2022}\n"
        "}",
    }

    def __init__(self, config: LDConfig, student: DetectorSpec, teacher: DetectorSpec) -> None:
        super().__init__(config, student, teacher)
        check_layers(config.layers, student)
        without = [spec.family for spec in (student, teacher) if "sides" not in spec.capabilities]
        self.uses_sides = config.form != "discretised" and not without
        if self.uses_sides:
            logger.info("ld: distribution form")
        else:
            reason = f"{without[0]} shows no distributions over sides" if without else "method.form says so"
            logger.info("ld: discretised form, because %s", reason)
        counts = len(student.side_values), len(teacher.side_values)
        if self.uses_sides and not config.rebin and counts[0] != counts[1]:
            raise UserError(
                f"method.rebin is false, but the student has {counts[0]} bins a side and the teacher {counts[1]}: "
                "set method.rebin=true"
            )
        self.softmax = student.activation == "softmax"
        self.criterion = DetectionCriterion(student.activation, config.class_cost)
        if self.uses_sides:
            self.register_buffer("student_edges", _edges(student.side_values), persistent=False)
            self.register_buffer("teacher_edges", _edges(teacher.side_values), persistent=False)

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"sides"} if self.uses_sides or self.config.form == "distribution" else ())

    def compare(self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict]) -> dict[str, Tensor]:
        config, losses = self.config, {}
        layers = align_layers(student, teacher, config.layers)
        with torch.autocast(student.logits.device.type, enabled=False):
            ours = self._read(student, [layer for layer, _ in layers])
            with torch.no_grad():
                theirs = self._read(teacher, [layer for _, layer in layers])
            matches = self.criterion.assign([ours, theirs], labels)
            num_objects = sum(len(label["class_labels"]) for label in labels)
            total, ranks = sum_over_ranks(ours.boxes.new_full((), num_objects))
            normaliser = total.clamp(min=1) / ranks
            # An object's query in each model, and whether both have one: there may be more objects than queries.
            pair = [
                _queries_of_objects(match, x.logits.shape[:3], num_objects)
                for match, x in zip(matches, (ours, theirs), strict=True)
            ]
            both = (pair[0] >= 0) & (pair[1] >= 0)
            pair = [index.clamp(min=0) for index in pair]
            if config.main_weight:
                score = point_scores(ours.logits.detach(), self.softmax).flatten()[pair[0]]
                loss = (both * score * self._side_divergence(ours, theirs, *pair)).sum()
                losses["ld_main"] = config.main_weight * loss / normaliser
            if config.region_weight:
                weight, *neighbours = self._region(ours, theirs, matches, labels)
                loss = (weight * self._side_divergence(ours, theirs, *neighbours)).sum()
                losses["ld_region"] = config.region_weight * loss / normaliser
                self.statistics = {"ld/region_queries": (weight > 0).sum() / (len(layers) * len(labels))}
            if config.class_weight:
                loss = (both * self._class_divergence(ours, theirs, *pair)).sum()
                losses["ld_class"] = config.class_weight * loss / normaliser
        return losses

    def _read(self, output: DetectorOutput, layers: list[int]) -> DetectorOutput:
        """These layers in full precision, with `sides` (layers, B, Q, 4, bins) in either form, and their frames."""
        logits, boxes = (full(torch.stack([x[i] for i in layers])) for x in (output.logits, output.boxes))
        if not self.uses_sides:
            places = torch.linspace(0, 1, self.config.bins, device=boxes.device, dtype=boxes.dtype)
            sides = -(cxcywh_to_xyxy(boxes)[..., None] - places).abs() * (self.config.bins - 1)
            return replace(output, logits=logits, boxes=boxes, sides=sides)
        sides = full(torch.stack([output.sides[i] for i in layers]))
        frames = full(output.side_frames).expand_as(boxes)
        return replace(output, logits=logits, boxes=boxes, sides=sides, side_frames=frames)

    def _class_divergence(
        self, ours: DetectorOutput, theirs: DetectorOutput, student: Tensor, teacher: Tensor
    ) -> Tensor:
        """KL (P,) of the classes of paired queries, of indices (P,) counted over layers, images and queries."""
        s_logits, t_logits = ours.logits.flatten(0, 2)[student], theirs.logits.flatten(0, 2)[teacher]
        t = self.config.class_temperature
        return t**2 * class_divergence(s_logits / t, t_logits / t, self.softmax)

    def _side_divergence(
        self, ours: DetectorOutput, theirs: DetectorOutput, student: Tensor, teacher: Tensor
    ) -> Tensor:
        """The same of the distributions over their sides, a mean over the four."""
        s_sides, t_sides = ours.sides.flatten(0, 2)[student], theirs.sides.flatten(0, 2)[teacher]  # (P, 4, bins)
        if self.uses_sides and self.config.rebin:
            frames = ours.side_frames.flatten(0, 2)[student], theirs.side_frames.flatten(0, 2)[teacher]
            edges, new_edges = self.teacher_edges.to(t_sides), self.student_edges.to(t_sides)
            shares = _carry_over(t_sides.softmax(-1), edges, _edges_in(*frames, new_edges))
            s_sides, t_sides = _floored_log(s_sides), (shares + EPSILON).log()
        t = self.config.temperature
        return t**2 * class_divergence(s_sides / t, t_sides / t, softmax=True).mean(-1)

    @torch.no_grad()
    def _region(
        self,
        ours: DetectorOutput,
        theirs: DetectorOutput,
        matches: list[tuple[Tensor, Tensor]],
        labels: list[dict],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The valuable region (layers * B * T,): the weight of each of the teacher's queries, 0 outside the region;
        the index of the student's query that it is paired with; and its own index."""
        s_free, t_free = (
            torch.ones_like(x.boxes[..., 0], dtype=torch.bool).flatten().index_fill(0, query, False)
            for x, (query, _) in zip((ours, theirs), matches, strict=True)
        )
        _, objects, there = pad_labels(labels)
        objects = cxcywh_to_xyxy(objects.to(theirs.boxes))[:, None]  # (B, 1, G, 4)
        giou = generalized_iou(cxcywh_to_xyxy(theirs.boxes)[..., None, :], objects)  # (layers, B, T, G)
        best = giou.masked_fill(~there[:, None], -1).amax(-1).flatten()
        top = self.config.region_threshold
        inside = t_free & (best >= top / 4) & (best < top)

        distance = torch.cdist(theirs.boxes, ours.boxes, p=1)  # (layers, B, T, S)
        distance = distance.masked_fill(~s_free.view(*ours.boxes.shape[:2], 1, -1), torch.inf)
        distance, nearest = distance.min(-1)
        first = torch.arange(0, s_free.numel(), ours.boxes.shape[2], device=nearest.device)  # of each image
        nearest = nearest + first.view(*nearest.shape[:2], 1)
        weight = best * (inside & distance.isfinite().flatten())
        return weight, nearest.flatten(), torch.arange(len(weight), device=weight.device)


def _queries_of_objects(match: tuple[Tensor, Tensor], shape: tuple[int, int, int], num_objects: int) -> Tensor:
    """(layers * objects,): the matched query of each object in each layer, or -1; see `DetectionCriterion.match`."""
    query, target = match
    num_layers, num_images, num_queries = shape
    place = query // (num_images * num_queries) * num_objects + target
    return query.new_full((num_layers * num_objects,), -1).scatter(0, place, query)


def _floored_log(logits: Tensor) -> Tensor:
    """log(softmax + EPSILON) with the gradient of the logarithm without it.

    Its own gradient is p / (p + EPSILON): none where the teacher is sure and the student is sure of something else.
    """
    logs = logits.log_softmax(-1)
    return logs + ((logs.exp() + EPSILON).log() - logs).detach()


def _edges(values: tuple[float, ...]) -> Tensor:
    """(bins + 1,): where the bins around these values begin and end: halfway between two of them."""
    values = torch.tensor(values)
    middle = (values[1:] + values[:-1]) / 2
    return torch.cat([2 * values[:1] - middle[:1], middle, 2 * values[-1:] - middle[-1:]])


def _edges_in(student: Tensor, teacher: Tensor, edges: Tensor) -> Tensor:
    """Where edges of the student's bins lie among those of the teacher's: (P, 4, bins + 1), of frames (P, 4).

    A side lies at centre -+ (1/2 + distance) size of its frame.
    """
    shift = student[..., :2] - teacher[..., :2]
    outwards = torch.cat([-shift, shift], -1)[..., None]
    s_size, t_size = (torch.cat([frame[..., 2:]] * 2, -1)[..., None] for frame in (student, teacher))
    return (outwards + (0.5 + edges) * s_size) / t_size.clamp(min=1e-6) - 0.5


def _carry_over(shares: Tensor, edges: Tensor, new_edges: Tensor) -> Tensor:
    """Probabilities of other bins, if that of each bin is spread evenly over it.

    Args:
        shares: (..., bins) probabilities.
        edges: (bins + 1,) of these bins.
        new_edges: (..., new bins + 1) of the others; the outermost take all that lies beyond.
    """
    inner = new_edges[..., 1:-1].contiguous()
    holder = (torch.searchsorted(edges, inner, right=True) - 1).clamp(0, len(edges) - 2)  # the bin that each lies in
    part = ((inner - edges[holder]) / (edges[holder + 1] - edges[holder])).clamp(0, 1)
    before = shares.cumsum(-1) - shares
    below = before.gather(-1, holder) + part * shares.gather(-1, holder)  # the probability below each inner edge
    return F.pad(below, (1, 0)).diff(append=torch.ones_like(below[..., :1]))
