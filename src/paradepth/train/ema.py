"""Exponential moving average of weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


class MovingAverage:
    """Keeps θ̄ ← decay · θ̄ + (1 − decay) · θ of a model's parameters, in a copy of the model.

    The decay starts small, min(decay, (1 + t) / (10 + t)) after t updates, so that early averages forget the
    initialisation.

    >>> model = nn.Linear(1, 1)
    >>> average = MovingAverage(model, 0.5)
    >>> _ = nn.init.constant_(model.weight, 1.0), average.update(model)
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.model: Any = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the model's present weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for average, weight in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(weight, 1.0 - decay)
