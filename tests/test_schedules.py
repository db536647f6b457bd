"""Schedules: which losses, which rates, when a branch joins; and what an update costs."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import paradepth
from paradepth.train.accounting import update_cost
from paradepth.train.budget import Budget
from paradepth.train.config import Config, check_options
from paradepth.train.schedules import Annealing, Objective, Schedule, Stagewise, build_schedule


def parts(branches: int) -> list[str]:
    return ["stem", *(f"branch{i}" for i in range(1, branches + 1)), "head"]


def make(name: str, branches: int = 4, **options: object) -> Schedule:
    return build_schedule(name, parts(branches), Annealing(), options)


@given(n=st.integers(1, 8))
def test_published_cycle_costs_what_the_paper_code_costs(n: int) -> None:
    cycle = make("cycle", n)
    updates = [*cycle.objectives(0), *cycle.objectives(1)]
    assert len(updates) == n + 1
    assert sum(o.prefix for o in updates) == n * (n + 1) // 2 + n
    assert [o.clip for o in updates] == [True] * n + [False]
    assert cycle.passes_per_epoch == 2
    short = make("cycle", n, second_pass=False)
    assert short.objectives(1) == short.objectives(0) == cycle.objectives(0)
    assert short.passes_per_epoch == 1


def test_joint_and_one_pass_objectives() -> None:
    assert make("joint").objectives(3) == (Objective(4),)
    assert make("one_pass").objectives(0) == (Objective(4, weights=(1.0, 1.0, 1.0, 1.0)),)
    boosting = make("one_pass", prefix_weights=[0, 0, 1, 2], detach=True)
    assert boosting.objectives(0) == (Objective(4, weights=(0.0, 0.0, 1.0, 2.0), detach=True),)


@given(n=st.integers(1, 6), steps=st.integers(10, 200))
def test_fixed_stages_have_equal_numbers_of_steps(n: int, steps: int) -> None:
    schedule, active, spent = make("stagewise", n), [], 0
    budget = steps * n * (n + 1) // 2
    while spent < budget:
        schedule.advance(spent / budget)
        active.append(schedule.active)
        spent += schedule.active  # a step of stage k costs k branches
    assert active[0] == 1
    assert all(b - a in (0, 1) for a, b in itertools.pairwise(active))
    assert active[-1] == n
    counts = [active.count(k) for k in range(1, n + 1)]
    assert max(counts) - min(counts) <= 2


def test_stages_end_where_advance_at_says() -> None:
    schedule = make("stagewise", 3, advance_at=[0.5, 0.6])
    assert [schedule.advance(p) for p in (0.49, 0.5, 0.59, 0.6, 0.99)] == [None, "fixed", None, "fixed", None]


def test_plateau_ends_a_stage_after_patience_validations_without_improvement() -> None:
    schedule = make("stagewise", 3, advance_on="plateau", patience=2, min_delta=0.1)
    losses = [1.0, 0.8, 0.75, 0.74]  # the last two improve by less than min_delta
    reasons = [schedule.advance(0.01 * i, loss) for i, loss in enumerate(losses)]
    assert reasons == [None, None, None, "plateau"]
    assert schedule.active == 2
    assert schedule.advance(0.03 + (1 - 0.03) * 2 / 5) == "fixed", "the time that is left is shared by the later stages"
    assert schedule.advance(0.99, 5.0) is None, "the last stage has nowhere to go"


@pytest.mark.parametrize("predecessors", ["free", "slow", "frozen"])
def test_rates_follow_the_treatment_of_predecessors(predecessors: str) -> None:
    schedule = build_schedule(
        "stagewise",
        parts(3),
        Annealing(warmup=0.0, decay="constant"),
        {"predecessors": predecessors, "slow_factor": 0.25},
    )
    assert schedule.rates(0.0) == {"stem": 1.0, "branch1": 1.0, "branch2": 0.0, "branch3": 0.0, "head": 1.0}
    assert schedule.trainable() == {"stem", "branch1", "head"}
    schedule.advance(0.4)
    old = {"free": 1.0, "slow": 0.25, "frozen": 0.0}[predecessors]
    assert schedule.rates(0.5) == {"stem": old, "branch1": old, "branch2": 1.0, "branch3": 0.0, "head": 1.0}
    assert schedule.trainable() == {"branch2", "head"} | (set() if predecessors == "frozen" else {"stem", "branch1"})


def test_each_stage_has_a_warm_up_and_decay_of_its_own_unless_told_otherwise() -> None:
    own, run = (make("stagewise", 2, anneal=span, advance_at=[0.5]) for span in ("stage", "run"))
    assert own.rates(0.499)["branch1"] < 0.001 < run.rates(0.499)["branch1"]
    for schedule in (own, run):
        schedule.advance(0.5)
    assert own.rates(0.525)["branch2"] == pytest.approx(1.0, abs=0.01)
    assert run.rates(0.525)["branch2"] < 0.55


@given(n=st.integers(1, 5), progress=st.lists(st.floats(0, 1), max_size=8), data=st.data())
def test_a_restored_schedule_continues_alike(n: int, progress: list[float], data: st.DataObject) -> None:
    first = make("stagewise", n, advance_on="plateau", patience=1)
    for p in sorted(progress):
        first.advance(p, data.draw(st.floats(0, 2)))
    second = make("stagewise", n, advance_on="plateau", patience=1)
    second.load_state_dict(first.state_dict())
    for p in (0.3, 0.9, 1.0):
        assert first.advance(p, 1.0) == second.advance(p, 1.0)
        assert first.rates(p) == second.rates(p)
        assert first.trainable() == second.trainable()


def test_new_branches_start_at_zero_or_at_random() -> None:
    options = {"image_size": 8, "patch_size": 4, "branches": 3, "depth": 1}
    model = paradepth.create_model("paraformer_nano", **options)
    make("stagewise", 3).prepare(model)
    logits = model.prefix_logits(torch.rand(2, 3, 8, 8))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    model = paradepth.create_model("paraformer_nano", **options)
    make("stagewise", 3, new_branch="random").prepare(model)
    logits = model.prefix_logits(torch.rand(2, 3, 8, 8))
    assert not torch.allclose(logits[0], logits[1])
    with pytest.raises(ValueError, match="new_branch=random"):
        make("stagewise", 3).prepare(paradepth.create_model("paraformer_nano", aggregate="sum", **options))


def test_cost_of_an_update_in_layer_evaluations_and_flops() -> None:
    model = paradepth.create_model("paraformer_nano", image_size=8, patch_size=4, branches=4, depth=2)
    everything = frozenset(model.parts())
    assert update_cost(model, Objective(4), everything).layer_evals == 8
    assert update_cost(model, Objective(2), everything).layer_evals == 4
    frozen = everything - {"stem", "branch1", "branch2"}
    assert update_cost(model, Objective(3), frozen).layer_evals == pytest.approx(2 + 4 / 3)
    passing = everything - {"branch1", "branch2"}
    assert update_cost(model, Objective(3), passing).layer_evals == pytest.approx(2 + 8 / 3)
    # Forward once, backward twice of everything but the gradient of the pixels.
    flops = update_cost(model, Objective(4), everything).flops
    assert flops == pytest.approx(3 * model.forward_flops() - model.stem.flops())
    serial = paradepth.create_model("vit_nano", image_size=8, patch_size=4, depth=8)
    assert update_cost(serial, Objective(1), frozenset(serial.parts())).layer_evals == 8


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make("backwards"), "must be one of joint, cycle, one_pass, stagewise"),
        (lambda: make("joint", patience=2), "takes no option patience"),
        (lambda: make("one_pass", prefix_weights=[1, 2]), "needs 4 numbers"),
        (lambda: make("one_pass", prefix_weights=[1, 1, 1, 0]), "last positive"),
        (lambda: make("stagewise", detach=True, prefix_losses=False), "prefix_losses"),
        (lambda: make("stagewise", advance_at=[0.5, 0.4, 0.9]), "increasing"),
        (lambda: make("stagewise", advance_on="plateau", advance_at=[0.2, 0.4, 0.9]), "does not go with"),
        (lambda: make("stagewise", predecessors="asleep"), "free, slow, frozen"),
        (lambda: make("stagewise", patience=0), "patience"),
        (lambda: make("stagewise", slow_factor=0.0), "slow_factor"),
        (lambda: Annealing(warmup=1.0), "warmup"),
        (lambda: Annealing(decay="linear"), "decay"),  # pyright: ignore[reportArgumentType]
        (lambda: Budget.parse("20"), "number and a unit"),
        (lambda: Budget.parse("-3 epochs"), "number and a unit"),
        (lambda: Budget.parse("1e999 steps"), "number and a unit"),
        (lambda: Config().replace(colour=1), "unknown options colour"),
        (lambda: check_options(Config().replace(learning_rate=-1.0)), "learning_rate is -1.0"),
        (lambda: check_options(Config().replace(ema=1.0)), "ema"),
        (lambda: check_options(Config().replace(batch_size=0)), "batch_size"),
    ],
)
def test_bad_options_are_refused_in_words(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_stagewise_of_one_branch_has_one_stage() -> None:
    schedule = Stagewise(parts(1), Annealing())
    assert schedule.advance(0.99) is None
    assert schedule.trainable() == {"stem", "branch1", "head"}
