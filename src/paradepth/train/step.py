"""The loss of one update as a module, so that DDP and torch.compile can wrap it.

Shapes: B batch, … targets of a sample, N classes, n prefixes.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paradepth.models import TrunkModel
from paradepth.train.schedules import Objective


class TrainStep(nn.Module):
    """Inputs and targets to the loss of an `Objective` and the number of correct predictions of its prefix.

    The loss is the cross-entropy over the last dimension of the logits, a mean over all targets: one a sample for
    classification, one a token for language.

    Args:
        model: the model.
        label_smoothing: of the cross-entropy.
        autocast: dtype of autocast, or None.
    """

    def __init__(self, model: TrunkModel, *, label_smoothing: float = 0.0, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.autocast = autocast

    def forward(self, inputs: Tensor, targets: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
        """Returns (loss, number of correct predictions) for targets (B, …)."""
        device = inputs.device.type
        with torch.autocast(device, dtype=self.autocast) if self.autocast else nullcontext():
            if objective.weights is None:
                branches = objective.prefix if self.model.prefixes > 1 else None
                logits_nBN = self.model(inputs, branches=branches).unsqueeze(0)
                weights = (1.0,)
            else:
                logits_nBN = self.model.prefix_logits(inputs, branches=objective.prefix, detach=objective.detach)
                weights = objective.weights
        total = sum(weights)
        loss = torch.zeros((), device=inputs.device)
        for weight, logits_BN in zip(weights, logits_nBN.float().unbind(0), strict=True):
            if weight:
                flat_BN, flat_B = logits_BN.flatten(0, -2), targets.flatten()
                entropy = F.cross_entropy(flat_BN, flat_B, label_smoothing=self.label_smoothing)
                loss = loss + (weight / total) * entropy
        return loss, (logits_nBN[-1].argmax(dim=-1) == targets).sum()
