"""Our detection loss against Transformers' own on the same predictions: forward and backward, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_OBJECT_DETECTION_MAPPING
from transformers.loss.loss_utils import LOSS_MAPPING

from ..fast_criterion import LOSSES
from .sidebyside import Row, seconds, take_turns

SWEEPS = {"queries": (100, 300, 600, 900), "classes": (80, 91, 365, 1203), "boxes": (0, 7, 30, 100, 300)}
NEAR = 5  # queries that stand at each target, late in training
NOISE = 0.02  # of their boxes, in sides of the image
PRIOR = -4.6  # logit of a class where there is none: a probability of 0.01


@dataclass(frozen=True)
class LossSize:
    """What is judged in a step; `boxes` are targets an image."""

    images: int = 8
    layers: int = 6
    queries: int = 300
    classes: int = 91
    boxes: int = 7


@dataclass(frozen=True, kw_only=True)
class LossRow(Row):
    """With the largest difference between the two in the loss and the gradients, relative to their largest numbers."""

    difference: float


def measure_losses(family: str, size: LossSize, sweep: str | None, rounds: int, seed: int = 0) -> Iterator[LossRow]:
    """A row late and a row early in training, for every value of the sweep.

    Late in training some queries stand at each target and know its class; early in training all predictions are
    random.

    Args:
        family: Transformers' config.model_type.
        sweep: which field of `size` takes the values of `SWEEPS`, or None.
    """
    for value in SWEEPS.get(sweep, (None,)):
        changed = size if value is None else replace(size, **{sweep: value})
        for late in (True, False):
            name = ("late" if late else "early") + " training" + (f", {value} {sweep}" if value is not None else "")
            yield _measure(name, _Step(family, changed, late, seed), rounds)


def _measure(name: str, step: _Step, rounds: int) -> LossRow:
    sides = {"ours": LOSSES[step.family], "reference": step.transformers}
    pairs = zip(*(step.run(side) for side in sides.values()), strict=True)
    differences = [((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item() for a, b in pairs]
    times = take_turns({side: lambda f=f: seconds(lambda: step.run(f)) for side, f in sides.items()}, rounds)
    return LossRow.of(name, times["ours"], times["reference"], str(step.device), difference=max(differences))


class _Step:
    """What a model of a family, in training, gives to its loss function: random predictions and labels."""

    def __init__(self, family: str, size: LossSize, late: bool, seed: int) -> None:
        self.family, self.size, self.late = family, size, late
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.generator = torch.Generator().manual_seed(seed)
        self.config = config = CONFIG_MAPPING[family]()
        config.num_labels, config.auxiliary_loss = size.classes, True
        config.num_queries, config.decoder_layers = size.queries, size.layers
        softmax = LOSS_MAPPING["ForObjectDetection"]
        name = MODEL_FOR_OBJECT_DETECTION_MAPPING[type(config)].__name__
        self.transformers = LOSS_MAPPING.get(name, softmax)
        self.columns = size.classes + (self.transformers is softmax)  # with "no object"
        self.labels = [self._label() for _ in range(size.images)]
        self.layers_first = not hasattr(config, "num_denoising")
        self.more: dict = {}
        self.leaves = self._group_detr() if self.layers_first else self._real_time()
        for name, leaf in self.leaves.items():
            leaf = leaf if self.layers_first or leaf.dim() == 3 else leaf.transpose(0, 1)
            self.leaves[name] = leaf.contiguous().to(self.device).requires_grad_()

    def run(self, loss_function: Callable) -> list[Tensor]:
        """The loss, and its gradients at all predictions."""
        last = -1 if self.layers_first else (slice(None), -1)
        logits, boxes = (self.leaves[f"outputs_{part}"][last] for part in ("class", "coord"))
        given = logits, self.labels, self.device, boxes, self.config
        loss, _, _ = loss_function(*given, **self.leaves, **self.more)
        gradients = torch.autograd.grad(loss, list(self.leaves.values()))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return [loss.detach(), *gradients]

    def _label(self) -> dict[str, Tensor]:
        classes = torch.randint(self.size.classes, (self.size.boxes,), generator=self.generator)
        return {"class_labels": classes.to(self.device), "boxes": self._boxes(self.size.boxes).to(self.device)}

    def _boxes(self, *shape: int) -> Tensor:
        sides = 0.05 + 0.3 * torch.rand(*shape, 2, generator=self.generator)
        centres = sides / 2 + (1 - sides) * torch.rand(*shape, 2, generator=self.generator)
        return torch.cat([centres, sides], -1)

    def _predict(self, num_layers: int, num_queries: int) -> tuple[Tensor, Tensor]:
        """Logits (L, B, Q, C) and boxes (L, B, Q, 4)."""
        shape, draw = (num_layers, self.size.images, num_queries), self.generator
        logits, boxes = PRIOR + torch.randn(*shape, self.columns, generator=draw), self._boxes(*shape)
        if self.columns > self.size.classes:
            logits[..., -1] = 0
        for image, label in enumerate(self.labels if self.late else ()):
            order = torch.randperm(num_queries, generator=draw)
            for query, target in zip(order, torch.arange(self.size.boxes).repeat(NEAR), strict=False):
                noise = NOISE * torch.randn(num_layers, 4, generator=draw)
                boxes[:, image, query] = (label["boxes"][target].cpu() + noise).clamp(0.01, 0.99)
                logits[:, image, query, label["class_labels"][target]] = torch.randn(num_layers, generator=draw)
        return logits, boxes

    def _group_detr(self) -> dict[str, Tensor]:
        """Of DETR and its kin, and of LW-DETR with its groups of queries."""
        groups = getattr(self.config, "group_detr", 1)
        leaves = {}
        leaves["outputs_class"], leaves["outputs_coord"] = self._predict(self.size.layers, groups * self.size.queries)
        if groups > 1:
            logits, boxes = self._predict(1, groups * self.size.queries)
            leaves["enc_outputs_class"], leaves["enc_outputs_coord"] = logits[0], boxes[0]
        return leaves

    def _real_time(self) -> dict[str, Tensor]:
        """Of RT-DETR and D-FINE, with denoising queries, and with distributions of sides."""
        config, size = self.config, self.size
        refining = hasattr(config, "max_num_bins")
        parts = [self._predict(size.layers + refining, size.queries)]
        if size.boxes:
            groups = max(config.num_denoising // size.boxes, 1)
            parts.insert(0, self._predict(size.layers + refining, 2 * size.boxes * groups))
            positive = (torch.arange(groups)[:, None] * 2 * size.boxes + torch.arange(size.boxes)).flatten()
            self.more["denoising_meta_values"] = {
                "dn_positive_idx": [positive.to(self.device)] * size.images,
                "dn_num_group": groups,
                "dn_num_split": [2 * size.boxes * groups, size.queries],
            }
        logits, boxes = (torch.cat(part, 2) for part in zip(*parts, strict=True))
        leaves = {"outputs_class": logits, "outputs_coord": boxes}
        logits, boxes = self._predict(1, size.queries)
        leaves["enc_topk_logits"], leaves["enc_topk_bboxes"] = logits[0], boxes[0]
        if refining:
            shape = (size.layers, *leaves["outputs_class"].shape[1:3], 4 * (config.max_num_bins + 1))
            leaves["predicted_corners"] = torch.randn(*shape, generator=self.generator)
            frames = leaves["outputs_coord"][:1].expand(size.layers, -1, -1, -1).transpose(0, 1)
            self.more["initial_reference_points"] = frames.contiguous().to(self.device)
        return leaves
