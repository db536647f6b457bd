"""Keeping the leading branches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paradepth.compress.step import CountStep, register
from paradepth.models import TrunkModel

if TYPE_CHECKING:
    from paradepth.compress.workbench import Workbench


@dataclass(frozen=True)
class BranchCount(CountStep):
    """A step that leaves a number of branches.

    Attributes:
        count: branches of the result.
    """

    counted = "branches"

    def check(self, model: TrunkModel) -> None:
        have = model.config.branches
        if not have:
            raise ValueError(
                f"{self.name} leaves branches, and this model is a serial stack of depth {model.config.depth}; heads, "
                "neurons, magnitude and quantisation shrink a stack"
            )
        if not 1 <= self.count <= have:
            raise ValueError(
                f"{self.name} is {self.count}, and the model has {have} branches; it must be between 1 and {have}"
            )

    def shape(self, config: Any) -> Any:
        return config.with_branches(config.branch_depths[: self.count])


@register
class Prefix(BranchCount):
    """Keeps the first branches: `truncate`.

    Source: Shallow Parallel Transformers with Progressive Approximation (arXiv 2510.15425), where it is what makes a
    model smaller.

    >>> str(Prefix.parse("2"))
    'prefix=2'
    """

    name = "prefix"

    def apply(self, model: TrunkModel, bench: Workbench) -> TrunkModel:
        self.check(model)
        return model.truncate(self.count).eval()
