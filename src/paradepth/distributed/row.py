"""Processes in a row that share a trunk: messages over torch.distributed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from paradepth.depth import Channel
from paradepth.depth.state import State


class ProcessLost(RuntimeError):
    """Another process of the run stopped answering."""


@contextmanager
def words_for_lost_processes(what: str) -> Iterator[None]:
    """Turns what torch.distributed raises when a process is gone into `ProcessLost`."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        if isinstance(error, ProcessLost):
            raise
        raise ProcessLost(
            f"{what} failed, so another process of this run stopped or hangs: {str(error).splitlines()[0]}. "
            "The newest checkpoint is good; `paradepth resume` continues from it, on any number of processes"
        ) from error


class ProcessRow(Channel):
    """The processes of a torch.distributed group as a row, in the order of their ranks. gloo and NCCL.

    Args:
        group: a process group; None is all processes.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._peers = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
        self._sending: list[tuple[Any, Tensor]] = []  # a tensor must live until it has left

    def __deepcopy__(self, memo: dict[int, Any]) -> ProcessRow:
        return self  # a copy of a model talks to the same processes

    def send(self, state: State, *, to: int) -> None:
        with words_for_lost_processes(f"sending to process {self._peers[to]}"):
            for part in state:
                tensor = part.detach().contiguous()
                self._sending.append((dist.isend(tensor, dst=self._peers[to], group=self.group), tensor))

    def receive(self, like: State, *, source: int) -> State:
        buffers = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in like]
        with words_for_lost_processes(f"receiving from process {self._peers[source]}"):
            for work in [dist.irecv(buffer, src=self._peers[source], group=self.group) for buffer in buffers]:
                assert work is not None
                work.wait()
        return tuple(buffer.detach() for buffer in buffers)

    def broadcast(self, state: State, *, source: int) -> State:
        mine = self.rank == source
        parts = tuple(part.detach().contiguous() if mine else torch.empty_like(part).contiguous() for part in state)
        with words_for_lost_processes(f"a broadcast from process {self._peers[source]}"):
            for part in parts:
                dist.broadcast(part, src=self._peers[source], group=self.group)
        return parts

    def sum(self, values: Tensor) -> Tensor:
        values = values.detach().clone()
        with words_for_lost_processes("a sum over the processes"):
            dist.all_reduce(values, group=self.group)
        return values

    def gather(self, values: Tensor) -> Tensor:
        values = values.detach().contiguous()
        gathered = values.new_empty((self.size, *values.shape))
        with words_for_lost_processes("gathering from the processes"):
            dist.all_gather(list(gathered.unbind(0)), values, group=self.group)
        return gathered

    def flush(self) -> None:
        with words_for_lost_processes("sending to a neighbour"):
            for work, _ in self._sending:
                work.wait()
        self._sending.clear()
