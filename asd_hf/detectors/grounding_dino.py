"""Grounding DINO (Liu et al., arXiv 2303.05499): a detector of whatever classes its text prompt names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GroundingDinoImageProcessor

from ..errors import UserError
from .base import DetectorAdapter, DetectorOutput, DetectorSpec, pixel_statistics


class GroundingDinoAdapter(DetectorAdapter):
    """Adapter of `GroundingDinoForObjectDetection`, which can only be a teacher.

    The model rates every token of the text; a class has the mean probability of its tokens, as in the original's
    evaluation on COCO. Heads and reference points run in fp32 whatever autocast says.

    Args:
        processor: a `GroundingDinoProcessor`; `self.processor` is its image processor.
    """

    processor_class = GroundingDinoImageProcessor
    backbone_path = "model.backbone.conv_encoder.model"
    open_vocabulary = True
    two_stage = True

    def __init__(self, model: nn.Module, processor) -> None:
        super().__init__(model, processor.image_processor)
        self.tokenizer = processor.tokenizer
        self._text: Tensor | None = None  # (1, T) ids of the prompt
        self._tokens: Tensor | None = None  # (C, N) where in the prompt the tokens of a class stand, -1 beyond them
        config = model.config
        strides = list(self.backbone_strides())
        while len(strides) < config.num_feature_levels:
            strides.append(2 * strides[-1])
        self.spec = DetectorSpec(
            family=config.model_type,
            hidden_size=config.d_model,
            class_names=(),
            num_layers=config.decoder_layers,
            num_queries=config.num_queries,
            strides=tuple(strides),
            **pixel_statistics(self.processor),
            activation="sigmoid",
            capabilities=frozenset({"decode", "features", "attention"}),
            reference_size=4,
        )

    def prompt(self, class_names: Sequence[str]) -> None:
        """Tells the model which classes to look for, until it is told others.

        The text is "cat. dog. traffic light.": lower case, underscores as spaces.

        Raises:
            UserError: the text has more tokens than the model takes, or a class has none or would be read as two.
        """
        texts = [" ".join(name.lower().replace("_", " ").split()) for name in class_names]
        spans, end = [], 0
        for name, text in zip(class_names, texts, strict=True):
            if "." in text or "?" in text:
                raise UserError(
                    f"class {name!r}: '.' and '?' end a class in the prompt of {self.spec.family}: give another name "
                    "in model.class_map"
                )
            spans.append((end, end + len(text)))
            end += len(f"{text}. ")
        encoded = self.tokenizer(" ".join(f"{text}." for text in texts), return_offsets_mapping=True, verbose=False)
        ids, limit = encoded["input_ids"], self.model.config.max_text_len
        if len(ids) > limit:
            raise UserError(
                f"the prompt of {len(spans)} classes has {len(ids)} tokens, {self.spec.family} takes {limit}: give it "
                "fewer classes, or shorter names in model.class_map"
            )
        tokens = []
        for name, (start, stop) in zip(class_names, spans, strict=True):
            inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if start <= a < b <= stop]
            if not inside:
                raise UserError(f"class {name!r} has no text to prompt for: give another name in model.class_map")
            tokens.append(torch.tensor(inside))
        self._text = torch.tensor([ids])
        self._tokens = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=-1)
        self.spec = replace(self.spec, class_names=tuple(class_names))

    def forward(self, pixels: Tensor, mask: Tensor, labels: list[dict] | None) -> DetectorOutput:
        if self._text is None:
            raise UserError(f"{self.spec.family} finds what it is told to: call prompt(class_names) first")
        self._text, self._tokens = self._text.to(pixels.device), self._tokens.to(pixels.device)
        core = self.model.model
        taps = {f"level {i}": level for i, level in enumerate(core.input_proj_vision)} | {"decoder": core.decoder}
        precise = [core.encoder_output_bbox_embed, *core.decoder.bbox_embed]
        with self.tap(taps) as seen, self.outside_autocast(precise), self.attending() as attention:
            # The core and not the whole model: that would run the heads a second time, and in autocast.
            out = core(pixel_values=pixels, pixel_mask=mask, input_ids=self._text.expand(len(pixels), -1))
        _, context, _ = seen["decoder"]
        text = context["text_encoder_hidden_states"]
        features = [seen[f"level {i}"][2] for i in range(len(core.input_proj_vision))]

        def decode(queries: Tensor, positions: None, references: Tensor) -> DetectorOutput:
            """Puts other questions to the encoded images.

            Args:
                queries: contents (B, Q, D). `decode.own` is the triple that the model asked by itself.
                positions: None, the decoder derives them from the references.
                references: (B, Q, 4) boxes in [0, 1] of the valid image.
            """
            question = {
                "inputs_embeds": queries,
                "reference_points": references,
                "text_encoder_attention_mask": None,  # no token is padding; the decoder's mask is for `num_queries`
            }
            with self.outside_autocast(precise), self.attending() as attention:
                decoded = core.decoder(**(context | question))
            return answer(decoded, references, attention)

        decode.own = context["inputs_embeds"], None, context["reference_points"]

        def answer(decoded, references: Tensor, attention: Callable) -> DetectorOutput:
            hidden = decoded.intermediate_hidden_states.transpose(0, 1).to(self.model.dtype)
            # Layer l refines the boxes of layer l - 1.
            earlier = decoded.intermediate_reference_points.unbind(1)[:-1]
            token_logits, boxes = self._predict(hidden, text, (references, *earlier))
            output = DetectorOutput(self._classes(token_logits), boxes, hidden, decode=decode)
            output.attention = attention(features, slice(None))
            return output

        output = answer(out, out.init_reference_points, attention)
        output.features = features
        return output

    def _predict(self, hidden: Tensor, text: Tensor, references: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of tokens (L, B, Q, T) and boxes (L, B, Q, 4) of hidden states (L, B, Q, D) and text (B, T, D)."""
        logits, boxes, count = [], [], text.shape[1]
        layers = zip(hidden, references, self.model.class_embed, self.model.bbox_embed, strict=True)
        with torch.autocast(hidden.device.type, enabled=False):
            text = text.to(hidden.dtype)
            known = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
            for state, reference, class_head, box_head in layers:
                logits.append(class_head(state, text, known)[..., :count])
                origin = torch.special.logit(reference.to(state.dtype), eps=1e-5)
                boxes.append((box_head(state) + origin).sigmoid())
        return torch.stack(logits), torch.stack(boxes)

    def _classes(self, token_logits: Tensor) -> Tensor:
        """Logits (..., C) of the mean probability of each class's tokens, of logits (..., T) of tokens."""
        own, absent = token_logits[..., self._tokens.clamp(min=0)], self._tokens < 0
        # log(mean p / mean(1 - p)); in logarithms no probability is too small, or too near 1.
        yes, no = (F.logsigmoid(x).masked_fill(absent, -torch.inf).logsumexp(-1) for x in (own, -own))
        return yes - no

    @property
    def class_heads(self) -> list[nn.Linear]:
        raise UserError(f"{self.spec.family} has no class heads: it can only be a teacher")
