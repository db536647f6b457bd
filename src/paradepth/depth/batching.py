"""Layers of a chain evaluated at once where they are alike, forward and transposed.

    one by one   F_1(x_1), F_2(x_2), …, F_m(x_m)                     m evaluations in a row
    batched      [F_1 … F_m] of stacked weights on stacked states    one
    transposed   one graph over the stacked states, pulled back once: all (∂F_i/∂x)ᵀ λ_i, and all parameter gradients

What asks for increments (`Multigrid`, Picard's sweeps) says which do not wait for one another; this file finds the
layers among them that can share an evaluation.

Shapes: m layers, B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from paradepth.depth.chain import GradientSums, Layers, Pull, Request
from paradepth.depth.state import Increment, State, scaled
from paradepth.nn import EncoderLayer, SourceLayer, StackedLayers, TargetLayer
from paradepth.nn.stacked import Weights, pick, signature

Asked = TypeVar("Asked", Request, Pull)


@dataclass
class Batching:
    """What an executor keeps for its batched evaluations.

    Attributes:
        stacked: the stacked copies of weights.
        alone: of the last call, the layers between the buffers that were evaluated by themselves, and why.
    """

    stacked: StackedLayers = field(default_factory=StackedLayers)
    alone: dict[int, str] = field(default_factory=dict)


@dataclass
class _Group:
    """Layers that are alike, in order, and the place of each among them by its number."""

    layers: list[nn.Module]
    places: dict[int, int]
    weights: Weights | None = None  # stacked when they are asked for together for the first time


@dataclass
class BatchedLayers(Layers):
    """`Layers` that evaluates those that are alike at once.

    With `keep` the graphs of the last forward relaxation are kept as they were made, for several layers at once. One
    serves a pull-back of exactly its layers: the relaxations of the adjoint do that, its last one included. Coarse
    steps take other layers together; for them the layers are evaluated again.

    Attributes:
        stacked: evaluates them.
        groups: by the number of a layer, those that are alike; a layer without an entry is evaluated by itself.
        group_graphs: kept graphs, by the numbers of their layers: leaves standing for the states, and increments.
    """

    stacked: StackedLayers = field(default_factory=StackedLayers)
    groups: dict[int, _Group] = field(default_factory=dict)
    group_graphs: dict[tuple[int, ...], tuple[list[Tensor | None], Increment]] = field(default_factory=dict)
    batched: ClassVar[bool] = True

    def increments(self, requests: Sequence[Request]) -> list[Increment]:
        return self._by_group(requests, super().increments, self._increments_at_once)

    def kept_increments(self, requests: Sequence[Request]) -> list[Increment]:
        return self._by_group(requests, super().kept_increments, self._kept_at_once)

    def pull_backs(
        self,
        pulls: Sequence[Pull],
        parameters: Mapping[int, Sequence[Tensor]] | None = None,
        sums: GradientSums | None = None,
    ) -> list[Increment]:
        one_by_one = super().pull_backs
        return self._by_group(
            pulls,
            lambda some: one_by_one(some, parameters, sums),
            lambda some: self._pulled_at_once(some, parameters, sums),
        )

    def _by_group(
        self,
        asked: Sequence[Asked],
        one_by_one: Callable[[Sequence[Asked]], list[Increment]],
        at_once: Callable[[Sequence[Asked]], list[Increment]],
    ) -> list[Increment]:
        """The answers in the order of what was asked for; layers of a group in the order of their numbers."""
        together: dict[Hashable, list[Asked]] = {}
        for one in sorted(asked, key=lambda one: one[0]):
            group = self.groups.get(one[0])
            together.setdefault(one[0] if group is None else ("group", id(group)), []).append(one)
        found: dict[int, Increment] = {}
        for some in together.values():
            answers = at_once(some) if len(some) > 1 else one_by_one(some)
            found.update((one[0], answer) for one, answer in zip(some, answers, strict=True))
        return [found[one[0]] for one in asked]

    # ---- one evaluation for several layers -----------------------------------------------------------------------

    def _increments_at_once(self, requests: Sequence[Request]) -> list[Increment]:
        numbers, states = [n for n, _ in requests], [x for _, x in requests]
        moving = self._read(numbers)
        parts = [
            _one_or_stacked([x[p] for x in states]) if p in moving else states[0][p] for p in range(len(states[0]))
        ]
        return _apart(self._evaluate(numbers, parts, learn=False), len(requests))

    def _kept_at_once(self, requests: Sequence[Request]) -> list[Increment]:
        numbers = [n for n, _ in requests]
        leaves, outputs = self._graph_of(numbers, [x for _, x in requests], learn=True)
        self.group_graphs[tuple(numbers)] = leaves, outputs
        return _apart(tuple(None if part is None else part.detach() for part in outputs), len(requests))

    def _pulled_at_once(
        self, pulls: Sequence[Pull], parameters: Mapping[int, Sequence[Tensor]] | None, sums: GradientSums | None
    ) -> list[Increment]:
        numbers = [n for n, _, _ in pulls]
        wanted: list[Tensor] = []
        if parameters is not None:
            own = [p for n in numbers for p in parameters.get(n, ())]
            wanted = [*{id(p): p for p in own}.values(), *self.inputs_to_train]  # shared ones get their sum at once
        kept = self.group_graphs.get(tuple(numbers))
        leaves, outputs = kept or self._graph_of(numbers, [x for _, x, _ in pulls], learn=bool(wanted))
        if kept is not None:
            self.turns += 1
        live = [(p, f) for p, f in enumerate(outputs) if f is not None and f.requires_grad]
        inputs = [leaf for leaf in leaves if leaf is not None]
        gradients = torch.autograd.grad(
            [f for _, f in live],
            [*inputs, *wanted],
            [torch.stack([gradient[p] for _, _, gradient in pulls]).to(f.dtype) for p, f in live],
            retain_graph=kept is not None,
            allow_unused=True,
        )
        if sums is not None:
            sums.add(wanted, gradients[len(inputs) :])
            self.group_graphs.pop(tuple(numbers), None)
        pulled = iter(gradients)
        return _apart(tuple(None if leaf is None else next(pulled) for leaf in leaves), len(pulls))

    def _graph_of(
        self, numbers: Sequence[int], states: Sequence[State], *, learn: bool
    ) -> tuple[list[Tensor | None], Increment]:
        """Leaves (m, …) standing for the parts of the states that the layers read, and the increments of them."""
        moving = self._read(numbers)
        with torch.enable_grad():
            leaves: list[Tensor | None] = [None] * len(states[0])
            for p in moving:
                whole = _one_or_stacked([x[p] for x in states])
                leaves[p] = whole.expand(len(states), *states[0][p].shape).detach().requires_grad_()
            parts = [states[0][p] if leaf is None else leaf for p, leaf in enumerate(leaves)]
            return leaves, self._evaluate(numbers, parts, learn=learn)

    def _evaluate(self, numbers: Sequence[int], parts: Sequence[Tensor], *, learn: bool) -> Increment:
        """h·F of each layer, (m, B, T, D), of parts that are of one state for all or (m, …)."""
        self.turns += 1
        with self.autocast.entered():
            f = self.stacked.increments(
                [self.layers[n] for n in numbers],
                parts[0] if self.single else tuple(parts),
                *self.inputs,
                weights=None if learn and self._learn(numbers) else self._weights(numbers),
            )
        f = (f,) if isinstance(f, Tensor) else f
        f = tuple(None if part is None else part.to(x.dtype) for part, x in zip(f, parts, strict=True))
        steps = [self.steps[n] for n in numbers]
        if len(set(steps)) == 1:
            return scaled(f, steps[0])
        h_m = parts[0].new_tensor(steps).view(-1, 1, 1, 1)
        return tuple(None if part is None else part * h_m for part in f)

    def _learn(self, numbers: Sequence[int]) -> bool:
        return any(p.requires_grad for n in numbers for p in self.layers[n].parameters())

    def _weights(self, numbers: Sequence[int]) -> Weights:
        """The stacked weights of some layers of a group, read from those of the whole group."""
        group = self.groups[numbers[0]]
        if group.weights is None:
            group.weights = self.stacked.weights(group.layers)
        return pick(group.weights, [group.places[n] for n in numbers])

    def _read(self, numbers: Sequence[int]) -> Sequence[int]:
        """Parts of the state that these layers read."""
        first = self.layers[numbers[0]]
        return (0, 1) if isinstance(first, TargetLayer) else (0,)


def batch_layers(layers: Layers, batching: Batching, numbers: Sequence[int], state: State) -> BatchedLayers:
    """`layers` with those among `numbers` that are alike evaluated at once.

    Args:
        layers: for one call.
        batching: the executor's.
        numbers: layers that may be asked for together.
        state: of the call.
    """
    alike: dict[Hashable, list[int]] = {}
    batching.alone = {}
    for n in numbers:
        try:
            check_call([layers.layers[n]], state, layers.inputs, single=layers.single)
            alike.setdefault(signature(layers.layers[n]), []).append(n)
        except ValueError as reason:
            batching.alone[n] = str(reason)
    batching.alone |= {some[0]: "no other layer is alike" for some in alike.values() if len(some) == 1}
    groups: dict[int, _Group] = {}
    for some in alike.values():
        if len(some) > 1:
            group = _Group([layers.layers[n] for n in some], {n: place for place, n in enumerate(some)})
            groups |= dict.fromkeys(some, group)
    given = {name: getattr(layers, name) for name in _GIVEN}
    return BatchedLayers(**given, stacked=batching.stacked, groups=groups)


_GIVEN = ("layers", "steps", "single", "inputs", "inputs_to_train", "autocast", "keep")


def check_call(layers: Iterable[nn.Module], state: Sequence[Any], inputs: Sequence[Any], *, single: bool) -> None:
    """Refuses layers, a state or side inputs that `StackedLayers` has no form for; `single` states are tensors.

    Raises:
        ValueError: what it is.
    """
    kinds = (EncoderLayer,) if single else (SourceLayer, TargetLayer)
    if len(state) != len(kinds) or not all(isinstance(part, Tensor) and part.dim() == 3 for part in state):
        raise ValueError("the state is neither (B, T, D) nor a pair of such")
    for layer in layers:
        if not isinstance(layer, kinds):
            raise ValueError(f"a {type(layer).__name__} is not evaluated together with others on such a state")
    if len(inputs) > 1 or not all(value is None or isinstance(value, Tensor) for value in inputs):
        raise ValueError("the layers take something else than a mask besides the state")


def _one_or_stacked(parts: Sequence[Tensor]) -> Tensor:
    """The tensor that all are, or (m, …)."""
    return parts[0] if all(part is parts[0] for part in parts) else torch.stack(list(parts))


def _apart(increment: Increment, count: int) -> list[Increment]:
    """The increments of the single layers."""
    parts = [(None,) * count if part is None else part.unbind() for part in increment]
    return list(zip(*parts, strict=True))
