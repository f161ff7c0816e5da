"""Deformable DETR (Zhu et al., arXiv 2010.04159): plain, with box refinement, and two-stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers import DeformableDetrImageProcessor
from transformers.models.deformable_detr.modeling_deformable_detr import inverse_sigmoid

from .base import DetectorAdapter, DetectorOutput, DetectorSpec, Question, class_names_of, pixel_statistics
from .together import decoding_together

QUESTION = "inputs_embeds", "object_queries_position_embeddings", "reference_points"  # as the decoder names its parts


class DeformableDetrAdapter(DetectorAdapter):
    """Adapter of `DeformableDetrForObjectDetection`.

    Heads and reference points run in fp32 whatever autocast says: in bf16 a box is off by up to a pixel at 640 pixels.
    """

    processor_class = DeformableDetrImageProcessor
    backbone_path = "model.backbone.model"
    config_names = {
        "encoder_layers": ("encoder_layers",),
        "decoder_layers": ("decoder_layers",),
        "num_queries": ("num_queries", "two_stage_num_proposals"),
        "d_model": ("d_model",),
    }
    class_loss_weight = 2.0
    asks_together = True
    slow_parameters = ("sampling_offsets", "reference_points")  # paper, appendix A.2

    def __init__(self, model: nn.Module, processor) -> None:
        super().__init__(model, processor)
        config = model.config
        strides = list(self.backbone_strides())
        while len(strides) < config.num_feature_levels:
            strides.append(2 * strides[-1])
        self.spec = DetectorSpec(
            family=config.model_type,
            hidden_size=config.d_model,
            class_names=class_names_of(config),
            num_layers=config.decoder_layers,
            num_queries=config.two_stage_num_proposals if config.two_stage else config.num_queries,
            strides=tuple(strides),
            **pixel_statistics(processor),
            activation="sigmoid",
            capabilities=frozenset(
                {"decode", "features", "attention"} | ({"proposals"} if config.two_stage else set())
            ),
            asks_positions=True,
            reference_size=4 if config.two_stage else 2,
        )

    @property
    def two_stage(self) -> bool:
        return self.model.config.two_stage

    def forward(
        self,
        pixels: Tensor,
        mask: Tensor,
        labels: list[dict] | None,
        questions: Callable[[], dict[str, Question]] = dict,
    ) -> DetectorOutput:
        core = self.model.model
        taps = {f"level {i}": level for i, level in enumerate(core.input_proj)} | {"decoder": core.decoder}
        asked: dict[str, Question] = {}

        def ask_beside() -> dict[str, dict[str, Tensor]]:
            asked.update(questions())
            return {name: dict(zip(QUESTION, question, strict=True)) for name, question in asked.items()}

        together = decoding_together(core.decoder, ask_beside, "attention_mask")
        with self.tap(taps) as seen, together as told, self._precise(), self.attending() as attention:
            # The core and not the whole model: that would run the heads a second time, and in autocast.
            out = core(pixel_values=pixels, pixel_mask=mask)
        _, context, _ = seen["decoder"]
        features = [seen[f"level {i}"][2] for i in range(len(core.input_proj))]

        def decode(queries: Tensor, positions: Tensor, references: Tensor) -> DetectorOutput:
            """Puts other questions to the encoded images.

            Args:
                queries: contents (B, Q, D). `decode.own` is the triple that the model asked by itself.
                positions: position embeddings (B, Q, D), added to the queries in every attention.
                references: (B, Q, 2) points or (B, Q, 4) boxes in [0, 1] of the valid image.
            """
            question = dict(zip(QUESTION, (queries, positions, references), strict=True))
            with self._precise(), self.attending() as attention:
                decoded = core.decoder(**(context | question))
            return answer(decoded, references, attention)

        decode.own = tuple(context[name] for name in QUESTION)

        def answer(decoded, references: Tensor, attention: Callable) -> DetectorOutput:
            hidden = decoded.intermediate_hidden_states.transpose(0, 1).to(self.model.dtype)
            # Layer l refines the boxes of layer l - 1; without refinement every layer starts from the same points.
            earlier = decoded.intermediate_reference_points.unbind(1)[:-1]
            logits, boxes = self._predict(hidden, (references, *earlier))
            return DetectorOutput(logits, boxes, hidden, decode=decode, attention=attention(features, slice(None)))

        output = answer(out, out.init_reference_points, attention)
        output.answers = {name: answer(told[name], asked[name][2], attention) for name in told}
        output.features = features
        if out.enc_outputs_class is not None:
            output.proposals = out.enc_outputs_class, out.enc_outputs_coord_logits.sigmoid()
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

    def _precise(self) -> AbstractContextManager:
        """Runs the model's own reference points, refinement and proposal heads outside autocast during the block."""
        core = self.model.model
        modules = [getattr(core, "reference_points", None)]
        modules += [*(core.decoder.bbox_embed or ()), *(core.decoder.class_embed or ())]
        return self.outside_autocast(modules)

    @property
    def layer_lists(self) -> dict[str, int]:
        """Module lists with one entry a layer, and how many layers; heads of two stages have one entry more."""
        config = self.model.config
        heads = ("class_embed", "bbox_embed", "model.decoder.class_embed", "model.decoder.bbox_embed")
        decoder = dict.fromkeys(("model.decoder.layers", *heads), config.decoder_layers)
        return {"model.encoder.layers": config.encoder_layers} | decoder

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

    @property
    def class_heads(self) -> list[nn.Linear]:
        return [*self.model.class_embed, *(self.model.model.decoder.class_embed or ())]

    def replace_classes(self, class_names: tuple[str, ...], rows: list[int | None]) -> None:
        chooser = self.model.class_embed[-1]
        first = chooser.weight[0].clone(), chooser.bias[0].clone()
        super().replace_classes(class_names, rows)
        if self.model.config.two_stage:  # proposals are chosen by the first row of the last head, whatever the classes
            with torch.no_grad():
                chooser.weight[0], chooser.bias[0] = first
