"""Branches one after another: the reference for every other branch executor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from paradepth.branches.executor import BranchExecutor
from paradepth.depth import Stack


class Loop(BranchExecutor):
    """A Python loop over the branches."""

    def outputs(self, branches: Sequence[Stack], x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        return [branch(x, mask) for branch in branches]
