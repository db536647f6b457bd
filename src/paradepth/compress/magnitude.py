"""Pruning single weights by their magnitude."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from torch import Tensor, nn
from torch.nn.utils import prune

from paradepth.compress.step import Step, register
from paradepth.models import TrunkModel
from paradepth.models.sharing import check_unshared

if TYPE_CHECKING:
    from paradepth.compress.workbench import Workbench


@register
@dataclass(frozen=True)
class Magnitude(Step):
    """Sets the smallest weights of the trunk's linear maps to zero, wherever they are, by `torch.nn.utils.prune`.

    Biases, norms, stem and head stay whole. A network of these shapes is not faster for it; its file is smaller where
    zeros are not stored. Source: Han, Pool, Tran and Dally, Learning both Weights and Connections for Efficient Neural
    Networks (arXiv 1506.02626), in one go instead of step by step.

    Attributes:
        fraction: part of the weights that become zero, above 0 and below 1.

    Raises:
        ValueError: any other fraction.

    >>> str(Magnitude.parse("0.5"))
    'magnitude=0.5'
    """

    name = "magnitude"
    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(
                f"magnitude is {self.fraction}; it is the part of the weights that become zero, above 0 and below 1"
            )

    def __str__(self) -> str:
        return f"{self.name}={self.fraction!r}"

    @classmethod
    def parse(cls, setting: str | None) -> Self:
        try:
            fraction = float(setting or "")
        except ValueError as error:
            raise ValueError(
                f"magnitude is {setting!r}; it needs the part of the weights that become zero: magnitude=0.5, say"
            ) from error
        return cls(fraction)

    def check(self, model: TrunkModel) -> None:
        check_unshared(model.config, "magnitude prunes every layer's weights on their own")

    def apply(self, model: TrunkModel, bench: Workbench) -> TrunkModel:
        self.check(model)
        scratch, pruned = copy.deepcopy(model), copy.deepcopy(model).eval()
        chosen = [(linear, "weight") for _, linear in trunk_linears(scratch)]
        prune.global_unstructured(chosen, pruning_method=prune.L1Unstructured, amount=self.fraction)
        for linear, name in chosen:
            prune.remove(linear, name)  # leaves parameters in another order, which a copy does not have
        pruned.load_state_dict(scratch.state_dict())
        return pruned


def trunk_linears(model: TrunkModel) -> Iterator[tuple[str, nn.Linear]]:
    """The linear maps of the trunk, by the name of the module in the model."""
    inside = set(model.trunk.modules())
    for name, module in model.named_modules():
        if module in inside and isinstance(module, nn.Linear):
            yield name, module


def kept_weights(model: TrunkModel) -> dict[str, Tensor]:
    """Where the weights of a pruned trunk are not zero, by name of the parameter; empty for a model that is not pruned.

    Training never makes a weight exactly zero, so zeros scattered in a matrix tell that it was pruned; a matrix that is
    zero throughout alone does not, since new branches start with such ones.
    """
    masks = {f"{name}.weight": linear.weight != 0 for name, linear in trunk_linears(model)}
    return masks if any(0 < mask.sum() < mask.numel() for mask in masks.values()) else {}
