"""Arithmetic of states: what is carried from layer to layer, always a tuple of tensors in here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

State = tuple[Tensor, ...]
Increment = tuple[Tensor | None, ...]  # None stands for zero


def pack(x: Any) -> State:
    """A tensor or a tuple of tensors as a state.

    Raises:
        ValueError: anything else, or tensors that are not floating point.
    """
    state = (x,) if isinstance(x, Tensor) else tuple(x) if isinstance(x, tuple | list) else ()
    if not state or not all(isinstance(part, Tensor) and part.is_floating_point() for part in state):
        raise ValueError(f"a stack's state is {_kind(x)}; it must be a floating-point tensor or a tuple of such")
    return state


def unpack(state: State, *, like: Any) -> Any:
    """The inverse of `pack` for a state that came from `like`."""
    return state[0] if isinstance(like, Tensor) else state


def _kind(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"a tensor of {x.dtype}"
    if isinstance(x, tuple | list):
        return f"{type(x).__name__} of {[_kind(part) for part in x]}"
    return f"a {type(x).__name__}"


def add(x: State, increment: Increment) -> State:
    """x + increment."""
    return tuple(a if b is None else a + b for a, b in zip(x, increment, strict=True))


def add_each(xs: Sequence[State], increments: Sequence[Increment], *, factor: float = 1.0) -> list[State]:
    """x + factor · increment for each pair; on a GPU by one kernel for all."""
    sums = [list(x) for x in xs]
    for index in range(len(xs[0]) if xs else 0):
        moved = [(k, part) for k, increment in enumerate(increments) if (part := increment[index]) is not None]
        before = [sums[k][index] for k, _ in moved]
        if len(moved) > 1 and all(type(part) is Tensor for part in before):  # subclasses have no such kernel
            added = torch._foreach_add(before, [part for _, part in moved], alpha=factor)  # pyright: ignore[reportPrivateImportUsage]
        else:
            added = [torch.add(x, part, alpha=factor) for x, (_, part) in zip(before, moved, strict=True)]
        for (k, _), part in zip(moved, added, strict=True):
            sums[k][index] = part
    return [tuple(parts) for parts in sums]


def subtract(x: State, y: State) -> State:
    """x − y."""
    return tuple(a - b for a, b in zip(x, y, strict=True))


def total(increments: Sequence[Increment]) -> Increment:
    """The sum of increments."""
    sums: list[Tensor | None] = list(increments[0])
    for increment in increments[1:]:
        for index, part in enumerate(increment):
            before = sums[index]
            sums[index] = part if before is None else before if part is None else before + part
    return tuple(sums)


def stacked(xs: Sequence[State]) -> State:
    """Several states as one of a dimension more; a single one stays as it is."""
    return xs[0] if len(xs) == 1 else tuple(torch.stack(parts) for parts in zip(*xs, strict=True))


def scaled(increment: Increment, factor: float) -> Increment:
    """factor · increment."""
    return increment if factor == 1.0 else tuple(None if part is None else factor * part for part in increment)


def detached(x: State) -> State:
    """The same values, cut from any graph."""
    return tuple(part.detach() for part in x)


def squared_norm(x: State) -> Tensor:
    """‖x‖², in float64 where the device has it."""
    return torch.stack([part.detach().flatten().double().square().sum() for part in x]).sum()


def identical(x: State, y: State | None) -> bool:
    """Whether two states hold equal values bit for bit. On an accelerator only the same tensors count: comparing
    values would stop the queue of kernels."""
    if y is None:
        return False
    return all(a is b or (a.device.type == "cpu" and torch.equal(a, b)) for a, b in zip(x, y, strict=True))
