"""Layers that are alike, evaluated at once: their weights stacked, their matrix products batched.

    layers 1 … m, one input each or one for all
        LN           without its affine map, which the linear map behind it takes in; once for a shared input
        linear maps  m products as one batched product; a shared input is read by all of them, not copied
        attention    the m layers side by side in the batch dimension, by the same kernels as one layer

The result is that of the layers one after another up to rounding, dropout masks included. Weights stay where they are:
with gradients the stack is part of the graph, so each parameter gets its own; without, it is kept until a parameter
changes.

Shapes: m layers, B batch, T tokens (S of a source), D width, H heads, K width of a head, M hidden width, R = B·T rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from paradepth.nn.attention import CrossAttention, MultiHeadAttention, attend
from paradepth.nn.dropout import Dropout, StackedDropout
from paradepth.nn.feed_forward import FeedForward
from paradepth.nn.joint_layers import SourceLayer, TargetLayer
from paradepth.nn.layer import EncoderLayer

Weights = dict[str, Tensor]
_Linears = tuple[tuple[str, str | None], ...]  # linear maps of a layer, each with the norm in front of it
_ENCODER: _Linears = (
    ("attention.qkv", "attention_norm"),
    ("attention.out", None),
    ("mlp.up", "mlp_norm"),
    ("mlp.down", None),
)
_TARGET: _Linears = (*_ENCODER, ("cross.q", "cross_norm"), ("cross.kv", "memory_norm"), ("cross.out", None))
_KNOWN = frozenset({EncoderLayer, TargetLayer, SourceLayer})
_PARTS: dict[type, Callable[[Any], Any]] = {  # of a layer, each with what has to agree besides its parameters
    EncoderLayer: lambda module: None,
    TargetLayer: lambda module: None,
    nn.Linear: lambda module: None,
    FeedForward: lambda module: None,
    nn.LayerNorm: lambda module: module.eps,
    nn.GELU: lambda module: module.approximate,
    Dropout: lambda module: module.p if module.training else 0.0,
    MultiHeadAttention: lambda module: (module.heads, module.causal),
    CrossAttention: lambda module: module.heads,
}
_PLAIN = frozenset({nn.Parameter, Tensor})


def signature(layer: nn.Module) -> tuple[Any, ...]:
    """What layers must have in common to be evaluated at once: kind, shapes, dtype, device, dropout and mode.

    Raises:
        ValueError: a layer that cannot be evaluated so, and why: of another kind than `EncoderLayer`, `SourceLayer` and
            `TargetLayer`, with hooks, or with parameters that are no plain tensors (shared out or quantised ones).

    >>> one, other = EncoderLayer(16, heads=2, mlp=32), EncoderLayer(16, heads=2, mlp=32)
    >>> signature(one) == signature(other), signature(one) == signature(EncoderLayer(16, heads=4, mlp=32))
    (True, False)
    """
    if type(layer) not in _KNOWN:
        raise ValueError(
            f"a layer of type {type(layer).__name__} is not evaluated together with others; EncoderLayer, SourceLayer "
            "and TargetLayer are"
        )
    if isinstance(layer, SourceLayer):
        _check_plain(layer)
        return ("source", *signature(layer.layer))
    found: list[Any] = [type(layer).__name__]
    for module in _modules(layer):
        more = _PARTS.get(type(module))
        if more is None:
            raise ValueError(f"a {type(layer).__name__} has a {type(module).__name__}, which is not stacked")
        _check_plain(module)
        found.append(more(module))
        for parameter in module._parameters.values():
            if parameter is None:
                found.append(None)
                continue
            if type(parameter) not in _PLAIN:
                raise ValueError(f"a parameter is a {type(parameter).__name__}; only plain tensors are stacked")
            found += (parameter.shape, parameter.dtype, parameter.device)
    return tuple(found)


def _modules(module: nn.Module) -> list[nn.Module]:
    # `modules()` makes names and looks for repetitions, which would take longer than some evaluations.
    found = [module]
    for child in module._modules.values():
        if child is not None:
            found += _modules(child)
    return found


def parameters_of(layer: nn.Module) -> list[nn.Parameter]:
    """`list(layer.parameters())` for modules that share none among their parts, several times as fast."""
    return [p for module in _modules(layer) for p in module._parameters.values() if p is not None]


def _check_plain(module: nn.Module) -> None:
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise ValueError(f"a {type(module).__name__} has hooks, which are called only when it is evaluated by itself")


@dataclass
class _Kept:
    """The stacked weights of some layers, and the state that their parameters had."""

    layers: list[weakref.ref[nn.Module]]
    state: list[tuple[Any, ...]]
    cast: torch.dtype | None
    weights: Weights


class StackedLayers:
    """Evaluates m layers of one `signature` at once: layers and states in, increments out.

    Without gradients (of the parameters) the stacked copy of the weights is kept, one for each set of layers, as long
    as the layers live; the first layers of a set share its copy. It is made anew when a parameter was replaced, changed
    in place, or moved. A change behind autograd's back, `parameter.data.add_(…)`, is not seen; `forget` helps.

    >>> layers = [EncoderLayer(16, heads=2, mlp=32) for _ in range(3)]
    >>> x, stacked = torch.randn(2, 5, 16), StackedLayers()
    >>> f_mBTD = stacked.increments(layers, x)
    >>> bool(torch.allclose(f_mBTD, torch.stack([layer.residual(x) for layer in layers]), atol=1e-5))
    True
    >>> bool(torch.allclose(stacked.total(layers, x), f_mBTD.sum(0), atol=1e-5))
    True
    """

    def __init__(self) -> None:
        _count_fused_steps()
        self._kept: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> StackedLayers:
        return StackedLayers()  # a copy of a model has layers of its own

    def __reduce__(self) -> tuple[Any, ...]:
        return StackedLayers, ()

    def kept(self) -> list[Weights]:
        """The stacked copies of weights at present."""
        return [kept.weights for kept in self._kept.values()]

    def forget(self) -> None:
        """Drops the stacked copies of weights."""
        self._kept.clear()

    # ---- evaluation --------------------------------------------------------------------------------------------

    def increments(
        self, layers: Sequence[nn.Module], x: Any, mask: Tensor | None = None, *, weights: Weights | None = None
    ) -> Any:
        """F_1(x_1) … F_m(x_m), shape (m, B, T, D).

        Args:
            layers: m layers of one `signature`.
            x: one input for all, (B, T, D), or one for each, (m, B, T, D). Of `SourceLayer` and `TargetLayer` a pair
                (X, Y), each in either form.
            mask: what the layers take: booleans that broadcast to (B, H, T, S).
            weights: what `weights` made of them, to be used as constants; None: the layers' own, with their gradients.

        Returns:
            The increments; of `SourceLayer` and `TargetLayer` a pair, with None for the half that stays.
        """
        return self._evaluate(layers, x, mask, weights, summed=False)

    def total(self, layers: Sequence[nn.Module], x: Any, mask: Tensor | None = None) -> Any:
        """Σ_i F_i(x_i), shape (B, T, D): the last linear map of all layers is one product that adds up over them."""
        return self._evaluate(layers, x, mask, None, summed=True)

    def _evaluate(
        self, layers: Sequence[Any], x: Any, mask: Tensor | None, weights: Weights | None, *, summed: bool
    ) -> Any:
        if isinstance(layers[0], SourceLayer):
            return self._evaluate([layer.layer for layer in layers], x[0], mask, weights, summed=summed), None
        call = _Call(layers, self._weights(layers) if weights is None else weights)
        if isinstance(layers[0], TargetLayer):
            return None, call.target(x, mask, summed=summed)
        return call.encoder(x, mask, summed=summed)

    # ---- weights -----------------------------------------------------------------------------------------------

    def weights(self, layers: Sequence[nn.Module]) -> Weights:
        """The stacked weights of layers of one `signature`, first dimension m, as they are now and without a graph;
        `pick` takes those of some of the layers."""
        with torch.no_grad():
            return self._weights([layer.layer if isinstance(layer, SourceLayer) else layer for layer in layers])

    def _weights(self, layers: Sequence[nn.Module]) -> Weights:
        kind = _TARGET if isinstance(layers[0], TargetLayer) else _ENCODER
        parameters = [parameters_of(layer) for layer in layers]
        if torch.is_grad_enabled() and any(p.requires_grad for own in parameters for p in own):
            return _stacked(layers, kind)
        first = parameters[0][0]
        if any(p.is_inference() for own in parameters for p in own):
            return _stacked(layers, kind)  # such tensors do not count their changes
        # Under autocast the copy is cast once instead of at every use.
        cast = torch.get_autocast_dtype(first.device.type) if torch.is_autocast_enabled(first.device.type) else None
        cast = None if first.dtype == torch.float64 else cast
        kept = self._kept.get(layers[0])
        state = [tuple((p._version, p.data_ptr(), p.dtype) for p in own) for own in parameters]
        m = len(layers)
        if (
            kept is None
            or kept.cast != cast
            or kept.state[:m] != state
            or any(ref() is not layer for ref, layer in zip(kept.layers, layers, strict=False))
        ):
            # Normal tensors even in inference mode, since a later call may need to save them for a backward pass.
            with torch.inference_mode(False), torch.no_grad():
                weights = _stacked(layers, kind)
                weights = weights if cast is None else {name: w.to(cast) for name, w in weights.items()}
            kept = self._kept[layers[0]] = _Kept([weakref.ref(layer) for layer in layers], state, cast, weights)
        if m == len(kept.layers):
            return kept.weights
        return {name: w[:m] for name, w in kept.weights.items()}


def pick(weights: Weights, places: Sequence[int]) -> Weights:
    """Those of the layers at some places of the stack, in rising order; read in place where they are evenly spaced,
    else copied.

    >>> stacked = {"attention.qkv": torch.arange(6).view(6, 1, 1)}
    >>> [pick(stacked, places)["attention.qkv"].flatten().tolist() for places in ((1, 3, 5), (0, 1, 4))]
    [[1, 3, 5], [0, 1, 4]]
    """
    spacing = places[1] - places[0] if len(places) > 1 else 1
    evenly = range(places[0], places[-1] + 1, spacing) if spacing > 0 else range(0)
    if tuple(evenly) == tuple(places):
        return {name: w[evenly.start : evenly.stop : spacing] for name, w in weights.items()}
    return {name: torch.stack([w[place] for place in places]) for name, w in weights.items()}


@cache
def _count_fused_steps() -> None:
    """Makes the steps of fused optimisers count as changes of their parameters, which torch forgets."""

    def count(optimiser: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimiser.param_groups:
            if group.get("fused"):
                torch.autograd.graph.increment_version([p for p in group["params"] if p.grad is not None])

    register_optimizer_step_post_hook(count)


class _Stack(torch.autograd.Function):
    """`torch.stack` whose gradients lie in memory of their own. Those of torch.stack may be views of one expanded
    tensor, which autograd then makes the `grad` of several parameters, and adding to one would add to all."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*tensors: Tensor) -> Tensor:
        return torch.stack(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        return

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.contiguous().unbind()


def _stack(modules: Sequence[Any], name: str) -> Tensor | None:
    parameters = [getattr(module, name) for module in modules]
    return None if parameters[0] is None else _Stack.apply(*parameters)  # pyright: ignore[reportReturnType]


def _stacked(layers: Sequence[nn.Module], kind: _Linears) -> Weights:
    """Linear maps of all layers: "name" (m, out, in) and, where there are biases, "name.bias" (m, 1, out)."""
    weights: Weights = {}
    for name, norm_name in kind:
        linears = [layer.get_submodule(name) for layer in layers]
        w, bias = _stack(linears, "weight"), _stack(linears, "bias")
        assert w is not None
        if norm_name is not None:
            norms = [layer.get_submodule(norm_name) for layer in layers]
            scale, shift = _stack(norms, "weight"), _stack(norms, "bias")
            assert scale is not None
            if shift is not None:
                with torch.autocast(w.device.type, enabled=False):
                    moved = torch.bmm(w, shift.unsqueeze(2)).squeeze(2)  # W (g·n + β) = (W g) n + W β
                bias = moved if bias is None else bias + moved
            w = w * scale.unsqueeze(1)
        weights[name] = w
        if bias is not None:
            weights[f"{name}.bias"] = bias.unsqueeze(1)
    return weights


class _Call:
    """One evaluation of stacked layers; rows of several layers are (m, R, …), of a shared input (R, …)."""

    def __init__(self, layers: Sequence[Any], weights: Weights) -> None:
        self.layers, self.w, self.m = layers, weights, len(layers)

    # ---- kinds of layers ---------------------------------------------------------------------------------------

    def encoder(self, x: Tensor, mask: Tensor | None, *, summed: bool) -> Tensor:
        """F(x) = φ1(x) + φ2(x + φ1(x))."""
        a_mBTD = self._dropout("attention_out_dropout", self._self_attention(x, mask))
        return self._with_mlp(x, a_mBTD, summed=summed)

    def target(self, z: tuple[Tensor, Tensor], mask: Tensor | None, *, summed: bool) -> Tensor:
        """F(Y, X) = Ȳ + φ2(Y + Ȳ) with Ȳ = φ1(Y) + φ3(Y + φ1(Y), X)."""
        x, y = z
        a_mBTD = self._dropout("attention_out_dropout", self._self_attention(y, None))
        c_mBTD = self._cross_attention(y + a_mBTD, x, mask)
        a_mBTD = a_mBTD + self._dropout("cross_out_dropout", c_mBTD)
        return self._with_mlp(y, a_mBTD, summed=summed)

    def _with_mlp(self, x: Tensor, a_mBTD: Tensor, *, summed: bool) -> Tensor:
        h_mRM = self._first("mlp.act")(self._linear("mlp.up", self._normalised(x + a_mBTD, "mlp_norm")))
        h_mRM = self._dropout("mlp.dropout", h_mRM)
        out_dropout = self._first("mlp_out_dropout")
        if summed and not (out_dropout.p and out_dropout.training):
            return a_mBTD.sum(dim=0) + self._summed_linear("mlp.down", h_mRM).view(a_mBTD.shape[1:])
        m_mBTD = self._dropout("mlp_out_dropout", self._linear("mlp.down", h_mRM)).view(a_mBTD.shape)
        f_mBTD = a_mBTD + m_mBTD
        return f_mBTD.sum(dim=0) if summed else f_mBTD

    # ---- attention ---------------------------------------------------------------------------------------------

    def _self_attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        attention = self._first("attention")
        B, T, D = x.shape[-3:]
        qkv_mRE = self._linear("attention.qkv", self._normalised(x, "attention_norm"))
        q, k, v = qkv_mRE.view(self.m * B, T, 3, attention.heads, -1).permute(2, 0, 3, 1, 4)
        return self._attended("attention", q, k, v, mask, causal=attention.causal).view(self.m, B, T, D)

    def _cross_attention(self, y_mBTD: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        heads = self._first("cross").heads
        B, T, D = y_mBTD.shape[-3:]
        S = x.shape[-2]
        q_mRD = self._linear("cross.q", self._normalised(y_mBTD, "cross_norm"))
        kv_mRE = self._linear("cross.kv", self._normalised(x, "memory_norm"))
        q = q_mRD.view(self.m * B, T, heads, -1).transpose(1, 2)
        k, v = kv_mRE.view(self.m * B, S, 2, heads, -1).permute(2, 0, 3, 1, 4)
        return self._attended("cross", q, k, v, mask, causal=False).view(self.m, B, T, D)

    def _attended(
        self, name: str, q_NHTK: Tensor, k_NHSK: Tensor, v_NHSK: Tensor, mask: Tensor | None, *, causal: bool
    ) -> Tensor:
        """Attention of all layers with their output projections; N = m·B."""
        if mask is not None and mask.dim() == 4 and mask.shape[0] > 1:
            mask = mask.repeat(self.m, 1, 1, 1)  # samples of one layer follow each other
        dropout = StackedDropout([layer.get_submodule(name).attention_dropout for layer in self.layers])
        y_NHTK = attend(q_NHTK, k_NHSK, v_NHSK, mask=mask, causal=causal, dropout=dropout)
        y_mRD = y_NHTK.transpose(1, 2).reshape(self.m, -1, q_NHTK.shape[1] * q_NHTK.shape[3])
        return self._linear(f"{name}.out", y_mRD)

    # ---- parts -------------------------------------------------------------------------------------------------

    def _first(self, name: str) -> Any:
        return self.layers[0].get_submodule(name)

    def _dropout(self, name: str, x_m: Tensor) -> Tensor:
        return StackedDropout([layer.get_submodule(name) for layer in self.layers])(x_m)

    def _normalised(self, x: Tensor, norm: str) -> Tensor:
        """Rows (m, R, D), normalised, without the affine map; those of a shared input lie in memory once."""
        n = F.layer_norm(x, x.shape[-1:], eps=self._first(norm).eps)
        return n.flatten(1, 2) if x.dim() == 4 else n.flatten(0, 1).expand(self.m, -1, -1)

    def _linear(self, name: str, x_mRI: Tensor) -> Tensor:
        w_mIO, bias_m1O = self.w[name].transpose(1, 2), self.w.get(f"{name}.bias")
        return torch.bmm(x_mRI, w_mIO) if bias_m1O is None else torch.baddbmm(bias_m1O, x_mRI, w_mIO)

    def _summed_linear(self, name: str, x_mRI: Tensor) -> Tensor:
        """Σ_i x_i W_iᵀ + b_i, (R, out)."""
        w_mIO, bias_m1O = self.w[name].transpose(1, 2), self.w.get(f"{name}.bias")
        half = x_mRI.dtype in (torch.bfloat16, torch.float16)
        if x_mRI.device.type == "cpu" and not half and not torch.is_autocast_enabled("cpu"):
            sum_1O = x_mRI.new_zeros(1, 1) if bias_m1O is None else bias_m1O.sum(dim=0)
            return torch.addbmm(sum_1O, x_mRI, w_mIO)  # [H_1 … H_m] [W_1 … W_m]ᵀ
        # Elsewhere that is a loop, or rounds after every term; laying the H_i side by side for one product would copy
        # more than the sum of the products reads.
        return self._linear(name, x_mRI).sum(dim=0, dtype=torch.float32 if half else None)
