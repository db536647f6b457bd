"""The study of known functions: the function is what it claims, the model adds up, budgets match, rules decide."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paradepth.branches import Branches
from paradepth.studies import approximation
from paradepth.studies._alignment import contributions, mean_cosine, updates
from paradepth.studies._approximator import Approximator, ApproximatorConfig
from paradepth.studies._known_function import KnownFunction, points
from paradepth.studies.measurements import check_measurement
from paradepth.studies.measurements.approximation import measure, new_model, prefix_errors, slope

SMALL: dict[str, Any] = {"batch_size": 16, "train_points": 64, "test_points": 32, "frequencies": 4}


# --- the function ----------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    dimension=st.integers(1, 2), smoothness=st.floats(0.5, 3.0), frequencies=st.integers(1, 6), seed=st.integers(0, 99)
)
def test_its_fourier_coefficients_fall_as_its_smoothness_says(
    dimension: int, smoothness: float, frequencies: int, seed: int
) -> None:
    f = KnownFunction(dimension=dimension, smoothness=smoothness, frequencies=frequencies, seed=seed)
    side = 4 * frequencies  # a grid that resolves every term
    axes = torch.meshgrid(*[torch.arange(side, dtype=torch.float64) / side] * dimension, indexing="ij")
    values = f(torch.stack([axis.flatten() for axis in axes], dim=1)).reshape((side,) * dimension).numpy()
    found = np.abs(np.fft.fftn(values)) / values.size
    k = np.fft.fftfreq(side, 1 / side)
    length = np.sqrt(sum(part**2 for part in np.meshgrid(*[k] * dimension, indexing="ij")))
    inside = (length > 0) & (length <= frequencies)
    expected = np.where(inside, np.where(inside, length, 1.0) ** -(smoothness + dimension / 2), 0.0)
    expected /= math.sqrt(np.square(expected).sum())  # Parseval: variance 1
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert len(f) == inside.sum() / 2
    left = np.sort(np.square(expected).ravel())[::-1][2:]  # a term is a pair of coefficients
    assert f.remainder(1) == pytest.approx(math.sqrt(left.sum()), abs=1e-7)
    assert (f.remainder(0), f.remainder(len(f))) == (1.0, 0.0)
    assert [f.terms(error) for error in (1.0, f.remainder(1), 0.0)] == [0, 1, len(f)]


def test_seeds_draw_other_functions_and_purposes_other_points() -> None:
    make = lambda seed: KnownFunction(dimension=1, smoothness=1.0, frequencies=8, seed=seed)  # noqa: E731
    u = points(100, 1, seed=0, purpose="training points")
    assert torch.equal(make(0)(u), make(0)(u))
    assert not torch.allclose(make(0)(u), make(1)(u), atol=0.1)
    assert not torch.equal(u, points(100, 1, seed=0, purpose="test points"))


@pytest.mark.parametrize(
    ("option", "value"), [("dimension", 0), ("smoothness", 0.0), ("smoothness", math.inf), ("frequencies", 0)]
)
def test_a_function_that_cannot_be_is_refused(option: str, value: float) -> None:
    options: dict[str, Any] = {"dimension": 1, "smoothness": 1.0, "frequencies": 4, "seed": 0, option: value}
    with pytest.raises(ValueError, match=f"{option} is {value}"):
        KnownFunction(**options)


# --- the model and its alignments ------------------------------------------------------------------------------------


def _model(branches: int = 3, **shape: Any) -> Approximator:
    model = new_model(ApproximatorConfig(depth=2, dimension=2, **shape), "joint", branches, seed=0).double()
    return model


def test_branches_add_up_in_the_output_and_prefixes_are_models() -> None:
    model, u = _model(), points(20, 2, seed=1, purpose="test points").double()
    prefixes = model.prefix_logits(u)
    added = contributions(model, u, branches=3)
    torch.testing.assert_close(prefixes.diff(dim=0), added[1:], atol=1e-12, rtol=0)
    torch.testing.assert_close(prefixes[1], model.truncate(2)(u), atol=1e-12, rtol=0)
    torch.testing.assert_close(model.grow(1)(u), prefixes[-1], atol=1e-12, rtol=0)
    assert torch.equal(model.stem.maps, _model(1).stem.maps)
    assert not any(p.requires_grad for p in model.stem.parameters())
    with pytest.raises(ValueError, match=r"points have shape \(4, 1\); it must be \(batch, 2\)"):
        model(torch.zeros(4, 1))


def test_an_update_is_what_a_small_gradient_step_of_a_branch_does_to_the_output() -> None:
    model, u = _model(), points(12, 2, seed=1, purpose="test points").double()
    target = torch.linspace(-1, 1, 12, dtype=torch.float64)
    found = updates(model, u, target, branches=2)
    assert found.shape == (2, 12)
    before = model(u, branches=2)
    loss = (before - target).square().mean()
    assert isinstance(model.trunk, Branches)
    for i, branch in enumerate(model.trunk.first(2)):
        gradients = torch.autograd.grad(loss, list(branch.parameters()), retain_graph=True)
        ends = []
        for size in (1e-5, -1e-5):
            moved = copy.deepcopy(model)
            assert isinstance(moved.trunk, Branches)
            with torch.no_grad():
                for p, g in zip(moved.trunk.branches[i].parameters(), gradients, strict=True):
                    p += size * g
                ends.append(moved(u, branches=2))
        torch.testing.assert_close(found[i], (ends[0] - ends[1]) / 2e-5, atol=1e-7, rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(count=st.integers(2, 5), size=st.integers(3, 8), seed=st.integers(0, 99))
def test_mean_cosine_is_that_of_all_pairs(count: int, size: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=(count, size))
    pairs = [np.corrcoef(values[i], values[j])[0, 1] for i in range(count) for j in range(i)]
    assert mean_cosine(torch.from_numpy(values)) == pytest.approx(np.mean(pairs), abs=1e-12)
    with pytest.raises(ValueError, match="there are 1 functions"):
        mean_cosine(torch.zeros(1, 4))


def _list(found: dict[str, Any], name: str) -> list[float]:
    assert isinstance(found[name], list)
    return found[name]


# --- the measurement -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["joint", "one_pass", "stagewise", "serial"])
def test_a_measurement(schedule: Any) -> None:
    options: dict[str, Any] = {**SMALL, "schedule": schedule, "depth": 1, "branches": [1, 3]}
    found = measure(seed=0, layer_evals=16 * 30.0, **options)
    errors, sizes, prefixes = (_list(found, name) for name in ("error", "sizes", "prefix_errors"))
    assert sizes[1] - sizes[0] == 2 * (sizes[0] - 9)  # 8 weights and a bias read out
    assert found["rate"] == pytest.approx(slope([1, 3], errors))
    assert prefixes[-1] == errors[-1]
    assert len(prefixes) == (1 if schedule == "serial" else 3)
    spent = found["layer_evals"]
    assert isinstance(spent, float)
    assert 480 <= spent < 480 + 3 * 16
    assert len(_list(found, "stage_errors")) == (3 if schedule == "stagewise" else 0)
    assert found["update_alignment"] == []
    again = measure(seed=0, layer_evals=16 * 30.0, **options)
    assert again == found
    # One branch is a serial stack, and has one order of learning.
    alone = measure(seed=0, layer_evals=16 * 30.0, **{**options, "schedule": "joint", "branches": [1]})
    assert _list(alone, "error") == pytest.approx(errors[:1], rel=1e-5)


def test_stages_begin_where_the_one_before_ended_and_training_helps() -> None:
    options: dict[str, Any] = {**SMALL, "depth": 1, "branches": [2], "schedule": "stagewise"}
    found = measure(seed=0, steps=150, **options)
    first, second = _list(found, "stage_errors")
    assert 1.0 > first > second
    assert [second] == found["error"]
    model = new_model(ApproximatorConfig(depth=1), "stagewise", 1, seed=0)
    u, y = torch.rand(5, 1), torch.rand(5)
    grown = prefix_errors(model.grow(1), u, y)
    assert grown[0] == pytest.approx(grown[1], rel=1e-6)


def test_steps_give_larger_models_more_compute_and_layer_evals_do_not() -> None:
    options: dict[str, Any] = {**SMALL, "depth": 1, "schedule": "joint"}
    spent = [measure(seed=0, steps=5, branches=[n], **options)["layer_evals"] for n in (1, 2)]
    assert spent == [5 * 16, 2 * 5 * 16]


def test_alignments_wait_for_the_second_branch() -> None:
    options: dict[str, Any] = {**SMALL, "depth": 1, "branches": [2], "schedule": "stagewise", "layer_evals": 10 * 16.0}
    assert len(_list(measure(seed=0, aligned_at=[0.2, 0.4], **options), "update_alignment")) == 2


def test_alignments_are_measured_where_they_are_asked_for() -> None:
    options: dict[str, Any] = {**SMALL, "depth": 1, "branches": [1, 2], "schedule": "one_pass", "steps": 10}
    found = measure(seed=0, aligned_at=[0.5, 1.0], **options)
    for name in ("contribution_alignment", "update_alignment"):
        values = _list(found, name)
        assert len(values) == 2
        assert all(-1 <= value <= 1 for value in values)
    assert found["error"] == measure(seed=0, **options)["error"]  # looking changes nothing


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"branches": [2, 2]}, r"branches is \[2, 2\]"),
        ({"branches": []}, r"branches is \[\]"),
        ({"layer_evals": 10.0}, "layer_evals is 10.0 and steps 4"),
        ({"steps": None}, "layer_evals is None and steps None"),
        ({"schedule": "cycle"}, "schedule is 'cycle'"),
        ({"test_points": 0}, "test_points is 0"),
        ({"aligned_at": [1.0]}, r"aligned_at is \[1.0\]"),
        ({"aligned_at": [0.5, 1.5], "branches": [2]}, r"aligned_at is \[0.5, 1.5\]"),
        ({"smoothness": -1.0}, "smoothness is -1.0"),
    ],
)
def test_options_that_cannot_be_are_refused(wrong: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {**SMALL, "schedule": "joint", "depth": 1, "branches": [1], "steps": 4, **wrong}
    with pytest.raises(ValueError, match=message):
        measure(seed=0, **options)


# --- the study -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["smoke", "here", "paper"])
def test_every_cell_can_be_measured(size: Any) -> None:
    study = approximation.study(size)
    for cell in study.cells:
        check_measurement(cell.recipe, cell.options)
        options = dict(cell.options)
        shape = {key: options[key] for key in ("width", "heads", "mlp", "tokens")}
        ApproximatorConfig(dimension=options["dimension"], depth=options["depth"], **shape)
        KnownFunction(
            dimension=options["dimension"], smoothness=options["smoothness"], frequencies=options["frequencies"], seed=0
        )
        assert ("layer_evals" in options) != ("steps" in options)
    rows = {(cell.group, cell.label) for cell in study.cells}
    assert len(rows) == {"smoke": 6, "here": 24, "paper": 28}[size]
    assert all((cell.options["schedule"] == "serial") != ("aligned_at" in cell.options) for cell in study.cells)


def _records(**errors: list[float]) -> list[dict[str, Any]]:
    """Records of the smoke study's rows in two seeds: errors by schedule, the second seed's a hundredth above."""
    records = []
    for cell in approximation.study("smoke", seeds=(0, 1)).cells:
        order = cell.options["schedule"]
        found = [value * (1 + 0.01 * cell.seed) for value in errors[order]]
        measures: dict[str, Any] = {"error": found, "rate": slope([1, 2], found), "prefix_errors": found}
        measures["stage_errors"] = found if order == "stagewise" else []
        measures["update_alignment"] = {"serial": [], "joint": [0.5] * 4, "stagewise": [0.1] * 4}[order]
        measures["contribution_alignment"] = measures["update_alignment"]
        records.append(
            {"group": cell.group, "label": cell.label, "seed": cell.seed, "options": cell.options, "measures": measures}
        )
    return records


def test_verdicts_follow_from_the_errors() -> None:
    records = _records(serial=[0.4, 0.3], joint=[0.4, 0.2], stagewise=[0.4, 0.1])
    found = approximation.verdicts(records)
    assert {verdict.verdict for verdict in found.values()} == {"holds"}
    assert found[approximation.FALLS].figure == (
        "Of 2 steps from one stage's error to the next, 2 go down and 0 up by more than two standard errors. Against "
        "one branch that is trained with the compute of all stages, the error at the end is smaller in 1 and larger in "
        "0 of 1 shapes."
    )
    assert "2 of 2 comparisons and a larger one in 0, 0.50 times" in found[approximation.PROGRESSIVE].figure
    assert "d = 1, s = 1: -2.00 ± 0.00" in found[approximation.GREEDY].figure
    texts = approximation.findings(records)
    assert "stagewise, depth 1 40.2 · 10.1" in texts[0]

    records = _records(serial=[0.4, 0.1], joint=[0.4, 0.2], stagewise=[0.4, 0.5])
    found = {name: verdict.verdict for name, verdict in approximation.verdicts(records).items()}
    assert found == {
        approximation.FALLS: "does not hold",
        approximation.PROGRESSIVE: "does not hold",
        approximation.NOTHING_LOST: "does not hold",
        approximation.MORE: "holds",
        approximation.GREEDY: "does not hold",
        approximation.ALIGNED: "holds",
    }
    single = approximation.verdicts([record for record in records if record["seed"] == 0])
    assert {verdict.verdict for verdict in single.values()} == {"could not be tested here"}


def test_a_verdict_is_conditional_where_rows_disagree_and_negative_where_seeds_do() -> None:
    records = _records(serial=[0.4, 0.2], joint=[0.4, 0.2], stagewise=[0.4, 0.2])
    for record in records:
        if record["label"].startswith("stagewise"):
            measures = record["measures"]
            measures["error"] = [0.4, 0.1 if "equal updates" in record["group"] else 0.3]
            measures["update_alignment"] = [0.1 if "equal updates" in record["group"] else 0.6]
            if record["seed"]:
                measures["stage_errors"] = [0.2, 0.4]
    found = approximation.verdicts(records)
    assert found[approximation.PROGRESSIVE].verdict == "holds with conditions"  # better in one row, worse in the other
    assert found[approximation.ALIGNED].verdict == "holds with conditions"
    assert found[approximation.NOTHING_LOST].verdict == "holds"  # joint training is as good as serial
    assert found[approximation.FALLS].verdict == "does not hold"  # one seed falls, one rises: nothing is told
