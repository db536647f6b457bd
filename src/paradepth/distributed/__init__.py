"""Processes and devices."""

from paradepth.distributed.world import World, join_world

__all__ = ["World", "join_world"]
