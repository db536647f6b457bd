"""Fewer branches: sums from cached contributions, greedy search, merging; oracles in float64."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress_helpers import bench_for, classifier, entropy, images, other_kinds
from paradepth.compress import Merge, Subset
from paradepth.compress.align import align, watch
from paradepth.compress.merge import Reading, _refit, absorb, average, read, relative_error
from paradepth.compress.subset import search
from paradepth.compress.sums import BranchSums
from paradepth.depth import Stack
from paradepth.nn import EncoderLayer

shapes = st.fixed_dictionaries(
    {
        "branches": st.integers(1, 4),
        "depth": st.integers(1, 2),
        "aggregate": st.sampled_from(["residual", "sum"]),
        "pool": st.sampled_from(["cls", "mean"]),
        "step": st.sampled_from([1.0, 0.5]),
    }
)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def orders(branches: int) -> list[tuple[int, ...]]:
    return [p for k in range(1, branches + 1) for p in itertools.permutations(range(branches), k)]


# ---- select and sums ---------------------------------------------------------------------------------------------


@given(shape=shapes, data=st.data())
def test_a_selected_model_is_the_sum_of_its_branches(shape: dict[str, Any], data: st.DataObject) -> None:
    model, (x, _) = classifier(**shape), images(3)
    chosen = data.draw(st.sampled_from(orders(shape["branches"])))
    smaller = model.select(chosen)
    state = model.stem(x)
    outputs = [model.trunk.branches[i](state) for i in chosen]
    total = sum(outputs) if shape["aggregate"] == "sum" else state + sum(g - state for g in outputs)
    close(smaller(x), model.head(total))
    assert smaller.config.branches == len(chosen)
    k = len(chosen)
    assert torch.equal(model.select(range(k))(x), model.truncate(k)(x))


def test_select_refuses_what_is_not_there_and_keeps_depths() -> None:
    model = classifier(branches=3, depths=(1, 2, 3)).train()
    for wrong in ([], [3], [-1], [0, 0]):
        with pytest.raises(ValueError, match="at least one of 0 to 2, each at most once"):
            model.select(wrong)
    with pytest.raises(ValueError, match="serial stack"):
        classifier(branches=0).select([0])
    chosen = model.select([2, 0])
    assert chosen.config.branch_depths == (3, 1)
    assert chosen.training


@given(shape=shapes, data=st.data())
def test_losses_of_subsets_are_those_of_the_selected_models(shape: dict[str, Any], data: st.DataObject) -> None:
    model, (x, targets) = classifier(**shape), images()
    subsets = data.draw(st.lists(st.sampled_from(orders(shape["branches"])), min_size=1, max_size=5))
    memory = data.draw(st.sampled_from([0, 4000, 2**30]))  # nothing, one batch or so, everything
    sums = BranchSums(model, bench_for(model, x, targets), memory=memory)
    for _ in range(2):
        found = sums.losses(subsets)
        assert found == pytest.approx([entropy(model.select(s), x, targets) for s in subsets], abs=1e-10)


@pytest.mark.parametrize("kind", ["texts", "language", "translation"])
def test_losses_of_subsets_of_other_models(kind: str) -> None:
    model, inputs, targets = other_kinds()[kind]
    subsets = [(0,), (2, 1), (0, 1, 2)]
    found = BranchSums(model, bench_for(model, inputs, targets)).losses(subsets)
    assert found == pytest.approx([entropy(model.select(s), inputs, targets) for s in subsets], abs=1e-10)


def test_a_branch_is_evaluated_once_for_each_batch() -> None:
    model, (x, targets) = classifier(branches=4), images(12)
    sums = BranchSums(model, bench_for(model, x, targets, evaluation_batch=5))
    calls = [0] * 4
    for i, branch in enumerate(sums.trunk.branches):
        branch.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    for subsets in ([(0,), (1,)], [(2, 3)], orders(4)):
        sums.losses(subsets)
    assert calls == [3] * 4


# ---- greedy search -----------------------------------------------------------------------------------------------


@given(shape=shapes, data=st.data())
def test_search_is_greedy_and_never_worse_than_the_prefix(shape: dict[str, Any], data: st.DataObject) -> None:
    model, (x, targets) = classifier(**shape), images()
    n = shape["branches"]
    count = data.draw(st.integers(1, n))
    bench = bench_for(model, x, targets)
    prefix, forward, backward = search(model, bench, count)
    assert prefix.branches == tuple(range(count))
    for found in (prefix, forward, backward):
        assert len(set(found.branches)) == count
        assert found.loss == pytest.approx(entropy(model.select(found.branches), x, targets), abs=1e-10)
    for k in range(1, count + 1):  # forward: no other branch would have helped more
        rest = [i for i in range(n) if i not in forward.branches[: k - 1]]
        best = min(entropy(model.select([*forward.branches[: k - 1], i]), x, targets) for i in rest)
        assert entropy(model.select(forward.branches[:k]), x, targets) == pytest.approx(best, abs=1e-10)
    if count == n - 1:  # backward: one step is exhaustive
        best = min(entropy(model.select(s), x, targets) for s in itertools.combinations(range(n), count))
        assert backward.loss == pytest.approx(best, abs=1e-10)
    smaller = Subset(count).apply(model, bench)
    assert entropy(smaller, x, targets) <= prefix.loss + 1e-12
    assert entropy(smaller, x, targets) == pytest.approx(min(forward.loss, backward.loss, prefix.loss), abs=1e-10)
    note = bench.notes[-1]
    close(smaller(x), model.select([i - 1 for i in note["branches"]])(x))
    assert note["loss"][note["by"]] == min(note["loss"].values())


# ---- aligning ----------------------------------------------------------------------------------------------------


def rotations(count: int, size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(count, size, size, dtype=torch.float64)).Q


def layer(heads: int = 3, bias: bool = True) -> EncoderLayer:
    made = EncoderLayer(12, heads=heads, head_width=4, mlp=10, bias=bias).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


@torch.no_grad()
def shuffled(original: EncoderLayer, heads: int) -> EncoderLayer:
    """The same function: heads and neurons in another order, queries and keys, and values, in other bases."""
    copy = layer(heads, original.attention.qkv.bias is not None)
    copy.load_state_dict(original.state_dict())
    order, neurons = torch.randperm(heads), torch.randperm(10)
    turn, turn_v = rotations(heads, 4), rotations(heads, 4)
    for parameter in copy.attention.qkv.parameters():
        q, k, v = parameter.view(3, heads, 4, -1)[:, order].unbind(0)
        turned = [t.transpose(1, 2) @ part for t, part in ((turn, q), (turn, k), (turn_v, v))]
        parameter.copy_(torch.stack(turned).view_as(parameter))
    out = original.attention.out.weight.view(12, heads, 4)[:, order]
    copy.attention.out.weight.copy_(torch.einsum("dhk,hkj->dhj", out, turn_v).reshape(12, -1))
    for parameter in copy.mlp.up.parameters():
        parameter.copy_(parameter[neurons])
    copy.mlp.down.weight.copy_(copy.mlp.down.weight[:, neurons])
    return copy


@given(heads=st.integers(1, 4), bias=st.booleans())
def test_aligning_undoes_permutations_and_rotations(heads: int, bias: bool) -> None:
    original = layer(heads, bias)
    other = shuffled(original, heads)
    x = torch.randn(6, 7, 12, dtype=torch.float64)
    rows = torch.ones(6, 7, dtype=torch.bool)
    close(other(x), original(x))
    pairs = [(watch(other, part, (), rows[:3])[1], watch(original, part, (), rows[:3])[1]) for part in x.split(3)]
    align(other, original, pairs)
    for name, value in original.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=1e-8)


@given(heads=st.integers(1, 4), bias=st.booleans())
def test_aligning_changes_nothing_of_what_a_layer_computes(heads: int, bias: bool) -> None:
    one, like = layer(heads, bias), layer(heads, bias)
    x = torch.randn(3, 7, 12, dtype=torch.float64)
    rows = torch.rand(3, 7) < 0.7
    before = one(x)
    align(one, like, [(watch(one, x, (), rows)[1], watch(like, x, (), rows)[1])])
    close(one(x), before)


# ---- merging -----------------------------------------------------------------------------------------------------


def readings(width: int = 12) -> list[Reading]:
    rows = torch.ones(4, 7, dtype=torch.bool)
    return [Reading(torch.randn(4, 7, width, dtype=torch.float64), (), rows) for _ in range(3)]


@pytest.mark.parametrize("step", [1.0, 0.5])
@pytest.mark.parametrize("zero", ["attention.out", "mlp.down"])
def test_merging_two_halves_of_a_branch_gives_the_branch(zero: str, step: float) -> None:
    whole = Stack([layer()], step=step)
    half = Stack([shuffled(whole.layers[0], 3)], step=step)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for stack in (whole, half):
            for parameter in stack.layers[0].get_submodule(zero).parameters():
                parameter.zero_()
    first = Stack([layer()], step=step)
    first.load_state_dict(whole.state_dict())
    with torch.no_grad():
        for stack in (first, half):
            for name in ("attention.out", "mlp.down"):
                for parameter in stack.layers[0].get_submodule(name).parameters():
                    parameter.mul_(0.5)
    data = readings()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    for refitted in (False, True):
        merged = average(first, half, data, refitted=refitted)
        close(merged(x), whole(x))
    unaligned = average(first, half, data, aligned=False, refitted=False)
    assert (unaligned(x) - whole(x)).abs().max() > 0.1, (
        "the halves are in different orders, so alignment has work to do"
    )


def gap(merged: Stack, one: Stack, other: Stack, data: list[Reading], aggregate: str) -> float:
    """Mean squared distance from what both branches add, by definition."""
    with torch.no_grad():
        state = torch.cat([r.x_BTD for r in data])
        wanted = one(state) + other(state) - (0 if aggregate == "sum" else state)
        return float((merged(state) - wanted).square().sum() / (wanted - state).square().sum())


@pytest.mark.parametrize("aggregate", ["residual", "sum"])
def test_the_refit_brings_the_merged_branch_nearer_to_the_sum(aggregate: str) -> None:
    one, other = (Stack([layer(), layer()]) for _ in range(2))
    data = readings()
    kept = [w.clone() for w in (*one.parameters(), *other.parameters())]
    plain = average(one, other, data, aggregate=aggregate, refitted=False)
    fitted = average(one, other, data, aggregate=aggregate)
    assert gap(fitted, one, other, data, aggregate) < 0.5 * gap(plain, one, other, data, aggregate)
    for merged in (plain, fitted):
        error = relative_error(merged, one, other, data, aggregate=aggregate)
        assert error == pytest.approx(gap(merged, one, other, data, aggregate), rel=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(kept, (*one.parameters(), *other.parameters()), strict=True))


@pytest.mark.parametrize("aggregate", ["residual", "sum"])
@pytest.mark.parametrize("step", [1.0, 0.5])
def test_a_branch_that_absorbs_another_is_nearer_to_the_sum_than_it_was(aggregate: str, step: float) -> None:
    one, other = (Stack([layer(), layer()], step=step) for _ in range(2))
    data = readings()
    merged = absorb(one, other, data, aggregate=aggregate)
    assert gap(merged, one, other, data, aggregate) < 0.9 * gap(one, one, other, data, aggregate)
    different = {n for n, w in merged.named_parameters() if not torch.equal(w, one.get_parameter(n))}
    assert different == {"layers.1.mlp.down.weight", "layers.1.mlp.down.bias"}
    # Least squares: what is left has nothing to do with the features that the last map reads.
    first, last = (cast(EncoderLayer, part) for part in merged.layers)
    state = torch.cat([r.x_BTD for r in data])
    with torch.no_grad():
        before = first(state, step=step)
        _, seen = watch(last, before, (), torch.ones(state.shape[:2], dtype=torch.bool))
        wanted = one(state) + other(state) - (0 if aggregate == "sum" else state)
        left = (merged(state) - wanted).flatten(0, 1)
    assert (seen.h_RM.T @ left).abs().max() < 1e-2
    assert left.sum(dim=0).abs().max() < 1e-2


@given(bias=st.booleans(), rows=st.integers(12, 30))
def test_the_refit_is_least_squares(bias: bool, rows: int) -> None:
    linear = torch.nn.Linear(6, 3, bias=bias).double()
    features, target = torch.randn(rows, 6).double(), torch.randn(rows, 3).double()
    given_x = torch.cat([features, features.new_ones(rows, 1)], dim=1) if bias else features
    best = torch.linalg.lstsq(given_x, target).solution
    with torch.no_grad():
        _refit(linear, [(features[:5], target[:5]), (features[5:], target[5:])])
        torch.testing.assert_close(linear(features), given_x @ best, rtol=0, atol=1e-4)  # the ridge is there as well
        exact = linear(features)
        weight = linear.weight.clone()
        _refit(linear, [(features, exact)])
        close(linear.weight, weight)


def test_the_most_similar_branches_are_merged_first() -> None:
    model, (x, targets) = classifier(branches=4), images()
    with torch.no_grad():
        model.trunk.branches[3].load_state_dict(model.trunk.branches[1].state_dict())
    bench = bench_for(model, x, targets)
    smaller = Merge(2).apply(model, bench)
    merges = bench.notes[-1]["merges"]
    assert merges[0]["branches"] == [2, 4]
    assert merges[0]["cosine"] == pytest.approx(1.0)
    assert len(merges) == 2
    for merge in merges:
        assert merge["errors"][merge["by"]] == min(merge["errors"].values())
    assert smaller.config == model.truncate(2).config
    three: Any = Merge(3).apply(model, bench)
    for k in (0, 2):  # the others stay, in their order
        close(three.trunk.branches[k](model.stem(x)), model.trunk.branches[k](model.stem(x)))
    assert torch.equal(Merge(4).apply(model, bench)(x), model(x))


def test_padding_does_not_count() -> None:
    model, tokens, targets = other_kinds()["texts"]
    longer = torch.nn.functional.pad(tokens[:, :5], (0, 2))
    found = []
    for inputs in (tokens[:, :5], longer):
        merged = Merge(2).apply(model, bench_for(model, inputs, targets))
        found.append(dict(merged.named_parameters()))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-8)
    rows = read(model, bench_for(model, longer, targets, training_batch=12), batches=1)[0].rows_BT
    assert torch.equal(rows, longer != 0)
