"""The smallest model with branches for functions of a point: a fixed embedding, the trunk, a linear read-out.

Shapes: B batch, d dimensions, T tokens, D width, F = 1 + 2d features, … leading dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paradepth.data.seeds import generator
from paradepth.models import TrunkConfig, TrunkModel


@dataclass(frozen=True)
class ApproximatorConfig(TrunkConfig):
    """The shape: the fields of `TrunkConfig`, and

    Attributes:
        dimension: d of the points.
        tokens: T, into which a point is embedded.

    Raises:
        ValueError: values below 1.
    """

    width: int = 8
    mlp: int = 16
    dimension: int = 1
    tokens: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dimension", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


class PointEmbedding(nn.Module):
    """X_0(u)_t = A_t φ(u), φ(u) = (1, cos 2πu_1, sin 2πu_1, …, cos 2πu_d, sin 2πu_d) / √F; nothing of it is learned.

    The entries of A are drawn from N(0, 1) once and for all, whatever the seed of a run. φ has the lowest frequencies
    only: all others are left to the trunk.

    >>> x_BTD = PointEmbedding(dimension=1, tokens=4, width=8)(torch.tensor([[0.1], [1.1]]))
    >>> x_BTD.shape, bool(torch.allclose(x_BTD[0], x_BTD[1], atol=1e-5))
    (torch.Size([2, 4, 8]), True)
    """

    maps: Tensor

    def __init__(self, *, dimension: int, tokens: int, width: int) -> None:
        super().__init__()
        self.tokens, self.dimension = tokens, dimension
        maps_TDF = torch.randn(tokens, width, 1 + 2 * dimension, generator=generator(0, "embedding of points"))
        self.register_buffer("maps", maps_TDF / math.sqrt(1 + 2 * dimension))

    def forward(self, u_Bd: Tensor) -> Tensor:
        """Points (B, d) to states (B, T, D).

        Raises:
            ValueError: points of another dimension.
        """
        if u_Bd.dim() != 2 or u_Bd.shape[1] != self.dimension:
            raise ValueError(f"points have shape {tuple(u_Bd.shape)}; it must be (batch, {self.dimension})")
        angle_Bd = 2 * math.pi * u_Bd
        phi_BF = torch.cat([torch.ones_like(u_Bd[:, :1]), angle_Bd.cos(), angle_Bd.sin()], dim=1)
        return torch.einsum("tdf,bf->btd", self.maps, phi_BF)

    def flops(self) -> int:
        """Floating-point operations for one point (a multiply-add counts two)."""
        return 2 * self.maps.numel()


class LinearReadout(nn.Module):
    """w · mean_t x_t + b. There is no norm, so branches add up in the output as they do in the state: the output of
    prefix k is that of prefix k−1 plus `increment` of δ_k."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.normal_(self.linear.weight, std=width**-0.5)
        nn.init.zeros_(self.linear.bias)

    def increment(self, x_TD: Tensor) -> Tensor:
        """What states (…, T, D) add to the output, (…,)."""
        return x_TD.mean(dim=-2) @ self.linear.weight[0]

    def forward(self, x_TD: Tensor) -> Tensor:
        """States (…, T, D) to numbers (…,)."""
        return self.increment(x_TD) + self.linear.bias

    def flops(self, tokens: int = 1) -> int:
        """Floating-point operations for one point, whatever its number of tokens."""
        return 2 * self.linear.in_features


class Approximator(TrunkModel):
    """Points (B, d) to numbers (B,): f_k(u) = r(X_0(u)) + Σ_{i≤k} r(δ_i(X_0(u))), r the linear read-out.

    >>> model = Approximator(ApproximatorConfig(branches=3, depth=1))
    >>> model(torch.rand(5, 1)).shape, model.prefix_logits(torch.rand(5, 1)).shape
    (torch.Size([5]), torch.Size([3, 5]))
    """

    model_type = "approximator"
    config_class = ApproximatorConfig
    config: Any
    head: LinearReadout

    def _new_stem(self) -> PointEmbedding:
        c = self.config
        return PointEmbedding(dimension=c.dimension, tokens=c.tokens, width=c.width)

    def _new_head(self) -> LinearReadout:
        return LinearReadout(self.config.width)
