"""A function whose smoothness is known exactly: a Fourier series with random phases.

Shapes: N points, d dimensions, M terms.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from paradepth.data.seeds import generator

_POINTS_AT_ONCE = 1024


class KnownFunction:
    """f(u) = Σ_k a_k cos(2π k·u + φ_k) on the torus [0, 1)^d, with a_k = c |k|^{−(s + d/2)}, mean 0 and variance 1.

    k runs over the integer vectors with 0 < |k| ≤ K, one of each pair ±k; φ_k is uniform. Without the cut at K, f
    would lie in the Sobolev spaces H^r for all r < s and in none with r ≥ s: that is its order of smoothness. Cut, it
    is as rough as that down to the length 1/K.

    Args:
        dimension: d, 1 or more.
        smoothness: s, above 0.
        frequencies: K, 1 or more.
        seed: draws the phases.

    Raises:
        ValueError: values outside the ranges above.

    >>> f = KnownFunction(dimension=1, smoothness=1.0, frequencies=32, seed=0)
    >>> f(torch.tensor([[0.25], [1.25]], dtype=torch.float64)).diff().abs().item() < 1e-12
    True
    >>> len(f), round(f.remainder(1), 3), round(f.remainder(16), 3)
    (32, 0.41, 0.034)
    """

    def __init__(self, *, dimension: int, smoothness: float, frequencies: int, seed: int) -> None:
        for name, value, least in (("dimension", dimension, 1), ("frequencies", frequencies, 1)):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if not 0 < smoothness < math.inf:
            raise ValueError(f"smoothness is {smoothness}; it must be positive")
        self.dimension, self.smoothness = dimension, smoothness
        every = itertools.product(range(-frequencies, frequencies + 1), repeat=dimension)
        half = [k for k in every if k > (0,) * dimension and sum(part * part for part in k) <= frequencies**2]
        half.sort(key=lambda k: (sum(part * part for part in k), k))
        self._k_Md = torch.tensor(half, dtype=torch.float64)
        self._length_M = self._k_Md.norm(dim=1)
        a_M = self._length_M ** -(smoothness + dimension / 2)
        self._a_M = a_M * (2 / a_M.square().sum()).sqrt()  # a cosine has variance 1/2
        self._phase_M = 2 * math.pi * torch.rand(len(half), generator=generator(seed, "phases"), dtype=torch.float64)

    def __len__(self) -> int:
        """M, the number of terms."""
        return len(self._a_M)

    def __call__(self, u_Nd: Tensor) -> Tensor:
        """f at points (N, d), in float64, shape (N,)."""
        parts = u_Nd.double().split(_POINTS_AT_ONCE)
        return torch.cat([(2 * math.pi * u @ self._k_Md.T + self._phase_M).cos() @ self._a_M for u in parts])

    def remainder(self, terms: int) -> float:
        """Relative error, in L², of the best approximation by so many of the series' own terms.

        It falls as terms^{−s/d}, the optimal rate for functions of this order, as long as `terms` is far below M.
        """
        square_M = self._a_M.square()
        return float((square_M[terms:].sum() / square_M.sum()).sqrt())

    def terms(self, error: float) -> int:
        """The fewest terms whose `remainder` is at most `error`."""
        return next(m for m in range(len(self) + 1) if self.remainder(m) <= error)


def points(count: int, dimension: int, *, seed: int, purpose: str) -> Tensor:
    """Points drawn uniformly from [0, 1)^d, shape (N, d); of another purpose they are another draw.

    >>> points(3, 2, seed=0, purpose="test points").shape
    torch.Size([3, 2])
    """
    return torch.rand(count, dimension, generator=generator(seed, purpose))
