"""Keys and values of the tokens that were already read, for generation one token at a time.

Shapes: B batch, S tokens so far, H heads, K width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """The keys and values of one attention, growing along the tokens.

    >>> cache = KeyValueCache()
    >>> k_BHTK = torch.randn(2, 4, 3, 8)
    >>> cache.extend(k_BHTK, k_BHTK)[0].shape, cache.length
    (torch.Size([2, 4, 3, 8]), 3)
    """

    def __init__(self) -> None:
        self.k_BHSK: Tensor | None = None
        self.v_BHSK: Tensor | None = None

    @property
    def length(self) -> int:
        """S, the number of tokens whose keys and values are here."""
        return 0 if self.k_BHSK is None else self.k_BHSK.shape[2]

    def extend(self, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Appends the keys and values of T new tokens and returns all of them."""
        if self.k_BHSK is None or self.v_BHSK is None:
            self.k_BHSK, self.v_BHSK = k_BHTK, v_BHTK
        else:
            self.k_BHSK = torch.cat([self.k_BHSK, k_BHTK], dim=2)
            self.v_BHSK = torch.cat([self.v_BHSK, v_BHTK], dim=2)
        return self.k_BHSK, self.v_BHSK

    def reorder(self, rows_B: Tensor) -> None:
        """Keeps the batch rows `rows_B`, in that order: a row may appear several times, as beams need it."""
        if self.k_BHSK is not None and self.v_BHSK is not None:
            self.k_BHSK, self.v_BHSK = self.k_BHSK[rows_B], self.v_BHSK[rows_B]
