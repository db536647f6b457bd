"""Branches over several processes: each evaluates its own, and one reduction adds up what they contribute.

              process 0           process 1           process 2
  x ─────────► enter               enter               enter       backward: one sum of ∂L/∂x over the processes
                │                   │                   │
            x + δ_1 + δ_4        δ_2 + δ_5             δ_3          no messages
                │                   │                   │
  s ◄───────── sum ─────────────── sum ─────────────── sum         forward: one sum over the processes

The input is on every process, since stem and head are. Whatever follows (head, loss) is the same on every process too,
so the gradient of s needs no message: `sum` adds forward and is the identity backward, `enter` is the identity forward
and adds backward. Source of this pair of operators: Megatron-LM (arXiv 1909.08053), which needs one in every layer.

Shapes: P processes, k branches in use, c of them on this process, … the shape of a part of the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from paradepth.branches import BranchExecutor, Loop
from paradepth.depth import Channel, Stack
from paradepth.depth.state import State, pack, subtract, unpack


@dataclass
class Traffic:
    """What this process handed to collective operations since the last `reset`.

    Attributes:
        forward_bytes, backward_bytes: payload: of a sum the tensor's own bytes, of a gathering this process's share.
        forward_calls, backward_calls: number of collective operations.
    """

    forward_bytes: int = 0
    backward_bytes: int = 0
    forward_calls: int = 0
    backward_calls: int = 0

    def reset(self) -> None:
        """Sets all to 0."""
        self.forward_bytes = self.backward_bytes = self.forward_calls = self.backward_calls = 0


class Mesh(BranchExecutor):
    """Evaluates branches that processes share, each its own. `shard_branches` sets it up.

    All processes of the row call it together with the same input, and all get the same result and the same gradients of
    the input and of side inputs. Messages of one call, whatever the depth of a branch:

    - forward, the state of a prefix (`corrected`): one sum over the processes of one state;
    - forward, the states of all prefixes 1..k (`outputs`): one gathering of k states, from each process those of its
      own branches;
    - backward, both: one sum of one state, and of the side inputs that learn.

    Backward costs nothing where neither the input nor a side input needs a gradient (a frozen stem). A process none of
    whose branches is in use takes part with zero. With gradients enabled the result always takes part in the backward
    pass: where nothing of this process learns, something of another one's may.

    Args:
        row: the processes.
        owners: rank in the row of each branch's process.
        local: evaluates this process's branches; `Loop` by default.

    Attributes:
        traffic: bytes and calls so far.

    Raises:
        ValueError: an owner outside the row, or a `local` that is a `Mesh` itself.

    >>> from paradepth.depth.channel import Alone
    >>> from paradepth.nn import EncoderLayer
    >>> branches = [Stack([EncoderLayer(16, heads=2, mlp=32)]) for _ in range(3)]
    >>> x, mesh = torch.randn(2, 5, 16), Mesh(Alone(), (0, 0, 0))
    >>> bool(torch.equal(mesh.corrected(branches, x), Loop().corrected(branches, x)))
    True
    """

    def __init__(self, row: Channel, owners: Sequence[int], *, local: BranchExecutor | None = None) -> None:
        if any(not 0 <= owner < row.size for owner in owners):
            raise ValueError(f"owners are {tuple(owners)}; a row of {row.size} has ranks 0 to {row.size - 1}")
        if isinstance(local, Mesh):
            raise ValueError("the branches of one process are evaluated by a local executor, not by a mesh again")
        self.row = row
        self.owners = tuple(owners)
        self.local = local or Loop()
        self.traffic = Traffic()

    def corrected(self, branches: Sequence[Stack], x: Any, *inputs: Any) -> Any:
        mine = self._mine(len(branches))
        ticket, entered, sides = self._enter(x, inputs)
        if not mine:
            part = tuple(torch.zeros_like(a) for a in pack(x))
        else:
            part = pack(self.local.corrected([branches[i] for i in mine], entered, *sides))
            if self.owners[0] != self.row.rank:  # the process of the first branch adds x itself
                part = subtract(part, pack(entered))
        part = tuple(p.to(a.dtype) for p, a in zip(part, pack(x), strict=True))
        return unpack(_Sum.apply(self, ticket, *part), like=x)

    def outputs(self, branches: Sequence[Stack], x: Any, *inputs: Any) -> list[Any]:
        k = len(branches)
        mine = self._mine(k)
        ticket, entered, sides = self._enter(x, inputs)
        found = [pack(g) for g in self.local.outputs([branches[i] for i in mine], entered, *sides)] if mine else []
        own = tuple(
            torch.stack([g[j].to(a.dtype) for g in found]) if found else a.new_zeros((0, *a.shape))
            for j, a in enumerate(pack(x))
        )
        gathered: State = _Gather.apply(self, k, ticket, *own)
        return [unpack(g, like=x) for g in zip(*(part.unbind(0) for part in gathered), strict=True)]

    def _mine(self, count: int) -> list[int]:
        """Indices of this process's branches among the first `count`."""
        assert count <= len(self.owners)
        return [i for i in range(count) if self.owners[i] == self.row.rank]

    def _enter(self, x: Any, inputs: tuple[Any, ...]) -> tuple[Tensor, Any, tuple[Any, ...]]:
        """The state and side inputs for this process's branches, whose gradients are sums over the processes, and a
        ticket: a scalar that the exit takes, so that on every process the backward pass goes through both."""
        state = pack(x)
        leaves, structure = tree_flatten(inputs)
        tensors = [*state, *leaves]
        learning = [i for i, t in enumerate(tensors) if isinstance(t, Tensor) and t.requires_grad]
        if not learning or not torch.is_grad_enabled():
            ticket = state[0].new_zeros(()).requires_grad_(torch.is_grad_enabled())
            return ticket, x, inputs
        ticket, *entered = _Enter.apply(self, *(tensors[i] for i in learning))
        for i, tensor in zip(learning, entered, strict=True):
            tensors[i] = tensor
        inside = tuple(tensors[: len(state)])
        return ticket, unpack(inside, like=x), tree_unflatten(tensors[len(state) :], structure)

    # ---- messages ------------------------------------------------------------------------------------------

    def _sum(self, parts: State, *, backward: bool = False) -> State:
        """The sum of each tensor over the processes, in one message."""
        flat = _joined([part.reshape(-1) for part in parts])
        self._count(flat, backward=backward)
        total = self.row.sum(flat)
        sizes = [part.numel() for part in parts]
        return tuple(s.view(p.shape).to(p.dtype) for s, p in zip(total.split(sizes), parts, strict=True))

    def _gather(self, parts: State, k: int) -> State:
        """From (c, …) on each process (k, …) on all, in the order of the branches, in one message."""
        counts = [0] * self.row.size
        places = []  # of a branch: its process, and which of that one's branches it is
        for owner in self.owners[:k]:
            places.append((owner, counts[owner]))
            counts[owner] += 1
        most = max(counts)
        flat = _joined([part.flatten(1) for part in parts])
        if len(flat) < most:
            flat = torch.cat([flat, flat.new_zeros(most - len(flat), flat.shape[1])])
        self._count(flat, backward=False)
        rows = torch.tensor([owner * most + place for owner, place in places], device=flat.device)
        ordered = self.row.gather(flat).flatten(0, 1)[rows]
        sizes = [part.shape[1:].numel() for part in parts]
        return tuple(
            s.reshape(k, *p.shape[1:]).to(p.dtype) for s, p in zip(ordered.split(sizes, dim=1), parts, strict=True)
        )

    def _count(self, sent: Tensor, *, backward: bool) -> None:
        size = sent.numel() * sent.element_size()
        if backward:
            self.traffic.backward_bytes += size
            self.traffic.backward_calls += 1
        else:
            self.traffic.forward_bytes += size
            self.traffic.forward_calls += 1


