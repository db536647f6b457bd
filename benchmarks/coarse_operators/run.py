"""Which coarse operator makes few MGRIT iterations enough? `sample`, `branch` and `half` against serial depth.

A byte-level language model of N pre-LN causal layers is trained serially. On passages that it was not trained on,
states and gradients of MGRIT are compared with the exact ones, in float64, for every

    step size h  x  training so far  x  coarsening c  x  coarse operator  x  relaxation

The same operator and relaxation serve both passes. Cost is counted in layer evaluations, as the executor reports them,
and in sequential depth, the longest chain of evaluations that wait for each other (`chain`).

    python benchmarks/coarse_operators/run.py --text input.txt --processes 2 \\
        --out benchmarks/coarse_operators/result.json
    python benchmarks/coarse_operators/plot.py benchmarks/coarse_operators/result.json

Weights are kept in the folder --cache, so that a second call only measures.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from network import Network, Recipe, draw, load, train
from tables import tables
from torch import Tensor

from paradepth.atomic import write_json
from paradepth.data.text import load_text
from paradepth.depth import MGRIT, Serial, coarse_operator
from paradepth.distributed import World
from paradepth.train.environment import command_line, environment

OPERATORS = ("sample", "branch", "half")
RELAXATIONS = ("F", "FCF")
FORWARD = (0, 1, 2, 3)  # iterations after which states are compared
PAIRS = ((0, 0), (1, 0), (1, 1), (2, 1), (2, 2), ("serial", 1))  # forward and backward iterations of gradients


@dataclass(frozen=True)
class Setting:
    """One MGRIT method."""

    coarsening: int
    coarse: str
    relaxation: str

    def executor(self) -> MGRIT:
        """The executor; iterations are set later."""
        return MGRIT(
            coarsening=self.coarsening,
            coarse=self.coarse,
            relaxation=self.relaxation,  # pyright: ignore[reportArgumentType]
            backward_iterations="serial",
        )


def chain(setting: Setting, *, layers: int, iterations: int | str) -> int:
    """Sequential depth of one pass: the longest chain of layer evaluations that wait for each other.

    With N layers between the buffers in n = N/c intervals, s evaluations in a row a coarse step, m = 1 (F) or 2 (FCF):

        (m·k + 1)·c + (n − 1 − m·k)·s        k iterations, m·k ≤ n − 1
        N                                    from there on, and serially

    The first m·k C-points follow one another exactly, c layers each; coarse steps lead from there to the last C-point,
    and the last interval is relaxed. Everything else finds its inputs ready while that goes on.

    >>> chain(Setting(4, "branch", "F"), layers=32, iterations=1)
    14
    """
    if isinstance(iterations, str):
        return layers
    c, n = setting.coarsening, layers // setting.coarsening
    exact = iterations * (2 if setting.relaxation == "FCF" else 1)
    if exact >= n - 1:
        return layers
    return (exact + 1) * c + (n - 1 - exact) * coarse_operator(setting.coarse).sequential(c)


def compare(exact: Sequence[Tensor], found: Sequence[Tensor]) -> dict[str, float]:
    """Cosine, relative norm and relative error of a gradient in several tensors."""
    a, b = (torch.cat([part.flatten() for part in parts]) for parts in (exact, found))
    return {
        "cosine": (a @ b / (a.norm() * b.norm())).item(),
        "norm": (b.norm() / a.norm()).item(),
        "error": ((b - a).norm() / a.norm()).item(),
    }


def finite(value: float) -> float | None:
    """The number to six digits; None where a pass has diverged, which JSON has no number for."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


@dataclass
class Exact:
    """What serial depth gives for a batch."""

    loss: float
    states: list[Tensor]
    gradient: tuple[Tensor, ...]


def measure_serial(network: Network, tokens_BT: Tensor) -> Exact:
    """The reference: states, loss and gradient of serial depth."""
    loss = network.loss(tokens_BT, executor=Serial())
    states = network.states()
    return Exact(loss.item(), states, torch.autograd.grad(loss, list(network.parameters())))


