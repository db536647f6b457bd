"""Pruning attention heads and hidden neurons: fewer of them in every layer, so that the result is a smaller model of
the ordinary kind.

Shapes: D width, H heads, K width of a head, M hidden neurons.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from paradepth.compress.importance import Attention, attentions, feed_forwards, importance
from paradepth.compress.step import CountStep, register
from paradepth.models import TrunkConfig, TrunkModel
from paradepth.models.sharing import check_unshared
from paradepth.nn import FeedForward

if TYPE_CHECKING:
    from paradepth.compress.workbench import Workbench


@dataclass(frozen=True)
class _Structured(CountStep):
    """Keeps the most important units of every layer.

    Attributes:
        count: units that every layer keeps.
    """

    field: ClassVar[str]  # of the configuration, which says how many a layer has

    @abstractmethod
    def _units(self, model: TrunkModel) -> Mapping[str, Any]:
        """The modules that have such units, by name within the trunk."""

    @abstractmethod
    def _copy(self, module: Any, source: Any, kept_U: Tensor) -> None:
        """Takes the weights of the kept units, in their order."""

    def check(self, model: TrunkModel) -> None:
        if not isinstance(model.config, TrunkConfig):
            raise ValueError(
                f"{self.name} makes layers of this package smaller, and this model's are those of the transformers "
                "library; magnitude and quantisation apply to them"
            )
        check_unshared(model.config, f"{self.name} keeps other {self.counted} in every layer")
        have = getattr(model.config, self.field)
        if self.count > have:
            raise ValueError(
                f"{self.name} is {self.count}, and every layer has {have} {self.counted}; it must be between 1 and "
                f"{have}"
            )

    def shape(self, config: Any) -> Any:
        return dataclasses.replace(config, **{self.field: self.count})

    def apply(self, model: TrunkModel, bench: Workbench) -> TrunkModel:
        self.check(model)
        config = self.shape(model.config)
        if config == model.config:
            return copy.deepcopy(model).eval()
        model = copy.deepcopy(model).eval()
        scores = importance(model, bench)
        smaller = model.fresh(config).eval()
        _take_equal_shapes(smaller, model)
        sources = self._units(model)
        with torch.no_grad():
            for name, module in self._units(smaller).items():
                kept_U = scores[name].topk(self.count).indices.sort().values
                self._copy(module, sources[name], kept_U)
        return smaller


@register
class Heads(_Structured):
    """Keeps the most important attention heads of every layer, of the width that they have.

    Importance is that of `importance`: Michel, Levy and Neubig (arXiv 1905.10650).

    >>> str(Heads.parse("2"))
    'heads=2'
    """

    name = "heads"
    counted = "heads"
    field = "heads"

    def check(self, model: TrunkModel) -> None:
        super().check(model)
        if model.config.mixing == "static":
            raise ValueError(
                "heads are pruned where all layers have attention, and this model mixes tokens by static matrices; "
                "neurons and magnitude apply to it"
            )

    def shape(self, config: Any) -> Any:
        if self.count == config.heads:
            return config
        return dataclasses.replace(
            config, heads=self.count, head_width=config.head_width or config.width // config.heads
        )

    def _units(self, model: TrunkModel) -> Mapping[str, Attention]:
        return attentions(model)

    def _copy(self, module: Attention, source: Attention, kept_U: Tensor) -> None:
        pairs = ("qkv", 3), ("q", 1), ("kv", 2)  # maps that are stacked in a weight
        for name, maps in pairs:
            if hasattr(source, name):
                for mine, theirs in _parameters(module, source, name):
                    by_head = theirs.unflatten(0, (maps, source.heads, source.head_width))
                    mine.copy_(by_head[:, kept_U].flatten(0, 2))
        by_head = source.out.weight.unflatten(1, (source.heads, source.head_width))
        module.out.weight.copy_(by_head[:, kept_U].flatten(1, 2))


@register
class Neurons(_Structured):
    """Keeps the most important hidden neurons of every layer's feed-forward part.

    Importance is that of `importance`: Molchanov et al. (arXiv 1906.10771), with one gate for a neuron.

    >>> str(Neurons.parse("64"))
    'neurons=64'
    """

    name = "neurons"
    counted = "neurons"
    field = "mlp"

    def _units(self, model: TrunkModel) -> Mapping[str, FeedForward]:
        return feed_forwards(model)

    def _copy(self, module: FeedForward, source: FeedForward, kept_U: Tensor) -> None:
        for mine, theirs in _parameters(module, source, "up"):
            mine.copy_(theirs[kept_U])
        module.down.weight.copy_(source.down.weight[:, kept_U])


def _parameters(module: nn.Module, source: nn.Module, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Weight and bias of a linear map, each with that of the source."""
    mine, theirs = (dict(part.get_submodule(name).named_parameters()) for part in (module, source))
    return ((mine[key], theirs[key]) for key in mine)


def _take_equal_shapes(model: TrunkModel, source: TrunkModel) -> None:
    """Copies whatever has the same shape in both."""
    with torch.no_grad():
        theirs = source.state_dict()
        for name, value in model.state_dict().items():
            if value.shape == theirs[name].shape:
                value.copy_(theirs[name])
