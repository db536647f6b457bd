"""The shape of a trunk, which models of every task share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from paradepth.branches import Aggregate
from paradepth.models.initial import InitWeights, check_init_weights
from paradepth.models.sharing import Share, check_share


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
        if self.depths is None:
            return
        depths = tuple(self.depths)
        if len(depths) != self.branches or not all(isinstance(number, int) and number >= 1 for number in depths):
            raise ValueError(
                f"depths is {depths}; it must be {self.branches} numbers, the layers of each branch, at least 1"
            )
        object.__setattr__(self, "depth", depths[0])
        object.__setattr__(self, "depths", depths if len(set(depths)) > 1 else None)

    @property
    def branch_depths(self) -> tuple[int, ...]:
        """Layers of each branch; of a serial stack its depth."""
        return self.depths or (self.depth,) * max(self.branches, 1)

    @property
    def layers(self) -> int:
        """Number of layers in the trunk."""
        return sum(self.branch_depths)

    def with_branches(self, depths: Sequence[int]) -> Self:
        """The same shape with branches of so many layers.

        >>> config = TrunkConfig(branches=2, depth=2).with_branches([2, 2, 1])
        >>> config.branches, config.depths, config.layers, config.with_branches([1, 1]).depths
        (3, (2, 2, 1), 5, None)
        """
        return dataclasses.replace(self, branches=len(depths), depths=tuple(depths))
