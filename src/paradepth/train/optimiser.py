"""Optimisers: AdamW for everything, Muon for the trunk's matrices and AdamW for the rest, or SGD with momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paradepth.models.sharing import own_parameters
from paradepth.train.config import OptimiserOptions


class Optimiser:
    """One or two torch optimisers over a model's parts, with a learning-rate factor for each part.

    The state is kept under parameter names, so that it survives growth and truncation of the model.

    Args:
        model: a model with `parts()`.
        options: optimiser, peak learning rate, betas or momentum, and weight decay.
    """

    def __init__(self, model: nn.Module, options: OptimiserOptions) -> None:
        self.base_rate = options.learning_rate
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        groups: dict[str, list[dict[str, Any]]] = {"adamw": [], "muon": [], "sgd": []}
        rest = "sgd" if options.optimiser == "sgd" else "adamw"
        for part, own in own_parameters(model).items():
            kinds: dict[tuple[str, float], list[nn.Parameter]] = {}
            for parameter in own:
                matrix = parameter.dim() == 2
                hidden = part not in ("stem", "head")  # Muon is for hidden matrices; embeddings and outputs take AdamW
                kind = "muon" if options.optimiser == "muon" and matrix and hidden else rest
                decays = matrix and "positions" not in self.names[parameter]
                kinds.setdefault((kind, options.weight_decay if decays else 0.0), []).append(parameter)
            for (kind, decay), parameters in kinds.items():
                groups[kind].append({"params": parameters, "weight_decay": decay, "part": part})
        self.optimisers: list[torch.optim.Optimizer] = []
        if groups["adamw"]:  # fused kernels exist for CPUs and GPUs
            adamw = torch.optim.AdamW(groups["adamw"], lr=self.base_rate, betas=options.betas, fused=True)
            self.optimisers.append(adamw)
        if groups["sgd"]:
            momentum = 0.9 if options.momentum is None else options.momentum
            self.optimisers.append(torch.optim.SGD(groups["sgd"], lr=self.base_rate, momentum=momentum))
        if groups["muon"]:
            muon = torch.optim.Muon(groups["muon"], lr=self.base_rate, adjust_lr_fn="match_rms_adamw")
            self.optimisers.append(muon)

    def set_rates(self, factors: Mapping[str, float]) -> None:
        """Sets each part's learning rate to its factor times the peak rate."""
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.base_rate * factors[group["part"]]

    @property
    def rate(self) -> float:
        """The largest learning rate of the last update."""
        return max(group["lr"] for optimiser in self.optimisers for group in optimiser.param_groups)

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One update; parameters without a gradient are left alone."""
        for optimiser in self.optimisers:
            optimiser.step()

    def state_tensors(self) -> dict[str, Tensor]:
        """The moments as "parameter name:moment" → tensor."""
        return {
            f"{self.names[parameter]}:{key}": value
            for optimiser in self.optimisers
            for parameter, state in optimiser.state.items()
            for key, value in state.items()
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes moments from `state_tensors`; parameters that are not in it start afresh."""
        parameters: dict[str, Tensor] = {name: parameter for parameter, name in self.names.items()}
        owner = {p: o for o in self.optimisers for group in o.param_groups for p in group["params"]}
        for key, value in tensors.items():
            name, moment = key.rsplit(":", 1)
            parameter = parameters[name]
            device = "cpu" if moment == "step" and parameter.device.type == "cpu" else parameter.device
            owner[parameter].state[parameter][moment] = value.to(device)
