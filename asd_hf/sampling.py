"""The attention of active sampling: which predictions a sampling point stands for."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


class Sampler(nn.Module):
    """Attention scores between predictions (Eq. 9, 10, 13 of active sampling distillation, see `methods.asd`).

    Args:
        input_dim: E, numbers of a prediction: box and classes.
        hidden_dim: width of the hidden layers.
        key_dim: width of queries and keys.
        mlp_layers: linear layers of each MLP.
        heads: attention heads, which share `key_dim`.
        normalize: of queries and keys, "none", "layer_norm" or "l2".
        shared_qk: one MLP for both.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int = 256,
        key_dim: int = 256,
        mlp_layers: int = 2,
        heads: int = 1,
        normalize: str = "none",
        shared_qk: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.normalize = heads, normalize

        def mlp() -> nn.Sequential:
            widths = [input_dim] + [hidden_dim] * (mlp_layers - 1) + [key_dim]
            layers = [nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
            return nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1])

        self.query = mlp()
        self.key = None if shared_qk else mlp()
        if self.normalize == "l2":  # cosines need a learnt scale, or a temperature leaves them flat
            self.log_scale = nn.Parameter(torch.tensor(math.log(20.0)))

    def forward(self, points: Tensor, queries: Tensor) -> Tensor:
        """Scaled dot products (N, heads, P, Q) of (N, P, E) points with (N, Q, E) queries."""
        points, keys = self._split(self.query(points)), self._split((self.key or self.query)(queries))
        scale = self.log_scale.exp() if self.normalize == "l2" else points.shape[-1] ** -0.5
        return scale * points @ keys.transpose(-1, -2)

    def frozen(self, points: Tensor, queries: Tensor) -> Tensor:
        """`forward`, whose gradient passes through the sampler to its inputs and leaves the sampler alone."""
        parameters = {name: p.detach() for name, p in self.named_parameters()}
        return functional_call(self, parameters, (points, queries))

    def _split(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if self.normalize == "layer_norm":
            return F.layer_norm(x, x.shape[-1:])
        return F.normalize(x, dim=-1) if self.normalize == "l2" else x
