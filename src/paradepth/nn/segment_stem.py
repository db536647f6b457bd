"""Tokens of a pair of texts to states.

Shapes: B batch, T tokens, D width, S segments.
"""

from __future__ import annotations

from torch import Tensor, nn

from paradepth.nn.token_stem import TokenStem


class SegmentStem(TokenStem):
    """A `TokenStem` that also adds an embedding of the text, of several, that a token belongs to, as BERT does.

    Which one follows from the separators that end each text: <s> a </s> b </s> has <s> a </s> in segment 0 and b </s>
    in segment 1. The embeddings start at zero: a stem whose other weights come from a model of single texts computes
    what that one computes until it learns the difference.

    Args:
        vocab_size, context, width, dropout: as of `TokenStem`.
        segments: S, at least 2; further texts count as the last.
        separator: number of the token that ends a text.

    Raises:
        ValueError: also fewer than two segments, or a separator outside the vocabulary.

    >>> import torch
    >>> stem = SegmentStem(20, 8, 16, segments=2, separator=2)
    >>> stem.segments_of(torch.tensor([[1, 7, 2, 8, 9, 2, 0]])).tolist(), stem(torch.tensor([[1, 7, 2]])).shape
    ([[0, 0, 0, 1, 1, 1, 1]], torch.Size([1, 3, 16]))
    """

    def __init__(
        self, vocab_size: int, context: int, width: int, dropout: float = 0.0, *, segments: int, separator: int
    ) -> None:
        super().__init__(vocab_size, context, width, dropout)
        if segments < 2:
            raise ValueError(f"segments is {segments}; texts are told apart from 2 on")
        if not 0 <= separator < vocab_size:
            raise ValueError(f"separator is {separator}; it must be a token of the vocabulary, 0 to {vocab_size - 1}")
        self.separator = separator
        self.segments = nn.Embedding(segments, width)
        nn.init.zeros_(self.segments.weight)

    def segments_of(self, tokens_BT: Tensor) -> Tensor:
        """The segment of each token, (B, T)."""
        ends_BT = tokens_BT == self.separator
        return (ends_BT.cumsum(dim=1) - ends_BT.long()).clamp(max=self.segments.num_embeddings - 1)

    def forward(self, tokens_BT: Tensor, *, start: int | Tensor = 0) -> Tensor:
        """Embeds whole texts, (B, T); returns (B, T, D).

        Raises:
            ValueError: as of `TokenStem`, and `start` other than 0: the segment follows from what stands before.
        """
        if not isinstance(start, int) or start:
            raise ValueError(f"start is {start}; texts in segments are embedded as a whole, from 0")
        x_BTD = super().forward(tokens_BT)
        return x_BTD + self.dropout(self.segments(self.segments_of(tokens_BT)))
