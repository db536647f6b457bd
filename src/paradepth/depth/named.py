"""Depth executors by name."""

from __future__ import annotations

from paradepth.depth.executor import DepthExecutor
from paradepth.depth.mgrit import MGRIT
from paradepth.depth.picard import Picard
from paradepth.depth.serial import Serial

DEPTH_EXECUTORS: dict[str, type[DepthExecutor]] = {"serial": Serial, "mgrit": MGRIT, "picard": Picard}
"""The class of each name."""


def register_depth_executor(name: str, cls: type[DepthExecutor]) -> None:
    """Makes an executor of your own known by name, to training and the command line.

    Args:
        name: a new one.
        cls: its class. The options that a run may give it are the keyword-only arguments of its constructor that
            `DepthOptions` has, `coarsening` or `chunk`, say.

    Raises:
        ValueError: the name is taken.

    >>> register_depth_executor("serial", Serial)
    Traceback (most recent call last):
    ...
    ValueError: there is a depth executor 'serial' already; take another name
    """
    if name in DEPTH_EXECUTORS:
        raise ValueError(f"there is a depth executor {name!r} already; take another name")
    DEPTH_EXECUTORS[name] = cls
