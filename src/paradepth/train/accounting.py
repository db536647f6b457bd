"""The compute of an update: layer evaluations and floating-point operations.

A layer evaluation is one layer on one sample, forward and backward. The backward pass has two products for each one
of the forward pass (gradients of inputs and of weights), so a layer without trainable weights costs 2/3 of it when
the gradient only passes through, and 1/3 when nothing before it learns either.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paradepth.branches import Branches
from paradepth.models import TrunkModel
from paradepth.models.sharing import own_parameters
from paradepth.train.budget import Budget
from paradepth.train.schedules import Objective

if TYPE_CHECKING:
    from paradepth.train.tasks import Task


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


def part_sizes(model: TrunkModel) -> dict[str, int]:
    """Number of parameters of each part of a model; those that several parts use count in the first of them.

    >>> from paradepth import create_model
    >>> list(part_sizes(create_model("paraformer_nano", branches=2)))
    ['stem', 'branch1', 'branch2', 'head']
    """
    return {name: sum(p.numel() for p in own) for name, own in own_parameters(model).items()}


def start_fields(
    model: TrunkModel, task: Task, budget: Budget, *, sizes: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """What the first event of a log holds: the size of every prefix, the budget, the samples.

    Args:
        model: of the run.
        task: with its data.
        budget: of the run.
        sizes: of the model's parts, where this process has only some of them.
    """
    sizes = part_sizes(model) if sizes is None else sizes
    counts, total = [], sizes["stem"] + sizes["head"]
    for name in list(sizes)[1:-1]:
        total += sizes[name]
        counts.append(total)
    prefixes = range(1, model.prefixes + 1)
    return {
        "parameters": counts[-1],
        "parameters_by_prefix": counts,
        "forward_flops": [model.forward_flops(branches=k if model.config.branches else None) for k in prefixes],
        "layers": model.config.layers,
        "budget": {"unit": budget.unit, "value": budget.value},
        **{f"{split}_samples": task.count(split) for split in ("train", "validation", "test")},
    }
