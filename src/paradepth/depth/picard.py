"""The Picard executor: all layers on the current guess, then a prefix sum."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from paradepth.depth.bridge import Segment
from paradepth.depth.chain import Chain
from paradepth.depth.iterative import Iterations, IterativeExecutor
from paradepth.depth.state import Increment, State, add, identical, squared_norm, subtract

if TYPE_CHECKING:
    from paradepth.depth.stack import Stack


class Picard(IterativeExecutor):
    """Picard iteration: x_n ← x_0 + Σ_{i<n} h·F_i(x_i) with every F_i on the guess of the last sweep. It is Newton's
    method on the whole trajectory with the identity for each layer's Jacobian.

    A sweep evaluates all layers independently of one another. After k sweeps the first k states are exact, after as
    many sweeps as layers all are; it converges far sooner where h·F changes slowly along the depth.

    Args:
        forward_iterations: sweeps forward, or "serial".
        backward_iterations: sweeps of the adjoint, or "serial".
        chunk: layers that are swept together; the chunks follow one another, each starting from the end of the one
            before. None sweeps all layers together. With a chunk of 1 it is the serial executor.
        initial: first guess: "constant" (every state is the first) or "previous" (the states of the last solve of the
            same stack and shape, else constant).
        tolerance: stop once the change of a sweep, relative to the states, is at most this (of all layers: not with
            `chunk`).
        recompute: evaluate layers again in the backward pass instead of keeping their graphs.
        batched: evaluate the layers of a sweep that are alike at once, by stacked weights (`StackedLayers`): a sweep is
            then one batched step. Takes a second copy of the weights.

    Raises:
        ValueError: values outside the ranges above.

    >>> import torch
    >>> from paradepth.depth import Stack
    >>> from paradepth.nn import EncoderLayer
    >>> stack = Stack([EncoderLayer(16, heads=2, mlp=32) for _ in range(6)], step=1 / 6)
    >>> x = torch.randn(2, 5, 16)
    >>> picard = Picard(forward_iterations=6, backward_iterations=6)
    >>> bool(torch.allclose(stack(x, executor=picard), stack(x), atol=1e-6))
    True
    """

    def __init__(
        self,
        *,
        forward_iterations: Iterations = 4,
        backward_iterations: Iterations = 4,
        chunk: int | None = None,
        initial: Literal["constant", "previous"] = "constant",
        tolerance: float | None = None,
        recompute: bool = True,
        batched: bool = False,
    ) -> None:
        super().__init__(
            forward_iterations=forward_iterations,
            backward_iterations=backward_iterations,
            tolerance=tolerance,
            initial=initial,
            recompute=recompute,
            batched=batched,
        )
        if 0 in (forward_iterations, backward_iterations):
            raise ValueError("Picard takes at least 1 sweep in each direction, or 'serial'")
        if initial not in ("constant", "previous"):
            raise ValueError(f"initial is {initial!r}; it must be 'constant' or 'previous'")
        if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
            raise ValueError(f"chunk is {chunk!r}; it must be a whole number, at least 1, or None")
        if chunk is not None and tolerance is not None:
            raise ValueError("tolerance is of all layers together; it does not go with chunk")
        if chunk is not None and initial == "previous":
            raise ValueError("initial is 'previous', but chunks start from the end of the chunk before them")
        self.chunk = chunk

    last_counts = True

    @property
    def unit(self) -> int:
        return self.chunk or 1

    def check(self, stack: Stack) -> None:
        if self.chunk is not None and stack.part is not None:
            start = stack.between.start
            wrong = [cut for cut in stack.part.bounds[1:-1] if (cut - start) % self.chunk]
            if wrong:
                raise ValueError(
                    f"the stack is cut over processes at layer {wrong[0]}, inside a chunk of {self.chunk} layers; "
                    "shard it for this executor"
                )

    def _begin(
        self, stack: Stack, chain: Chain, segment: Segment, first: State, previous: dict[int, State] | None
    ) -> _Sweeps:
        count = chain.count
        chunk = self.chunk or count
        bounds = [*range(0, count, chunk), count]
        if segment.direction == "backward":
            bounds = [count - bound for bound in reversed(bounds)]
        limit = self.forward_iterations if segment.direction == "forward" else self.backward_iterations
        assert isinstance(limit, int)
        return _Sweeps(chain, segment, first, previous, bounds=bounds, limit=limit)


class _Sweeps:
    """Picard sweeps over this process's share of a chain. The last sweep is the one in which the chain sees each step
    at its final state."""

    def __init__(
        self,
        chain: Chain,
        segment: Segment,
        first: State,
        previous: dict[int, State] | None,
        *,
        bounds: list[int],
        limit: int,
    ) -> None:
        self.chain, self.segment, self.limit = chain, segment, limit
        owned = segment.owned
        self.whole = len(bounds) == 2
        self.bounds = sorted({owned.start, owned.stop} | {bound for bound in bounds if bound in owned})
        self.residuals: list[Tensor] = []
        self.size: Tensor | None = None
        self.increments: dict[int, tuple[State, Increment]] = {}  # step → input and increment
        self.sources: dict[int, tuple[State, Increment]] = {}  # step → what the state after it was added up from
        self.states: dict[int, State] = {owned.start: first}
        if not self.whole:
            return
        if previous is not None:
            self.states = {**previous, **({owned.start: first} if segment.upstream is None else {})}
        else:
            start = self._arrive()
            self._leave(start)
            self.states = dict.fromkeys(range(owned.start, owned.stop + 1), start)

    def _arrive(self) -> State:
        """The state before the first owned step: the neighbour's, or the chain's own beginning."""
        segment, before = self.segment, self.states[self.segment.owned.start]
        if segment.upstream is None:
            return before
        state = segment.channel.receive(before, source=segment.upstream)
        return before if identical(state, before) else state

    def _leave(self, state: State) -> None:
        if self.segment.downstream is not None:
            self.segment.channel.send(state, to=self.segment.downstream)

    def _sweep(self, steps: range, *, final: bool, arriving: bool) -> None:
        """Increments at the present states, then their prefix sums. What did not change keeps its object, so what
        follows from it is not computed again."""
        chain, here = self.chain, [(j, self.states[j]) for j in steps]
        if final and chain.looks_at_every_step:
            found = chain.final_increments(here)
        else:
            here = [(j, u) for j, u in here if j not in self.increments or self.increments[j][0] is not u]
            found = chain.increments(here)
        for (j, u), increment in zip(here, found, strict=True):
            self.increments[j] = u, increment
        if arriving:
            self.states[steps.start] = self._arrive()
        for j in steps:
            u, increment = self.states[j], self.increments[j][1]
            source = self.sources.get(j)
            if source is None or source[0] is not u or source[1] is not increment:
                self.sources[j] = u, increment
                self.states[j + 1] = add(u, increment)

    def iterate(self) -> None:
        if self.whole:
            self._whole_sweep(final=False)

    def _whole_sweep(self, *, final: bool) -> dict[int, State]:
        owned, before = self.segment.owned, dict(self.states)
        self._sweep(owned, final=final, arriving=True)
        self._leave(self.states[owned.stop])
        moved = [squared_norm(subtract(self.states[n], before[n])) for n in before]
        self.residuals.append(torch.stack(moved).sum())
        self.size = torch.stack([squared_norm(self.states[n]) for n in before]).sum()
        return {**before, owned.stop: self.states[owned.stop]}

    def finish(self, *, measure: bool) -> dict[int, State]:
        """The last sweep. The states returned are those that its increments belong to, and the end of the chain."""
        owned = self.segment.owned
        if self.whole:
            return self._whole_sweep(final=True)
        self.states[owned.start] = self._arrive()
        used: dict[int, State] = {}
        for start, stop in pairwise(self.bounds):
            steps = range(start, stop)
            self.states |= dict.fromkeys(range(start + 1, stop + 1), self.states[start])
            for _ in range(self.limit - 1):
                self._sweep(steps, final=False, arriving=False)
            used |= {j: self.states[j] for j in steps}
            self._sweep(steps, final=True, arriving=False)
        self._leave(self.states[owned.stop])
        return {**used, owned.stop: self.states[owned.stop]}

    def c_points(self) -> dict[int, State]:
        return dict(self.states)
