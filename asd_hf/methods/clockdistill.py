"""CLoCKDistill: maps are imitated where objects are, and both decoders are asked at the objects' places."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..detectors.base import DetectorOutput, DetectorSpec
from ..distances import box_distances, class_divergence
from ..errors import UserError
from ..features import AlignedMaps, cell_boxes, covered_cells
from ..ops import full, uniform_noise
from ..questions import Translator, ask, ask_teacher, point_weights
from ..targets import pad_labels
from .base import DistillationMethod, MethodConfig, align_layers, check_layers, option


@dataclass
class CLoCKDistillConfig(MethodConfig):
    """Options of CLoCKDistill. Parts whose weights are all 0 are left out, and their requirements with them."""

    # Maps. 5e-5 and 1e-7 for sums over channels, mostly 256, are in a docstring of the port; these are for means. The
    # background does next to nothing with it: unrelated maps of variance 1 (800 x 1333) have a loss of 0.0002.
    foreground_weight: float = option(0.0128, "Squared difference of the maps: mean of each object's cells, summed")
    background_weight: float = option(2.56e-5, "Squared difference of the maps: mean of the cells without object")

    # Questions at objects
    layers: int | None = option(None, "Last decoder layers of the student to distil; default: all")
    points: int = option(100, "Questions an image: its objects in turn, at first as they are, then moved")
    jitter: float = option(0.4, "How far, as a part of half a box or of its size (DN-DETR: 0.4); 0: not moved")
    class_weight: float = option(1.0, "Weight of the KL, summed over classes")
    box_weight: float = option(5.0, "Weight of L1, summed over coordinates")
    giou_weight: float = option(2.0, "Weight of 1 - GIoU")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("points")
        if not 0 <= self.jitter < 1:
            raise UserError(f"method.jitter must be in [0, 1), not {self.jitter}")

    @property
    def compares_maps(self) -> bool:
        return any((self.foreground_weight, self.background_weight))

    @property
    def asks(self) -> bool:
        return any((self.class_weight, self.box_weight, self.giou_weight))


class CLoCKDistill(DistillationMethod):
    """Knowledge of the maps and of the decoder, both taken where the ground truth has objects.

    Location- and context-aware memory distillation (LCMD): the student's maps imitate the teacher's, objects apart
    from background, and every object as much as another, whatever its size. Target-aware consistent logit distillation
    (TCLD): queries made of the ground truth, the same for both and learnt by neither, are put to both decoders, and in
    every layer the student's answers imitate the teacher's, each as much as the teacher finds an object there.

    Source: Lan and Tian, "CLoCKDistill: Consistent Location-and-Context-aware Knowledge Distillation for DETRs", arXiv
    2502.10683. No code is public, and of the text we know the abstract and the account of it in a port to YOLO by
    others: masks, their scales and weights, and 1 : 5 : 2 with the teacher's best score come from there.

    Requires: labels; feature maps for LCMD; for TCLD decoders that are asked at references, so not those of DETR,
    Table Transformer and Conditional DETR. Any widths, strides, layers and numbers of queries. An image without
    objects, or without labels, is all background in LCMD and counts for nothing in TCLD.

    Differs from the paper in (as far as we know it): maps are those that the encoder reads, and not its memory, and
    their differences are means over channels. Of overlapping objects the smallest counts. A target-aware query has the
    mean content of the teacher's own queries and the position embedding of the nearest of them, where the teacher asks
    for one; how the paper makes contents is not known to us. Every image has the same number of these queries, for
    they attend to each other, and its losses must not depend on the others of its batch: they are filled up with
    jittered copies (as in DN-DETR, arXiv 2203.01305), and objects beyond that number have none. The scores are divided
    by their sum in the image.
    """

    config_class = CLoCKDistillConfig
    paper = {
        "title": "CLoCKDistill: Consistent Location-and-Context-aware Knowledge Distillation for DETRs",
        "id": "arXiv 2502.10683",
        "bibtex": "@article{lan2025clockdistill,\n"
        "  title={{CLoCKDistill}: Consistent Location-and-Context-aware Knowledge Distillation for {DETRs}},\n"
        "  author={Lan, Qizhen and Tian, Qing},\n"
        "  journal={arXiv preprint arXiv:2502.10683},\n"
        "  year={2025}\n"
        "}",
    }

    def __init__(self, config: CLoCKDistillConfig, student: DetectorSpec, teacher: DetectorSpec) -> None:
        super().__init__(config, student, teacher)
        check_layers(config.layers, student)
        for role, spec in (("student", student), ("teacher", teacher)):
            if config.asks and not spec.reference_size:
                raise UserError(
                    f"clockdistill asks both decoders at the objects' boxes, but {spec.family}, the {role}, takes no "
                    "references: set method.class_weight, box_weight and giou_weight to 0 to distil its maps alone"
                )
        self.softmax = student.activation == "softmax"
        self.reference_size = teacher.reference_size
        self.maps = AlignedMaps(student, teacher) if config.compares_maps else None
        self.translate = Translator(student, teacher) if config.asks else None

    @property
    def requires(self) -> frozenset[str]:
        needs = {"features": self.config.compares_maps, "decode": self.config.asks}
        return frozenset(name for name, needed in needs.items() if needed)

    def compare(self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict]) -> dict[str, Tensor]:
        losses = self._memory_losses(student, teacher, labels) if self.config.compares_maps else {}
        losses |= self._logit_losses(student, teacher, labels) if self.config.asks else {}
        return {f"clockdistill_{t}": getattr(self.config, f"{t}_weight") * loss for t, loss in losses.items()}

    # -- LCMD -----------------------------------------------------------------------------------------------------

    def _memory_losses(
        self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict]
    ) -> dict[str, Tensor]:
        """Squared differences of maps in objects and beside them, levels summed, images averaged."""
        _, boxes, there = pad_labels(labels)
        inside, beside = 0, 0
        with torch.autocast(boxes.device.type, enabled=False):
            for source, target, valid in self.maps(student, teacher):
                squared = ((source - target) ** 2).mean(1)  # (B, H, W)
                corners = cell_boxes(full(boxes), teacher.mask, squared.shape[1:])
                covered = covered_cells(corners, squared.shape[1:]) * there[..., None, None] * valid  # (B, G, H, W)
                # M S (A_t - A_s)^2 with S = 1 / cells of the object
                share = covered / covered.sum((2, 3), keepdim=True).clamp(min=1)
                inside = inside + (share.amax(1) * squared).sum((1, 2)).mean()
                # (1 - M) S (A_t - A_s)^2 with S = 1 / cells of the background
                free = valid[:, 0] - covered.amax(1)
                beside = beside + ((free * squared).sum((1, 2)) / free.sum((1, 2)).clamp(min=1)).mean()
        return {"foreground": inside, "background": beside}

    # -- TCLD -----------------------------------------------------------------------------------------------------

    def _logit_losses(self, student: DetectorOutput, teacher: DetectorOutput, labels: list[dict]) -> dict[str, Tensor]:
        """Distances of the answers at objects, weighted by the teacher's score, layers summed, images averaged."""
        boxes, has_objects = self._points(labels)
        contents, positions = self._contents(teacher, boxes)
        boxes = boxes.to(teacher.boxes.dtype)
        answer = ask_teacher(teacher, (contents, positions, boxes[..., : self.reference_size]))
        told = ask(student, self.translate((contents, positions, boxes), answer))
        with torch.autocast(boxes.device.type, enabled=False):
            layers = [theirs for _, theirs in align_layers(told, answer, self.config.layers)]
            s_logits, s_boxes = full(told.logits[-len(layers) :]), full(told.boxes[-len(layers) :])
            t_logits, t_boxes = (torch.stack([full(x[i]) for i in layers]) for x in (answer.logits, answer.boxes))
            weights = point_weights(t_logits, self.softmax) * has_objects  # (L, B, Q)
            l1, giou = box_distances(s_boxes, t_boxes)
            distances = {"class": class_divergence(s_logits, t_logits, self.softmax), "box": l1, "giou": giou}
            return {term: (weights * distance).sum(-1).mean(1).sum() for term, distance in distances.items()}

    def _points(self, labels: list[dict]) -> tuple[Tensor, Tensor]:
        """Boxes (B, N, 4) to ask at, some box where an image has no objects; and whether it has any, (B, 1)."""
        _, boxes, there = pad_labels(labels)
        count = there.sum(1, keepdim=True)
        slots = torch.arange(self.config.points, device=boxes.device)
        turn, which = slots // count.clamp(min=1), slots % count.clamp(min=1)  # (B, N)
        boxes = full(boxes).gather(1, which[..., None].expand(-1, -1, 4))
        ids = torch.stack([label["image_id"] for label in labels])
        noise = 2 * uniform_noise(ids, self.step, (self.config.points, 4)) - 1
        noise = self.config.jitter * noise * (turn > 0)[..., None]
        centre, size = boxes[..., :2], boxes[..., 2:]
        moved = torch.cat([centre + noise[..., :2] * size / 2, size * (1 + noise[..., 2:])], -1).clamp(0, 1)
        return torch.where((count > 0)[..., None], moved, 0.5), count > 0

    def _contents(self, teacher: DetectorOutput, boxes: Tensor) -> tuple[Tensor, Tensor | None]:
        """Contents (B, N, D) and position embeddings (B, N, D) of queries at these boxes, for the teacher."""
        contents, positions, references = teacher.decode.own
        contents = contents.mean(1, keepdim=True).expand(-1, boxes.shape[1], -1)
        if positions is not None:
            centres = references[..., :2].to(boxes.dtype)
            nearest = torch.cdist(boxes[..., :2], centres).argmin(-1)  # (B, N)
            positions = positions.gather(1, nearest[..., None].expand(-1, -1, positions.shape[-1]))
        return contents, positions
