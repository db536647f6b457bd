"""What an executor needs to know of the other processes that own layers of the same trunk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor

from paradepth.depth.state import State


class Channel(ABC):
    """Processes in a row, each next to the ones that own the layers before and after its own.

    Attributes:
        rank: place of this process in the row, from 0.
        size: number of processes.
    """

    rank: int
    size: int

    @abstractmethod
    def send(self, state: State, *, to: int) -> None:
        """Starts sending a state to a process of the row and returns at once; `state` must not be changed."""

    @abstractmethod
    def receive(self, like: State, *, source: int) -> State:
        """Waits for a state of the shapes, types and device of `like`."""

    @abstractmethod
    def broadcast(self, state: State, *, source: int) -> State:
        """The state of process `source`, on every process."""

    @abstractmethod
    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over the row."""

    @abstractmethod
    def gather(self, values: Tensor) -> Tensor:
        """`values` of every process, of one shape, along a new first dimension in the order of ranks."""

    @abstractmethod
    def flush(self) -> None:
        """Waits until everything that was sent has left."""


class Alone(Channel):
    """One process that owns every layer."""

    rank, size = 0, 1

    def send(self, state: State, *, to: int) -> None:
        raise AssertionError("a single process has no neighbours")

    def receive(self, like: State, *, source: int) -> State:
        raise AssertionError("a single process has no neighbours")

    def broadcast(self, state: State, *, source: int) -> State:
        return state

    def sum(self, values: Tensor) -> Tensor:
        return values

    def gather(self, values: Tensor) -> Tensor:
        return values.unsqueeze(0)

    def flush(self) -> None:
        pass


@dataclass(frozen=True)
class Part:
    """The layers of a stack that this process owns.

    Attributes:
        bounds: rank r of the row owns layers bounds[r] … bounds[r + 1] − 1.
        channel: the row.
    """

    bounds: tuple[int, ...]
    channel: Channel = field(default_factory=Alone)

    @property
    def owned(self) -> range:
        """Indices of this process's layers."""
        return range(self.bounds[self.channel.rank], self.bounds[self.channel.rank + 1])


def cut_into_parts(depth: int, *, buffers: tuple[int, int] = (0, 0), unit: int = 1, ranks: int) -> tuple[int, ...]:
    """Cuts a stack into contiguous parts of whole intervals, one a rank; parts differ by at most one interval.

    Buffers belong to the first and the last rank.

    Args:
        depth: number of layers.
        buffers: numbers of first and last layers that are not cut into intervals.
        unit: layers of an interval; the last one may be shorter.
        ranks: number of parts.

    Returns:
        ranks + 1 bounds.

    Raises:
        ValueError: fewer than 1 ranks or layers an interval, or more ranks than intervals.

    >>> cut_into_parts(32, unit=4, ranks=3)
    (0, 12, 24, 32)
    >>> cut_into_parts(32, buffers=(2, 2), unit=4, ranks=2)
    (0, 18, 32)
    """
    for name, value in (("ranks", ranks), ("unit", unit)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    first, last = buffers[0], depth - buffers[1]
    intervals = -(-(last - first) // unit)
    if ranks > intervals:
        raise ValueError(
            f"{ranks} processes cannot share {last - first} layers in intervals of {unit}: there are {intervals}, and "
            "each process needs one; use fewer processes or a smaller coarsening"
        )
    each, more = divmod(intervals, ranks)
    cuts = [first + unit * (rank * each + min(rank, more)) for rank in range(1, ranks)]
    return (0, *cuts, depth)
