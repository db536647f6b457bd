"""Processes and devices: who computes which samples, and which layers or branches."""

from paradepth.distributed.mesh import Mesh, Traffic
from paradepth.distributed.reduce import clip_gradients, reduce_gradients
from paradepth.distributed.row import ProcessLost, ProcessRow
from paradepth.distributed.shard import gather_tensors, shard_depth
from paradepth.distributed.shard_branches import assign_branches, shard_branches
from paradepth.distributed.world import World, join_world, process_count

__all__ = [
    "Mesh",
    "ProcessLost",
    "ProcessRow",
    "Traffic",
    "World",
    "assign_branches",
    "clip_gradients",
    "gather_tensors",
    "join_world",
    "process_count",
    "reduce_gradients",
    "shard_branches",
    "shard_depth",
]
