"""What one process holds of a network, whichever way it is shared between the processes.

Shapes: B batch, C channels, H, W image height and width, N classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from networks import Case, Size, parameter_bytes
from torch import Tensor
from torch.nn import functional as F

from paradepth.distributed import Traffic, World


@dataclass(frozen=True)
class Setting:
    """What a share is built for.

    Attributes:
        size: the networks. case: batch, and whether it learns.
        rank, processes: this process. device: where it computes.
        world: the processes as a row that shares branches.
    """

    size: Size
    case: Case
    rank: int
    processes: int
    device: torch.device
    world: World


class Share(ABC):
    """This process's part of a network, and how it takes part in the work of all.

    Attributes:
        splits_batch: every process has the logits of its own part of the batch only.
        traffic: what the library itself counted, where it counts.
    """

    splits_batch = False
    traffic: Traffic | None = None
    _optimiser: torch.optim.Optimizer | None = None

    @abstractmethod
    def forward(self, images_BCHW: Tensor) -> Tensor | None:
        """Logits (B, N) without gradients, where this process gets any."""

    @abstractmethod
    def backward(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor | None:
        """Leaves the gradients of the mean loss of the whole batch in this process's parameters; returns the logits
        that it saw."""

    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """What this process holds."""

    @abstractmethod
    def payload(self, case: Case) -> int:
        """Bytes that this process has to send for one call, by arithmetic. The sum of a tensor over P processes in a
        ring sends 2(P − 1)/P times its bytes: for two processes, its bytes."""

    def step(self, images_BCHW: Tensor, labels_B: Tensor) -> None:
        """One training step."""
        self.clear()
        self.backward(images_BCHW, labels_B)
        self.update()

    def update(self) -> None:
        """Moves the parameters by AdamW."""
        if self._optimiser is None:
            parameters = self.parameters()
            if not parameters:  # this process has nothing to do
                return
            plain = [p for p in parameters if not hasattr(p, "to_local")]
            shared_out = [p for p in parameters if hasattr(p, "to_local")]  # torch updates them apart from plain ones
            groups = [{"params": group} for group in (plain, shared_out) if group]
            self._optimiser = torch.optim.AdamW(groups, lr=1e-4, fused=True)
        self._optimiser.step()

    def clear(self) -> None:
        """Drops the gradients."""
        for parameter in self.parameters():
            parameter.grad = None

    def held_bytes(self) -> int:
        """Bytes of this process's weights, their gradients and both moments."""
        return 4 * parameter_bytes(self.parameters())


class Whole(Share):
    """A share that is called like a network: one module, whose logits and whose loss every process has."""

    model: Any

    def forward(self, images_BCHW: Tensor) -> Tensor | None:
        with torch.no_grad():
            return self.model(images_BCHW)

    def backward(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor | None:
        logits_BN = self.model(images_BCHW)
        F.cross_entropy(logits_BN, labels_B).backward()
        return logits_BN.detach()

    def parameters(self) -> list[Tensor]:
        return list(self.model.parameters())


class Idle(Share):
    """The share of a process that has nothing to do."""

    def forward(self, images_BCHW: Tensor) -> Tensor | None:
        return None

    def backward(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor | None:
        return None

    def parameters(self) -> list[Tensor]:
        return []

    def payload(self, case: Case) -> int:
        return 0


@dataclass(frozen=True)
class Way:
    """A way to run a network on the processes.

    Attributes:
        network: branches × layers of each.
        family: whose way it is, in a word or two.
        detail: schedule and micro-batches, where there is a choice.
        build: makes this process's share.
        branches: the network's, 0 for the serial one; then it is a peer, and ours otherwise.
        optional: it is left out, with the reason, where it does not run.
    """

    network: str
    family: str
    build: Callable[[Setting], Share]
    detail: str = ""
    branches: int = 0
    optional: bool = False

    @property
    def name(self) -> str:
        """Family and detail."""
        return f"{self.family}, {self.detail}" if self.detail else self.family
