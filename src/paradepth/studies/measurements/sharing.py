"""The time of one training step of branches that share weights, evaluated in several ways, against a serial stack."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import torch


def measure(
    *,
    seed: int,
    data_dir: Path | None,
    run_dir: Path,
    source: Path | None,
    share: str,
    branches: int = 4,
    depth: int = 2,
    width: int = 64,
    heads: int = 2,
    mlp: int = 256,
    tokens: int = 16,
    batch: int = 64,
    rounds: int = 30,
) -> dict[str, float | list[float]]:
    """Times forward and backward passes of a trunk with random weights on one process, ways by turns.

    Args:
        seed: of weights and inputs.
        data_dir, run_dir, source: not used.
        share: how layers share their weights.
        branches, depth, width, heads, mlp: of the trunk.
        tokens, batch: of the input.
        rounds: how often each way is timed, besides once before.

    Returns:
        Median milliseconds of branches one by one (`loop_ms`), of batched branches (`batched_ms`) and of a serial stack
        of as many layers (`serial_ms`), which shares its weights in the same way where that can be; `loop_speedup` and
        `batched_speedup` against the serial stack, the medians of the ratios of a round; `chain` and `serial_chain`,
        layer evaluations that wait for one another; and `parameters` of the trunk.

    Raises:
        ValueError: a trunk that cannot be.
    """
    from paradepth.branches import Batched, Loop
    from paradepth.models import create_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape: dict[str, Any] = {"width": width, "heads": heads, "mlp": mlp}
        trunk = create_model("paraformer_nano", branches=branches, depth=depth, share=share, **shape).trunk
        alike = "none" if share == "branches" else share
        stack = create_model("vit_nano", depth=branches * depth, share=alike, **shape).trunk
        x_BTD = torch.randn(batch, tokens, width)

    def step(module: Any) -> float:
        module.zero_grad(set_to_none=True)
        started = time.perf_counter()
        module(x_BTD).square().mean().backward()
        return 1000 * (time.perf_counter() - started)

    ways = {"loop": (trunk, Loop()), "batched": (trunk, Batched()), "serial": (stack, None)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, (module, executor) in ways.items():
            if executor is not None:
                module.executor = executor
            spent = step(module)
            if number:  # the first one is slower
                seconds[way].append(spent)
    ratios = {way: [a / b for a, b in zip(seconds["serial"], seconds[way], strict=True)] for way in ways}
    return {
        **{f"{way}_ms": median(values) for way, values in seconds.items()},
        "loop_speedup": median(ratios["loop"]),
        "batched_speedup": median(ratios["batched"]),
        "chain": depth,
        "serial_chain": branches * depth,
        "parameters": sum(p.numel() for p in trunk.parameters()),
    }
