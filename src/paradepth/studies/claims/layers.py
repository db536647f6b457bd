"""Claims about layer-parallel training that benchmarks answer: gradients, buffers, time, memory."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from paradepth.studies.claim import LAYER_PARALLEL, Claim, Verdict
from paradepth.studies.claims.source import BenchmarkClaim
from paradepth.studies.rules import answer

GOOD = 0.99  # cosine to the exact gradient from which it counts as right
DEVICES = 8  # of the paper's figures

_COARSE = "cd benchmarks/coarse_operators; python run.py --text input.txt --processes 2 --out result.json"
_BUFFERS = "cd benchmarks/coarse_operators; python run.py --text input.txt --embedding 0.02 --buffers 2 --training 0"
_TIMES = "python benchmarks/layer_parallel/run.py --text input.txt --train-steps 200"
_MEMORY = "python benchmarks/layer_parallel/memory.py --out benchmarks/layer_parallel/memory.json"

Rows = list[dict[str, Any]]


def _cosine(row: dict[str, Any], forward: int | str, backward: int | str) -> float:
    found = (g for g in row["gradients"] if (g["forward"], g["backward"]) == (forward, backward))
    return next(found)["cosine"]


def _chosen(results: Rows, **wanted: Any) -> Iterable[dict[str, Any]]:
    return (row for row in results if all(row[key] == value for key, value in wanted.items()))


def gradient_bias(coarse: dict[str, Any]) -> Verdict:
    """Holds where the cosine of one iteration forward and backward, with the papers' coarse step, F-relaxation and
    c = 4, falls at every further stage of training and ends below 0.99."""
    rows = sorted(
        _chosen(coarse["results"], h="1/N", coarse="sample", relaxation="F", coarsening=4), key=lambda r: r["training"]
    )
    by_steps = {row["training"]: _cosine(row, 1, 1) for row in rows}
    cosines = list(by_steps.values())
    falls = all(a > b for a, b in pairwise(cosines))
    shown = ", ".join(f"{cosine:.4f} after {steps} steps" for steps, cosine in by_steps.items())
    held = falls and cosines[-1] < GOOD
    return Verdict(
        "holds" if held else "does not hold",
        f"Cosine to the exact gradient of one iteration each way, 32 layers of step 1/32: {shown}.",
    )


def buffer_layers(without: dict[str, Any], buffered: dict[str, Any]) -> Verdict:
    """Holds where buffers bring the cosine above 0.99 at step 1/N and raise it at step 1, with the papers' coarse step;
    with conditions where they do one of both."""
    pairs = {}
    for h in ("1/N", "1"):
        before, after = (
            _cosine(next(iter(_chosen(found["results"], h=h, coarse="sample", relaxation="F"))), 1, 1)
            for found in (without, buffered)
        )
        pairs[h] = (before, after)
    held = [pairs["1/N"][1] >= GOOD > pairs["1/N"][0], pairs["1"][1] > pairs["1"][0]]
    shown = "; ".join(f"h = {h}: {before:.2f} without, {after:.2f} with" for h, (before, after) in pairs.items())
    return Verdict(
        answer(held),
        "Cosine to the exact gradient of one iteration each way, untrained, small embeddings, two buffers at each "
        f"end: {shown}. One seed.",
    )


def choice_of_coarse_solver(coarse: dict[str, Any]) -> Verdict:
    """Holds where one choice of coarse step, c, relaxation and iterations has a cosine of 0.99 in every network with
    less sequential depth than serial training."""
    depths: dict[tuple[Any, ...], list[int | None]] = {}
    for row in coarse["results"]:
        for gradient in row["gradients"]:
            if "serial" in (gradient["forward"], gradient["backward"]):
                continue
            depth = gradient["forward_cost"]["chain"] + gradient["backward_cost"]["chain"]
            setting = (row["coarse"], row["coarsening"], row["relaxation"], gradient["forward"], gradient["backward"])
            depths.setdefault(setting, []).append(depth if gradient["cosine"] >= GOOD else None)
    serial = 2 * coarse["settings"]["layers"]
    networks = len({(row["h"], row["training"]) for row in coarse["results"]})
    good = {s: max(d for d in found if d is not None) for s, found in depths.items() if None not in found}
    good = {setting: depth for setting, depth in good.items() if depth < serial}
    published = [found for setting, found in depths.items() if setting[0] == "sample"]
    most = max(sum(depth is not None and depth < serial for depth in found) for found in published)
    told = f"The published coarse step reaches it in at most {most} of {networks} networks with any one setting."
    if not good:
        return Verdict("does not hold", f"No setting has a cosine of {GOOD} in every network. {told}")
    (operator, c, relaxation, forward, backward), depth = min(good.items(), key=lambda item: item[1])
    return Verdict(
        "holds",
        f"Coarse steps by {operator}, c = {c}, {relaxation}, {forward} iterations forward and {backward} backward have "
        f"a cosine of {GOOD} in all {networks} networks (h = 1, 1/32; untrained, trained) in a sequential depth of "
        f"{depth} of {serial}, at two levels. {told}",
    )


def two_devices_may_be_slower(times: dict[str, Any]) -> Verdict:
    """Holds where in some network the cheapest setting with a cosine of 0.99 takes longer than serial training on
    two devices."""
    return _times(times, [found["time"] > 1 for found in times["cheapest"].values()])


def _times(times: dict[str, Any], slower: list[bool]) -> Verdict:
    shown = ", ".join(f"{name} {found['time']:.2f} ({found['setting']})" for name, found in times["cheapest"].items())
    return Verdict(
        "holds" if any(slower) else "does not hold",
        f"Time over that of serial training on {times['ranks']} processes, cheapest setting with a cosine of {GOOD}: "
        f"{shown}.",
    )


def layer_parallel_speed_up(times: dict[str, Any]) -> Verdict:
    """Can be tested on eight devices only."""
    if times["ranks"] < DEVICES:
        fastest = min(found["time"] for found in times["cheapest"].values())
        return Verdict(
            "could not be tested here",
            f"There are {times['ranks']} processes, on which serial training is faster (layer-parallel takes "
            f"{fastest:.2f} of its time at best where the gradient is right).",
        )
    speed = max(1 / found["time"] for found in times["cheapest"].values())
    return Verdict("holds" if speed >= 3 else "does not hold", f"{speed:.2f} times on {times['ranks']} processes.")


def memory(found: dict[str, Any]) -> Verdict:
    """Holds where layer-parallel training needs less memory a process than serial training on as many processes, with
    conditions where only less than serial training on one."""
    peaks = {row["variant"]: row["peak_megabytes"] for row in found["results"]}
    ours = min(peak for name, peak in peaks.items() if name.startswith("MGRIT"))
    shared, alone = peaks["serial on 2 processes"], peaks["serial"]
    told = "holds" if ours < shared else "holds with conditions" if ours < alone else "does not hold"
    shown = ", ".join(f"{name} {peak / alone:.2f}" for name, peak in peaks.items())
    return Verdict(told, f"Peak of a training step a process, of that of serial training on one: {shown}.")


LAYER_CLAIMS = (
    BenchmarkClaim(
        Claim(
            "gradient-bias",
            "Too few iterations bias the gradient, the more so the longer training goes on.",
            LAYER_PARALLEL,
        ),
        "coarse_operators",
        ("result.json",),
        gradient_bias,
        _COARSE,
    ),
    BenchmarkClaim(
        Claim(
            "buffer-layers",
            "A few serial buffer layers at both ends, where layers are stiffest, keep layer-parallel gradients right.",
            LAYER_PARALLEL,
        ),
        "coarse_operators",
        ("small-embeddings-0.json", "small-embeddings-2.json"),
        buffer_layers,
        _BUFFERS,
    ),
    BenchmarkClaim(
        Claim(
            "choice-of-coarse-solver",
            "Is there a choice of coarsening, levels and iterations that can be recommended?",
            LAYER_PARALLEL,
            "question",
        ),
        "coarse_operators",
        ("result.json",),
        choice_of_coarse_solver,
        _COARSE,
    ),
    BenchmarkClaim(
        Claim("two-devices-may-be-slower", "Two devices can be slower than serial training.", LAYER_PARALLEL),
        "layer_parallel",
        ("result.json",),
        two_devices_may_be_slower,
        _TIMES,
    ),
    BenchmarkClaim(
        Claim(
            "layer-parallel-speed-up",
            "Eight devices train about 3 (encoders) to 4 times (translation, tagging) as fast as one.",
            LAYER_PARALLEL,
        ),
        "layer_parallel",
        ("result.json",),
        layer_parallel_speed_up,
        _TIMES,
    ),
    BenchmarkClaim(
        Claim(
            "memory-of-layer-parallel-training",
            "Does layer-parallel training need less memory a device?",
            LAYER_PARALLEL,
            "question",
        ),
        "layer_parallel",
        ("memory.json",),
        memory,
        _MEMORY,
    ),
)
