"""Encoder-decoder layers as steps of one chain over the joined state Z = (X, Y).

X is the source, Y the target; the first layers of the chain advance X, the later ones Y:

    F(X, Y) = (F_enc(X), 0), …, (F_enc(X), 0), (0, F_dec(Y, X)), …, (0, F_dec(Y, X))

so that one stack, and every algorithm that evaluates stacks, covers encoder and decoder. Source: Layer-Parallel
Training for Transformers (arXiv 2601.09026), the encoder-decoder's ODE form.

Shapes: B batch, S source tokens, T target tokens, D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from paradepth.nn.attention import CrossAttention, MultiHeadAttention
from paradepth.nn.cache import KeyValueCache
from paradepth.nn.dropout import Dropout
from paradepth.nn.feed_forward import FeedForward
from paradepth.nn.layer import EncoderLayer, initialise, zero_linears_

Joined = tuple[Tensor, Tensor]
Lengths = tuple[int, int]  # tokens of a sample: (S, T)


class SourceLayer(nn.Module):
    """A layer of the encoder: advances X and leaves Y alone.

    Args:
        width: D.
        options: as of `EncoderLayer`.

    >>> import torch
    >>> layer = SourceLayer(16, heads=2, mlp=32)
    >>> x, y = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    >>> layer.residual((x, y))[1] is None
    True
    """

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__()
        self.layer = EncoderLayer(width, **options)

    def residual(self, z: Joined, source_mask: Tensor | None = None) -> tuple[Tensor, None]:
        """(F_enc(X), 0), where None stands for zero.

        Args:
            z: (X, Y).
            source_mask: booleans that broadcast to (B, H, S, S); True lets a source token be seen.
        """
        return self.layer.residual(z[0], source_mask), None

    def forward(self, z: Joined, source_mask: Tensor | None = None, *, step: float = 1.0) -> Joined:
        """Z + step · F(Z)."""
        return z[0] + step * self.residual(z, source_mask)[0], z[1]

    def zero_output_(self) -> None:
        """Makes the layer the identity until it is trained."""
        self.layer.zero_output_()

    def flops(self, tokens: Lengths) -> int:
        """Floating-point operations of one layer evaluation, forward only, for (S, T) tokens."""
        return self.layer.flops(tokens[0])


class TargetLayer(nn.Module):
    """A layer of the decoder: advances Y, which attends to itself causally and to X.

    F_dec(Y, X) = Ȳ + φ2(Y + Ȳ) with Ȳ = φ1(Y) + φ3(Y + φ1(Y), X); φ1 is causal self-attention, φ2 the feed-forward
    part and φ3 cross-attention, each behind a LayerNorm of its input. X is normalised here as well, since a chain has
    no place for a norm between its layers.

    Args:
        width: D.
        heads, head_width, mlp, bias, dropout, attention_dropout, deep_init: as of `EncoderLayer`.

    >>> import torch
    >>> layer = TargetLayer(16, heads=2, mlp=32)
    >>> x, y = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    >>> bool(torch.allclose(layer((x, y), step=0.5)[1], y + 0.5 * layer.residual((x, y))[1]))
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
        deep_init: int | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, bias=bias)
        options: dict[str, Any] = {"head_width": head_width, "bias": bias, "attention_dropout": attention_dropout}
        self.attention = MultiHeadAttention(width, heads, causal=True, **options)
        self.attention_out_dropout = Dropout(dropout)
        self.cross_norm = nn.LayerNorm(width, bias=bias)
        self.memory_norm = nn.LayerNorm(width, bias=bias)
        self.cross = CrossAttention(width, heads, **options)
        self.cross_out_dropout = Dropout(dropout)
        self.mlp_norm = nn.LayerNorm(width, bias=bias)
        self.mlp = FeedForward(width, mlp, bias=bias, dropout=dropout)
        self.mlp_out_dropout = Dropout(dropout)
        initialise(self, deep_init)

    def residual(
        self,
        z: Joined,
        source_mask: Tensor | None = None,
        *,
        cache: KeyValueCache | None = None,
        memory_cache: KeyValueCache | None = None,
    ) -> tuple[None, Tensor]:
        """(0, F_dec(Y, X)), where None stands for zero.

        Args:
            z: (X, Y).
            source_mask: booleans that broadcast to (B, H, T, S); True lets a source token be seen.
            cache: keys and values of the target tokens before Y.
            memory_cache: keys and values of X.
        """
        x_BSD, y_BTD = z
        a_BTD = self.attention_out_dropout(self.attention(self.attention_norm(y_BTD), cache=cache))
        memory_BSD = self.memory_norm(x_BSD) if memory_cache is None or not memory_cache.length else x_BSD
        c_BTD = self.cross(self.cross_norm(y_BTD + a_BTD), memory_BSD, source_mask, memory_cache)
        a_BTD = a_BTD + self.cross_out_dropout(c_BTD)
        return None, a_BTD + self.mlp_out_dropout(self.mlp(self.mlp_norm(y_BTD + a_BTD)))

    def forward(self, z: Joined, source_mask: Tensor | None = None, *, step: float = 1.0) -> Joined:
        """Z + step · F(Z)."""
        return z[0], z[1] + step * self.residual(z, source_mask)[1]

    def zero_output_(self) -> None:
        """Makes the layer the identity until it is trained."""
        zero_linears_(self.attention.out, self.cross.out, self.mlp.down)

    def flops(self, tokens: Lengths) -> int:
        """Floating-point operations of one layer evaluation, forward only, for (S, T) tokens."""
        source, target = tokens
        return self.attention.flops(target) + self.cross.flops(target, source) + self.mlp.flops(target)
