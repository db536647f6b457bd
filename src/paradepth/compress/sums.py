"""Losses of sums of some branches, from contributions that are evaluated once.

A branch reads the same input whatever other branches are there, so the contributions δ_i(x) of all of them give every
sum of some: a thousand subsets cost little more than one evaluation of the full model.

Shapes: M targets, N classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from paradepth.branches import Branches
from paradepth.branches.gates import weighted
from paradepth.compress.workbench import Workbench, at_least_float32
from paradepth.depth.state import State, add, pack, subtract, total, unpack
from paradepth.models import TrunkModel
from paradepth.train.step import IGNORED, UNSEEN

_Batch = tuple[Any, Tensor, Any, list[State]]  # inputs, targets, x, contributions


class BranchSums:
    """Validation losses of sums of branches.

    Args:
        model: with branches, on the bench's device.
        bench: whose validation split is used.
        memory: bytes of contributions that are kept; those of further batches are evaluated anew at every call.
    """

    def __init__(self, model: TrunkModel, bench: Workbench, *, memory: int = 2**31) -> None:
        self.model, self.bench = copy.deepcopy(model).eval(), bench
        self.room = memory
        assert isinstance(self.model.trunk, Branches)
        self.trunk = self.model.trunk
        self._kept: list[_Batch] = []

    @torch.no_grad()
    def losses(self, subsets: Sequence[Sequence[int]]) -> list[float]:
        """The mean cross-entropy over the validation split of the sum of each of some subsets of the branches, which
        are counted from 0."""
        sums, counted = torch.zeros(len(subsets), dtype=torch.float64), 0
        for index, batch in enumerate(self.bench.validation_batches()):
            inputs, targets, x, deltas = self._kept[index] if index < len(self._kept) else self._evaluated(*batch)
            flat_M = targets.flatten()
            known_M = flat_M.masked_fill(flat_M <= UNSEEN, IGNORED)
            counted += int((known_M != IGNORED).sum())
            for place, subset in enumerate(subsets):
                logits_MN = at_least_float32(self.model.decode(self._sum(x, deltas, subset), inputs).flatten(0, -2))
                sums[place] += F.cross_entropy(logits_MN, known_M, ignore_index=IGNORED, reduction="sum").cpu()
        return (sums / max(counted, 1)).tolist()

    def _evaluated(self, inputs: Any, targets: Tensor) -> _Batch:
        x, sides = self.model.embed(inputs)
        outputs = self.trunk.executor.outputs(list(self.trunk.branches), x, *sides)  # pyright: ignore[reportArgumentType]
        deltas = [subtract(pack(g), pack(x)) for g in outputs]
        if self.trunk.aggregate == "gated":
            alphas = self.trunk.gates(x, *sides)
            deltas = [tuple(weighted(d, alpha) for d in delta) for delta, alpha in zip(deltas, alphas, strict=True)]
        batch = inputs, targets, x, deltas
        size = sum(part.numel() * part.element_size() for state in (pack(x), *deltas) for part in state)
        if size <= self.room:
            self.room -= size
            self._kept.append(batch)
        else:
            self.room = 0  # batches are kept from the first on
        return batch

    def _sum(self, x: Any, deltas: list[State], subset: Sequence[int]) -> Any:
        start = pack(x)
        if self.trunk.aggregate == "sum":
            start = tuple(len(subset) * part for part in start)
        return unpack(add(start, total([deltas[index] for index in subset])), like=x)
