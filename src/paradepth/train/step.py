"""The loss of one update as a module, so that DDP and torch.compile can wrap it.

Shapes: B batch, … targets of a sample, N classes, n prefixes.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paradepth.models import TrunkModel
from paradepth.train.schedules import Objective

IGNORED = -100  # a target that does not count: padding, a token that was not masked
UNSEEN = -101  # and below, in evaluation: a label that is none of the classes; never right, and without a loss


class TrainStep(nn.Module):
    """Inputs and targets to the loss of an `Objective` and the number of correct predictions of its prefix.

    The loss is the cross-entropy over the last dimension of the logits, a mean over all targets that count: one a
    sample for classification, one a token for language.

    Args:
        model: the model.
        label_smoothing: of the cross-entropy.
        gate_penalty: times the mean of the gates of the prefix's branches, it is added to the loss; of a gated model.
        autocast: dtype of autocast, or None.
    """

    def __init__(
        self,
        model: TrunkModel,
        *,
        label_smoothing: float = 0.0,
        gate_penalty: float = 0.0,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.gate_penalty = gate_penalty
        self.autocast = autocast

    def forward(self, inputs: Any, targets: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
        """Returns (loss, number of correct predictions) for targets (B, …), of which those that are `IGNORED` do not
        count; without any that does the loss is 0."""
        device = targets.device.type
        with torch.autocast(device, dtype=self.autocast) if self.autocast else nullcontext():
            if objective.weights is None:
                branches = objective.prefix if self.model.prefixes > 1 else None
                logits_nBN = self.model(inputs, branches=branches).unsqueeze(0)
                weights = (1.0,)
            else:
                logits_nBN = self.model.prefix_logits(inputs, branches=objective.prefix, detach=objective.detach)
                weights = objective.weights
            loss = torch.zeros((), device=targets.device)
            if self.gate_penalty:
                loss = loss + self.gate_penalty * self.model.gates(inputs, branches=objective.prefix).mean()
        total = sum(weights)
        flat_B = targets.flatten()
        count = (flat_B != IGNORED).sum().clamp(min=1)
        logits_nBN = logits_nBN.float()  # also for argmax, which is slow in half precision on CPUs
        for weight, logits_BN in zip(weights, logits_nBN.unbind(0), strict=True):
            if weight:
                entropy = F.cross_entropy(
                    logits_BN.flatten(0, -2),
                    flat_B,
                    ignore_index=IGNORED,
                    label_smoothing=self.label_smoothing,
                    reduction="sum",
                )
                loss = loss + (weight / total) * (entropy / count)
        return loss, (logits_nBN[-1].argmax(dim=-1) == targets).sum()


def split(inputs: Any, parts: int) -> list[Any]:
    """A batch of inputs, a tensor or a tuple of tensors, cut into `parts` along its samples.

    >>> split((torch.zeros(4, 2), torch.zeros(4, 3)), 2)[0][1].shape
    torch.Size([2, 3])
    """
    if isinstance(inputs, Tensor):
        return list(inputs.chunk(parts))
    return list(zip(*(split(part, parts) for part in inputs), strict=True))
