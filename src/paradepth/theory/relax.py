"""Attention relaxed to a linear map: the A(x) of a trained model replaced by the best matrix that does not depend on x.

The universal-approximation argument treats attention as a linear map, of which only the parameters depend on the input.
How much of a trained model does that dependence carry? Here it is taken out, layer by layer, and nothing else is
changed: value and output projections, norms and feed-forward parts stay as they are.

    a(x)  =  Σ_h W_h A_h(x) V_h(x)  ≈  Σ_h W_h M_h V_h(x)

"least_squares" takes the matrices that come closest, over all heads together, in the attention's output. Row t of all
of them is one linear problem in the H·S numbers m,

    min E ‖ a_t − Σ_{h,s} m_{h,s} W_h v_{h,s} ‖²
      ⟹   G m = c   with   G = E ⟨W_h v_{h,s}, W_g v_{g,r}⟩   and   c = E ⟨a_t, W_h v_{h,s}⟩,

whose G is the same for all rows (of a causal layer its first rows and columns). "mean" is the naive alternative,
M_h = E A_h(x).

Layers are fitted from the first on. A later layer reads the states that the relaxed layers before it leave, and is
fitted to bring them back to the original's, so that errors are made up for where they can be and do not pile up.

Source: the relaxation is that of Dynamic Universal Approximation Theory (arXiv 2407.21670); that it be put to the test
is asked for there. Earlier layers' errors in the regression as in layer-wise pruning, e.g. arXiv 2301.00774.

Shapes: B batch, T tokens, S tokens mixed, D width, H heads, K width of a head, U = S·H unknowns of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from paradepth.branches.branches import stacks_of
from paradepth.depth.as_branches import branch_layers
from paradepth.models import TrunkConfig, TrunkModel
from paradepth.nn import EncoderLayer, MultiHeadAttention, StaticMixing
from paradepth.theory.parts import attention_weights

How = Literal["least_squares", "mean"]

_RIDGE = 1e-6
_MOST_NUMBERS = 2**28  # of the normal equations, 2 GiB


@dataclass(frozen=True)
class Relaxed:
    """A model some of whose layers mix tokens by matrices that do not depend on the input.

    Attributes:
        model: the model, a `TrunkModel` of the class that it had, in evaluation mode; `config.static_layers` says which
            layers.
        errors: of each of these, by number, what the fit leaves: E ‖a − â‖² / E ‖a‖² over the data it was fitted to,
            where a is the attention's output (for layers behind relaxed ones with what is to be made up for).
    """

    model: Any
    errors: dict[int, float]


def layers_of(config: TrunkConfig, branch: int) -> tuple[int, ...]:
    """Numbers of the layers of a branch, counted from 0, within the trunk.

    Raises:
        ValueError: a branch that the shape does not have.

    >>> layers_of(TrunkConfig(branches=2, depths=(2, 3)), 1)
    (2, 3, 4)
    """
    depths = config.branch_depths
    if not 0 <= branch < len(depths):
        raise ValueError(f"branch is {branch}; there are {len(depths)}, counted from 0")
    return branch_layers(depths)[branch]


@torch.no_grad()
def relax(
    model: TrunkModel,
    batches: Iterable[Any],
    *,
    layers: Sequence[int] | None = None,
    how: How = "least_squares",
    ridge: float = _RIDGE,
) -> Relaxed:
    """Replaces the attention of some layers of a trained model by static mixing; the model is left alone.

    Args:
        model: of any kind whose trunk has `EncoderLayer`s: of images or of texts, serial or branches, but no
            translator.
        batches: inputs of the model, training data without augmentation. Their states are kept in memory, twice: 2,048
            samples of 64 tokens of width 64 are 67 MB.
        layers: numbers within the trunk, counted from 0 through one branch after the other (see `layers_of`); None:
            all that have attention.
        how: "least_squares" or "mean".
        ridge: of the least squares, relative to the mean square of a feature; keeps directions that the data do not
            show from being used. 0 takes none, and then the data must show all.

    Returns:
        The relaxed model and what each fit leaves.

    Raises:
        ValueError: another kind of model, a quantised one, one whose layers share weights or with factorised static
            mixing; layers that it does not
            have or that are static already; an unknown way, no data, a ridge below 0, normal equations that do not fit
            into memory, or least squares without a ridge that the data leave undetermined.

    >>> from paradepth import create_model
    >>> model = create_model("paraformer_nano", branches=2, depth=1, image_size=8, patch_size=4).eval()
    >>> relaxed = relax(model, [torch.rand(16, 3, 8, 8)], layers=[1])
    >>> relaxed.model.config.mixing, relaxed.model.config.static_layers, 0 < relaxed.errors[1] < 1
    ('static', (1,), True)
    """
    chosen = _checked(model, layers, how, ridge)
    was_training = model.training
    model.eval()
    try:
        inputs = [model.embed(batch) for batch in batches]
        if not inputs:
            raise ValueError("there is no data to fit to")
        relaxed = _without_matrices(model, chosen)
        errors: dict[int, float] = {}
        for stack, other, numbers in zip(
            stacks_of(model.trunk), stacks_of(relaxed.trunk), branch_layers(model.config.branch_depths), strict=True
        ):
            last = max((n for n in numbers if n in chosen), default=-1)
            both = [_Pair(x, x, sides[0] if sides else None) for x, sides in inputs]
            for n, layer, static in zip(range(numbers[0], last + 1), stack.layers, other.layers, strict=False):
                layer, static = cast(EncoderLayer, layer), cast(EncoderLayer, static)
                if n in chosen:
                    fit = _mean if how == "mean" else _least_squares
                    errors[n] = fit(layer, static, both, ridge)
                h = stack.step_of(n - numbers[0])
                both = [pair.advanced(layer, static, h, changed=n in chosen) for pair in both]
        return Relaxed(relaxed, errors)
    finally:
        model.train(was_training)


def _checked(model: TrunkModel, layers: Sequence[int] | None, how: str, ridge: float) -> frozenset[int]:
    """The layers to relax."""
    if not isinstance(model.config, TrunkConfig) or model.model_type == "translator":
        raise ValueError(
            f"a model of type {model.model_type!r} is not relaxed; models of images and of texts are, whose trunk has "
            "layers of this package and one text or image a sample"
        )
    if model.quantisation is not None:
        raise ValueError(f"the model is quantised ({model.quantisation.method}); relax the one before")
    model.check_whole()
    if how not in get_args(How):
        raise ValueError(f"how is {how!r}; it must be one of {', '.join(get_args(How))}")
    if not ridge >= 0:
        raise ValueError(f"ridge is {ridge}; it must be at least 0")
    every = (layer for stack in stacks_of(model.trunk) for layer in stack.layers)
    strange = next((layer for layer in every if not isinstance(layer, EncoderLayer)), None)
    if strange is not None:
        raise ValueError(f"the trunk has a {type(strange).__name__}; only EncoderLayer is relaxed")
    config = model.config
    if config.share != "none":
        raise ValueError(
            f"share is {config.share!r}; only layers that have weights of their own are relaxed one by one"
        )
    if config.mixing_rank is not None:
        raise ValueError(
            f"the model has static mixing of rank {config.mixing_rank}, and relaxed layers are of full rank"
        )
    able = [n for n in range(config.layers) if config.mixing_of(n) == "attention"]
    chosen = able if layers is None else list(layers)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(able):
        raise ValueError(f"layers is {chosen}; it must be some of those with attention, {able}, each at most once")
    return frozenset(chosen)


@dataclass(frozen=True)
class _Pair:
    """One batch before a layer: its states in the original and in the relaxed model, and the mask."""

    x_BTD: Tensor
    y_BTD: Tensor
    mask: Tensor | None

    def advanced(self, layer: EncoderLayer, other: EncoderLayer, h: float, *, changed: bool) -> _Pair:
        """Behind the layer and the relaxed model's, which may have been `changed`."""
        x_BTD = layer(self.x_BTD, self.mask, step=h)
        same = self.y_BTD is self.x_BTD and not changed
        return _Pair(x_BTD, x_BTD if same else other(self.y_BTD, self.mask, step=h), self.mask)

    @property
    def real_BT(self) -> Tensor:
        """Tokens that are no padding, 1 or 0."""
        B, T, _ = self.x_BTD.shape
        if self.mask is None:
            return self.x_BTD.new_ones(B, T)
        return self.mask[:, 0, 0].to(self.x_BTD.dtype).expand(B, T)

    def wanted(self, layer: EncoderLayer) -> Tensor:
        """What the attention has to add to the relaxed model's state to get to the original's, (B, T, D)."""
        a_BTD = layer.attention(layer.attention_norm(self.x_BTD), self.mask)
        return a_BTD if self.y_BTD is self.x_BTD else a_BTD + (self.x_BTD - self.y_BTD)


