"""How much memory each process needs for a training step. Every way gets fresh processes, forked before any work."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from measure import gathered
from networks import SIZES, Case, Size, parameter_bytes
from share import Setting, Way
from torch import distributed as dist

from paradepth.distributed import World, join_world


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes (Linux)."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return 1024 * int(match[1])


class Peak:
    """Most memory of this process, or of its accelerator, since `forget`, above what it had at first."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.before = torch.cuda.memory_allocated() if self.cuda else resident("VmRSS")

    def forget(self) -> None:
        """From here on."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        """The peak."""
        return (torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM")) - self.before


def new_setting(size: Size, case: Case, world: World) -> Setting:
    """A case on the processes of a world."""
    return Setting(size, case, world.row.rank, world.row.size, world.device, world)


def leave_libraries() -> None:
    """Ends what a peer began."""
    if "fairscale_peers" in sys.modules:
        sys.modules["fairscale_peers"].leave()


def _child(way: Way, size: Size, case: Case, device: str, store: Path, answer: Any) -> None:
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    kind = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(
        kind, init_method=f"file://{store}", rank=rank, world_size=processes, timeout=timedelta(seconds=300)
    )
    with join_world(device, branch=processes) as world:
        warm = SIZES["smoke"]
        learning = warm.cases[-1]
        _step(way, new_setting(warm, learning, world))  # loads kernels, opens connections
        setting = new_setting(size, case, world)
        images_BCHW, labels_B = size.batch_of(case, world.device)
        peak = Peak(world.device)
        share = way.build(setting)
        for _ in range(2):
            peak.forget()
            share.step(images_BCHW, labels_B)
        found = gathered((parameter_bytes(share.parameters()), share.held_bytes(), max(peak.bytes(), 0)))
        leave_libraries()
        if rank == 0:
            answer.send([list(column) for column in zip(*found, strict=True)])
    dist.destroy_process_group()


def _step(way: Way, setting: Setting) -> None:
    share = way.build(setting)
    share.step(*setting.size.batch_of(setting.case, setting.device))


def measure_memory(ways: list[Way], size: Size, case: Case, *, device: str) -> tuple[list[dict[str, Any]], Path]:
    """Rows of the ways that run, on the first process; elsewhere none. Also the folder to remove in the end.

    To be called before the process group is made and before torch has computed anything, since it forks.
    """
    folder = Path(tempfile.gettempdir()) / f"devices-{os.getppid()}-{os.environ['MASTER_PORT']}"
    # the same for all, since torchrun is the parent of every process
    folder.mkdir(exist_ok=True)
    fork = multiprocessing.get_context("fork")
    rows = []
    for number, way in enumerate(ways):
        receiver, sender = fork.Pipe(duplex=False)
        child = fork.Process(target=_child, args=(way, size, case, device, folder / str(number), sender))
        child.start()
        sender.close()
        try:
            parameters, held, peak = receiver.recv()
        except EOFError:  # not the first process, or the way does not run
            continue
        finally:
            child.join()
        rows.append(
            {
                "network": way.network,
                "branches": way.branches,
                "family": way.family,
                "detail": way.detail,
                "batch": case.batch,
                "parameter_bytes": parameters,
                "held_bytes": held,
                "peak_bytes": peak,
            }
        )
        print(f"memory: {way.network} by {way.name}", file=sys.stderr, flush=True)
    return rows, folder


def remove(folder: Path) -> None:
    """Removes the folder of `measure_memory`."""
    shutil.rmtree(folder, ignore_errors=True)
