"""How far a trained stack is from its own branch sum, per interval length: states, logits, and MGRIT's first guess."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from paradepth.depth import Stack
from paradepth.studies.measurements._source import Source
from paradepth.theory.branch_sum import (
    exact_states,
    first_guess,
    interval_distances,
    interval_lengths,
    output_distances,
)

Figures = dict[str, float | list[float]]


def measure(*, seed: int, data_dir: Path | None, run_dir: Path, source: Path | None, samples: int = 64) -> Figures:
    """The stack of a finished run, before training (the same seed) and after it, on validation samples.

    Args:
        seed: of the run, whose first weights are drawn again.
        data_dir: where the data lies.
        run_dir: not written to.
        source: the run of a serial stack.
        samples: how many to measure on.

    Raises:
        ValueError: no source, a run of another seed or of branches, or no sample.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; it must be at least 1")
    run = Source.read(source, data_dir=data_dir, seed=seed)
    inputs, _ = run.task.ordered("validation", 0, samples)
    found: Figures = {}
    lengths: list[int] = []
    for name, model in (("initial", run.initial()), ("trained", run.trained())):
        if not isinstance(model.trunk, Stack):
            raise ValueError(f"{source} is a run of branches; the distance to a branch sum is that of a serial stack")
        with torch.no_grad():
            x, sides = model.embed(inputs)
        found |= {f"{name}_{key}": value for key, value in of_stack(model.trunk, x, sides).items()}
        outputs, lengths = output_distances(model, inputs), interval_lengths(model.trunk.depth)
        found[f"{name}_logits"] = [distance.logits for distance in outputs]
        found[f"{name}_agreement"] = [distance.agreement for distance in outputs]
    return {"lengths": [float(length) for length in lengths], **found}


def of_stack(stack: Stack, x: Any, sides: tuple[Any, ...], *, counted: Tensor | None = None) -> dict[str, list[float]]:
    """Distances of a stack, each a list over `interval_lengths`.

    Returns:
        `increment` and `state`, means over all starts; `first_guess`, the largest error at a C-point of MGRIT's first
        guess with coarse operator `branch`, and `predicted`, what the errors of single intervals add up to there;
        `sampled`, the same error with the operator `sample`.
    """
    lengths = interval_lengths(stack.depth)
    known: dict[str, Any] = {"counted": counted, "states": exact_states(stack, x, *sides)}
    distances = interval_distances(stack, x, *sides, **known)
    guesses = [first_guess(stack, x, *sides, length=length, **known) for length in lengths]
    sampled = [first_guess(stack, x, *sides, length=length, coarse="sample", **known) for length in lengths]
    return {
        "increment": [mean(d.increment for d in distances if d.length == length) for length in lengths],
        "state": [mean(d.state for d in distances if d.length == length) for length in lengths],
        "first_guess": [max(guess.measured) for guess in guesses],
        "predicted": [max(guess.predicted) for guess in guesses],
        "sampled": [max(guess.measured) for guess in sampled],
    }
