"""How much the loss depends on attention heads and hidden neurons.

Every unit is given a gate ξ = 1 on its output; its importance is the mean over samples of |∂L/∂ξ|, the first-order
estimate of what the loss changes when the gate closes. With y the unit's output, summed over tokens and over the width
of a head, ∂L/∂ξ = Σ y · ∂L/∂y, so one backward pass tells of all of them.

Sources: Michel, Levy and Neubig, Are Sixteen Heads Really Better than One? (arXiv 1905.10650) for heads; Molchanov et
al., Importance Estimation for Neural Network Pruning (arXiv 1906.10771) for the Taylor expansion.

Shapes: U units.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from paradepth.models import TrunkModel
from paradepth.nn.attention import CrossAttention, MultiHeadAttention
from paradepth.nn.feed_forward import FeedForward
from paradepth.train.step import IGNORED

if TYPE_CHECKING:
    from paradepth.compress.workbench import Workbench

Attention = MultiHeadAttention | CrossAttention


def attentions(model: TrunkModel) -> dict[str, Attention]:
    """The attention modules of the trunk, by name within it."""
    found = model.trunk.named_modules()
    return {name: module for name, module in found if isinstance(module, MultiHeadAttention | CrossAttention)}


def feed_forwards(model: TrunkModel) -> dict[str, FeedForward]:
    """The feed-forward modules of the trunk, by name within it."""
    return {name: module for name, module in model.trunk.named_modules() if isinstance(module, FeedForward)}


def importance(model: TrunkModel, bench: Workbench, *, batches: int = 16) -> dict[str, Tensor]:
    """The importance of every head and every hidden neuron on training data, without dropout.

    Args:
        model: on the bench's device, in evaluation mode; left alone, gradients included.
        bench: whose first training batches and loss are used.
        batches: how many.

    Returns:
        By name of the attention or feed-forward module within the trunk: one number for each head or neuron, (U,).
    """
    units: dict[str, tuple[nn.Linear, int]] = {
        **{name: (module.out, module.heads) for name, module in attentions(model).items()},
        **{name: (module.down, module.down.in_features) for name, module in feed_forwards(model).items()},
    }
    scores = {name: torch.zeros(count, dtype=torch.float64, device=bench.device) for name, (_, count) in units.items()}
    seen: dict[str, tuple[Tensor, Tensor]] = {}  # outputs of units, and their gates

    def catch(name: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
        gate = torch.zeros_like(arguments[0], requires_grad=True)  # the gradient of what it is added to
        seen[name] = arguments[0].detach(), gate
        return arguments[0] + gate

    handles = [linear.register_forward_pre_hook(partial(catch, name)) for name, (linear, _) in units.items()]
    try:
        for inputs, targets in bench.training_batches(batches):
            with torch.enable_grad():
                loss = bench.loss(model(inputs), targets) / max(int((targets != IGNORED).sum()), 1)
                gradients = torch.autograd.grad(loss, [gate for _, gate in seen.values()])
            for (name, (y, _)), gradient in zip(seen.items(), gradients, strict=True):
                by_unit = (y * gradient).unflatten(-1, (len(scores[name]), -1)).sum(dim=-1)
                scores[name] += by_unit.flatten(1, -2).sum(dim=1).abs().sum(dim=0)
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    return scores
