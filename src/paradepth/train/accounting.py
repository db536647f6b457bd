"""The compute of an update: layer evaluations and floating-point operations.

A layer evaluation is one layer on one sample, forward and backward. The backward pass has two products for each one
of the forward pass (gradients of inputs and of weights), so a layer without trainable weights costs 2/3 of it when
the gradient only passes through, and 1/3 when nothing before it learns either.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from paradepth.branches import Branches
from paradepth.models import TrunkModel
from paradepth.train.schedules import Objective


@dataclass(frozen=True)
class Cost:
    """Compute spent: layer evaluations and floating-point operations."""

    layer_evals: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.layer_evals + other.layer_evals, self.flops + other.flops)

    def __mul__(self, samples: int) -> Cost:
        return Cost(self.layer_evals * samples, self.flops * samples)


def update_cost(model: TrunkModel, objective: Objective, trainable: Collection[str], *, tokens: Any = None) -> Cost:
    """Cost of one update with `objective` for one sample, when only the parts in `trainable` learn.

    Operations are those of a sample of `tokens` tokens, (S, T) for a joined state; by default of a full sample.

    >>> from paradepth import create_model
    >>> model = create_model("paraformer_nano", branches=4, depth=2)
    >>> update_cost(model, Objective(3), model.parts()).layer_evals
    6.0
    """
    tokens = model.tokens if tokens is None else tokens
    stem = "stem" in trainable
    stacks = (
        {f"branch{i}": branch for i, branch in enumerate(list(model.trunk.branches)[: objective.prefix], start=1)}
        if isinstance(model.trunk, Branches)
        else {"trunk": model.trunk}
    )
    evals = flops = 0.0
    stack: Any
    for name, stack in stacks.items():
        part = 1.0 if name in trainable else 2 / 3 if stem else 1 / 3
        evals += part * stack.depth
        flops += 3 * part * stack.flops(tokens)
    heads = 1 if objective.weights is None else objective.prefix
    flops += model.stem.flops() * (2 if stem else 1) + 3 * heads * model.head.flops(tokens)
    return Cost(evals, flops)
