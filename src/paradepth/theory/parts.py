"""The parts of a layer in matrix-vector form: each an affine map x ↦ W(x) x + θ(x), its input-dependence explicit.

    linear map   Y = X Mᵀ + b                 W = I ⊗ M                                       nothing depends on X
    layer norm   Y = γ (X − mean) / √(var + ε) + β
                                              W = diag(s(X)) ⊗ diag(γ) C,  C = I − 11ᵀ/D      s = 1/√(var + ε), (T)
    attention    Y = Σ_h A_h X V_hᵀ O_hᵀ + …  W = Σ_h A_h(X) ⊗ O_h V_h                        A_h = softmax(Q_h K_hᵀ/√K)
    gates        σ(z) = Φ(z) z                W = diag(Φ(z))                                  Φ of GELU, one per unit

Nothing here calls a module's `forward`: the operators are computed from weights, so that their agreement with the model
is a test of the equations. Masks, causal attention, heads of any width and missing biases are covered. So are static
mixing, whose A_h depends on nothing, and cross-attention, whose map is one of the memory that is attended to.

Source: the matrix-vector method of Dynamic Universal Approximation Theory (arXiv 2407.21670), whose equations are
derived in docs/theory.md.

Shapes: B batch, T tokens, S tokens attended to, D width, E width of an output, H heads, K width of a head, M hidden
width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from paradepth.nn import CrossAttention, FeedForward, MultiHeadAttention
from paradepth.nn.static_mixing import StaticMixing
from paradepth.theory.operators import Affine, Kronecker


def linear_map(linear: nn.Linear, tokens: int) -> Affine:
    """A linear map of every token: I ⊗ M, and its bias for every token.

    >>> linear, x = nn.Linear(4, 6), torch.randn(2, 3, 4)
    >>> bool(torch.allclose(linear_map(linear, 3)(x), linear(x), atol=1e-6))
    True
    """
    weight_ED = linear.weight
    E, D = weight_ED.shape
    return Affine(Kronecker([(None, weight_ED)], cols=(tokens, D), rows=(tokens, E)), _bias(linear, tokens))


def norm_scale(norm: nn.LayerNorm, x_BTD: Tensor) -> Tensor:
    """s(x) = 1/√(var + ε) of every token, shape (B, T): all that a layer norm takes from its input.

    >>> norm_scale(nn.LayerNorm(4, eps=0.0), torch.tensor([[[2.0, -2.0, 2.0, -2.0]]])).tolist()
    [[0.5]]
    """
    return (x_BTD.var(dim=-1, correction=0) + norm.eps).rsqrt()


def norm_map(norm: nn.LayerNorm, x_BTD: Tensor) -> Affine:
    """A layer norm at x: diag(s(x)) ⊗ diag(γ) C and β.

    >>> norm, x = nn.LayerNorm(4), torch.randn(2, 3, 4)
    >>> bool(torch.allclose(norm_map(norm, x)(x), norm(x), atol=1e-5))
    True
    """
    T, D = x_BTD.shape[-2:]
    scale_BTT = torch.diag_embed(norm_scale(norm, x_BTD))
    offset_D = x_BTD.new_zeros(D) if norm.bias is None else norm.bias
    return Affine(Kronecker([(scale_BTT, centring(norm))], cols=(T, D), rows=(T, D)), offset_D.expand(T, D))


def centring(norm: nn.LayerNorm) -> Tensor:
    """diag(γ) C, the part of a layer norm that depends on no input, (D, D)."""
    (D,) = norm.normalized_shape
    like = norm.weight if norm.weight is not None else torch.empty(0)
    c_DD = torch.eye(D, dtype=like.dtype, device=like.device) - 1 / D
    return c_DD if norm.weight is None else norm.weight[:, None] * c_DD


def attention_weights(
    attention: MultiHeadAttention | CrossAttention,
    z_BTD: Tensor,
    mask: Tensor | None = None,
    *,
    memory_BSD: Tensor | None = None,
) -> Tensor:
    """A_h(z) = softmax(Q_h(z) K_h(z)ᵀ / √K) of every head, (B, H, T, T), or with K_h of a memory, (B, H, T, S).

    Args:
        attention: the module.
        z_BTD: its input.
        mask: booleans that broadcast to the result; True lets a query see a key.
        memory_BSD: what cross-attention attends to.

    Raises:
        ValueError: a token that sees none at all.
    """
    keys_BSD = z_BTD if memory_BSD is None else memory_BSD
    of_queries, of_keys, _ = _projections(attention)
    q_BHTK, k_BHSK = _projected(z_BTD, of_queries), _projected(keys_BSD, of_keys)
    scores_BHTS = q_BHTK @ k_BHSK.mT / math.sqrt(attention.head_width)
    causal = isinstance(attention, MultiHeadAttention) and attention.causal
    sees = _allowed(mask, scores_BHTS, causal=causal)
    if sees is not None and not bool(sees.any(dim=-1).all()):
        raise ValueError("the mask hides every token from one of them; attention to nothing is no number")
    return (scores_BHTS if sees is None else scores_BHTS.masked_fill(~sees, -math.inf)).softmax(dim=-1)


def _allowed(mask: Tensor | None, scores_BHTS: Tensor, *, causal: bool) -> Tensor | None:
    """What mask and causality allow together, of the scores' shape or broadcast to it; None for everything."""
    if mask is not None:
        mask = mask.expand_as(scores_BHTS)
    if not causal:
        return mask
    past_TS = torch.ones_like(scores_BHTS[0, 0], dtype=torch.bool).tril()
    return past_TS if mask is None else mask & past_TS


