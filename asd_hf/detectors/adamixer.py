"""AdaMixer (Gao et al., CVPR 2022, arXiv 2203.16507), the model of `asd_hf.models`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..registry import resolve
from .attention import Look, sampled_look
from .base import DetectorAdapter, DetectorOutput, DetectorSpec, class_names_of, pixel_statistics


class AdaMixerAdapter(DetectorAdapter):
    """Adapter of `AdaMixerForObjectDetection`.

    A question to `decode` is contents and reference boxes. Where the decoder looks are its sampling points, each as
    much as any other, with the shares of their levels.

    Batch norm of the backbone keeps its statistics and trains its scale and shift, as in the original.
    """

    backbone_path = "model.backbone"
    config_names = {
        "decoder_layers": ("decoder_layers",),
        "num_queries": ("num_queries",),
        "d_model": ("d_model", "feature_channels"),
    }
    class_loss_weight = 2.0

    def __init__(self, model: nn.Module, processor) -> None:
        super().__init__(model, processor)
        config = model.config
        strides = self.backbone_strides()
        if strides != tuple(config.feature_strides):
            raise UserError(
                f"the backbone's feature maps have strides {list(strides)}: set feature_strides of the adamixer's "
                f"configuration to them, in place of {list(config.feature_strides)}"
            )
        capabilities = {"decode", "attention"}
        if config.feature_channels == config.d_model:  # what methods expect of a feature map
            capabilities.add("features")
        self.spec = DetectorSpec(
            family=config.model_type,
            hidden_size=config.d_model,
            class_names=class_names_of(config),
            num_layers=config.decoder_layers,
            num_queries=config.num_queries,
            strides=strides,
            **pixel_statistics(processor),
            activation="sigmoid",
            capabilities=frozenset(capabilities),
            reference_size=4,
        )

    @staticmethod
    def processor_class(**options):
        return resolve("asd_hf.models:AdaMixerImageProcessor", {}, "image processor")(**options)

    def forward(self, pixels: Tensor, mask: Tensor, labels: list[dict] | None) -> DetectorOutput:
        core = self.model.model
        with self.tap({"decoder": core.decoder}) as seen, self._precise(), self.attending() as attention:
            # The core and not the whole model: that would run the heads a second time, and in autocast.
            out = core(pixel_values=pixels, pixel_mask=mask)
        contents, positions, features = seen["decoder"][0]
        size = core.valid_sizes(pixels, mask)

        def decode(queries: Tensor, positions: None, references: Tensor) -> DetectorOutput:
            """Puts other questions to the encoded images.

            Args:
                queries: contents (B, Q, D). `decode.own` is the triple that the model asked by itself.
                positions: None, the decoder derives them from the references.
                references: (B, Q, 4) boxes in [0, 1] of the valid image.
            """
            with self._precise(), self.attending() as attention:
                decoded = core.decode(queries, core.box_positions(references, size), features, size)
            return answer(decoded, attention)

        decode.own = contents, None, core.query_boxes.to(size).expand(len(size), -1, -1)

        def answer(decoded, attention: Callable) -> DetectorOutput:
            hidden = decoded.intermediate_hidden_states.to(self.model.dtype)
            with torch.autocast(pixels.device.type, enabled=False):
                logits = self.model.classify(hidden)
            boxes = decoded.intermediate_boxes.transpose(0, 1)
            output = DetectorOutput(logits, boxes, hidden.transpose(0, 1), decode=decode)
            output.attention = attention(features, slice(None))
            return output

        output = answer(out, attention)
        output.features = features
        return output

    def _precise(self) -> AbstractContextManager:
        return self.outside_autocast([layer.box_head for layer in self.model.model.decoder.layers])

    def attention_modules(self, layer: nn.Module) -> dict[str, nn.Module]:
        return {"queries": layer.self_attn, "image": layer.sampling}

    def read_look(self, taps: list[dict[str, tuple]], sizes: list[torch.Size], shown: slice) -> Look:
        points, shares = (torch.stack([tap["image"][2][i][:, shown] for tap in taps]) for i in (1, 2))
        levels = zip(self.spec.strides, sizes, strict=True)
        # By a filled tensor a side: a list of numbers would be copied to the device.
        places = [torch.stack([points[..., 0] / (s * w), points[..., 1] / (s * h)], -1) for s, (h, w) in levels]
        return sampled_look(places, (shares / points.shape[4]).unbind(-1), sizes)

    @property
    def backbone(self) -> nn.Module:
        """The backbone itself: unlike most families, this one keeps Transformers' wrapper around timm's."""
        return getattr(super().backbone, "_backbone", super().backbone)

    @property
    def layer_lists(self) -> dict[str, int]:
        return dict.fromkeys(("model.decoder.layers", "class_heads"), self.model.config.decoder_layers)

    @property
    def class_heads(self) -> list[nn.Linear]:
        return [head.out_proj for head in self.model.class_heads]

    def train_batch_norm(self, wanted: Callable[[str], bool]) -> int:
        """Lets batch norm of the backbone follow its batches, but where its scale and shift are frozen.

        Checkpoints do not know of it: loaded anywhere, batch norm keeps its statistics.
        """
        self.model.model.freeze_batch_norms = False
        norms = [name for name, module in self.backbone.named_modules() if isinstance(module, nn.BatchNorm2d)]
        return sum(map(wanted, norms))
