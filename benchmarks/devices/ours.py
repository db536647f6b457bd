"""Branches shared between the processes, and the serial network on one of them or whole on each."""

from __future__ import annotations

from typing import Any

from networks import Case, parameter_bytes
from share import Idle, Setting, Share, Way, Whole
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from paradepth.branches import Batched, BranchExecutor, Loop
from paradepth.distributed import Mesh, reduce_gradients, shard_branches


class BranchParallel(Whole):
    """Every process has stem, head and its branches: one sum of a state forward, one backward, and in training the
    means of the gradients of stem and head, as in the library's training loop."""

    def __init__(self, setting: Setting, branches: int, depth: int, local: BranchExecutor) -> None:
        self.setting = setting
        self.model = setting.size.network(branches, depth).to(setting.device).train(setting.case.training)
        shard_branches(self.model.trunk, setting.world.row, local=local)
        self.owned = list(self.model.trunk.parameters())
        assert isinstance(self.model.trunk.executor, Mesh)
        self.traffic = self.model.trunk.executor.traffic

    def backward(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor | None:
        logits_BN = super().backward(images_BCHW, labels_B)
        reduce_gradients(self.model, self.setting.world, owned=self.owned)
        return logits_BN

    def payload(self, case: Case) -> int:
        state = self.setting.size.state_bytes(self.model, case.batch)
        if not case.training:
            return state
        common = [*self.model.stem.parameters(), *self.model.head.parameters()]
        return 2 * state + parameter_bytes(common)


class OneDevice(Whole):
    """The serial network on the first process; the others wait."""

    def __init__(self, setting: Setting) -> None:
        self.model = setting.size.network().to(setting.device).train(setting.case.training)

    def payload(self, case: Case) -> int:
        return 0


def one_device(setting: Setting) -> Share:
    """The share of one device alone."""
    return OneDevice(setting) if setting.rank == 0 else Idle()


class DataParallel(Whole):
    """The serial network on every process, each with its part of the batch; DistributedDataParallel in training."""

    splits_batch = True

    def __init__(self, setting: Setting) -> None:
        self.rank, self.processes = setting.rank, setting.processes
        self.model: Any = setting.size.network().to(setting.device).train(setting.case.training)
        if setting.case.training:
            self.model = DistributedDataParallel(self.model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def _mine(self, whole: Tensor) -> Tensor:
        return whole.chunk(self.processes)[self.rank]

    def forward(self, images_BCHW: Tensor) -> Tensor | None:
        return super().forward(self._mine(images_BCHW))

    def backward(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor | None:
        return super().backward(self._mine(images_BCHW), self._mine(labels_B))

    def payload(self, case: Case) -> int:
        return parameter_bytes(self.parameters()) if case.training else 0


def ways(case: Case, setting_shapes: tuple[tuple[int, int], ...], serial: str) -> list[Way]:
    """Ours, then one device and data parallel, which needs two images at least."""
    locals_: dict[str, type[BranchExecutor]] = {"loop": Loop, "batched": Batched}
    found = [
        Way(
            f"{n}×{d}",
            f"branch-parallel, {name}",
            lambda setting, n=n, d=d, local=local: BranchParallel(setting, n, d, local()),
            branches=n,
        )
        for n, d in setting_shapes
        for name, local in locals_.items()
    ]
    found.append(Way(serial, "one device", one_device))
    if case.batch > 1:
        found.append(Way(serial, "data parallel (DDP)", DataParallel))
    return found
