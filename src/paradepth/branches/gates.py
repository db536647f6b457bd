"""Gates: how much of each branch a sample gets, read from the input before any branch is evaluated.

    X_0 ─┬─► pool(LN(X_0)) ─► 1 + tanh(w_i · … / √D + b_i) = α_i(X_0) ─┐
         └─► branch i ───────────────────────────────────── δ_i(X_0) ──×──► X_0 + Σ_i α_i(X_0) δ_i(X_0)

These are the α_j(x) of G(x) = Σ_j α_j(x) σ(W_j(x) x + θ_j(x)): Dynamic Universal Approximation Theory (arXiv
2407.21670). The form 1 + tanh(z) has what a branch needs:

- it is exactly 1 for a new gate (z = 0), so that a gated model starts as the plain sum, growing changes nothing, and
  the gate's own gradient is as large as it ever gets;
- it comes as near to 0 as training wants, so that a branch can be left out, and cannot change its sign;
- it is at most 2: the size of what a branch adds is the business of its last linear map;
- it depends on its own branch alone. A softmax over the branches would make prefix k another model than `truncate(k)`.

LN has no parameters; it makes z independent of the scale of the embedding. √D keeps gates from running ahead of their
branches: AdamW moves each of the D numbers of w by the learning rate, and so z by as much as D times that.

Shapes: B batch, T tokens, D width, k branches, X the dimensions (B) or (B, T).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Per = Literal["sample", "token"]


class Gate(nn.Module):
    """α(X_0) = 1 + tanh(w · r / √D + b), in (0, 2) and 1 as long as it is untrained; r is what `readings` makes of X_0.

    Args:
        width: D.
        per: "sample" reads the mean over a sample's tokens: one α for all of them. "token" reads each token for itself,
            which is the only way that does not show a causal layer's tokens the future.

    Raises:
        ValueError: a width below 1, or another `per`.

    >>> gate, x = Gate(16), torch.randn(2, 5, 16)
    >>> gate(readings(x, per="sample")).tolist()
    [1.0, 1.0]
    >>> Gate(16, per="token")(readings(x, per="token")).shape
    torch.Size([2, 5])
    """

    def __init__(self, width: int, *, per: Per = "sample") -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width is {width}; it must be at least 1")
        if per not in ("sample", "token"):
            raise ValueError(f"per is {per!r}; it must be 'sample' or 'token'")
        self.per: Per = per
        # Vectors, and no nn.Linear: what draws, prunes or quantises matrices is not meant for a gate.
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, readings_XD: Tensor) -> Tensor:
        """α, (B,) or (B, T), of readings (B, D) or (B, T, D)."""
        z_X = (readings_XD * self.weight).sum(dim=-1) * len(self.weight) ** -0.5 + self.bias
        return 1.0 + z_X.tanh()

    def flops(self, tokens: int) -> int:
        """Floating-point operations for one sample (a multiply-add counts two)."""
        return 2 * len(self.weight) * (tokens if self.per == "token" else 1)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, per={self.per!r}"


def readings(x_BTD: Tensor, *, per: Per, mask: Tensor | None = None) -> Tensor:
    """What gates read: LN(x), the mean of it over the tokens of a sample, (B, D), or as it is, (B, T, D); in float32
    or better.

    Args:
        x_BTD: the input of the branches.
        per: "sample" or "token".
        mask: which tokens are no padding, booleans (B, 1, 1, T) or (1, 1, 1, T) as attention takes them; None: all.

    Raises:
        ValueError: a mask by which tokens see different tokens, over which there is no mean.
    """
    x_BTD = x_BTD if x_BTD.dtype == torch.float64 else x_BTD.float()
    n_BTD = F.layer_norm(x_BTD, x_BTD.shape[-1:])
    if per == "token":
        return n_BTD
    if mask is None:
        return n_BTD.mean(dim=1)
    if mask.dim() != 4 or tuple(mask.shape[1:3]) != (1, 1):
        raise ValueError(
            f"the mask has shape {tuple(mask.shape)}; a gate that reads the mean over a sample's tokens takes a mask "
            "of padding, (batch, 1, 1, tokens)"
        )
    real_BT1 = mask[:, 0, 0, :, None].to(n_BTD.dtype)
    return (n_BTD * real_BT1).sum(dim=1) / real_BT1.sum(dim=1).clamp(min=1.0)


def gate_values(gates: Sequence[Gate], readings_XD: Tensor) -> Tensor:
    """α_1 … α_k of the same readings, (k, B) or (k, B, T).

    >>> gate_values([Gate(16), Gate(16)], torch.randn(3, 16)).shape
    torch.Size([2, 3])
    """
    return torch.stack([gate(readings_XD) for gate in gates])


def weighted(part: Tensor, alpha: Tensor) -> Tensor:
    """α · part: of a part (B, T, D) of a contribution, by α of its samples, (B,), or of its tokens, (B, T)."""
    return alpha.view(*alpha.shape, *(1,) * (part.dim() - alpha.dim())).to(part.dtype) * part
