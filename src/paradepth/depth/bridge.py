"""Between autograd and the iterative executors: one autograd node for a whole stack.

Forward solves the chain of layers and stores the states at this process's layers. Backward solves the adjoint chain,
linearised at those states, with the same algorithm in reverse, and forms parameter gradients once, in its last
relaxation. Layers are evaluated again for their derivatives unless their graphs were kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from paradepth.depth.batching import Batching, batch_layers
from paradepth.depth.chain import AdjointChain, Chain, ForwardChain, GradientSums, Layers, make_layers
from paradepth.depth.channel import Alone, Channel, Part
from paradepth.depth.state import State, add, detached, pack, unpack
from paradepth.nn import dropout_keys

if TYPE_CHECKING:
    from paradepth.depth.stack import Stack

Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class Segment:
    """This process's share of a chain.

    Attributes:
        direction: "forward", or "backward" for the adjoint.
        owned: steps of the chain that this process owns.
        channel: the processes along the chain.
        upstream, downstream: ranks that own the steps before and after, None at the ends.
    """

    direction: Direction
    owned: range
    channel: Channel
    upstream: int | None
    downstream: int | None


Solve = Callable[[Chain, Segment, State], dict[int, State]]
"""Solves a chain from the state before its first step (on other processes: any state of its shape): the states at the
owned steps, and the end of the chain on the process that owns it."""


def sweep(chain: Chain, segment: Segment, first: State) -> dict[int, State]:
    """A `Solve` that takes one step after another: exact, and no two processes work at a time."""
    u = first if segment.upstream is None else segment.channel.receive(first, source=segment.upstream)
    states = {segment.owned.start: u}
    for j in segment.owned:
        u = _last_step(chain, j, u)
        states[j + 1] = u
    if segment.downstream is not None:
        segment.channel.send(u, to=segment.downstream)
    return states


@dataclass
class _Plan:
    """All that forward hands to backward, tensors of the outer graph excepted."""

    stack: Stack
    solve: Solve
    layers: Layers
    part: Part
    parameters: dict[int, list[Tensor]]
    states: dict[int, State] = field(default_factory=dict)

    def dropout_keys(self) -> list[Tensor]:
        """Keys of the dropout masks that a recomputation will need again."""
        if self.layers.keep:
            return []
        return [key for n in self.part.owned for key in dropout_keys(self.stack.layers[n])]

    @property
    def ranges(self) -> tuple[range, range, range]:
        """Owned layers before, between and behind the buffers' edges."""
        owned, between = self.part.owned, self.stack.between
        return (
            range(owned.start, min(owned.stop, between.start)),
            range(max(owned.start, between.start), min(owned.stop, between.stop)),
            range(max(owned.start, between.stop), owned.stop),
        )

    def segment(self, direction: Direction, owned: range, count: int) -> Segment:
        rank, size = self.part.channel.rank, self.part.channel.size
        before = rank - 1 if rank > 0 else None
        after = rank + 1 if rank + 1 < size else None
        if direction == "backward":
            owned = range(count - owned.stop, count - owned.start)
            before, after = after, before
        return Segment(direction, owned, self.part.channel, before, after)

    def forward(self, x: State) -> State:
        opening, middle, closing = self.ranges
        between, channel = self.stack.between, self.part.channel
        u = x
        for n in opening:
            self.states[n] = u
            u = _last_step(ForwardChain(self.layers, n, 1), 0, u)
        chain = ForwardChain(self.layers, between.start, len(between))
        shifted = range(middle.start - between.start, middle.stop - between.start)
        solved = self.solve(chain, self.segment("forward", shifted, chain.count), u)
        self.states |= {between.start + j: state for j, state in solved.items()}
        u = self.states[middle.stop] if channel.rank == channel.size - 1 else x
        for n in closing:
            self.states[n] = u
            u = _last_step(ForwardChain(self.layers, n, 1), 0, u)
        result = channel.broadcast(u, source=channel.size - 1)
        channel.flush()
        self.states = {n: state for n, state in self.states.items() if n in self.part.owned}
        return result

    def backward(self, gradient: State) -> tuple[State, GradientSums]:
        opening, middle, closing = self.ranges
        between, channel = self.stack.between, self.part.channel
        sums = GradientSums()

        def chain_of(first: int, count: int) -> AdjointChain:
            return AdjointChain(self.layers, first, count, states=self.states, parameters=self.parameters, sums=sums)

        u = gradient
        for n in reversed(closing):
            u = _last_step(chain_of(n, 1), 0, u)
        chain = chain_of(between.start, len(between))
        shifted = range(middle.start - between.start, middle.stop - between.start)
        segment = self.segment("backward", shifted, chain.count)
        solved = self.solve(chain, segment, u)
        u = solved[chain.count] if channel.rank == 0 else gradient
        for n in reversed(opening):
            u = _last_step(chain_of(n, 1), 0, u)
        result = channel.broadcast(u, source=0)
        channel.flush()
        return result, sums


