"""OD-DETR: the student learns from the moving average of its own past."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..criterion import DetectionCriterion
from ..detectors.base import DetectorOutput, DetectorSpec, Question, sum_over_ranks
from ..distances import box_distances, box_iou, class_divergence
from ..errors import UserError
from ..ops import full
from ..questions import ask
from ..targets import pad_labels
from .base import DistillationMethod, MethodConfig, option, take_queries

NO_OBJECT_WEIGHT = 0.1  # of queries without object in the cross entropy of softmax heads, as in DETR


# The abstract names no weights. These are those of the detection losses, and terms against labels are normalised as
# those are. Terms of predictions are means over all queries, of which most see background: they are much smaller.
@dataclass
class ODDETRConfig(MethodConfig):
    """Options of OD-DETR. Its weights are not in the text that we could read: all defaults are our choice."""

    matching_class_weight: float = option(1.0, "Quality focal loss of queries labelled by both matches")
    matching_box_weight: float = option(5.0, "L1 of boxes that the teacher's match alone gives an object")
    matching_giou_weight: float = option(2.0, "1 - GIoU of boxes that the teacher's match alone gives an object")
    class_weight: float = option(1.0, "Class divergence of the answers to the teacher's queries, mean over queries")
    box_weight: float = option(5.0, "L1 of the boxes of these answers, mean over queries")
    giou_weight: float = option(2.0, "1 - GIoU of the boxes of these answers, mean over queries")
    auxiliary_class_weight: float = option(1.0, "Quality focal loss of the auxiliary queries")
    auxiliary_box_weight: float = option(5.0, "L1 of the auxiliary queries' boxes")
    auxiliary_giou_weight: float = option(2.0, "1 - GIoU of the auxiliary queries' boxes")
    queries_per_object: int = option(2, "Auxiliary queries of each object (paper: 2)")
    # A moving average of decay 0.9998 looks back over 5,000 steps: before, it teaches what the student began with.
    ramp_steps: int = option(5000, "Steps over which all weights grow from 0")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("queries_per_object")

    @property
    def matches(self) -> bool:
        return any((self.matching_class_weight, self.matching_box_weight, self.matching_giou_weight))

    @property
    def predicts(self) -> bool:
        return any((self.class_weight, self.box_weight, self.giou_weight))

    @property
    def groups(self) -> bool:
        return any((self.auxiliary_class_weight, self.auxiliary_box_weight, self.auxiliary_giou_weight))


class ODDETR(DistillationMethod):
    """The moving average of the student steadies what its queries are for. Three parts, all on the same queries:

    Matching: a query is labelled by its own match with the ground truth, and by that of the teacher's query of the
    same number. Prediction: the student's decoder is asked the teacher's queries, and answers as the teacher does.
    Auxiliary group: the teacher's queries that fit an object best, each as it stands after the decoder layer where it
    fits best, are asked of the student's decoder, in a group of their own, and find that object.

    Source: Wu et al., "OD-DETR: Online Distillation for Stabilizing Training of Detection Transformer", IJCAI 2024,
    arXiv 2406.05791. No code is public, and of the text we know the abstract and secondary accounts: these parts, the
    multi-target quality focal loss with IoU as labels, and two queries an object are the paper's; the rest is ours.

    Requires: the student's own moving average as teacher (`model.teacher: ema`), labels, and of both the decoder for
    the second and third part.

    Differs from the paper in (as far as we know it): the matching losses are added to the detection losses and do not
    replace them, so boxes take the teacher's match only where the query's own match gives no object; labels of both
    matches that are one class count with the better IoU; softmax heads take the cross entropy, shared evenly between
    two labels; an auxiliary query is the teacher's state after the layer that predicted the object, at the box that it
    predicted; the auxiliary group is filled up to the number of queries with the teacher's own, which have no loss, so
    that an image's losses do not depend on the others of its batch, and objects beyond this number have no auxiliary
    queries; all weights grow over `ramp_steps`.
    """

    config_class = ODDETRConfig
    self_taught = True
    paper = {
        "title": "OD-DETR: Online Distillation for Stabilizing Training of Detection Transformer",
        "id": "arXiv 2406.05791",
        "bibtex": "@inproceedings{wu2024oddetr,\n"
        "  title={{OD-DETR}: Online Distillation for Stabilizing Training of Detection Transformer},\n"
        "  author={Wu, Shengjian and Sun, Li and Li, Qingli},\n"
        "  booktitle={Proceedings of the Thirty-Third International Joint Conference on Artificial Intelligence},\n"
        "  pages={1443--1451},\n"
        "  year={2024}\n"
        "}",
    }

    def __init__(self, config: ODDETRConfig, student: DetectorSpec, teacher: DetectorSpec) -> None:
        super().__init__(config, student, teacher)
        for name in ("family", "num_layers", "num_queries", "hidden_size", "asks_positions", "reference_size"):
            ours, theirs = getattr(student, name), getattr(teacher, name)
            if ours != theirs:
                raise UserError(
                    f"od_detr is taught by the moving average of the student, but {name} is {ours} of the student and "
                    f"{theirs} of the teacher: set model.teacher: ema and training.ema_decay"
                )
        if config.queries_per_object > student.num_queries:
            raise UserError(
                f"method.queries_per_object is {config.queries_per_object}, but the student has "
                f"{student.num_queries} queries in all"
            )
        self.softmax = student.activation == "softmax"
        self.criterion = DetectionCriterion(student.activation)

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"decode"} if self.config.predicts or self.config.groups else ())

    @property
    def settled_at(self) -> int:
        return self.config.ramp_steps

    def compare(self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict]) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        # Over the mean of all ranks, so that several train as one.
        count = student.boxes.new_full((), sum(len(label["class_labels"]) for label in labels), dtype=torch.float32)
        total, num_ranks = sum_over_ranks(count)
        num_objects = total.clamp(min=1) / num_ranks
        if self.config.matches:
            losses |= self._matching(student, teacher, labels, num_objects)
        if self.config.predicts:
            losses |= self._prediction(student, teacher)
        if self.config.groups:
            losses |= self._auxiliary(student, teacher, labels, num_objects)
        ramp = min(self.step / self.config.ramp_steps, 1.0) if self.config.ramp_steps else 1.0
        return {
            name: ramp * getattr(self.config, f"{name.removeprefix('od_detr_')}_weight") * loss
            for name, loss in losses.items()
        }

    # -- (i) matching distillation -------------------------------------------------------------------------------

    def _matching(
        self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict], num_objects: Tensor
    ) -> dict[str, Tensor]:
        """Losses of each query (L, B, Q) for its own object and for that of the teacher's query.

        Sums over queries, divided by the number of objects; the cross entropy by its weights, layer by layer.
        """
        matched = self.criterion.assign([student, teacher], labels)
        with torch.autocast(student.logits.device.type, enabled=False):
            logits, boxes = full(student.logits), full(student.boxes)
            # One row more, for queries that are matched with nothing.
            classes = F.pad(torch.cat([label["class_labels"] for label in labels]), (0, 1))
            targets = F.pad(torch.cat([label["boxes"] for label in labels]).to(boxes.dtype), (0, 0, 0, 1))
            nothing = len(classes) - 1
            objects = []
            for query, target in matched:
                of_query = torch.full(boxes.shape[:3], nothing, device=boxes.device)
                of_query.view(-1)[query] = target
                objects.append(of_query)
            own, theirs = objects
            ratings = [self._rate(logits, boxes, classes[x], targets[x], x < nothing) for x in objects]
            rating = torch.maximum(*ratings)
            weight = torch.ones_like(boxes[..., 0])
            if self.softmax:
                weight = weight.masked_fill(~rating.any(-1), NO_OBJECT_WEIGHT)
            flags = [label.get("labelled", True) for label in labels]
            if not all(flags):
                weight = weight * torch.tensor(flags)[:, None].to(weight, non_blocking=True)
            class_loss = (weight * self._class_loss(logits, rating)).sum((1, 2))  # (L,)
            if self.softmax:
                total, num_ranks = sum_over_ranks(weight.sum((1, 2)))
                class_loss = class_loss / (total.clamp(min=1e-6) / num_ranks)
            else:
                class_loss = class_loss / num_objects
            l1, giou = box_distances(boxes, targets[theirs])
            there = theirs < nothing
            # The query's own object, if it has one, is what the detection losses move its box to.
            alone = there & (own == nothing)
            self.statistics = {"od_detr/same_match": (there & (own == theirs)).sum() / there.sum().clamp(min=1)}
            return {
                "od_detr_matching_class": class_loss.sum(),
                "od_detr_matching_box": (alone * l1).sum() / num_objects,
                "od_detr_matching_giou": (alone * giou).sum() / num_objects,
            }

    def _rate(self, logits: Tensor, boxes: Tensor, classes: Tensor, targets: Tensor, there: Tensor) -> Tensor:
        """What the logits (..., C) should say: the IoU of the box with its target at the target's class, else 0.

        Of softmax heads (..., C - 1): 1 at the target's class, for they know no quality.
        """
        rating = torch.zeros_like(logits[..., :-1] if self.softmax else logits)
        quality = torch.ones_like(boxes[..., 0]) if self.softmax else box_iou(boxes.detach(), targets)
        return rating.scatter(-1, classes[..., None], (quality * there)[..., None])

    def _class_loss(self, logits: Tensor, rating: Tensor) -> Tensor:
        """Quality focal loss (Li et al., arXiv 2006.04388, Eq. 4 with beta 2) of logits (..., C), summed over classes.

        It takes any number of targets a query. Of softmax heads the cross entropy, whose label is shared by them.
        """
        if not self.softmax:
            bce = F.binary_cross_entropy_with_logits(logits, rating, reduction="none")
            return ((rating - logits.sigmoid()) ** 2 * bce).sum(-1)
        named = rating.sum(-1, keepdim=True)
        target = torch.cat([rating / named.clamp(min=1), (named == 0).to(rating.dtype)], -1)
        return -(target * logits.log_softmax(-1)).sum(-1)

    # -- (ii) prediction distillation ----------------------------------------------------------------------------

    def _prediction(self, student: DetectorOutput, teacher: DetectorOutput) -> dict[str, Tensor]:
        """Distances of the student's answers to the teacher's queries from the teacher's, layers summed."""
        # In a pass of its own: while the two are equal, so are their answers, to the last bit.
        answer = ask(student, _detached(teacher.decode.own))
        with torch.autocast(student.logits.device.type, enabled=False):
            l1, giou = box_distances(full(answer.boxes), full(teacher.boxes.detach()))
            divergence = class_divergence(full(answer.logits), full(teacher.logits.detach()), self.softmax)
            distances = {"od_detr_class": divergence, "od_detr_box": l1, "od_detr_giou": giou}
            return {name: distance.mean((1, 2)).sum() for name, distance in distances.items()}

    # -- (iii) auxiliary group -----------------------------------------------------------------------------------

    def _auxiliary(
        self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict], num_objects: Tensor
    ) -> dict[str, Tensor]:
        """Detection losses of the auxiliary queries, means over all of them, layers summed."""
        classes, targets, there = pad_labels(labels)
        count = self.config.queries_per_object
        classes, targets, there = (x.repeat_interleave(count, 1) for x in (classes, targets, there))
        with torch.autocast(student.logits.device.type, enabled=False):
            question, num_asked = self._group(teacher, classes, targets, there)
        answer = ask(student, question)
        with torch.autocast(student.logits.device.type, enabled=False):
            logits, boxes = full(answer.logits[:, :, :num_asked]), full(answer.boxes[:, :, :num_asked])
            # (L, B, M)
            classes, there = (x[:, :num_asked].expand(logits.shape[:3]) for x in (classes, there))
            targets = targets[:, :num_asked].to(boxes.dtype).expand_as(boxes)
            class_loss = self._class_loss(logits, self._rate(logits, boxes, classes, targets, there))
            l1, giou = box_distances(boxes, targets)
            losses = {
                "od_detr_auxiliary_class": class_loss,
                "od_detr_auxiliary_box": l1,
                "od_detr_auxiliary_giou": giou,
            }
            return {name: (there * loss).sum() / (count * num_objects) for name, loss in losses.items()}

    @torch.no_grad()
    def _group(self, teacher: DetectorOutput, classes: Tensor, targets: Tensor, there: Tensor) -> tuple[Question, int]:
        """The teacher's own question, whose first queries are now those that fit the objects best; and how many.

        Args:
            classes, targets, there: (B, M), (B, M, 4) and (B, M) of the auxiliary queries' objects, padded.
        """
        count, num_queries = self.config.queries_per_object, teacher.boxes.shape[2]
        boxes = full(teacher.boxes)
        cost = self.criterion.cost(full(teacher.logits), boxes, classes[:, ::count], targets[:, ::count].to(boxes))
        cost, layer = cost.min(0)  # (B, Q, G): each query once, as the layer has it that fits best
        query = cost.topk(count, 1, largest=False).indices  # (B, count, G)
        best = layer.gather(1, query) * num_queries + query  # counted over L * Q
        best = best.transpose(1, 2).flatten(1)[:, :num_queries]
        _, positions, references = teacher.decode.own
        states, places = (x.transpose(0, 1).flatten(1, 2) for x in (teacher.queries, teacher.boxes))
        chosen = (
            take_queries(states, best),
            None if positions is None else take_queries(positions, best % num_queries),
            None if references is None else take_queries(places, best)[..., : references.shape[-1]],
        )
        asked = (
            None if own is None else _put(own, new, there) for own, new in zip(teacher.decode.own, chosen, strict=True)
        )
        return _detached(asked), best.shape[1]


def _detached(question: Iterable[Tensor | None]) -> Question:
    return tuple(None if x is None else x.detach() for x in question)


def _put(own: Tensor, chosen: Tensor, there: Tensor) -> Tensor:
    """`own` (B, Q, D) with the first M rows taken from `chosen` (B, M, D) where they are `there` (B, M or more)."""
    count = chosen.shape[1]
    first = torch.where(there[:, :count, None], chosen.to(own.dtype), own[:, :count])
    return torch.cat([first, own[:, count:]], 1)
