"""Stems and heads as affine maps, as far as they are: what comes before and behind the trunk's closed form.

| part | as a map | depends on the input through |
|---|---|---|
| `PatchStem`, linear | pixels: normalise, cut into patches, I ⊗ W, class token and positions | nothing |
| `TokenStem`, `SegmentStem`, `JointStem` | one-hot tokens (T × V): I ⊗ Wᵀ; positions, segments: offset | segments |
| `ClassifierHead`, `TokenClassifierHead`, `LanguageModelHead` | pool, norm, linear map | the norm's scale |
| `TextClassifierHead` | norm, pool, linear map, tanh(z) = (tanh(z)/z) z, linear map | scale, gates of tanh, padding |
| `MaskedLMHead` | norm, linear map, σ(z) = Φ(z) z, norm, linear map | scales, gates of GELU |

The other stems (convolutions with GELU between them, sums of a word's numbers behind a norm) are left out: the closed
form then starts at their output X_0.

Shapes: B batch, T tokens, D width, V vocabulary, N logits of a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paradepth.nn import (
    ClassifierHead,
    JointStem,
    LanguageModelHead,
    MaskedLMHead,
    PatchStem,
    SegmentStem,
    TextClassifierHead,
    TokenClassifierHead,
    TokenStem,
)
from paradepth.theory.operators import Affine, Diagonal, Kronecker, Operator, Size, identity
from paradepth.theory.parts import centring, gates, linear_map, norm_map, norm_scale


class Pick(Operator):
    """Entry p of the result is entry `index[p]` of what is given, times `scale[p]`: a permutation, or a choice.

    Args:
        index_P: whole numbers, R·E of them.
        scale_P: the factors.
        cols: (T, D).
        rows: (R, E).
    """

    def __init__(self, index_P: Tensor, scale_P: Tensor, *, cols: Size, rows: Size, flipped: bool = False) -> None:
        self.index_P, self.scale_P, self.flipped = index_P, scale_P, flipped
        self.cols, self.rows = cols, rows

    @property
    def batch(self) -> int | None:
        return None

    def matvec(self, x_BTD: Tensor) -> Tensor:
        flat = x_BTD.flatten(-2)
        if self.flipped:
            out = flat.new_zeros(*flat.shape[:-1], self.rows[0] * self.rows[1])
            return out.index_add(-1, self.index_P, flat * self.scale_P).unflatten(-1, self.rows)
        return (flat[..., self.index_P] * self.scale_P).unflatten(-1, self.rows)

    @property
    def T(self) -> Pick:
        return Pick(self.index_P, self.scale_P, cols=self.rows, rows=self.cols, flipped=not self.flipped)

    def _dense(self) -> Tensor:
        matrix = self.scale_P.new_zeros(len(self.index_P), self.rows[0] * self.rows[1] if self.flipped
                                        else self.cols[0] * self.cols[1])  # fmt: skip
        matrix[torch.arange(len(self.index_P)), self.index_P] = self.scale_P
        return matrix.mT if self.flipped else matrix


def stem_map(stem: nn.Module, inputs: Any, like: Tensor) -> tuple[Affine, Tensor] | None:
    """The stem as an affine map and what it is applied to, (B, 1, pixels) or one-hot tokens (B, T, V); None for a stem
    that is no such map.

    Args:
        stem: of a model.
        inputs: what the model takes; of several the first, of source and target both, one behind the other.
        like: of the dtype that the operator shall have.
    """
    if isinstance(stem, JointStem):
        joined = torch.cat(inputs, dim=1)
        T, (V, D) = joined.shape[1], stem.embed.weight.shape
        operator = Kronecker([(None, D**0.5 * stem.embed.weight.mT)], cols=(T, V), rows=(T, D))
        positions = torch.cat([stem.positions[: part.shape[1]] for part in inputs]).to(like.dtype)
        return Affine(operator, positions), F.one_hot(joined.long(), V).to(like.dtype)
    first = inputs[0] if isinstance(inputs, tuple) else inputs
    if isinstance(stem, PatchStem) and stem.convolutions is None:
        return _patch_map(stem, like), first.flatten(1).unsqueeze(1).to(like.dtype)
    if isinstance(stem, TokenStem):
        T, (V, D) = first.shape[1], stem.embed.weight.shape
        offset = stem.positions[:T]
        if isinstance(stem, SegmentStem):
            offset = offset + stem.segments(stem.segments_of(first))
        operator = Kronecker([(None, stem.embed.weight.mT)], cols=(T, V), rows=(T, D))
        return Affine(operator, offset), F.one_hot(first.long(), V).to(like.dtype)
    return None


def _patch_map(stem: PatchStem, like: Tensor) -> Affine:
    H, W = stem.image_size
    (h, w), C = stem.patch_size, stem.channels
    right, bottom = stem.padding
    pixels = C * H * W
    # Number of the pixel at each place of each patch; padding has none, and counts as the first one, times zero.
    number = torch.arange(pixels, device=like.device).view(1, C, H, W) + 1
    number = F.pad(number, (0, right, 0, bottom))
    number = number.view(C, (H + bottom) // h, h, (W + right) // w, w).permute(1, 3, 0, 2, 4)
    patches, size = number.shape[0] * number.shape[1], C * h * w
    number = number.reshape(-1)
    index, there = (number - 1).clamp(min=0), (number > 0).to(like.dtype)
    channel = index // (H * W)
    scale = there / stem.pixel_std.to(like.dtype)[channel]
    picked = Affine(
        Pick(index, scale, cols=(1, pixels), rows=(patches, size)),
        (-stem.pixel_mean.to(like.dtype)[channel] * scale).view(patches, size),
    )
    embedded = linear_map(stem.embed, patches).after(picked)
    positions = stem.positions
    if stem.class_token is not None:  # a row of zeros above the patches, for the token that is no patch
        below = F.pad(torch.eye(patches, dtype=like.dtype, device=like.device), (0, 0, 1, 0))
        D = stem.embed.out_features
        row = Kronecker([(below, None)], cols=(patches, D), rows=(patches + 1, D))
        positions = torch.cat([positions[:1] + stem.class_token, positions[1:]])
        return Affine(row, positions).after(embedded)
    return Affine(identity((patches, stem.embed.out_features), like), positions).after(embedded)


def head_map(head: nn.Module, state_BTD: Tensor, *, real_BT: Tensor | None = None) -> Affine:
    """A head at the trunk's state s: logits = H(s) s + c(s), rows (1, N) where tokens are pooled, else (T, N).

    Args:
        head: of a model.
        state_BTD: s.
        real_BT: which tokens are no padding, which the head of a classifier of texts wants to know.

    Raises:
        ValueError: an unknown head.

    >>> head, s = ClassifierHead(8, 3), torch.randn(2, 4, 8)
    >>> bool(torch.allclose(head_map(head, s)(s).squeeze(1), head(s), atol=1e-5))
    True
    """
    T, D = state_BTD.shape[-2:]
    if isinstance(head, ClassifierHead):
        pool_T = state_BTD.new_full((T,), 1 / T)
        if head.pool == "cls":
            pool_T = F.one_hot(torch.zeros((), dtype=torch.long), T).to(state_BTD)
        pooled = Affine(Kronecker([(pool_T[None], None)], cols=(T, D), rows=(1, D)), state_BTD.new_zeros(1, D))
        return _classify(head.classify, norm_map(head.norm, pooled(state_BTD)).after(pooled))
    if isinstance(head, TokenClassifierHead):
        return _classify(head.classify, norm_map(head.norm, state_BTD))
    if isinstance(head, MaskedLMHead):
        inner = linear_map(head.transform, T).after(norm_map(head.norm, state_BTD))
        z_BTD = inner(state_BTD)
        gated = inner.under(Diagonal(gates(z_BTD), inner.operator.rows))
        normed = norm_map(head.transform_norm, gates(z_BTD) * z_BTD).after(gated)
        weight_VD = head.weight
        return Affine(Kronecker([(None, weight_VD)], cols=(T, D), rows=(T, len(weight_VD))), head.bias).after(normed)
    if isinstance(head, LanguageModelHead):
        weight_VD = head.weight
        vocabulary = Kronecker([(None, weight_VD)], cols=(T, D), rows=(T, len(weight_VD)))
        return Affine(vocabulary, state_BTD.new_zeros(T, len(weight_VD))).after(norm_map(head.norm, state_BTD))
    if isinstance(head, TextClassifierHead):
        return _text_classifier(head, state_BTD, real_BT)
    raise ValueError(f"the head is {type(head).__name__}, whose closed form is not known")


def _text_classifier(head: TextClassifierHead, state_BTD: Tensor, real_BT: Tensor | None) -> Affine:
    B, T, D = state_BTD.shape
    real_BT = state_BTD.new_ones(B, T) if real_BT is None else real_BT.to(state_BTD.dtype)
    if head.pool == "mean":
        pool_BT = real_BT / real_BT.sum(dim=1, keepdim=True)
    else:
        place_B = torch.zeros(B, dtype=torch.long, device=state_BTD.device)
        pool_BT = F.one_hot(place_B if head.pool == "cls" else real_BT.sum(dim=1).long() - 1, T).to(state_BTD.dtype)
    # Pooled behind the norm: the row of the pool, each entry times its token's scale, and the norm's bias once.
    row_B1T = (pool_BT * norm_scale(head.norm, state_BTD))[:, None]
    shift_D = state_BTD.new_zeros(D) if head.norm.bias is None else head.norm.bias
    pooled = Affine(Kronecker([(row_B1T, centring(head.norm))], cols=(T, D), rows=(1, D)), shift_D.expand(1, D))
    inner = linear_map(head.pooler, 1).after(pooled)
    z_B1D = inner(state_BTD)
    # The secant of tanh, 1 at 0.
    slope_B1D = torch.where(z_B1D == 0, torch.ones_like(z_B1D), z_B1D.tanh() / z_B1D)
    return _classify(head.classify, inner.under(Diagonal(slope_B1D, inner.operator.rows)))


def _classify(classify: nn.Linear, normed: Affine) -> Affine:
    return linear_map(classify, normed.operator.rows[0]).after(normed)
