"""Active sampling distillation: teacher and student are sampled at the same points, and the samples are aligned.

Source: "Efficient Matching-Free Distillation for Detection Transformers via Active Sampling" (ICLR 2026 submission
14316, OpenReview hYAPU5qrwY). Its code is not public; where its text is silent, the options below name the choices
and the defaults are argued in the comments.

Letters: N images x layers, P sampling points, T teacher queries, S student queries, C classes, E = 4 + C.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..detectors.base import DetectorOutput, DetectorSpec
from ..errors import UserError
from ..ops import cxcywh_to_xyxy, full, generalized_iou
from ..sampling import Sampler
from .base import DistillationMethod, MethodConfig, option

EPSILON = 1e-6  # keeps probabilities inside the domain of the logarithm


@dataclass
class ASDConfig(MethodConfig):
    """Options of active sampling distillation. "Paper" marks what its text fixes; the rest it leaves open."""

    # What is compared
    layers: int = option(2, "Last decoder layers to distil, aligned from the end (paper: 2; Table 2 also has 1)")
    teacher_layer: str = option("same", "Teacher layer of each student layer, from the end", ("same", "last"))

    # The sampler
    sampler_input: str = option("probs", "Class part of what the sampler reads beside the box", ("probs", "logits"))
    box_scale: float = option(1.0, "Factor on the box part of what the sampler reads")
    hidden_dim: int = option(256, "Width of the sampler's hidden layers")
    key_dim: int = option(256, "Width d_k of queries and keys")  # 16 loses points in free-student experiments
    mlp_layers: int = option(2, "Linear layers of each sampler MLP; 1 (no hidden layer) cannot part near duplicates")
    shared_qk: bool = option(False, "One MLP for queries and keys (Fig. 2 allows it) instead of two (Eq. 9, 10)")
    share_sampler: bool = option(True, "One sampler for all layers")
    heads: int = option(1, "Attention heads (paper: 1; 8 is its ablation). The heads' weights are averaged")
    normalize: str = option("none", "Normalisation of queries and keys", ("none", "layer_norm", "l2"))

    # The sampling loss, Eq. 16
    sampling_weight: float = option(1.0, "Weight of the sampling loss (paper: 1)")
    # The sum starts at Q ln Q = 1711 for 300 queries, which under gradient clipping leaves nothing of the other terms.
    sampling_reduction: str = option("mean", "Over the points: mean, or sum as Eq. 16 is written", ("mean", "sum"))
    sampling_temperature: float = option(1.0, "Temperature inside the sampling loss; the MLPs can undo it")
    sampling_outputs: str = option(
        "teacher", "Outputs that train the sampler; both adds the student's, detached", ("teacher", "both")
    )
    duplicate_iou: float | None = option(
        None, "Queries of one top class with an IoU above this count as one positive set in the sampling loss"
    )

    # The points
    max_points: int | None = option(None, "Use only the teacher's best-scored queries as points (paper: all)")
    point_weight: str = option(
        "uniform", "Weight of each point; score: its best class probability", ("uniform", "score")
    )
    student_points: bool = option(False, "The student's queries are points too (extension, not in the paper)")

    # The distillation loss, Eq. 15 and 17
    temperature: float = option(4.0, "T of Eq. 15 on the attention scores of both models (paper: 4)")
    value: str = option("probs", "Class part of what is sampled", ("probs", "logits"))
    box_space: str = option("cxcywh", "Box part of what is sampled", ("cxcywh", "xyxy", "logit"))
    divergence: str = option(
        "auto",
        "KL per class on its own, as sigmoid heads mean it, or over all classes; auto: as the student's head",
        ("auto", "bernoulli", "softmax"),
    )
    direction: str = option(
        "teacher_student", "KL(teacher || student) or the reverse", ("teacher_student", "student_teacher")
    )
    box_weight: float = option(5.0, "lambda_bbox of Eq. 17: L1, summed over coordinates, mean over points")
    class_weight: float = option(2.0, "lambda_cls of Eq. 17: KL, summed over classes, mean over points")
    giou_weight: float = option(0.0, "Weight of 1 - GIoU of the boxes (paper: none)")
    # With gradient, the sampler could lower the loss by flattening the weights: uniform ones make all samples equal.
    sampler_gradient: bool = option(False, "Let the distillation loss train the sampler too")
    weight_gradient: bool = option(
        True, "Let gradient reach the student through its keys, not through its values alone"
    )
    ramp_start: int = option(0, "Optimizer step at which the distillation loss sets in")
    ramp_steps: int = option(1000, "Steps over which its weight grows to 1: a fresh sampler averages over everything")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("hidden_dim", "key_dim", "mlp_layers", "heads", "temperature", "sampling_temperature")
        if self.key_dim % self.heads:
            raise UserError(f"method.key_dim {self.key_dim} cannot be split into method.heads {self.heads}")


class ASD(DistillationMethod):
    """The student's predictions, as a distribution, imitate the teacher's: no matching, any two query counts.

    A small attention module (`Sampler`) learns to tell predictions apart (Eq. 16). With the teacher's own queries as
    points it samples both prediction sets at the same places (Eq. 13-15), and the samples are aligned (Eq. 17).

    Requires: boxes and class probabilities of both, in the form of the student's head: one probability a class, or
    with a softmax head a distribution over classes and "no object". No decoder access, no features, no labels.

    Differs from the paper in: distillation leaves the sampler alone and sets in over a ramp, and the sampling loss is
    a mean. `configs/deformable_detr/asd_paper_literal.yaml` takes the text to the letter. `student_points` is not in
    the paper.
    """

    config_class = ASDConfig
    trains_itself = frozenset({"asd_sampling"})
    paper = {
        "title": "Efficient Matching-Free Distillation for Detection Transformers via Active Sampling",
        "id": "OpenReview hYAPU5qrwY",
        "bibtex": "@inproceedings{active_sampling_distillation,\n"
        "  title={Efficient Matching-Free Distillation for Detection Transformers via Active Sampling},\n"
        "  author={Anonymous},\n"
        "  booktitle={Submitted to the International Conference on Learning Representations},\n"
        "  year={2026},\n"
        "  url={https://openreview.net/forum?id=hYAPU5qrwY}\n"
        "}",
    }

    def __init__(self, config: ASDConfig, student: DetectorSpec, teacher: DetectorSpec) -> None:
        super().__init__(config, student, teacher)
        for role, spec in (("student", student), ("teacher", teacher)):
            if config.layers > spec.num_layers and (role == "student" or config.teacher_layer == "same"):
                remedy = f"set method.layers={spec.num_layers}"
                remedy += " or method.teacher_layer=last" if role == "teacher" else ""
                raise UserError(
                    f"method.layers is {config.layers}, but the {role} has {spec.num_layers} decoder layers: {remedy}"
                )
        self.softmax = student.activation == "softmax"
        kind = "softmax" if self.softmax else "bernoulli"
        self.divergence = kind if config.divergence == "auto" else config.divergence
        if self.softmax and self.divergence == "bernoulli" and config.value == "logits":
            raise UserError("method.divergence 'bernoulli' of a softmax head needs method.value 'probs'")
        input_dim = 4 + len(student.class_names) + self.softmax  # softmax heads have a column "no object"
        self.samplers = nn.ModuleList(
            self._sampler(input_dim) for _ in range(1 if config.share_sampler else config.layers)
        )

    def _sampler(self, input_dim: int) -> Sampler:
        c = self.config
        return Sampler(input_dim, c.hidden_dim, c.key_dim, c.mlp_layers, c.heads, c.normalize, c.shared_qk)

    @property
    def settled_at(self) -> int:
        return self.config.ramp_start + self.config.ramp_steps

    def compare(self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict]) -> dict[str, Tensor]:
        config = self.config
        with torch.autocast(student.logits.device.type, enabled=False):
            s_logits, s_boxes = self._last_layers(student)
            t_logits, t_boxes = self._last_layers(teacher, config.teacher_layer == "last")
            total: dict[str, Tensor] = {}
            statistics: dict[str, Tensor] = {}
            # One pass over all layers at once, or one a layer when each has its own sampler.
            chunks = [x.chunk(len(self.samplers)) for x in (s_logits, s_boxes, t_logits, t_boxes)]
            for sampler, *outputs in zip(self.samplers, *chunks, strict=True):
                losses, seen = self._distil(sampler, *(x.flatten(0, 1) for x in outputs))
                # Layers are summed like DETR's auxiliary losses; images and points are averaged.
                total = {k: total.get(k, 0) + v * len(outputs[0]) for k, v in losses.items()}
                statistics = {k: statistics.get(k, 0) + v / len(self.samplers) for k, v in seen.items()}
        self.statistics = statistics
        ramp = 1.0
        if config.ramp_steps or config.ramp_start:
            ramp = min(max((self.step - config.ramp_start) / max(config.ramp_steps, 1), 0.0), 1.0)
        weights = {
            "asd_sampling": config.sampling_weight,
            "asd_box": ramp * config.box_weight,
            "asd_class": ramp * config.class_weight,
            "asd_giou": ramp * config.giou_weight,
        }
        return {name: weights[name] * loss for name, loss in total.items()}

    def _last_layers(self, output: DetectorOutput, repeat_last: bool = False) -> tuple[Tensor, Tensor]:
        """(layers, B, Q, C) logits and (layers, B, Q, 4) boxes, in fp32 unless they are already wider."""
        layers = self.config.layers
        pair = []
        for x in (output.logits, output.boxes):
            x = x[-1:].expand(layers, *x.shape[1:]) if repeat_last else x[-layers:]
            pair.append(full(x))
        return pair[0], pair[1]

    def _distil(
        self, sampler: Sampler, s_logits: Tensor, s_boxes: Tensor, t_logits: Tensor, t_boxes: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Unweighted losses and statistics of (N, S, .) student and (N, T, .) teacher predictions."""
        config = self.config
        t_logits, t_boxes = t_logits.detach(), t_boxes.detach()
        t_input, s_input = self._sampler_input(t_logits, t_boxes), self._sampler_input(s_logits, s_boxes)

        # Eq. 16: the sampler learns to find each prediction among all of its set.
        own_scores = sampler(t_input, t_input)  # (N, heads, T, T)
        loss_sampling, own_weights = self._sampling_loss(own_scores, t_logits, t_boxes)
        if config.sampling_outputs == "both":
            student = s_input.detach()
            loss_student, _ = self._sampling_loss(sampler(student, student), s_logits, s_boxes)
            loss_sampling = loss_sampling + loss_student
        losses = {"asd_sampling": loss_sampling}

        # Eq. 13, 15: the same points in both sets.
        point_input, point_score = t_input, self._score(t_logits)
        t_scores = own_scores
        if config.max_points is not None and config.max_points < t_input.shape[1]:
            point_score, best = point_score.topk(config.max_points, dim=1)
            point_input = t_input.gather(1, best[..., None].expand(-1, -1, t_input.shape[-1]))
            t_scores = t_scores.gather(2, best[:, None, :, None].expand(-1, t_scores.shape[1], -1, t_scores.shape[3]))
        keys = s_input if config.weight_gradient else s_input.detach()
        if config.sampler_gradient:
            s_scores = sampler(point_input, keys)
        else:
            t_scores = t_scores.detach()
            s_scores = sampler.frozen(point_input, keys)
        t_weights, s_weights = self._attention(t_scores), self._attention(s_scores)  # (N, P, T), (N, P, S)
        attention = s_weights.detach()
        if config.student_points:
            points = s_input.detach()
            t_weights = torch.cat([t_weights, self._attention(sampler.frozen(points, t_input))], 1)
            s_weights = torch.cat([s_weights, self._attention(sampler.frozen(points, keys))], 1)
            point_score = torch.cat([point_score, self._score(s_logits).detach()], 1)
        distances = self._compare_samples(t_weights, s_weights, t_logits, t_boxes, s_logits, s_boxes)
        share = torch.ones_like(point_score) if config.point_weight == "uniform" else point_score
        share = share / share.sum(1, keepdim=True).clamp(min=EPSILON)  # (N, P), sums to 1 in each image
        losses |= {name: (share * distance).sum(1).mean() for name, distance in distances.items()}

        score, diagonal = self._score(t_logits), own_weights.diagonal(dim1=1, dim2=2)
        statistics = {
            # How surely a prediction finds itself (1: a Dirac sample, Eq. 12), by what the teacher calls an object.
            "asd/w_ii": diagonal.mean(),
            "asd/w_ii_foreground": (score * diagonal).sum() / score.sum().clamp(min=EPSILON),
            "asd/w_ii_background": ((1 - score) * diagonal).sum() / (1 - score).sum().clamp(min=EPSILON),
            # exp(entropy): over how many student queries a teacher point spreads.
            "asd/queries_per_point": torch.special.entr(attention).sum(-1).exp().mean(),
        }
        return losses, statistics

    def matrices(self, student: DetectorOutput, teacher: DetectorOutput) -> dict[str, Tensor]:
        outputs, sampler = {"teacher": teacher, "student": student}, self.samplers[-1]
        inputs = {who: self._sampler_input(full(x.logits[-1]), full(x.boxes[-1])) for who, x in outputs.items()}
        return {who: self._attention(sampler(inputs["teacher"], x)) for who, x in inputs.items()}

    def _sampler_input(self, logits: Tensor, boxes: Tensor) -> Tensor:
        classes = self._probs(logits) if self.config.sampler_input == "probs" else logits
        return torch.cat([boxes * self.config.box_scale, classes], -1)

    def _probs(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1) if self.softmax else logits.sigmoid()

    def _score(self, logits: Tensor) -> Tensor:
        """Best class probability (N, Q)."""
        return self._classes(self._probs(logits)).amax(-1)

    def _classes(self, x: Tensor) -> Tensor:
        """Without "no object"."""
        return x[..., :-1] if self.softmax else x

    def _sampling_loss(self, scores: Tensor, logits: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """-log W_ii (Eq. 16) and the detached weights W (N, Q, Q), averaged over heads."""
        log_weights = (scores / self.config.sampling_temperature).log_softmax(-1)  # (N, heads, Q, Q)
        if self.config.duplicate_iou is None:
            log_own = log_weights.diagonal(dim1=-2, dim2=-1)
        else:
            same = self._duplicates(logits.detach(), boxes.detach())[:, None]
            log_own = log_weights.masked_fill(~same, -torch.inf).logsumexp(-1)
        per_image = -log_own.sum(-1) if self.config.sampling_reduction == "sum" else -log_own.mean(-1)
        return per_image.mean(), log_weights.detach().exp().mean(1)

    def _duplicates(self, logits: Tensor, boxes: Tensor) -> Tensor:
        """(N, Q, Q) true where two queries name one object; always true on the diagonal."""
        xyxy = cxcywh_to_xyxy(boxes)
        a, b = xyxy[:, :, None], xyxy[:, None]
        sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
        inter, area = sides.prod(-1), (boxes[..., 2:]).prod(-1)
        iou = inter / (area[:, :, None] + area[:, None] - inter).clamp(min=EPSILON)
        label = self._classes(logits).argmax(-1)
        same = (iou > self.config.duplicate_iou) & (label[:, :, None] == label[:, None])
        return same | torch.eye(same.shape[1], dtype=torch.bool, device=same.device)

    def _attention(self, scores: Tensor) -> Tensor:
        """Scores (N, heads, P, Q) to sampling weights (N, P, Q): rows sum to 1 (Eq. 15)."""
        return (scores / self.config.temperature).softmax(-1).mean(1)

    def _compare_samples(
        self,
        t_weights: Tensor,
        s_weights: Tensor,
        t_logits: Tensor,
        t_boxes: Tensor,
        s_logits: Tensor,
        s_boxes: Tensor,
    ) -> dict[str, Tensor]:
        """Distances (N, P) of the two samples at each point (Eq. 14, 17)."""
        as_probs = self.config.value == "probs"
        t_class = t_weights @ (self._probs(t_logits) if as_probs else t_logits)
        s_class = s_weights @ (self._probs(s_logits) if as_probs else s_logits)
        t_box, s_box = t_weights @ self._box_values(t_boxes), s_weights @ self._box_values(s_boxes)
        distances = {
            "asd_box": (t_box - s_box).abs().sum(-1),
            "asd_class": self._divergence(t_class, s_class),
        }
        if self.config.giou_weight:
            distances["asd_giou"] = 1 - generalized_iou(self._corners(t_box), self._corners(s_box))
        return distances

    def _box_values(self, boxes: Tensor) -> Tensor:
        if self.config.box_space == "xyxy":
            return cxcywh_to_xyxy(boxes)
        return boxes.logit(eps=EPSILON) if self.config.box_space == "logit" else boxes

    def _corners(self, values: Tensor) -> Tensor:
        if self.config.box_space == "xyxy":
            return values
        return cxcywh_to_xyxy(values.sigmoid() if self.config.box_space == "logit" else values)

    def _divergence(self, t_class: Tensor, s_class: Tensor) -> Tensor:
        """KL (N, P) of the sampled class distributions, summed over classes."""
        if self.config.direction == "student_teacher":
            t_class, s_class = s_class, t_class
        if self.divergence == "softmax":
            if self.config.value == "probs":  # a distribution over classes needs its parts to sum to 1
                t_class, s_class = t_class.clamp(min=EPSILON).log(), s_class.clamp(min=EPSILON).log()
            return F.kl_div(s_class.log_softmax(-1), t_class.log_softmax(-1), reduction="none", log_target=True).sum(
                -1
            )
        if self.config.value == "logits":
            t_class, s_class = t_class.sigmoid(), s_class.sigmoid()
        p, q = t_class.clamp(EPSILON, 1 - EPSILON), s_class.clamp(EPSILON, 1 - EPSILON)
        return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1)
