"""The processes of a run: one, or as many as `torchrun` started."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from paradepth.depth import Channel
from paradepth.depth.channel import Alone
from paradepth.distributed.row import ProcessRow, words_for_lost_processes


@dataclass(frozen=True)
class World:
    """This process in the mesh (data, depth) or (data, branch) of a run's processes.

    Attributes:
        rank: number of this process along the data dimension, from 0: which samples it takes.
        size: processes along the data dimension.
        device: where this process computes.
        row: the processes along the other dimension, which share a model's trunk: the layers of a stack, or branches.
        mesh: of both dimensions, by name, for what torch does over a mesh, such as FSDP2; None where every process has
            a whole model.
    """

    rank: int
    size: int
    device: torch.device
    row: Channel = field(default_factory=Alone)
    mesh: DeviceMesh | None = None

    @property
    def processes(self) -> int:
        """Number of processes in the mesh."""
        return self.size * self.row.size

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0 and self.row.rank == 0

    @cached_property
    def _data_group(self) -> Any:
        return None if self.mesh is None else self.mesh["data"].get_group()

    def sum(self, values: Tensor) -> Tensor:
        """The element-wise sum of `values` along the data dimension."""
        return self._reduced(values, self._data_group) if self.size > 1 else values

    def sum_all(self, values: Tensor) -> Tensor:
        """The element-wise sum of `values` over all processes."""
        return self._reduced(values, None) if self.processes > 1 else values

    def barrier(self) -> None:
        """Waits until every process is here."""
        if self.processes > 1:
            with words_for_lost_processes("waiting for the other processes"):
                dist.barrier()

    @staticmethod
    def _reduced(values: Tensor, group: Any) -> Tensor:
        values = values.clone()
        with words_for_lost_processes("a sum over the processes"):
            dist.all_reduce(values, group=group)
        return values


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
def join_world(
    device: str = "auto",
    *,
    depth: int = 1,
    branch: int = 1,
    timeout: float = 600.0,
    options: Mapping[str, Any] | None = None,
) -> Iterator[World]:
    """Joins the processes that `torchrun` started (or is alone without it) and leaves them at the end.

    Uses NCCL on GPUs and gloo on CPUs.

    Args:
        device: "auto", "cpu" or "cuda".
        depth: processes that share the layers of a stack: the size of the mesh along its dimension "depth". The rest
            of them are data parallel.
        branch: processes that share branches, instead: the size of the mesh along its dimension "branch".
        timeout: seconds after which a process that does not answer counts as lost.
        options: of the run; processes that were started with different ones are refused.

    Raises:
        ValueError: no such device, both `depth` and `branch`, a number of processes that is no multiple of them, or
            different options.

    >>> with join_world("cpu") as world:
    ...     world.rank, world.size
    (0, 1)
    """
    size = process_count()
    chosen = pick_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    width, name = _row_of(depth, branch)
    what = {"depth": "a stack's layers", "branch": "branches"}[name]
    if width < 1 or size % width:
        raise ValueError(
            f"{size} processes cannot be cut into rows of {width} that share {what}; start a multiple of "
            f"{width} or change {name}_processes"
        )
    if size == 1:
        yield World(0, 1, chosen)
        return
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
    try:
        _check_agreement({"depth_processes": depth, "branch_processes": branch, **(options or {})}, chosen)
        if width == 1:
            yield World(dist.get_rank(), size, chosen)
        else:
            mesh = init_device_mesh(chosen.type, (size // width, width), mesh_dim_names=("data", name))
            rank = dist.get_rank(mesh["data"].get_group())
            yield World(rank, size // width, chosen, ProcessRow(mesh[name].get_group()), mesh)
    finally:
        if started:
            dist.destroy_process_group()


def _row_of(depth: int, branch: int) -> tuple[int, Literal["depth", "branch"]]:
    """How many processes share a trunk, and the name of their dimension of the mesh.

    Raises:
        ValueError: both are asked for.

    >>> _row_of(1, 3)
    (3, 'branch')
    """
    if depth != 1 and branch != 1:
        raise ValueError(
            f"depth_processes is {depth} and branch_processes {branch}: a trunk is a stack with layers to share, or "
            "branches; take one of them"
        )
    return (depth, "depth") if branch == 1 else (branch, "branch")


def process_count() -> int:
    """How many processes `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_agreement(options: Mapping[str, Any], device: torch.device) -> None:
    names = sorted(options)

    def digest(value: Any) -> int:
        return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=7).digest(), "little")

    mine = [digest(names), *(digest((name, options[name])) for name in names)]
    low = torch.tensor(mine[:1], dtype=torch.int64, device=device)
    high = low.clone()
    with words_for_lost_processes("comparing the options of the processes"):
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        if low.item() != high.item():
            raise ValueError("the processes of this run know different sets of options; start all with one version")
        low = torch.tensor(mine[1:], dtype=torch.int64, device=device)
        high = low.clone()
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
    different = [name for name, a, b in zip(names, low.tolist(), high.tolist(), strict=True) if a != b]
    if different:
        values = ", ".join(f"{name} (here {options[name]!r})" for name in different)
        raise ValueError(f"the processes of this run were started with different options: {values}")
