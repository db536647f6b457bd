"""The branches trunk.

Shapes: B batch, T tokens, D width, n branches.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from paradepth.branches.executor import BranchExecutor
from paradepth.branches.loop import Loop
from paradepth.depth import Stack
from paradepth.depth.state import State, add, detached, pack, subtract, unpack

Aggregate = Literal["residual", "sum"]


class Branches(nn.Module):
    """n stacks G_1 … G_n that read the same input x; their contributions δ_i(x) = G_i(x) − x are added up.

    The state of prefix k, that is of the model that uses branches 1..k, is

    - aggregate "residual": s_k = x + Σ_{i≤k} δ_i(x), the branches approximating target − x;
    - aggregate "sum": s_k = Σ_{i≤k} G_i(x), as in the authors' code.

    Source: Shallow Parallel Transformers with Progressive Approximation (arXiv 2510.15425). For one branch both are the
    serial stack.

    Args:
        branches: the stacks, at least one.
        aggregate: "residual" or "sum".
        executor: how the branches are evaluated; `Loop` by default. Also an attribute that may be set later.

    Raises:
        ValueError: no branches or an unknown aggregate.

    >>> from paradepth.nn import EncoderLayer
    >>> trunk = Branches([Stack([EncoderLayer(16, heads=2, mlp=32)]) for _ in range(3)])
    >>> x = torch.randn(2, 5, 16)
    >>> trunk.prefix_states(x).shape
    torch.Size([3, 2, 5, 16])
    >>> bool(torch.allclose(trunk.prefix_states(x)[1], trunk(x, branches=2), atol=1e-6))
    True
    """

    def __init__(
        self,
        branches: Iterable[Stack],
        *,
        aggregate: Aggregate = "residual",
        executor: BranchExecutor | None = None,
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        if not self.branches:
            raise ValueError("a branches trunk needs at least one branch")
        if aggregate not in ("residual", "sum"):
            raise ValueError(f"aggregate is {aggregate!r}; it must be 'residual' or 'sum'")
        self.aggregate = aggregate
        self.executor = executor or Loop()

    def __len__(self) -> int:
        return len(self.branches)

    def first(self, count: int | None) -> list[Stack]:
        """The first `count` branches (default: all).

        Raises:
            ValueError: `count` is below 1 or above the number of branches.
        """
        count = len(self) if count is None else count
        if not 1 <= count <= len(self):
            raise ValueError(
                f"branches is {count}; this trunk has {len(self)}, so it must be between 1 and {len(self)}"
            )
        return list(self.branches)[:count]  # pyright: ignore[reportReturnType]

    def forward(self, x: Any, *inputs: Any, branches: int | None = None) -> Any:
        """The state of prefix `branches` (default: all), of the structure and shape of `x`.

        Args:
            x: input of every branch, (B, T, D) or a tuple of such tensors.
            inputs: what every layer gets besides the state, such as an attention mask.
            branches: k.

        Raises:
            ValueError: `branches` is below 1 or above the number of branches.
        """
        used = self.first(branches)
        state = self.executor.corrected(used, x, *inputs)
        if self.aggregate == "residual" or len(used) == 1:
            return state
        more = len(used) - 1
        return unpack(tuple(s + more * a for s, a in zip(pack(state), pack(x), strict=True)), like=x)

    def contributions(self, x: Any, *inputs: Any, branches: int | None = None) -> Any:
        """δ_1(x) … δ_k(x), shape (k, B, T, D), for the first `branches` branches (default: all)."""
        outputs = self.executor.outputs(self.first(branches), x, *inputs)
        return _stack([unpack(subtract(pack(g), pack(x)), like=x) for g in outputs])

    def prefix_states(self, x: Any, *inputs: Any, branches: int | None = None, detach: bool = False) -> Any:
        """The states of prefixes 1..k from one evaluation of k branches, shape (k, B, T, D).

        Args:
            x: input of every branch; for a tuple of tensors the result is a tuple as well.
            inputs: what every layer gets besides the state.
            branches: k (default: all).
            detach: a prefix sees the ones before it as constants, so that its loss trains its newest branch alone:
                boosting.
        """
        return _stack(self.each_prefix(x, *inputs, branches=branches, detach=detach))

    def each_prefix(self, x: Any, *inputs: Any, branches: int | None = None, detach: bool = False) -> list[Any]:
        """The states of `prefix_states` one by one, each of the structure and shape of `x`: that of a prefix is
        computed from its own branches and no others."""
        states: list[State] = []
        for g in self.executor.outputs(self.first(branches), x, *inputs):
            if not states:
                states.append(pack(g))
                continue
            before = detached(states[-1]) if detach else states[-1]
            states.append(add(before, subtract(pack(g), pack(x)) if self.aggregate == "residual" else pack(g)))
        return [unpack(state, like=x) for state in states]

    def flops(self, tokens: Any, *, branches: int | None = None) -> int:
        """Floating-point operations of one forward pass over one sample (a multiply-add counts two)."""
        return sum(branch.flops(tokens) for branch in self.first(branches))


def _stack(states: list[Any]) -> Any:
    if isinstance(states[0], Tensor):
        return torch.stack(states)
    return tuple(torch.stack(parts) for parts in zip(*states, strict=True))
