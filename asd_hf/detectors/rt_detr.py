"""RT-DETR (Zhao et al., arXiv 2304.08069): a hybrid encoder, whose best proposals are the queries."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import RTDetrImageProcessor

from .base import (
    DetectorAdapter,
    DetectorOutput,
    DetectorSpec,
    Question,
    class_names_of,
    pixel_statistics,
    sum_over_ranks,
)
from .together import decoding_together


class RTDetrAdapter(DetectorAdapter):
    """Adapter of `RTDetrForObjectDetection`.

    No padding mask reaches the model: anchors and boxes are relative to the padded canvas. Anchors and heads run in
    fp32 whatever autocast says: in bf16 an anchor is off by up to a pixel at 640 pixels.

    Class attributes:
        loss_names: terms of the loss.
        decoder_loss_names: those of them that encoder proposals do not have.
    """

    processor_class = RTDetrImageProcessor
    backbone_path = "model.backbone.model"
    config_names = {
        "encoder_layers": ("encoder_layers",),
        "decoder_layers": ("decoder_layers",),
        "num_queries": ("num_queries",),
        "d_model": ("d_model", "encoder_hidden_dim"),
    }
    frozen_stages = 0  # of the larger models; the smallest train all of a pretrained backbone
    own_loss = True
    two_stage = True
    sees_padding = True
    asks_together = True
    loss_names: tuple[str, ...] = ("loss_vfl", "loss_bbox", "loss_giou")
    decoder_loss_names: tuple[str, ...] = ()

    def __init__(self, model: nn.Module, processor) -> None:
        super().__init__(model, processor)
        config = model.config
        self._neck_strides = self._measure_neck()
        strides = list(self._neck_strides)
        for level in model.model.decoder_input_proj[len(strides) :]:  # all of them read the coarsest map of the neck
            convolutions = [module.stride[0] for module in level.modules() if isinstance(module, nn.Conv2d)]
            strides.append(self._neck_strides[-1] * math.prod(convolutions))
        self.spec = DetectorSpec(
            family=config.model_type,
            hidden_size=config.d_model,
            class_names=class_names_of(config),
            num_layers=config.decoder_layers,
            num_queries=config.num_queries,
            strides=tuple(strides),
            **pixel_statistics(processor),
            activation="sigmoid",
            capabilities=frozenset({"decode", "features", "attention"}),
            reference_size=4,
        )

    def _measure_neck(self) -> tuple[int, ...]:
        return self.backbone_strides()

    @property
    def size_divisor(self) -> int:
        return self._neck_strides[-1]  # the neck doubles coarse maps and adds them to finer ones

    def forward(
        self,
        pixels: Tensor,
        mask: Tensor,
        labels: list[dict] | None,
        questions: Callable[[], dict[str, Question]] = dict,
    ) -> DetectorOutput:
        core = self.model.model
        taps = {f"level {i}": level for i, level in enumerate(core.decoder_input_proj)} | {"decoder": core.decoder}

        def ask_beside() -> dict[str, dict[str, Tensor]]:
            return {name: _arguments(queries, references) for name, (queries, _, references) in questions().items()}

        together = decoding_together(core.decoder, ask_beside, "encoder_attention_mask")
        with self.tap(taps) as seen, together as told, self._asking(), self.attending() as attention:
            out = core(pixel_values=pixels, labels=labels)
        _, context, _ = seen["decoder"]
        features = [seen[f"level {i}"][2] for i in range(len(core.decoder_input_proj))]
        # Denoising queries stand first. Attention hides them from the others.
        noised = 0 if out.denoising_meta_values is None else out.denoising_meta_values["dn_num_split"][0]

        def decode(queries: Tensor, positions: None, references: Tensor) -> DetectorOutput:
            """Puts other questions to the encoded images.

            Args:
                queries: contents (B, Q, D). `decode.own` is the triple that the model asked by itself.
                positions: None, the decoder derives them from the references.
                references: (B, Q, 4) boxes in [0, 1] of the padded canvas.
            """
            question = _arguments(queries, references) | {"encoder_attention_mask": None}
            with self._asking(), self.attending() as attention:
                decoded = core.decoder(**(context | question))
            return answer(decoded, attention)

        def answer(decoded, attention: Callable, noised: int = 0) -> DetectorOutput:
            output = self._read(decoded, noised)
            output.decode, output.attention = decode, attention(features, slice(noised, None))
            return output

        decode.own = context["inputs_embeds"][:, noised:], None, context["reference_points"][:, noised:].sigmoid()
        output = answer(out, attention, noised)
        output.answers = {name: answer(decoded, attention) for name, decoded in told.items()}
        output.features = features
        if labels is not None:
            with torch.autocast(pixels.device.type, enabled=False):
                output.losses = self._losses(out, labels)
        return output

    def _read(self, decoded, noised: int) -> DetectorOutput:
        """The layers of a decoder's output, without its first `noised` queries."""
        return DetectorOutput(
            decoded.intermediate_logits[:, :, noised:].transpose(0, 1),
            decoded.intermediate_reference_points[:, :, noised:].transpose(0, 1),
            decoded.intermediate_hidden_states[:, :, noised:].transpose(0, 1).to(self.model.dtype),
        )

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Runs heads and anchors outside autocast during the block."""
        core = self.model.model

        def anchors(spatial_shapes, device, dtype):
            return type(core).generate_anchors(core, spatial_shapes, device=device, dtype=self.model.dtype)

        core.generate_anchors = anchors
        try:
            with self.outside_autocast(self._precise_modules()):
                yield
        finally:
            del core.generate_anchors

    def _precise_modules(self) -> list[nn.Module]:
        core = self.model.model
        return [*core.decoder.class_embed, *core.decoder.bbox_embed, core.enc_score_head, core.enc_bbox_head]

    def _losses(self, out, labels: list[dict]) -> dict[str, Tensor]:
        """Those of the model's loss, layers summed; always the same names: ranks average them by their order."""
        predictions = {
            "outputs_class": out.intermediate_logits,
            "outputs_coord": out.intermediate_reference_points,
            "enc_topk_logits": out.enc_topk_logits,
            "enc_topk_bboxes": out.enc_topk_bboxes,
            "predicted_corners": out.intermediate_predicted_corners,
            "initial_reference_points": out.initial_reference_points,
        }
        predictions = {name: tensor for name, tensor in predictions.items() if tensor is not None}
        # Every parameter takes part in every step, as DistributedDataParallel wants: without objects there is no
        # denoising, without labelled images no loss at all.
        nothing = 0 * sum(tensor.sum() for tensor in predictions.values())
        if self.model.config.num_denoising:
            nothing = nothing + 0 * self.model.model.denoising_class_embed.weight.sum()
        losses = dict.fromkeys(self.loss_names, nothing)
        losses |= {f"{name}_enc": nothing for name in self.loss_names if name not in self.decoder_loss_names}
        losses |= {f"{name}_dn": nothing for name in self.loss_names}
        rows, share = list(range(len(labels))), 1
        if not self.fast_loss:
            rows = [i for i in rows if labels[i].get("labelled", True)]
            share = _share(nothing.new_full((), sum(len(labels[i]["class_labels"]) for i in rows)))
            if not rows:
                return losses
        denoising = out.denoising_meta_values
        if len(rows) < len(labels):
            predictions = {name: tensor[rows] for name, tensor in predictions.items()}
            if denoising is not None:
                denoising = denoising | {"dn_positive_idx": [denoising["dn_positive_idx"][i] for i in rows]}
        _, parts, _ = self.model.loss_function(
            predictions["outputs_class"][:, -1],
            [labels[i] for i in rows],
            nothing.device,
            predictions["outputs_coord"][:, -1],
            self.model.config,
            **predictions,
            denoising_meta_values=denoising,
        )
        proposals = sum(part.startswith("loss_bbox_aux_") for part in parts) - 1  # they follow the layers
        for part, loss in parts.items():
            name, stage, number = re.fullmatch(r"(loss_[a-z]+)(?:_(aux|dn)_(\d+))?", part).groups()
            if name != "loss_ddf":  # a mean over queries, not over boxes
                loss = share * loss
            suffix = "_dn" if stage == "dn" else "_enc" if stage == "aux" and int(number) == proposals else ""
            losses[name + suffix] = losses[name + suffix] + loss
        return losses

    @classmethod
    def config_values(cls, **sizes: int | None) -> dict:
        values = super().config_values(**sizes)
        if "d_model" in values:
            values["decoder_in_channels"] = [values["d_model"]] * 3  # of the three maps of the neck
        return values

    @classmethod
    def backbone_values(cls, channels: list[int]) -> dict:
        return {"encoder_in_channels": channels}

    @property
    def layer_lists(self) -> dict[str, int]:
        config = self.model.config
        encoders = [f"model.encoder.aifi.{i}.layers" for i in range(len(config.encode_proj_layers))]
        decoder = ("model.decoder.layers", "model.decoder.class_embed", "model.decoder.bbox_embed")
        return dict.fromkeys(encoders, config.encoder_layers) | dict.fromkeys(decoder, config.decoder_layers)

    @property
    def class_heads(self) -> list[nn.Linear | nn.Embedding]:
        core = self.model.model
        noise = [core.denoising_class_embed] if self.model.config.num_denoising else []
        return [*core.decoder.class_embed, core.enc_score_head, *noise]

    @property
    def box_heads(self) -> list[nn.Module]:
        """Every head whose last layer starts at zero, so that boxes start at their references."""
        core = self.model.model
        return [*core.decoder.bbox_embed, core.enc_bbox_head]

    def reset_heads(self, prior: float = 0.01) -> None:
        """Gives fresh heads the original initial values: every class at probability `prior`, boxes at their reference.

        Transformers starts all classes at probability 1 / (C + 1), the proposals' boxes off their anchors, and the
        classes of denoising close together.
        """
        with torch.no_grad():
            for head in self.class_heads:
                head.reset_parameters()
                if isinstance(head, nn.Linear):
                    head.bias.fill_(-math.log((1 - prior) / prior))
            for head in self.box_heads:
                for layer in head.layers:
                    layer.reset_parameters()
                nn.init.zeros_(head.layers[-1].weight)
                nn.init.zeros_(head.layers[-1].bias)

    def reset_transformer(self) -> None:
        """Gives a fresh neck and transformer the original initial values, where Transformers has N(0, 0.01).

        It matters most for the batch norms of the neck: at N(0, 0.01) hardly anything passes through them.
        """
        backbone = set(self.backbone.modules())
        kept = ("sampling_offsets", "attention_weights", "gateway")  # they start at values of their own
        for name, module in self.model.model.named_modules():
            if module in backbone or any(part in name for part in kept):
                continue
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                module.reset_parameters()


def _arguments(queries: Tensor, references: Tensor) -> dict[str, Tensor]:
    """The decoder's arguments for a question."""
    return {"inputs_embeds": queries, "reference_points": references.logit(eps=1e-6)}


def _share(num_boxes: Tensor) -> Tensor:
    """This rank's number of boxes over the mean of all ranks; none, here or in all, is counted as one.

    Transformers divides by the rank's own number. Times this, W ranks train as one with all their images. It is not
    exact in two places: how many groups of denoising queries there are depends on the fullest image of a rank, and
    the union of matches by which DEIMv2 divides its box losses is only about proportional to the number of boxes.
    """
    total, num_ranks = sum_over_ranks(num_boxes.clone())
    return num_boxes.clamp(min=1) / (total.clamp(min=1) / num_ranks)
