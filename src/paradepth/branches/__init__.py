"""Depth as parallel branches: n shallow stacks on the same input, their contributions added up."""

from paradepth.branches.batched import Batched
from paradepth.branches.branches import Aggregate, Branches
from paradepth.branches.cached import TrunkCache
from paradepth.branches.executor import BranchExecutor
from paradepth.branches.loop import Loop

__all__ = ["Aggregate", "Batched", "BranchExecutor", "Branches", "Loop", "TrunkCache"]
