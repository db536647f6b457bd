"""Merging branches: one branch in the place of two, which adds about what both added.

Shapes: B batch, T tokens, R rows (tokens that count), D width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from paradepth.branches import Branches
from paradepth.compress.align import Activations, align, energies, watch
from paradepth.compress.prefix import BranchCount
from paradepth.compress.step import register
from paradepth.depth import Stack
from paradepth.models import TrunkModel
from paradepth.models.sharing import check_unshared
from paradepth.nn import EncoderLayer

if TYPE_CHECKING:
    from paradepth.compress.workbench import Workbench

_BATCHES = 8  # of training, that alignment and refit look at
_RIDGE = 1e-6  # of the refit, relative to the mean square of a feature


@dataclass(frozen=True)
class Reading:
    """One batch as the branches see it.

    Attributes:
        x_BTD: input of every branch.
        sides: what every layer gets besides.
        rows_BT: where tokens count, not padding.
    """

    x_BTD: Tensor
    sides: tuple[Any, ...]
    rows_BT: Tensor


@register
class Merge(BranchCount):
    """Merges branches, the two most similar ones at a time, until a number of them is left.

    Similar are branches whose contributions have the largest cosine over some training batches. Two are merged in three
    ways, of which the one that comes closest to the sum of both contributions is taken: averaged (`average`), or one of
    the two as it is, its last linear map refitted by least squares so that it also gives as much as it can of what the
    other one adds (`absorb`). So the result is never further from the sum than a model that leaves one of them out.

    Averaging suits branches that are nearly copies of each other; those of a trained model are not. On digits
    (4 branches × 2 layers, stagewise) the squared error of merging the first two, relative to their sum, was 1.26
    averaged, 1.11 with heads and neurons aligned, 0.49 refitted, aligned or not, and 0.09 absorbed; leaving out the
    second one is 0.18. Of the last two, of which one adds little: 0.038, 0.052, 0.012 and 0.007, and 0.062.

    Only branches of encoder layers of the same depth can be merged.

    >>> str(Merge.parse("2"))
    'merge=2'
    """

    name = "merge"

    def check(self, model: TrunkModel) -> None:
        super().check(model)
        strange = next((m for b in model.trunk.branches for m in b.layers if not isinstance(m, EncoderLayer)), None)  # pyright: ignore
        if strange is not None:
            raise ValueError(
                f"merge is for layers of an encoder, and this model has a {type(strange).__name__}; prefix and subset "
                "leave branches out instead"
            )
        if model.config.mixing == "static":
            raise ValueError(
                "merge aligns attention heads, and this model mixes tokens by static matrices; prefix and subset leave "
                "branches out instead"
            )
        if model.config.aggregate == "gated":
            raise ValueError(
                "merge makes one branch of two, and in a gated model each has its own gate, for both of which no one "
                "gate stands; prefix and subset leave branches out instead"
            )
        check_unshared(model.config, "merge gives branches new weights")
        kinds = len(set(model.config.branch_depths))
        if self.count < kinds:
            raise ValueError(
                f"merge is {self.count}, and the branches have {kinds} different depths; only those of one depth can "
                "be merged"
            )

    def apply(self, model: TrunkModel, bench: Workbench) -> TrunkModel:
        self.check(model)
        merged = copy.deepcopy(model).eval()
        merges = []
        while merged.prefixes > self.count:
            readings = read(merged, bench)
            first, second, cosine = _most_similar(merged, readings)
            trunk = merged.trunk
            assert isinstance(trunk, Branches)
            one, other = (cast(Stack, trunk.branches[index]) for index in (first, second))
            ways = {
                "averaged": average(one, other, readings, aggregate=trunk.aggregate),
                "first": absorb(one, other, readings, aggregate=trunk.aggregate),
                "second": absorb(other, one, readings, aggregate=trunk.aggregate),
            }
            errors = {
                way: relative_error(branch, one, other, readings, aggregate=trunk.aggregate)
                for way, branch in ways.items()
            }
            by = min(errors, key=lambda way: errors[way])
            one.load_state_dict(ways[by].state_dict())
            merges.append({"branches": [first + 1, second + 1], "cosine": cosine, "by": by, "errors": errors})
            merged = merged.select([index for index in range(merged.prefixes) if index != second])
        bench.note(self, merges=merges)
        return merged.eval()


@torch.no_grad()
def read(model: TrunkModel, bench: Workbench, *, batches: int = _BATCHES) -> list[Reading]:
    """The first training batches as the branches of `model` see them."""
    found = []
    for inputs, _ in bench.training_batches(batches):
        x_BTD, sides = model.embed(inputs)
        rows_BT = torch.ones(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device)
        if sides and isinstance(sides[0], Tensor):  # an attention mask: a token sees itself unless it is padding
            T = x_BTD.shape[1]
            rows_BT = sides[0].expand(len(x_BTD), 1, T, T).diagonal(dim1=-2, dim2=-1)[:, 0]
        found.append(Reading(x_BTD, sides, rows_BT))
    return found


@torch.no_grad()
def _most_similar(model: TrunkModel, readings: Sequence[Reading]) -> tuple[int, int, float]:
    """The branches, of one depth, whose contributions have the largest cosine, and that cosine."""
    trunk, n = model.trunk, model.prefixes
    assert isinstance(trunk, Branches)
    gram = torch.zeros(n, n, dtype=torch.float64)
    for reading in readings:
        delta_nR = trunk.contributions(reading.x_BTD, *reading.sides)[:, reading.rows_BT].flatten(1).double()
        gram += (delta_nR @ delta_nR.T).cpu()
    size = gram.diagonal().clamp(min=1e-300).sqrt()
    cosine = gram / size[:, None] / size[None]
    depths = model.config.branch_depths
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n) if depths[i] == depths[j]]
    i, j = max(pairs, key=lambda pair: cosine[pair].item())
    return i, j, cosine[i, j].item()


@torch.no_grad()
def average(
    one: Stack,
    other: Stack,
    readings: Sequence[Reading],
    *,
    aggregate: str = "residual",
    aligned: bool = True,
    refitted: bool = True,
) -> Stack:
    """A branch whose layers lie between those of two, and that adds about what they add together.

    Heads and neurons are aligned (`align`), the weights that read the state averaged, each unit weighing as much as it
    adds to the state, and the output projections refitted, layer by layer, so that the state behind each part is the
    sum of what both branches had there.

    Args:
        one, other: of encoder layers, of the same shape; left alone.
        readings: batches to align and refit on.
        aggregate: of the trunk; with "sum" the merged branch also has to give the input that one branch less adds.
        aligned: bring heads and neurons into one order before they are averaged.
        refitted: fit the output projections; otherwise they are those of both, added up.
    """
    one, other, merged = (copy.deepcopy(stack).eval() for stack in (one, other, one))
    states = [(reading.x_BTD,) * 3 for reading in readings]  # of one, of the other, of the merged branch
    for n in range(one.depth):
        a, b, m = (cast(EncoderLayer, stack.layers[n]) for stack in (one, other, merged))
        h = one.step_of(n)
        _fold_norms(a)
        _fold_norms(b)
        seen = [
            (watch(a, s, reading.sides, reading.rows_BT), watch(b, t, reading.sides, reading.rows_BT))
            for (s, t, _), reading in zip(states, readings, strict=True)
        ]
        sizes = [energies(layer, [w[k][1] for w in seen]) for k, layer in enumerate((a, b))]
        if aligned:
            order_H, order_M = align(b, a, [(of_b, of_a) for (_, of_a), (_, of_b) in seen])
            sizes[1] = sizes[1][0][order_H], sizes[1][1][order_M]
        _average_inputs(m, a, b, *(_share(*pair) for pair in zip(*sizes, strict=True)))
        extra = 1.0 if aggregate == "sum" and n == one.depth - 1 else 0.0
        after, wanted = [], []
        for (s, t, u), ((f, of_a), (g, of_b)), reading in zip(states, seen, readings, strict=True):
            rows = reading.rows_BT
            behind = (s - u) + (t - reading.x_BTD)  # what the merged state lacks already
            after.append((s + h * f, t + h * g))
            attention_RD = of_a.a_RD + of_b.a_RD + behind[rows] / h
            whole_RD = (f + g)[rows] + (behind[rows] + extra * reading.x_BTD[rows]) / h
            wanted.append((attention_RD, whole_RD))
        merged_states = [u for _, _, u in states]
        if refitted:
            _refit(
                m.attention.out,
                [(w.y_RI, t) for w, (t, _) in zip(_watched(m, merged_states, readings), wanted, strict=True)],
            )
            _refit(
                m.mlp.down,
                [(w.h_RM, t - w.a_RD) for w, (_, t) in zip(_watched(m, merged_states, readings), wanted, strict=True)],
            )
        states = [
            (s, t, u + h * m.residual(u, *reading.sides))
            for (s, t), u, reading in zip(after, merged_states, readings, strict=True)
        ]
    return merged


@torch.no_grad()
def absorb(one: Stack, other: Stack, readings: Sequence[Reading], *, aggregate: str = "residual") -> Stack:
    """The branch `one` with another last linear map, by which it adds about what both branches add together.

    Args:
        one, other: of encoder layers; left alone.
        readings: batches to fit on.
        aggregate: of the trunk.
    """
    merged = copy.deepcopy(one).eval()
    layer, h = cast(EncoderLayer, merged.layers[-1]), one.step_of(one.depth - 1)
    pairs = []
    for reading in readings:
        state = reading.x_BTD
        for n in range(one.depth - 1):
            state = merged.layers[n](state, *reading.sides, step=one.step_of(n))
        _, seen = watch(layer, state, reading.sides, reading.rows_BT)
        missing = (_wanted(one, other, reading, aggregate) - state)[reading.rows_BT] / h
        pairs.append((seen.h_RM, missing - seen.a_RD))
    _refit(layer.mlp.down, pairs)
    return merged


@torch.no_grad()
def relative_error(
    merged: Stack, one: Stack, other: Stack, readings: Sequence[Reading], *, aggregate: str = "residual"
) -> float:
    """Squared distance between what a merged branch adds and what two add together, relative to the latter's size."""
    distance = size = 0.0
    for reading in readings:
        wanted = _wanted(one, other, reading, aggregate)
        distance += float((merged(reading.x_BTD, *reading.sides) - wanted)[reading.rows_BT].square().sum())
        size += float((wanted - reading.x_BTD)[reading.rows_BT].square().sum())
    return distance / max(size, 1e-300)


