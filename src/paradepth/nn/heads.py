"""Trunk states to predictions.

Shapes: … any leading dimensions, T tokens, D width, N classes.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

Pool = Literal["cls", "mean"]


class ClassifierHead(nn.Module):
    """Pools the tokens (the class token or their mean), normalises and maps to class logits.

    Leading dimensions pass through, so the states of all prefixes, (n, B, T, D), take one call.

    Args:
        width: D.
        num_classes: N, at least 1.
        pool: "cls" or "mean".

    Raises:
        ValueError: unknown pooling or fewer than one class.

    >>> import torch
    >>> ClassifierHead(64, 10, pool="mean")(torch.randn(4, 2, 16, 64)).shape
    torch.Size([4, 2, 10])
    """

    def __init__(self, width: int, num_classes: int, *, pool: Pool = "mean") -> None:
        super().__init__()
        if pool not in ("cls", "mean"):
            raise ValueError(f"pool is {pool!r}; it must be 'cls' or 'mean'")
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be at least 1")
        self.pool = pool
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.classify.weight, std=0.02)
        nn.init.zeros_(self.classify.bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Maps states (…, T, D) to logits (…, N)."""
        pooled_D = x_TD[..., 0, :] if self.pool == "cls" else x_TD.mean(dim=-2)
        return self.classify(self.norm(pooled_D))

    def flops(self) -> int:
        """Floating-point operations for one sample (a multiply-add counts two)."""
        return 2 * self.classify.in_features * self.classify.out_features
