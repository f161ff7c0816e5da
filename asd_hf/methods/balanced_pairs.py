from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..criterion import DetectionCriterion
from ..detectors.base import DetectorOutput, DetectorSpec
from ..distances import box_distances, class_divergence, pair_distances
from ..features import AlignedMaps
from ..ops import full
from ..questions import Translator, ask, point_weights
from ..sampling import Sampler
from .base import DistillationMethod, MethodConfig, align_layers, check_layers, option, take_layers


@dataclass
class BalancedPairsConfig(MethodConfig):
    layers: int | None = option(None, "Last decoder layers to distil, aligned from the end; default: all")
    score: str = option("sampler", "", ("sampler", "distance", "both"))
    class_weight: float = option(1.0, "")
    box_weight: float = option(5.0, "")
    giou_weight: float = option(2.0, "")
    temperature: float = option(1.0, "")
    final_temperature: float = option(0.0, "")
    anneal_steps: int = option(0, "")
    balance_iterations: int = option(20, "")
    point_weight: str = option("uniform", "", ("uniform", "score"))
    sampling_weight: float = option(1.0, "")
    trust: float = option(0.0, "")
    weight_gradient: bool = option(False, "")
    pair_weight: float = option(1.0, "")
    asked_weight: float = option(0.0, "")
    asked_points: str = option("uniform", "", ("uniform", "score"))
    feature_weight: float = option(0.0, "")
    hidden_dim: int = option(256, "")
    key_dim: int = option(256, "")


class BalancedPairs(DistillationMethod):
    config_class = BalancedPairsConfig

    def __init__(self, config, student: DetectorSpec, teacher: DetectorSpec) -> None:
        super().__init__(config, student, teacher)
        check_layers(config.layers, student)
        self.softmax = student.activation == "softmax"
        if config.score != "distance":
            self.sampler = Sampler(4 + len(student.class_names) + self.softmax, config.hidden_dim, config.key_dim)
        self.criterion = DetectionCriterion(student.activation, class_cost=2, class_loss_weight=2)
        if config.asked_weight:
            self.translator = Translator(student, teacher)
        if config.feature_weight:
            self.maps = AlignedMaps(student, teacher)
        if config.trust:
            self.register_buffer("losses", torch.zeros(2))

    @property
    def requires(self):
        needs = {"features": self.config.feature_weight, "decode": self.config.asked_weight}
        return frozenset(name for name, needed in needs.items() if needed)

    def compare(self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict]) -> dict[str, Tensor]:
        config, layers = self.config, align_layers(student, teacher, self.config.layers)
        with torch.autocast(student.logits.device.type, enabled=False):
            ours = tuple(full(x[-len(layers) :]).flatten(0, 1) for x in (student.logits, student.boxes))
            theirs = tuple(
                torch.stack([full(x[t]) for _, t in layers]).flatten(0, 1).detach()
                for x in (teacher.logits, teacher.boxes)
            )
            losses = self._distil(ours, theirs, student, teacher, labels, len(layers))
        if config.asked_weight:
            told = ask(student, self.translator(teacher.decode.own, teacher))
            with torch.autocast(student.logits.device.type, enabled=False):
                ts = [t for _, t in layers]
                tl, tb = (torch.stack([full(x[t]) for t in ts]).detach() for x in (teacher.logits, teacher.boxes))
                sl, sb = full(told.logits[-len(ts):]), full(told.boxes[-len(ts):])
                w = torch.ones_like(tl[..., 0]) / tl.shape[2]
                if config.asked_points == "score":
                    w = point_weights(tl, self.softmax)
                l1, giou = box_distances(sb, tb)
                d = config.class_weight * class_divergence(sl, tl, self.softmax) + config.box_weight * l1 + config.giou_weight * giou
                losses["balanced_pairs_asked"] = config.asked_weight * (w * d).sum(-1).mean(1).sum()
        if config.feature_weight:
            with torch.autocast(student.logits.device.type, enabled=False):
                total = 0
                for source, target, valid in self.maps(student, teacher):
                    total = total + ((source - target).square().mean(1).sum((-2, -1)) / valid.sum((1, 2, 3)).clamp(min=1)).mean()
                losses["balanced_pairs_feature"] = config.feature_weight * total
        return losses

    def _distil(self, ours, theirs, student, teacher, labels, count):
        config = self.config
        (s_logits, s_boxes), (t_logits, t_boxes) = ours, theirs
        classes, l1, giou = pair_distances(ours, theirs, self.softmax)  # (N, T, S)
        losses, total = {}, 0
        scores = 0.0
        self.statistics = {}
        if config.score != "distance":
            y_t, y_s = (torch.cat([b, self._probs(z)], -1) for z, b in (theirs, ours))
            own = self.sampler(y_t, y_t)
            log_own = own.log_softmax(-1).diagonal(dim1=-2, dim2=-1)
            losses["balanced_pairs_sampling"] = config.sampling_weight * -log_own.mean() * count
            scores = self.sampler.frozen(y_t, y_s if config.weight_gradient else y_s.detach())[:, 0]
            self.statistics["balanced_pairs/w_ii"] = log_own.detach().exp().mean()
        if config.score != "sampler":
            cost = config.class_weight * classes + config.box_weight * l1 + config.giou_weight * giou
            scores = scores - cost.detach()
        temperature = config.temperature
        if config.anneal_steps:
            done = min(self.step / config.anneal_steps, 1.0)
            temperature = config.temperature * (config.final_temperature / config.temperature) ** done
        z = scores / temperature
        for _ in range(config.balance_iterations):
            z = z.log_softmax(-2)
            z = z.log_softmax(-1)
        w = z.softmax(-1)
        if not config.weight_gradient:
            w = w.detach()
        share = torch.ones_like(w[..., 0])
        if config.point_weight == "score":
            share = self._probs(t_logits)[..., : t_logits.shape[-1] - self.softmax].amax(-1)
        share = share / share.sum(1, keepdim=True).clamp(min=1e-6)
        trust = 1.0
        if config.trust:
            with torch.no_grad():
                for i, x in enumerate((student, teacher)):
                    last = replace(take_layers(x, [len(x.logits) - 1]), proposals=None)
                    value = sum(self.criterion(last, labels).values())
                    self.losses[i] = value if self.step == 0 else 0.95 * self.losses[i] + 0.05 * value
                trust = (config.trust * (1 - self.losses[1] / self.losses[0])).clamp(0, 1)
            self.statistics["balanced_pairs/trust"] = trust
            self.statistics["balanced_pairs/student_loss"] = self.losses[0].clone()
            self.statistics["balanced_pairs/teacher_loss"] = self.losses[1].clone()
        for name, d, weight in (("class", classes, config.class_weight), ("box", l1, config.box_weight), ("giou", giou, config.giou_weight)):
            losses[f"balanced_pairs_{name}"] = config.pair_weight * trust * weight * count * ((w * d).sum(-1) * share).sum(1).mean()
        self.statistics["balanced_pairs/queries_per_point"] = torch.special.entr(w.detach()).sum(-1).exp().mean()
        return losses

    def _probs(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1) if self.softmax else logits.sigmoid()
