"""A model that learns the tasks of a scenario one after another by a strategy, and is measured after each.

R_ij is the accuracy on task j after task i was learned.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from paradepth.continual.memory import balanced, reservoir
from paradepth.continual.options import ContinualOptions
from paradepth.continual.scenario import Scenario, join_splits
from paradepth.continual.strategy import STRATEGIES
from paradepth.continual.task import SequenceTask, TaskClassifier
from paradepth.data.images import ImageSplit
from paradepth.data.seeds import generator
from paradepth.distributed import World
from paradepth.models import ImageClassifier
from paradepth.models.classes import with_classes
from paradepth.train.accounting import Cost
from paradepth.train.budget import Budget
from paradepth.train.config import Config
from paradepth.train.evaluate import evaluate
from paradepth.train.learning import check_parts
from paradepth.train.metrics import MetricsLog, SilentLog
from paradepth.train.progress import ProgressView
from paradepth.train.schedules import Annealing, build_schedule
from paradepth.train.signals import StopRequest
from paradepth.train.trainer import Trainer


class Learner:
    """The state of a continual run between two tasks.

    Args:
        config: options of training, with the budget of one task.
        options: what is learned, and how.
        scenario: the tasks, on the world's device.
        world: one process.
        autocast: dtype of autocast, or None.

    Attributes:
        model: as it is after the tasks so far.
        done: number of tasks learned.
        matrix: R, with None for what was not measured.
        untrained: accuracy of the untrained model on each task; None where it does not have their outputs.
        tasks: what is told of each task learned.
        step, spent, seconds: updates, compute and time of training so far.

    Raises:
        ValueError: a strategy that the model does not take, or options that do not fit the data.
    """

    def __init__(
        self,
        config: Config,
        options: ContinualOptions,
        scenario: Scenario,
        *,
        world: World,
        autocast: torch.dtype | None,
    ) -> None:
        self.config, self.options, self.scenario = config, options, scenario
        self.world, self.autocast = world, autocast
        self.strategy = STRATEGIES[options.strategy]
        first = self._task(0, scenario.tasks[0].data.train, 0)
        if self.strategy.grows and first.shape.branches == 0:
            raise ValueError(
                f"strategy {options.strategy!r} adds branches, and {config.model_options.model} is a serial stack; "
                "take a paraformer, or finetune, replay or joint"
            )
        self._first = first.shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run_options.seed)
            self.model = self._new(first.shape)
        first.normalise(self.model)
        self.model.to(world.device)
        self.done = self.step = 0
        self.spent, self.seconds = Cost(), 0.0
        self.loss = self.rate = float("nan")
        count = len(scenario.tasks)
        self.matrix: list[list[float | None]] = [[None] * count for _ in range(count)]
        self.tasks: list[dict[str, Any]] = []
        self.untrained: list[float] | None = None
        if scenario.setting == "domain":
            self.untrained = [self._measure(j, "test")[0] for j in range(count)]

    # ---- shapes ------------------------------------------------------------------------------------------------

    def _new(self, shape: Any) -> ImageClassifier:
        return (TaskClassifier if self.scenario.setting == "task" else ImageClassifier)(shape)

    def _shape(self, task: int) -> Any:
        """The model's shape when it learns a task."""
        missing = self.scenario.class_names[self._first.num_classes : self.scenario.seen(task)]
        shape = with_classes(self._first, missing, model_type="image_classifier")
        if not self.strategy.grows:
            return shape
        return shape.with_branches(shape.branch_depths + (self.options.new_depth or shape.depth,) * task)

    @property
    def parameters(self) -> int:
        """Of the model after the last task."""
        with torch.device("meta"):
            last = ImageClassifier(self._shape(len(self.scenario.tasks) - 1))
        return sum(p.numel() for p in last.parameters())

    # ---- data --------------------------------------------------------------------------------------------------

    def _seed(self, task: int) -> int:
        """Of what is drawn while a task is learned."""
        draws = generator(self.config.run_options.seed, "task of a sequence", task)
        return int(torch.randint(2**31 - 1, (), generator=draws))

    def _task(
        self,
        task: int,
        train: ImageSplit,
        seen: int,
        *,
        freeze: tuple[str, ...] = (),
        memory: ImageSplit | None = None,
    ) -> SequenceTask:
        """A task for a model that knows the classes of the tasks up to number `seen`."""
        scenario = self.scenario
        names = scenario.class_names[: scenario.seen(seen)]
        data = dataclasses.replace(scenario.tasks[task].data, train=train, class_names=names)
        config = self.config.replace(seed=self._seed(task), validations=1, freeze=freeze)
        blocks_N = None
        if scenario.setting == "task":
            blocks_N = torch.tensor([j for j in range(seen + 1) for _ in scenario.tasks[j].classes])
        return SequenceTask(config, data, memory=memory, blocks_N=blocks_N)

    def _memory(self, task: int) -> ImageSplit | None:
        """What is kept of the tasks before a task."""
        if not self.strategy.replays or task == 0:
            return None
        before = [experience.data.train for experience in self.scenario.tasks[:task]]
        seed, capacity = self.config.run_options.seed, self.options.capacity
        if self.options.policy == "reservoir":
            kept = reservoir([len(split) for split in before], capacity, seed=seed)
        else:
            kept = balanced([split.labels_N for split in before], capacity, seed=seed)
        kept = [indices.to(split.labels_N.device) for indices, split in zip(kept, before, strict=True)]
        return join_splits(
            [ImageSplit(s.images_NCHW[indices], s.labels_N[indices]) for indices, s in zip(kept, before, strict=True)]
        )

    # ---- learning ----------------------------------------------------------------------------------------------

    def learn(self, log: MetricsLog | SilentLog, stop: StopRequest) -> str:
        """Learns the next task and measures; returns a sentence about it.

        Raises:
            Interrupted: a signal came; nothing of this task is kept.
            NonFiniteLoss: the loss or a gradient became infinite or not a number.
        """
        t = self.done
        before = self.model
        model = before if t == 0 else self._grown(t)
        shape = before.config
        freeze = self.strategy.frozen(model, branches=shape.branches if t else 0, classes=shape.num_classes)
        sources = [experience.data.train for experience in self.scenario.tasks[: t + 1]]
        train = join_splits(sources) if self.strategy.joint else sources[-1]
        memory = self._memory(t)
        task = self._task(t, train, t, freeze=freeze, memory=memory)
        trainer = self._trainer(model, task)
        if self.strategy.grows:
            log.write(
                "stage",
                step=self.step,
                layer_evals=self.spent.layer_evals,
                seconds=self.seconds,
                active=model.prefixes,
                reason=self.scenario.tasks[t].name,
            )
        started = time.monotonic()
        trainer.train(_TaskLog(log, self), stop=stop, view=ProgressView(enabled=False))
        self.rate = trainer.step * self.config.optimiser_options.batch_size / max(time.monotonic() - started, 1e-9)
        with torch.no_grad():
            model.load_state_dict(trainer.final_weights())
        self.model = model.requires_grad_(True)
        self.step, self.done = self.step + trainer.step, t + 1
        self.spent, self.seconds = self.spent + trainer.spent, self.seconds + trainer.seconds
        known = range(len(self.matrix)) if self.scenario.setting == "domain" else range(t + 1)
        for j in known:
            self.matrix[t][j], loss = self._measure(j, "test")
            self.loss = loss if j == t else self.loss
        size = sum(p.numel() for p in before.parameters()) if t else 0
        self._note(trainer, parameters=size, memory=0 if memory is None else len(memory))
        self._validate(log)
        shown = " ".join("–" if v is None else f"{100 * v:.1f}" for v in self.matrix[t])
        return f"{self.scenario.tasks[t].name} of {len(self.matrix)} learned; accuracy by task, %: {shown}"

    def _grown(self, task: int) -> ImageClassifier:
        """The model with the outputs, and where the strategy says so the branch, of a task."""
        shape, have = self._shape(task), self.model.config
        branches = shape.branches - have.branches
        classes = shape.class_names[have.num_classes :]
        if not branches and not classes:
            return self.model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed(task))
            depth = shape.branch_depths[-1] if branches else None
            cannot = have.aggregate == "sum" or have.share not in ("none", "depth")
            return self.model.grow(branches, depth=depth, classes=classes, init="random" if cannot else "zero")

    def _trainer(self, model: ImageClassifier, task: SequenceTask) -> Trainer:
        o = task.config.optimiser_options
        parts = list(model.parts())
        check_parts(o, parts, classes=model.config.num_classes)
        schedule = build_schedule("joint", parts, Annealing(warmup=o.warmup, decay=o.decay), {})
        # A sequence goes on at the ends of tasks, so nothing is kept within one.
        return Trainer(model, task, schedule, task.config, world=self.world, autocast=self.autocast, store=None)

    # ---- measuring ---------------------------------------------------------------------------------------------

    def _measure(self, task: int, split: str) -> tuple[float, float]:
        """Accuracy and loss on a split of a task.

        Where it is known which task a sample is of and branches were frozen, a task is answered by the prefix that
        learned it; otherwise by the full model.
        """
        last = max(self.done - 1, 0)
        own = self._task(task, self.scenario.tasks[task].data.train, last)
        found = evaluate(self.model, own, split, world=self.world, autocast=self.autocast)
        prefix = self.model.prefixes
        if self.scenario.setting == "task" and self.strategy.grows and not self.strategy.replays:
            prefix = self._shape(task).branches
        return found.accuracy[prefix - 1], found.loss[prefix - 1]

    def _validate(self, log: MetricsLog | SilentLog) -> None:
        found = [self._measure(j, "validation") for j in range(self.done)]
        accuracy, loss = (fmean(values) for values in zip(*found, strict=True))
        log.write(
            "validation",
            step=self.step,
            **self.spent_fields(),
            task=self.done,
            loss=[loss],
            accuracy=[accuracy],
            contribution=[],
        )

    def _note(self, trainer: Trainer, *, parameters: int, memory: int) -> None:
        t = self.done - 1
        experience = self.scenario.tasks[t]
        now = sum(p.numel() for p in self.model.parameters())
        self.tasks.append(
            {
                "name": experience.name,
                "classes": [self.scenario.class_names[number] for number in experience.classes],
                "training_samples": len(experience.data.train),
                "memory": memory,
                "parameters": now,
                "parameters_added": now - parameters,
                "branches": self.model.config.branches,
                "layers": self.model.config.layers,
                "steps": trainer.step,
                "layer_evals": trainer.spent.layer_evals,
                "flops": trainer.spent.flops,
                "seconds": trainer.seconds,
            }
        )

    def evaluation(self, figures: dict[str, float | None]) -> dict[str, Any]:
        """What `evaluation.json` holds."""
        losses = [self._measure(j, "test")[1] for j in range(len(self.matrix))]
        return {
            "split": "test",
            "samples": sum(len(experience.data.test) for experience in self.scenario.tasks),
            "loss": [fmean(losses)],
            "accuracy": [figures["average_accuracy"]],
            "contribution": [],
            **{name: [value] for name, value in figures.items()},
            "matrix": self.matrix,
            "untrained": self.untrained,
            "tasks": self.tasks,
            "notes": [f"Accuracy is the mean over the {len(self.matrix)} tasks at the end."],
        }

    # ---- for the log -------------------------------------------------------------------------------------------

    def spent_fields(self) -> dict[str, float]:
        """Compute and time so far, as events have them."""
        return {"layer_evals": self.spent.layer_evals, "flops": self.spent.flops, "seconds": self.seconds}

    def start_fields(self) -> dict[str, Any]:
        """What the first event of the log holds; sizes are those of the last model."""
        last = self._shape(len(self.scenario.tasks) - 1)
        with torch.device("meta"):
            flops = ImageClassifier(last).forward_flops()
        budget, tasks = Budget.parse(self.config.optimiser_options.budget), self.scenario.tasks
        return {
            "parameters": self.parameters,
            "parameters_by_prefix": [self.parameters],
            "forward_flops": [flops],
            "layers": last.layers,
            "budget": {"unit": budget.unit, "value": budget.value * len(tasks)},
            **{
                f"{split}_samples": sum(len(getattr(experience.data, split)) for experience in tasks)
                for split in ("train", "validation", "test")
            },
        }

    def headline(self) -> str:
        """A sentence about the run."""
        s, c = self.scenario, self._first
        shape = f"{c.branches} branches" if c.branches else f"{c.layers} layers in series"
        return (
            f"{s.name}, {s.setting}-incremental: {len(s.tasks)} tasks, {len(s.class_names)} classes; strategy "
            f"{self.options.strategy} from {shape} of width {c.width}, {self.config.optimiser_options.budget} a task, "
            f"{'bf16' if self.autocast else 'float32'} on {self.world.device}"
        )

    # ---- state -------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of tensors."""
        return {f"model/{name}": value for name, value in self.model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """What else a checkpoint must hold to go on."""
        return {
            "done": self.done,
            "step": self.step,
            "spent": [self.spent.layer_evals, self.spent.flops],
            "seconds": self.seconds,
            "matrix": self.matrix,
            "tasks": self.tasks,
        }

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.done, self.step, self.seconds = state["done"], state["step"], state["seconds"]
        self.spent = Cost(*state["spent"])
        self.matrix, self.tasks = state["matrix"], state["tasks"]
        self.model = self._new(self._shape(self.done - 1)).to(self.world.device)
        self.model.load_state_dict({name.removeprefix("model/"): value for name, value in tensors.items()})


class _TaskLog(SilentLog):
    """Passes on the events of the training loss, counted from the beginning of the sequence."""

    _COUNTED: Sequence[str] = ("step", "layer_evals", "flops", "seconds")

    def __init__(self, log: MetricsLog | SilentLog, learner: Learner) -> None:
        self._log, self._task = log, learner.done + 1
        self._before = {"step": learner.step, **learner.spent_fields()}

    def write(self, event: str, **values: Any) -> None:
        """Appends an event of the training loss."""
        if event == "train":
            counted = {name: values[name] + self._before[name] for name in self._COUNTED}
            self._log.write(event, **{**values, **counted}, task=self._task)
