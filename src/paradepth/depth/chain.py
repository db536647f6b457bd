"""A chain of steps u_{j+1} = u_j + Δ_j(u_j): what the iterative executors solve, forward and backward.

Forward, Δ_j is h·F_j, layer j's increment. Backward, the chain runs from the last layer to the first and
Δ_j(λ) = h (∂F/∂x)ᵀ λ at the layer's stored state: the discrete adjoint λ_n = λ_{n+1} + h (∂F_n/∂x)ᵀ λ_{n+1}.

Source: Layer-Parallel Training for Transformers (arXiv 2601.09026), the ODE form and its adjoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from paradepth.depth.state import Increment, State, pack, scaled

Gradients = tuple[Tensor | None, ...]


class Chain(ABC):
    """Steps 0 … count − 1, each evaluable on any state and in any order.

    Attributes:
        count: number of steps.
        evaluations: layer evaluations so far.
        looks_at_every_step: whether `final_increment` does something.
    """

    count: int
    evaluations: int = 0
    looks_at_every_step: bool = False

    @abstractmethod
    def increment(self, j: int, u: State) -> Increment:
        """Δ_j(u)."""

    def final_increment(self, j: int, u: State) -> Increment | None:
        """Δ_j(u) at the state where the solution was left, called once a step and last; None: nothing special."""
        return None


@dataclass
class Layers:
    """Layers with their step sizes and side inputs, and the derivatives of their increments.

    Attributes:
        layers: by index; only the owned ones are called.
        steps: h of each layer.
        single: whether a state is handed to a layer as a tensor rather than as a tuple.
        inputs: what every layer gets besides the state; tensors in it are cut from the outer graph.
        inputs_to_train: the tensors among `inputs` whose gradients are wanted.
        keep: keep the graph of each layer's last evaluation instead of evaluating it again for derivatives.
    """

    layers: Sequence[nn.Module]
    steps: Sequence[float]
    single: bool
    inputs: tuple[Any, ...]
    inputs_to_train: tuple[Tensor, ...]
    autocast: _Autocast
    keep: bool = False
    graphs: dict[int, tuple[State, Increment]] = field(default_factory=dict)

    def increment(self, n: int, x: State) -> Increment:
        """h·F_n(x), without a graph unless gradients are enabled."""
        with self.autocast.entered():
            f = self.layers[n].residual(x[0] if self.single else x, *self.inputs)  # pyright: ignore[reportCallIssue]
        parts = (f,) if isinstance(f, Tensor) else tuple(f)
        if len(parts) != len(x) or any(a is not None and a.shape != b.shape for a, b in zip(parts, x, strict=False)):
            shapes = [None if part is None else tuple(part.shape) for part in parts]
            raise ValueError(
                f"layer {n} ({type(self.layers[n]).__name__}) maps a state of shapes {[tuple(b.shape) for b in x]} to "
                f"{shapes}; a stack's layers must keep the shape of the state"
            )
        h = self.steps[n]
        return scaled(tuple(None if a is None else a.to(b.dtype) for a, b in zip(parts, x, strict=True)), h)

    def graph(self, n: int, x: State) -> tuple[State, Increment]:
        """Leaves standing for x, and h·F_n of them with its graph; the kept one if there is one."""
        if n in self.graphs:
            return self.graphs[n]
        with torch.enable_grad():
            leaves = tuple(part.detach().requires_grad_() for part in x)
            made = leaves, self.increment(n, leaves)
        if self.keep:
            self.graphs[n] = made
        return made

    def pull_back(self, n: int, x: State, gradient: State, more: Sequence[Tensor] = ()) -> tuple[Increment, Gradients]:
        """h (∂F_n/∂x)ᵀ λ, and h (∂F_n/∂m)ᵀ λ for each further tensor m (parameters, side inputs)."""
        leaves, outputs = self.graph(n, x)
        live = [(f, part) for f, part in zip(outputs, gradient, strict=True) if f is not None and f.requires_grad]
        if not live:
            return (None,) * len(x), (None,) * len(more)
        grads = torch.autograd.grad(
            [f for f, _ in live],
            [*leaves, *more],
            [part.to(f.dtype) for f, part in live],
            retain_graph=self.keep,
            allow_unused=True,
        )
        return grads[: len(x)], grads[len(x) :]


@dataclass(frozen=True)
class _Autocast:
    """The autocast setting of the caller, for evaluations that autograd starts from threads of its own."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, x: State) -> _Autocast:
        device = x[0].device.type
        return cls(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))

    @contextmanager
    def entered(self) -> Iterator[None]:
        if not self.enabled and not torch.is_autocast_enabled(self.device):
            yield
            return
        # A cached low-precision copy of a weight that was made without a graph would cut later gradients.
        with torch.autocast(self.device, dtype=self.dtype, enabled=self.enabled, cache_enabled=False):
            yield


