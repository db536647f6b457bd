"""Every branch executor against the loop: values and gradients, all prefixes, schedules and modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import paradepth
from paradepth.branches import Auto, Batched, Branches, BranchExecutor, Loop, Threads, branch_executor
from paradepth.models import ImageClassifier
from paradepth.nn import set_dropout_key
from paradepth.train import Config, learning
from paradepth.train.schedules import Annealing, build_schedule
from paradepth.train.step import TrainStep
from runs import SCHEDULES

THREADS = Threads(2)


def slowest_wins(name: str, run: Callable[[], Any]) -> float:
    """A timer that makes `Auto` choose "batched", after it has evaluated all of them."""
    run()
    return {"loop": 2.0, "batched": 1.0, "threads": 3.0}[name]


EXECUTORS: dict[str, Callable[[], BranchExecutor]] = {
    "batched": Batched,
    "threads": lambda: THREADS,
    "auto": lambda: Auto(timer=slowest_wins),
}
shapes = st.fixed_dictionaries(
    {
        "branches": st.integers(1, 5),
        "depth": st.integers(1, 3),
        "aggregate": st.sampled_from(["residual", "sum"]),
        "step": st.sampled_from([1.0, 0.25]),
        "dropout": st.sampled_from([0.0, 0.2]),
        "attention_dropout": st.sampled_from([0.0, 0.2]),
        "bias": st.booleans(),
    }
)


def classifier(dtype: torch.dtype = torch.float64, **options: Any) -> ImageClassifier:
    small = {"image_size": 8, "patch_size": 4, "channels": 1, "width": 8, "heads": 2, "mlp": 12, "num_classes": 3}
    if options.get("step", 1.0) != 1.0 and options.get("depth", 1) > 1:
        options = {**options, "buffers": (1, 0)}
    model = paradepth.create_model("paraformer_nano", **{**small, **options}).to(dtype)
    set_dropout_key(model, seed=5, step=1)
    return model.train()


def images(batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(batch, 1, 8, 8, dtype=dtype)


def measured(model: ImageClassifier, executor: BranchExecutor, run: Callable[[], Tensor]) -> list[Tensor | None]:
    """What `run` returns, and the gradients that its sum gives the parameters."""
    assert isinstance(model.trunk, Branches)
    model.trunk.executor = executor
    model.zero_grad()
    result = run()
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)
    (result * weights).sum().backward()
    return [result.detach(), *(p.grad for p in model.parameters())]


def same(found: list[Tensor | None], expected: list[Tensor | None], tolerance: float = 1e-10) -> None:
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None:  # an executor may give a branch that is not used a gradient of zero
            assert all(t is None or not t.any() for t in (a, b))
        else:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", EXECUTORS)
@given(shape=shapes, data=st.data())
def test_values_and_gradients_are_those_of_the_loop(name: str, shape: dict[str, Any], data: Any) -> None:
    model, x, executor = classifier(**shape), images(), EXECUTORS[name]()
    k = data.draw(st.integers(1, shape["branches"]))
    detach = data.draw(st.booleans())
    for run in (
        lambda: model(x, branches=k),
        lambda: model.prefix_logits(x, branches=k, detach=detach),
        lambda: model.contributions(x),
    ):
        same(measured(model, executor, run), measured(model, Loop(), run))
    model.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            model.trunk.executor = executor
            found = model.prefix_logits(x, branches=k), model(x, branches=k)
            model.trunk.executor = Loop()
            torch.testing.assert_close(found, (model.prefix_logits(x, branches=k), model(x, branches=k)))


@pytest.mark.parametrize("name", EXECUTORS)
def test_float32_and_autocast(name: str) -> None:
    model, x, executor = classifier(torch.float32, branches=4, depth=2), images(dtype=torch.float32), EXECUTORS[name]()
    same(measured(model, executor, lambda: model(x)), measured(model, Loop(), lambda: model(x)), 1e-5)

    def half() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    full = measured(model, Loop(), lambda: model(x).float())[0]
    found = measured(model, executor, half)[0]
    assert full is not None
    assert found is not None
    assert not torch.equal(found.float(), full)  # the workers and the stacks take part in autocast
    torch.testing.assert_close(found.float(), full, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_update_of_every_schedule(name: str, kind: str) -> None:
    """Losses and gradients of the updates at several points of the budget, with what is frozen then."""
    model, x, executor = classifier(branches=3, depth=1, dropout=0.1), images(4), EXECUTORS[name]()
    targets = torch.tensor([0, 1, 2, 1])
    options = {key: value for key, value in SCHEDULES[kind].items() if key != "schedule"}
    schedule = build_schedule(SCHEDULES[kind]["schedule"], list(model.parts()), Annealing(), options)
    schedule.prepare(model)
    step = TrainStep(model, label_smoothing=0.1)
    seen = set()
    for progress in (0.0, 0.4, 0.9):
        schedule.advance(progress, 1.0)
        trainable = learning.trainable(schedule, Config().optimiser_options)
        for part, module in model.parts().items():
            module.requires_grad_(part in trainable)
        for objective in schedule.objectives(0):
            seen.add(objective.prefix)
            run = lambda objective=objective: step(x, targets, objective)[0]  # noqa: E731
            same(measured(model, executor, run), measured(model, Loop(), run))
    assert seen


def test_accumulated_gradients_add_up() -> None:
    model, x = classifier(branches=3, depth=2), images(4)
    for executor in (make() for make in EXECUTORS.values()):
        assert isinstance(model.trunk, Branches)
        model.trunk.executor = executor
        model.zero_grad()
        for part in x.chunk(2):
            model(part).square().sum().backward()
        found = [p.grad for p in model.parameters()]
        model.trunk.executor = Loop()
        model.zero_grad()
        model(x).square().sum().backward()
        same(found, [p.grad for p in model.parameters()])


def test_names() -> None:
    kinds = [type(branch_executor(name)) for name in ("loop", "batched", "threads", "auto")]
    assert kinds == [Loop, Batched, Threads, Auto]
    with pytest.raises(ValueError, match="must be one of loop, batched, threads, auto"):
        branch_executor("vmap")


@pytest.mark.parametrize("name", EXECUTORS)
def test_a_compiler_traces_the_loop(name: str) -> None:
    model, x = classifier(branches=3, depth=1), images()
    assert isinstance(model.trunk, Branches)
    expected = model(x)
    model.trunk.executor = EXECUTORS[name]()
    torch.testing.assert_close(torch.compile(model.trunk, backend="eager")(model.stem(x)), model.trunk(model.stem(x)))
    torch.testing.assert_close(model(x), expected)
    torch.compiler.reset()
