"""A branch evaluated on the samples that need it.

    samples   0 1 2 3 4 5       needed  1 0 0 1 1 0
              └─┐   ┌┴┘
    batch       0 3 4  ─► branch ─► δ     gathered, evaluated, scattered back; zeros elsewhere

Shapes: B batch, A samples that need the branch, … the shape of a sample's part of the state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paradepth.depth import Stack
from paradepth.depth.state import State, pack, subtract, unpack


def contribution_where_needed(branch: Stack, x: Any, inputs: tuple[Any, ...], needed_B: Tensor) -> State | None:
    """δ(x) = G(x) − x of the samples that need the branch, 0 of the others; None where no sample does.

    Args:
        branch: a stack.
        x: its input, samples first.
        inputs: what every layer gets besides the state; those whose first dimension is B are gathered as x is.
        needed_B: booleans.

    Raises:
        ValueError: layers that another process has.

    >>> from paradepth.nn import EncoderLayer
    >>> branch, x = Stack([EncoderLayer(16, heads=2, mlp=32)]), torch.randn(3, 5, 16)
    >>> (delta,) = contribution_where_needed(branch, x, (), torch.tensor([True, False, True]))
    >>> bool(torch.allclose(delta[::2], (branch(x) - x)[::2], atol=1e-6)), bool(delta[1].any())
    (True, False)
    """
    if any(getattr(layer, "is_elsewhere", False) for layer in branch.layers):
        raise ValueError(
            "processes share these branches, and which of them a sample needs is no matter of the one process that "
            "has them all; leave nothing out there: skip_below 0"
        )
    state, B = pack(x), len(needed_B)
    places_A = needed_B.nonzero().flatten()
    if not len(places_A):
        return None
    if len(places_A) == B:
        return subtract(pack(branch(x, *inputs)), state)

    def gathered(side: Any) -> Any:
        return side[places_A] if isinstance(side, Tensor) and side.dim() and len(side) == B else side

    own = tuple(part[places_A] for part in state)
    outputs = pack(branch(unpack(own, like=x), *map(gathered, inputs)))
    delta = subtract(outputs, own)  # under autocast of another type, maybe
    return tuple(
        torch.zeros_like(part, dtype=d.dtype).index_copy(0, places_A, d) for part, d in zip(state, delta, strict=True)
    )
