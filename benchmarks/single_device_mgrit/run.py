"""Is MGRIT on one device faster than the serial stack, at a gradient that is as good as exact?

Forward and backward of a stack of 128 layers at small batches: MGRIT with batched layers, branch-sum coarse steps and F
or FCF relaxation, against the serial loop in eager mode and compiled; on a GPU each also as a CUDA graph. Beside the
time of every variant stands the cosine of its gradient to that of the serial loop in float32 without autocast.

    python benchmarks/single_device_mgrit/run.py --device cuda --out benchmarks/single_device_mgrit/result.json

Variants take turns in short rounds; a time is divided into that of the best serial variant within the same round.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from network import SIZES, ByteModel, Gradients, Variant, make, variants, windows

from paradepth.atomic import write_json
from paradepth.distributed import World
from paradepth.timing import quartiles
from paradepth.train.environment import command_line, environment

_ROUND_SECONDS = 0.05  # a fast variant is called several times a round
GOOD = 0.999  # cosine of a gradient that trains like the exact one


def flat(gradients: Gradients) -> torch.Tensor:
    """The gradients of the parameters as one vector."""
    return torch.cat([g.detach().double().flatten() for g in gradients[1:]])


def timed(chosen: list[Variant], device: torch.device, *, rounds: int) -> list[list[float]]:
    """Seconds of a call of each variant, by round; rounds start one variant further on each time."""

    def seconds_of(variant: Variant, times: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        before = time.perf_counter()
        for _ in range(times):
            variant.call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - before) / times

    repeats = []
    for variant in chosen:
        seconds_of(variant, 2)
        repeats.append(max(1, round(_ROUND_SECONDS / seconds_of(variant, 1))))
    seconds: list[list[float]] = [[] for _ in chosen]
    for number in range(rounds):
        for at in range(len(chosen)):
            index = (at + number) % len(chosen)
            seconds[index].append(seconds_of(chosen[index], repeats[index]))
    return seconds


def measure(model: ByteModel, batch_BT: torch.Tensor, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All variants on one batch."""
    cast = torch.bfloat16 if options.precision == "bf16" else None
    x = model.start(batch_BT).detach().requires_grad_()
    end = model.stack(x)
    (w,) = torch.autograd.grad(model.loss(end, batch_BT), end, retain_graph=True)
    exact = flat(torch.autograd.grad(end, [x, *model.stack.parameters()], w))
    chosen = list(variants(model, x, w, cast=cast, compiled=not options.no_compile, iterations=options.iterations))
    rows: list[dict[str, Any]] = []
    for variant in chosen:
        if x.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(x.device)
        mine = flat(variant.call())
        row: dict[str, Any] = {"way": variant.name, "serial": variant.serial, "batch": len(batch_BT)}
        row |= {"step": model.stack.step, "precision": options.precision, **(variant.options or {})}
        row["cosine"] = float(mine @ exact / (mine.norm() * exact.norm()))
        row["relative_norm"] = float(mine.norm() / exact.norm())
        if x.device.type == "cuda":
            row["peak_megabytes"] = round(torch.cuda.max_memory_allocated(x.device) / 1e6, 1)
        solved = None if variant.executor is None else variant.executor.report
        both = [] if solved is None else [solved.forward, solved.backward]
        row["evaluations"] = [one.evaluations for one in both] or [model.stack.depth] * 2
        row["sequential"] = [one.sequential for one in both] or [model.stack.depth] * 2
        rows.append(row)
    seconds = timed(chosen, x.device, rounds=options.rounds)
    serial = [i for i, variant in enumerate(chosen) if variant.serial]
    best = min(serial, key=lambda i: float(np.median(seconds[i])))
    for row, taken in zip(rows, seconds, strict=True):
        row["milliseconds"] = quartiles([1000 * s for s in taken])
        row["over_best_serial"] = quartiles([b / s for b, s in zip(seconds[best], taken, strict=True)])
        row["best_serial"] = chosen[best].name
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A row for each variant."""
    lines = [
        f"h = {rows[0]['step']:.3g}, batch {rows[0]['batch']}, {rows[0]['precision']}",
        "",
        "| evaluated by | in a row, forward + backward | ms (quartiles) | × best serial | cosine |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ms = row["milliseconds"]
        lines.append(
            f"| {row['way']} | {row['sequential'][0]} + {row['sequential'][1]} "
            f"| {ms['median']:.3g} ({ms['lower_quartile']:.3g} to {ms['upper_quartile']:.3g}) "
            f"| {row['over_best_serial']['median']:.2f} | {row['cosine']:.5f} |"
        )
    good = [row for row in rows if not row["serial"] and row["cosine"] >= GOOD]
    if good:
        fastest = max(good, key=lambda row: row["over_best_serial"]["median"])
        lines.append(
            f"\nfastest at a cosine of {GOOD}: {fastest['way']}, {fastest['over_best_serial']['median']:.2f} ×"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="MGRIT on one device against the serial stack.")
    parser.add_argument("--size", choices=SIZES, default="deep")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="bf16 is autocast")
    parser.add_argument("--batches", type=int, nargs="+", help="default: those of the size")
    parser.add_argument("--steps", type=float, nargs="+", help="step sizes h; default: 1/layers and 1")
    parser.add_argument("--iterations", type=int, nargs="+", default=[0, 1], help="of MGRIT, forward and backward")
    parser.add_argument("--text", type=Path, help="text to train and measure on; without it, random bytes")
    parser.add_argument("--train-steps", type=int, default=0, help="steps of serial training before measuring")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds of each variant")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled serial variants out")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    options = parser.parse_args()
    size = SIZES[options.size]
    batches, steps = options.batches or list(size.batches), options.steps or [1 / size.layers, 1.0]
    if min(options.rounds, *batches) < 1:
        parser.error("--rounds and --batches must be at least 1")
    if min(options.train_steps, *options.iterations) < 0:
        parser.error("--train-steps and --iterations must be at least 0")
    if min(steps) <= 0:
        parser.error("--steps must be positive")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}, but this machine has no CUDA device")
    if options.threads:
        torch.set_num_threads(options.threads)

    device = torch.device(options.device)
    cast = torch.bfloat16 if options.precision == "bf16" else None
    command = f"python benchmarks/single_device_mgrit/{command_line()}"
    about = environment(World(0, 1, device), autocast=cast, command=command)
    rows: list[dict[str, Any]] = []
    for step in steps:
        model = make(size, step=step, text=options.text, train_steps=options.train_steps, device=device)
        for batch in batches:
            print(f"h = {step:.3g}, batch {batch}", file=sys.stderr, flush=True)
            held_out = windows(options.text, batch, size.tokens, seed=5).to(device)
            here = measure(model, held_out, options)
            rows += [{"train_steps": options.train_steps, **row} for row in here]
            if options.out:  # after each, so that a run that is cut short leaves what it has
                write_json(options.out, {"environment": about, "rounds": options.rounds, "results": rows})
            print(f"{table(here)}\n")


if __name__ == "__main__":
    main()