def _wanted(one: Stack, other: Stack, reading: Reading, aggregate: str) -> Tensor:
    """What a branch in the place of two has to give, (B, T, D)."""
    both_BTD = one(reading.x_BTD, *reading.sides) + other(reading.x_BTD, *reading.sides)
    return both_BTD if aggregate == "sum" else both_BTD - reading.x_BTD


def _watched(layer: EncoderLayer, states: Sequence[Tensor], readings: Sequence[Reading]) -> list[Activations]:
    return [watch(layer, x, r.sides, r.rows_BT)[1] for x, r in zip(states, readings, strict=True)]


def _fold_norms(layer: EncoderLayer) -> None:
    """Moves the affine maps of the norms into the linear maps behind them: W (g·n + β) + b = (W g) n + (W β + b)."""
    for norm, linear in ((layer.attention_norm, layer.attention.qkv), (layer.mlp_norm, layer.mlp.up)):
        if norm.bias is not None and linear.bias is not None:
            linear.bias.add_(linear.weight @ norm.bias)
            norm.bias.zero_()
        linear.weight.mul_(norm.weight)
        norm.weight.fill_(1.0)


def _share(one: Tensor, other: Tensor) -> Tensor:
    """The part that `one` is of both together; a half where there is nothing of either."""
    total = one + other
    return torch.where(total > 0, one / total.clamp(min=1e-300), 0.5)


