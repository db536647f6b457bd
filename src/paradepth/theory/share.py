"""How much of a model's logits each branch makes: two decompositions that add up exactly.

*Frozen*: the head's input-dependent factors (the scale of the final layer norm, gates of what is behind it) are taken
as they are at the full state s. The head is then one affine map, logits = H(s) s + c, and s is a sum, so

    logits = c + H x + H δ_1(x) + … + H δ_n(x)

whatever the order of the branches.

*Prefix*: logits of prefix k minus those of prefix k−1, which telescope; a branch is credited with what it changes
behind those before it, its effect on the final norm's scale included. Prefix 0 is the head of x itself.

A share is the projection of a part onto the whole: with logits centred over the classes (softmax does not see their
mean), share_i = Σ ⟨part_i, logits⟩ / Σ ‖logits‖², summed over samples and tokens. Shares add up to one; one below zero
works against the rest.

Shapes: B batch, T tokens, D width, N logits, n parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paradepth.theory.model import ModelForm


class Shares:
    """Shares gathered over batches.

    Attributes:
        parts: Σ ⟨part, logits⟩ of each part so far. whole: Σ ‖logits‖².
    """

    def __init__(self) -> None:
        self.parts: Tensor | None = None
        self.whole = 0.0

    def add(self, parts_nBTN: Tensor, there_BT: Tensor | None) -> None:
        """Takes up a batch.

        Args:
            parts_nBTN: what the logits are a sum of.
            there_BT: which tokens count; None: all.
        """
        parts = parts_nBTN.double()
        parts = parts - parts.mean(dim=-1, keepdim=True)
        if there_BT is not None:
            parts = parts * there_BT[..., None]
        whole = parts.sum(0)
        found = (parts * whole).flatten(1).sum(1)
        self.parts = found if self.parts is None else self.parts + found
        self.whole += float(whole.square().sum())

    def value(self) -> list[float]:
        """The share of each part; they add up to one, or are all 0 where the logits are equal for all classes."""
        if self.parts is None:
            return []
        return (self.parts / self.whole).tolist() if self.whole > 0 else [0.0] * len(self.parts)


def frozen_parts(form: ModelForm) -> Tensor:
    """Constant, input and branches: what the logits consist of for the head as it is at the full state,
    (n + 2, B, T, N)."""
    state_parts = [form.trunk.starts * form.x_BTD, *form.deltas]
    parts = [form.head.operator.matvec(part) for part in state_parts]
    constant = form.head.offset.expand_as(parts[0])
    return torch.stack([constant, *parts])


def prefix_parts(prefixes_nBTN: Tensor, before_BTN: Tensor) -> Tensor:
    """Prefix 0, then what each branch changes: (n + 1, B, T, N).

    Args:
        prefixes_nBTN: logits of prefixes 1..n.
        before_BTN: logits of prefix 0, the head of the input of the trunk.

    >>> prefix_parts(torch.tensor([[[[3.0, 4.0]]], [[[5.0, 4.0]]]]), torch.tensor([[[1.0, 1.0]]])).flatten(1).tolist()
    [[1.0, 1.0], [2.0, 3.0], [2.0, 0.0]]
    """
    return torch.cat([before_BTN[None], prefixes_nBTN.diff(dim=0, prepend=before_BTN[None])])