def attention_map(
    mixing: nn.Module, z_BTD: Tensor, mask: Tensor | None = None, *, memory_BSD: Tensor | None = None
) -> Affine:
    """Attention at z: Σ_h A_h(z) ⊗ O_h V_h; the biases of values and output make the offset.

    Args:
        mixing: `MultiHeadAttention`; `StaticMixing`, whose A_h depends on the mask only; or `CrossAttention`, whose map
            is one of the memory.
        z_BTD: its input.
        mask: booleans that broadcast to (B, H, T, T), or (B, H, T, S); True lets a query see a key.
        memory_BSD: of cross-attention alone, which needs it.

    Raises:
        ValueError: another kind of module, a memory that is missing or not attended to, or a token that sees none at
            all.

    >>> attention, z = MultiHeadAttention(8, 2, causal=True), torch.randn(2, 3, 8)
    >>> bool(torch.allclose(attention_map(attention, z)(z), attention(z), atol=1e-5))
    True
    """
    crosses = isinstance(mixing, CrossAttention)
    if crosses != (memory_BSD is not None):
        raise ValueError(f"{type(mixing).__name__} {'needs a' if crosses else 'has no'} memory that it attends to")
    B, T, _ = z_BTD.shape
    S, D = z_BTD.shape[1:] if memory_BSD is None else memory_BSD.shape[1:]
    if isinstance(mixing, MultiHeadAttention | CrossAttention):
        a_BHTS = attention_weights(mixing, z_BTD, mask, memory_BSD=memory_BSD)
        v_HKD, vb_HK = _projections(mixing)[2]
    elif isinstance(mixing, StaticMixing):
        a_BHTS = mixing.matrix(T).expand(B, -1, -1, -1)
        if mask is not None:
            a_BHTS = a_BHTS * mask.expand_as(a_BHTS)
        ((v_HKD, vb_HK),) = _by_head(mixing.value, mixing, maps=1)
    else:
        raise ValueError(
            f"tokens are mixed by {type(mixing).__name__}; the closed form covers MultiHeadAttention, StaticMixing and "
            "CrossAttention"
        )
    o_HDK = mixing.out.weight.view(-1, mixing.heads, mixing.head_width).transpose(0, 1)
    terms = [(a_BHTS[:, h], o_HDK[h] @ v_HKD[h]) for h in range(mixing.heads)]
    offset_BTD = _bias(mixing.out, T).expand(B, T, -1)
    if vb_HK is not None:
        ob_HD = torch.einsum("hdk,hk->hd", o_HDK, vb_HK)
        offset_BTD = offset_BTD + torch.einsum("bht,hd->btd", a_BHTS.sum(dim=-1), ob_HD)
    return Affine(Kronecker(terms, cols=(S, D), rows=(T, o_HDK.shape[1])), offset_BTD)


Projection = tuple[Tensor, Tensor | None]  # of every head: weight (H, K, D) and bias (H, K)


def _projections(attention: MultiHeadAttention | CrossAttention) -> list[Projection]:
    """Those of queries, keys and values."""
    if isinstance(attention, MultiHeadAttention):
        return _by_head(attention.qkv, attention, maps=3)
    return _by_head(attention.q, attention, maps=1) + _by_head(attention.kv, attention, maps=2)


def _by_head(
    linear: nn.Linear, of: MultiHeadAttention | CrossAttention | StaticMixing, *, maps: int
) -> list[Projection]:
    """The `maps` that are stacked in one linear map."""
    weights = linear.weight.view(maps, of.heads, of.head_width, -1).unbind()
    biases = [None] * maps if linear.bias is None else linear.bias.view(maps, of.heads, of.head_width).unbind()
    return list(zip(weights, biases, strict=True))


def _projected(x_BTD: Tensor, projection: Projection) -> Tensor:
    """(B, H, T, K)."""
    weight_HKD, bias_HK = projection
    y_BHTK = torch.einsum("btd,hkd->bhtk", x_BTD, weight_HKD)
    return y_BHTK if bias_HK is None else y_BHTK + bias_HK[:, None]


def feed_forward_maps(mlp: FeedForward, tokens: int) -> tuple[Affine, Affine]:
    """The two linear maps around the activation, D → M and M → D.

    Raises:
        ValueError: an activation other than GELU, σ(z) = z Φ(z).
    """
    if not isinstance(mlp.act, nn.GELU) or mlp.act.approximate != "none":
        raise ValueError(f"the activation is {mlp.act}; the closed form is of GELU, σ(z) = z Φ(z)")
    return linear_map(mlp.up, tokens), linear_map(mlp.down, tokens)


def gates(z: Tensor) -> Tensor:
    """Φ(z), the normal distribution: GELU multiplies z by it. Between 0 and 1; above ½ where z is positive.

    >>> z = torch.tensor([-1.0, 0.0, 3.0])
    >>> bool(torch.allclose(gates(z) * z, torch.nn.functional.gelu(z)))
    True
    """
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def gelu(z: Tensor) -> Tensor:
    """σ(z) = z Φ(z). Since Φ(z) + Φ(−z) = 1, σ(z) − σ(−z) = z: two units make the identity.

    >>> z = torch.tensor([-1.5, 2.0])
    >>> bool(torch.allclose(gelu(z) - gelu(-z), z))
    True
    """
    return z * gates(z)


def check_no_dropout(module: nn.Module) -> None:
    """Refuses a module that draws dropout masks.

    Raises:
        ValueError: it is in training mode and has dropout.
    """
    if any(part.training and getattr(part, "p", 0) for part in module.modules()):
        raise ValueError("the module is in training mode and drops units at random; call its eval() first")


def _bias(linear: nn.Linear, tokens: int) -> Tensor:
    bias_E = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
    return bias_E.expand(tokens, -1)
