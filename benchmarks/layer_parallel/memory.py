"""How much memory does a process need for a training step, alone and when two share the layers?

    python benchmarks/layer_parallel/memory.py --out benchmarks/layer_parallel/memory.json

The network of the recipe `shakespeare_gpt` (32 layers of width 128, two buffers at each end), batch 64 of length 64,
AdamW, three steps. Peak: the largest resident set size during the last step less that before the model was built
(Linux). Held: parameters, gradients and moments.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing
from torch.nn import functional as F

import paradepth
from paradepth.atomic import write_json
from paradepth.depth import MGRIT, DepthExecutor, Serial
from paradepth.distributed import World, clip_gradients, join_world, reduce_gradients, shard_depth
from paradepth.train.environment import command_line, environment

BATCH, LENGTH = 64, 64
VARIANTS = {
    "serial": 1,
    "serial, checkpointed": 1,
    "serial on 2 processes": 2,
    "MGRIT on 2 processes, graphs kept": 2,
    "MGRIT on 2 processes, recompute": 2,
}


def executor(name: str) -> DepthExecutor:
    """The executor of a variant."""
    if name.startswith("serial"):
        return Serial(checkpoint="checkpointed" in name)
    return MGRIT(coarsening=2, recompute="recompute" in name)


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return 1024 * int(match[1])


def worker(rank: int, name: str, port: int, depth: int, out: Path) -> None:
    """One process of a variant."""
    size = VARIANTS[name]
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with join_world("cpu", depth=size) as world:
        warm = paradepth.create_model("gpt_mini", depth=6, step=1.0)  # loads kernels
        F.cross_entropy(warm(torch.zeros(1, 8, dtype=torch.int64)).flatten(0, 1), torch.zeros(8).long()).backward()
        del warm
        before = resident("VmRSS")
        torch.manual_seed(0)
        model = paradepth.create_model("gpt_mini", depth=depth, step=1 / (depth - 4))
        model.trunk.executor = executor(name)
        shard_depth(model.trunk, world.row)
        owned = list(model.trunk.parameters()) if size > 1 else []
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
        tokens = torch.randint(256, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))
        peak = 0
        for _ in range(3):
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
            optimiser.zero_grad()
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            if size > 1:
                reduce_gradients(model, world, owned=owned)
            clip_gradients(model, 1.0, world, owned=owned)
            optimiser.step()
            peak = resident("VmHWM") - before
        held = sum(4 * p.numel() * 4 for p in model.parameters())  # weight, gradient and two moments in float32
        (out / f"{rank}.json").write_text(json.dumps({"peak": peak, "held": held, "loss": loss.item()}))


def measure(name: str, depth: int) -> dict[str, Any]:
    """Peak and held bytes of the process that needs most, for one variant."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        args = (name, port, depth, Path(folder))
        multiprocessing.spawn(worker, args=args, nprocs=VARIANTS[name])  # pyright: ignore[reportPrivateImportUsage]
        found = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
    return {
        "variant": name,
        "peak_megabytes": round(max(f["peak"] for f in found) / 1e6, 1),
        "held_megabytes": round(max(f["held"] for f in found) / 1e6, 1),
        "loss": found[0]["loss"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    base = rows[0]
    lines = ["| variant | peak a process, MB | of serial | held a process, MB | of serial |", "|---|---|---|---|---|"]
    for row in rows:
        peak, held = row["peak_megabytes"], row["held_megabytes"]
        lines.append(
            f"| {row['variant']} | {peak:.0f} | {peak / base['peak_megabytes']:.2f} "
            f"| {held:.0f} | {held / base['held_megabytes']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of a training step on one process and on two.")
    parser.add_argument("--depth", type=int, default=32, help="layers, at least 8")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    options = parser.parse_args()
    if options.depth < 8:
        parser.error("--depth must be at least 8")
    rows = [measure(name, options.depth) for name in VARIANTS]
    if options.out:
        about = environment(
            World(0, 1, torch.device("cpu")),
            autocast=None,
            command=f"python benchmarks/layer_parallel/{command_line()}",
        )
        write_json(options.out, {"environment": about, "results": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
