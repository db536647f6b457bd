"""What the iterative executors share: options of the two directions, counts, reports and first guesses."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Literal, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from paradepth.depth.bridge import Segment, run_with_autograd, sweep
from paradepth.depth.chain import Chain
from paradepth.depth.executor import DepthExecutor
from paradepth.depth.results import Report, SolveReport
from paradepth.depth.state import State

if TYPE_CHECKING:
    from paradepth.depth.stack import Stack

Iterations = int | Literal["serial"]


class Iteration(Protocol):
    """An algorithm at work on one chain."""

    residuals: list[Tensor]
    size: Tensor | None

    def iterate(self) -> None: ...

    def finish(self, *, measure: bool) -> dict[int, State]: ...

    def c_points(self) -> dict[int, State]: ...


class IterativeExecutor(DepthExecutor):
    """Solves both directions by iteration, each with its own count; "serial" solves a direction exactly instead.

    Attributes:
        report: residuals, ρ and layer evaluations of the last solve in each direction.
        measure: also measure the residual after the last iteration, at the cost of one layer an interval.
    """

    last_counts = False  # whether `finish` is one of the iterations

    def __init__(
        self,
        *,
        forward_iterations: Iterations,
        backward_iterations: Iterations,
        tolerance: float | None,
        initial: str,
        recompute: bool,
    ) -> None:
        for name, value in (("forward_iterations", forward_iterations), ("backward_iterations", backward_iterations)):
            if value != "serial" and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise ValueError(f"{name} is {value!r}; it must be a whole number, at least 0, or 'serial'")
        if tolerance is not None and not (isinstance(tolerance, float | int) and tolerance > 0):
            raise ValueError(f"tolerance is {tolerance!r}; it must be positive, or None for a fixed count")
        self.forward_iterations, self.backward_iterations = forward_iterations, backward_iterations
        self.tolerance, self.initial, self.recompute = tolerance, initial, recompute
        self.measure = False
        self.report = Report()
        self._previous: WeakKeyDictionary[Stack, dict[Any, dict[int, State]]] = WeakKeyDictionary()

    @abstractmethod
    def _begin(self, stack: Stack, chain: Chain, segment: Segment, first: State, previous: Any) -> Iteration:
        """The algorithm on a chain, with its first guess made."""

    def check(self, stack: Stack) -> None:
        """Refuses a stack that the algorithm cannot solve.

        Raises:
            ValueError: what does not fit.
        """

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_previous"}  # a copy starts afresh

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _previous=WeakKeyDictionary())

    def forget(self) -> None:
        """Forgets the states that `initial="previous"` would start from."""
        self._previous.clear()

    def run(self, stack: Stack, x: Any, *inputs: Any) -> Any:
        self.check(stack)

        def solve(chain: Chain, segment: Segment, first: State) -> dict[int, State]:
            return self._solve(stack, chain, segment, first)

        return run_with_autograd(solve, stack, x, inputs, keep=not self.recompute)

    def _solve(self, stack: Stack, chain: Chain, segment: Segment, first: State) -> dict[int, State]:
        forward = segment.direction == "forward"
        limit = self.forward_iterations if forward else self.backward_iterations
        if not isinstance(limit, int):
            states = sweep(chain, segment, first)
            self._note(segment, SolveReport(None, [], chain.evaluations), first)
            return states
        key = segment.direction, chain.count, segment.owned
        previous = self._previous.get(stack, {}).get(key) if self.initial == "previous" else None
        if previous is not None and _shapes(next(iter(previous.values()))) != _shapes(first):
            previous = None
        iteration = self._begin(stack, chain, segment, first, previous)
        count = 0
        while count < limit - self.last_counts:
            iteration.iterate()
            count += 1
            if self.tolerance is not None and _relative(segment, iteration)[-1] <= self.tolerance:
                break
        states = iteration.finish(measure=self.measure)
        if self.initial == "previous" and not torch.is_inference_mode_enabled():
            self._previous.setdefault(stack, {})[key] = iteration.c_points()
        report = SolveReport(count + self.last_counts, _relative(segment, iteration), chain.evaluations)
        self._note(segment, report, first)
        return states

    def _note(self, segment: Segment, report: SolveReport, like: State) -> None:
        if segment.channel.size > 1:
            count = torch.tensor([float(report.evaluations)], dtype=torch.float64, device=like[0].device)
            report.evaluations = int(segment.channel.sum(count).item())
        setattr(self.report, segment.direction, report)


def _shapes(state: State) -> list[tuple[torch.Size, torch.dtype, torch.device]]:
    return [(part.shape, part.dtype, part.device) for part in state]


def _relative(segment: Segment, iteration: Iteration) -> list[float]:
    """‖r‖ / ‖u‖ of each residual noted so far, over all processes; ‖u‖ is the latest."""
    if not iteration.residuals:
        return []
    assert iteration.size is not None
    values = segment.channel.sum(torch.stack([iteration.size, *iteration.residuals])).sqrt().tolist()
    return [value / values[0] if values[0] > 0 else value for value in values[1:]]
