"""How many samples a second does one training step take? paradepth's PF 4x2 and ViT-8 against a plain PyTorch ViT-8.

A step is forward, cross-entropy, backward, gradient clipping and AdamW, on one fixed random batch. All variants of a
size are alive at once and take turns in short rounds, so whatever else the machine does meets all of them alike:

    round 1   PyTorch f32 │ ViT f32 │ PF f32 │ PyTorch bf16 │ ViT bf16 │ PF bf16
    round 2   ViT f32 │ PF f32 │ PyTorch bf16 │ ViT bf16 │ PF bf16 │ PyTorch f32      (starts one further on)
    …

Speed is the median over rounds with quartiles; ratios are taken within each round first. A processor without bf16
units emulates bf16 many times slower than float32, so there the bf16 variants sit out all but every tenth round.

    python benchmarks/train_step/run.py --rounds 30 --threads 2 --out benchmarks/train_step/result.json

On a machine that has other work to do, `--threads 1 --clock cpu` counts the processor time of this process instead of
the time on the wall: what it waits for its turn does not count.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reference import TorchViT
from torch import nn
from torch.nn import functional as F

import paradepth
from paradepth.atomic import write_json
from paradepth.distributed import World
from paradepth.timing import quartiles
from paradepth.train.environment import command_line, environment
from paradepth.train.precision import cpu_flags, has_bf16_units

REFERENCE = "PyTorch ViT-8"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PRECISIONS = {"float32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Size:
    """Images, patches, network and batch of one comparison; `steps` training steps make a round."""

    image_size: int
    patch_size: int
    channels: int
    model: str  # the suffix of the registered names
    heads: int
    batch: int
    steps: int
    title: str


SIZES = {
    "fashion-p7": Size(28, 7, 1, "nano", 2, 128, 4, "28x28x1, patch 7, width 64, batch 128"),
    "fashion-p4": Size(28, 4, 1, "nano", 2, 128, 2, "28x28x1, patch 4, width 64, batch 128"),
    "cifar-p4": Size(32, 4, 3, "tiny", 3, 64, 1, "32x32x3, patch 4, width 192, batch 64"),
    "smoke": Size(8, 4, 1, "nano", 2, 4, 1, "8x8x1, patch 4, width 64, batch 4 (to see that the script runs)"),
}


def models(size: Size) -> dict[str, nn.Module]:
    """The networks to compare: same stem, layers and head, so the same number of parameters."""
    shape = {
        "image_size": size.image_size,
        "patch_size": size.patch_size,
        "channels": size.channels,
        "num_classes": 10,
    }
    vit = paradepth.create_model(f"vit_{size.model}", depth=8, **shape)
    width, mlp = vit.config.width, vit.config.mlp
    networks = {
        REFERENCE: TorchViT(width=width, heads=size.heads, mlp=mlp, depth=8, **shape),
        "ViT-8": vit,
        "PF 4x2": paradepth.create_model(f"paraformer_{size.model}", branches=4, depth=2, **shape),
    }
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    assert len(set(counts.values())) == 1, counts
    assert vit.config.heads == size.heads, vit.config
    return networks


def training_step(network: nn.Module, size: Size, dtype: torch.dtype | None) -> Callable[[], None]:
    """One training step of `network` as a function."""
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(size.batch, size.channels, size.image_size, size.image_size, generator=draw)
    labels = torch.randint(10, (size.batch,), generator=draw)
    parameters = list(network.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    network.train()

    def step() -> None:
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = F.cross_entropy(network(images), labels)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()

    return step


def measure(name: str, *, rounds: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """All variants of the size `name`, measured in turns; ratios compare what ran in the same round."""
    size = SIZES[name]
    variants: dict[tuple[str, str], Callable[[], None]] = {}
    parameters = 0
    for precision, dtype in PRECISIONS.items():
        torch.manual_seed(0)
        for label, network in models(size).items():
            variants[label, precision] = training_step(network, size, dtype)
            parameters = sum(p.numel() for p in network.parameters())
    seconds: dict[tuple[str, str], dict[int, float]] = {variant: {} for variant in variants}
    every = {"float32": 1, "bf16": 1 if has_bf16_units(torch.device("cpu")) else 10}
    order = list(variants)
    for number in range(rounds + 1):
        start = number % len(order)
        for variant in order[start:] + order[:start]:
            if number % every[variant[1]] != 1 % every[variant[1]] and number > 0:
                continue
            before = clock()
            for _ in range(size.steps if number > 0 else 1):
                variants[variant]()
            if number > 0:  # round 0 warms up
                seconds[variant][number] = (clock() - before) / size.steps
        print(f"{name}: round {number} of {rounds}", file=sys.stderr, flush=True)

    def ratio(variant: tuple[str, str], base: tuple[str, str]) -> dict[str, float]:
        return quartiles([seconds[base][number] / taken for number, taken in seconds[variant].items()])

    return [
        {
            "size": name,
            "title": size.title,
            "model": label,
            "precision": precision,
            "parameters": parameters,
            "rounds": len(seconds[label, precision]),
            "samples_per_second": quartiles([size.batch / taken for taken in seconds[label, precision].values()]),
            "over_pytorch": ratio((label, precision), (REFERENCE, precision)),
            "over_float32": ratio((label, precision), (label, "float32")),
        }
        for label, precision in variants
    ]


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""

    def cell(numbers: dict[str, float], digits: int) -> str:
        low, mid, high = (f"{numbers[k]:.{digits}f}" for k in ("lower_quartile", "median", "upper_quartile"))
        return f"{mid} ({low} to {high})"

    lines = [
        "| size | model | precision | samples/s, median (quartiles) | × PyTorch, same precision | × own float32 |",
        "|---|---|---|---|---|---|",
    ]
    for row in results:
        lines.append(
            f"| {row['title']} | {row['model']} | {row['precision']} | {cell(row['samples_per_second'], 0)} "
            f"| {cell(row['over_pytorch'], 2)} | {cell(row['over_float32'], 2)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Training steps a second: paradepth against plain PyTorch.")
    parser.add_argument("--rounds", type=int, default=30, help="measured rounds of each variant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time; for --threads 1")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[s for s in SIZES if s != "smoke"])
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    options = parser.parse_args()
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    if options.clock == "cpu" and options.threads != 1:
        parser.error(f"--clock cpu adds up all threads, so it needs --threads 1, not {options.threads}")
    torch.set_num_threads(options.threads)

    cpu = torch.device("cpu")
    about = environment(World(0, 1, cpu), autocast=None, command=f"python benchmarks/train_step/{command_line()}")
    del about["precision"]  # both are measured
    about["flags"] = sorted(f for f in cpu_flags() if f.startswith(("amx", "avx")))
    about["bf16_units"] = has_bf16_units(cpu)
    clock = CLOCKS[options.clock]
    settings = {"clock": options.clock, "steps_per_round": {name: SIZES[name].steps for name in options.sizes}}
    results: list[dict[str, Any]] = []
    for name in options.sizes:
        results += measure(name, rounds=options.rounds, clock=clock)
        if options.out:  # after each size, so that a run that is cut short leaves what it has
            write_json(options.out, {"environment": about, "settings": settings, "results": results})
    print(table(results))
    if not about["bf16_units"]:
        print("\nThis processor has no bf16 units (AMX or AVX512-bf16): its bf16 rows time an emulation.")


if __name__ == "__main__":
    main()
