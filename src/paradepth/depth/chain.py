"""A chain of steps u_{j+1} = u_j + Δ_j(u_j): what the iterative executors solve, forward and backward.

Forward, Δ_j is h·F_j, layer j's increment. Backward, the chain runs from the last layer to the first and
Δ_j(λ) = h (∂F/∂x)ᵀ λ at the layer's stored state: the discrete adjoint λ_n = λ_{n+1} + h (∂F_n/∂x)ᵀ λ_{n+1}.

Source: Layer-Parallel Training for Transformers (arXiv 2601.09026), the ODE form and its adjoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from paradepth.depth.state import Increment, State, pack, scaled

Gradients = tuple[Tensor | None, ...]
Request = tuple[int, State]  # the number of a step or a layer, and the state before it
Pull = tuple[int, State, State]  # the number of a layer, its state, and what is pulled back through it


class Chain(ABC):
    """Steps 0 … count − 1, each evaluable on any state and in any order.

    Attributes:
        count: number of steps.
        evaluations: layer evaluations so far.
        sequential: how many of them were taken one after another, those of a batch counting as one.
        batched: whether asking for several increments at once is better than one after another.
        looks_at_every_step: whether `final_increments` does more than `increments`.
    """

    count: int
    evaluations: int = 0
    sequential: int = 0
    batched: bool = False
    looks_at_every_step: bool = False

    @abstractmethod
    def increment(self, j: int, u: State) -> Increment:
        """Δ_j(u)."""

    def increments(self, requests: Sequence[Request]) -> list[Increment]:
        """Δ_j(u) for each of several pairs (j, u) that do not wait for one another, no j twice."""
        return [self.increment(j, u) for j, u in requests]

    def final_increments(self, requests: Sequence[Request]) -> list[Increment]:
        """The same at the states where the solution was left; asked for once a step and last."""
        return self.increments(requests)


@dataclass
class Layers:
    """Layers with their step sizes and side inputs, and the derivatives of their increments.

    Attributes:
        layers: by index; only the owned ones are called.
        steps: h of each layer.
        single: whether a state is handed to a layer as a tensor rather than as a tuple.
        inputs: what every layer gets besides the state; tensors in it are cut from the outer graph.
        inputs_to_train: the tensors among `inputs` whose gradients are wanted.
        keep: keep the graph of each layer's last evaluation for the derivatives, instead of evaluating it again.
        turns: evaluations so far, those of a batch counting as one.
        batched: whether several are evaluated at once.
    """

    layers: Sequence[nn.Module]
    steps: Sequence[float]
    single: bool
    inputs: tuple[Any, ...]
    inputs_to_train: tuple[Tensor, ...]
    autocast: _Autocast
    keep: bool = False
    graphs: dict[int, tuple[State, Increment]] = field(default_factory=dict)
    turns: int = 0
    batched: ClassVar[bool] = False

    # ---- several layers, each on a state of its own ------------------------------------------------------------

    def increments(self, requests: Sequence[Request]) -> list[Increment]:
        """h·F_n(x) for each pair (n, x)."""
        self.turns += len(requests)
        return [self.increment(n, x) for n, x in requests]

    def kept_increments(self, requests: Sequence[Request]) -> list[Increment]:
        """The same, with the graphs kept."""
        self.turns += len(requests)
        for n, x in requests:
            self.graphs[n] = self.graph(n, x)
        return [tuple(None if f is None else f.detach() for f in self.graphs[n][1]) for n, _ in requests]

    def pull_backs(
        self,
        pulls: Sequence[Pull],
        parameters: Mapping[int, Sequence[Tensor]] | None = None,
        sums: GradientSums | None = None,
    ) -> list[Increment]:
        """h (∂F_n/∂x)ᵀ λ for each (n, x, λ).

        Args:
            pulls: no n twice.
            parameters, sums: where given, the last pull of these layers: the gradients of their parameters and of the
                side inputs go to the sums, and kept graphs are dropped.
        """
        self.turns += len(pulls)
        if parameters is None or sums is None:
            return [self.pull_back(n, x, gradient)[0] for n, x, gradient in pulls]
        increments = []
        for n, x, gradient in pulls:
            wanted = [*parameters.get(n, ()), *self.inputs_to_train]
            increment, gradients = self.pull_back(n, x, gradient, wanted)
            sums.add(wanted, gradients)
            self.graphs.pop(n, None)
            increments.append(increment)
        return increments

    # ---- one layer ---------------------------------------------------------------------------------------------

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
            return leaves, self.increment(n, leaves)

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
            retain_graph=n in self.graphs,
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


class _LayerChain(Chain):
    """Steps that are layers; counts their evaluations."""

    layers: Layers

    def increment(self, j: int, u: State) -> Increment:
        return self.increments([(j, u)])[0]

    @contextmanager
    def _counted(self, requests: Sequence[Request]) -> Iterator[None]:
        before = self.layers.turns
        yield
        self.evaluations += len(requests)
        self.sequential += self.layers.turns - before


class ForwardChain(_LayerChain):
    """Layers `first` … `first + count − 1` in order."""

    def __init__(self, layers: Layers, first: int, count: int) -> None:
        self.layers, self.first, self.count, self.batched = layers, first, count, layers.batched
        self.looks_at_every_step = layers.keep

    def increments(self, requests: Sequence[Request]) -> list[Increment]:
        with self._counted(requests):
            return self.layers.increments([(self.first + j, u) for j, u in requests])

    def final_increments(self, requests: Sequence[Request]) -> list[Increment]:
        if not self.layers.keep:
            return self.increments(requests)
        with self._counted(requests):
            return self.layers.kept_increments([(self.first + j, u) for j, u in requests])


class AdjointChain(_LayerChain):
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
        self.layers, self.first, self.count, self.batched = layers, first, count, layers.batched
        self.states, self.parameters, self.sums = states, parameters, sums

    def increments(self, requests: Sequence[Request]) -> list[Increment]:
        with self._counted(requests):
            return self.layers.pull_backs(self._pulls(requests))

    def final_increments(self, requests: Sequence[Request]) -> list[Increment]:
        with self._counted(requests):
            return self.layers.pull_backs(self._pulls(requests), self.parameters, self.sums)

    def _pulls(self, requests: Sequence[Request]) -> list[Pull]:
        numbers = [self.first + self.count - 1 - j for j, _ in requests]
        return [(n, self.states[n], u) for n, (_, u) in zip(numbers, requests, strict=True)]


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
