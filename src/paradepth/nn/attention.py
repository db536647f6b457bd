"""Multi-head self-attention, with the kernel chosen by device, dtype and whether gradients are needed.

Shapes: B batch, T tokens, D width, H heads, K = D/H width of a head, S tokens attended to.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paradepth.nn.dropout import Dropout


def fused_is_faster(q: Tensor) -> bool:
    """Whether torch's fused attention is the better kernel for queries like `q`.

    On CPUs the backward pass of the fused kernel in bfloat16 or float16 is several times slower than plain matrix
    products,
    so training in those types takes the explicit form; everything else takes the fused one.
    """
    half = q.dtype in (torch.bfloat16, torch.float16)
    return not (q.device.type == "cpu" and half and torch.is_grad_enabled() and q.requires_grad)


class MultiHeadAttention(nn.Module):
    """Self-attention: softmax(Q Kᵀ / √K) V for each head, then one output projection.

    Args:
        width: D.
        heads: H; must divide `width`.
        bias: whether the projections have biases.
        attention_dropout: dropout probability of the attention weights (forces the explicit form while training).
        causal: a token sees itself and the ones before it only.

    Raises:
        ValueError: `heads` does not divide `width`.

    >>> MultiHeadAttention(64, 4)(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self, width: int, heads: int, *, bias: bool = True, attention_dropout: float = 0.0, causal: bool = False
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"width {width} cannot be split into {heads} heads; heads must divide the width")
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        self.attention_dropout = Dropout(attention_dropout)

    def forward(self, x_BTD: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attends from every token to every token, or to the ones up to it when causal.

        Args:
            x_BTD: input.
            mask: booleans that broadcast to (B, H, T, S); True lets a query see a key. Causal attention sees what both
                allow.

        Returns:
            (B, T, D).
        """
        B, T, D = x_BTD.shape
        q_BHTK, k_BHSK, v_BHSK = self.qkv(x_BTD).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        drops = self.attention_dropout.p > 0.0 and self.training
        fused = fused_is_faster(q_BHTK) and not drops
        kernel_is_causal = self.causal and fused and mask is None  # cheaper than a mask, and the same
        if self.causal and not kernel_is_causal:
            past_TS = torch.ones(T, T, dtype=torch.bool, device=x_BTD.device).tril()
            mask = past_TS if mask is None else mask & past_TS
        if fused:
            y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=mask, is_causal=kernel_is_causal)
        else:
            scores_BHTS = (q_BHTK * (D // self.heads) ** -0.5) @ k_BHSK.transpose(-1, -2)
            if mask is not None:
                scores_BHTS = scores_BHTS.masked_fill(~mask, float("-inf"))
            weights_BHTS = self.attention_dropout(scores_BHTS.softmax(dim=-1))
            y_BHTK = weights_BHTS.to(v_BHSK.dtype) @ v_BHSK
        return self.out(y_BHTK.transpose(1, 2).reshape(B, T, D))

    def flops(self, tokens: int) -> int:
        """Floating-point operations of one forward pass over one sample (a multiply-add counts two)."""
        width = self.out.in_features
        return 2 * tokens * 4 * width * width + 4 * tokens * tokens * width
