"""Processes and devices: who computes which samples and which layers."""

from paradepth.distributed.reduce import clip_gradients, reduce_gradients
from paradepth.distributed.row import ProcessLost, ProcessRow
from paradepth.distributed.shard import gather_tensors, shard_depth
from paradepth.distributed.world import World, join_world, process_count

__all__ = [
    "ProcessLost",
    "ProcessRow",
    "World",
    "clip_gradients",
    "gather_tensors",
    "join_world",
    "process_count",
    "reduce_gradients",
    "shard_depth",
]
