"""Gradients over a mesh of data-parallel and depth-parallel processes."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from paradepth.distributed.world import World


def reduce_gradients(model: nn.Module, world: World, *, owned: Collection[Tensor]) -> None:
    """Means of gradients: of owned layers over the data dimension; of all else, which every process holds, over all
    processes, so that rounding cannot make copies drift apart.

    Args:
        model: with gradients.
        world: the mesh.
        owned: ids of the parameters that this process shares with no other depth rank.
    """
    own = {id(parameter) for parameter in owned}
    layers = [p.grad for p in model.parameters() if p.grad is not None and id(p) in own]
    others = [p.grad for p in model.parameters() if p.grad is not None and id(p) not in own]
    if world.size > 1:
        _mean(layers, world.sum, world.size)
    _mean(others, world.sum_all, world.processes)


def _mean(gradients: list[Tensor], add: object, count: int) -> None:
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    flat = add(flat) / count  # pyright: ignore[reportCallIssue]
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def clip_gradients(model: nn.Module, limit: float, world: World, *, owned: Collection[Tensor]) -> Tensor:
    """Scales gradients so that their norm over all layers, whoever owns them, is at most `limit`.

    Returns:
        The norm before, the same on every process.
    """
    own = {id(parameter) for parameter in owned}
    with_gradients = [p for p in model.parameters() if p.grad is not None]
    squares = [torch.zeros(2, dtype=torch.float64, device=world.device)]
    for parameter in with_gradients:
        assert parameter.grad is not None
        place = torch.tensor([1.0, 0.0] if id(parameter) in own else [0.0, 1.0], device=world.device)
        squares.append(place * parameter.grad.double().square().sum())
    layers, others = torch.stack(squares).sum(dim=0).unbind()
    norm = (world.row.sum(layers) + others).sqrt().float()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for parameter in with_gradients:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
    return norm
