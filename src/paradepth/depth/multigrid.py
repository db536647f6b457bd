"""Multigrid-reduction-in-time on a chain of steps.

    level 0   C f f f C f f f C f f f C      steps of one layer; C-points every c-th state
               \\_____/ \\_____/ \\_____/       F-relaxation: all intervals at once
    level 1   C - - - C - - - C - - - C      steps Ψ of an interval, corrected so that they meet level 0 (FAS)

One iteration: F- (or FCF-)relaxation, residual at the C-points, coarse solve
u_{k+1} = Ψ(u_k) + [Φᶜ(x_k) − Ψ(x_k)], C-points := u. Two levels with F-relaxation are parareal.
Source: Layer-Parallel Training for Transformers (arXiv 2601.09026); names after the multigrid literature.

Each process owns whole intervals of the coarsest relaxed level, so a state goes from neighbour to neighbour once a
C-relaxation and once a coarse solve. A state that did not change since the last visit is the same Python object, and
what was computed from it is taken from memory: parts of the solution that are already exact cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from paradepth.depth.chain import Chain
from paradepth.depth.channel import Channel
from paradepth.depth.coarse import CoarseOperator
from paradepth.depth.state import Increment, State, add, identical, squared_norm, subtract, total

Relaxation = Literal["F", "FCF"]
Cycle = Literal["V", "F"]
FirstGuess = Literal["coarse", "previous", "constant"]


def intervals_of(count: int, coarsening: Sequence[int]) -> list[list[int]]:
    """Bounds of the intervals of each relaxed level: entry l holds the C-points of level l and its last point.

    >>> intervals_of(10, (4, 2))
    [[0, 4, 8, 10], [0, 2, 3]]
    """
    bounds = []
    for c in coarsening:
        bounds.append([*range(0, count, c), count])
        count = len(bounds[-1]) - 1
    return bounds


def mirrored(bounds: list[list[int]]) -> list[list[int]]:
    """The same intervals for the chain that runs the other way."""
    return [[level[-1] - bound for bound in reversed(level)] for level in bounds]


@dataclass
class _Level:
    """This process's share of one level: steps first … last − 1 and the states at first … last."""

    first: int
    last: int
    bounds: list[int] = field(default_factory=list)  # of the owned intervals; empty on the coarsest level
    states: dict[int, State] = field(default_factory=dict)
    ends: dict[int, State] = field(default_factory=dict)  # what an interval's relaxation reached, by its end
    base: dict[int, State] = field(default_factory=dict)  # FAS: the states this level was started from …
    target: dict[int, State] = field(default_factory=dict)  # … and where the finer level goes from them
    tau: dict[int, Increment] = field(default_factory=dict)  # FAS: target − Ψ(base)
    memory: dict[int, tuple[State, Increment]] = field(default_factory=dict)  # step → input and increment
    sources: dict[int, State] = field(default_factory=dict)  # step → the input of its result in states or ends


