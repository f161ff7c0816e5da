"""Deformable DETR (Zhu et al., arXiv 2010.04159): plain, with box refinement, and two-stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import DeformableDetrImageProcessor
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrFrozenBatchNorm2d,
    inverse_sigmoid,
)

from .base import DetectorAdapter, DetectorOutput, DetectorSpec


class DeformableDetrAdapter(DetectorAdapter):
    """Adapter of `DeformableDetrForObjectDetection`.

    Heads and reference points run in fp32 whatever autocast says: in bf16 a box is off by up to a pixel at 640 pixels.

    Class attributes:
        processor_class: image processor of the family.
        slow_parameters: fragments of the names of parameters that train at a tenth of the rate (paper, appendix A.2).
    """

    processor_class = DeformableDetrImageProcessor
    slow_parameters = ("sampling_offsets", "reference_points")

    def __init__(self, model: nn.Module, processor) -> None:
        super().__init__(model, processor)
        config = model.config
        mean, std = _pixel_statistics(processor)
        self.spec = DetectorSpec(
            family=config.model_type,
            hidden_size=config.d_model,
            class_names=tuple(config.id2label[i] for i in range(config.num_labels)),
            num_layers=config.decoder_layers,
            num_queries=config.two_stage_num_proposals if config.two_stage else config.num_queries,
            strides=self._strides(),
            pixel_mean=mean,
            pixel_std=std,
            activation="sigmoid",
            capabilities=frozenset({"decode", "features"} | ({"proposals"} if config.two_stage else set())),
        )

    @staticmethod
    def config_values(encoder_layers=None, decoder_layers=None, num_queries=None, d_model=None) -> dict[str, int]:
        """The given sizes under this family's configuration names."""
        sizes = {
            "encoder_layers": encoder_layers,
            "decoder_layers": decoder_layers,
            "num_queries": num_queries,
            "two_stage_num_proposals": num_queries,
            "d_model": d_model,
        }
        return {name: size for name, size in sizes.items() if size is not None}

    def __call__(self, pixel_values: Tensor, pixel_mask: Tensor, labels: list[dict] | None = None) -> DetectorOutput:
        core = self.model.model
        pixels = self.normalize(pixel_values, pixel_mask).to(self.model.dtype)
        taps = {f"level {i}": level for i, level in enumerate(core.input_proj)} | {"decoder": core.decoder}
        with self.tap(taps) as seen, self._precise():
            # The core and not the whole model: that would run the heads a second time, and in autocast.
            out = core(pixel_values=pixels, pixel_mask=pixel_mask)
        _, context, _ = seen["decoder"]

        def decode(queries: Tensor, positions: Tensor, references: Tensor) -> DetectorOutput:
            """Puts other questions to the encoded images.

            Args:
                queries: contents (B, Q, D). `decode.own` is the triple that the model asked by itself.
                positions: position embeddings (B, Q, D), added to the queries in every attention.
                references: (B, Q, 2) points or (B, Q, 4) boxes in [0, 1] of the valid image.
            """
            question = {
                "inputs_embeds": queries,
                "object_queries_position_embeddings": positions,
                "reference_points": references,
            }
            with self._precise():
                return answer(core.decoder(**(context | question)), references)

        decode.own = tuple(
            context[name] for name in ("inputs_embeds", "object_queries_position_embeddings", "reference_points")
        )

        def answer(decoded, references: Tensor) -> DetectorOutput:
            hidden = decoded.intermediate_hidden_states.transpose(0, 1).to(self.model.dtype)
            # Layer l refines the boxes of layer l - 1; without refinement every layer starts from the same points.
            earlier = decoded.intermediate_reference_points.unbind(1)[:-1]
            logits, boxes = self._predict(hidden, (references, *earlier))
            return DetectorOutput(logits, boxes, hidden, decode=decode)

        output = answer(out, out.init_reference_points)
        output.features = [seen[f"level {i}"][2] for i in range(len(core.input_proj))]
        if out.enc_outputs_class is not None:
            output.proposals = out.enc_outputs_class, out.enc_outputs_coord_logits.sigmoid()
        if labels is not None:
            output.loss, _, _ = self.model.loss_function(
                output.logits[-1],
                labels,
                pixels.device,
                output.boxes[-1],
                self.model.config,
                output.logits,
                output.boxes,
            )
        return output

    def _predict(self, hidden: Tensor, references: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (L, B, Q, C) and boxes (L, B, Q, 4) of hidden states (L, B, Q, D), a reference a layer."""
        logits, boxes = [], []
        layers = zip(hidden, references, self.model.class_embed, self.model.bbox_embed, strict=False)
        with torch.autocast(hidden.device.type, enabled=False):
            for state, reference, class_head, box_head in layers:
                logits.append(class_head(state))
                offset, origin = box_head(state), inverse_sigmoid(reference.to(state.dtype))
                if origin.shape[-1] == 2:
                    origin = nn.functional.pad(origin, (0, 2))
                boxes.append((offset + origin).sigmoid())
        return torch.stack(logits), torch.stack(boxes)

    @contextmanager
    def _precise(self) -> Iterator[None]:
        """Runs the model's own reference points, refinement and proposal heads outside autocast during the block."""
        core = self.model.model
        modules = [getattr(core, "reference_points", None)]
        modules += [*(core.decoder.bbox_embed or ()), *(core.decoder.class_embed or ())]
        with ExitStack() as stack:
            for module in filter(None, modules):
                module.forward = _outside_autocast(module)
                stack.callback(delattr, module, "forward")
            yield

    @property
    def backbone(self) -> nn.Module:
        """The timm or Transformers backbone."""
        return self.model.model.backbone.model

    @property
    def layer_lists(self) -> dict[str, int]:
        """Module lists with one entry a layer, and how many layers; heads of two stages have one entry more."""
        config = self.model.config
        heads = ("class_embed", "bbox_embed", "model.decoder.class_embed", "model.decoder.bbox_embed")
        decoder = dict.fromkeys(("model.decoder.layers", *heads), config.decoder_layers)
        return {"model.encoder.layers": config.encoder_layers} | decoder

    def _strides(self) -> tuple[int, ...]:
        """Strides of `DetectorOutput.features`, measured: a backbone may be dilated or give any of its stages."""
        tensors = chain(self.backbone.named_parameters(), self.backbone.named_buffers())
        image = torch.empty(1, 3, 256, 256, device="meta")
        maps = torch.func.functional_call(self.backbone, {name: t.to("meta") for name, t in tensors}, (image,))
        maps = maps.feature_maps if isinstance(maps, dict) else maps
        strides = [round(256 / m.shape[-1]) for m in maps]
        while len(strides) < self.model.config.num_feature_levels:
            strides.append(2 * strides[-1])
        return tuple(strides)

    def reset_heads(self, prior: float = 0.01) -> None:
        """Gives fresh heads the original initial values, which Transformers omits.

        Every class starts at probability `prior`, every box at its reference with sides of sigmoid(-2) = 0.12. With
        box refinement only the first layer sets the sides, in two stages the proposals do. One thing stays as
        Transformers has it: without two stages all layers share one class head; the original has one a refining layer.
        """
        config = self.model.config
        with torch.no_grad():
            for head in self.model.class_embed:
                head.reset_parameters()
                head.bias.fill_(-math.log((1 - prior) / prior))
            for number, head in enumerate(self.model.bbox_embed):
                for layer in head.layers:
                    layer.reset_parameters()
                nn.init.zeros_(head.layers[-1].weight)
                nn.init.zeros_(head.layers[-1].bias)
                if not config.two_stage and (number == 0 or not config.with_box_refine):
                    head.layers[-1].bias[2:] = -2

    def reset_transformer(self) -> None:
        """Gives a fresh neck, transformer and queries the original initial values, where Transformers has N(0, 0.02).

        It matters most for the queries: at 0.02 all reference points start within a hundredth of the image's centre,
        where N(0, 1) spreads them over the image.
        """
        core = self.model.model
        for module in (core.input_proj, core.encoder.layers, core.decoder.layers):
            for name, parameter in module.named_parameters():
                # Sampling offsets and attention weights start at values of their own, the same in Transformers.
                if parameter.dim() > 1 and not any(n in name for n in ("sampling_offsets", "attention_weights")):
                    nn.init.xavier_uniform_(parameter)
        for level in core.input_proj:
            nn.init.zeros_(level[0].bias)
        if self.model.config.two_stage:
            nn.init.xavier_uniform_(core.enc_output.weight)
            nn.init.xavier_uniform_(core.pos_trans.weight)
        else:
            nn.init.normal_(core.query_position_embeddings.weight)

    def replace_classes(self, class_names: tuple[str, ...], rows: list[int | None]) -> None:
        """Lets the class heads predict `class_names`, in this order.

        Args:
            class_names: the new classes.
            rows: for each of them the old class whose weights it takes, or None for fresh ones.
        """
        model, config = self.model, self.model.config
        kept = [new for new, old in enumerate(rows) if old is not None]
        taken = [old for old in rows if old is not None]
        heads = [*model.class_embed, *(model.model.decoder.class_embed or ())]
        fresh: dict[nn.Parameter, nn.Linear] = {}  # layers that shared a head share the new one
        for head in heads:
            new = nn.Linear(config.d_model, len(class_names)).to(head.weight)
            with torch.no_grad():
                new.bias.fill_(-math.log(99))
                new.weight[kept], new.bias[kept] = head.weight[taken], head.bias[taken]
                if config.two_stage and head.weight is model.class_embed[-1].weight:
                    # Proposals are chosen by the first row of the last head, whatever the classes.
                    new.weight[0], new.bias[0] = head.weight[0], head.bias[0]
            fresh[head.weight] = new
        for head in heads:
            new = fresh[head.weight]
            head.weight, head.bias, head.out_features = new.weight, new.bias, new.out_features
        config.id2label = dict(enumerate(class_names))
        config.label2id = {name: i for i, name in enumerate(class_names)}
        self.spec = DetectorSpec(**{**vars(self.spec), "class_names": tuple(class_names)})

    def open_residuals(self) -> None:
        """Lets the residual blocks of a fresh backbone take part under frozen batch norm.

        timm starts the last batch norm of each block at zero, to be learnt; frozen, it would shut the block for ever.
        """
        for module in self.backbone.modules():
            if isinstance(module, DeformableDetrFrozenBatchNorm2d) and not module.weight.any():
                module.weight.fill_(1)

    def train_batch_norm(self, wanted: Callable[[str], bool]) -> int:
        """Puts trainable batch norm in the place of frozen ones of the backbone.

        Checkpoints keep the names of frozen batch norm, so that they load anywhere, with batch norm frozen.

        Args:
            wanted: says of a module's name within the backbone whether to replace it.

        Returns:
            How many were replaced.
        """
        frozen = [(n, m) for n, m in self.backbone.named_modules() if isinstance(m, DeformableDetrFrozenBatchNorm2d)]
        chosen = [(name, old) for name, old in frozen if wanted(name)]
        for name, old in chosen:
            new = _BatchNorm2d(len(old.weight), device=old.weight.device)
            new.load_state_dict(old.state_dict())
            parent, _, attribute = name.rpartition(".")
            setattr(self.backbone.get_submodule(parent), attribute, new)
        return len(chosen)


class _BatchNorm2d(nn.BatchNorm2d):
    """Batch norm with the saved tensors of a frozen one: no count of batches, which a momentum makes needless."""

    _load_from_state_dict = nn.Module._load_from_state_dict  # batch norm's own would ask for the count

    def __init__(self, num_features: int, **options) -> None:
        super().__init__(num_features, **options)
        self.num_batches_tracked = None


def _outside_autocast(module: nn.Module) -> Callable[[Tensor], Tensor]:
    forward, dtype = module.forward, next(module.parameters()).dtype

    def precise(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.to(dtype))

    return precise


def _pixel_statistics(processor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixels in [0, 1] that make our normalisation equal to the processor's."""
    scale = 255 * (processor.rescale_factor if processor.do_rescale else 1)
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    return tuple(m / scale for m in mean), tuple(s / scale for s in std)
