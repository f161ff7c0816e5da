"""DETR (Carion et al., arXiv 2005.12872), and what its kin share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import DetrImageProcessor

from .attention import Attention, Look, dense_look
from .base import DetectorAdapter, DetectorOutput, DetectorSpec, class_names_of, pixel_statistics


class DetrAdapter(DetectorAdapter):
    """Adapter of `DetrForObjectDetection`.

    Earlier layers predict as in the original: the decoder's last layer norm, then the heads. Transformers' option
    `auxiliary_loss` is more than a loss: with it, every decoder layer reads the normalised states of the one before,
    and the last states are normalised twice. A model trained without it answers otherwise with it, so the option stays
    as the model has it, and the output is exact either way. Heads run in fp32 whatever autocast says.
    """

    processor_class = DetrImageProcessor
    backbone_path = "model.backbone.model"
    config_names = {
        "encoder_layers": ("encoder_layers",),
        "decoder_layers": ("decoder_layers",),
        "num_queries": ("num_queries",),
        "d_model": ("d_model",),
    }
    activation = "softmax"
    asks_positions = True
    reference_size = 0
    question = ("inputs_embeds", "object_queries_position_embeddings")  # contents and positions, for the decoder

    def __init__(self, model: nn.Module, processor) -> None:
        super().__init__(model, processor)
        config = model.config
        self.spec = DetectorSpec(
            family=config.model_type,
            hidden_size=config.hidden_size,
            class_names=class_names_of(config),
            num_layers=config.decoder_layers,
            num_queries=self.num_queries,
            strides=self.backbone_strides()[-1:],
            **pixel_statistics(processor),
            activation=self.activation,
            capabilities=frozenset({"decode", "features", "attention"}),
            asks_positions=self.asks_positions,
            reference_size=self.reference_size,
        )

    @property
    def num_queries(self) -> int:
        return self.model.config.num_queries

    @property
    def auxiliary_loss(self) -> bool:
        return self.model.config.auxiliary_loss

    def forward(self, pixels: Tensor, mask: Tensor, labels: list[dict] | None) -> DetectorOutput:
        core = self.model.model
        layers = {f"layer {i}": layer for i, layer in enumerate(core.decoder.layers)}
        taps = layers | {"neck": core.input_projection, "decoder": core.decoder}
        with self.tap(taps) as seen, self._precise(), self.attending() as attention:
            # The core and not the whole model: that would run the heads a second time, and in autocast.
            core(pixel_values=pixels, pixel_mask=mask)
        _, context, decoded = seen["decoder"]
        features = [seen["neck"][2]]

        def decode(queries: Tensor, positions: Tensor | None, references: Tensor | None) -> DetectorOutput:
            """Puts other questions to the encoded images.

            Args:
                queries: contents (B, Q, D). `decode.own` is the triple that the model asked by itself.
                positions: position embeddings (B, Q, D); DAB-DETR has none.
                references: boxes (B, Q, 4) in [0, 1] of the valid image, in DAB-DETR; the others have none.
            """
            with self.tap(layers) as seen, self._precise(), self.attending() as attention:
                decoded = core.decoder(**(context | self._ask(queries, positions, references)))
            return answer(decoded, seen, attention)

        decode.own = self._asked(context)

        def answer(decoded, seen: dict[str, tuple], attention: Callable) -> DetectorOutput:
            hidden = self._hidden(decoded, [seen[name][2] for name in layers]).to(self.model.dtype)
            logits, boxes = self._predict(hidden, decoded)
            return DetectorOutput(logits, boxes, hidden, decode=decode, attention=attention(features, slice(None)))

        output = answer(decoded, seen, attention)
        output.features = features
        return output

    def _ask(self, queries: Tensor, positions: Tensor | None, references: Tensor | None) -> dict[str, Tensor]:
        """The decoder's arguments for a question, ..."""
        return dict(zip(self.question, (queries, positions), strict=True))

    def _asked(self, context: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
        """... and the question of such arguments."""
        return *(context[name] for name in self.question), None

    def _hidden(self, decoded, states: list[Tensor]) -> Tensor:
        """Hidden states (L, B, Q, D) that the heads read, of what the decoder's layers give."""
        earlier = [self.model.model.decoder.layernorm(state) for state in states[:-1]]
        return torch.stack([*earlier, decoded.last_hidden_state])

    def _predict(self, hidden: Tensor, decoded) -> tuple[Tensor, Tensor]:
        """Logits (L, B, Q, C) and boxes (L, B, Q, 4) of hidden states (L, B, Q, D)."""
        with torch.autocast(hidden.device.type, enabled=False):
            # Layer by layer: products of other shapes may differ in the last bits.
            logits = torch.stack([self.class_head(state) for state in hidden])
            offsets = torch.stack([self.model.bbox_predictor(state) for state in hidden])
            return logits, self._place(offsets, decoded)

    def _place(self, offsets: Tensor, decoded) -> Tensor:
        """Boxes (L, B, Q, 4), of what the box head gives."""
        # Layer by layer, as the model does: on some CPUs the last bit of a sigmoid hangs on its place in the tensor.
        return torch.stack([layer.sigmoid() for layer in offsets])

    def _precise(self) -> AbstractContextManager:
        """Runs what the model itself knows of boxes outside autocast during the block."""
        return self.outside_autocast([])

    @contextmanager
    def attending(self) -> Iterator[Callable[..., Attention | None]]:
        with ExitStack() as stack:
            if self.with_attention:  # some of the family give the weights only when they are told to
                for layer in self.model.model.decoder.layers:
                    for module in self.attention_modules(layer).values():
                        stack.callback(module.register_forward_pre_hook(_ask_for_weights, with_kwargs=True).remove)
            yield stack.enter_context(super().attending())

    def attention_modules(self, layer: nn.Module) -> dict[str, nn.Module]:
        return {"queries": layer.self_attn, "image": layer.encoder_attn}

    def read_look(self, taps: list[dict[str, tuple]], sizes: list[torch.Size], shown: slice) -> Look:
        return dense_look(torch.stack([tap["image"][2][1].mean(1)[:, shown] for tap in taps]), sizes[0])

    @property
    def layer_lists(self) -> dict[str, int]:
        config = self.model.config
        return {"model.encoder.layers": config.encoder_layers, "model.decoder.layers": config.decoder_layers}

    @property
    def class_head(self) -> nn.Linear:
        return self.model.class_labels_classifier

    @property
    def class_heads(self) -> list[nn.Linear]:
        return [self.class_head]

    @property
    def query_embeddings(self) -> list[nn.Embedding]:
        return [self.model.model.query_position_embeddings]

    def reset_heads(self, prior: float = 0.01) -> None:
        """Gives fresh heads the original initial values, where Transformers has N(0, 0.02)."""
        for layer in (self.class_head, *self.model.bbox_predictor.layers):
            layer.reset_parameters()

    def reset_transformer(self) -> None:
        """Gives a fresh neck, transformer and queries the original initial values, where Transformers has N(0, 0.02).

        It matters most for the queries: at 0.02 all of them ask nearly the same, where N(0, 1) tells them apart.
        """
        core = self.model.model
        for module in (core.encoder, core.decoder):
            for parameter in module.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        core.input_projection.reset_parameters()
        for embedding in self.query_embeddings:
            nn.init.normal_(embedding.weight)


def _ask_for_weights(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, kwargs | {"output_attentions": True}