def _values(static: EncoderLayer, pair: _Pair) -> Tensor:
    """Values of all heads, (B, S, H, K); zero in padding."""
    mixing = cast(StaticMixing, static.attention)
    v_BSHK = mixing.value(static.attention_norm(pair.y_BTD)).unflatten(2, (mixing.heads, mixing.head_width))
    return v_BSHK if pair.mask is None else v_BSHK * pair.mask[:, 0, 0, :, None, None]


def _set(static: EncoderLayer, m_HTS: Tensor) -> None:
    """Gives the layer its matrices; samples may all have been shorter than the model's longest."""
    t = m_HTS.shape[1]
    cast(StaticMixing, static.attention).mixing[:, :t, :t] = m_HTS


# ---- fits --------------------------------------------------------------------------------------------------------


def _least_squares(layer: EncoderLayer, static: EncoderLayer, pairs: Sequence[_Pair], ridge: float) -> float:
    """Sets the matrices by the normal equations, added up in float64; returns what they leave."""
    attention = cast(MultiHeadAttention, layer.attention)
    H, T = attention.heads, max(pair.x_BTD.shape[1] for pair in pairs)
    masked = any(pair.mask is not None for pair in pairs)
    rows = T if masked else 1  # which samples have a token t depends on t only where there is padding
    if rows * (T * H) ** 2 > _MOST_NUMBERS:
        raise ValueError(
            f"least squares of {T} tokens and {H} heads {'with padding ' if masked else ''}have {rows} matrices of "
            f"{T * H} × {T * H} numbers, which is too much; take shorter samples, or how='mean'"
        )
    w_DHK = attention.out.weight.double().unflatten(1, (H, attention.head_width))
    gram_rUU = w_DHK.new_zeros(rows, T * H, T * H)
    right_TU = w_DHK.new_zeros(T, T * H)
    square = 0.0
    for pair in pairs:
        t, real_BT = pair.x_BTD.shape[1], pair.real_BT.double()
        a_BTD = pair.wanted(layer).double()
        if attention.out.bias is not None:
            a_BTD = a_BTD - attention.out.bias.double()
        u_BUD = torch.einsum("dhk,bshk->bshd", w_DHK, _values(static, pair).double()).flatten(1, 2)
        right_TU[:t, : t * H] += torch.einsum("btd,bud->tu", a_BTD * real_BT[..., None], u_BUD)
        square += float((a_BTD.square().sum(dim=2) * real_BT).sum())
        if rows == 1:
            gram_rUU[0, : t * H, : t * H] += torch.einsum("bud,bwd->uw", u_BUD, u_BUD)
        else:
            own_BUU = u_BUD @ u_BUD.transpose(1, 2)
            gram_rUU[:t, : t * H, : t * H] += torch.einsum("bt,buw->tuw", real_BT, own_BUU)
    m_TU, left = _solved(gram_rUU, right_TU, ridge, heads=H, causal=attention.causal)
    _set(static, m_TU.unflatten(1, (T, H)).permute(2, 0, 1))
    return (square + left) / max(square, 1e-300)


