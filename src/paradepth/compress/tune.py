"""Training further what was shrunk: on the targets alone, or with the full model as the teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paradepth.compress.magnitude import kept_weights
from paradepth.compress.step import CountStep, register
from paradepth.models import TrunkModel

if TYPE_CHECKING:
    from paradepth.compress.workbench import Workbench


@register
class Tune(CountStep):
    """Recovery: a number of updates on the loss of the full sum. Weights that were pruned away stay zero.

    >>> str(Tune.parse("300"))
    'tune=300'
    """

    name = "tune"
    counted = "updates"

    def apply(self, model: TrunkModel, bench: Workbench) -> TrunkModel:
        return bench.tune(model, steps=self.count, masks=kept_weights(model))


@register
class Distil(CountStep):
    """Distillation: a number of updates towards what the full model says, and towards the targets.

    The teacher is the full sum of the model that the plan started from. Weights that were pruned away stay zero.
    Source: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network (arXiv 1503.02531).

    >>> str(Distil.parse("300"))
    'distil=300'
    """

    name = "distil"
    counted = "updates"

    def apply(self, model: TrunkModel, bench: Workbench) -> TrunkModel:
        return bench.tune(model, steps=self.count, teacher=bench.teacher, masks=kept_weights(model))
