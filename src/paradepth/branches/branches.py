"""The branches trunk.

Shapes: B batch, T tokens, D width, n branches.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from paradepth.branches.executor import BranchExecutor
from paradepth.branches.loop import Loop
from paradepth.depth import Stack

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

    def _first(self, count: int | None) -> list[Stack]:
        count = len(self) if count is None else count
        if not 1 <= count <= len(self):
            raise ValueError(
                f"branches is {count}; this trunk has {len(self)}, so it must be between 1 and {len(self)}"
            )
        return list(self.branches)[:count]  # pyright: ignore[reportReturnType]

    def forward(self, x_BTD: Tensor, mask: Tensor | None = None, *, branches: int | None = None) -> Tensor:
        """The state (B, T, D) of prefix `branches` (default: all).

        Raises:
            ValueError: `branches` is below 1 or above the number of branches.
        """
        used = self._first(branches)
        state_BTD = self.executor.corrected(used, x_BTD, mask)
        if self.aggregate == "residual" or len(used) == 1:
            return state_BTD
        return state_BTD + (len(used) - 1) * x_BTD

    def contributions(self, x_BTD: Tensor, mask: Tensor | None = None, *, branches: int | None = None) -> Tensor:
        """δ_1(x) … δ_k(x), shape (k, B, T, D), for the first `branches` branches (default: all)."""
        return torch.stack([g - x_BTD for g in self.executor.outputs(self._first(branches), x_BTD, mask)])

    def prefix_states(
        self, x_BTD: Tensor, mask: Tensor | None = None, *, branches: int | None = None, detach: bool = False
    ) -> Tensor:
        """The states of prefixes 1..k from one evaluation of k branches, shape (k, B, T, D).

        Args:
            x_BTD: input of every branch.
            mask: attention mask.
            branches: k (default: all).
            detach: a prefix sees the ones before it as constants, so that its loss trains its newest branch alone:
                boosting.
        """
        states: list[Tensor] = []
        for g_BTD in self.executor.outputs(self._first(branches), x_BTD, mask):
            if not states:
                states.append(g_BTD)
                continue
            before = states[-1].detach() if detach else states[-1]
            states.append(before + (g_BTD - x_BTD if self.aggregate == "residual" else g_BTD))
        return torch.stack(states)

    def flops(self, tokens: int, *, branches: int | None = None) -> int:
        """Floating-point operations of one forward pass over one sample (a multiply-add counts two)."""
        return sum(branch.flops(tokens) for branch in self._first(branches))
