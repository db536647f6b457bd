"""Depth as a chain of residual steps, and the algorithms that evaluate it."""

from paradepth.depth.as_branches import AsBranches
from paradepth.depth.channel import Channel, Part, cut_into_parts
from paradepth.depth.coarse import (
    COARSE_OPERATORS,
    BranchSum,
    CoarseOperator,
    Sample,
    coarse_operator,
    register_coarse_operator,
)
from paradepth.depth.coarse_solve import CoarseSolve
from paradepth.depth.controller import Controller, Decision
from paradepth.depth.executor import DepthExecutor
from paradepth.depth.iterative import IterativeExecutor
from paradepth.depth.lipschitz import lipschitz
from paradepth.depth.mgrit import MGRIT
from paradepth.depth.named import DEPTH_EXECUTORS, register_depth_executor
from paradepth.depth.parallelize import ParallelLayers, parallelize, restore
from paradepth.depth.picard import Picard
from paradepth.depth.results import Report, SolveReport
from paradepth.depth.serial import Serial
from paradepth.depth.stack import Stack

__all__ = [
    "COARSE_OPERATORS",
    "DEPTH_EXECUTORS",
    "MGRIT",
    "AsBranches",
    "BranchSum",
    "Channel",
    "CoarseOperator",
    "CoarseSolve",
    "Controller",
    "Decision",
    "DepthExecutor",
    "IterativeExecutor",
    "ParallelLayers",
    "Part",
    "Picard",
    "Report",
    "Sample",
    "Serial",
    "SolveReport",
    "Stack",
    "coarse_operator",
    "cut_into_parts",
    "lipschitz",
    "parallelize",
    "register_coarse_operator",
    "register_depth_executor",
    "restore",
]
