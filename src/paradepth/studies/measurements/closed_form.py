"""The closed form of random architectures and of trained models, and what it says about the trained ones.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
from torch import Tensor

from paradepth.branches import Branches
from paradepth.data.seeds import generator
from paradepth.depth import Stack
from paradepth.nn import EncoderLayer
from paradepth.studies.measurements._source import Source
from paradepth.theory import Explanation, explain, trunk_form
from paradepth.train.explain import chosen_batches

Figures = dict[str, float | list[float]]


def measure(
    *,
    seed: int,
    data_dir: Path | None,
    run_dir: Path,
    source: Path | None,
    state: Literal["trained", "initial"] = "trained",
    samples: int = 128,
) -> Figures:
    """What `paradepth.theory.explain` finds of the model of a finished run, on validation samples.

    Args:
        seed: of the run, whose first weights are drawn again for "initial".
        data_dir: where the data lies now.
        run_dir: not written to.
        source: the run.
        state: "trained", or "initial" for the same network before training.
        samples: how many to look at.

    Returns:
        `error` (of the closed form), means over layers (`attention`, `norms`, `gates`: variations; `active`,
        `steady`: parts) and over branches (`operator`: variation; `rank`: effective rank as a part of T·D), `largest`:
        the part of the largest branch in Σ|share| of the branches; and lists by layer, by branch and by singular value.

    Raises:
        ValueError: no source, a run of another seed, or another `state`.
    """
    if state not in ("trained", "initial"):
        raise ValueError(f"state is {state!r}; it must be 'trained' or 'initial'")
    run = Source.read(source, data_dir=data_dir, seed=seed)
    model = run.trained() if state == "trained" else run.initial()
    found = explain(model, chosen_batches(run.task, "validation", samples))
    return {"parameters": float(sum(p.numel() for p in model.parameters())), **figures(found)}


def figures(found: Explanation) -> Figures:
    """The numbers of an explanation that a study compares."""
    layers, branches = found.layers, found.branches
    size = found.tokens * found.width
    parts = [abs(branch.share) for branch in branches]
    spectra = [[value / branch.spectrum[0] for value in branch.spectrum] for branch in branches if branch.spectrum[0]]
    return {
        "layers": float(len(layers)),
        "error": found.error,
        "attention": mean(layer.attention for layer in layers),
        "norms": mean((layer.attention_norm + layer.mlp_norm) / 2 for layer in layers),
        "gates": mean(layer.gates for layer in layers),
        "active": mean(layer.active for layer in layers),
        "steady": mean(layer.steady for layer in layers),
        "operator": mean(branch.variation for branch in branches),
        "rank": mean(branch.effective_rank for branch in branches) / size,
        "largest": max(parts) / sum(parts) if sum(parts) else 0.0,
        "input_share": found.input_share,
        "attention_by_layer": [layer.attention for layer in layers],
        "gates_by_layer": [layer.gates for layer in layers],
        "operator_by_branch": [branch.variation for branch in branches],
        "rank_by_branch": [branch.effective_rank / size for branch in branches],
        "share_by_branch": [branch.share for branch in branches],
        "prefix_share_by_branch": [branch.prefix_share for branch in branches],
        "spectrum": [mean(values) for values in zip(*spectra, strict=True)],
    }


def architectures(*, seed: int, data_dir: Path | None, run_dir: Path, source: Path | None, count: int = 100) -> Figures:
    """The closed form against the network for random architectures, weights, inputs and masks, in double precision.

    Each is a trunk of 1 to 3 branches of 1 to 3 layers, with 1 to 4 heads of width 1 to 6, 1 to 8 tokens, any
    aggregate, step, mask, with and without causality and biases, weights 0.1 to 10 times as large as usual.

    Args:
        seed: of the architectures.
        data_dir: not read.
        run_dir: not written to.
        source: not read.
        count: how many.

    Returns:
        The largest relative error of the composition of blocks (`error`), of the single sum of hidden units in explicit
        matrices (`units_error`) and, of the branches of one layer alone, of that sum (`block_error`); the number of
        hidden units on average.

    Raises:
        ValueError: a count below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1")
    errors: dict[str, list[float]] = {"error": [0.0], "units_error": [0.0], "block_error": [0.0]}
    units = []
    for number in range(count):
        trunk, x_BTD, mask = random_trunk(generator(seed, "architectures", number))
        sides = () if mask is None else (mask,)
        with torch.no_grad():
            wanted_BTD, form = trunk(x_BTD, *sides), trunk_form(trunk, x_BTD, *sides)
            errors["error"].append(_error(form(x_BTD), wanted_BTD))
            summed = form.units()
            errors["units_error"].append(_error(summed(x_BTD).view_as(wanted_BTD), wanted_BTD))
        units.append(summed.count)
        if all(branch.serial_blocks == 0 for branch in form.branches):
            errors["block_error"].append(errors["units_error"][-1])
    return {**{name: max(values) for name, values in errors.items()}, "architectures": float(count),
            "units": mean(units)}  # fmt: skip


def random_trunk(draws: torch.Generator) -> tuple[Branches, Tensor, Tensor | None]:
    """A trunk in float64 with its input and mask."""

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draws))

    heads, head_width, per_head = pick(1, 4), pick(1, 6), pick(1, 4)
    B, T, width = pick(1, 3), pick(1, 8), heads * per_head
    options: dict[str, Any] = {"heads": heads, "head_width": head_width, "mlp": pick(1, 24), "bias": bool(pick(0, 1))}
    options["causal"] = bool(pick(0, 1))
    step, aggregate = (1.0, 0.5, 0.1)[pick(0, 2)], ("residual", "sum")[pick(0, 1)]
    stacks = [Stack([EncoderLayer(width, **options) for _ in range(pick(1, 3))], step=step) for _ in range(pick(1, 3))]
    trunk = Branches(stacks, aggregate=aggregate).double().eval()  # pyright: ignore[reportArgumentType]
    scale = 10.0 ** (2 * float(torch.rand((), generator=draws)) - 1)
    with torch.no_grad():
        for parameter in trunk.parameters():
            size = scale / parameter.shape[-1] ** 0.5
            parameter.copy_(size * torch.randn(parameter.shape, generator=draws, dtype=torch.float64))
    x_BTD = scale * torch.randn(B, T, width, generator=draws, dtype=torch.float64)
    mask = None
    if pick(0, 1):
        mask = (torch.rand(B, heads, T, T, generator=draws) < 0.6) | torch.eye(T, dtype=torch.bool)
    return trunk, x_BTD, mask


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-300))