def _last_step(chain: Chain, j: int, u: State) -> State:
    """u_{j+1} from u_j, evaluated once and for all."""
    return add(u, chain.final_increments([(j, u)])[0])


class _Solve(torch.autograd.Function):
    """Inputs: plan, number of state tensors, number of side tensors, then state, side tensors and parameters."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, states: int, sides: int, *tensors: Tensor) -> State:
        ctx.plan, ctx.counts = plan, (states, sides, len(tensors))
        # Autograd refuses a backward pass after a change in place of what is saved here.
        ctx.save_for_backward(*tensors, *plan.dropout_keys())
        result = plan.forward(detached(tensors[:states]))
        stored = {id(part) for state in plan.states.values() for part in state}
        # A part that no layer changed is a stored tensor; given out, it would tie the node to itself.
        return tuple(part.clone() if id(part) in stored else part for part in result)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "an iterative executor has no second derivatives (create_graph=True); use Serial for this call"
            )
        plan: _Plan = ctx.plan
        states, sides, count = ctx.counts
        tensors: Sequence[Tensor] = ctx.saved_tensors[:count]
        x = tensors[:states]
        full = tuple(torch.zeros_like(a) if g is None else g.to(a.dtype) for a, g in zip(x, gradients, strict=True))
        result, sums = plan.backward(full)
        channel = plan.part.channel
        side_gradients: list[Tensor | None] = [None] * sides
        trained = iter(plan.layers.inputs_to_train)
        for index, side in enumerate(tensors[states : states + sides]):
            if side.requires_grad:
                mine = sums.get(next(trained))
                if channel.size > 1:
                    mine = channel.sum(torch.zeros_like(side) if mine is None else mine)
                side_gradients[index] = mine
        own = [sums.get(parameter) for parameter in tensors[states + sides :]]
        return (None, None, None, *result, *side_gradients, *own)


def run_with_autograd(
    solve: Solve, stack: Stack, x: Any, inputs: tuple[Any, ...], *, keep: bool, batching: Batching | None = None
) -> Any:
    """Evaluates `stack` by `solve`, differentiably.

    Args:
        solve: the algorithm.
        stack: the layers.
        x: state before the first layer; the same on every process of the row.
        inputs: what every layer gets besides the state; tensors may lie in tuples, lists and dictionaries.
        keep: keep graphs for the backward pass instead of evaluating layers again.
        batching: evaluate layers that are alike at once, with what the executor keeps for it.
    """
    state = pack(x)
    part = stack.part or Part((0, stack.depth), Alone())
    with_gradients = torch.is_grad_enabled()
    layers = make_layers(
        list(stack.layers), [stack.step_of(n) for n in range(stack.depth)], x, inputs, keep=keep and with_gradients
    )
    parameters: dict[int, list[Tensor]] = {
        n: [p for p in stack.layers[n].parameters() if p.requires_grad] for n in part.owned
    }
    plan = _Plan(stack, solve, layers, part, parameters)
    if batching is not None:
        plan.layers = batch_layers(layers, batching, plan.ranges[1], state)
    if not with_gradients:
        return unpack(plan.forward(detached(state)), like=x)
    sides = [i for i in tree_leaves(inputs) if isinstance(i, Tensor)]
    unique = list({id(p): p for own in parameters.values() for p in own}.values())
    result = _Solve.apply(plan, len(state), len(sides), *state, *sides, *unique)
    return unpack(result, like=x)
