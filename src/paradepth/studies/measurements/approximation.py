"""Train models of a known function, of growing numbers of branches, and measure how far they are from it.

Shapes: N points, B batch, d dimensions, k active branches, n branches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from paradepth.branches import Batched, Branches
from paradepth.data.seeds import generator
from paradepth.studies._alignment import contributions, mean_cosine, updates
from paradepth.studies._approximator import Approximator, ApproximatorConfig
from paradepth.studies._known_function import KnownFunction, points
from paradepth.train.accounting import update_cost
from paradepth.train.config import OptimiserOptions
from paradepth.train.optimiser import Optimiser
from paradepth.train.schedules import Annealing, Schedule, build_schedule

Order = Literal["joint", "stagewise", "one_pass", "serial"]
ORDERS = ("joint", "stagewise", "one_pass", "serial")
_ALIGNMENT_POINTS = 512


@dataclass
class Trained:
    """A trained model, and what was seen on the way.

    Attributes:
        model: it.
        layer_evals: spent.
        stage_errors: relative error of the active prefix at the end of each stage.
        contribution_alignment, update_alignment: mean cosines at the times that were asked for.
    """

    model: Approximator
    layer_evals: float = 0.0
    stage_errors: list[float] = field(default_factory=list)
    contribution_alignment: list[float] = field(default_factory=list)
    update_alignment: list[float] = field(default_factory=list)


def measure(
    *,
    seed: int,
    data_dir: Path | None = None,
    run_dir: Path | None = None,
    source: Path | None = None,
    schedule: Order,
    depth: int,
    branches: Sequence[int] = (1, 2, 4, 8),
    dimension: int = 1,
    smoothness: float = 1.0,
    frequencies: int = 256,
    width: int = 8,
    heads: int = 2,
    mlp: int = 16,
    tokens: int = 4,
    layer_evals: float | None = None,
    steps: int | None = None,
    batch_size: int = 64,
    optimiser: Literal["adamw", "muon"] = "adamw",
    learning_rate: float = 0.02,
    train_points: int = 32768,
    test_points: int = 4096,
    aligned_at: Sequence[float] = (),
) -> dict[str, float | list[float]]:
    """Errors of models with `branches` branches of `depth` layers, or of serial stacks of as many layers in all.

    Training and test points are two draws from the same distribution, and there is no noise: the test error is that of
    the approximation, and of the optimiser that looked for it.

    Args:
        seed: draws function, points, batches and weights.
        data_dir, run_dir, source: not needed.
        schedule: order in which branches learn; "serial" has no branches.
        depth: layers of a branch.
        branches: numbers of branches, increasing.
        dimension, smoothness, frequencies: of the `KnownFunction`.
        width, heads, mlp, tokens: of the model.
        layer_evals: what the training of each model may spend. Or
        steps: what it may spend is that many updates of all its branches: more for larger models.
        batch_size, optimiser, learning_rate: as in `paradepth train`; one warm-up and cosine decay, no weight decay.
        train_points, test_points: their numbers.
        aligned_at: parts of the budget after which the alignment of branches is measured.

    Returns:
        By number of branches: `error` (relative, root mean square over the test points), `sizes` (learned parameters)
        and `terms` (of the function's own best partial sum with no larger error); of two numbers or more, `rate` and
        `rate_by_size`, the slopes of log error against the logarithms of branches and of sizes. Of the largest model:
        `largest_error`, `prefix_errors`, `stage_errors` (stagewise), `contribution_alignment` and `update_alignment`
        (at `aligned_at`), `parameters`, `layers` and `layer_evals`. What there is not is an empty list.

    Raises:
        ValueError: not one of `layer_evals` and `steps`, alignment of fewer than two branches, or other options out of
            range.

    >>> options = {"schedule": "stagewise", "depth": 1, "branches": [1, 2], "steps": 4, "train_points": 64}
    >>> found = measure(seed=0, **options)
    >>> found["sizes"], len(found["error"]), len(found["stage_errors"])
    ([609.0, 1209.0], 2, 2)
    """
    counts = list(branches)
    if not counts or counts[0] < 1 or any(a >= b for a, b in itertools.pairwise(counts)):
        raise ValueError(f"branches is {counts}; it must be increasing numbers, at least 1")
    if (layer_evals is None) == (steps is None) or not 0 < (layer_evals or steps or 0) < math.inf:
        raise ValueError(f"layer_evals is {layer_evals} and steps {steps}; give one of them, a positive number")
    if schedule not in ORDERS:
        raise ValueError(f"schedule is {schedule!r}; it must be one of {', '.join(ORDERS)}")
    for name, value in (("batch_size", batch_size), ("train_points", train_points), ("test_points", test_points)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    times = tuple(aligned_at)
    if times and (
        schedule == "serial" or counts[-1] < 2 or sorted(times) != list(times) or not 0 < times[0] <= times[-1] <= 1
    ):
        raise ValueError(
            f"aligned_at is {list(times)}; it must be increasing parts of the budget, above 0 and at most 1, and needs "
            f"two branches or more"
        )
    function = KnownFunction(dimension=dimension, smoothness=smoothness, frequencies=frequencies, seed=seed)
    u_Nd = points(train_points, dimension, seed=seed, purpose="training points")
    test_Nd = points(test_points, dimension, seed=seed, purpose="test points")
    data = (u_Nd, function(u_Nd).float()), (test_Nd, function(test_Nd).float())
    shape = ApproximatorConfig(
        width=width, heads=heads, mlp=mlp, tokens=tokens, dimension=dimension, depth=depth, branches=0
    )
    learning = OptimiserOptions(
        batch_size=batch_size, optimiser=optimiser, learning_rate=learning_rate, weight_decay=0.0
    )
    found: list[Trained] = []
    for n in counts:
        model = new_model(shape, schedule, n, seed=seed)
        budget = layer_evals if steps is None else float(steps * batch_size * n * depth)
        assert budget is not None
        order = build_schedule(
            "joint" if schedule == "serial" else schedule, list(model.parts()), Annealing(warmup=learning.warmup), {}
        )
        found.append(
            train(
                model,
                order,
                learning,
                *data,
                layer_evals=budget,
                seed=seed,
                aligned_at=times if n == counts[-1] else (),
            )
        )
    errors = [prefix_errors(one.model, *data[1]) for one in found]
    final, sizes = [by_prefix[-1] for by_prefix in errors], [_parameters(one.model) for one in found]
    result: dict[str, float | list[float]] = {
        "error": final,
        "sizes": sizes,
        "terms": [float(function.terms(error)) for error in final],
        "largest_error": final[-1],
    }
    if len(counts) > 1:
        result |= {"rate": slope([float(n) for n in counts], final), "rate_by_size": slope(sizes, final)}
    last = found[-1]
    return result | {
        "prefix_errors": errors[-1],
        "stage_errors": last.stage_errors,
        "contribution_alignment": last.contribution_alignment,
        "update_alignment": last.update_alignment,
        "parameters": sizes[-1],
        "layers": float(last.model.config.layers),
        "layer_evals": last.layer_evals,
    }


def _parameters(model: Approximator) -> float:
    return float(sum(p.numel() for p in model.parameters()))


def new_model(shape: ApproximatorConfig, schedule: Order, branches: int, *, seed: int) -> Approximator:
    """A fresh model of `branches` branches, or a serial stack of as many layers in all; branches start alike whatever
    the schedule."""
    serial = schedule == "serial"
    config = replace(shape, branches=0 if serial else branches, depth=shape.depth * (branches if serial else 1))
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(generator(seed, "weights", branches, shape.depth).get_state())
        model = Approximator(config)
    if isinstance(model.trunk, Branches):
        model.trunk.executor = Batched()
    return model


def train(
    model: Approximator,
    schedule: Schedule,
    options: OptimiserOptions,
    training: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    layer_evals: float,
    seed: int,
    aligned_at: Sequence[float] = (),
) -> Trained:
    """Minimise the mean square error on the training points until `layer_evals` are spent."""
    (u_Nd, y_N), result = training, Trained(model)
    optimiser, waiting = Optimiser(model, options), list(aligned_at)
    schedule.prepare(model)
    step = 0
    while result.layer_evals < layer_evals:
        active = schedule.active
        if schedule.advance(result.layer_evals / layer_evals):
            result.stage_errors.append(prefix_errors(model, *test)[active - 1])
        optimiser.set_rates(schedule.rates(result.layer_evals / layer_evals))
        (objective,) = schedule.objectives(0)
        index_B = torch.randint(len(u_Nd), (options.batch_size,), generator=generator(seed, "batch", step))
        if objective.weights is None:
            f_kB = model(u_Nd[index_B], branches=objective.prefix).unsqueeze(0)
        else:
            f_kB = model.prefix_logits(u_Nd[index_B], branches=objective.prefix)
        weight_k = torch.tensor(objective.weights or (1.0,))
        loss = weight_k @ (f_kB - y_N[index_B]).square().mean(dim=1) / weight_k.sum()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimiser.step()
        step += 1
        result.layer_evals += update_cost(model, objective, schedule.trainable()).layer_evals * options.batch_size
        # A few long steps may reach a time before the second branch joins; it is measured as soon as that one is there.
        while waiting and schedule.active > 1 and result.layer_evals >= waiting[0] * layer_evals:
            waiting.pop(0)
            _align(result, test, schedule.active)
    if result.stage_errors:
        result.stage_errors.append(prefix_errors(model, *test)[-1])
    return result


def _align(result: Trained, test: tuple[Tensor, Tensor], active: int) -> None:
    u_Nd, y_N = (part[:_ALIGNMENT_POINTS] for part in test)
    result.contribution_alignment.append(mean_cosine(contributions(result.model, u_Nd, branches=active)))
    result.update_alignment.append(mean_cosine(updates(result.model, u_Nd, y_N, branches=active)))


@torch.no_grad()
def prefix_errors(model: Approximator, u_Nd: Tensor, y_N: Tensor) -> list[float]:
    """Root mean square error of each prefix, relative to the function."""
    wrong_nN = model.prefix_logits(u_Nd) - y_N
    return (wrong_nN.square().mean(dim=1) / y_N.square().mean()).sqrt().tolist()


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the straight line, by least squares, through the logarithms of x and y: y falls as x to this power.

    >>> round(slope([1, 2, 4], [1.0, 0.25, 0.0625]), 6)
    -2.0
    """
    a, b = ([math.log(value) for value in values] for values in (x, y))
    middle = sum(a) / len(a)
    return sum((p - middle) * q for p, q in zip(a, b, strict=True)) / sum((p - middle) ** 2 for p in a)
