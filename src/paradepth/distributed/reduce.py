"""Gradients over a mesh of data-parallel and depth-parallel processes."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from paradepth.distributed.world import World


def reduce_gradients(model: nn.Module, world: World, *, owned: Collection[Tensor]) -> None:
    """Means of gradients: of owned layers over the data dimension; of all else, which every process holds, over all
    processes, so that rounding cannot make copies drift apart.

    Args:
        model: with gradients.
        world: the mesh.
        owned: the parameters that this process shares with no other depth rank.
    """
    layers, others = _owned_and_others(model, owned)
    if world.size > 1:
        _mean(layers, world.sum, world.size)
    _mean(others, world.sum_all, world.processes)


def clip_gradients(model: nn.Module, limit: float, world: World, *, owned: Collection[Tensor]) -> Tensor:
    """Scales gradients so that their norm over all layers, whoever owns them, is at most `limit`.

    Returns:
        The norm before, the same on every process.
    """
    layers, others = _owned_and_others(model, owned)
    zero = torch.zeros((), dtype=torch.float64, device=world.device)
    own, common = (sum((g.double().square().sum() for g in gradients), zero) for gradients in (layers, others))
    norm = (world.row.sum(own) + common).sqrt().float()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in (*layers, *others):
        gradient.mul_(factor)
    return norm


def _owned_and_others(model: nn.Module, owned: Collection[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of owned parameters and those of all others."""
    own = {id(parameter) for parameter in owned}
    layers: list[Tensor] = []
    others: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.grad is not None:
            (layers if id(parameter) in own else others).append(parameter.grad)
    return layers, others


def _mean(gradients: list[Tensor], add: Callable[[Tensor], Tensor], count: int) -> None:
    if not gradients:
        return
    flat = add(torch.cat([gradient.flatten() for gradient in gradients])) / count
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
