"""Pipelines from before torch had one: torchgpipe, and fairscale's `Pipe`, which comes from it, and `AsyncPipe`.

The first two are one process with a worker thread for each device. All partitions on CPUs share one worker
(`spawn_workers` takes them for one device), so there they run, but no two stages run at the same time.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from networks import Case, in_sequence
from share import Idle, Setting, Share, Way
from torch import Tensor
from torch.nn import functional as F

CLASSES = {"torchgpipe": ("torchgpipe", "GPipe"), "fairscale Pipe": ("fairscale.nn", "Pipe")}
MICRO_BATCHES = (1, 4)


class ThreadPipeline(Share):
    """The serial network on all devices, driven by the first process."""

    def __init__(self, setting: Setting, library: str, micro_batches: int) -> None:
        module, name = CLASSES[library]
        modules, balance = in_sequence(setting.size.network(), setting.processes)
        kind = setting.device.type
        devices = [torch.device(kind, index) if kind == "cuda" else kind for index in range(setting.processes)]
        make: Any = getattr(import_module(module), name)
        self.pipe = make(modules, balance, devices=devices, chunks=micro_batches, checkpoint="never")
        self.pipe.train(setting.case.training)

    def forward(self, images_BCHW: Tensor) -> Tensor | None:
        with torch.no_grad():
            return self._home(self.pipe(images_BCHW), images_BCHW)

    def backward(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor | None:
        logits_BN = self._home(self.pipe(images_BCHW), images_BCHW)
        F.cross_entropy(logits_BN, labels_B).backward()
        return logits_BN.detach()

    @staticmethod
    def _home(logits_BN: Tensor, images_BCHW: Tensor) -> Tensor:
        return logits_BN.to(images_BCHW.device)  # so that waiting for the first device waits for the last

    def parameters(self) -> list[Tensor]:
        return list(self.pipe.parameters())

    def payload(self, case: Case) -> int:
        return 0  # between processes: everything is in one


def _build(setting: Setting, library: str, micro_batches: int) -> Share:
    return ThreadPipeline(setting, library, micro_batches) if setting.rank == 0 else Idle()


def _build_remote(setting: Setting, micro_batches: int) -> Share:
    from fairscale_peers import RemotePipeline

    return RemotePipeline(setting, micro_batches)


def ways(case: Case, serial: str) -> list[Way]:
    """torchgpipe and both pipelines of fairscale, with one micro-batch and with a few."""
    found = []
    for m in MICRO_BATCHES:
        if m > case.batch:
            continue
        detail = f"{m} micro-batch{'es' if m > 1 else ''}"
        for library in CLASSES:
            found.append(
                Way(
                    serial,
                    f"pipeline ({library})",
                    lambda setting, library=library, m=m: _build(setting, library, m),
                    detail=detail,
                    optional=True,
                )
            )
        found.append(
            Way(
                serial,
                "pipeline (fairscale AsyncPipe)",
                lambda setting, m=m: _build_remote(setting, m),
                detail=detail,
                optional=True,
            )
        )
    return found
