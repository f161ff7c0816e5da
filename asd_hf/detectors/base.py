"""What every method sees of a detector, whatever its family.

Letters in the shapes of this package: L decoder layers, B images, Q queries, C classes, D width, S encoder positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils.generic import is_flash_attention_requested

from ..errors import UserError
from ..ops import full
from .attention import Attention, Look, sampled_look

Question = tuple[Tensor, Tensor | None, Tensor | None]  # queries, positions, references: see `DetectorOutput.decode`


@dataclass(frozen=True)
class DetectorSpec:
    """What is known of a detector before it sees an image."""

    family: str  # Transformers' config.model_type
    hidden_size: int
    class_names: tuple[str, ...]
    num_layers: int  # decoder layers
    num_queries: int
    strides: tuple[int, ...]  # of `DetectorOutput.features`, finest first
    pixel_mean: tuple[float, ...]  # of pixels in [0, 1]
    pixel_std: tuple[float, ...]
    activation: str  # of the class logits: "sigmoid", or "softmax" with a last column "no object"
    capabilities: frozenset[str]  # what a method may require: "decode", "features", ...
    # A question to `decode`: contents, and ...
    asks_positions: bool = False  # ... position embeddings (B, Q, D), ...
    reference_size: int = 0  # ... references of so many numbers: 2 for points, 4 for boxes, 0 for none
    side_values: tuple[float, ...] = ()  # what the bins of `DetectorOutput.sides` stand for, rising


@dataclass
class DetectorOutput:
    """Predictions of one batch, first decoder layer first. Boxes are (cx, cy, w, h) in [0, 1] of the valid image."""

    logits: Tensor  # (L, B, Q, C); softmax heads have C + 1 columns, the last one "no object"
    boxes: Tensor  # (L, B, Q, 4)
    queries: Tensor | None  # (L, B, Q, D), the decoder's hidden states; None of a cached teacher that kept none
    features: list[Tensor] = field(default_factory=list)  # one (B, D, H, W) a level, finest first
    decode: Callable[[Tensor, Tensor, Tensor], DetectorOutput] | None = None  # asks the encoded images other questions
    proposals: tuple[Tensor, Tensor] | None = None  # two-stage: (B, S, C) logits and (B, S, 4) boxes of the encoder
    losses: dict[str, Tensor] | None = None  # the family's own, weighted: `DetectorAdapter.own_loss`
    # Canvas (B, H, W) as the model saw it, true where the image is; the tensor that `prepare` gave. Answers have none.
    mask: Tensor | None = None
    # Logits (L, B, Q, 4, bins) of how far the left, top, right and bottom side of a box lies outside that of its frame
    # (B, Q, 4), a box too, in widths and heights of the frame.
    sides: Tensor | None = None
    side_frames: Tensor | None = None
    attention: Attention | None = None  # of the decoder, once `DetectorAdapter.watch_attention` was called
    # To the questions that were put with the model's own, see `DetectorAdapter.__call__`, by their names.
    answers: dict[str, DetectorOutput] = field(default_factory=dict)

    def map_logits(self, change: Callable[[Tensor], Tensor]) -> DetectorOutput:
        """The same output with other logits, also of what `decode` answers; `proposals` stay."""
        output, ask = replace(self, logits=change(self.logits)), self.decode
        output.answers = {name: answer.map_logits(change) for name, answer in self.answers.items()}
        if ask is not None:
            output.decode = lambda *question: ask(*question).map_logits(change)
            output.decode.own = ask.own
        return output

    def map_boxes(self, scale: Tensor) -> DetectorOutput:
        """The same output in another frame: all boxes and reference points times `scale` (B, 1, 4)."""
        output, ask = replace(self, boxes=self.boxes * scale), self.decode
        output.answers = {name: answer.map_boxes(scale) for name, answer in self.answers.items()}
        if self.proposals is not None:
            output.proposals = self.proposals[0], self.proposals[1] * scale
        if self.side_frames is not None:
            output.side_frames = self.side_frames * scale
        if ask is not None:

            def decode(queries: Tensor, positions: Tensor, references: Tensor) -> DetectorOutput:
                if references is not None:
                    references = references / scale[..., : references.shape[-1]]
                return ask(queries, positions, references).map_boxes(scale)

            queries, positions, references = ask.own
            if references is not None:
                references = references * scale[..., : references.shape[-1]]
            output.decode, decode.own = decode, (queries, positions, references)
        return output


class DetectorAdapter:
    """Translates one family of Transformers detectors; owns every attribute path of it.

    A family gives `forward`, `spec` and the class attributes; what a student needs beyond that has a default here.

    Args:
        model: a loaded `...ForObjectDetection`. It is taken as it is; nothing stays on it after a call.
        processor: its image processor: pixel mean and standard deviation are read from it.

    Class attributes:
        processor_class: image processor of the family.
        processor_multiple: the image processor rounds the sides of images that keep their aspect down to multiples
            of this, so that a model whose `size_divisor` divides it can take them.
        backbone_path: attribute path of the timm or Transformers backbone.
        backbone_type: the only model_type of a backbone that the family's code can take, if it is written for one.
        config_names: what the options of a new student (encoder_layers, decoder_layers, num_queries, d_model) are
            called in the family's configuration.
        default_values: of the configuration of a new student, where Transformers' own build no model.
        derived_values: what the configuration computes of its other values, so that it must not be told.
        slow_parameters: fragments of the names of parameters that train at a tenth of the rate.
        frozen_stages: of a pretrained backbone, as the family is trained; see `student.freeze_backbone`.
        class_loss_weight: of the family's original recipe.
        own_loss: the loss needs the family's training-only queries or box distributions, so that the adapter computes
            it with the model's `loss_function`; otherwise it is that of `DetectionCriterion`.
        auxiliary_loss: Transformers' option of that name in the saved configuration.
        sees_padding: the model knows no padding mask; it is asked in the frame of the padded canvas.
        two_stage: the queries are the best cells of the feature maps, which must be as many.
        layer_names: endings of the names of what encoder and decoder stack.
        open_vocabulary: the model is told by `prompt` which classes to look for.
        asks_together: one pass of the decoder answers questions beside the model's own.
    """

    spec: DetectorSpec
    processor_class: type
    processor_multiple = 1
    backbone_path: str
    backbone_type: str | None = None
    config_names: dict[str, tuple[str, ...]] = {}
    default_values: dict[str, object] = {}
    derived_values: tuple[str, ...] = ()
    slow_parameters: tuple[str, ...] = ()
    frozen_stages = 1
    class_loss_weight = 1.0
    own_loss = False
    auxiliary_loss = True
    sees_padding = False
    two_stage = False
    layer_names: tuple[str, ...] = ("EncoderLayer", "DecoderLayer")
    open_vocabulary = False
    asks_together = False
    with_attention = False  # see `watch_attention`
    fast_loss = False  # `own_loss` is asd_hf's, see `fast_criterion`, which itself counts boxes over all ranks

    def __init__(self, model: nn.Module, processor) -> None:
        self.model, self.processor = model, processor

    def __call__(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor,
        labels: list[dict] | None = None,
        questions: Callable[[], dict[str, Question]] | None = None,
    ) -> DetectorOutput:
        """Runs the model on uint8 `pixel_values` (B, 3, H, W), valid where bool `pixel_mask` (B, H, W) is true.

        Args:
            labels: B dicts with `class_labels` (T,) and `boxes` (T, 4) as cxcywh in [0, 1] of the valid image, for
                families with `own_loss`; images whose bool `labelled` is false take no part in the loss.
            questions: gives questions to `decode`, with references in the valid image, by name. It is called when the
                images are encoded, and the `answers` come of the same pass of the decoder as the predictions. Of
                families that cannot do so (`asks_together`) nothing is asked, and there are no `answers`.
        """
        pixels, mask = self.prepare(pixel_values, pixel_mask)
        # What is watched is the attention of the model's own queries, and flash attention keeps no queries apart.
        alone = self.with_attention or is_flash_attention_requested(self.model.config)
        beside = {}
        if questions is not None and self.asks_together and not alone:
            beside["questions"] = questions
        if not self.sees_padding:
            output = self.forward(pixels, mask, labels, **beside)
            output.mask = mask
            return output
        (height, width), down, across = mask.shape[1:], mask[:, :, 0].sum(1), mask[:, 0].sum(1)
        # Filled tensors: a list of numbers would be copied to the device, and a number over a tensor is not exact.
        scale = torch.stack([across.new_full((), width) / across, down.new_full((), height) / down] * 2, 1)
        scale = scale[:, None]  # (B, 1, 4)
        if labels is not None:
            labels = [label | {"boxes": label["boxes"] / s} for label, s in zip(labels, scale, strict=True)]
        if beside:
            beside["questions"] = lambda: {name: (q, p, r / scale) for name, (q, p, r) in questions().items()}
        output = self.forward(pixels, mask, labels, **beside).map_boxes(scale)
        output.mask = mask
        return output

    def forward(self, pixels: Tensor, mask: Tensor, labels: list[dict] | None) -> DetectorOutput:
        """Runs the model on normalised `pixels`; its boxes, and those of `labels`, are relative to the valid image, or
        to the canvas if the family `sees_padding`. One that `asks_together` also takes `questions`."""
        raise NotImplementedError

    @property
    def size_divisor(self) -> int:
        """The model takes only images whose sides are multiples of this; `prepare` pads them."""
        return 1

    def prepare(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised pixels and their mask, padded at the bottom and the right to what the model can take."""
        pixels = self.normalize(pixel_values, pixel_mask).to(self.model.dtype)
        height, width = pixel_mask.shape[1:]
        missing = (0, -width % self.size_divisor, 0, -height % self.size_divisor)
        if any(missing):
            pixels, pixel_mask = nn.functional.pad(pixels, missing), nn.functional.pad(pixel_mask, missing)
        return pixels, pixel_mask

    def normalize(self, pixel_values: Tensor, pixel_mask: Tensor) -> Tensor:
        """uint8 pixels to this model's own statistics, padding to 0 as Transformers' image processors have it."""
        pixels = pixel_values.float() / 255
        # Numbers and not tensors: a tensor would be copied to the device, and the host would wait for it.
        for channel, mean, std in zip(pixels.unbind(1), self.spec.pixel_mean, self.spec.pixel_std, strict=True):
            channel.sub_(mean).div_(std)
        return pixels.mul_(pixel_mask[:, None])

    @staticmethod
    @contextmanager
    def tap(modules: dict[Hashable, nn.Module]) -> Iterator[dict[Hashable, tuple]]:
        """Collects (args, kwargs, output) of each of `modules` during the block; no hook outlives it."""
        seen: dict[Hashable, tuple] = {}

        def collect(name):
            return lambda _, args, kwargs, output: seen.__setitem__(name, (args, kwargs, output))

        handles = [m.register_forward_hook(collect(name), with_kwargs=True) for name, m in modules.items()]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    @contextmanager
    def outside_autocast(modules: Iterable[nn.Module | None]) -> Iterator[None]:
        """Runs `modules` in their own precision during the block, whatever autocast says."""
        with ExitStack() as stack:
            for module in dict.fromkeys(filter(None, modules)):  # layers may share one
                module.forward = _outside_autocast(module)
                stack.callback(delattr, module, "forward")
            yield

    # -- where the decoder looks ------------------------------------------------------------------------------------

    def watch_attention(self, watch: bool = True) -> None:
        """Fills `DetectorOutput.attention`, also of what `decode` answers, from the next call on; or no longer.

        The model's attention, though not its backbone's, meanwhile runs in plain operations, because fused ones keep
        no weights: it takes more memory, and predictions differ in the last digits. What is saved does not change.

        Raises:
            UserError: the family has no decoder.
        """
        if "attention" not in self.spec.capabilities:
            raise UserError(
                f"{self.spec.family} has no decoder whose attention could be watched: take a method or "
                "a detector that needs none"
            )
        if watch and not self.with_attention:
            self._usual_attention = self.model.config._attn_implementation
            self.model.set_attn_implementation({"": "eager"})
        elif self.with_attention and not watch:
            self.model.set_attn_implementation({"": self._usual_attention})
        self.with_attention = watch

    @contextmanager
    def attending(self) -> Iterator[Callable[..., Attention | None]]:
        """Watches the decoder's attention during the block, once `watch_attention` was called.

        Yields a function that afterwards makes `Attention` of the feature maps and the slice of queries to show.
        """
        if not self.with_attention:
            yield lambda features, shown: None
            return
        layers = [self.attention_modules(layer) for layer in self.model.model.decoder.layers]
        with self.tap({(i, part): m for i, layer in enumerate(layers) for part, m in layer.items()}) as seen:

            def attention(features: list[Tensor], shown: slice) -> Attention:
                taps = [{part: seen[i, part] for part in layer} for i, layer in enumerate(layers)]
                between = []
                for context, weights in (tap["queries"][2] for tap in taps):
                    # Groups of queries that do not see each other stand behind the images of the first one.
                    between.append(full(weights[: len(context)]).mean(1)[:, shown, shown])
                look = self.read_look(taps, [level.shape[2:] for level in features], shown)
                return Attention(torch.stack(between), look)

            yield attention

    def attention_modules(self, layer: nn.Module) -> dict[str, nn.Module]:
        """Of a decoder layer: what attends among "queries" and gives its weights, and what reads the "image"."""
        return {"queries": layer.self_attn, "image": layer.encoder_attn.attn}

    def read_look(self, taps: list[dict[str, tuple]], sizes: list[torch.Size], shown: slice) -> Look:
        """`Attention.look` of the calls of `attention_modules`: here `MultiScaleDeformableAttention`, which is told
        where to sample and with which weights."""
        points, weights = (torch.stack([tap["image"][0][i][:, shown] for tap in taps]) for i in (4, 5))
        return sampled_look(points.unbind(4), weights.unbind(4), sizes)

    # -- speed ------------------------------------------------------------------------------------------------------

    def compile(self, **options) -> None:
        """Compiles, when they are first called, the backbone and each layer of encoder and decoder.

        The rest, and all that comes after the model, stays as it is: it is read by hooks, or matches on the host. So
        do layers whose attention is watched. Names and saved weights do not change.

        Args:
            **options: of `torch.compile`.
        """
        modules, inside = [self.backbone], set(self.backbone.modules())
        if not self.with_attention:
            stacked = (m for m in self.model.modules() if type(m).__name__.endswith(self.layer_names))
            modules += [module for module in stacked if module not in inside]
        for module in modules:
            # Its forward and not itself: hooks of `tap`, new ones in each call, must not be compiled with it.
            module.forward = torch.compile(module.forward, **options)

    # -- what a student needs ---------------------------------------------------------------------------------------

    @classmethod
    def config_values(cls, **sizes: int | None) -> dict[str, int]:
        """The given sizes of a new student under this family's configuration names.

        Raises:
            UserError: the family has no such size.
        """
        given = {name: size for name, size in sizes.items() if size is not None}
        for name in given:
            if name not in cls.config_names:
                family = cls.__name__.removesuffix("Adapter")
                raise UserError(
                    f"model.student.{name}: {family} has no such size; its own go into model.student.config"
                )
        return {key: size for name, size in given.items() for key in cls.config_names[name]}

    @classmethod
    def backbone_values(cls, channels: list[int]) -> dict:
        """What the configuration must say of another backbone whose feature maps have these channels."""
        return {}

    @property
    def backbone(self) -> nn.Module:
        """The timm or Transformers backbone."""
        return self.model.get_submodule(self.backbone_path)

    @property
    def layer_lists(self) -> dict[str, int]:
        """Module lists with one entry a layer, and how many layers; lists of heads may have entries beyond them."""
        return {}

    @property
    def class_heads(self) -> list[nn.Linear | nn.Embedding]:
        """Every module with a row a class; what it has beyond those ("no object") is at the end."""
        raise NotImplementedError

    def reset_heads(self, prior: float = 0.01) -> None:
        """Gives fresh heads the original initial values, where Transformers has others."""

    def reset_transformer(self) -> None:
        """Gives a fresh neck, transformer and queries the original initial values, where Transformers has others."""

    def replace_classes(self, class_names: tuple[str, ...], rows: list[int | None]) -> None:
        """Lets the class heads predict `class_names`, in this order.

        Args:
            class_names: the new classes.
            rows: for each of them the old class whose weights it takes, or None for fresh ones.
        """
        config, old_count, count = self.model.config, len(self.spec.class_names), len(class_names)
        kept = [new for new, old in enumerate(rows) if old is not None]
        taken = [old for old in rows if old is not None]
        heads = self.class_heads
        fresh: dict[nn.Parameter, nn.Module] = {}  # layers that shared a head share the new one
        for head in heads:
            size, width = head.weight.shape
            size += count - old_count
            with torch.no_grad():
                if isinstance(head, nn.Embedding):
                    new = nn.Embedding(size, width)
                else:
                    new = nn.Linear(width, size)
                    new.bias.fill_(-math.log(99) if self.spec.activation == "sigmoid" else 0)
                new = new.to(head.weight)
                for name, tensor in new.named_parameters():
                    old = getattr(head, name)
                    tensor[kept], tensor[count:] = old[taken], old[old_count:]
            fresh[head.weight] = new
        for head in heads:
            new = fresh[head.weight]
            head.weight = new.weight
            if isinstance(head, nn.Embedding):
                head.num_embeddings = new.num_embeddings
                head.padding_idx = None if head.padding_idx is None else head.padding_idx - old_count + count
            else:
                head.bias, head.out_features = new.bias, new.out_features
        config.id2label = dict(enumerate(class_names))
        config.label2id = {name: i for i, name in enumerate(class_names)}
        self.spec = replace(self.spec, class_names=tuple(class_names))

    def open_residuals(self) -> int:
        """Lets the residual blocks of a fresh backbone take part under frozen batch norm.

        timm starts the last batch norm of each block at zero, to be learnt; frozen, it would shut the block for ever.

        Returns:
            How many batch norms are frozen.
        """
        frozen = [module for module in self.backbone.modules() if _is_frozen_batch_norm(module)]
        for module in frozen:
            if not module.weight.any():
                module.weight.fill_(1)
        return len(frozen)

    def train_batch_norm(self, wanted: Callable[[str], bool]) -> int:
        """Puts trainable batch norm in the place of frozen ones of the backbone.

        Checkpoints keep the names of frozen batch norm, so that they load anywhere, with batch norm frozen.

        Args:
            wanted: says of a module's name within the backbone whether to replace it.

        Returns:
            How many were replaced.
        """
        chosen = [(n, m) for n, m in self.backbone.named_modules() if _is_frozen_batch_norm(m) and wanted(n)]
        for name, old in chosen:
            new = _BatchNorm2d(len(old.weight), device=old.weight.device)
            new.load_state_dict(old.state_dict())
            parent, _, attribute = name.rpartition(".")
            setattr(self.backbone.get_submodule(parent), attribute, new)
        return len(chosen)

    def backbone_strides(self) -> tuple[int, ...]:
        """Strides of the backbone's feature maps, measured: it may be dilated or give any of its stages."""
        tensors = chain(self.backbone.named_parameters(), self.backbone.named_buffers())
        image = torch.empty(1, 3, 256, 256, device="meta")
        maps = torch.func.functional_call(self.backbone, {name: t.to("meta") for name, t in tensors}, (image,))
        maps = maps.feature_maps if isinstance(maps, dict) else maps
        return tuple(round(256 / m.shape[2]) for m in maps)  # whether channels come second or last


