"""Branches side by side: those that are alike as batched tensors, layer by layer.

           ┌ layer 1 of branches 1 … n ┐   ┌ layer 2 of branches 1 … n ┐
    x ──►  │ one batched evaluation    │ ► │ one batched evaluation    │ ► … ► G_1(x) … G_n(x), or their sum
           └───────────────────────────┘   └───────────────────────────┘

Shapes: n branches, m branches that are alike, B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from paradepth.branches.executor import BranchExecutor, is_traced
from paradepth.branches.graphs import Graphs
from paradepth.depth import Serial, Stack
from paradepth.depth.batching import check_call
from paradepth.depth.state import Increment, State, add, pack, scaled, subtract, total, unpack
from paradepth.nn.stacked import StackedLayers, parameters_of, signature


class Batched(BranchExecutor):
    """Evaluates branches that are alike at once: one batched matrix product in place of n (`StackedLayers`).

    Branches are alike when they have as many layers and the same step sizes, and their layers agree in kind
    (`EncoderLayer`, or `SourceLayer` and `TargetLayer` on a joined state), shapes, dtype, device, dropout and mode.
    Those that learn and those that are frozen are separate groups, since the stacked weights of frozen ones are made
    once. A branch that is like no other is evaluated by itself, as `Loop` does it: nothing has to be alike for the
    result to be right, and `alone` says why.

    Without gradients the weights lie in memory twice, as parameters and stacked.

    Args:
        graphs: record the evaluation without gradients as a CUDA graph, one for each combination of shapes, and
            replay it. Evaluations with gradients, or with branches that are alone, are not recorded.

    Attributes:
        groups: of the last evaluation, the branches that were evaluated together, numbers counted from 0.
        alone: of the last evaluation, the branches that were evaluated by themselves, and why.

    Raises:
        ValueError: `graphs` on a machine without a CUDA device.

    >>> from paradepth.branches import Branches
    >>> from paradepth.nn import EncoderLayer
    >>> trunk = Branches([Stack([EncoderLayer(16, heads=2, mlp=32)]) for _ in range(3)])
    >>> x = torch.randn(2, 5, 16)
    >>> one_by_one, trunk.executor = trunk(x), Batched()
    >>> bool(torch.allclose(trunk(x), one_by_one, atol=1e-5)), trunk.executor.groups, trunk.executor.alone
    (True, ((0, 1, 2),), {})
    """

    def __init__(self, *, graphs: bool = False) -> None:
        if graphs and not torch.cuda.is_available():
            raise ValueError("graphs are recorded on CUDA devices, and this machine has none; use Batched()")
        self.groups: tuple[tuple[int, ...], ...] = ()
        self.alone: dict[int, str] = {}
        self._layers = StackedLayers()
        self._graphs = Graphs() if graphs else None

    def forget(self) -> None:
        """Drops the stacked copies of weights, and recorded graphs."""
        self._layers.forget()
        if self._graphs is not None:
            self._graphs.forget()

    def applies(self, branches: Sequence[Stack], x: Any, *inputs: Any) -> bool:
        groups, alone = _plan(branches, x, inputs)
        return bool(groups) and (self._graphs is None or (not alone and Graphs.fit(branches, x, inputs)))

    def outputs(self, branches: Sequence[Stack], x: Any, *inputs: Any) -> list[Any]:
        return self._call("outputs", self._outputs, branches, x, inputs)

    def corrected(self, branches: Sequence[Stack], x: Any, *inputs: Any) -> Any:
        if len(branches) == 1:
            return self.outputs(branches, x, *inputs)[0]
        return self._call("corrected", self._corrected, branches, x, inputs)

    def _call(self, name: str, evaluate: Callable[..., Any], branches: Sequence[Stack], x: Any, inputs: Any) -> Any:
        groups, self.alone = _plan(branches, x, inputs)
        self.groups = tuple(groups.values())
        if self._graphs is None or self.alone or not Graphs.fit(branches, x, inputs):
            return evaluate(branches, x, inputs)
        parameters = [p for branch in branches for p in branch.parameters()]
        what = (name, tuple(groups.items()))
        run, reads = (lambda *values: evaluate(branches, *values)), self._layers.kept
        return self._graphs.call(what, parameters, run, x, inputs, reads=reads)

    def _outputs(self, branches: Sequence[Stack], x: Any, inputs: tuple[Any, ...]) -> list[Any]:
        found: list[Any] = [branches[i](x, *inputs) if i in self.alone else None for i in range(len(branches))]
        for group in self.groups:
            state = self._states(pack(x), [branches[i] for i in group], like=x, inputs=inputs)
            parts = [part.unbind() if part.dim() > 3 else (part,) * len(group) for part in state]
            for i, own in zip(group, zip(*parts, strict=True), strict=True):
                found[i] = unpack(own, like=x)
        return found

    def _corrected(self, branches: Sequence[Stack], x: Any, inputs: tuple[Any, ...]) -> Any:
        z = pack(x)
        increments: list[Increment] = [subtract(pack(branches[i](x, *inputs)), z) for i in self.alone]
        for group in self.groups:
            stacks = [branches[i] for i in group]
            before = self._states(z, stacks, like=x, inputs=inputs, layers=stacks[0].depth - 1)
            increments.append(tuple((u - a).sum(0) if u.dim() > 3 else None for u, a in zip(before, z, strict=True)))
            last = [stack.layers[-1] for stack in stacks]
            f = self._layers.total(last, unpack(before, like=x), *inputs)
            increments.append(scaled((f,) if isinstance(f, Tensor) else f, stacks[0].step_of(stacks[0].depth - 1)))
        summed = add(z, total(increments))  # of a half-precision state in more digits, until here
        return unpack(tuple(part.to(a.dtype) for part, a in zip(summed, z, strict=True)), like=x)

    def _states(
        self, state: State, stacks: list[Stack], *, like: Any, inputs: tuple[Any, ...], layers: int | None = None
    ) -> State:
        """States after the first `layers` layers (default: all), (m, B, T, D); parts of a joined state that no layer
        advanced stay (B, T, D)."""
        for n in range(stacks[0].depth if layers is None else layers):
            f = self._layers.increments([stack.layers[n] for stack in stacks], unpack(state, like=like), *inputs)
            state = add(state, scaled((f,) if isinstance(f, Tensor) else f, stacks[0].step_of(n)))
        return state


def _plan(
    branches: Sequence[Stack], x: Any, inputs: tuple[Any, ...]
) -> tuple[dict[Hashable, tuple[int, ...]], dict[int, str]]:
    """Which branches are evaluated together, by what they have in common, and which are not and why."""
    if is_traced():
        return {}, dict.fromkeys(range(len(branches)), "the evaluation is traced or transformed")
    found: dict[Hashable, list[int]] = {}
    alone: dict[int, str] = {}
    for i, branch in enumerate(branches):
        try:
            found.setdefault(_kind(branch, x, inputs), []).append(i)
        except ValueError as reason:
            alone[i] = str(reason)
    groups: dict[Hashable, tuple[int, ...]] = {}
    for kind, members in found.items():
        if len(members) > 1:
            groups[kind] = tuple(members)
        else:
            alone[members[0]] = "no other branch is alike"
    return groups, dict(sorted(alone.items()))


def _kind(branch: Stack, x: Any, inputs: tuple[Any, ...]) -> Hashable:
    """Equal for branches that are alike.

    Raises:
        ValueError: a branch that has to be evaluated by itself, and why.
    """
    if type(branch) is not Stack or type(branch.executor) is not Serial or branch.executor.checkpoint or branch.part:
        raise ValueError("the branch has an executor of its own, or is shared between processes")
    if branch._forward_hooks or branch._forward_pre_hooks or branch._backward_hooks or branch._backward_pre_hooks:
        raise ValueError("the branch has hooks, which are called only when it is evaluated by itself")
    single = isinstance(x, Tensor)
    check_call(branch.layers, (x,) if single else x, inputs, single=single)
    learns = torch.is_grad_enabled() and any(p.requires_grad for layer in branch.layers for p in parameters_of(layer))
    steps = tuple(branch.step_of(n) for n in range(branch.depth))
    return learns, steps, tuple(signature(layer) for layer in branch.layers)
