"""How long does one forward pass take when the layers are branches? 12 layers of ViT-Tiny's width, cut in five ways.

Every way to evaluate the serial network and the branches takes turns in short rounds, so whatever else the machine
does meets all of them alike. Latency is the median over rounds with quartiles; the speed-up over the best serial
PyTorch variant is taken within each round first. Every number of threads has a process of its own, since compiled code
is made for one.

    python benchmarks/branch_latency/run.py --out benchmarks/branch_latency/result.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from variants import SERIAL_WAYS, SIZES, Size, Variant, onnx_variants, torch_variants

from paradepth.atomic import write_json
from paradepth.distributed import World
from paradepth.timing import quartiles
from paradepth.train.environment import command_line, environment
from paradepth.train.precision import cpu_flags, has_bf16_units

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}
_ROUND_SECONDS = 0.03  # a fast variant is called several times a round


def timed(variants: list[Variant], *, rounds: int) -> list[list[float]]:
    """Seconds of a call of each variant, by round; rounds start one variant further on each time."""
    repeats = []
    for variant in variants:
        for _ in range(2):  # compiles, chooses, warms up
            variant.call()
        before = time.perf_counter()
        variant.call()
        repeats.append(max(1, round(_ROUND_SECONDS / (time.perf_counter() - before))))
    seconds: list[list[float]] = [[] for _ in variants]
    for number in range(rounds):
        for at in range(len(variants)):
            index = (at + number) % len(variants)
            before = time.perf_counter()
            for _ in range(repeats[index]):
                variants[index].call()
            seconds[index].append((time.perf_counter() - before) / repeats[index])
    return seconds


def measure(
    size: Size, *, batch: int, precision: str, threads: int, rounds: int, compiled: bool, ways: list[str] | None
) -> list[dict]:
    """All variants, or those of some ways, at one batch size, measured in turns."""
    torch.compiler.reset()  # of the case before: more than eight compiled forms of a function fall back to eager mode
    draw = torch.Generator().manual_seed(0)
    images_BCHW = torch.rand(batch, 3, size.image_size, size.image_size, generator=draw).to(PRECISIONS[precision])
    with torch.inference_mode():
        variants = list(torch_variants(size, images_BCHW, threads=threads, compiled=compiled))
        if precision == "float32" and (ways is None or any(way.startswith("onnxruntime") for way in ways)):
            variants += onnx_variants(size, images_BCHW, threads=threads)
        variants = [variant for variant in variants if ways is None or variant.way in ways]
        seconds = timed(variants, rounds=rounds)
    serial = [i for i, variant in enumerate(variants) if variant.is_serial_torch]
    best = min(serial, key=lambda i: float(np.median(seconds[i])))
    return [
        {
            "batch": batch,
            "precision": precision,
            "threads": threads,
            "shape": variant.shape,
            "way": variant.way,
            "milliseconds": quartiles([1000 * s for s in taken]),
            "over_best_serial": quartiles([b / s for b, s in zip(seconds[best], taken, strict=True)]),
            "best_serial": variants[best].way,
        }
        for variant, taken in zip(variants, seconds, strict=True)
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """One table for each precision and number of threads: a row for each variant, batches side by side."""
    parts = []
    for precision, threads in dict.fromkeys((row["precision"], row["threads"]) for row in rows):
        here = [row for row in rows if (row["precision"], row["threads"]) == (precision, threads)]
        batches = list(dict.fromkeys(row["batch"] for row in here))
        lines = [f"{precision}, {threads} thread{'s' if threads > 1 else ''}", ""]
        lines.append(f"| shape | evaluated by | {' | '.join(f'batch {b}: ms | × serial' for b in batches)} |")
        lines.append("|---|---" + "|---|---" * len(batches) + "|")
        for shape, way in dict.fromkeys((row["shape"], row["way"]) for row in here):
            cells = []
            for batch in batches:
                row = next(r for r in here if (r["shape"], r["way"], r["batch"]) == (shape, way, batch))
                low, high = row["milliseconds"]["lower_quartile"], row["milliseconds"]["upper_quartile"]
                cells.append(f"{row['milliseconds']['median']:.3g} ({low:.3g} to {high:.3g})")
                cells.append(f"{row['over_best_serial']['median']:.2f}")
            lines.append(f"| {shape} | {way} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def measure_elsewhere(arguments: list[str], *, threads: int) -> list[dict[str, Any]]:
    """The rows of one number of threads, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        subprocess.run(
            [sys.executable, __file__, *arguments, "--threads", str(threads), "--rows", str(out)], check=True
        )
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description="Latency of branches against a serial network.")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--precisions", choices=PRECISIONS, nargs="+", default=list(PRECISIONS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds of each variant")
    parser.add_argument("--ways", nargs="+", help="time only these ways of evaluation, such as: eager compiled")
    parser.add_argument("--no-compile", action="store_true", help="leave compiled networks out")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # of one number of threads, for the parent
    options = parser.parse_args()
    if min(options.rounds, *options.batches, *options.threads) < 1:
        parser.error("--rounds, --batches and --threads must be at least 1")
    peers = SERIAL_WAYS - ({"compiled"} if options.no_compile else set())
    if options.ways and not peers & set(options.ways):
        parser.error(f"--ways is {options.ways}; one of {sorted(peers)} must be there, to compare with")

    rows: list[dict[str, Any]] = []
    if options.rows:
        threads = options.threads[0]
        torch.set_num_threads(threads)
        for precision, batch in itertools.product(options.precisions, options.batches):
            print(f"{threads} thread(s), {precision}, batch {batch}", file=sys.stderr, flush=True)
            rows += measure(
                SIZES[options.size],
                batch=batch,
                precision=precision,
                threads=threads,
                rounds=options.rounds,
                compiled=not options.no_compile,
                ways=options.ways,
            )
            write_json(options.rows, rows)
        return

    cpu = torch.device("cpu")
    about = environment(World(0, 1, cpu), autocast=None, command=f"python benchmarks/branch_latency/{command_line()}")
    for varied in ("precision", "threads"):
        about.pop(varied, None)
    about["flags"] = sorted(f for f in cpu_flags() if f.startswith(("amx", "avx")))
    about["bf16_units"] = has_bf16_units(cpu)
    arguments = ["--size", options.size, "--rounds", str(options.rounds), "--precisions", *options.precisions]
    arguments += ["--batches", *map(str, options.batches), *(["--no-compile"] if options.no_compile else [])]
    arguments += ["--ways", *options.ways] if options.ways else []
    for threads in options.threads:
        rows += measure_elsewhere(arguments, threads=threads)
        if options.out:  # after each, so that a run that is cut short leaves what it has
            write_json(options.out, {"environment": about, "rounds": options.rounds, "results": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
