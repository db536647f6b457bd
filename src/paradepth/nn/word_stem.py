"""Words, each given by several whole numbers, to states.

Shapes: B batch, T words, F numbers of a word, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paradepth.nn.dropout import Dropout
from paradepth.nn.token_stem import check_numbers

PADDING = 0  # its row stays zero


class WordStem(nn.Module):
    """Adds up the embeddings of a word's numbers, normalises the sum and adds a learned embedding of the position.

    With `neighbours` each word also gets a linear map of the normalised sum of the word before it, and another one of
    the word after it: e_t + A e_{t−1} + B e_{t+1}, a convolution of width three. What stands next to a word says most
    about its tag, and attention needs many passes over a small treebank to learn to look there.

    The numbers are rows of one table, so that parts of words (ends, shapes) that other words have too stand for a word
    that was never seen. Row 0 is padding: it is zero and stays zero.

    Args:
        vocab_size: rows of the table, padding included.
        features: F.
        context: the longest sequence, in words.
        width: D.
        dropout: dropout probability of the embedding.
        neighbours: whether a word is told its neighbours.

    Raises:
        ValueError: a vocabulary, F or a context below 1.

    >>> WordStem(100, 3, 64, 32)(torch.randint(100, (2, 10, 3))).shape
    torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        vocab_size: int,
        features: int,
        context: int,
        width: int,
        dropout: float = 0.0,
        *,
        neighbours: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("vocab_size", vocab_size), ("features", features), ("context", context)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.tokens = context
        self.features = features
        self.embed = nn.Embedding(vocab_size, width, padding_idx=PADDING)
        self.norm = nn.LayerNorm(width)
        self.before = nn.Linear(width, width, bias=False) if neighbours else None
        self.after = nn.Linear(width, width, bias=False) if neighbours else None
        self.positions = nn.Parameter(torch.zeros(context, width))
        self.dropout = Dropout(dropout)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)
        with torch.no_grad():
            self.embed.weight[PADDING].zero_()

    def forward(self, words_BTF: Tensor) -> Tensor:
        """Embeds whole numbers from 0 to vocab_size − 1; returns (B, T, D).

        Raises:
            ValueError: not (batch, words, F), no word or more than the context, another dtype than int64 or int32, or
                (on the CPU, where looking does not make the device wait) a number outside the table.
        """
        if words_BTF.dim() != 3 or not 1 <= words_BTF.shape[1] <= self.tokens or words_BTF.shape[2] != self.features:
            raise ValueError(
                f"words have shape {tuple(words_BTF.shape)}; this model takes (batch, words, {self.features}) with 1 "
                f"to {self.tokens} words, its context"
            )
        check_numbers(words_BTF, self.embed, what="words", place="table has rows")
        e_BTD = self.norm(self.embed(words_BTF).sum(dim=2))
        if self.before is not None and self.after is not None:
            # A last word has zeros behind it, whether padding follows or not.
            e_BTD = e_BTD * (words_BTF[..., :1] != PADDING)
            around_BTD = F.pad(e_BTD, (0, 0, 1, 1))  # and the first word has zeros before it
            before_BTD, after_BTD = around_BTD[:, :-2], around_BTD[:, 2:]
            e_BTD = e_BTD + self.before(before_BTD) + self.after(after_BTD)
        return self.dropout(e_BTD + self.positions[: words_BTF.shape[1]])

    def flops(self) -> int:
        """Floating-point operations of embedding one full sequence: additions, and the maps of neighbours (a
        multiply-add counts two)."""
        maps = 0 if self.before is None else 4 * self.embed.embedding_dim**2
        return self.tokens * (self.features * self.embed.embedding_dim + maps)
