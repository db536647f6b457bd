"""Pairs of texts to joined states, and states of the target to logits.

Shapes: B batch, S source tokens, T target tokens, D width, V vocabulary, … any leading dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from paradepth.nn.dropout import Dropout
from paradepth.nn.heads import LanguageModelHead
from paradepth.nn.joint_layers import Joined, Lengths
from paradepth.nn.token_stem import check_tokens


def sinusoids(count: int, width: int) -> Tensor:
    """Positions 0 … count − 1 as sines and cosines of geometrically spaced wavelengths, shape (count, width).

    Source: Attention Is All You Need (arXiv 1706.03762).

    >>> sinusoids(2, 4)[0].tolist()
    [0.0, 0.0, 1.0, 1.0]
    """
    half = (width + 1) // 2
    rates = torch.exp(torch.arange(half) * (-math.log(10_000.0) / max(half - 1, 1)))
    angles = torch.arange(count)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


class JointStem(nn.Module):
    """Embeds source and target with one table, times √D, and adds their positions.

    The table has entries of size 1/√D, so that embeddings are as large as what layers add to them while the same
    table, tied to the head, gives logits of size 1. Positions are sinusoids: few sentences are long, so learned
    embeddings of late positions would see hardly any of them.

    Args:
        vocab_size: V, shared by both languages.
        context: the longest source and the longest target, in tokens.
        width: D.
        dropout: dropout probability of the embeddings.

    Raises:
        ValueError: an empty vocabulary or a context below 1.

    >>> stem = JointStem(100, 16, 32)
    >>> x, y = stem((torch.randint(100, (2, 7)), torch.randint(100, (2, 5))))
    >>> x.shape, y.shape
    (torch.Size([2, 7, 32]), torch.Size([2, 5, 32]))
    """

    positions: Tensor

    def __init__(self, vocab_size: int, context: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        for name, value in (("vocab_size", vocab_size), ("context", context)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.context = context
        self.embed = nn.Embedding(vocab_size, width)
        self.source_dropout = Dropout(dropout)
        self.target_dropout = Dropout(dropout)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        self.register_buffer("positions", sinusoids(context, width), persistent=False)

    @property
    def tokens(self) -> Lengths:
        """(S, T) of a full sample."""
        return self.context, self.context

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Joined:
        """Embeds (source (B, S), target (B, T)), whole numbers from 0 to V − 1; returns (B, S, D) and (B, T, D).

        Raises:
            ValueError: what `source` and `target` refuse, or another number of sources than of targets.
        """
        if not isinstance(inputs, tuple | list) or len(inputs) != 2 or inputs[0].shape[:1] != inputs[1].shape[:1]:
            what = [tuple(part.shape) for part in inputs] if isinstance(inputs, tuple | list) else type(inputs).__name__
            raise ValueError(f"inputs are {what}; this model takes source and target tokens, equally many of each")
        return self.source(inputs[0]), self.target(inputs[1])

    def source(self, tokens_BS: Tensor) -> Tensor:
        """Embeds sources; (B, S, D).

        Raises:
            ValueError: not (batch, tokens), no token or more than the context, another dtype than int64 or int32, or
                (on the CPU, where looking does not make the device wait) a number outside the vocabulary.
        """
        return self.source_dropout(self._embedded(tokens_BS, "source", 0))

    def target(self, tokens_BT: Tensor, *, start: int = 0) -> Tensor:
        """Embeds targets, or the part of them that begins at position `start`; (B, T, D).

        Raises:
            ValueError: as `source`.
        """
        return self.target_dropout(self._embedded(tokens_BT, "target", start))

    def _embedded(self, tokens_BT: Tensor, side: str, start: int) -> Tensor:
        check_tokens(tokens_BT, self.embed, context=self.context, taken=start, what=f"{side} tokens")
        x_BTD = self.embed(tokens_BT) * self.embed.embedding_dim**0.5
        return x_BTD + self.positions[start : start + tokens_BT.shape[1]]

    def flops(self) -> int:
        """Floating-point operations of embedding one pair: looking up multiplies nothing."""
        return 0


class TargetHead(LanguageModelHead):
    """A `LanguageModelHead` for the target of a joined state.

    >>> TargetHead(64, 256)(torch.randn(4, 2, 16, 64)).shape
    torch.Size([4, 2, 16, 256])
    """

    def flops(self, tokens: Lengths) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Floating-point operations for one sample of (S, T) tokens (a multiply-add counts two)."""
        return super().flops(tokens[1])