def measure(network: Network, tokens_BT: Tensor, setting: Setting, exact: Exact) -> dict[str, Any]:
    """Errors and costs of one method on one network."""
    executor, between = setting.executor(), network.stack.between
    buffers = network.stack.depth - len(between)

    def cost(evaluations: int, iterations: int | str) -> dict[str, int]:
        length = chain(setting, layers=len(between), iterations=iterations)
        return {"evaluations": evaluations + buffers, "chain": length + buffers}

    parameters = list(network.parameters())
    states, gradients = [], []
    for forward in dict.fromkeys([*FORWARD, *(pair[0] for pair in PAIRS)]):
        executor.forward_iterations = forward
        loss = network.loss(tokens_BT, executor=executor)
        forward_cost = cost(executor.report.forward.evaluations, forward)
        for backward in ["serial"] * (forward != "serial") + [b for f, b in PAIRS if f == forward]:
            executor.backward_iterations = backward
            found = torch.autograd.grad(loss, parameters, retain_graph=True)
            if backward == "serial":  # has called each layer once, at the state where the forward pass left it
                at, points = network.states(), between[:: setting.coarsening][1:]
                error = max(((at[n] - exact.states[n]).norm() / exact.states[n].norm()).item() for n in points)
                states.append(
                    {"iterations": forward, "error": finite(error), "loss": finite(loss.item()), **forward_cost}
                )
            gradients.append(
                {
                    "forward": forward,
                    "backward": backward,
                    **{name: finite(value) for name, value in compare(exact.gradient, found).items()},
                    "forward_cost": forward_cost,
                    "backward_cost": cost(executor.report.backward.evaluations, backward),
                }
            )
    return {**asdict(setting), "states": states, "gradients": gradients}


def study(step_name: str, options: argparse.Namespace, recipe: Recipe) -> list[dict[str, Any]]:
    """Trains and measures the networks of one step size."""
    torch.set_num_threads(options.threads)
    step = recipe.step(step_name)
    text = load_text("text", data_dir=options.text)
    files = train(text.train, recipe, step=step, saves=options.training, cache=options.cache)
    tokens_BT = draw(text.validation, options.passages, recipe.context + 1, torch.Generator().manual_seed(recipe.seed))
    rows = []
    for count in options.training:
        network, losses = load(files[count], recipe, step=step)
        exact = measure_serial(network, tokens_BT)
        about = {
            "h": step_name,
            "training": count,
            "training_loss": finite(sum(losses[-20:]) / len(losses[-20:])) if losses else None,
            "loss": finite(exact.loss),
        }
        for values in itertools.product(options.coarsening, OPERATORS, RELAXATIONS):
            rows.append(about | measure(network, tokens_BT, Setting(*values), exact))
        print(f"h = {step_name}: measured after {count} training steps", file=sys.stderr, flush=True)
    return rows


def parse() -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description="Coarse operators of MGRIT against serial depth.")
    parser.add_argument("--text", type=Path, required=True, help="text file to train and measure on")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "paradepth-coarse-operators", help="for weights"
    )
    parser.add_argument("--steps", nargs="+", choices=["1/N", "1"], default=["1/N", "1"], help="step sizes h")
    parser.add_argument("--training", nargs="+", type=int, default=[0, 200, 600], help="training steps")
    parser.add_argument("--coarsening", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--passages", type=int, default=4, help="passages of the measured batch")
    parser.add_argument("--processes", type=int, default=1, help="step sizes worked on at once")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch in each process")
    for name in ("layers", "width", "heads", "context", "batch", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Recipe, name))
    parser.add_argument("--embedding", type=float, default=Recipe.embedding, help="standard deviation of embeddings")
    parser.add_argument("--buffers", type=int, default=Recipe.buffers, help="serial layers of step 1 at either end")
    options = parser.parse_args()
    for name in ("passages", "processes", "threads", "layers", "width", "heads", "context", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it must be at least 1")
    if min(options.training) < 0:
        parser.error(f"--training is {options.training}; numbers of steps cannot be negative")
    between = options.layers - 2 * options.buffers
    if options.buffers < 0 or between < 1:
        parser.error(f"--buffers {options.buffers} at either end do not fit {options.layers} layers")
    for c in options.coarsening:
        if c < 2 or between % c or between // c < 2:
            parser.error(f"--coarsening {c} does not cut {between} layers into equal intervals, at least two")
    return options


def main() -> None:
    options = parse()
    shape = ("layers", "width", "heads", "context", "batch", "seed", "embedding", "buffers")
    recipe = Recipe(**{name: getattr(options, name) for name in shape})
    torch.set_num_threads(options.threads)
    about = environment(
        World(0, 1, torch.device("cpu")), autocast=None, command=f"python benchmarks/coarse_operators/{command_line()}"
    )
    about["precision"] = "float32 in training, float64 in measurements"
    try:
        if options.processes == 1:
            parts = [study(step, options, recipe) for step in options.steps]
        else:
            with ProcessPoolExecutor(options.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
                runs = [pool.submit(study, step, options, recipe) for step in options.steps]
                parts = [run.result() for run in runs]
    except ValueError as error:
        sys.exit(f"error: {error}")
    rows = list(itertools.chain(*parts))
    settings = {**asdict(recipe), "passages": options.passages, "text": options.text.name}
    result = {"environment": about, "settings": settings, "results": rows}
    if options.out:
        write_json(options.out, result, indent=None)  # a few thousand numbers
    print(tables(result))


if __name__ == "__main__":
    main()
