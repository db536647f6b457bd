"""The processes of a run: one, or as many as `torchrun` started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class World:
    """This process among the data-parallel processes of a run.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        device: where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The element-wise sum of `values` over all processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Waits until every process is here."""
        if self.size > 1:
            dist.barrier()


def pick_device(device: str, local_rank: int = 0) -> torch.device:
    """The device named "cpu", "cuda", "cuda:1" …; "auto" is a GPU when there is one.

    Raises:
        ValueError: no such device here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; it must be 'auto', 'cpu' or 'cuda'") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; it must be 'auto', 'cpu' or 'cuda'")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device is {device!r} but torch sees no GPU here; use 'cpu' or 'auto'")
        index = local_rank if chosen.index is None else chosen.index
        if index >= torch.cuda.device_count():
            raise ValueError(f"device is cuda:{index} but there are {torch.cuda.device_count()} GPUs")
        return torch.device("cuda", index)
    return chosen


@contextmanager
def join_world(device: str = "auto") -> Iterator[World]:
    """Joins the processes that `torchrun` started (or is alone without it) and leaves them at the end.

    Uses NCCL on GPUs and gloo on CPUs.

    >>> with join_world("cpu") as world:
    ...     world.rank, world.size
    (0, 1)
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = pick_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        yield World(0, 1, chosen)
        return
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size, chosen)
    finally:
        if started:
            dist.destroy_process_group()
