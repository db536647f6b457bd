"""The pre-LN Transformer layer in residual form: one step of an ODE in depth.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from paradepth.nn.attention import CrossAttention, MultiHeadAttention
from paradepth.nn.cache import KeyValueCache
from paradepth.nn.dropout import Dropout
from paradepth.nn.feed_forward import FeedForward
from paradepth.nn.static_mixing import Mixing, StaticMixing, check_mixing


def initialise(layer: nn.Module, deep_init: int | None) -> None:
    """Xavier-uniform weights and zero biases for every attention and feed-forward part inside `layer`.

    Args:
        layer: with such parts.
        deep_init: number L of layers in a deep stack; scales the value, output and MLP projections by √(log 2L). None
            leaves them alone.

    Raises:
        ValueError: `deep_init` below 1.
    """
    if deep_init is not None and deep_init < 1:
        raise ValueError(f"deep_init is {deep_init}; it is a number of layers and must be at least 1")
    for part in layer.modules():
        if isinstance(part, MultiHeadAttention):
            _xavier_(part.qkv, maps=3)
            _xavier_(part.out)
        elif isinstance(part, StaticMixing):
            _xavier_(part.value)
            _xavier_(part.out)
        elif isinstance(part, CrossAttention):
            _xavier_(part.q)
            _xavier_(part.kv, maps=2)
            _xavier_(part.out)
        elif isinstance(part, FeedForward):
            _xavier_(part.up)
            _xavier_(part.down)
    if deep_init is not None:
        scale_projections_(layer, deep_init)


def _xavier_(linear: nn.Linear, *, maps: int = 1) -> None:
    """Each of the `maps` stacked in the weight is initialised as one of its own (Q, K and V are square maps)."""
    with torch.no_grad():
        for part in linear.weight.chunk(maps):
            nn.init.xavier_uniform_(part)
        if linear.bias is not None:
            linear.bias.zero_()


@torch.no_grad()
def scale_projections_(layer: nn.Module, layers: int) -> None:
    """Multiplies the value, output and MLP projections inside `layer` by √(log 2L).

    Args:
        layer: with attention and feed-forward parts.
        layers: L, the number of layers in the stack.

    Source: BERT, as quoted by Layer-Parallel Training for Transformers (arXiv 2601.09026).
    """
    scale = math.sqrt(math.log(2 * layers))
    for part in layer.modules():
        if isinstance(part, MultiHeadAttention):
            scaled = [part.qkv.weight.chunk(3)[2], part.out.weight]
        elif isinstance(part, StaticMixing):
            scaled = [part.value.weight, part.out.weight]
        elif isinstance(part, CrossAttention):
            scaled = [part.kv.weight.chunk(2)[1], part.out.weight]
        elif isinstance(part, FeedForward):
            scaled = [part.up.weight, part.down.weight]
        else:
            continue
        for weight in scaled:
            weight.mul_(scale)


def zero_linears_(*linears: nn.Linear) -> None:
    """Sets weights and biases to zero."""
    with torch.no_grad():
        for linear in linears:
            linear.weight.zero_()
            if linear.bias is not None:
                linear.bias.zero_()


class EncoderLayer(nn.Module):
    """x + step · F(x) with F(x) = φ1(x) + φ2(x + φ1(x)), φ1 = attention∘LN and φ2 = MLP∘LN.

    With step = 1 it is the ordinary pre-LN Transformer layer. Source: Layer-Parallel Training for Transformers
    (arXiv 2601.09026), the encoder's ODE form.

    Args:
        width: D.
        heads: attention heads.
        head_width: width of a head; None is width / heads.
        mlp: hidden width of the feed-forward part.
        bias: whether linear maps have biases.
        dropout: dropout probability after attention, in the MLP and after it.
        attention_dropout: dropout probability of the attention weights.
        causal: a token sees itself and the ones before it only.
        deep_init: number L of layers in a deep stack; scales the value, output and MLP projections at initialisation by
            √(log 2L). None leaves them alone.
        mixing: what mixes the tokens, "attention" or "static", a matrix for each head that does not depend on the input
            (`StaticMixing`).
        tokens: static mixing: the most tokens of a sample.
        mixing_rank: static mixing: rank of factorised matrices; None has full ones.

    Raises:
        ValueError: unknown mixing, static mixing without a number of tokens, or a rank for attention.

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
        head_width: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        causal: bool = False,
        deep_init: int | None = None,
        mixing: Mixing = "attention",
        tokens: int | None = None,
        mixing_rank: int | None = None,
    ) -> None:
        super().__init__()
        check_mixing(mixing)
        self.attention_norm = nn.LayerNorm(width, bias=bias)
        options: dict[str, Any] = {
            "head_width": head_width,
            "bias": bias,
            "attention_dropout": attention_dropout,
            "causal": causal,
        }
        if mixing == "attention":
            if mixing_rank is not None:
                raise ValueError(f"mixing_rank is {mixing_rank}, and attention has none; it is of static mixing alone")
            self.attention: Any = MultiHeadAttention(width, heads, **options)  # who reads its parts knows which it is
        else:
            if tokens is None:
                raise ValueError("static mixing needs the number of tokens that its matrices are for")
            self.attention = StaticMixing(width, heads, tokens=tokens, rank=mixing_rank, **options)
        self.attention_out_dropout = Dropout(dropout)
        self.mlp_norm = nn.LayerNorm(width, bias=bias)
        self.mlp = FeedForward(width, mlp, bias=bias, dropout=dropout)
        self.mlp_out_dropout = Dropout(dropout)
        initialise(self, deep_init)

    def residual(self, x_BTD: Tensor, mask: Tensor | None = None, *, cache: KeyValueCache | None = None) -> Tensor:
        """F(x), shape (B, T, D). `mask` and `cache` are the attention's (True lets a query see a key)."""
        a_BTD = self.attention_out_dropout(self.attention(self.attention_norm(x_BTD), mask, cache))
        m_BTD = self.mlp_out_dropout(self.mlp(self.mlp_norm(x_BTD + a_BTD)))
        return a_BTD + m_BTD

    def forward(self, x_BTD: Tensor, mask: Tensor | None = None, *, step: float = 1.0) -> Tensor:
        """x + step · F(x), shape (B, T, D)."""
        f_BTD = self.residual(x_BTD, mask)
        return x_BTD + f_BTD if step == 1.0 else x_BTD + step * f_BTD

    def zero_output_(self) -> None:
        """Sets both output projections to zero, so that F(x) = 0 until they are trained."""
        zero_linears_(self.attention.out, self.mlp.down)

    def flops(self, tokens: int) -> int:
        """Floating-point operations of one layer evaluation, forward only (a multiply-add counts two)."""
        return self.attention.flops(tokens) + self.mlp.flops(tokens)
