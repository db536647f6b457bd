"""The controller: watches the convergence of an iterative executor over training and moves it between parallel and
serial.

Training stiffens a network, the iteration converges more slowly, and gradients of a fixed small number of iterations
become biased. Every so many batches one batch is solved with twice the iterations; the convergence factor ρ of its
last two residuals says whether the iteration still contracts.

Source: Layer-Parallel Training for Transformers (arXiv 2601.09026), which switches to serial once. Here each
direction has its own state, first tries more iterations, and comes back when a later probe allows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from paradepth.depth.iterative import IterativeExecutor
from paradepth.depth.results import Report, SolveReport

Mode = Literal["parallel", "serial"]


@dataclass
class _State:
    """One direction: what it does, and for how many probes in a row the other thing looked better."""

    iterations: int
    mode: Mode = "parallel"
    bad: int = 0
    good: int = 0


@dataclass(frozen=True)
class Decision:
    """What a probe found and what follows, for one direction.

    Attributes:
        direction: "forward" or "backward".
        rho: convergence factor; None if the direction was not solved by iteration.
        residual: relative residual after the probe's last iteration.
        iterations, mode: from now on.
        change: "" or what changed: "more iterations", "serial", "parallel", "fewer iterations".
    """

    direction: str
    rho: float | None
    residual: float | None
    iterations: int
    mode: Mode
    change: str


class Controller:
    """Decides iterations and mode of each direction of an executor from probes.

    A probe whose ρ is at least `threshold` is bad, one whose ρ is at most `return_below` is good. After `patience`
    bad ones in a row the iterations are doubled; beyond `max_iterations` the direction goes serial. After `patience`
    good ones a serial direction becomes parallel again, with its last number of iterations, and a parallel one halves
    iterations that had been raised. A direction that is serial in the executor's own options is left alone.

    Args:
        executor: an iterative executor; its iteration counts are set by `apply`.
        every: batches between probes.
        threshold: ρ from which iterating does not pay.
        return_below: ρ up to which it does again.
        patience: probes in a row that have to agree.
        max_iterations: most iterations before going serial.
        converged: relative residual below which a solve counts as exact, whatever its ρ: at rounding level ρ is noise.

    Raises:
        ValueError: values that make no sense.

    >>> from paradepth.depth import MGRIT
    >>> controller = Controller(MGRIT(), max_iterations=2, every=100)
    >>> bad = Report(SolveReport(2, [0.1, 0.2, 0.5]), SolveReport(2, [0.1, 0.01, 0.001]))
    >>> [d.change for d in controller.observe(bad)], [d.change for d in controller.observe(bad)]
    (['more iterations', ''], ['serial', ''])
    """

    def __init__(
        self,
        executor: IterativeExecutor,
        *,
        every: int = 500,
        threshold: float = 1.0,
        return_below: float = 0.5,
        patience: int = 1,
        max_iterations: int = 4,
        converged: float = 1e-5,
    ) -> None:
        counts = {"forward": executor.forward_iterations, "backward": executor.backward_iterations}
        largest = max((count for count in counts.values() if isinstance(count, int)), default=0)
        for name, value, good, allowed in (
            ("every", every, every >= 1, "at least 1"),
            ("threshold", threshold, threshold > 0, "positive"),
            ("return_below", return_below, 0 < return_below <= threshold, f"positive and at most {threshold}"),
            ("patience", patience, patience >= 1, "at least 1"),
            ("max_iterations", max_iterations, max_iterations >= largest, f"at least the executor's {largest}"),
            ("converged", converged, converged >= 0, "at least 0"),
        ):
            if not good:
                raise ValueError(f"{name} is {value}; it must be {allowed}")
        if not any(isinstance(count, int) for count in counts.values()):
            raise ValueError("both directions of the executor are serial, so there is nothing to control")
        self.executor, self.every, self.threshold, self.return_below = executor, every, threshold, return_below
        self.patience, self.max_iterations, self.converged = patience, max_iterations, converged
        self._least = {name: count for name, count in counts.items() if isinstance(count, int)}
        self._states = {name: _State(count) for name, count in self._least.items()}

    def due(self, batch: int) -> bool:
        """Whether batch number `batch` (from 0) is to be probed."""
        return batch % self.every == 0

    @property
    def serial(self) -> list[str]:
        """Directions that the controller made serial."""
        return [name for name, state in self._states.items() if state.mode == "serial"]

    def apply(self) -> None:
        """Sets the executor's iterations for ordinary batches."""
        for name, state in self._states.items():
            count = "serial" if state.mode == "serial" else state.iterations
            setattr(self.executor, f"{name}_iterations", count)
        self.executor.measure = False

    def apply_probe(self) -> None:
        """Sets the executor for a probe: twice the iterations, parallel in any case, with all residuals measured."""
        for name, state in self._states.items():
            setattr(self.executor, f"{name}_iterations", max(1, 2 * state.iterations))
        self.executor.measure = True

    def observe(self, report: Report) -> list[Decision]:
        """Takes the executor's report of a probe and decides, one decision for each controlled direction."""
        return [self._decide(name, getattr(report, name)) for name in self._states]

    def _decide(self, name: str, solved: SolveReport) -> Decision:
        state, rho = self._states[name], solved.rho
        residual = solved.residuals[-1] if solved.residuals else None
        exact = residual is not None and residual <= self.converged
        bad = not exact and (rho is None or not rho < self.threshold)
        good = exact or (rho is not None and rho <= self.return_below)
        state.bad = state.bad + 1 if bad else 0
        state.good = state.good + 1 if good else 0
        change = ""
        if state.mode == "parallel" and state.bad >= self.patience:
            if 2 * max(state.iterations, 1) <= self.max_iterations or state.iterations == 0:
                state.iterations, change = max(1, 2 * state.iterations), "more iterations"
            else:
                state.mode, change = "serial", "serial"
        elif state.mode == "serial" and state.good >= self.patience:
            state.mode, change = "parallel", "parallel"
        elif state.mode == "parallel" and state.good >= self.patience and state.iterations > self._least[name]:
            state.iterations, change = max(self._least[name], state.iterations // 2), "fewer iterations"
        if change:
            state.bad = state.good = 0
        return Decision(name, rho, residual, state.iterations, state.mode, change)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to continue the decisions."""
        return {name: vars(state).copy() for name, state in self._states.items()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        for name, values in saved.items():
            if name in self._states:
                self._states[name] = _State(**values)
