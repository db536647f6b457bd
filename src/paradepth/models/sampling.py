"""How the next token is chosen from its logits.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """The likeliest token, or one drawn from the model's distribution or from its likely part.

    A draw is a function of (seed, row, position), whatever else is drawn with it.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token, which is the limit.
        top_k: draw from that many of the likeliest tokens only; None from all.
        top_p: draw from the fewest likeliest tokens that have this probability together (nucleus sampling; source:
            The Curious Case of Neural Text Degeneration, arXiv 1904.09751); None from all.
        seed: of the draws.

    Raises:
        ValueError: a value out of range.

    >>> logits = torch.tensor([[1.0, 3.0, 2.0]])
    >>> Sampling(temperature=0).choose(logits, [0], [0]).tolist()
    [1]
    >>> drawn = {int(Sampling(top_k=2).choose(logits, [0], [n])) for n in range(50)}
    >>> sorted(drawn)
    [1, 2]
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be at least 0 (0 takes the likeliest token)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")

    def choose(self, logits_BV: Tensor, rows: Sequence[int], positions: Sequence[int]) -> Tensor:
        """A token for each row, shape (B,).

        Args:
            logits_BV: of the next token.
            rows, positions: what the draw of each row is a function of, besides the seed.

        Raises:
            ValueError: logits that are not numbers.
        """
        if logits_BV.isnan().any():
            raise ValueError("the model's logits are not numbers: its training diverged, or its weights are damaged")
        if self.temperature == 0:
            return logits_BV.argmax(dim=-1)
        below_BV = logits_BV.double() - logits_BV.amax(dim=-1, keepdim=True)  # so that nothing overflows
        p_BV = (below_BV / self.temperature).softmax(dim=-1)
        if self.top_k is not None or self.top_p is not None:
            p_BV = p_BV * self._likely(p_BV)
        draws = [self._draw(row, position) for row, position in zip(rows, positions, strict=True)]
        total_BV = p_BV.cumsum(dim=-1)
        place_B1 = total_BV[:, -1:] * torch.tensor(draws, dtype=torch.float64, device=p_BV.device).unsqueeze(1)
        return torch.searchsorted(total_BV, place_B1, right=True).squeeze(1)

    def _likely(self, p_BV: Tensor) -> Tensor:
        """Booleans: the tokens that may be drawn."""
        sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
        kept_BV = torch.ones_like(sorted_BV, dtype=torch.bool)
        if self.top_k is not None:
            kept_BV[:, self.top_k :] = False
        if self.top_p is not None:
            among_BV = sorted_BV * kept_BV
            kept_BV &= among_BV.cumsum(dim=-1) - among_BV < self.top_p * among_BV.sum(dim=-1, keepdim=True)
        return torch.zeros_like(kept_BV).scatter(1, order_BV, kept_BV)

    def _draw(self, row: int, position: int) -> float:
        """A number in [0, 1)."""
        digest = hashlib.blake2b(f"next token/{self.seed}/{row}/{position}".encode(), digest_size=6).digest()
        return int.from_bytes(digest, "big") / 2**48
