"""What the gates of a model do on a split: how open they are, and what is left out below a threshold.

Shapes: n branches, B samples, T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paradepth.branches import Branches
from paradepth.distributed import World
from paradepth.models import TrunkModel
from paradepth.train.evaluate import in_order

if TYPE_CHECKING:
    from paradepth.train.tasks import Task


def gate_fields(model: TrunkModel, task: Task, split: str, *, world: World | None = None) -> dict[str, list[float]]:
    """Of each branch the mean of its gate over a split ("gate") and its standard deviation over samples, or tokens of a
    causal model ("gate_spread"): 0 where a gate does not look at its input. Empty for a model without gates."""
    trunk = model.trunk
    if not isinstance(trunk, Branches) or trunk.aggregate != "gated":
        return {}
    sums_n4 = _sums(model, task, split, world)
    mean_n, square_n = (sums_n4[:, :2] / sums_n4[:, 3:].clamp(min=1)).unbind(dim=1)
    spread_n = (square_n - mean_n.square()).clamp(min=0).sqrt()
    return {"gate": mean_n.tolist(), "gate_spread": spread_n.tolist()}


def routing_fields(model: TrunkModel, task: Task, split: str, *, world: World | None = None) -> dict[str, Any]:
    """What a model that leaves out branches runs on a split.

    Args:
        model: gated, with its trunk's `skip_below` set.
        task: with its data.
        split: of it.
        world: the processes that share the batches; None: this one alone.

    Returns:
        "skip_below"; "run", the part of the samples that each branch is run for; "branches_run" and "layer_evals",
        means over samples; and "layer_evals_saved", the part of the layers of the full model that is not evaluated.
    """
    trunk = model.trunk
    assert isinstance(trunk, Branches)
    sums_n4 = _sums(model, task, split, world)
    run = (sums_n4[:, 2] / sums_n4[:, 3].clamp(min=1)).tolist()
    depths = [branch.depth for branch in trunk.first(None)]
    evaluated = sum(part * depth for part, depth in zip(run, depths, strict=True))
    return {
        "skip_below": trunk.skip_below,
        "run": run,
        "branches_run": sum(run),
        "layer_evals": evaluated,
        "layer_evals_saved": 1.0 - evaluated / sum(depths),
    }


@torch.no_grad()
def _sums(model: TrunkModel, task: Task, split: str, world: World | None) -> Tensor:
    """Of each branch Σ α, Σ α², how often it is run, and the number of samples or tokens, (n, 4)."""
    trunk = model.trunk
    assert isinstance(trunk, Branches)
    was_training = model.training
    model.eval()
    sums_n4 = torch.zeros(len(trunk), 4, dtype=torch.float64, device=model.device)
    for inputs, _ in in_order(task, split, world=world):
        alphas_nB = model.gates(inputs).flatten(1)
        run_nB = trunk.needed(alphas_nB)
        alphas_nB = alphas_nB.double()
        counts_nB = torch.ones_like(alphas_nB)
        columns = [alphas_nB, alphas_nB.square(), run_nB.double(), counts_nB]
        sums_n4 += torch.stack([column.sum(dim=1) for column in columns], dim=1)
    model.train(was_training)
    return sums_n4 if world is None else world.sum(sums_n4)
