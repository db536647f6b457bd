"""Sharing the layers of a stack between the processes of a row, and putting tensors together again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paradepth.depth import Channel, DepthExecutor, Part, Stack, cut_into_parts


class Elsewhere(nn.Module):
    """Stands for a layer that another process owns. It has no parameters."""

    is_elsewhere = True  # models, which know no processes, ask for it before they are saved

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._outline = (layer.to("meta"),)  # in a tuple: not a submodule, so nobody trains or saves it

    def residual(self, x: Any, *inputs: Any) -> Any:
        """Refuses: an executor must not call it."""
        raise AssertionError("this layer belongs to another process")

    def forward(self, x: Any, *inputs: Any, step: float = 1.0) -> Any:
        raise AssertionError("this layer belongs to another process")

    def zero_output_(self) -> None:
        """Nothing: the owner does it."""

    def flops(self, tokens: int) -> int:
        """Floating-point operations of the layer that it stands for."""
        return self._outline[0].flops(tokens)  # pyright: ignore[reportCallIssue]


def shard_depth(stack: Stack, row: Channel, *, executor: DepthExecutor | None = None) -> None:
    """Leaves this process its contiguous share of a stack's layers; the storage of the others is freed.

    Every process calls it with equal weights. From then on `stack(x)` is a call that all processes of the row make
    together, with the same `x`; all get the result and the gradient of `x`, each the gradients of its own layers.
    The shares are whole intervals of the executor and differ by at most one.

    Args:
        stack: changed in place.
        row: the processes.
        executor: replaces the stack's executor.

    Raises:
        ValueError: more processes than intervals, a parameter that two processes would own, or an executor for one
            process.
    """
    if executor is not None:
        stack.executor = executor
    if row.size == 1:
        return
    if not stack.executor.on_several_processes:
        raise ValueError(
            f"{type(stack.executor).__name__} evaluates the layers of one process, and {row.size} would share them"
        )
    bounds = cut_into_parts(stack.depth, buffers=stack.buffer_layers, unit=stack.executor.unit, ranks=row.size)
    owners: dict[int, int] = {}
    for rank in range(row.size):
        for n in range(bounds[rank], bounds[rank + 1]):
            for name, parameter in stack.layers[n].named_parameters():
                if owners.setdefault(id(parameter), rank) != rank:
                    raise ValueError(
                        f"parameter {name} of layer {n} is shared with a layer of another process; layers that share "
                        "parameters must lie on one process: use fewer processes"
                    )
    part = Part(bounds, row)
    for n in range(stack.depth):
        if n not in part.owned:
            stack.layers[n] = Elsewhere(stack.layers[n])
    stack.part = part
    stack.executor.check(stack)


def of_the_trunk(name: str) -> bool:
    """Whether a tensor of a model, or of its optimiser, belongs to the trunk: to one process, where that is shared."""
    return "trunk." in name


def gather_tensors(
    tensors: Mapping[str, Tensor],
    row: Channel,
    *,
    mine: Callable[[str], bool] = of_the_trunk,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The tensors of every process of the row, on the CPU of its first; elsewhere an empty dictionary.

    Args:
        tensors: this process's, by name.
        row: the processes.
        mine: whether a name belongs to this process alone; the first process sends all of its own besides.
        device: where messages are made: a GPU for NCCL.
    """
    if row.size == 1:
        return {name: tensor.detach() for name, tensor in tensors.items()}
    if row.rank == 0:
        gathered = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        for source in range(1, row.size):
            for name, like in _receive_outline(row, source, device):
                gathered[name] = row.receive((like,), source=source)[0].cpu()
        return gathered
    own = {name: tensor.detach().to(device) for name, tensor in tensors.items() if mine(name)}
    outline = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in own.items()]
    text = torch.tensor(list(json.dumps(outline).encode()), dtype=torch.uint8, device=device)
    row.send((torch.tensor([len(text)], dtype=torch.int64, device=device),), to=0)
    row.send((text,), to=0)
    for tensor in own.values():
        row.send((tensor,), to=0)
    row.flush()
    return {}


def _receive_outline(row: Channel, source: int, device: torch.device | str) -> list[tuple[str, Tensor]]:
    length = row.receive((torch.empty(1, dtype=torch.int64, device=device),), source=source)[0]
    text = row.receive((torch.empty(int(length.item()), dtype=torch.uint8, device=device),), source=source)[0]
    outline = json.loads(bytes(text.tolist()))
    return [(name, torch.empty(shape, dtype=getattr(torch, kind), device=device)) for name, kind, shape in outline]