class Multigrid:
    """Solves a chain for this process's share of its states.

    Args:
        chain: the finest problem.
        bounds: intervals of each relaxed level (`intervals_of`).
        owned: steps of the finest level that this process owns.
        coarse: coarse operator of each coarse level.
        relaxation: of each relaxed level.
        cycle: "V" or "F".
        channel: the processes along the chain.
        upstream, downstream: ranks of the neighbours, None at the ends.
    """

    def __init__(
        self,
        chain: Chain,
        *,
        bounds: list[list[int]],
        owned: range,
        coarse: Sequence[CoarseOperator],
        relaxation: Sequence[Relaxation],
        cycle: Cycle,
        channel: Channel,
        upstream: int | None,
        downstream: int | None,
    ) -> None:
        self.chain, self.coarse, self.relaxation = chain, coarse, relaxation
        self.cycle: Cycle = cycle
        self.channel, self.upstream, self.downstream = channel, upstream, downstream
        self.levels: list[_Level] = []
        first, last = owned.start, owned.stop
        for level in bounds:
            assert {first, last} <= set(level), "a process owns whole intervals"
            own = [bound for bound in level if first <= bound <= last]
            self.levels.append(_Level(first, last, own))
            first, last = level.index(first), level.index(last)
        self.levels.append(_Level(first, last))
        self.bounds = bounds
        self.residuals: list[Tensor] = []  # squared norms at this process's C-points, before each correction
        self.size: Tensor | None = None  # squared norm of its C-points

    # ---- the steps of a level ----------------------------------------------------------------------------------

    def _increment(self, at: int, j: int, u: State) -> Increment:
        """Δ_j(u) on level `at`; what was computed last for the same u is remembered where it is asked for again."""
        level = self.levels[at]
        known = level.memory.get(j)
        if known is not None and known[0] is u:
            return known[1]
        if at == 0:
            increment = self.chain.increment(j, u)
        else:
            interval = range(self.bounds[at - 1][j], self.bounds[at - 1][j + 1])
            increment = self.coarse[at - 1].increment([partial(self._increment, at - 1, i) for i in interval], u)
        if at > 0 or j in level.bounds:  # relaxation and coarse solve meet at C-points
            level.memory[j] = u, increment
        return increment

    def _advance(self, at: int, j: int, u: State) -> State:
        """u_{j+1} from u_j on level `at`, with the correction that FAS adds."""
        level = self.levels[at]
        base = level.base.get(j)
        if base is None:
            return add(u, self._increment(at, j, u))
        if u is base:
            return level.target[j]
        return add(u, total([self._increment(at, j, u), level.tau[j]]))

    # ---- relaxation ------------------------------------------------------------------------------------------------

    def f_relax(self, at: int) -> None:
        """From every C-point through its interval. The last interval comes first: its end is what the neighbour
        waits for."""
        level = self.levels[at]
        for start, end in reversed(list(pairwise(level.bounds))):
            u = level.states[start]
            for j in range(start, end):
                after = self._stepped(at, j, u)
                if j + 1 < end:
                    level.states[j + 1] = after
                u = after
            level.ends[end] = u

    def _stepped(self, at: int, j: int, u: State) -> State:
        # The same state gives the same object again, so that what follows from it is remembered, too.
        level = self.levels[at]
        plain = level.base.get(j) is None
        if plain and level.sources.get(j) is u:
            return level.ends[j + 1] if j + 1 in level.bounds else level.states[j + 1]
        if plain:
            level.sources[j] = u
        return self._advance(at, j, u)

    def c_relax(self, at: int) -> None:
        """C-points from the ends of the intervals before them."""
        level = self.levels[at]
        if self.downstream is not None:
            self.channel.send(level.ends[level.last], to=self.downstream)
        for bound in level.bounds[1:]:
            level.states[bound] = level.ends[bound]
        if self.upstream is not None:
            self._take(level, level.first, self.channel.receive(level.states[level.first], source=self.upstream))

    def relax(self, at: int) -> None:
        """The level's relaxation."""
        self.f_relax(at)
        if self.relaxation[at] == "FCF":
            self.c_relax(at)
            self.f_relax(at)

    @staticmethod
    def _take(level: _Level, point: int, state: State) -> State:
        before = level.states.get(point)
        if not identical(state, before):
            level.states[point] = before = state
        assert before is not None
        return before

    # ---- coarse solve ----------------------------------------------------------------------------------------------

    def _sweep(self, at: int) -> None:
        """The coarsest level, one step after another and one process after another."""
        level = self.levels[at]
        if self.upstream is not None:
            u = self._take(level, level.first, self.channel.receive(self._like(), source=self.upstream))
        else:
            u = level.states[level.first]
        for j in range(level.first, level.last):
            u = self._advance(at, j, u)
            level.states[j + 1] = u
        if self.downstream is not None:
            self.channel.send(u, to=self.downstream)

    def _like(self) -> State:
        return next(iter(self.levels[0].states.values()))

    def _restrict(self, at: int) -> None:
        """Starts the level below `at` from its C-points, with the correction that makes the two agree."""
        fine, level = self.levels[at], self.levels[at + 1]
        level.states = {level.first + i: fine.states[bound] for i, bound in enumerate(fine.bounds)}
        for i, (start, end) in enumerate(pairwise(fine.bounds)):
            j = level.first + i
            base, target = fine.states[start], fine.ends[end]
            if level.base.get(j) is base and level.target.get(j) is target:
                continue
            level.base[j], level.target[j] = base, target
            if j > 0:  # the first C-point of the chain never changes, so its correction is not asked for
                level.tau[j] = subtract(subtract(target, base), _dense(self._increment(at + 1, j, base), base))

    def _correct(self, at: int) -> None:
        """C-points of level `at` from the level below."""
        fine, level = self.levels[at], self.levels[at + 1]
        for i, bound in enumerate(fine.bounds):
            fine.states[bound] = level.states[level.first + i]

    def visit(self, at: int, cycle: Cycle) -> None:
        """One V- or F-cycle from level l."""
        if at == len(self.levels) - 1:
            self._sweep(at)
            return
        self.relax(at)
        if at == 0:
            self._note_residual()
        self._restrict(at)
        self.visit(at + 1, cycle)
        if cycle == "F" and at + 2 < len(self.levels):
            self.visit(at + 1, "V")
        self._correct(at)
        if at > 0:
            self.f_relax(at)

    # ---- solving ---------------------------------------------------------------------------------------------------

    def guess(self, first: State, how: FirstGuess, previous: dict[int, State] | None) -> None:
        """Sets the C-points of the finest level.

        Args:
            first: u_0; where this process is not the first, a state of the same shapes.
            how: "coarse" solves the coarse levels, "constant" copies u_0, "previous" takes `previous`.
            previous: C-points of an earlier solve, or None: then "previous" is "coarse".
        """
        level = self.levels[0]
        level.states[level.first] = first
        if how == "previous" and previous is not None:
            level.states.update(previous)
            if self.upstream is None:
                level.states[level.first] = first
        elif how == "constant":
            if self.upstream is not None:
                first = self.channel.receive(first, source=self.upstream)
            if self.downstream is not None:
                self.channel.send(first, to=self.downstream)
            level.states.update(dict.fromkeys(level.bounds, first))
        else:
            self._coarse_guess(0)

    def _coarse_guess(self, at: int) -> None:
        fine, level = self.levels[at], self.levels[at + 1]
        level.states[level.first] = fine.states[fine.first]
        if at + 2 == len(self.levels):
            self._sweep(at + 1)
        else:
            self._coarse_guess(at + 1)
            self.f_relax(at + 1)
        self._correct(at)

    def iterate(self) -> None:
        """One iteration."""
        self.visit(0, self.cycle)

    def finish(self, *, measure: bool) -> dict[int, State]:
        """The last F-relaxation, in which the chain sees each owned step once at its final state.

        Args:
            measure: evaluate the last step of each interval even if nobody else asks for it, and note the residual.

        Returns:
            The states at the owned points; the end of the chain among them on the process that owns it.
        """
        level = self.levels[0]
        complete = measure or self.chain.looks_at_every_step
        for start, end in reversed(list(pairwise(level.bounds))):
            u = level.states[start]
            for j in range(start, end):
                increment = self.chain.final_increment(j, u)
                at_end = j + 1 == end
                if increment is not None:
                    after = add(u, increment)
                elif at_end and not complete and end != self.bounds[0][-1]:
                    break
                else:
                    after = self._stepped(0, j, u)
                if at_end:
                    level.ends[end] = after
                else:
                    level.states[j + 1] = after
                u = after
        if complete:
            self._note_residual()
        if level.last == self.bounds[0][-1]:
            level.states[level.last] = level.ends[level.last]
        return level.states

    def c_points(self) -> dict[int, State]:
        """The C-points of the finest level, to start a later solve from."""
        level = self.levels[0]
        return {bound: level.states[bound] for bound in level.bounds if bound in level.states}

    def _note_residual(self) -> None:
        level = self.levels[0]
        last = self.bounds[0][-1]
        inner = [bound for bound in level.bounds[1:] if bound in level.states and (bound != last)]
        zero = torch.zeros((), dtype=torch.float64, device=self._like()[0].device)
        differences = [squared_norm(subtract(level.ends[b], level.states[b])) for b in inner]
        self.residuals.append(sum(differences, zero))
        self.size = sum((squared_norm(level.states[b]) for b in inner), zero)


def _dense(increment: Increment, like: State) -> State:
    return tuple(torch.zeros_like(u) if part is None else part for part, u in zip(increment, like, strict=True))