class ForwardChain(Chain):
    """Layers `first` … `first + count − 1` in order."""

    def __init__(self, layers: Layers, first: int, count: int) -> None:
        self.layers, self.first, self.count = layers, first, count
        self.looks_at_every_step = layers.keep

    def increment(self, j: int, u: State) -> Increment:
        self.evaluations += 1
        return self.layers.increment(self.first + j, u)

    def final_increment(self, j: int, u: State) -> Increment | None:
        if not self.layers.keep:
            return None
        self.evaluations += 1
        _, outputs = self.layers.graph(self.first + j, u)
        return tuple(None if part is None else part.detach() for part in outputs)


class AdjointChain(Chain):
    """Layers `first + count − 1` down to `first`, transposed and linearised at stored states.

    The last relaxation also forms the gradients of parameters and side inputs, once a layer.
    """

    looks_at_every_step = True

    def __init__(
        self,
        layers: Layers,
        first: int,
        count: int,
        *,
        states: dict[int, State],
        parameters: dict[int, list[Tensor]],
        sums: GradientSums,
    ) -> None:
        self.layers, self.first, self.count = layers, first, count
        self.states, self.parameters, self.sums = states, parameters, sums

    def increment(self, j: int, u: State) -> Increment:
        self.evaluations += 1
        n = self.first + self.count - 1 - j
        return self.layers.pull_back(n, self.states[n], u)[0]

    def final_increment(self, j: int, u: State) -> Increment:
        self.evaluations += 1
        n = self.first + self.count - 1 - j
        wanted = [*self.parameters.get(n, ()), *self.layers.inputs_to_train]
        increment, gradients = self.layers.pull_back(n, self.states[n], u, wanted)
        self.sums.add(wanted, gradients)
        self.layers.graphs.pop(n, None)
        return increment


class GradientSums:
    """Sums of gradients by tensor, so that a tensor used by several layers gets the sum of its uses."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def add(self, tensors: Sequence[Tensor], gradients: Gradients) -> None:
        """Adds a gradient to each tensor's sum."""
        for tensor, gradient in zip(tensors, gradients, strict=True):
            if gradient is not None:
                before = self._sums.get(id(tensor))
                self._sums[id(tensor)] = gradient if before is None else before + gradient

    def get(self, tensor: Tensor) -> Tensor | None:
        """The sum of a tensor, None if it got none."""
        return self._sums.get(id(tensor))


def make_layers(
    layers: Sequence[nn.Module], steps: Sequence[float], x: Any, inputs: tuple[Any, ...], *, keep: bool = False
) -> Layers:
    """`Layers` for a call with state `x` and side inputs, under the autocast setting of the caller."""
    leaves, structure = tree_flatten(inputs)
    cut = [i.detach().requires_grad_(i.requires_grad) if isinstance(i, Tensor) else i for i in leaves]
    wanted = tuple(i for i in cut if isinstance(i, Tensor) and i.requires_grad)
    single = isinstance(x, Tensor)
    return Layers(layers, steps, single, tree_unflatten(cut, structure), wanted, _Autocast.of(pack(x)), keep)
