"""YOLOS (Fang et al., arXiv 2106.00666): a plain vision transformer with detection tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import YolosImageProcessor

from .base import DetectorAdapter, DetectorOutput, DetectorSpec, class_names_of, pixel_statistics


class YolosAdapter(DetectorAdapter):
    """Adapter of `YolosForObjectDetection`.

    It has one layer of predictions, the last: its heads are trained on nothing else, neither in the original nor in
    Transformers, and earlier layers would read as noise. So a method can distil one layer of it and no more. There is
    no decoder to ask: detection tokens change what the image's own tokens see. For the same reason it shows no
    attention: its tokens look at patches that have looked at them.

    `features` are the patches as the last layer reads them: what it makes of them itself, no head ever sees. The
    backbone is the patch embedding alone; the transformer behind it is the detector.
    """

    processor_class = YolosImageProcessor
    processor_multiple = 16
    backbone_path = "vit.embeddings.patch_embeddings"
    layer_names = ("YolosLayer",)
    config_names = {
        "encoder_layers": ("num_hidden_layers",),
        "num_queries": ("num_detection_tokens",),
        "d_model": ("hidden_size",),
    }
    frozen_stages = -1
    auxiliary_loss = False  # Transformers' own fails with it
    sees_padding = True

    def __init__(self, model: nn.Module, processor) -> None:
        super().__init__(model, processor)
        config = model.config
        self.spec = DetectorSpec(
            family=config.model_type,
            hidden_size=config.hidden_size,
            class_names=class_names_of(config),
            num_layers=1,
            num_queries=config.num_detection_tokens,
            strides=(config.patch_size,),
            **pixel_statistics(processor),
            activation="softmax",
            capabilities=frozenset({"features"}),
        )

    @property
    def size_divisor(self) -> int:
        return self.model.config.patch_size

    def forward(self, pixels: Tensor, mask: Tensor, labels: list[dict] | None) -> DetectorOutput:
        vit, count = self.model.vit, self.spec.num_queries
        last = vit.encoder.layer[-1]
        with self.tap({"last": last}) as seen:
            tokens = vit(pixels).last_hidden_state
        (read,), _, _ = seen["last"]
        grid = [side // self.size_divisor for side in pixels.shape[2:]]
        patches = last.layernorm_before(read)[:, 1:-count]  # the first token is the class token
        queries = tokens[:, -count:].to(self.model.dtype)
        with torch.autocast(pixels.device.type, enabled=False):
            logits = self.model.class_labels_classifier(queries)
            boxes = self.model.bbox_predictor(queries).sigmoid()
        features = [patches.transpose(1, 2).unflatten(2, grid)]
        return DetectorOutput(logits[None], boxes[None], queries[None], features)

    @property
    def layer_lists(self) -> dict[str, int]:
        return {"vit.encoder.layer": self.model.config.num_hidden_layers}

    @property
    def class_heads(self) -> list[nn.Linear]:
        return [self.model.class_labels_classifier.layers[-1]]

    def reset_heads(self, prior: float = 0.01) -> None:
        """Gives fresh heads the original initial values, where Transformers has N(0, 0.02)."""
        for head in (self.model.class_labels_classifier, self.model.bbox_predictor):
            for layer in head.layers:
                layer.reset_parameters()

    def reset_transformer(self) -> None:
        """Tells fresh tokens and positions apart: Transformers starts them at zero, so that all queries are one."""
        for name, parameter in self.model.vit.named_parameters():
            if name.endswith(("_token", "_tokens", "position_embeddings")):
                nn.init.trunc_normal_(parameter, std=0.02)
