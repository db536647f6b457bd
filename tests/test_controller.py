"""The controller's decisions, probe by probe."""

from __future__ import annotations

import math
from typing import Any

import pytest

from paradepth.depth import MGRIT, Controller, Report, SolveReport

RHO = {"good": 0.1, "middling": 0.7, "bad": 1.5}


def probe(forward: str | float, backward: str | float = "good") -> Report:
    def solve(found: str | float) -> SolveReport:
        rho = RHO[found] if isinstance(found, str) else found
        return SolveReport(2, [0.5, 0.1, 0.1 * rho])

    return Report(solve(forward), solve(backward))


def states(controller: Controller) -> list[tuple[int, str]]:
    saved = controller.state_dict()
    return [(saved[name]["iterations"], saved[name]["mode"]) for name in ("forward", "backward")]


def test_more_iterations_then_serial_and_all_the_way_back() -> None:
    mgrit = MGRIT()
    controller = Controller(mgrit, max_iterations=4)
    path = []
    for found in ["good", "bad", "middling", "bad", "bad", "bad", "middling", "good", "good", "good", "good"]:
        controller.observe(probe(found))
        path.append(states(controller)[0])
    assert path == [
        (1, "parallel"),
        (2, "parallel"),
        (2, "parallel"),
        (4, "parallel"),
        (4, "serial"),
        (4, "serial"),
        (4, "serial"),
        (4, "parallel"),
        (2, "parallel"),
        (1, "parallel"),
        (1, "parallel"),
    ]
    assert states(controller)[1] == (1, "parallel")  # the other direction had nothing but good probes


def test_patience_counts_probes_in_a_row() -> None:
    controller = Controller(MGRIT(), patience=2, max_iterations=1)
    for found, mode in [("bad", "parallel"), ("good", "parallel"), ("bad", "parallel"), ("bad", "serial"),
                        ("good", "serial"), ("bad", "serial"), ("good", "serial"), ("good", "parallel")]:  # fmt: skip
        controller.observe(probe(found))
        assert states(controller)[0] == (1, mode)


def test_zero_iterations_become_one() -> None:
    controller = Controller(MGRIT(forward_iterations=0, backward_iterations=0), max_iterations=0)
    controller.observe(probe("bad"))
    assert states(controller)[0] == (1, "parallel")


def test_the_executor_is_set_for_probes_and_for_ordinary_batches() -> None:
    mgrit = MGRIT(forward_iterations=2, backward_iterations=1)
    controller = Controller(mgrit, max_iterations=2)
    controller.apply_probe()
    assert (mgrit.forward_iterations, mgrit.backward_iterations, mgrit.measure) == (4, 2, True)
    controller.observe(probe("bad"))
    controller.apply()
    assert (mgrit.forward_iterations, mgrit.backward_iterations, mgrit.measure) == ("serial", 1, False)
    assert controller.serial == ["forward"]
    controller.apply_probe()
    assert mgrit.forward_iterations == 4


def test_a_direction_that_the_options_make_serial_is_left_alone() -> None:
    mgrit = MGRIT(forward_iterations="serial", backward_iterations=1)
    controller = Controller(mgrit)
    controller.apply_probe()
    assert (mgrit.forward_iterations, mgrit.backward_iterations) == ("serial", 2)
    assert [decision.direction for decision in controller.observe(probe("bad", "bad"))] == ["backward"]
    controller.apply()
    assert mgrit.forward_iterations == "serial"


@pytest.mark.parametrize(
    ("residuals", "change"),
    [
        ([1e-7, 1e-7, 2e-7], ""),  # rounding: ρ is 2 but the solve is exact
        ([0.1, 0.2, math.nan], "more iterations"),
        ([0.1, 0.2, math.inf], "more iterations"),
        ([0.1], "more iterations"),  # no ρ: nothing speaks for parallel
        ([0.1, 0.0], ""),
    ],
)
def test_residuals_at_the_edges(residuals: list[float], change: str) -> None:
    controller = Controller(MGRIT())
    report = Report(SolveReport(2, residuals), SolveReport(2, [0.5, 0.01]))
    assert controller.observe(report)[0].change == change


def test_decisions_continue_from_a_saved_state() -> None:
    first, second = Controller(MGRIT(), patience=2), Controller(MGRIT(), patience=2)
    first.observe(probe("bad"))
    second.load_state_dict(first.state_dict())
    for found in ("bad", "bad", "bad", "good", "good"):
        assert first.observe(probe(found)) == second.observe(probe(found))
        assert first.state_dict() == second.state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {"every": 0},
        {"threshold": 0.0},
        {"return_below": 2.0},
        {"return_below": 0.0},
        {"patience": 0},
        {"max_iterations": 0},
        {"converged": -1.0},
    ],
)
def test_bad_options_are_refused_with_their_value(options: dict[str, Any]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be"):
        Controller(MGRIT(), **options)


def test_two_serial_directions_leave_nothing_to_control() -> None:
    with pytest.raises(ValueError, match="nothing to control"):
        Controller(MGRIT(forward_iterations="serial", backward_iterations="serial"))
