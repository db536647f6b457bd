"""What the iterative executors share: options of the two directions, counts, reports and first guesses."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Literal, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from paradepth.depth.batching import Batching
from paradepth.depth.bridge import Direction, Segment, run_with_autograd, sweep
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
        measure: also measure the residual after the last iteration, at the cost of one layer an interval.
    """

    on_several_processes = True
    last_counts = False  # whether `finish` is one of the iterations

    def __init__(
        self,
        *,
        forward_iterations: Iterations,
        backward_iterations: Iterations,
        tolerance: float | None,
        initial: str,
        recompute: bool,
        batched: bool,
    ) -> None:
        for name, value in (("forward_iterations", forward_iterations), ("backward_iterations", backward_iterations)):
            if value != "serial" and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise ValueError(f"{name} is {value!r}; it must be a whole number, at least 0, or 'serial'")
        if tolerance is not None and not (isinstance(tolerance, float | int) and tolerance > 0):
            raise ValueError(f"tolerance is {tolerance!r}; it must be positive, or None for a fixed count")
        self.forward_iterations, self.backward_iterations = forward_iterations, backward_iterations
        if not isinstance(batched, bool):
            raise ValueError(f"batched is {batched!r}; it must be True or False")
        self.tolerance, self.initial, self.recompute, self.batched = tolerance, initial, recompute, batched
        self.measure = False
        self._report, self._late = Report(), {}
        self._batching = Batching()
        self._previous: WeakKeyDictionary[Stack, dict[Any, dict[int, State]]] = WeakKeyDictionary()

    @abstractmethod
    def _begin(self, stack: Stack, chain: Chain, segment: Segment, first: State, previous: Any) -> Iteration:
        """The algorithm on a chain, with its first guess made."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_previous"}  # a copy starts afresh

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _previous=WeakKeyDictionary())

    @property
    def report(self) -> Report:
        """Residuals, ρ and layer evaluations of the last solve in each direction. Asking for it waits for the device;
        the solve itself does not."""
        late: dict[Direction, Tensor] = self._late
        for direction, norms in late.items():
            getattr(self._report, direction).residuals = _relative(norms)
        late.clear()
        return self._report

    @property
    def alone(self) -> dict[int, str]:
        """With `batched`: of the last call, the layers between the buffers that were evaluated by themselves, and
        why."""
        return self._batching.alone

    def forget(self) -> None:
        """Forgets the states that `initial="previous"` would start from, and the stacked weights of `batched`."""
        self._previous.clear()
        self._batching.stacked.forget()

    def run(self, stack: Stack, x: Any, *inputs: Any) -> Any:
        self.check(stack)

        def solve(chain: Chain, segment: Segment, first: State) -> dict[int, State]:
            return self._solve(stack, chain, segment, first)

        keep = not self.recompute
        if self.batched and (self.forward_iterations == "serial") != (self.backward_iterations == "serial"):
            keep = False  # graphs of single layers are of no use for several at once, nor the other way round
        batching = self._batching if self.batched else None
        return run_with_autograd(solve, stack, x, inputs, keep=keep, batching=batching)

    def _solve(self, stack: Stack, chain: Chain, segment: Segment, first: State) -> dict[int, State]:
        forward = segment.direction == "forward"
        limit = self.forward_iterations if forward else self.backward_iterations
        if not isinstance(limit, int):
            states = sweep(chain, segment, first)
            self._note(segment, SolveReport(None, [], chain.evaluations, chain.sequential), None, first)
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
            if self.tolerance is not None and _relative(_norms(segment, iteration))[-1] <= self.tolerance:
                break
        states = iteration.finish(measure=self.measure)
        if self.initial == "previous" and not torch.is_inference_mode_enabled():
            self._previous.setdefault(stack, {})[key] = iteration.c_points()
        report = SolveReport(count + self.last_counts, [], chain.evaluations, chain.sequential)
        self._note(segment, report, _norms(segment, iteration), first)
        return states

    def _note(self, segment: Segment, report: SolveReport, norms: Tensor | None, like: State) -> None:
        if segment.channel.size > 1:
            counts = torch.tensor([report.evaluations, report.sequential], dtype=torch.int64, device=like[0].device)
            every = segment.channel.gather(counts)
            report.evaluations, report.sequential = int(every[:, 0].sum()), int(every[:, 1].max())
        setattr(self._report, segment.direction, report)
        self._late.pop(segment.direction, None)
        if norms is not None:
            self._late[segment.direction] = norms


def _shapes(state: State) -> list[tuple[torch.Size, torch.dtype, torch.device]]:
    return [(part.shape, part.dtype, part.device) for part in state]


def _norms(segment: Segment, iteration: Iteration) -> Tensor | None:
    """‖u‖ and ‖r‖ of each residual noted so far, over all processes."""
    if not iteration.residuals:
        return None
    assert iteration.size is not None
    return segment.channel.sum(torch.stack([iteration.size, *iteration.residuals])).sqrt()


def _relative(norms: Tensor | None) -> list[float]:
    """‖r‖ / ‖u‖ of each; ‖u‖ is the latest."""
    if norms is None:
        return []
    size, *residuals = norms.tolist()
    return [value / size if size > 0 else value for value in residuals]