def _average_inputs(layer: EncoderLayer, a: EncoderLayer, b: EncoderLayer, share_H: Tensor, share_M: Tensor) -> None:
    """Means of what reads the state, in which heads and neurons of `a` weigh their shares and those of `b` the rest;
    sums of the output projections. The norms have no affine maps any more."""
    layer.load_state_dict(a.state_dict())
    share_O = share_H.repeat_interleave(layer.attention.head_width).repeat(3)
    for name, share in (("attention.qkv", share_O), ("mlp.up", share_M)):
        for key, value in layer.get_submodule(name).named_parameters():
            weight = share.to(value).view(-1, *[1] * (value.dim() - 1))
            value.lerp_(b.get_submodule(name).get_parameter(key), 1 - weight)
    for name in ("attention.out", "mlp.down"):
        for key, value in layer.get_submodule(name).named_parameters():
            value.add_(b.get_submodule(name).get_parameter(key))


def _refit(linear: nn.Linear, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Changes weight and bias, as little as needed, so that the map of features gives targets with the least squared
    error.

    Args:
        linear: changed in place; its present weights are what the ridge pulls to.
        pairs: features (R, in) and targets (R, out) of each batch.
    """
    size = linear.in_features + (linear.bias is not None)
    gram = torch.zeros(size, size, dtype=torch.float64, device=linear.weight.device)
    right = gram.new_zeros(size, linear.out_features)
    for features, target in pairs:
        x = features.double()
        if linear.bias is not None:
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        missing = target.double() - linear(features).double()
        gram += x.T @ x
        right += x.T @ missing
    scale = max(gram.diagonal().mean().item(), math.ulp(0.0))
    gram.diagonal().add_(_RIDGE * scale)
    change = torch.linalg.solve(gram, right)
    linear.weight.add_(change[: linear.in_features].T.to(linear.weight))
    if linear.bias is not None:
        linear.bias.add_(change[-1].to(linear.bias))
