"""Pipelines: the serial network cut into as many stages as there are processes, by torch.distributed.pipelining."""

from __future__ import annotations

from networks import Case, Stage
from share import Setting, Share, Way
from torch import Tensor, no_grad
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn import functional as F

SCHEDULES = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}
MOST_MICRO_BATCHES = 16


class Pipeline(Share):
    """A stage of the serial network. Forward, the first sends the states and the last has the logits; backward, the
    gradients of the states come back."""

    def __init__(self, setting: Setting, schedule: str, micro_batches: int) -> None:
        self.setting = setting
        self.network = setting.size.network().to(setting.device).train(setting.case.training)
        self.stage = Stage(self.network, index=setting.rank, stages=setting.processes)
        self.is_first, self.is_last = setting.rank == 0, setting.rank == setting.processes - 1
        self.state_bytes = setting.size.state_bytes(self.network, setting.case.batch)
        del self.network  # the other stages' layers
        stage = PipelineStage(self.stage, setting.rank, setting.processes, setting.device)
        loss = F.cross_entropy if setting.case.training else None
        self.schedule = SCHEDULES[schedule](stage, micro_batches, loss_fn=loss)

    def forward(self, images_BCHW: Tensor) -> Tensor | None:
        with no_grad():
            return self.schedule.eval(*((images_BCHW,) if self.is_first else ()))

    def backward(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor | None:
        inputs = (images_BCHW,) if self.is_first else ()
        logits_BN = self.schedule.step(*inputs, target=labels_B if self.is_last else None)
        return None if logits_BN is None else logits_BN.detach()

    def parameters(self) -> list[Tensor]:
        return list(self.stage.parameters())

    def payload(self, case: Case) -> int:
        forward = 0 if self.is_last else self.state_bytes
        backward = 0 if self.is_first or not case.training else self.state_bytes
        return forward + backward


def micro_batches(batch: int) -> list[int]:
    """The numbers of micro-batches to try: powers of two."""
    return [m for m in (1, 2, 4, 8, MOST_MICRO_BATCHES) if m <= batch]


def ways(case: Case, serial: str, processes: int) -> list[Way]:
    """Every schedule with every number of micro-batches; forward alone both are the same, and GPipe stands for both."""
    found = []
    for schedule in SCHEDULES if case.training else ("GPipe",):
        for m in micro_batches(case.batch):
            if schedule == "1F1B" and m < processes:  # torch refuses it
                continue
            detail = f"{schedule if case.training else 'forward only'}, {m} micro-batch{'es' if m > 1 else ''}"
            found.append(
                Way(
                    serial,
                    "pipeline (torch.distributed.pipelining)",
                    lambda setting, schedule=schedule, m=m: Pipeline(setting, schedule, m),
                    detail=detail,
                )
            )
    return found