def _joined(flat: list[Tensor]) -> Tensor:
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)


class _Enter(torch.autograd.Function):
    """Forward the identity, and a ticket; backward the sum of the gradients over the processes."""

    @staticmethod
    def forward(ctx: Any, mesh: Mesh, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.mesh = mesh
        return (tensors[0].new_zeros(()), *(tensor.view_as(tensor) for tensor in tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, *gradients: Tensor) -> tuple[Any, ...]:
        mesh: Mesh = ctx.mesh
        return (None, *mesh._sum(gradients, backward=True))


class _Sum(torch.autograd.Function):
    """Forward the sum over the processes; backward the identity, since every process has the same loss."""

    @staticmethod
    def forward(ctx: Any, mesh: Mesh, ticket: Tensor, *parts: Tensor) -> State:
        return mesh._sum(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return (None, gradients[0].new_zeros(()), *gradients)


class _Gather(torch.autograd.Function):
    """Forward (c, …) of every process to (k, …) on all; backward this process's slices."""

    @staticmethod
    def forward(ctx: Any, mesh: Mesh, k: int, ticket: Tensor, *parts: Tensor) -> State:
        ctx.mine = mesh._mine(k)
        return mesh._gather(parts, k)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return (None, None, gradients[0].new_zeros(()), *(gradient[ctx.mine] for gradient in gradients))