def _solved(gram_rUU: Tensor, right_TU: Tensor, ridge: float, *, heads: int, causal: bool) -> tuple[Tensor, float]:
    """Solutions of all rows, (T, U), and Σ_t m_t·G m_t − 2 m_t·c_t, which with Σ a² is the squared error."""
    T = len(right_TU)
    diagonal_rU = gram_rUU.diagonal(dim1=1, dim2=2)
    scale = float(diagonal_rU.sum() / max(int((diagonal_rU > 0).sum()), 1))
    if scale == 0:
        return torch.zeros_like(right_TU), 0.0  # whatever is mixed, nothing comes out
    damped_rUU = gram_rUU + (ridge * scale) * torch.eye(gram_rUU.shape[1], dtype=gram_rUU.dtype, device=gram_rUU.device)
    lower_rUU, info_r = torch.linalg.cholesky_ex(damped_rUU)
    if bool(info_r.any()):
        raise ValueError(
            f"the data do not determine the least squares with ridge {ridge}: take more data or a larger ridge"
        )
    m_TU = torch.zeros_like(right_TU)
    left = 0.0
    for t in range(T):
        u = (t + 1) * heads if causal else T * heads  # the factor of the first rows and columns is that of the whole
        r = min(t, len(gram_rUU) - 1)
        m_U = torch.cholesky_solve(right_TU[t, :u, None], lower_rUU[r, :u, :u])[:, 0]
        m_TU[t, :u] = m_U
        left += float(m_U @ (gram_rUU[r, :u, :u] @ m_U) - 2 * m_U @ right_TU[t, :u])
    return m_TU, left


