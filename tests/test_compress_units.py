"""Fewer heads, neurons and weights: importance against its definition, pruning that must change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import paradepth
from compress_helpers import bench_for, classifier, images, other_kinds, same, weights
from paradepth.compress import Heads, Magnitude, Neurons, apply_plan, parse_plan
from paradepth.compress.importance import attentions, feed_forwards, importance
from paradepth.compress.magnitude import kept_weights, trunk_linears
from paradepth.train.step import IGNORED

KINDS = ("images", "serial", "sum", "no bias", "narrow", "texts", "language", "translation")


def case(kind: str, **options: Any) -> tuple[Any, Any, Tensor]:
    """A model of four heads, with inputs and targets."""
    shape = {
        "images": {"branches": 2, "depth": 2},
        "serial": {"branches": 0, "depth": 2},
        "sum": {"branches": 2, "aggregate": "sum", "pool": "cls"},
        "no bias": {"branches": 2, "bias": False},
        "narrow": {"branches": 2, "head_width": 3},
    }.get(kind)
    if shape is None:
        model, inputs, targets = other_kinds(heads=4)[kind]
        return model, inputs, targets
    return classifier(heads=4, **shape, **options), *images()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def outputs(model: Any) -> dict[str, tuple[torch.nn.Linear, int]]:
    """The linear map behind the units of each module, and their number."""
    return {
        **{name: (module.out, module.heads) for name, module in attentions(model).items()},
        **{name: (module.down, module.down.in_features) for name, module in feed_forwards(model).items()},
    }


@pytest.mark.parametrize("kind", KINDS)
def test_importance_is_the_mean_size_of_the_gradient_of_a_gate(kind: str) -> None:
    """∂L/∂ξ of a gate on a unit is Σ w · ∂L/∂w over the weights that read the unit: here from each sample's own
    gradient, there from activations."""
    model, inputs, targets = case(kind)
    bench = bench_for(model, inputs, targets, training_batch=4)
    found = importance(model, bench, batches=2)
    expected = {name: torch.zeros(units, dtype=torch.float64) for name, (_, units) in outputs(model).items()}
    for first in (0, 4):
        counted = int((targets[first : first + 4] != IGNORED).sum())
        for i in range(first, first + 4):
            one = tuple(x[i : i + 1] for x in inputs) if isinstance(inputs, tuple) else inputs[i : i + 1]
            model.zero_grad()
            (bench.loss(model(one), targets[i : i + 1]) / counted).backward()
            for name, (linear, units) in outputs(model).items():
                assert linear.weight.grad is not None
                products = (linear.weight * linear.weight.grad).sum(dim=0).view(units, -1).sum(dim=1)
                expected[name] += products.detach().abs()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-12)
        assert value.max() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 3])
def test_units_that_add_nothing_are_the_ones_that_go(kind: str, count: int, tmp_path: Path) -> None:
    model, inputs, targets = case(kind)
    hidden = model.config.mlp - count
    with torch.no_grad():
        for linear, units in outputs(model).values():
            kept = count if units == 4 else hidden
            silent = torch.randperm(units)[kept:]
            linear.weight.unflatten(1, (units, -1))[:, silent] = 0
    bench = bench_for(model, inputs, targets)
    smaller = apply_plan((Heads(count), Neurons(hidden)), model, bench)
    width = model.config.head_width or model.config.width // 4
    assert (smaller.config.heads, smaller.config.head_width, smaller.config.mlp) == (count, width, hidden)
    with torch.no_grad():
        close(smaller(inputs), model(inputs))
        again = paradepth.from_pretrained(smaller.save_pretrained(tmp_path))
        assert torch.equal(again(inputs), smaller(inputs))
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_all_units_changes_nothing(kind: str) -> None:
    model, inputs, targets = case(kind)
    same_model = apply_plan((Heads(4), Neurons(model.config.mlp)), model, bench_for(model, inputs, targets))
    assert same_model.config == model.config
    assert same(weights(same_model), weights(model))


@given(heads=st.integers(1, 4), neurons=st.integers(1, 12), seed=st.integers(0, 5))
def test_the_most_important_units_stay_in_their_order(heads: int, neurons: int, seed: int) -> None:
    model = classifier(heads=4, branches=2, depth=1)
    bench = bench_for(model, *images())
    scores = importance(model, bench)
    smaller = apply_plan((Heads(heads), Neurons(neurons)), model, bench)
    for name, module in attentions(smaller).items():
        kept = scores[name].topk(heads).indices.sort().values
        source = attentions(model)[name]
        close(module.out.weight.view(8, heads, 2), source.out.weight.view(8, 4, 2)[:, kept])
    # Which neurons go is decided after the heads went.
    fewer_heads = apply_plan((Heads(heads),), model, bench)
    scores = importance(fewer_heads, bench)
    for name, module in feed_forwards(smaller).items():
        kept = scores[name].topk(neurons).indices.sort().values
        close(module.up.weight, feed_forwards(model)[name].up.weight[kept])


# ---- single weights ----------------------------------------------------------------------------------------------


@given(fraction=st.floats(0.01, 0.99), branches=st.integers(0, 3))
def test_the_smallest_weights_of_the_trunk_become_zero(fraction: float, branches: int) -> None:
    model = classifier(branches=branches, depth=2)
    pruned = Magnitude(fraction).apply(model, bench_for(model, *images()))
    before, after = weights(model), weights(pruned)
    assert before.keys() == after.keys(), "nothing of torch.nn.utils.prune is left"
    names = [f"{name}.weight" for name, _ in trunk_linears(model)]
    assert len(names) == 4 * max(branches, 1) * 2
    for name in before.keys() - set(names):
        assert torch.equal(before[name], after[name])
    old, new = (torch.cat([stored[name].flatten() for name in names]) for stored in (before, after))
    gone = new == 0
    assert int(gone.sum()) == round(fraction * len(old))
    assert torch.equal(old[~gone], new[~gone])
    if gone.any() and not gone.all():
        assert old[gone].abs().max() <= old[~gone].abs().min()


def test_what_was_pruned_can_be_told_from_what_starts_at_zero() -> None:
    model = classifier(branches=2)
    assert kept_weights(model) == {}
    assert kept_weights(model.grow(1)) == {}, "new branches start with matrices of zeros"
    pruned = Magnitude(0.5).apply(model, bench_for(model, *images()))
    masks = kept_weights(pruned)
    assert masks.keys() == {f"{name}.weight" for name, _ in trunk_linears(model)}
    parameters = dict(pruned.named_parameters())
    assert all(torch.equal(mask, parameters[name] != 0) for name, mask in masks.items())


@pytest.mark.parametrize("plan", ["tune=5", "distil=5", "heads=1+tune=5", "prefix=1+neurons=6+distil=5"])
def test_training_further_keeps_zeros(plan: str) -> None:
    model = classifier(branches=2)
    bench = bench_for(model, *images(), learning_rate=3e-2, config={"weight_decay": 0.1})
    pruned = apply_plan(parse_plan("magnitude=0.6"), model, bench)
    *shrink, train = parse_plan(plan)
    for step in shrink:
        pruned = step.apply(pruned, bench)
    tuned = train.apply(pruned, bench)
    moved = 0
    for (name, linear), (_, before) in zip(trunk_linears(tuned), trunk_linears(pruned), strict=True):
        assert torch.equal(linear.weight == 0, before.weight == 0), name
        moved += int((linear.weight != before.weight).sum())
    assert moved > 20
