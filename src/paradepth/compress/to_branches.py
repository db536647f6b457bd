"""A serial stack as branches, as a step of a plan: `branches=4+distil=300`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from paradepth.compress.step import CountStep, register
from paradepth.depth.as_branches import Groups
from paradepth.models import TrunkModel
from paradepth.models.convert import converted_config

if TYPE_CHECKING:
    from paradepth.compress.workbench import Workbench


@dataclass(frozen=True)
class Converted(CountStep):
    """A step that shares the layers out among a number of branches, `TrunkModel.convert`; nothing becomes smaller.

    Attributes:
        count: branches of the result.
    """

    counted = "branches"
    groups: ClassVar[Groups]

    def check(self, model: TrunkModel) -> None:
        converted_config(model.config, self.count, groups=self.groups)

    def shape(self, config: Any) -> Any:
        return converted_config(config, self.count, groups=self.groups)

    def apply(self, model: TrunkModel, bench: Workbench) -> TrunkModel:
        return model.convert(self.count, groups=self.groups).eval()


@register
class ToBranches(Converted):
    """The first branch has the first layers.

    >>> str(ToBranches.parse("4"))
    'branches=4'
    """

    name = "branches"
    groups = "consecutive"


@register
class ToInterleavedBranches(Converted):
    """The layers are dealt out one by one.

    >>> str(ToInterleavedBranches.parse("4"))
    'interleaved=4'
    """

    name = "interleaved"
    groups = "interleaved"
