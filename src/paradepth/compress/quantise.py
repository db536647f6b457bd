"""Quantising: small integers and scales in place of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from paradepth.compress.step import Step, register
from paradepth.models import TrunkModel
from paradepth.models.quantised import Method, check_quantise, quantise

if TYPE_CHECKING:
    from paradepth.compress.workbench import Workbench


class _Quantise(Step):
    """Quantises by the method that the step is named after. Nothing follows it: integers are neither trained nor
    pruned."""

    name: ClassVar[Method]  # pyright: ignore[reportIncompatibleVariableOverride]
    last = True

    def check(self, model: TrunkModel) -> None:
        check_quantise(model)

    def apply(self, model: TrunkModel, bench: Workbench) -> TrunkModel:
        return quantise(model, self.name)


@register
@dataclass(frozen=True)
class Int8(_Quantise):
    """The weights of the linear maps of trunk and head as integers of 8 bits, with a scale for each output; products in
    float32.

    The stem computes in float32: its tables of embeddings are rounded to 8 bits, its other weights, and biases and
    norms, to half precision. The file is about a quarter. By torchao's `Int8WeightOnlyConfig`.
    """

    name = "int8"


@register
@dataclass(frozen=True)
class Int8Dynamic(_Quantise):
    """`Int8` with products of integers: what goes into a linear map is rounded to 8 bits too, with a scale for each
    token. By torchao's `Int8DynamicActivationInt8WeightConfig`."""

    name = "int8_dynamic"


@register
@dataclass(frozen=True)
class Int4(_Quantise):
    """`Int8` with integers of 4 bits and a scale for every 32 inputs of an output; products in float32.

    The file is about a sixth. By torchao's `IntxWeightOnlyConfig`, which computes on every device, on weights that it
    makes float32 for each product.
    """

    name = "int4"
