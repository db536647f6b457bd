"""Depth as parallel branches: n shallow stacks on the same input, their contributions added up."""

from paradepth.branches.auto import Auto, Choice, Situation
from paradepth.branches.batched import Batched
from paradepth.branches.branches import Aggregate, Branches
from paradepth.branches.cached import TrunkCache
from paradepth.branches.executor import BranchExecutor
from paradepth.branches.gates import Gate
from paradepth.branches.loop import Loop
from paradepth.branches.named import BRANCH_EXECUTORS, branch_executor, choose_executor, register_branch_executor
from paradepth.branches.threads import Threads

__all__ = [
    "BRANCH_EXECUTORS",
    "Aggregate",
    "Auto",
    "Batched",
    "BranchExecutor",
    "Branches",
    "Choice",
    "Gate",
    "Loop",
    "Situation",
    "Threads",
    "TrunkCache",
    "branch_executor",
    "choose_executor",
    "register_branch_executor",
]
