"""The position-wise network of a Transformer layer.

Shapes: B batch, T tokens, D width, M hidden width.
"""

from __future__ import annotations

from torch import Tensor, nn

from paradepth.nn.dropout import Dropout


class FeedForward(nn.Module):
    """Linear D→M, GELU, dropout, linear M→D.

    Args:
        width: D.
        hidden: M.
        bias: whether the two maps have biases.
        dropout: dropout probability of the hidden activations.

    >>> import torch
    >>> FeedForward(8, 32)(torch.randn(2, 3, 8)).shape
    torch.Size([2, 3, 8])
    """

    def __init__(self, width: int, hidden: int, *, bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.act = nn.GELU()
        self.dropout = Dropout(dropout)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Maps every token by itself; returns (B, T, D)."""
        return self.down(self.dropout(self.act(self.up(x_BTD))))

    def flops(self, tokens: int) -> int:
        """Floating-point operations of one forward pass over one sample (a multiply-add counts two)."""
        return 2 * tokens * 2 * self.up.in_features * self.up.out_features
