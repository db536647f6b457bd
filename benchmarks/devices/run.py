"""Two devices, equal layers: is it faster to share branches, or to share the layers of a serial network?

Runs on two processes, one thread each, or on two GPUs. All ways take turns in short rounds; a way's time is that of
the process that takes longest, and the speed over the best peer is taken within each round first.

    torchrun --nproc-per-node 2 benchmarks/devices/run.py --out benchmarks/devices/result.json
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from measure import measure, ways
from memory import leave_libraries, measure_memory, new_setting, remove
from networks import SIZES
from report import report

from paradepth.atomic import write_json, write_text
from paradepth.distributed import World, join_world, process_count
from paradepth.train.environment import command_line, environment
from paradepth.train.precision import cpu_flags

PROCESSES = 2


def about(world: World) -> dict[str, Any]:
    """What the run was made with."""
    command = f"torchrun --nproc-per-node {PROCESSES} benchmarks/devices/{command_line()}"
    found = environment(world, autocast=None, command=command)
    found["world_size"] = world.processes
    found["backend"] = torch.distributed.get_backend()
    found["flags"] = sorted(f for f in cpu_flags() if f.startswith(("amx", "avx")))
    for library in ("fairscale", "torchgpipe"):
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = None
    return found


def read_options() -> argparse.Namespace:
    """The command line.

    Exits with status 2 where it makes no sense.
    """
    parser = argparse.ArgumentParser(description="Branches on two devices against what else two devices can do.")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--heads", type=int, help="of every layer; an odd number leaves tensor parallelism out")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: GPUs if there are two")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds of each way")
    parser.add_argument("--cases", type=int, nargs="+", help="numbers of the cases to time, from 1; 0 for none")
    parser.add_argument("--no-memory", action="store_true", help="leave memory out")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file too")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; it must be at least 1")
    count = len(SIZES[options.size].cases)
    if options.cases and not all(0 <= number <= count for number in options.cases):
        parser.error(f"--cases is {options.cases}; there are cases 1 to {count}")
    if options.heads is not None and options.heads < 1:
        parser.error(f"--heads is {options.heads}; it must be at least 1")
    if process_count() != PROCESSES:
        parser.error(
            f"{process_count()} process(es) were started, and {PROCESSES} are needed: "
            f"torchrun --nproc-per-node {PROCESSES} benchmarks/devices/run.py"
        )
    return options


def main() -> None:
    options = read_options()
    torch.set_num_threads(1)
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # so that looking for GPUs does not forbid to fork
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.device_count() >= PROCESSES else "cpu"
    size = SIZES[options.size]
    if options.heads:
        size = dataclasses.replace(size, heads=options.heads)
    cases = [case for number, case in enumerate(size.cases, 1) if not options.cases or number in options.cases]
    memory, folder = [], None
    if not options.no_memory:
        learning = size.cases[-1]
        memory, folder = measure_memory(ways(size, learning, processes=PROCESSES)[0], size, learning, device=device)
    with join_world(device, branch=PROCESSES) as world:
        if folder is not None and world.is_main:
            remove(folder)
        result: dict[str, Any] = {
            "environment": about(world),
            "size": dataclasses.asdict(size),
            "rounds": options.rounds,
            "results": [],
            "memory": memory,
            "left_out": {},
        }
        for case in cases:
            rows, left_out = measure(new_setting(size, case, world), rounds=options.rounds)
            result["results"] += rows
            result["left_out"] |= left_out
            if world.is_main and options.out:  # after each, so that a run that is cut short leaves what it has
                write_json(options.out, result)
        leave_libraries()
        if world.is_main:
            if options.out:
                write_json(options.out, result)
            text = report(result, size.cases)
            if options.markdown:
                write_text(options.markdown, text + "\n")
            print(text, file=sys.stdout)


if __name__ == "__main__":
    main()
