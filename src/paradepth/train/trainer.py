"""The training loop.

Every random draw is a function of the seed and of counters (order of samples: pass; augmentation: step; dropout:
step and rank), so the state of a run is its weights, moments and counters, and resuming is exact.

Shapes: B batch, C channels, H, W image size.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from paradepth.data.augment import Augment
from paradepth.data.batches import Batches
from paradepth.data.images import ImageData
from paradepth.distributed import World
from paradepth.models import ImageClassifier
from paradepth.nn import set_dropout_key
from paradepth.train.accounting import Cost, update_cost
from paradepth.train.checkpoint import CheckpointStore
from paradepth.train.config import Budget, Config
from paradepth.train.ema import MovingAverage
from paradepth.train.evaluate import evaluate
from paradepth.train.metrics import MetricsLog, SilentLog
from paradepth.train.optimiser import Optimiser
from paradepth.train.progress import ProgressView
from paradepth.train.schedules import Objective, Schedule
from paradepth.train.signals import StopRequest
from paradepth.train.step import TrainStep

_TRAIN_EVENTS = 200  # of the training loss over a run


class Interrupted(RuntimeError):
    """A signal stopped the run; its state is saved."""


class NonFiniteLoss(RuntimeError):
    """The loss or a gradient became infinite or not a number; the state before that update is saved."""


def _draw_seed(seed: int, step: int) -> int:
    digest = hashlib.blake2b(f"augment/{seed}/{step}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


class Trainer:
    """Trains a model by a schedule until its budget is spent.

    Args:
        model: on the world's device.
        data: on the world's device.
        schedule: what is trained when.
        config: all options.
        world: the processes.
        autocast: dtype of autocast, or None.
        store: where checkpoints go.
    """

    def __init__(
        self,
        model: ImageClassifier,
        data: ImageData,
        schedule: Schedule,
        config: Config,
        *,
        world: World,
        autocast: torch.dtype | None,
        store: CheckpointStore,
    ) -> None:
        self.model, self.data, self.schedule, self.config = model, data, schedule, config
        self.world, self.autocast, self.store = world, autocast, store
        o, r, d = config.optimiser_options, config.run_options, config.data_options
        self.budget = Budget.parse(o.budget)
        self.optimiser = Optimiser(model, o)
        self.average = MovingAverage(model, o.ema) if o.ema else None
        self.augment = Augment(flip=d.flip, crop_padding=d.crop_padding, rand_augment=d.rand_augment)
        self.batches = Batches(
            data.train, batch_size=o.batch_size, seed=r.seed, rank=world.rank, world_size=world.size, drop_last=True
        )
        self.step = 0
        self.spent = Cost()
        self.seconds = 0.0
        self.next_validation = 1
        self._fresh = True  # nothing was restored
        self._step_module: Any = None

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

    def _evaluated(self) -> ImageClassifier:
        return self.average.model if self.average else self.model

    def save(self, log: MetricsLog | SilentLog) -> None:
        """Writes a checkpoint."""
        if self.world.is_main:
            tensors: dict[str, Tensor] = {f"model/{k}": v for k, v in self.model.state_dict().items()}
            tensors |= {f"optimiser/{k}": v for k, v in self.optimiser.state_tensors().items()}
            if self.average:
                tensors |= {f"average/{k}": v for k, v in self.average.model.state_dict().items()}
            state = {
                "step": self.step,
                "layer_evals": self.spent.layer_evals,
                "flops": self.spent.flops,
                "seconds": self.seconds,
                "next_validation": self.next_validation,
                "average_updates": self.average.updates if self.average else 0,
                "schedule": self.schedule.state_dict(),
                "metrics_position": log.position(),
            }
            self.store.save(self.step, tensors, state)
        self.world.barrier()

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continues from a checkpoint."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

        self.model.load_state_dict(under("model/"))
        self.optimiser.load_state_tensors(under("optimiser/"))
        if self.average:
            self.average.model.load_state_dict(under("average/"))
            self.average.updates = state["average_updates"]
        self.schedule.load_state_dict(state["schedule"])
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
            log.write("stage", step=0, layer_evals=0.0, seconds=0.0, active=self.schedule.active, reason="start")
            self.save(log)
        reported, started, samples = time.monotonic(), time.monotonic(), 0
        losses, correct, norm = 0.0, 0.0, 0.0
        next_event = int(self.progress * _TRAIN_EVENTS) + 1
        while self.progress < 1.0:
            self._advance(log, view)
            loss, hits, norm = self._batch(log)
            self.seconds += time.monotonic() - started
            started = time.monotonic()
            samples += self.config.optimiser_options.batch_size
            losses, correct = losses + loss, correct + hits
            if self.progress * _TRAIN_EVENTS >= next_event or self.progress >= 1.0:
                next_event = int(self.progress * _TRAIN_EVENTS) + 1
                elapsed = time.monotonic() - reported
                count = samples / self.config.optimiser_options.batch_size
                self._log_training(log, losses / count, correct / samples, norm, samples / max(elapsed, 1e-9))
                view.update(progress=min(self.progress, 1.0), loss=losses / count, rate=samples / max(elapsed, 1e-9))
                reported, samples, losses, correct = time.monotonic(), 0, 0.0, 0.0
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

    def _asked_to_stop(self, stop: StopRequest) -> bool:
        if self.world.size == 1:
            return stop.signal is not None
        flag = torch.tensor(float(stop.signal is not None), device=self.world.device)
        return self.world.sum(flag).item() > 0

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
        trainable = self.schedule.trainable()
        for name, part in self.model.parts().items():
            part.requires_grad_(name in trainable)
            if name not in trainable:
                for parameter in part.parameters():
                    parameter.grad = None
        smoothing = self.config.optimiser_options.label_smoothing
        step: Any = TrainStep(self.model, label_smoothing=smoothing, autocast=self.autocast)
        if self.config.run_options.compile:
            torch.compiler.reset()  # a graph traced before the change would keep the old gradient paths
            torch._dynamo.config.recompile_limit = max(8, 2 * self.model.prefixes + 2)
            step = torch.compile(step, dynamic=False)
        if self.world.size > 1:
            unused = len({o.prefix for p in (0, 1) for o in self.schedule.objectives(p)}) > 1
            step = DistributedDataParallel(step, find_unused_parameters=unused)
        self._step_module = step
        return step

    def _batch(self, log: MetricsLog | SilentLog) -> tuple[float, float, float]:
        o, r = self.config.optimiser_options, self.config.run_options
        pass_index, batch_index = divmod(self.step, len(self.batches))
        images_BCHW, labels_B = self.batches.get(pass_index, batch_index)
        first = self.world.rank * len(
            labels_B
        )  # draws are made for the global batch, so they do not depend on its split
        images_BCHW = self.augment(images_BCHW, seed=_draw_seed(r.seed, self.step), first=first, total=o.batch_size)
        step = self._prepared_step()
        self.model.train()
        loss = hits = norm = torch.zeros(())
        trainable = self.schedule.trainable()
        for index, objective in enumerate(self.schedule.objectives(pass_index)):
            self.optimiser.set_rates(self.schedule.rates(self.progress))
            loss, hits = self._backward(step, images_BCHW, labels_B, objective, update=index)
            parameters = [p for p in self.model.parameters() if p.grad is not None]
            limit = o.clip if objective.clip and o.clip else math.inf
            norm = torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
            totals = self.world.sum(torch.stack([loss / self.world.size, hits.to(loss.dtype)]))
            loss, hits = totals[0], totals[1]
            if not math.isfinite(loss.item() + norm.item()):
                self._refuse_non_finite(log, loss.item(), norm.item(), batch_index)
            self.optimiser.step()
            if self.average:
                self.average.update(self.model)
            self.spent = self.spent + update_cost(self.model, objective, trainable) * o.batch_size
        self.step += 1
        return loss.item(), hits.item(), norm.item()

    def _backward(
        self, step: Any, images_BCHW: Tensor, labels_B: Tensor, objective: Objective, *, update: int
    ) -> tuple[Tensor, Tensor]:
        self.optimiser.zero_grad()
        parts = self.config.optimiser_options.accumulate
        loss = hits = torch.zeros((), device=self.world.device)
        chunks = list(zip(images_BCHW.chunk(parts), labels_B.chunk(parts), strict=True))
        for index, (images, labels) in enumerate(chunks):
            if self.world.size > 1:
                step.require_backward_grad_sync = index == len(chunks) - 1
            draw = (self.step * self.model.prefixes + update) * parts + index  # each forward pass has masks of its own
            set_dropout_key(self.model, seed=self.config.run_options.seed, step=draw, rank=self.world.rank)
            part_loss, part_hits = step(images, labels, objective)
            share = len(labels) / len(labels_B)
            (part_loss * share).backward()
            loss, hits = loss + part_loss.detach() * share, hits + part_hits
        return loss, hits

    def _refuse_non_finite(self, log: MetricsLog | SilentLog, loss: float, norm: float, batch_index: int) -> None:
        self.optimiser.zero_grad()
        if self.step not in self.store.steps():
            self.save(log)
        raise NonFiniteLoss(
            f"loss {loss}, gradient norm {norm} at step {self.step}, batch {batch_index} of the pass; the weights "
            "from before this update are saved. Try a lower learning_rate, a longer warmup, clip 1 or precision float32"
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
        )

    def _validate_if_due(self, log: MetricsLog | SilentLog, view: ProgressView) -> bool:
        count = self.config.run_options.validations
        if self.progress * count < self.next_validation and self.progress < 1.0:
            return False
        self.next_validation = int(self.progress * count) + 1
        result = evaluate(self._evaluated(), self.data.validation, world=self.world, autocast=self.autocast)
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
            ema=self.average is not None,
        )
        view.validation(progress=min(self.progress, 1.0), active=active, accuracy=result.accuracy, loss=result.loss)
        self._advance(log, view, result.loss[active - 1])
        return True
