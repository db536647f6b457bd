"""A serial stack evaluated as branches: which layers are in which branch, and an executor that does so.

    consecutive, 8 layers, 3 branches      1 2 3 │ 4 5 6 │ 7 8
    interleaved                            1 4 7 │ 2 5 8 │ 3 6

The first lets a branch be a part of the stack as it was trained; the second gives every branch early and late layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from paradepth.depth.coarse_solve import steps_of
from paradepth.depth.executor import DepthExecutor
from paradepth.depth.state import State, add, pack, subtract, unpack

if TYPE_CHECKING:
    from paradepth.depth.stack import Stack

Groups = Literal["consecutive", "interleaved"]


def branch_depths(layers: int, branches: int) -> tuple[int, ...]:
    """Layers of each branch when so many are shared out evenly; the last branches have one less where they must.

    Raises:
        ValueError: no branch, or more than there are layers.

    >>> branch_depths(8, 3)
    (3, 3, 2)
    """
    if not isinstance(branches, int) or not 1 <= branches <= layers:
        raise ValueError(
            f"branches is {branches!r}; {layers} layers can be shared out among 1 to {layers}, each of at least one"
        )
    return tuple(layers // branches + (index < layers % branches) for index in range(branches))


def branch_layers(depths: Sequence[int], groups: Groups = "consecutive") -> tuple[tuple[int, ...], ...]:
    """For each branch the places that its layers have in a serial stack, counted from 0.

    Args:
        depths: layers of each branch.
        groups: "consecutive", the first branch has the first layers; "interleaved", the layers are dealt out one by one
            as long as a branch takes more.

    Raises:
        ValueError: other groups.

    >>> branch_layers((3, 3, 2)), branch_layers((3, 3, 2), "interleaved")
    (((0, 1, 2), (3, 4, 5), (6, 7)), ((0, 3, 6), (1, 4, 7), (2, 5)))
    """
    if groups not in get_args(Groups):
        raise ValueError(f"groups is {groups!r}; it must be {' or '.join(map(repr, get_args(Groups)))}")
    places: list[list[int]] = [[] for _ in depths]
    if groups == "consecutive":
        order = [branch for branch, depth in enumerate(depths) for _ in range(depth)]
    else:
        order = [branch for turn in range(max(depths)) for branch, depth in enumerate(depths) if turn < depth]
    for place, branch in enumerate(order):
        places[branch].append(place)
    return tuple(tuple(each) for each in places)


class AsBranches(DepthExecutor):
    """The layers of a stack in groups, as branches G_1 … G_n of the same input: x + Σ (G_i(x) − x).

    Unlike the other executors it changes what a stack computes; it turns a stack that was trained in series into
    branches, which are then trained further. Weights stay where they are. Buffers, the stack's own and those given
    here, are evaluated in series before and behind the branches, whichever are more.

    Args:
        branches: n; 1 is serial.
        groups: which layers make a branch: "consecutive", the first one has the first layers; "interleaved", they are
            dealt out one by one. Where n does not divide the number of layers the last branches are shorter.
        buffers: numbers of first and of last layers that are left in series.

    Raises:
        ValueError: fewer than one branch, other groups, or buffers that are no two numbers of layers. A forward pass
            raises it for more branches than there are layers between the buffers.

    Source: Shallow Parallel Transformers with Progressive Approximation (arXiv 2510.15425), the residual aggregate.

    >>> import torch
    >>> from paradepth.depth import parallelize
    >>> layer = torch.nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=32, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).eval()
    >>> x = torch.randn(2, 5, 16)
    >>> serial = model(x)
    >>> model = parallelize(model, "layers", executor=AsBranches(3))
    >>> bool(torch.allclose(model(x), serial, atol=1e-5))
    False
    >>> model = parallelize(model, "layers", executor=AsBranches(1))
    >>> bool(torch.allclose(model(x), serial, atol=1e-5))
    True
    """

    def __init__(self, branches: int, *, groups: Groups = "consecutive", buffers: tuple[int, int] = (0, 0)) -> None:
        if not isinstance(branches, int) or branches < 1:
            raise ValueError(f"branches is {branches!r}; it must be a whole number, at least 1")
        branch_layers((1,), groups)  # refuses what is unknown
        if len(buffers) != 2 or not all(isinstance(number, int) and number >= 0 for number in buffers):
            raise ValueError(f"buffers is {buffers!r}; it must be two numbers of layers (first, last), each at least 0")
        self.branches = branches
        self.groups: Groups = groups
        self.buffers = (int(buffers[0]), int(buffers[1]))

    def check(self, stack: Stack) -> None:
        self._places(stack)

    def run(self, stack: Stack, x: Any, *inputs: Any) -> Any:
        between, places = self._places(stack)

        def through(state: State, layers: Sequence[int]) -> State:
            for step in steps_of(stack, layers, x, inputs):
                state = add(state, step(state))
            return state

        start = through(pack(x), range(between.start))
        state = start
        for k, layers in enumerate(places):
            end = through(start, layers)
            state = end if k == 0 else add(state, subtract(end, start))
        return unpack(through(state, range(between.stop, stack.depth)), like=x)

    def _places(self, stack: Stack) -> tuple[range, list[list[int]]]:
        """The layers between the buffers, and those of each branch."""
        own = stack.buffer_layers
        first, last = (max(pair) for pair in zip(own, self.buffers, strict=True))
        between = range(first, max(first, stack.depth - last))
        if not 1 <= self.branches <= len(between):
            raise ValueError(
                f"branches is {self.branches}, and {len(between)} of the {stack.depth} layers lie between the buffers "
                f"({first} first, {last} last); each branch needs one at least"
            )
        places = branch_layers(branch_depths(len(between), self.branches), self.groups)
        return between, [[between[place] for place in each] for each in places]
