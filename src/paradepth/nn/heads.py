"""Trunk states to predictions.

Shapes: … any leading dimensions, T tokens, D width, N classes, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paradepth.nn.dropout import Dropout

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

    def flops(self, tokens: int = 1) -> int:
        """Floating-point operations for one sample (a multiply-add counts two), whatever its number of tokens."""
        return 2 * self.classify.in_features * self.classify.out_features


class TokenClassifierHead(nn.Module):
    """Normalises every token's state and maps it to class logits.

    Leading dimensions pass through, so the states of all prefixes, (n, B, T, D), take one call.

    Args:
        width: D.
        num_classes: N, at least 1.

    Raises:
        ValueError: fewer than one class.

    >>> import torch
    >>> TokenClassifierHead(64, 17)(torch.randn(4, 2, 16, 64)).shape
    torch.Size([4, 2, 16, 17])
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be at least 1")
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.classify.weight, std=0.02)
        nn.init.zeros_(self.classify.bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Maps states (…, T, D) to logits (…, T, N)."""
        return self.classify(self.norm(x_TD))

    def flops(self, tokens: int) -> int:
        """Floating-point operations for one sample of so many tokens (a multiply-add counts two)."""
        return 2 * tokens * self.classify.weight.numel()


class LanguageModelHead(nn.Module):
    """Normalises every token's state and maps it to logits over the vocabulary, without a bias.

    Leading dimensions pass through, so the states of all prefixes, (n, B, T, D), take one call.

    Args:
        width: D.
        vocab_size: V, at least 1.
        tied: the embedding whose weight is used. It stays the embedding's alone: the head neither lists it among its
            parameters nor saves it. None gives the head a weight of its own.

    Raises:
        ValueError: an empty vocabulary, or an embedding of another shape.

    >>> import torch
    >>> embedding = nn.Embedding(256, 64)
    >>> head = LanguageModelHead(64, 256, tied=embedding)
    >>> head(torch.randn(4, 2, 16, 64)).shape, [name for name, _ in head.named_parameters()]
    (torch.Size([4, 2, 16, 256]), ['norm.weight', 'norm.bias'])
    """

    def __init__(self, width: int, vocab_size: int, *, tied: nn.Embedding | None = None) -> None:
        super().__init__()
        if vocab_size < 1:
            raise ValueError(f"vocab_size is {vocab_size}; it must be at least 1")
        if tied is not None and tied.weight.shape != (vocab_size, width):
            raise ValueError(
                f"the tied embedding has a weight of shape {tuple(tied.weight.shape)}; this head needs "
                f"{(vocab_size, width)} (vocabulary, width)"
            )
        self.norm = nn.LayerNorm(width)
        self.vocabulary = None if tied is not None else nn.Linear(width, vocab_size, bias=False)
        if self.vocabulary is not None:
            nn.init.normal_(self.vocabulary.weight, std=0.02)
        self._tied = (tied,)  # within a tuple, so that torch does not take it for a part of this module

    @property
    def weight(self) -> Tensor:
        """The map to the vocabulary, (V, D)."""
        owner = self.vocabulary if self.vocabulary is not None else self._tied[0]
        assert owner is not None
        return owner.weight

    def forward(self, x_TD: Tensor) -> Tensor:
        """Maps states (…, T, D) to logits (…, T, V)."""
        return F.linear(self.norm(x_TD), self.weight)

    def flops(self, tokens: int) -> int:
        """Floating-point operations for one sample of so many tokens (a multiply-add counts two)."""
        return 2 * tokens * self.weight.numel()


class MaskedLMHead(LanguageModelHead):
    """BERT's head over the vocabulary: every token's state is normalised, mapped to another of the same width, put
    through GELU, normalised, and mapped to logits with a bias.

    Args:
        width: D.
        vocab_size: V, at least 1.
        tied: the embedding whose weight is used, as in `LanguageModelHead`.

    Raises:
        ValueError: an empty vocabulary, or an embedding of another shape.

    Source: BERT (arXiv 1810.04805), its reference implementation; the first normalisation ends a pre-LN trunk.

    >>> import torch
    >>> MaskedLMHead(64, 256)(torch.randn(4, 2, 16, 64)).shape
    torch.Size([4, 2, 16, 256])
    """

    def __init__(self, width: int, vocab_size: int, *, tied: nn.Embedding | None = None) -> None:
        super().__init__(width, vocab_size, tied=tied)
        self.transform = nn.Linear(width, width)
        self.transform_norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        nn.init.xavier_uniform_(self.transform.weight)
        nn.init.zeros_(self.transform.bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Maps states (…, T, D) to logits (…, T, V)."""
        x_TD = self.transform_norm(F.gelu(self.transform(self.norm(x_TD))))
        return F.linear(x_TD, self.weight, self.bias)

    def flops(self, tokens: int) -> int:
        """Floating-point operations for one sample of so many tokens (a multiply-add counts two)."""
        return super().flops(tokens) + 2 * tokens * self.transform.weight.numel()


TextPool = Literal["cls", "mean", "last"]


class TextClassifierHead(nn.Module):
    """Normalises the tokens' states, pools those that are no padding, and classifies: linear, tanh, dropout, linear.

    Leading dimensions pass through, so the states of all prefixes, (n, B, T, D), take one call.

    Args:
        width: D.
        num_classes: N, at least 1.
        pool: "cls" takes the first token, "mean" the mean, "last" the last token, which alone has seen all of a causal
            trunk's text.
        dropout: probability, before the last linear map.

    Raises:
        ValueError: unknown pooling or fewer than one class.

    Source: the pooler of BERT (arXiv 1810.04805).

    >>> import torch
    >>> real_BT = torch.tensor([[True, True, False], [True, True, True]])
    >>> TextClassifierHead(64, 3, pool="mean")(torch.randn(4, 2, 3, 64), real_BT).shape
    torch.Size([4, 2, 3])
    """

    def __init__(self, width: int, num_classes: int, *, pool: TextPool = "mean", dropout: float = 0.0) -> None:
        super().__init__()
        if pool not in ("cls", "mean", "last"):
            raise ValueError(f"pool is {pool!r}; it must be 'cls', 'mean' or 'last'")
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be at least 1")
        self.pool = pool
        self.norm = nn.LayerNorm(width)
        self.pooler = nn.Linear(width, width)
        self.dropout = Dropout(dropout)
        self.classify = nn.Linear(width, num_classes)
        for linear in (self.pooler, self.classify):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x_TD: Tensor, real_BT: Tensor) -> Tensor:
        """Maps states (…, B, T, D) to logits (…, B, N).

        Args:
            x_TD: states.
            real_BT: which tokens are no padding, booleans; padding is behind them.
        """
        return self.classify(self.dropout(torch.tanh(self.pooler(self._pooled(self.norm(x_TD), real_BT)))))

    def _pooled(self, x_TD: Tensor, real_BT: Tensor) -> Tensor:
        if self.pool == "cls":
            return x_TD[..., 0, :]
        if self.pool == "mean":
            weight_BT1 = real_BT.unsqueeze(-1).to(x_TD.dtype)
            return (x_TD * weight_BT1).sum(dim=-2) / weight_BT1.sum(dim=-2)
        last_B11 = (real_BT.sum(dim=-1) - 1)[:, None, None]
        return x_TD.gather(-2, last_B11.expand(*x_TD.shape[:-2], 1, x_TD.shape[-1])).squeeze(-2)

    def flops(self, tokens: int = 1) -> int:
        """Floating-point operations for one sample (a multiply-add counts two), whatever its number of tokens."""
        return 2 * (self.pooler.weight.numel() + self.classify.weight.numel())
