"""Early stop of a finished run: thresholds from the validation split, what they save on another split.

Shapes: n prefixes, B samples, N classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paradepth.atomic import write_json
from paradepth.branches import choose_executor
from paradepth.distributed import join_world
from paradepth.models import TrunkModel, from_pretrained
from paradepth.models.early_stop import EarlyStop, calibrate, check_early_stop, confidence, stopping_points
from paradepth.train.evaluate import in_order
from paradepth.train.run import read_run_config
from paradepth.train.tasks import Task, load_data

FILE = "early_stop.json"
TOLERANCES = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.05)


def early_stop_run(
    run_dir: str | Path,
    *,
    tolerance: float,
    split: str = "test",
    branches: int | None = None,
    data_dir: str | Path | None = None,
    device: str = "auto",
    branch_executor: str = "loop",
) -> dict[str, Any]:
    """Calibrates early stop on the validation split and measures it on another one; writes `early_stop.json`.

    Args:
        run_dir: a finished run of a classifier with branches.
        tolerance: loss of accuracy that is accepted, a part of 1.
        split: where it is measured.
        branches: use the first branches only.
        data_dir: where the data lies now; None takes the place that was used in training.
        device: "auto", "cpu" or "cuda".
        branch_executor: evaluates all branches of the samples that thresholds are found on.

    Returns:
        What was measured at `tolerance`, by stopping in earnest, and `curve`: accuracy against compute for several
        tolerances.

    Raises:
        ValueError: not such a run, no such split, no data, a tolerance out of range, or several processes.
    """
    config = read_run_config(run_dir)
    model: TrunkModel = from_pretrained(run_dir)
    if branches is not None:
        model = model.truncate(branches)
    check_early_stop(model)
    choose_executor(model.trunk, branch_executor)
    if not 0 <= tolerance < 1:
        raise ValueError(f"early_stop is {tolerance}; it is a loss of accuracy, at least 0 and below 1")
    if data_dir is not None:
        config = config.replace(data_dir=data_dir)
    with join_world(device) as world:
        if world.processes > 1:
            raise ValueError(f"early stop is measured on one process, and there are {world.processes}")
        task = load_data(config, assets=Path(run_dir)).to(world.device)
        for needed in ("validation", split):
            if needed not in task.splits or not task.count(needed):
                raise ValueError(f"data {task.data.name!r} has no samples in a split {needed!r}")
        model = model.to(world.device).eval()
        seen_nBN, seen_B = _prefix_logits(model, task, "validation")
        logits_nBN, targets_B = _prefix_logits(model, task, split)
        full = _accuracy(logits_nBN[-1], targets_B)
        curve = []
        for wanted in sorted({*TOLERANCES, tolerance}):
            thresholds = calibrate(seen_nBN, seen_B, tolerance=wanted)
            used_B = stopping_points(confidence(logits_nBN), thresholds)
            chosen_BN = logits_nBN[used_B - 1, torch.arange(len(used_B), device=used_B.device)]
            curve.append({"tolerance": wanted, **_measured(model, _accuracy(chosen_BN, targets_B), used_B, thresholds)})
        stop = EarlyStop(model, calibrate(seen_nBN, seen_B, tolerance=tolerance))
        found = [stop(inputs) for inputs, _ in in_order(task, split)]
        used_B = torch.cat([part.used_B for part in found])
        accuracy = _accuracy(torch.cat([part.logits_BN for part in found]), targets_B)
    result = {
        "run": str(run_dir),
        "split": split,
        "samples": len(targets_B),
        "branches": model.prefixes,
        "full_accuracy": full,
        "tolerance": tolerance,
        **_measured(model, accuracy, used_B, stop.thresholds),
        "curve": curve,
    }
    path = Path(run_dir) / FILE
    write_json(path, {key: value for key, value in result.items() if key != "run"})
    return {**result, "file": str(path)}


@torch.no_grad()
def _prefix_logits(model: TrunkModel, task: Task, split: str) -> tuple[Tensor, Tensor]:
    """Logits of all prefixes and targets of a split."""
    parts = [(model.prefix_logits(inputs).float(), targets_B) for inputs, targets_B in in_order(task, split)]
    return torch.cat([logits for logits, _ in parts], dim=1), torch.cat([targets for _, targets in parts])


def _accuracy(logits_BN: Tensor, targets_B: Tensor) -> float:
    return (logits_BN.argmax(dim=-1) == targets_B).double().mean().item()


def _measured(model: TrunkModel, accuracy: float, used_B: Tensor, thresholds: Sequence[float]) -> dict[str, Any]:
    """Accuracy and compute, means over samples; compute is that of full samples, padding included."""
    n, tokens = model.prefixes, model.tokens
    stopped_n = used_B.bincount(minlength=n + 1)[1:]
    head = model.head.flops(tokens)
    flops_n = [model.forward_flops(branches=k) + (k - 1) * head for k in range(1, n + 1)]  # a head after each branch
    layers = [branch.depth for branch in model.trunk.first(None)]  # pyright: ignore[reportCallIssue]
    layers_n = [sum(layers[:k]) for k in range(1, n + 1)]

    def mean(values: Sequence[int]) -> float:
        return sum(v * c for v, c in zip(values, stopped_n.tolist(), strict=True)) / max(len(used_B), 1)

    return {
        "stopping_accuracy": accuracy,
        "mean_branches": used_B.double().mean().item(),
        "layer_evals": mean(layers_n),
        "flops": mean(flops_n),
        "flops_of_full": model.forward_flops(branches=n),
        "stopped": stopped_n.tolist(),
        "thresholds": [None if math.isinf(t) else t for t in thresholds],
    }
