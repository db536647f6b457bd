"""What an iterative executor reports of its last solve."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class SolveReport:
    """One direction of one solve, summed over the processes of the row.

    Attributes:
        iterations: iterations done; None for a serial solve.
        residuals: ‖r‖ / ‖u‖ at the C-points before each iteration and, where it was measured, after the last.
        evaluations: layer evaluations between the buffers; backward, one is a product with a layer's transpose.
        sequential: evaluations that a process took one after another, those of a batch counting as one; of the process
            that took most.
    """

    iterations: int | None = None
    residuals: list[float] = field(default_factory=list)
    evaluations: int = 0
    sequential: int = 0

    @property
    def rho(self) -> float | None:
        """Convergence factor ρ = ‖r⁽ᵏ⁺¹⁾‖ / ‖r⁽ᵏ⁾‖ of the last two residuals; None with fewer than two.

        Below 1 the iteration converges. An exact solution has ρ = 0.

        >>> SolveReport(2, [1.0, 0.5, 0.05]).rho
        0.1
        """
        if len(self.residuals) < 2:
            return None
        before, after = self.residuals[-2:]
        if not math.isfinite(after) or not math.isfinite(before):
            return math.inf
        return after / before if before > 0 else 0.0


@dataclass
class Report:
    """The last solve in each direction."""

    forward: SolveReport = field(default_factory=SolveReport)
    backward: SolveReport = field(default_factory=SolveReport)
