"""Depth as a chain of residual steps, and the algorithms that evaluate it."""

from paradepth.depth.executor import DepthExecutor
from paradepth.depth.serial import Serial
from paradepth.depth.stack import Stack

__all__ = ["DepthExecutor", "Serial", "Stack"]
