"""What shrinking a model needs besides the model: its data, a way to measure, a way to train it further.

Shapes: B batch, … targets of a sample, M targets, N classes.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from paradepth.compress.step import Step
from paradepth.distributed import World, process_count
from paradepth.distributed.world import pick_device
from paradepth.models import TrunkModel, from_pretrained
from paradepth.models.pretrained import quantisation_of
from paradepth.models.quantised import check_learns
from paradepth.nn import set_dropout_key
from paradepth.train.config import Config
from paradepth.train.evaluate import Evaluation, evaluate, in_order
from paradepth.train.optimiser import Optimiser
from paradepth.train.precision import autocast_dtype
from paradepth.train.run import read_run_config
from paradepth.train.schedules import Annealing
from paradepth.train.step import IGNORED, split
from paradepth.train.tasks import Task, load_data
from paradepth.train.trainer import NonFiniteLoss


@dataclass(frozen=True, eq=False)
class Workbench:
    """A task with its data and the full model, on one process and one device.

    Everything that is random follows from the seed of the run and from counters, so the same steps give the same model.

    Attributes:
        config: options of the run that made the model.
        task: with its data on the model's device.
        teacher: the full model, in evaluation mode; never changed.
        learning_rate: peak of `tune`, by AdamW; None is half the run's.
        warmup: part of `tune`'s steps spent warming up; a cosine leads to zero from there.
        temperature: T of distillation.
        teacher_weight: w of distillation, of the loss (1 − w) · cross-entropy + w · T² · KL(teacher ‖ student), both
            distributions softened by T. Source: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network
            (arXiv 1503.02531).
        notes: what steps found on their way, in order: {"step": "subset=2", "branches": [3, 1], …}.

    Raises:
        ValueError: numbers out of range, a quantised model, or data without a validation split, which all choices are
            made on.
    """

    config: Config
    task: Task
    teacher: TrunkModel
    learning_rate: float | None = None
    warmup: float = 0.1
    temperature: float = 2.0
    teacher_weight: float = 0.7
    notes: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, value, ok, allowed in (
            ("learning_rate", self.learning_rate, 0 < self.rate < math.inf, "positive"),
            ("temperature", self.temperature, 0 < self.temperature < math.inf, "positive"),
            ("teacher_weight", self.teacher_weight, 0 <= self.teacher_weight <= 1, "between 0 and 1"),
        ):
            if not ok:
                raise ValueError(f"{name} is {value}; it must be {allowed}")
        check_learns(self.teacher.quantisation, "the model")
        Annealing(warmup=self.warmup)  # refuses what cannot be
        if not self.task.count("validation"):
            raise ValueError(
                f"data {self.task.data.name!r} has no validation samples, and choices are made on them; train with a "
                "validation_fraction above 0"
            )
        self.teacher.eval()

    @classmethod
    def of_run(
        cls, run_dir: str | Path, *, data_dir: str | Path | None = None, device: str = "auto", **options: Any
    ) -> Self:
        """The bench for the model of a finished run.

        Args:
            run_dir: the run.
            data_dir: where the data lies now; None takes the place that was used in training.
            device: "auto", "cpu" or "cuda".
            options: further attributes, by name.

        Raises:
            ValueError: not a finished run, no data, no such device, several processes, or attributes out of range.
        """
        if process_count() > 1:
            raise ValueError(f"a model is shrunk by one process, and there are {process_count()}; start one")
        config = read_run_config(run_dir)
        model: TrunkModel = from_pretrained(run_dir)
        if data_dir is not None:
            config = config.replace(data_dir=data_dir)
        where = pick_device(device)
        task = load_data(config, assets=Path(run_dir)).to(where)
        return cls(config, task, model.to(where), **options)

    @property
    def device(self) -> torch.device:
        """Where the model and the data are."""
        return self.teacher.device

    @property
    def rate(self) -> float:
        """Peak learning rate of `tune`."""
        return 0.5 * self.config.optimiser_options.learning_rate if self.learning_rate is None else self.learning_rate

    @property
    def _world(self) -> World:
        return World(0, 1, self.device)

    def note(self, step: Step, **found: Any) -> None:
        """Adds to `notes` what a step found."""
        self.notes.append({"step": str(step), **found})

    # ---- data ----------------------------------------------------------------------------------------------

    def training_batches(self, count: int) -> Iterator[tuple[Any, Tensor]]:
        """Inputs and targets of the first `count` batches of training, as the model and the loss take them."""
        batches = self.task.batches(self._world)
        for step in range(count):
            inputs, targets = batches.get(*divmod(step, len(batches)))
            yield self.task.prepare(inputs, targets, step=step, first=0)

    def validation_batches(self) -> Iterator[tuple[Any, Tensor]]:
        """Inputs and targets of the validation split, in order."""
        return in_order(self.task, "validation")

    # ---- measuring -----------------------------------------------------------------------------------------

    def validate(self, model: TrunkModel) -> Evaluation:
        """Means of every prefix of `model` over the validation split, in the model's own number format."""
        return evaluate(model, self.task, "validation", world=self._world)

    def test(self, model: TrunkModel) -> dict[str, float]:
        """Accuracy and loss of the full sum over the test split: for what has been chosen."""
        found = evaluate(model, self.task, "test", world=self._world)
        return {"accuracy": found.accuracy[-1], "loss": found.loss[-1]}

    # ---- training ------------------------------------------------------------------------------------------

    def tune(
        self,
        model: TrunkModel,
        *,
        steps: int,
        teacher: TrunkModel | None = None,
        masks: Mapping[str, Tensor] | None = None,
    ) -> TrunkModel:
        """Trains a copy of the model on the loss of its full sum: AdamW, linear warm-up, cosine to zero.

        Batch size, weight decay, clipping, label smoothing and precision are those of the run.

        Args:
            model: on the bench's device; left alone.
            steps: updates, at least 1.
            teacher: the model whose full sum is imitated besides; None trains on the targets alone.
            masks: by name of a parameter, where it may differ from zero (True); elsewhere it is kept at zero.

        Returns:
            The trained model, in evaluation mode.

        Raises:
            ValueError: no steps, a quantised model, a mask for no parameter, or a teacher of other classes.
            NonFiniteLoss: the loss or the gradient became infinite or not a number.
        """
        if steps < 1:
            raise ValueError(f"steps is {steps}; it must be at least 1")
        check_learns(model.quantisation, "the model")
        student = copy.deepcopy(model).train()
        kept = _kept(student, masks or {})
        o = self.config.optimiser_options
        optimiser = Optimiser(
            student, dataclasses.replace(o, optimiser="adamw", momentum=None, learning_rate=self.rate)
        )
        anneal = Annealing(warmup=self.warmup)
        with torch.random.fork_rng(devices=[]):  # whatever a foreign layer draws
            torch.manual_seed(self.config.run_options.seed)
            for step, (inputs, targets) in enumerate(self.training_batches(steps)):
                optimiser.set_rates(dict.fromkeys(student.parts(), anneal((step + 1) / (steps + 1))))
                optimiser.zero_grad()
                set_dropout_key(student, seed=self.config.run_options.seed, step=step)
                loss = self._backward(student, teacher, inputs, targets)
                norm = torch.nn.utils.clip_grad_norm_(student.parameters(), o.clip or math.inf, foreach=True)
                if not math.isfinite(loss + norm.item()):
                    raise NonFiniteLoss(
                        f"loss {loss}, gradient norm {norm.item()} at step {step} of {steps} of training the shrunk "
                        f"model further; nothing was written. Try a learning rate below {self.rate}"
                    )
                optimiser.step()
                with torch.no_grad():
                    for parameter, mask in kept:
                        parameter.mul_(mask)
        for parameter in student.parameters():
            parameter.grad = None
        return student.eval()

    def _backward(self, student: TrunkModel, teacher: TrunkModel | None, inputs: Any, targets: Tensor) -> float:
        """The loss of a batch, cut into as many parts as in training; gradients are added to the parameters'."""
        parts = self.config.optimiser_options.accumulate
        counted = max((targets != IGNORED).sum().item(), 1)
        loss = 0.0
        for part, part_targets in zip(split(inputs, parts), targets.chunk(parts), strict=True):
            with self.autocast():
                logits = student(part)
                with torch.no_grad():
                    wanted = None if teacher is None else teacher(part)
            if wanted is not None and wanted.shape != logits.shape:
                raise ValueError(
                    f"the teacher's logits have shape {tuple(wanted.shape)} and the model's {tuple(logits.shape)}; "
                    "they must have the same classes"
                )
            part_loss = self.loss(logits, part_targets, wanted) / counted
            part_loss.backward()
            loss += part_loss.item()
        return loss

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast as the run was trained with."""
        dtype = autocast_dtype(self.config.run_options.precision, self.device)
        return torch.autocast(self.device.type, dtype=dtype) if dtype else nullcontext()

    def loss(self, logits: Tensor, targets: Tensor, wanted: Tensor | None = None) -> Tensor:
        """The loss that `tune` minimises, summed over the targets that count.

        Args:
            logits: (B, …, N).
            targets: (B, …).
            wanted: the teacher's logits, where there is one.
        """
        logits_MN, targets_M = at_least_float32(logits).flatten(0, -2), targets.flatten()
        entropy = F.cross_entropy(
            logits_MN,
            targets_M,
            ignore_index=IGNORED,
            label_smoothing=self.config.optimiser_options.label_smoothing,
            reduction="sum",
        )
        if wanted is None:
            return entropy
        w = self.teacher_weight
        return (1 - w) * entropy + w * divergence(logits_MN, wanted.flatten(0, -2), targets_M, self.temperature)


def check_run(run: Path) -> None:
    """Refuses what no bench can be made of, before anything is loaded.

    Raises:
        ValueError: not a run directory, not a finished run, a damaged or a quantised one.
    """
    if not (run / "config.json").is_file():
        raise ValueError(f"{run} is not a run directory: it has no config.json")
    if not (run / "model.safetensors").is_file():
        raise ValueError(f"{run} is not finished: it has no model.safetensors; paradepth resume {run} goes on with it")
    if quantisation_of(run):
        raise ValueError(f"{run} is quantised, and integers are not changed again; take the run that it was made from")


def divergence(logits_MN: Tensor, wanted_MN: Tensor, targets_M: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) of distributions softened by T, summed over the targets that are not `IGNORED`.

    The factor T² makes gradients about as large as those of the cross-entropy.

    Args:
        logits_MN: of the student.
        wanted_MN: of the teacher.
        targets_M: only which of them count matters.
        temperature: T.

    >>> a, b = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    >>> float(divergence(a, a, torch.tensor([0]), 2.0)), float(divergence(a, b, torch.tensor([0]), 1.0)) > 0
    (0.0, True)
    """
    counts_M = targets_M != IGNORED
    student_MN = F.log_softmax(at_least_float32(logits_MN[counts_M]) / temperature, dim=-1)
    teacher_MN = F.log_softmax(at_least_float32(wanted_MN[counts_M]) / temperature, dim=-1)
    return temperature**2 * F.kl_div(student_MN, teacher_MN, log_target=True, reduction="sum")


def at_least_float32(logits: Tensor) -> Tensor:
    """The same numbers in float32, or in float64 where they are that already."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _kept(model: TrunkModel, masks: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            shape = tuple(parameters[name].shape) if name in parameters else "no parameter"
            raise ValueError(f"the mask {name!r} has shape {tuple(mask.shape)}, and the model has there {shape}")
    return [(parameters[name], mask.to(parameters[name])) for name, mask in masks.items()]
