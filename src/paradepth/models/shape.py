"""The shape of a trunk, which models of every task share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from paradepth.branches import Aggregate
from paradepth.depth.as_branches import branch_layers
from paradepth.models.initial import InitWeights, check_init_weights
from paradepth.models.sharing import Share, check_share
from paradepth.nn.static_mixing import Mixing, check_mixing


@dataclass(frozen=True)
class TrunkConfig:
    """What determines the shape of every model's trunk; a task's model adds its own fields.

    Attributes:
        width: D. heads: attention heads. mlp: hidden width of the feed-forward part.
        head_width: width of an attention head; None is width / heads, which is then a whole number.
        branches: number of branches; 0 makes the trunk a serial stack.
        depth: layers of each branch, or of the stack; of the first branch where `depths` says that they differ.
        aggregate: how branches are added up, "residual", "sum" or "gated".
        bias: whether linear maps have biases.
        dropout, attention_dropout: probabilities.
        step: h of every layer between the buffers; 1 is the ordinary Transformer.
        buffers: numbers of first and of last layers (of each branch, or of the stack) that take h = 1.
        deep_init: scale value, output and MLP projections by √(log 2L), L the number of layers in the trunk.
        init_weights: how fresh weights are drawn, see `initialise_weights_`.
        depths: layers of each branch where they differ; None where every branch has `depth` of them.
        mixing: what mixes the tokens, "attention" or "static", matrices that do not depend on the input.
        static_layers: the layers that "static" is of, numbers within the trunk, counted from 0 through one branch after
            the other; the rest have attention. None is all of them.
        mixing_rank: rank of factorised static matrices; None has full ones.
        share: which layers share their weights: "none", "branches", "depth", "attention" or "mlp", see
            `paradepth.models.sharing`.

    Raises:
        ValueError: naming the field, its value and what is allowed; what a layer or a stack can tell for itself is
            left to it.
    """

    width: int = 64
    heads: int = 2
    mlp: int = 256
    head_width: int | None = None
    branches: int = 0
    depth: int = 8
    aggregate: Aggregate = "residual"
    bias: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    step: float = 1.0
    buffers: tuple[int, int] = (0, 0)
    deep_init: bool = False
    init_weights: InitWeights = "default"
    depths: tuple[int, ...] | None = None
    mixing: Mixing = "attention"
    static_layers: tuple[int, ...] | None = None
    mixing_rank: int | None = None
    share: Share = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "buffers", tuple(self.buffers))
        check_init_weights(self.init_weights)
        check_share(self.share, self.branches)
        for name, least in (("branches", 0), ("depth", 1), ("width", 1), ("mlp", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        buffers = self.buffers
        if len(buffers) != 2 or not all(isinstance(number, int) and number >= 0 for number in buffers):
            raise ValueError(f"buffers is {buffers}; it must be two numbers of layers (first, last), each at least 0")
        if self.depths is not None:
            depths = tuple(self.depths)
            if len(depths) != self.branches or not all(isinstance(number, int) and number >= 1 for number in depths):
                raise ValueError(
                    f"depths is {depths}; it must be {self.branches} numbers, the layers of each branch, at least 1"
                )
            object.__setattr__(self, "depth", depths[0])
            object.__setattr__(self, "depths", depths if len(set(depths)) > 1 else None)
        self._check_mixing()

    def _check_mixing(self) -> None:
        check_mixing(self.mixing)
        for name in ("static_layers", "mixing_rank"):
            if self.mixing == "attention" and getattr(self, name) is not None:
                raise ValueError(f"{name} is {getattr(self, name)}; it means nothing to mixing 'attention'")
        if self.mixing_rank is not None and self.mixing_rank < 1:
            raise ValueError(f"mixing_rank is {self.mixing_rank}; it must be at least 1")
        if self.static_layers is None:
            return
        if self.share != "none":
            raise ValueError(
                f"static_layers is {tuple(self.static_layers)}, and layers share weights (share {self.share!r}); only "
                "all of them can be static"
            )
        chosen = tuple(sorted(self.static_layers))
        if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(self.layers)):
            raise ValueError(
                f"static_layers is {tuple(self.static_layers)}; it must be at least one of 0 to {self.layers - 1}, "
                "each at most once"
            )
        object.__setattr__(self, "static_layers", chosen if len(chosen) < self.layers else None)

    def mixing_of(self, layer: int) -> Mixing:
        """What mixes the tokens in a layer, counted from 0 through the trunk."""
        chosen = self.static_layers is None or layer in self.static_layers
        return "static" if self.mixing == "static" and chosen else "attention"

    @property
    def branch_depths(self) -> tuple[int, ...]:
        """Layers of each branch; of a serial stack its depth."""
        return self.depths or (self.depth,) * max(self.branches, 1)

    @property
    def layers(self) -> int:
        """Number of layers in the trunk."""
        return sum(self.branch_depths)

    def with_branches(self, depths: Sequence[int]) -> Self:
        """The same shape with branches of so many layers. Where some layers have static mixing, they keep their
        numbers, and new ones have attention; where all have, new ones have as well.

        >>> config = TrunkConfig(branches=2, depth=2).with_branches([2, 2, 1])
        >>> config.branches, config.depths, config.layers, config.with_branches([1, 1]).depths
        (3, (2, 2, 1), 5, None)
        """
        changes: dict[str, Any] = {"branches": len(depths), "depths": tuple(depths)}
        if self.static_layers is not None:
            changes |= _static(n for n in self.static_layers if n < sum(depths))
        return dataclasses.replace(self, **changes)

    def with_chosen(self, branches: Sequence[int]) -> Self:
        """The same shape with some of its branches, numbers counted from 0, in the order given.

        >>> config = TrunkConfig(branches=3, depth=2, mixing="static", static_layers=(1, 4))
        >>> config.with_chosen([2, 0]).static_layers, config.with_chosen([1]).mixing
        ((0, 3), 'attention')
        """
        depths = self.branch_depths
        changes: dict[str, Any] = {"branches": len(branches), "depths": tuple(depths[i] for i in branches)}
        if self.static_layers is not None:
            places = branch_layers(depths)
            numbers = [n for i in branches for n in places[i]]
            changes |= _static(place for place, n in enumerate(numbers) if n in self.static_layers)
        return dataclasses.replace(self, **changes)


def _static(layers: Iterable[int]) -> dict[str, Any]:
    """The options that give these layers, some of them or none, static mixing."""
    chosen = tuple(layers)
    return {"static_layers": chosen} if chosen else {"static_layers": None, "mixing": "attention", "mixing_rank": None}
