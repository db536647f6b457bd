"""The training loop.

Every random draw is a function of the seed and of counters (order of samples: pass; augmentation: step; dropout:
step and rank), so the state of a run is its weights, moments and counters, and resuming is exact.

The loop knows a `Task`, no data: its inputs are whatever the model takes, its targets class numbers (B, …).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from paradepth.distributed import World, clip_gradients, gather_tensors, reduce_gradients
from paradepth.models import TrunkModel
from paradepth.models.sharing import own_parameters
from paradepth.nn import set_dropout_key
from paradepth.train import learning
from paradepth.train.accounting import Cost, part_sizes, update_cost
from paradepth.train.budget import Budget
from paradepth.train.checkpoint import CheckpointStore
from paradepth.train.config import Config
from paradepth.train.depth import DepthRun
from paradepth.train.ema import MovingAverage
from paradepth.train.evaluate import evaluate
from paradepth.train.metrics import MetricsLog, SilentLog
from paradepth.train.optimiser import Optimiser
from paradepth.train.progress import ProgressView
from paradepth.train.schedules import Objective, Schedule
from paradepth.train.signals import StopRequest
from paradepth.train.step import IGNORED, TrainStep, split
from paradepth.train.tasks import Task

_TRAIN_EVENTS = 200  # of the training loss over a run
_LIPSCHITZ_SAMPLES = 8  # of the validation split


class Interrupted(RuntimeError):
    """A signal stopped the run; its state is saved."""


class NonFiniteLoss(RuntimeError):
    """The loss or a gradient became infinite or not a number. A run has saved the state from before that update."""


class Trainer:
    """Trains a model by a schedule until its budget is spent.

    Args:
        model: on the world's device.
        task: with its data on the world's device.
        schedule: what is trained when.
        config: all options.
        world: the processes.
        autocast: dtype of autocast, or None.
        store: where checkpoints go; None keeps none.
    """

    def __init__(
        self,
        model: TrunkModel,
        task: Task,
        schedule: Schedule,
        config: Config,
        *,
        world: World,
        autocast: torch.dtype | None,
        store: CheckpointStore | None,
    ) -> None:
        self.model, self.task, self.schedule, self.config = model, task, schedule, config
        self.world, self.autocast, self.store = world, autocast, store
        o = config.optimiser_options
        self.budget = Budget.parse(o.budget)
        self.sizes = part_sizes(model)
        self.depth = DepthRun(model, config.depth_options, world, config.branch_options)
        self.optimiser = Optimiser(model, o)
        self.average = MovingAverage(model, o.ema) if o.ema else None
        self.batches = task.batches(world)
        self.mean_tokens = task.mean_tokens(model)
        self.step = 0
        self.spent = Cost()
        self.seconds = 0.0
        self.next_validation = 1
        self._fresh = True  # nothing was restored
        self._step_module: Any = None
        self._held: learning.HeldClasses | None = None

    # ---- progress ------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> float:
        """Epochs of the schedule so far."""
        return self.step / (len(self.batches) * self.schedule.passes_per_epoch)

    @property
    def progress(self) -> float:
        """Part of the budget spent."""
        done = {"epochs": self.epoch, "steps": self.step, "layer_evals": self.spent.layer_evals}[self.budget.unit]
        return done / self.budget.value

    # ---- state ---------------------------------------------------------------------------------------------

    def _evaluated(self) -> TrunkModel:
        return self.average.model if self.average else self.model

    def save(self, log: MetricsLog | SilentLog) -> None:
        """Writes a checkpoint, where they are kept; it is the same whatever number of processes shares the work."""
        if self.store is None:
            return
        tensors: dict[str, Tensor] = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"optimiser/{k}": v for k, v in self.optimiser.state_tensors().items()}
        if self.average:
            tensors |= {f"average/{k}": v for k, v in self.average.model.state_dict().items()}
        depth = self.depth.state_dict()
        if self.world.rank == 0:
            tensors = self._gathered(tensors)
        if self.world.is_main:
            state = {
                "step": self.step,
                "layer_evals": self.spent.layer_evals,
                "flops": self.spent.flops,
                "seconds": self.seconds,
                "next_validation": self.next_validation,
                "average_updates": self.average.updates if self.average else 0,
                "schedule": self.schedule.state_dict(),
                "depth": depth,
                "metrics_position": log.position(),
            }
            self.store.save(self.step, tensors, state)
        self.world.barrier()

    def _gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return gather_tensors(tensors, self.world.row, device=self.world.device)

    def final_weights(self) -> dict[str, Tensor]:
        """The weights to evaluate and keep, of all processes together, on the main one; elsewhere nothing."""
        return self._gathered(self._evaluated().state_dict()) if self.world.rank == 0 else {}

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continues from a checkpoint."""

        here = self.model.state_dict().keys()  # a process that shares a trunk has a part of it

        def under(prefix: str) -> dict[str, Tensor]:
            named = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            return {key: value for key, value in named.items() if key.rsplit(":", 1)[0] in here}

        self.model.load_state_dict(under("model/"))
        self.optimiser.load_state_tensors(under("optimiser/"))
        if self.average:
            self.average.model.load_state_dict(under("average/"))
            self.average.updates = state["average_updates"]
        self.schedule.load_state_dict(state["schedule"])
        self.depth.load_state_dict(state.get("depth", {}))
        self.step, self.seconds = state["step"], state["seconds"]
        self.spent = Cost(state["layer_evals"], state["flops"])
        self.next_validation = state["next_validation"]
        self._fresh = False
        self._step_module = None

    # ---- the loop ------------------------------------------------------------------------------------------

    def train(
        self,
        log: MetricsLog | SilentLog,
        *,
        stop: StopRequest,
        view: ProgressView,
        on_batch: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Trains until the budget is spent.

        Args:
            log: receives the events.
            stop: looked at after each batch.
            view: shows progress.
            on_batch: called with the step after each batch.

        Raises:
            Interrupted: a signal came; the state is saved.
            NonFiniteLoss: the state before the offending update is saved.
        """
        every = self.config.run_options.checkpoint_every
        if self._fresh:
            self.log_first_stage(log)
            self.save(log)
        reported, started, samples = time.monotonic(), time.monotonic(), 0
        losses, correct, targets, norm = 0.0, 0.0, 0.0, 0.0
        next_event = int(self.progress * _TRAIN_EVENTS) + 1
        while self.progress < 1.0:
            self._advance(log, view)
            loss, hits, counted, norm = self._batch(log)
            self.seconds += time.monotonic() - started
            started = time.monotonic()
            samples += self.config.optimiser_options.batch_size
            losses, correct, targets = losses + loss, correct + hits, targets + counted
            if self.progress * _TRAIN_EVENTS >= next_event or self.progress >= 1.0:
                next_event = int(self.progress * _TRAIN_EVENTS) + 1
                elapsed = time.monotonic() - reported
                count = samples / self.config.optimiser_options.batch_size
                accuracy = correct / max(targets, 1.0)
                self._log_training(log, losses / count, accuracy, norm, samples / max(elapsed, 1e-9))
                view.update(progress=min(self.progress, 1.0), loss=losses / count, rate=samples / max(elapsed, 1e-9))
                reported, samples, losses, correct, targets = time.monotonic(), 0, 0.0, 0.0, 0.0
            validated = self._validate_if_due(log, view)
            if (validated and every is None) or (every is not None and self.step % every == 0) or self.progress >= 1.0:
                self.save(log)
            on_batch(self.step)
            if self._asked_to_stop(stop):
                self.save(log)
                log.write("interrupted", step=self.step, layer_evals=self.spent.layer_evals)
                raise Interrupted(f"stopped at step {self.step} on {stop.signal or 'a signal'}; the state is saved")
            started = time.monotonic()
        log.write("end", step=self.step, **self._spent_fields(), reason="budget")

    def log_first_stage(self, log: MetricsLog | SilentLog) -> None:
        """Writes that the first stage starts."""
        log.write("stage", step=0, layer_evals=0.0, seconds=0.0, active=self.schedule.active, reason="start")

    def _asked_to_stop(self, stop: StopRequest) -> bool:
        if self.world.processes == 1:
            return stop.signal is not None
        flag = torch.tensor(float(stop.signal is not None), device=self.world.device)
        return self.world.sum_all(flag).item() > 0

    def _advance(self, log: MetricsLog | SilentLog, view: ProgressView, validation_loss: float | None = None) -> None:
        reason = self.schedule.advance(self.progress, validation_loss)
        if reason is not None:
            self._step_module = None
            fields = {"active": self.schedule.active, "reason": reason}
            log.write("stage", step=self.step, layer_evals=self.spent.layer_evals, seconds=self.seconds, **fields)
            view.say(f"{100 * self.progress:5.1f} %   branch {self.schedule.active} joins ({reason})")

    def _prepared_step(self) -> Any:
        """The training step for the present stage: what learns is set anew, and wrappers that remember it are
        rebuilt."""
        if self._step_module is not None:
            return self._step_module
        trainable = learning.trainable(self.schedule, self.config.optimiser_options)
        for name, own in own_parameters(self.model).items():
            for parameter in own:
                parameter.requires_grad_(name in trainable)
                if name not in trainable:
                    parameter.grad = None
        held = learning.held_classes(self.config.optimiser_options)
        self._held = None if held is None else learning.HeldClasses(self.model.head, held)
        smoothing = self.config.optimiser_options.label_smoothing
        penalty = self.config.optimiser_options.gate_penalty
        step: Any = TrainStep(self.model, label_smoothing=smoothing, gate_penalty=penalty, autocast=self.autocast)
        if self.config.run_options.compile:
            torch.compiler.reset()  # a graph traced before the change would keep the old gradient paths
            torch._dynamo.config.recompile_limit = max(8, 2 * self.model.prefixes + 2)
            step = torch.compile(step, dynamic=False)
        if self.world.size > 1 and not self.depth.shared:
            unused = len({o.prefix for p in (0, 1) for o in self.schedule.objectives(p)}) > 1
            step = DistributedDataParallel(step, find_unused_parameters=unused)
        self._step_module = step
        return step

    def _batch(self, log: MetricsLog | SilentLog) -> tuple[float, float, float, float]:
        """Loss, correct predictions, targets that count and gradient norm of the last update on the next batch."""
        o = self.config.optimiser_options
        pass_index, batch_index = divmod(self.step, len(self.batches))
        inputs, targets = self.batches.get(pass_index, batch_index)
        first = self.world.rank * len(targets)  # draws are made for the whole batch, however it is split
        inputs, targets = self.task.prepare(inputs, targets, step=self.step, first=first)
        counted = self.world.sum((targets != IGNORED).sum().double())  # of the whole batch
        step = self._prepared_step()
        self.model.train()
        loss = hits = norm = torch.zeros(())
        trainable = learning.trainable(self.schedule, self.config.optimiser_options)
        for index, objective in enumerate(self.schedule.objectives(pass_index)):
            self.optimiser.set_rates(learning.rates(self.schedule, o, self.progress))
            backward = partial(self._backward, step, inputs, targets, objective, counted.item(), update=index)
            loss, hits = self.depth.step(self.step, backward, partial(log.write, "probe"))
            if self._held is not None:
                self._held.clear_gradients()
            limit = o.clip if objective.clip and o.clip else math.inf
            if self.depth.shared:
                norm = clip_gradients(self.model, limit, self.world, owned=self.depth.owned)
            else:
                parameters = [p for p in self.model.parameters() if p.grad is not None]
                norm = torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
            loss, hits = self.world.sum(torch.stack([loss / self.world.size, hits.to(loss.dtype)])).unbind()
            if not math.isfinite(loss.item() + norm.item()):
                self._refuse_non_finite(log, loss.item(), norm.item(), batch_index)
            self.optimiser.step()
            if self._held is not None:
                self._held.restore()
            if self.average:
                self.average.update(self.model)
            cost = update_cost(self.model, objective, trainable, tokens=self.mean_tokens)
            self.spent = self.spent + cost * o.batch_size
        self.step += 1
        return loss.item(), hits.item(), counted.item(), norm.item()

    def _backward(
        self, step: Any, inputs: Any, targets: Tensor, objective: Objective, counted: float, *, update: int
    ) -> tuple[Tensor, Tensor]:
        self.optimiser.zero_grad()
        parts = self.config.optimiser_options.accumulate
        loss = hits = torch.zeros((), device=self.world.device)
        chunks = list(zip(split(inputs, parts), targets.chunk(parts), strict=True))
        for index, (part_inputs, part_targets) in enumerate(chunks):
            if isinstance(step, DistributedDataParallel):
                step.require_backward_grad_sync = index == len(chunks) - 1
            draw = (self.step * self.model.prefixes + update) * parts + index  # each forward pass has masks of its own
            set_dropout_key(self.model, seed=self.config.run_options.seed, step=draw, rank=self.world.rank)
            part_loss, part_hits = step(part_inputs, part_targets, objective)
            # Gradients are averaged over processes, so a process weighs as much as it has of a mean process's targets.
            share = (part_targets != IGNORED).sum().item() * self.world.size / max(counted, 1.0)
            (part_loss * share).backward()
            loss, hits = loss + part_loss.detach() * share, hits + part_hits
        if self.depth.shared:
            reduce_gradients(self.model, self.world, owned=self.depth.owned)
        return loss, hits

    def _refuse_non_finite(self, log: MetricsLog | SilentLog, loss: float, norm: float, batch_index: int) -> None:
        self.optimiser.zero_grad()
        kept = "there is no checkpoint of it"
        if self.store is not None:
            kept = "the weights from before this update are saved"
            if self.step not in self.store.steps():
                self.save(log)
        log.write("diverged", step=self.step, **self._spent_fields(), loss=loss, gradient_norm=norm)
        raise NonFiniteLoss(
            f"loss {loss}, gradient norm {norm} at step {self.step}, batch {batch_index} of the pass; {kept}. Try a "
            "lower learning_rate, a longer warmup, clip 1 or precision float32"
        )

    # ---- measuring -----------------------------------------------------------------------------------------

    def _spent_fields(self) -> dict[str, float]:
        return {"layer_evals": self.spent.layer_evals, "flops": self.spent.flops, "seconds": self.seconds}

    def _log_training(
        self, log: MetricsLog | SilentLog, loss: float, accuracy: float, norm: float, rate: float
    ) -> None:
        log.write(
            "train",
            step=self.step,
            epoch=self.epoch,
            **self._spent_fields(),
            loss=loss,
            accuracy=accuracy,
            learning_rate=self.optimiser.rate,
            samples_per_second=rate,
            active=self.schedule.active,
            gradient_norm=norm,
            **self.depth.solve_fields(),
        )

    def _validate_if_due(self, log: MetricsLog | SilentLog, view: ProgressView) -> bool:
        count = self.config.run_options.validations
        if self.progress * count < self.next_validation and self.progress < 1.0:
            return False
        self.next_validation = int(self.progress * count) + 1
        with self.depth.serial(self._evaluated()):
            result = evaluate(self._evaluated(), self.task, "validation", world=self.world, autocast=self.autocast)
        if self.config.depth_options.lipschitz:
            inputs, _ = self.task.ordered("validation", 0, _LIPSCHITZ_SAMPLES)
            log.write("lipschitz", step=self.step, **self._spent_fields(), estimates=self.depth.lipschitz(inputs))
        active = self.schedule.active
        log.write(
            "validation",
            step=self.step,
            epoch=self.epoch,
            **self._spent_fields(),
            active=active,
            loss=result.loss,
            accuracy=result.accuracy,
            contribution=result.contribution,
            **self.task.measures(result.loss, "validation"),
            **result.scores,
            ema=self.average is not None,
        )
        view.validation(progress=min(self.progress, 1.0), active=active, accuracy=result.accuracy, loss=result.loss)
        self._advance(log, view, result.loss[active - 1])
        return True
