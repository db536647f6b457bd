"""Multi-head self- and cross-attention, with the kernel chosen by device, dtype and whether gradients are needed.

Shapes: B batch, T tokens, D width, H heads, K width of a head (D/H unless heads were removed), S tokens attended to.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paradepth.nn.cache import KeyValueCache
from paradepth.nn.dropout import Dropout, StackedDropout


def fused_is_faster(q: Tensor) -> bool:
    """Whether torch's fused attention is the better kernel for queries like `q`.

    On CPUs the backward pass of the fused kernel in bfloat16 or float16 is several times slower than plain matrix
    products,
    so training in those types takes the explicit form; everything else takes the fused one.
    """
    half = q.dtype in (torch.bfloat16, torch.float16)
    return not (q.device.type == "cpu" and half and torch.is_grad_enabled() and q.requires_grad)


def attend(
    q_BHTK: Tensor,
    k_BHSK: Tensor,
    v_BHSK: Tensor,
    *,
    mask: Tensor | None,
    causal: bool,
    dropout: Dropout | StackedDropout,
) -> Tensor:
    """softmax(Q Kᵀ / √K) V for each head, shape (B, H, T, K).

    Args:
        q_BHTK, k_BHSK, v_BHSK: queries, keys and values.
        mask: booleans that broadcast to (B, H, T, S); True lets a query see a key.
        causal: the queries are the last T of the S tokens, and each sees the ones up to itself (of those that `mask`
            allows).
        dropout: of the attention weights (forces the explicit form while training).
    """
    T, S = q_BHTK.shape[2], k_BHSK.shape[2]
    fused = fused_is_faster(q_BHTK) and not (dropout.p > 0.0 and dropout.training)
    whole = causal and bool(T == S)  # no tokens are remembered; while a graph is exported these are symbols
    kernel_is_causal = whole and fused and mask is None  # cheaper than a mask, and the same
    if causal and not kernel_is_causal and (whole or T > 1):  # the last token sees all that is remembered
        past_TS = torch.ones(T, S, dtype=torch.bool, device=q_BHTK.device).tril(S - T)
        mask = past_TS if mask is None else mask & past_TS
    if fused:
        return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=mask, is_causal=kernel_is_causal)
    scores_BHTS = (q_BHTK * q_BHTK.shape[-1] ** -0.5) @ k_BHSK.transpose(-1, -2)
    if mask is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask, float("-inf"))
    weights_BHTS = dropout(scores_BHTS.softmax(dim=-1))
    return weights_BHTS.to(v_BHSK.dtype) @ v_BHSK


def _head_width(width: int, heads: int, head_width: int | None) -> int:
    """K, after refusing what cannot be."""
    if head_width is None:
        if heads < 1 or width % heads:
            raise ValueError(
                f"width {width} cannot be split into {heads} heads; heads must divide the width, or head_width be given"
            )
        return width // heads
    if heads < 1 or head_width < 1:
        raise ValueError(f"there are {heads} heads of width {head_width}; both must be at least 1")
    return head_width


class MultiHeadAttention(nn.Module):
    """Self-attention: softmax(Q Kᵀ / √K) V for each head, then one output projection.

    Args:
        width: D.
        heads: H; must divide `width` unless `head_width` is given.
        head_width: K; None is D / H. With fewer or narrower heads than that the projections are no longer square.
        bias: whether the projections have biases.
        attention_dropout: dropout probability of the attention weights (forces the explicit form while training).
        causal: a token sees itself and the ones before it only.

    Raises:
        ValueError: `heads` does not divide `width`, or no heads, or of no width.

    >>> MultiHeadAttention(64, 4)(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        head_width: int | None = None,
        bias: bool = True,
        attention_dropout: float = 0.0,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_width = _head_width(width, heads, head_width)
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * heads * self.head_width, bias=bias)
        self.out = nn.Linear(heads * self.head_width, width, bias=bias)
        self.attention_dropout = Dropout(attention_dropout)

    def forward(self, x_BTD: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """Attends from every token to every token, or to the ones up to it when causal.

        Args:
            x_BTD: input.
            mask: booleans that broadcast to (B, H, T, S); True lets a query see a key. Causal attention sees what both
                allow.
            cache: keys and values of the tokens before these, which are attended to as well; it takes up these.

        Returns:
            (B, T, D).
        """
        B, T, _ = x_BTD.shape
        q_BHTK, k_BHSK, v_BHSK = self.qkv(x_BTD).view(B, T, 3, self.heads, self.head_width).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k_BHSK, v_BHSK = cache.extend(k_BHSK, v_BHSK)
        y_BHTK = attend(q_BHTK, k_BHSK, v_BHSK, mask=mask, causal=self.causal, dropout=self.attention_dropout)
        return self.out(y_BHTK.transpose(1, 2).reshape(B, T, self.heads * self.head_width))

    def flops(self, tokens: int) -> int:
        """Floating-point operations of one forward pass over one sample (a multiply-add counts two)."""
        inner, width = self.out.in_features, self.out.out_features
        return 2 * tokens * 4 * width * inner + 4 * tokens * tokens * inner


class CrossAttention(nn.Module):
    """Attention from T tokens to the S tokens of a memory, such as an encoder's states.

    Args:
        width: D of both.
        heads: H; must divide `width` unless `head_width` is given.
        head_width: K; None is D / H.
        bias: whether the projections have biases.
        attention_dropout: dropout probability of the attention weights.

    Raises:
        ValueError: `heads` does not divide `width`, or no heads, or of no width.

    >>> CrossAttention(64, 4)(torch.randn(2, 10, 64), torch.randn(2, 7, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        head_width: int | None = None,
        bias: bool = True,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_width = _head_width(width, heads, head_width)
        inner = heads * self.head_width
        self.q = nn.Linear(width, inner, bias=bias)
        self.kv = nn.Linear(width, 2 * inner, bias=bias)
        self.out = nn.Linear(inner, width, bias=bias)
        self.attention_dropout = Dropout(attention_dropout)

    def forward(
        self, x_BTD: Tensor, memory_BSD: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Attends from every token of `x_BTD` to the memory.

        Args:
            x_BTD: input.
            memory_BSD: what is attended to.
            mask: booleans that broadcast to (B, H, T, S); True lets a query see a key.
            cache: the memory's keys and values from an earlier call; an empty one takes them up.

        Returns:
            (B, T, D).
        """
        B, T, _ = x_BTD.shape
        q_BHTK = self.q(x_BTD).view(B, T, self.heads, self.head_width).transpose(1, 2)
        if cache is not None and cache.k_BHSK is not None and cache.v_BHSK is not None:
            k_BHSK, v_BHSK = cache.k_BHSK, cache.v_BHSK
        else:
            S = memory_BSD.shape[1]
            k_BHSK, v_BHSK = self.kv(memory_BSD).view(B, S, 2, self.heads, self.head_width).permute(2, 0, 3, 1, 4)
            if cache is not None:
                cache.extend(k_BHSK, v_BHSK)
        y_BHTK = attend(q_BHTK, k_BHSK, v_BHSK, mask=mask, causal=False, dropout=self.attention_dropout)
        return self.out(y_BHTK.transpose(1, 2).reshape(B, T, self.heads * self.head_width))

    def flops(self, tokens: int, memory: int) -> int:
        """Floating-point operations of one forward pass over one sample (a multiply-add counts two)."""
        inner, width = self.out.in_features, self.out.out_features
        return 4 * (tokens + memory) * width * inner + 4 * tokens * memory * inner
