"""The parts of fairscale that the benchmark uses: Megatron-LM's linear maps, and its pipeline over processes.

fairscale is no longer developed; with current torch these parts of it run as they are.
"""

from __future__ import annotations

import tempfile
from contextlib import redirect_stdout
from sys import stderr
from typing import Any

import torch
from fairscale.nn import model_parallel  # pyright: ignore[reportMissingImports]
from fairscale.nn.model_parallel import initialize as groups  # pyright: ignore[reportMissingImports]
from fairscale.nn.pipe import AsyncPipe  # pyright: ignore[reportMissingImports]
from networks import Case, in_sequence
from share import Setting, Share
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import rpc
from torch.nn import functional as F

_joined_rpc: list[bool] = []  # not empty once the remote procedure calls have begun


def _join(processes: int) -> None:
    """Makes the groups that fairscale looks up: all processes share layers, and all are stages of a pipeline as well,
    which fairscale does not foresee at once but its tensor parallelism never asks for."""
    if groups.model_parallel_is_initialized():
        return
    with redirect_stdout(stderr):  # it prints
        groups.initialize_model_parallel(processes)
    groups._PIPELINE_PARALLEL_RANKS = list(range(processes))


def column_parallel(linear: nn.Linear, setting: Setting) -> nn.Module:
    """`linear` with this process's part of the outputs."""
    _join(setting.processes)
    part = model_parallel.ColumnParallelLinear(linear.in_features, linear.out_features, gather_output=False)
    with torch.no_grad():
        part.weight.copy_(linear.weight.chunk(setting.processes)[setting.rank])
        part.bias.copy_(linear.bias.chunk(setting.processes)[setting.rank])
    return part.to(setting.device)


def row_parallel(linear: nn.Linear, setting: Setting) -> nn.Module:
    """`linear` with this process's part of the inputs; the outputs are summed."""
    _join(setting.processes)
    part = model_parallel.RowParallelLinear(linear.in_features, linear.out_features, input_is_parallel=True)
    with torch.no_grad():
        part.weight.copy_(linear.weight.chunk(setting.processes, dim=1)[setting.rank])
        part.bias.copy_(linear.bias)
    return part.to(setting.device)


def _join_rpc(setting: Setting) -> None:
    """Its pipeline sends by torch's remote procedure calls, which have a rendezvous of their own."""
    if _joined_rpc:
        return
    paths: list[Any] = [None] * setting.processes
    dist.all_gather_object(paths, tempfile.mktemp(prefix="devices-"))  # the first process's is taken, for all
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{paths[0]}", num_worker_threads=2)
    rpc.init_rpc(f"stage{setting.rank}", rank=setting.rank, world_size=setting.processes, rpc_backend_options=options)
    _joined_rpc.append(True)


def leave() -> None:
    """Ends the remote procedure calls, where they were begun; all processes call it together."""
    if _joined_rpc:
        rpc.shutdown()
        _joined_rpc.clear()


class RemotePipeline(Share):
    """A stage of fairscale's `AsyncPipe`: GPipe over processes, whose messages are remote procedure calls that go
    through the CPU."""

    def __init__(self, setting: Setting, micro_batches: int) -> None:
        _join(setting.processes)
        _join_rpc(setting)
        self.setting = setting
        network = setting.size.network()
        self.state_bytes = setting.size.state_bytes(network, setting.case.batch)
        modules, balance = in_sequence(network, setting.processes)
        self.is_first, self.is_last = setting.rank == 0, setting.rank == setting.processes - 1
        self.pipe = AsyncPipe(
            modules,
            balance,
            group=dist.group.WORLD,
            worker_map={rank: f"stage{rank}" for rank in range(setting.processes)},
            input_device=setting.device,
            chunks=micro_batches,
            checkpoint="never",
        ).to(setting.device)
        self.pipe.train(setting.case.training)

    def forward(self, images_BCHW: Tensor) -> Tensor | None:
        with torch.no_grad():
            logits_BN = self.pipe(images_BCHW)
        return logits_BN if self.is_last else None

    def backward(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor | None:
        logits_BN = self.pipe(images_BCHW)  # all but the last process stay in there until the gradients have come back
        if not self.is_last:
            return None
        F.cross_entropy(logits_BN, labels_B).backward()
        return logits_BN.detach()

    def parameters(self) -> list[Tensor]:
        return list(self.pipe.parameters())

    def payload(self, case: Case) -> int:
        forward = 0 if self.is_last else self.state_bytes
        return forward + (0 if self.is_first or not case.training else self.state_bytes)