def _mean(layer: EncoderLayer, static: EncoderLayer, pairs: Sequence[_Pair], ridge: float) -> float:
    """Sets the matrices to the mean of A(x) over the samples that have the token; returns what they leave."""
    attention = cast(MultiHeadAttention, layer.attention)
    T = max(pair.x_BTD.shape[1] for pair in pairs)
    total_HTS = attention.out.weight.new_zeros(attention.heads, T, T, dtype=torch.float64)
    count_T = total_HTS.new_zeros(T)
    for pair in pairs:
        t, real_BT = pair.y_BTD.shape[1], pair.real_BT.double()
        a_BHTS = attention_weights(attention, layer.attention_norm(pair.y_BTD), pair.mask).double()
        total_HTS[:, :t, :t] += torch.einsum("bt,bhts->hts", real_BT, a_BHTS)
        count_T[:t] += real_BT.sum(dim=0)
    _set(static, total_HTS / count_T.clamp(min=1)[:, None])
    missed = square = 0.0
    for pair in pairs:
        real_BT, wanted_BTD = pair.real_BT, pair.wanted(layer)
        found_BTD = static.attention(static.attention_norm(pair.y_BTD), pair.mask)
        missed += float(((found_BTD - wanted_BTD).square().sum(dim=2) * real_BT).sum())
        bias = 0.0 if attention.out.bias is None else attention.out.bias
        square += float(((wanted_BTD - bias).square().sum(dim=2) * real_BT).sum())
    return missed / max(square, 1e-300)


# ---- the model ---------------------------------------------------------------------------------------------------


def _without_matrices(model: TrunkModel, chosen: frozenset[int]) -> TrunkModel:
    """The model with static mixing in the layers of these numbers as well, by matrices of zeros."""
    config = model.config
    static = tuple(n for n in range(config.layers) if n in chosen or config.mixing_of(n) == "static")
    new = model.fresh(dataclasses.replace(config, mixing="static", static_layers=static))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = [name for name, module in model.trunk.named_modules() if isinstance(module, EncoderLayer)]
    for name in (layers[n] for n in chosen):
        place = f"trunk.{name}.attention"
        weights[f"{place}.mixing"] = torch.zeros_like(new.get_parameter(f"{place}.mixing"))
        for key in ("weight", "bias"):
            maps = weights.pop(f"{place}.qkv.{key}", None)
            if maps is not None:
                weights[f"{place}.value.{key}"] = maps.chunk(3)[2]
    new.load_state_dict(weights)
    return new.eval()
