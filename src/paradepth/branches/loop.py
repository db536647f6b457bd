"""Branches one after another: the reference for every other branch executor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paradepth.branches.executor import BranchExecutor
from paradepth.depth import Stack


class Loop(BranchExecutor):
    """A Python loop over the branches."""

    def outputs(self, branches: Sequence[Stack], x: Any, *inputs: Any) -> list[Any]:
        return [branch(x, *inputs) for branch in branches]
