"""Tokens of a text to states.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paradepth.nn.dropout import Dropout


def check_tokens(tokens_BT: Tensor, embed: nn.Embedding, *, context: int, taken: int = 0, what: str = "tokens") -> None:
    """Refuses tokens that a stem cannot embed.

    Args:
        tokens_BT: the tokens.
        embed: the table that they are looked up in.
        context: the longest text, in tokens.
        taken: tokens of the context that stand before these.
        what: they are called.

    Raises:
        ValueError: not (batch, tokens), no token or more than the context, another dtype than int64 or int32, or (on
            the CPU, where looking does not make the device wait) a number outside the vocabulary.
    """
    if tokens_BT.dim() != 2 or not 1 <= tokens_BT.shape[1] <= context - taken:
        behind = f", and {taken} of them are taken" if taken else ""
        raise ValueError(
            f"{what} have shape {tuple(tokens_BT.shape)}; this model takes (batch, tokens) with 1 to {context} tokens, "
            f"its context{behind}"
        )
    check_numbers(tokens_BT, embed, what=what, place="vocabulary is")


def check_numbers(numbers: Tensor, embed: nn.Embedding, *, what: str, place: str) -> None:
    """Refuses numbers that a table does not have, and other types than whole numbers.

    Raises:
        ValueError: another dtype than int64 or int32, or (on the CPU, where looking does not make the device wait) a
            number outside the table.
    """
    if numbers.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{what} are {numbers.dtype}; this model takes torch.int64 or torch.int32")
    if numbers.device.type == "cpu" and not torch.compiler.is_compiling() and numbers.numel():
        low, high = (int(value) for value in numbers.aminmax())
        if low < 0 or high >= embed.num_embeddings:
            raise ValueError(f"{what} run from {low} to {high}; this model's {place} 0 to {embed.num_embeddings - 1}")


class TokenStem(nn.Module):
    """Embeds each token and adds a learned embedding of its position, as GPT-2 does.

    Args:
        vocab_size: number of different tokens.
        context: the longest text, in tokens.
        width: D.
        dropout: dropout probability of the embedding.

    Raises:
        ValueError: an empty vocabulary or a context below 1.

    >>> TokenStem(256, 64, 32)(torch.randint(256, (2, 10))).shape
    torch.Size([2, 10, 32])
    """

    def __init__(self, vocab_size: int, context: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        for name, value in (("vocab_size", vocab_size), ("context", context)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.tokens = context
        self.embed = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.zeros(context, width))
        self.dropout = Dropout(dropout)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, tokens_BT: Tensor, *, start: int | Tensor = 0) -> Tensor:
        """Embeds whole numbers from 0 to vocab_size − 1; returns (B, T, D).

        Args:
            tokens_BT: a text, or a part of one.
            start: position of the first of these tokens in its text; or (B,), of each row, where a token at a position
                below 0 is padding and takes position 0.

        Raises:
            ValueError: not (batch, tokens), no token or more than the context, another dtype than int64 or int32, or
                (on the CPU, where looking does not make the device wait) a number outside the vocabulary.
        """
        check_tokens(
            tokens_BT, self.embed, context=self.tokens, taken=start if isinstance(start, int) else int(start.max())
        )
        if isinstance(start, int):
            positions = self.positions[start : start + tokens_BT.shape[1]]
        else:
            place_BT = start[:, None] + torch.arange(tokens_BT.shape[1], device=start.device)
            positions = self.positions[place_BT.clamp(min=0)]
        return self.dropout(self.embed(tokens_BT) + positions)

    def flops(self) -> int:
        """Floating-point operations of embedding one text: looking up multiplies nothing."""
        return 0
