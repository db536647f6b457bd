"""Stratified hold-out splits."""

from __future__ import annotations

import torch


def stratified_split(labels_N: torch.Tensor, fraction: float, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the samples kept and of those held out, both ascending.

    Every class gives `fraction` of its samples, rounded: at least one if it has two or more, and never its last one.

    Args:
        labels_N: class of each sample.
        fraction: share to hold out, strictly between 0 and 1.
        seed: the split is a function of the labels and this number.

    Raises:
        ValueError: when the fraction is out of range or every class has a single sample, so nothing can be held out.

    >>> kept, held = stratified_split(torch.tensor([0, 0, 0, 1, 1, 1]), 0.34, seed=0)
    >>> len(kept), len(held)
    (4, 2)
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction is {fraction}, but must lie strictly between 0 and 1")
    generator = torch.Generator().manual_seed(seed)
    held_N = torch.zeros(len(labels_N), dtype=torch.bool)
    for label in labels_N.unique():  # sorted, so the order of the draws is fixed
        members = (labels_N == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held_N[members[:count]] = True
    if not held_N.any():
        raise ValueError(
            f"no sample can be held out of {len(labels_N)}: every class has a single one; "
            "give at least two images per class or a folder of their own to the held-out samples"
        )
    return (~held_N).nonzero().flatten(), held_N.nonzero().flatten()
