"""Stratified hold-out splits, and parts of a training split."""

from __future__ import annotations

import torch

from paradepth.data.seeds import generator


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


def check_train_fraction(fraction: float) -> None:
    """Refuses a part of the training split that there is not.

    Raises:
        ValueError: it is not above 0 and at most 1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"train_fraction is {fraction}, but must be above 0 and at most 1")


def training_part(labels_N: torch.Tensor, fraction: float, *, seed: int) -> torch.Tensor:
    """Indices of a part of the training samples, ascending: for studies of how much data a model needs.

    Of every class `fraction` of its samples, rounded, and at least one. With the same seed a smaller part lies within
    a larger one, so that more data are the same data and more.

    Args:
        labels_N: class of each sample; all the same where there are no classes.
        fraction: above 0 and at most 1.
        seed: the part is a function of the labels, the fraction and this number.

    Raises:
        ValueError: a fraction out of range.

    >>> labels = torch.tensor([0] * 10 + [1] * 30)
    >>> part = training_part(labels, 0.2, seed=0)
    >>> labels[part].bincount().tolist(), len(training_part(labels, 0.001, seed=0))
    ([2, 6], 2)
    """
    check_train_fraction(fraction)
    chosen_N = torch.zeros(len(labels_N), dtype=torch.bool)
    for label in labels_N.unique().tolist():
        members = (labels_N == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator(seed, "part of the training split", label))
        chosen_N[members[order[: max(round(fraction * len(members)), 1)]]] = True
    return chosen_N.nonzero().flatten()
