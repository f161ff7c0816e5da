"""KD-DETR: both decoders are asked the same questions, so that their answers correspond without any matching."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..detectors.base import DetectorOutput, DetectorSpec, Question
from ..distances import box_distances, class_divergence
from ..errors import UserError
from ..ops import full
from ..questions import Translator, ask, ask_teacher, point_scores, point_weights
from .base import DistillationMethod, MethodConfig, align_layers, check_layers, option


# The code sums the class term over images and points as it is, so its weight of 1 means another strength in every
# batch size. Weights and normalisation are those of TPRD's form for Deformable DETR, see the class.
@dataclass
class KDDETRConfig(MethodConfig):
    """Options of KD-DETR. Groups of points whose three weights are all 0 are not asked."""

    layers: int | None = option(None, "Last decoder layers of the student to distil; default: all")
    teacher_layer: str = option("last", "Teacher layer of each student layer (code: last)", ("last", "same"))

    # The distillation points
    general_points: int = option(300, "Random questions a step, the same for all images (code: 300)")

    # The distances
    divergence: str = option(
        "softmax",
        "KL of the softmax over the logits of all classes, also of sigmoid heads (code), or of each class on its own",
        ("softmax", "bernoulli"),
    )
    temperature: float | None = option(
        None, "T on the logits, with a factor T^2; default: 10 for divergence softmax (code), 1 for bernoulli"
    )
    general_class_weight: float = option(2.0, "Weight of the KL at general points, summed over classes")
    general_box_weight: float = option(5.0, "Weight of L1 at general points, summed over coordinates")
    general_giou_weight: float = option(2.0, "Weight of 1 - GIoU at general points")
    specific_class_weight: float = option(2.0, "Weight of the KL at specific points, summed over classes")
    specific_box_weight: float = option(5.0, "Weight of L1 at specific points, summed over coordinates")
    specific_giou_weight: float = option(2.0, "Weight of 1 - GIoU at specific points")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("general_points")
        if self.temperature is not None:
            self.require_positive("temperature")

    @property
    def logit_temperature(self) -> float:
        if self.temperature is not None:
            return self.temperature
        return 10.0 if self.divergence == "softmax" else 1.0

    @property
    def asks_general(self) -> bool:
        return any((self.general_class_weight, self.general_box_weight, self.general_giou_weight))

    @property
    def asks_specific(self) -> bool:
        return any((self.specific_class_weight, self.specific_box_weight, self.specific_giou_weight))


class KDDETR(DistillationMethod):
    """The student answers the teacher's own questions and random ones as the teacher does.

    Queries of two models do not correspond, but answers to one question do. Specific distillation points are the
    teacher's own queries, general ones random queries, drawn afresh every step. Both are put to both decoders on the
    image that each has encoded; at every point the student's classes and boxes, in each layer, imitate the teacher's
    in its last layer. A point counts as much as the teacher finds an object there. Groups of points do not see each
    other, nor the student's own queries.

    Source: Wang et al., "KD-DETR: Knowledge Distillation for Detection Transformer with Consistent Distillation Points
    Sampling", CVPR 2024, arXiv 2211.08071. The losses, T, the weighting by score and the last layer as target are
    those of the code for DAB-DETR (github.com/Myleswork/KD-DETR); sums over classes, weights that sum to 1 in each
    image, 2 : 5 : 2 and random contents and positions those of the re-implementation for Deformable DETR in
    github.com/xingyitong1/TPRD.

    Requires: the decoders of both. Any widths, layers and numbers of queries; see `questions.Translator`.

    Differs from the paper in: general points are normal numbers, references their sigmoid, as in the code, where the
    paper has uniform ones; position embeddings and references are drawn apart, also where a model derives the one from
    the other. Differs from the code in: normalisation and weights of the class term (see above).
    """

    config_class = KDDETRConfig
    requires = frozenset({"decode"})
    paper = {
        "title": "KD-DETR: Knowledge Distillation for Detection Transformer with Consistent Distillation Points "
        "Sampling",
        "id": "arXiv 2211.08071",
        "bibtex": "@inproceedings{wang2024kddetr,\n"
        "  title={{KD-DETR}: Knowledge Distillation for Detection Transformer with Consistent Distillation Points "
        "Sampling},\n"
        "  author={Wang, Yu and Li, Xin and Weng, Shengzhao and Zhang, Gang and Yue, Haixiao and Feng, Haocheng and "
        "Han, Junyu and Ding, Errui},\n"
        "  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},\n"
        "  pages={16016--16025},\n"
        "  year={2024}\n"
        "}",
    }

    def __init__(self, config: KDDETRConfig, student: DetectorSpec, teacher: DetectorSpec) -> None:
        super().__init__(config, student, teacher)
        check_layers(config.layers, student)
        self.softmax = student.activation == "softmax"
        if self.softmax and config.divergence == "bernoulli":
            raise UserError(
                f"method.divergence 'bernoulli' needs a class head of sigmoids, {student.family} has a softmax: "
                "set method.divergence=softmax"
            )
        one = not self.softmax and len(student.class_names) == 1
        if one and config.divergence == "softmax" and (config.general_class_weight or config.specific_class_weight):
            raise UserError(
                f"method.divergence 'softmax' compares classes with each other, but {student.family} has a single "
                "logit for the one class that both know: set method.divergence=bernoulli method.temperature=null"
            )
        self.translate = Translator(student, teacher)

    @property
    def teacher_reads(self) -> frozenset[str]:
        needs = {"decode": self.config.asks_general, "question": True}
        return frozenset({"logits", "boxes"} | {name for name, needed in needs.items() if needed})

    def compare(self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict]) -> dict[str, Tensor]:
        groups: dict[str, tuple[DetectorOutput, DetectorOutput]] = {}
        if self.config.asks_general:
            question = self._general_points(teacher)
            answer = ask_teacher(teacher, question)
            groups["general"] = ask(student, self.translate(question, answer)), answer
        if self.config.asks_specific:
            groups["specific"] = self.answer(student, teacher), teacher
        losses, self.statistics = {}, {}
        for group, (told, answer) in groups.items():
            with torch.autocast(answer.logits.device.type, enabled=False):
                for term, loss in self._imitate(told, answer).items():
                    weight = getattr(self.config, f"{group}_{term}_weight")
                    losses[f"kd_detr_{group}_{term}"] = weight * loss
                # How much there is to see at the points: random ones find less.
                scores = point_scores(full(answer.logits[-1].detach()), self.softmax)
            self.statistics[f"kd_detr/{group}_score"] = scores.mean()
        return losses

    def question(self, teacher: DetectorOutput) -> Question | None:
        return self.translate(teacher.decode.own, teacher) if self.config.asks_specific else None

    def _general_points(self, teacher: DetectorOutput) -> Question:
        """Random contents, positions and references, of the kind that the teacher asks: a function of the step."""
        contents, positions, references = teacher.decode.own
        generator = torch.Generator(contents.device).manual_seed(self.step)

        def draw(like: Tensor) -> Tensor:
            size = self.config.general_points, like.shape[-1]
            return torch.randn(size, generator=generator, device=like.device).to(like.dtype).repeat(len(like), 1, 1)

        return (
            draw(contents),
            None if positions is None else draw(positions),
            None if references is None else draw(references).sigmoid(),
        )

    def _imitate(self, student: DetectorOutput, teacher: DetectorOutput) -> dict[str, Tensor]:
        """Distances of two answers to one question: point by point, layers summed, images averaged."""
        layers = [theirs for _, theirs in align_layers(student, teacher, self.config.layers)]
        s_logits, s_boxes = full(student.logits[-len(layers) :]), full(student.boxes[-len(layers) :])
        if self.config.teacher_layer == "last":
            layers = [-1]  # one for all
        t_logits, t_boxes = (
            torch.stack([full(x[layer].detach()) for layer in layers]) for x in (teacher.logits, teacher.boxes)
        )
        weights = point_weights(t_logits, self.softmax)  # (L or 1, B, Q)
        l1, giou = box_distances(s_boxes, t_boxes)
        temperature, as_one = self.config.logit_temperature, self.config.divergence == "softmax"
        if not as_one:
            t_logits = t_logits.expand_as(s_logits)  # binary cross entropy does not broadcast
        divergence = class_divergence(s_logits / temperature, t_logits / temperature, as_one)
        distances = {"class": temperature**2 * divergence, "box": l1, "giou": giou}
        return {term: (weights * distance).sum(-1).mean(1).sum() for term, distance in distances.items()}
