"""Sharing branches between the processes of a row."""

from __future__ import annotations

from collections.abc import Sequence

from paradepth.branches import Branches, BranchExecutor
from paradepth.depth import Channel
from paradepth.distributed.mesh import Mesh
from paradepth.distributed.shard import Elsewhere


def assign_branches(depths: Sequence[int], *, ranks: int) -> tuple[int, ...]:
    """Which process evaluates which branch, so that the numbers of layers are balanced.

    The deepest branch that is left goes to the process with the fewest layers so far; among equals the first branch,
    the first process. So branches of equal depth are dealt out in turn, and every prefix is balanced as well as the
    whole: processes differ by at most one branch. For unequal depths the most layers on a process are at most 4/3 of
    the best possible. Source: Graham, Bounds on multiprocessing timing anomalies (1969).

    Args:
        depths: layers of each branch.
        ranks: number of processes.

    Returns:
        The rank of each branch's process.

    Raises:
        ValueError: fewer than 1 process, or more processes than branches.

    >>> assign_branches([2, 2, 2, 2, 2], ranks=2)
    (0, 1, 0, 1, 0)
    >>> assign_branches([1, 6, 2, 3], ranks=2)
    (1, 0, 1, 1)
    """
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}; it must be at least 1")
    if ranks > len(depths):
        raise ValueError(
            f"{ranks} processes cannot share {len(depths)} branches: each process needs one; use at most {len(depths)}"
        )
    loads, owners = [0] * ranks, [0] * len(depths)
    for branch in sorted(range(len(depths)), key=lambda i: -depths[i]):
        owners[branch] = min(range(ranks), key=lambda rank: loads[rank])
        loads[owners[branch]] += depths[branch]
    return tuple(owners)


def shard_branches(trunk: Branches, row: Channel, *, local: BranchExecutor | None = None) -> None:
    """Leaves this process its share of the branches; the storage of the others' layers is freed.

    Every process calls it with equal weights. From then on evaluating the trunk, or any prefix of it, is a call that
    all processes of the row make together with the same input; all get the result and the gradient of the input, each
    the gradients of its own branches. See `Mesh` for what it costs.

    Args:
        trunk: changed in place.
        row: the processes, such as `World.row`.
        local: evaluates this process's branches; the trunk's present executor by default.

    Raises:
        ValueError: more processes than branches, branches that are shared out already, or a parameter that two
            processes would own.
    """
    if isinstance(trunk.executor, Mesh):
        raise ValueError("these branches are shared between processes already")
    local = local or trunk.executor
    owners = assign_branches([branch.depth for branch in trunk.first(None)], ranks=row.size)
    if row.size == 1:
        trunk.executor = local
        return
    seen: dict[int, int] = {}
    for owner, branch in zip(owners, trunk.first(None), strict=True):
        for name, parameter in branch.named_parameters():
            if seen.setdefault(id(parameter), owner) != owner:
                raise ValueError(
                    f"parameter {name} is shared with a branch of another process; branches that share parameters must "
                    "lie on one process: use fewer processes"
                )
    for owner, branch in zip(owners, trunk.first(None), strict=True):
        if owner != row.rank:
            for n in range(branch.depth):
                branch.layers[n] = Elsewhere(branch.layers[n])
    trunk.executor = Mesh(row, owners, local=local)
