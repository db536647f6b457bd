"""What a task is to the training loop.

Shapes: B batch, … the shape of one sample's inputs or of its targets, M targets, N classes, n prefixes, K sums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from paradepth.distributed import World
from paradepth.models import TrunkModel, list_models, model_class, model_config
from paradepth.train.config import Config
from paradepth.train.evaluate import evaluate
from paradepth.train.gates import gate_fields

EVERY_TASK_TAKES = ("data", "data_dir", "validation_fraction", "train_fraction")  # options of the data group


class TrainingBatches(Protocol):
    """Batches that are a pure function of pass and index, such as `Batches` and `TextBatches`."""

    def __len__(self) -> int:
        """Batches of a pass."""
        ...

    def get(self, pass_index: int, batch_index: int) -> tuple[Any, Tensor]:
        """This rank's slice of a batch: inputs (B, …) and int64 targets (B, …)."""
        ...


class Task(ABC):
    """A kind of work with its data. The loop knows nothing more of it.

    Every task's model maps inputs (a tensor, or a tuple of tensors, with the samples along the first dimension) to
    logits over classes or over a vocabulary; the loss is their cross-entropy, the accuracy the share of targets that
    are the likeliest class. Targets that are `IGNORED` count in neither. What differs is here:

        config ─ check, load ─► data ─ data_shape ─► shape ─ new_model ─► model
                                 ├─ batches, prepare ─► training
                                 └─ ordered, measures, details ─► evaluation

    Args:
        config: all options of the run.
        data: with `name` and `to(device)`.

    Attributes:
        shape: configuration of the model that the data and the options ask for.
        unit: what one sample is, in the plural.
        evaluation_batch: samples that are evaluated at a time.

    Raises:
        ValueError: model options that do not fit the data.
    """

    model_class: ClassVar[type[TrunkModel]]
    data_names: ClassVar[tuple[str, ...]]
    kind: ClassVar[str]  # of data, for messages: "images", "text"
    score_names: ClassVar[tuple[str, ...]] = ()  # of `scores`
    tally_size: int = 0  # K of `tally`
    own_options: ClassVar[tuple[str, ...]] = ()  # options of the data group, besides EVERY_TASK_TAKES

    unit: str
    evaluation_batch: int

    def __init__(self, config: Config, data: Any) -> None:
        self.config = config
        self.data = data
        m = config.model_options
        given = {f.name: getattr(m, f.name) for f in fields(m) if getattr(m, f.name) != f.default}
        chosen = {name: value for name, value in given.items() if name != "model"}
        self.shape = model_config(m.model, **self.data_shape(), **chosen)

    # ---- before work starts --------------------------------------------------------------------------------

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuses a model for another kind of data, and options that mean nothing to this task.

        Raises:
            ValueError: naming the option, its value and what is allowed.
        """
        m, d = config.model_options, config.data_options
        if model_class(m.model) is not cls.model_class:
            fitting = [name for name in list_models() if model_class(name) is cls.model_class]
            raise ValueError(
                f"model is {m.model!r}, which is not for {cls.kind}, and data {d.data!r} is {cls.kind}; "
                f"take one of {', '.join(fitting)}"
            )
        known = {f.name for f in fields(cls.model_class.config_class)} | {"model"}
        foreign = [(m, f) for f in fields(m) if f.name not in known]
        foreign += [(d, f) for f in fields(d) if f.name not in (*EVERY_TASK_TAKES, *cls.own_options)]
        for group, option in foreign:
            value = getattr(group, option.name)
            if value != option.default:
                raise ValueError(
                    f"{option.name} is {value!r}; it means nothing to data {d.data!r}, which is {cls.kind}"
                )

    @classmethod
    @abstractmethod
    def load(cls, config: Config, *, assets: Path | None = None) -> Self:
        """The task with its data, on the CPU.

        Args:
            config: all options.
            assets: a run directory, or the folder of a saved model, whose `save_assets` files are used instead of
                making new ones from the data.

        Raises:
            ValueError: no or damaged data, or options out of range.
        """

    def save_assets(self, folder: Path) -> None:
        """Writes what the model needs besides its weights to be used, such as a tokeniser, next to them."""
        return

    def to(self, device: torch.device | str) -> Self:
        """The same task with its data on another device."""
        return type(self)(self.config, self.data.to(device))

    # ---- the model -----------------------------------------------------------------------------------------

    @abstractmethod
    def data_shape(self) -> dict[str, Any]:
        """The fields of the model's configuration that the data determine."""

    def new_model(self) -> Any:
        """A model of `shape` with fresh weights, drawn from torch's global generator."""
        return self.model_class(self.shape)

    def normalise(self, model: Any) -> None:
        """Gives a fresh model the statistics of the data that it carries with it."""
        return

    # ---- training ------------------------------------------------------------------------------------------

    def mean_tokens(self, model: Any) -> Any:
        """T of a training sample on average, or (S, T), which operations are counted for; `model.tokens` where all
        samples are full."""
        return model.tokens

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return ("train", "validation", "test")

    @abstractmethod
    def count(self, split: str) -> int:
        """Samples of a split."""

    @abstractmethod
    def batches(self, world: World) -> TrainingBatches:
        """The training batches of this process."""

    def prepare(self, inputs: Any, targets: Tensor, *, step: int, first: int) -> tuple[Any, Tensor]:
        """Inputs and targets of a training batch as model and loss take them: augmented, masked.

        Args:
            inputs, targets: from `batches`.
            step: of the run; with the seed it determines every draw.
            first: place of the first of these samples within the batch of all processes.
        """
        return inputs, targets

    # ---- evaluation ----------------------------------------------------------------------------------------

    @abstractmethod
    def ordered(self, split: str, start: int, stop: int) -> tuple[Any, Tensor]:
        """Samples start, start + 1, … stop − 1 of a split, those that exist: the model's inputs (B, …) and targets."""

    def measures(self, loss: list[float], split: str) -> dict[str, list[float]]:
        """What else is told of losses by prefix on a split: names and values by prefix."""
        return {}

    def tally(self, logits_nMN: Tensor, targets_M: Tensor) -> Tensor:
        """Of M targets of a split, what `scores` needs and can be added up: (n, K), K = `tally_size`, by prefix."""
        return logits_nMN.new_zeros(len(logits_nMN), self.tally_size)

    def scores(self, tally_nK: Tensor) -> dict[str, list[float]]:
        """What else is told of a split, from the sum of `tally` over it: names and values by prefix."""
        return {}

    def outputs(self, model: Any, split: str) -> dict[str, Any]:
        """What a finished model makes of a split, translations, say, and scores of it: too dear for every validation.
        On one process."""
        return {}

    def details(self, model: Any, split: str) -> dict[str, Any]:
        """What `evaluation.json` holds: means by prefix, and whatever shows what the model does. On one process."""
        result = evaluate(model, self, split, world=World(0, 1, next(model.parameters()).device))
        return {
            "split": split,
            "samples": self.count(split),
            "loss": result.loss,
            "accuracy": result.accuracy,
            "contribution": result.contribution,
            **gate_fields(model, self, split),
            **self.measures(result.loss, split),
            **result.scores,
            **self.outputs(model, split),
        }
