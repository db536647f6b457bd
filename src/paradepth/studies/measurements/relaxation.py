"""A trained model with its attention replaced by the best static linear map: in each layer alone, in each branch alone,
and everywhere.

Shapes: B batch.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch

from paradepth.distributed import World
from paradepth.models import TrunkModel
from paradepth.nn import StaticMixing
from paradepth.studies.measurements._source import Source
from paradepth.theory.relax import layers_of, relax
from paradepth.train.evaluate import evaluate
from paradepth.train.tasks import Task

_WORLD = World(0, 1, torch.device("cpu"))


def measure(
    *,
    seed: int,
    data_dir: Path | None,
    run_dir: Path,
    source: Path | None,
    samples: int = 2048,
    tested: int = 2000,
) -> dict[str, float | list[float]]:
    """Relaxes the attention of a finished run and tests what is left.

    Args:
        seed: not used: the run has the seed that its data are drawn by.
        data_dir: folder of local data sets.
        run_dir: not used.
        source: the run.
        samples: training samples that are fitted to, without augmentation.
        tested: the first so many samples of the test split are evaluated.

    Returns:
        `accuracy` and `loss` of the model as it is, on these samples; `lost_everywhere` and `loss_everywhere`, the
        accuracy lost and the loss when all attention is replaced by least squares; the same with `_mean`, by the mean
        of A(x), and with `_nothing`, by nothing: no token sees another. `lost_by_layer` and, of a model with branches,
        `lost_by_branch`: by least squares in one of them alone. `error_by_layer`: what the fit of each layer leaves
        when all are replaced, E ‖a − â‖² / E ‖a‖².

    Raises:
        ValueError: no run, one that cannot be relaxed, or numbers below 1.
    """
    for name, value in (("samples", samples), ("tested", tested)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    run = Source.read(source, data_dir=data_dir, flip=False, crop_padding=0, rand_augment=None)
    model: TrunkModel = run.trained()
    inputs = _training_inputs(run.task, samples)
    part: Any = _First(run.task, tested)

    def scores(changed: TrunkModel) -> tuple[float, float]:
        result = evaluate(changed, part, "test", world=_WORLD)
        return result.accuracy[-1], result.loss[-1]

    def lost(layers: tuple[int, ...]) -> float:
        return accuracy - scores(relax(model, inputs, layers=layers).model)[0]

    accuracy, loss = scores(model)
    found: dict[str, float | list[float]] = {"accuracy": accuracy, "loss": loss}
    best, mean = relax(model, inputs), relax(model, inputs, how="mean").model
    everywhere = {
        "everywhere": best.model,
        "everywhere_mean": mean,
        "everywhere_nothing": _without(copy.deepcopy(mean)),
    }
    for name, changed in everywhere.items():
        reached, left = scores(changed)
        found |= {f"lost_{name}": accuracy - reached, f"loss_{name}": left}
    shape = model.config
    found["lost_by_layer"] = [lost((n,)) for n in range(shape.layers)]
    if shape.branches:
        found["lost_by_branch"] = [lost(layers_of(shape, i)) for i in range(shape.branches)]
    found["error_by_layer"] = list(best.errors.values())
    return found


def _training_inputs(task: Task, samples: int) -> list[Any]:
    """Inputs of the first training batches, which are drawn at random."""
    batches = task.batches(_WORLD)
    size = task.config.optimiser_options.batch_size
    count = min(math.ceil(samples / size), len(batches))
    return [task.prepare(*batches.get(0, i), step=i, first=0)[0] for i in range(count)]


@torch.no_grad()
def _without(model: TrunkModel) -> TrunkModel:
    """The relaxed model with matrices of zeros."""
    for module in model.modules():
        if isinstance(module, StaticMixing):
            module.mixing.zero_()
    return model


class _First:
    """A task with the first samples of its splits."""

    def __init__(self, task: Task, samples: int) -> None:
        self._task, self._samples = task, samples

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def count(self, split: str) -> int:
        return min(self._samples, self._task.count(split))

    def ordered(self, split: str, start: int, stop: int) -> Any:
        return self._task.ordered(split, start, min(stop, self._samples))
