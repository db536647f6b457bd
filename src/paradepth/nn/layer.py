"""The pre-LN Transformer layer in residual form: one step of an ODE in depth.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from paradepth.nn.attention import MultiHeadAttention
from paradepth.nn.dropout import Dropout
from paradepth.nn.feed_forward import FeedForward


class EncoderLayer(nn.Module):
    """x + step · F(x) with F(x) = φ1(x) + φ2(x + φ1(x)), φ1 = attention∘LN and φ2 = MLP∘LN.

    With step = 1 it is the ordinary pre-LN Transformer layer. Source: Layer-Parallel Training for Transformers
    (arXiv 2601.09026), the encoder's ODE form.

    Args:
        width: D.
        heads: attention heads.
        mlp: hidden width of the feed-forward part.
        bias: whether linear maps have biases.
        dropout: dropout probability after attention, in the MLP and after it.
        attention_dropout: dropout probability of the attention weights.
        causal: a token sees itself and the ones before it only.
        deep_init: number L of layers in a deep stack; scales the value, output and MLP projections at initialisation by
            √(log 2L). None leaves them alone.

    >>> layer = EncoderLayer(64, heads=4, mlp=256)
    >>> x = torch.randn(2, 10, 64)
    >>> bool(torch.allclose(layer(x, step=0.5), x + 0.5 * layer.residual(x)))
    True
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        mlp: int,
        bias: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        causal: bool = False,
        deep_init: int | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, bias=bias)
        self.attention = MultiHeadAttention(width, heads, bias=bias, attention_dropout=attention_dropout, causal=causal)
        self.attention_out_dropout = Dropout(dropout)
        self.mlp_norm = nn.LayerNorm(width, bias=bias)
        self.mlp = FeedForward(width, mlp, bias=bias, dropout=dropout)
        self.mlp_out_dropout = Dropout(dropout)
        self._initialise(deep_init)

    def _initialise(self, deep_init: int | None) -> None:
        width = self.attention.out.in_features
        for third in self.attention.qkv.weight.data.split(width):  # each of Q, K, V is a square map of its own
            nn.init.xavier_uniform_(third)
        for linear in (self.attention.out, self.mlp.up, self.mlp.down):
            nn.init.xavier_uniform_(linear.weight)
        for linear in (self.attention.qkv, self.attention.out, self.mlp.up, self.mlp.down):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if deep_init is not None:
            if deep_init < 1:
                raise ValueError(f"deep_init is {deep_init}; it is a number of layers and must be at least 1")
            scale = math.sqrt(math.log(2 * deep_init))
            with torch.no_grad():
                self.attention.qkv.weight[2 * width :].mul_(scale)
                for linear in (self.attention.out, self.mlp.up, self.mlp.down):
                    linear.weight.mul_(scale)

    def residual(self, x_BTD: Tensor, mask: Tensor | None = None) -> Tensor:
        """F(x), shape (B, T, D). `mask` is the attention's (True lets a query see a key)."""
        a_BTD = self.attention_out_dropout(self.attention(self.attention_norm(x_BTD), mask))
        m_BTD = self.mlp_out_dropout(self.mlp(self.mlp_norm(x_BTD + a_BTD)))
        return a_BTD + m_BTD

    def forward(self, x_BTD: Tensor, mask: Tensor | None = None, *, step: float = 1.0) -> Tensor:
        """x + step · F(x), shape (B, T, D)."""
        f_BTD = self.residual(x_BTD, mask)
        return x_BTD + f_BTD if step == 1.0 else x_BTD + step * f_BTD

    def zero_output_(self) -> None:
        """Sets both output projections to zero, so that F(x) = 0 until they are trained."""
        with torch.no_grad():
            for linear in (self.attention.out, self.mlp.down):
                linear.weight.zero_()
                if linear.bias is not None:
                    linear.bias.zero_()

    def flops(self, tokens: int) -> int:
        """Floating-point operations of one layer evaluation, forward only (a multiply-add counts two)."""
        return self.attention.flops(tokens) + self.mlp.flops(tokens)