class _BatchNorm2d(nn.BatchNorm2d):
    """Batch norm with the saved tensors of a frozen one: no count of batches, which a momentum makes needless."""

    _load_from_state_dict = nn.Module._load_from_state_dict  # batch norm's own would ask for the count

    def __init__(self, num_features: int, **options) -> None:
        super().__init__(num_features, **options)
        self.num_batches_tracked = None


def _is_frozen_batch_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("FrozenBatchNorm2d")  # each family of Transformers has its own


def _outside_autocast(module: nn.Module) -> Callable[..., Tensor]:
    forward, parameter = module.forward, next(module.parameters(), None)

    def precise(*inputs: Tensor) -> Tensor:
        if parameter is not None:
            inputs = tuple(x.to(parameter.dtype) for x in inputs)
        with torch.autocast(inputs[0].device.type, enabled=False):
            return forward(*inputs)

    return precise


def sum_over_ranks(numbers: Tensor) -> tuple[Tensor, int]:
    """The sum of every rank's `numbers`, which are overwritten, and how many ranks there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return numbers, 1
    dist.all_reduce(numbers)
    return numbers, dist.get_world_size()


def class_names_of(config) -> tuple[str, ...]:
    return tuple(config.id2label[i] for i in range(config.num_labels))


def pixel_statistics(processor) -> dict[str, tuple[float, ...]]:
    """`pixel_mean` and `pixel_std` of pixels in [0, 1] that make our normalisation equal to the processor's."""
    scale = 255 * (processor.rescale_factor if processor.do_rescale else 1)
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    return {"pixel_mean": tuple(m / scale for m in mean), "pixel_std": tuple(s / scale for s in std)}
