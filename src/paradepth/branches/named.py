"""Branch executors by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paradepth.branches.auto import Auto
from paradepth.branches.batched import Batched
from paradepth.branches.branches import Branches
from paradepth.branches.executor import BranchExecutor
from paradepth.branches.loop import Loop
from paradepth.branches.threads import Threads

BRANCH_EXECUTORS: dict[str, Callable[[], BranchExecutor]] = {
    "loop": Loop,
    "batched": Batched,
    "threads": Threads,
    "auto": Auto,
}
"""What makes the branch executor of a name."""


def register_branch_executor(name: str, make: Callable[[], BranchExecutor]) -> None:
    """Makes an executor of your own known by name: to `branch_executor`, and so to training and the command line.

    Args:
        name: a new one.
        make: called for each model, such as the class itself.

    Raises:
        ValueError: the name is taken.

    >>> register_branch_executor("loop", Loop)
    Traceback (most recent call last):
    ...
    ValueError: there is a branch executor 'loop' already; take another name
    """
    if name in BRANCH_EXECUTORS:
        raise ValueError(f"there is a branch executor {name!r} already; take another name")
    BRANCH_EXECUTORS[name] = make


def branch_executor(name: str) -> BranchExecutor:
    """A new executor: "loop", "batched", "threads", "auto" or one that was registered.

    Raises:
        ValueError: another name.

    >>> type(branch_executor("batched")).__name__
    'Batched'
    """
    if name not in BRANCH_EXECUTORS:
        raise ValueError(f"the branch executor is {name!r}; it must be one of {', '.join(BRANCH_EXECUTORS)}")
    return BRANCH_EXECUTORS[name]()


def choose_executor(trunk: Any, name: str) -> None:
    """Gives a trunk the executor of that name.

    Raises:
        ValueError: another name, or a serial stack, which has no branches to evaluate in some order.
    """
    executor = branch_executor(name)
    if isinstance(trunk, Branches):
        trunk.executor = executor
    elif name != "loop":
        raise ValueError(f"branch_executor is {name!r}; it evaluates branches, and this model is a serial stack")
