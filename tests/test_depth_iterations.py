"""What the iterative executors do before they have converged: exactness, parareal, first guesses, counts, reports."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from depth_helpers import D, PlainMultigrid, loss_of, multigrid, outcome, plain_picard, same, steps, tokens, toys
from paradepth.depth import MGRIT, Picard, Serial, coarse_operator


@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize(("relaxation", "reach"), [("F", 1), ("FCF", 2)])
@pytest.mark.parametrize("k", [0, 1, 2])
def test_k_iterations_make_the_first_states_exact(relaxation: str, reach: int, k: int, levels: int) -> None:
    c, chain, first = 3, steps(23, 0.5), tokens(2, D, grad=False)
    relaxations = [relaxation, "F"][: levels - 1]
    solver = multigrid(chain, first, coarsening=[c, 2][: levels - 1], relaxation=relaxations)
    for _ in range(k):
        solver.iterate()
    found = {n: u[0] for n, u in solver.finish(measure=False).items()}
    error = [float((found[n] - u).abs().max()) for n, u in enumerate(chain.exact(first))]
    settled = reach * k * c + c  # the last relaxation fills the interval behind the exact C-point
    assert max(error[:settled]) <= 1e-12
    assert min(error[settled:23:c]) > 1e-6


@pytest.mark.parametrize("coarse", ["sample", "branch"])
@pytest.mark.parametrize("k", [0, 1])
def test_k_backward_iterations_make_the_last_gradients_exact(k: int, coarse: str) -> None:
    """The adjoint runs over the same intervals from the end, so a shorter last one is its first."""
    stack, x = toys(11, step=0.5), tokens()
    mgrit = MGRIT(coarsening=4, forward_iterations="serial", backward_iterations=k, coarse=coarse)
    found, expected = outcome(stack, mgrit, x), outcome(stack, Serial(), x)
    pairs = [[outputs[f"layers.{n}.out.bias"] for outputs in (found, expected)] for n in range(11)]
    error = [float((a - b).abs().max()) for a, b in pairs if a is not None and b is not None]
    first_exact = (8, 4)[k]
    assert max(error[first_exact:]) <= 1e-12
    assert error[first_exact - 1] > 1e-6


@example(depth=24, coarsening=[2, 2, 2], coarse=["sample"] * 3, relaxation=["F"] * 3, cycle="F", how="constant")
@example(depth=24, coarsening=[2, 3], coarse=["half"] * 3, relaxation=["FCF", "F", "F"], cycle="F", how="coarse")
@settings(max_examples=50)
@given(
    depth=st.integers(5, 24),
    coarsening=st.lists(st.integers(2, 3), min_size=1, max_size=3),
    coarse=st.lists(st.sampled_from(["sample", "branch", "half", "branch:3"]), min_size=3, max_size=3),
    relaxation=st.lists(st.sampled_from(["F", "FCF"]), min_size=3, max_size=3),
    cycle=st.sampled_from(["V", "F"]),
    how=st.sampled_from(["coarse", "constant"]),
)
def test_remembering_changes_no_iterate(depth: int, coarsening: list[int], how: str, **options: Any) -> None:
    torch.manual_seed(depth)
    levels, first, chain = len(coarsening), tokens(2, D, grad=False), steps(depth, 0.4)
    choice = {"coarsening": coarsening, "how": how, "cycle": options["cycle"]}
    choice |= {name: options[name][:levels] for name in ("coarse", "relaxation")}
    solver, plain = multigrid(chain, first, **choice), PlainMultigrid(chain, first, **choice)
    for _ in range(3):
        for n, u in solver.c_points().items():
            torch.testing.assert_close(u[0], plain.u[n], rtol=0, atol=1e-12)
        solver.iterate()
        plain.iterate()
    states = solver.finish(measure=True)
    plain.finish()
    torch.testing.assert_close(torch.stack([states[n][0] for n in range(depth + 1)]), torch.stack(plain.u))
    noted = torch.stack(solver.residuals).sqrt()
    torch.testing.assert_close(noted, torch.tensor(plain.residuals, dtype=torch.float64), rtol=1e-8, atol=1e-12)


def test_two_levels_with_f_relaxation_are_parareal() -> None:
    depth, c, first, chain = 14, 4, tokens(2, D, grad=False), steps(14, 0.5)

    def fine(i: int, u: Tensor) -> Tensor:
        for j in range(i * c, min(i * c + c, depth)):
            u = u + chain.deltas[j](u)
        return u

    def coarse(i: int, u: Tensor) -> Tensor:
        return u + min(c, depth - i * c) * chain.deltas[i * c](u)

    u = [first]
    for i in range(4):
        u.append(coarse(i, u[i]))
    solver = multigrid(chain, first, coarsening=[c])
    for _ in range(5):
        for bound, state in zip([0, 4, 8, 12, 14], u):
            torch.testing.assert_close(solver.c_points()[bound][0], state, rtol=0, atol=1e-12)
        new = [first]
        for i in range(4):
            new.append(coarse(i, new[i]) + fine(i, u[i]) - coarse(i, u[i]))
        u = new
        solver.iterate()


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(("chunk", "cuts"), [(None, [0, 7]), (3, [0, 3, 6, 7])])
@pytest.mark.parametrize("sweeps", [1, 2, 3])
def test_picard_is_a_prefix_sum_in_both_directions(
    sweeps: int, chunk: int | None, cuts: list[int], recompute: bool
) -> None:
    stack, x = toys(7, step=0.5), tokens()
    layers: list[Any] = list(stack.layers)
    end, states = plain_picard(
        [lambda u, f=f: 0.5 * f.residual(u) for f in layers], x.detach(), sweeps=sweeps, cuts=cuts
    )

    def pulled(n: int, gradient: Tensor, wanted: Tensor | None = None) -> Tensor:
        at = states[n].detach().requires_grad_()
        return torch.autograd.grad(0.5 * layers[n].residual(at), at if wanted is None else wanted, gradient)[0]

    start = end.detach().requires_grad_()
    first = torch.autograd.grad(loss_of(start), start)[0]
    back = [lambda u, n=n: pulled(n, u) for n in reversed(range(7))]
    adjoint, gradients = plain_picard(back, first, sweeps=sweeps, cuts=[7 - cut for cut in reversed(cuts)])
    picard = Picard(forward_iterations=sweeps, backward_iterations=sweeps, chunk=chunk, recompute=recompute)
    expected: dict[str, Tensor | None] = {"value 0": end.detach(), "state 0": adjoint}
    for n, gradient in enumerate(reversed(gradients)):
        expected |= {f"layers.{n}.{name}": pulled(n, gradient, p) for name, p in layers[n].named_parameters()}
    same(outcome(stack, picard, x), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "groups"),
    [("sample", None), ("branch", [5]), ("half", [2, 3]), ("branch:3", [1, 2, 2]), ("branch:9", [1, 1, 1, 1, 1])],
)
def test_coarse_operators_are_what_they_say(name: str, groups: list[int] | None) -> None:
    chain, u, asked = steps(5, 0.5), tokens(2, D, grad=False), []
    members = [lambda x, j=j: (asked.append(j), chain.increment(j, x))[1] for j in range(5)]
    expected, j = u + 5 * chain.deltas[0](u), 0
    if groups is not None:
        expected = u
        for group in groups:
            expected, j = expected + sum(chain.deltas[j + i](expected) for i in range(group)), j + group
    operator = coarse_operator(name)
    (increment,) = operator.increment(members, (u,))
    assert increment is not None
    torch.testing.assert_close(u + increment, expected, rtol=0, atol=1e-13)
    assert len(asked) == operator.evaluations(5) == (1 if groups is None else 5)
    assert operator.sequential(5) == len(groups or [0])
    assert coarse_operator(operator) is operator


def test_a_branch_sum_takes_none_for_zero() -> None:
    one, two, three = (tokens(2, D, grad=False) for _ in range(3))
    increments = [(one, None, None), (None, two, None), (three, None, None)]
    found = coarse_operator("branch").increment([lambda x, i=i: i for i in increments], (one, one, one))
    assert found[0] is not None
    assert torch.equal(found[0], one + three)
    assert found[1:] == (two, None)


# ---- first guesses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [MGRIT, Picard])
@pytest.mark.parametrize("recompute", [True, False])
def test_nothing_carries_over(make: Any, recompute: bool) -> None:
    stack, other, x = toys(12), toys(12), tokens()
    variants: list[dict] = [{"coarsening": 3}, {"coarsening": 2, "initial": "constant"}] if make is MGRIT else [{}]
    for options in variants:
        executor = make(recompute=recompute, **options)
        once = outcome(stack, executor, x)
        outcome(stack, executor, tokens())
        outcome(other, executor, tokens(4, D))
        with torch.no_grad():
            stack(tokens(), executor=executor)
        again = outcome(stack, executor, x)
        assert all(torch.equal(again[name], once[name]) for name in once), options  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("make", [MGRIT, Picard])
def test_previous_starts_from_the_last_solve_of_the_same_stack_and_shape(make: Any) -> None:
    stack, x = toys(12, step=0.5), tokens()
    expected = outcome(stack, Serial(), x)
    cold = make(forward_iterations=1, backward_iterations=1)
    warm = make(initial="previous", forward_iterations=1, backward_iterations=1)
    same(outcome(stack, warm, x), outcome(stack, cold, x), atol=0.0)  # the first solve has nothing to start from
    for _ in range(24):  # an iteration each, so the same batch converges over calls: forward, then backward
        found = outcome(stack, warm, x)
    same(found, expected)
    assert warm.report.forward.residuals[-1] < 1e-12
    narrow = tokens(3, D)
    same(outcome(stack, warm, narrow), outcome(stack, cold, narrow), atol=0.0)  # another shape
    outcome(stack, warm, x)
    warm.forget()
    same(outcome(stack, warm, x), outcome(stack, cold, x), atol=0.0)
    other = toys(12, step=0.5)
    same(outcome(other, warm, x), outcome(other, cold, x), atol=0.0)  # another stack


def test_what_a_first_guess_costs() -> None:
    stack, x = toys(12), tokens()
    # A sampled step is the relaxation's first; of a branch sum over 3 layers the other 2 are extra.
    guesses: list[tuple[dict, int]] = [({"initial": "constant"}, 12), ({}, 12), ({"coarse": "branch"}, 12 + 4 * 2)]
    for options, evaluations in guesses:
        mgrit = MGRIT(coarsening=3, forward_iterations=0, **options)
        mgrit.measure = True
        stack(x, executor=mgrit)
        assert mgrit.report.forward.evaluations == evaluations
        assert mgrit.report.forward.iterations == 0
        assert len(mgrit.report.forward.residuals) == 1


# ---- tolerance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [MGRIT, Picard])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-6])
def test_tolerance_stops_as_soon_as_it_is_met(make: Any, tolerance: float) -> None:
    stack, x = toys(24, step=1 / 12), tokens()
    executor = make(forward_iterations=20, backward_iterations=20, tolerance=tolerance)
    found, expected = outcome(stack, executor, x), outcome(stack, Serial(), x)
    same(found, expected, atol=100 * tolerance)
    finishes = int(make is Picard)  # its last sweep is an iteration and comes after the check
    for report, measured in ((executor.report.forward, finishes), (executor.report.backward, 1)):
        checked = report.residuals[: len(report.residuals) - measured]
        assert report.iterations == len(checked) + finishes
        assert 1 < report.iterations < 12
        assert checked[-1] <= tolerance < checked[-2]
    counted = make(
        forward_iterations=executor.report.forward.iterations, backward_iterations=executor.report.backward.iterations
    )
    same(outcome(stack, counted, x), found, atol=0.0)


def test_tolerance_that_is_never_met_leaves_the_count() -> None:
    mgrit = MGRIT(forward_iterations=2, tolerance=1e-300)
    toys(24, step=1.0)(tokens(), executor=mgrit)
    assert mgrit.report.forward.iterations == 2


# ---- reports -------------------------------------------------------------------------------------------------------


def cost(intervals: int, c: int, iterations: int, *, measure: bool) -> int:
    """Evaluations of two levels with `sample` and F-relaxation, where what is exact already costs nothing."""
    count = intervals  # first guess; its evaluations are the first steps of the relaxation
    for k in range(1, iterations + 1):
        count += max(intervals - k + 1, 0) * (c - 1)  # relaxation: the intervals that do not start exact
        count += max(intervals - k, 0)  # coarse solve
    left = max(intervals - iterations, 0)
    return count + left * (c - 1) - (0 if measure else max(left - 1, 0))


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("c", [2, 4])
@pytest.mark.parametrize("measure", [True, False])
@pytest.mark.parametrize("iterations", [0, 1, 2, 3, 4, 9])
def test_settled_intervals_cost_nothing(iterations: int, measure: bool, c: int, recompute: bool) -> None:
    mgrit = MGRIT(coarsening=c, forward_iterations=iterations, backward_iterations=iterations, recompute=recompute)
    mgrit.measure = measure
    outcome(toys(4 * c, step=0.4, buffers=(0, 0)), mgrit, tokens())
    if recompute:
        assert mgrit.report.forward.evaluations == cost(4, c, iterations, measure=measure)
    # The last relaxation takes every layer once more for parameter gradients, and with kept graphs forward, too.
    left = max(4 - iterations, 0)
    full = cost(4, c, iterations, measure=True) - left * (c - 1) + 4 * c
    assert mgrit.report.backward.evaluations == full
    if not recompute:
        assert mgrit.report.forward.evaluations == full
    for report, always in ((mgrit.report.forward, measure or not recompute), (mgrit.report.backward, True)):
        assert report.iterations == iterations
        assert len(report.residuals) == iterations + always


def test_two_levels_have_one_cycle() -> None:
    stack, x = toys(12, step=0.4), tokens()
    reports = []
    for cycle in ("V", "F"):
        mgrit = MGRIT(coarsening=3, forward_iterations=2, backward_iterations=2, cycle=cycle)
        outcome(stack, mgrit, x)
        reports.append(mgrit.report)
    assert reports[0] == reports[1]


def test_picard_evaluates_only_what_changed() -> None:
    picard = Picard(forward_iterations=20, backward_iterations=1)
    toys(6)(tokens(), executor=picard)
    assert picard.report.forward.evaluations == 6 + 5 + 4 + 3 + 2 + 1
    assert picard.report.forward.iterations == 20
    chunked = Picard(forward_iterations=3, chunk=3)
    toys(7)(tokens(), executor=chunked)
    assert chunked.report.forward.evaluations == (3 + 2 + 1) * 2 + 1
    assert Picard(chunk=1).report.forward.rho is None
    outcome(stack := toys(5), one := Picard(forward_iterations=9, backward_iterations=9, chunk=1), tokens())
    assert one.report.forward.evaluations == len(stack.layers)
    assert one.report.backward.evaluations == 9 * len(stack.layers) - 8 * len(stack.layers) + len(stack.layers)


def test_residuals_decrease_to_zero_and_rho_is_their_last_ratio() -> None:
    mgrit = MGRIT(coarsening=4, forward_iterations=7, backward_iterations=5, relaxation="FCF", coarse="branch")
    mgrit.measure = True
    outcome(toys(32, step=1 / 16), mgrit, tokens())
    for report, count in ((mgrit.report.forward, 7), (mgrit.report.backward, 5)):
        r = report.residuals
        assert len(r) == count + 1
        assert all(after < before for before, after in pairwise(r) if before > 1e-14)
        assert r[0] > 1e-6
        assert r[4] <= 1e-14
    exactly = MGRIT(coarsening=4, forward_iterations=3)
    toys(32, step=1 / 16)(tokens(), executor=exactly)
    report = exactly.report.forward
    assert report.rho == report.residuals[-1] / report.residuals[-2]
    assert report.rho is not None
    assert 0 < report.rho < 0.5


@pytest.mark.parametrize(
    ("options", "forward", "backward"),
    [
        (
            {},
            [0.08672653340831042, 0.010149345614542336, 0.00046968001912346555],
            [0.05173085723829463, 0.004470324149864943, 0.0002948108067724273, 1.8772068006036474e-05],
        ),
        (
            {"levels": 3, "relaxation": ("FCF", "F"), "cycle": "F", "coarse": ("half", "sample")},
            [0.0358261531145539, 1.910744346620869e-05, 7.193140751031806e-11],
            [0.05144525628747275, 1.4669160688926736e-07, 0.0, 0.0],
        ),
    ],
)
def test_residual_history(options: Any, forward: list[float], backward: list[float]) -> None:
    """Pinned: a change of the algorithm has to say so."""
    torch.manual_seed(7)
    mgrit = MGRIT(coarsening=3, forward_iterations=3, backward_iterations=3, **options)
    outcome(toys(20, step=0.1), mgrit, tokens())
    assert mgrit.report.forward.residuals == pytest.approx(forward, rel=1e-6, abs=1e-13)
    assert mgrit.report.backward.residuals == pytest.approx(backward, rel=1e-6, abs=1e-13)
