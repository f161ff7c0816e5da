"""What every method sees of a detector, whatever its family.

Letters in the shapes of this package: L decoder layers, B images, Q queries, C classes, D width, S encoder positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor, nn


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
    activation: str  # of the class logits: "sigmoid" or "softmax"
    capabilities: frozenset[str]  # what a method may require: "decode", "features", ...


@dataclass
class DetectorOutput:
    """Predictions of one batch, first decoder layer first. Boxes are (cx, cy, w, h) in [0, 1] of the valid image."""

    logits: Tensor  # (L, B, Q, C)
    boxes: Tensor  # (L, B, Q, 4)
    queries: Tensor  # (L, B, Q, D), the decoder's hidden states
    features: list[Tensor] = field(default_factory=list)  # one (B, D, H, W) a level, finest first
    decode: Callable[[Tensor, Tensor, Tensor], DetectorOutput] | None = None  # asks the encoded images other questions
    proposals: tuple[Tensor, Tensor] | None = None  # two-stage: (B, S, C) logits and (B, S, 4) boxes of the encoder
    loss: Tensor | None = None  # Transformers' own detection loss, when labels were given

    def select_classes(self, columns: Tensor) -> DetectorOutput:
        """These (K,) class columns of the logits, in this order, and of what `decode` answers; not of `proposals`."""
        output, ask = replace(self, logits=self.logits[..., columns]), self.decode
        if ask is not None:
            output.decode = lambda *question: ask(*question).select_classes(columns)
            output.decode.own = ask.own
        return output


class DetectorAdapter:
    """Translates one family of Transformers detectors; owns every attribute path of it.

    Args:
        model: a loaded `...ForObjectDetection`. It is taken as it is; nothing stays on it after a call.
        processor: its image processor: pixel mean and standard deviation are read from it.
    """

    spec: DetectorSpec

    def __init__(self, model: nn.Module, processor) -> None:
        self.model, self.processor = model, processor

    def __call__(self, pixel_values: Tensor, pixel_mask: Tensor, labels: list[dict] | None = None) -> DetectorOutput:
        """Runs the model on uint8 `pixel_values` (B, 3, H, W), valid where bool `pixel_mask` (B, H, W) is true."""
        raise NotImplementedError

    def normalize(self, pixel_values: Tensor, pixel_mask: Tensor) -> Tensor:
        """uint8 pixels to this model's own statistics, padding to 0 as Transformers' image processors have it."""
        pixels = pixel_values.float() / 255
        # Numbers and not tensors: a tensor would be copied to the device, and the host would wait for it.
        for channel, mean, std in zip(pixels.unbind(1), self.spec.pixel_mean, self.spec.pixel_std, strict=True):
            channel.sub_(mean).div_(std)
        return pixels.mul_(pixel_mask[:, None])

    @staticmethod
    @contextmanager
    def tap(modules: dict[str, nn.Module]) -> Iterator[dict[str, tuple]]:
        """Collects (args, kwargs, output) of each of `modules` during the block; no hook outlives it."""
        seen: dict[str, tuple] = {}

        def collect(name):
            return lambda _, args, kwargs, output: seen.__setitem__(name, (args, kwargs, output))

        handles = [m.register_forward_hook(collect(name), with_kwargs=True) for name, m in modules.items()]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()
