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

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Literal, TypeVar

import torch
from torch import Tensor

from paradepth.depth.chain import Chain, Request
from paradepth.depth.channel import Channel
from paradepth.depth.coarse import CoarseOperator, coarse_increments
from paradepth.depth.state import Increment, State, add_each, identical, squared_norm, stacked, subtract, total

Relaxation = Literal["F", "FCF"]
Cycle = Literal["V", "F"]
FirstGuess = Literal["coarse", "previous", "constant"]
T = TypeVar("T")


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

    def _increments(self, at: int, requests: Sequence[Request]) -> list[Increment]:
        """Δ_j(u) on level `at` for each (j, u); what was computed last for the same u is remembered where it is asked
        for again."""
        level = self.levels[at]
        known = {j: level.memory[j][1] for j, u in requests if j in level.memory and level.memory[j][0] is u}
        new = [(j, u) for j, u in requests if j not in known]
        if new:
            increments = self.chain.increments(new) if at == 0 else self._coarse_increments(at, new)
            for (j, u), increment in zip(new, increments, strict=True):
                known[j] = increment
                if at > 0 or j in level.bounds:  # relaxation and coarse solve meet at C-points
                    level.memory[j] = u, increment
        return [known[j] for j, _ in requests]

    def _coarse_increments(self, at: int, requests: Sequence[Request]) -> list[Increment]:
        """Coarse steps that do not wait for one another."""

        bounds = self.bounds[at - 1]

        def evaluate(wanted: Sequence[tuple[int, int, State]]) -> list[Increment]:
            return self._increments(at - 1, [(bounds[requests[k][0]] + i, x) for k, i, x in wanted])

        intervals = [(bounds[j + 1] - bounds[j], u) for j, u in requests]
        return coarse_increments(self.coarse[at - 1], intervals, evaluate)

    def _together(self, items: Sequence[T]) -> list[Sequence[T]]:
        """What is taken at once: all, or one after another where all at once would only take memory."""
        return [items] if self.chain.batched and items else [[item] for item in items]

    def _advance(self, at: int, requests: Sequence[Request]) -> list[State]:
        """u_{j+1} from u_j on level `at`, with the correction that FAS adds."""
        level = self.levels[at]
        after = {j: level.target[j] for j, u in requests if level.base.get(j) is u}
        new = [(j, u) for j, u in requests if j not in after]
        increments = self._increments(at, new)
        moves = [
            increment if level.base.get(j) is None else total([increment, level.tau[j]])
            for (j, _), increment in zip(new, increments, strict=True)
        ]
        after |= dict(zip((j for j, _ in new), add_each([u for _, u in new], moves), strict=True))
        return [after[j] for j, _ in requests]

    # ---- relaxation ------------------------------------------------------------------------------------------------

    def f_relax(self, at: int) -> None:
        """From every C-point through its interval, all intervals at once."""
        self._through_intervals(at, partial(self._stepped, at))

    def _through_intervals(
        self, at: int, advance: Callable[[Sequence[Request]], list[State]], skipped: Collection[int] = ()
    ) -> None:
        """Step by step from the C-points: all first steps of the intervals, all second ones, and so on."""
        level = self.levels[at]
        ends = set(level.bounds[1:])
        for here in self._together([(start, level.states[start]) for start in level.bounds[:-1]]):
            while here:
                after = advance(here)
                there = [(j + 1, u) for (j, _), u in zip(here, after, strict=True)]
                level.ends.update((j, u) for j, u in there if j in ends)
                here = [(j, u) for j, u in there if j not in ends]
                level.states.update(here)
                here = [(j, u) for j, u in here if j not in skipped]

    def _stepped(self, at: int, requests: Sequence[Request]) -> list[State]:
        # The same state gives the same object again, so that what follows from it is remembered, too.
        level = self.levels[at]
        after: dict[int, State] = {}
        for j, u in requests:
            if level.base.get(j) is None:
                if level.sources.get(j) is u:
                    after[j] = level.ends[j + 1] if j + 1 in level.bounds else level.states[j + 1]
                level.sources[j] = u
        new = [(j, u) for j, u in requests if j not in after]
        after |= dict(zip((j for j, _ in new), self._advance(at, new), strict=True))
        return [after[j] for j, _ in requests]

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
            u = self._advance(at, [(j, u)])[0]
            level.states[j + 1] = u
        if self.downstream is not None:
            self.channel.send(u, to=self.downstream)

    def _like(self) -> State:
        return next(iter(self.levels[0].states.values()))

    def _restrict(self, at: int) -> None:
        """Starts the level below `at` from its C-points, with the correction that makes the two agree."""
        fine, level = self.levels[at], self.levels[at + 1]
        level.states = {level.first + i: fine.states[bound] for i, bound in enumerate(fine.bounds)}
        moved: list[Request] = []
        for j, (start, end) in enumerate(pairwise(fine.bounds), start=level.first):
            base, target = fine.states[start], fine.ends[end]
            if level.base.get(j) is base and level.target.get(j) is target:
                continue
            level.base[j], level.target[j] = base, target
            if j > 0:  # the first C-point of the chain never changes, so its correction is not asked for
                moved.append((j, base))
        for some in self._together(moved):
            moves = add_each([level.target[j] for j, _ in some], [base for _, base in some], factor=-1.0)
            taus = add_each(moves, self._increments(at + 1, some), factor=-1.0)
            level.tau |= {j: tau for (j, _), tau in zip(some, taus, strict=True)}

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
        level, chain = self.levels[0], self.chain
        complete = measure or chain.looks_at_every_step

        def last(requests: Sequence[Request]) -> list[State]:
            return add_each([u for _, u in requests], chain.final_increments(requests))

        if chain.looks_at_every_step:
            self._through_intervals(0, last)
        else:
            unseen = () if measure else {end - 1 for end in level.bounds[1:] if end != self.bounds[0][-1]}
            self._through_intervals(0, partial(self._stepped, 0), unseen)
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
        residual = size = zero
        for some in self._together(inner):
            ends, states = (stacked([where[b] for b in some]) for where in (level.ends, level.states))
            residual, size = residual + squared_norm(subtract(ends, states)), size + squared_norm(states)
        self.residuals.append(residual)
        self.size = size
