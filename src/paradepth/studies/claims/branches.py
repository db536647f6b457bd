"""Claims about branches that benchmarks of time answer: devices and latency."""

from __future__ import annotations

from typing import Any

from paradepth.studies.claim import DUAT, PARAFORMER, Claim, Verdict
from paradepth.studies.claims.source import BenchmarkClaim
from paradepth.studies.rules import answer

FASTER, DEVIATION = 3.30, 0.86  # the paper's speed over FairScale
OURS, OLD_PIPELINES = "branch-parallel", ("pipeline (fairscale", "pipeline (torchgpipe")

_DEVICES = "torchrun --nproc-per-node 2 benchmarks/devices/run.py --rounds 7 --out benchmarks/devices/result.json"
_LATENCY = "python benchmarks/branch_latency/run.py --out benchmarks/branch_latency/result.json"

Rows = list[dict[str, Any]]


def _cases(devices: dict[str, Any]) -> dict[str, Rows]:
    cases: dict[str, Rows] = {}
    for row in devices["results"]:
        cases.setdefault(row["case"], []).append(row)
    return cases


def _fastest(rows: Rows, families: str | tuple[str, ...]) -> dict[str, Any]:
    return min((row for row in rows if row["family"].startswith(families)), key=_milliseconds)


def _milliseconds(row: dict[str, Any]) -> float:
    return row["milliseconds"]["median"]


def faster_than_fairscale(devices: dict[str, Any]) -> Verdict:
    """Holds where branches are at least 3.30 − 0.86 times as fast as the best of FairScale's and GPipe's pipelines in
    every case, with conditions where they are in some."""
    speeds = {
        case: _milliseconds(_fastest(rows, OLD_PIPELINES)) / _milliseconds(_fastest(rows, OURS))
        for case, rows in _cases(devices).items()
    }
    reached = [speed >= FASTER - DEVIATION for speed in speeds.values()]
    shown = ", ".join(f"{case} {speed:.2f}" for case, speed in speeds.items())
    return Verdict(
        answer(reached),
        f"Speed over the best pipeline of FairScale and torchgpipe: {shown}; on {_processes(devices)}. The number of "
        "GPUs and the batch of the paper's figure are not stated.",
    )


def devices_for_branches(devices: dict[str, Any]) -> Verdict:
    """Holds where branches have at least 0.9 of the speed that the devices allow over the serial network on one, with
    conditions where they gain more than a tenth."""
    rows = _cases(devices)["latency, batch 1"]
    best, alone = _fastest(rows, OURS), _fastest(rows, "one device")
    speed = _milliseconds(alone) / _milliseconds(best)
    allowed = min(best["branches"], devices["environment"]["world_size"])
    figure = (
        f"{best['network']} takes {_milliseconds(best):.1f} ms for an image and the serial network of as many layers "
        f"{_milliseconds(alone):.1f}: {speed:.2f} times as fast, of at most {allowed} on {_processes(devices)}."
    )
    told = "holds" if speed >= 0.9 * allowed else "holds with conditions" if speed > 1.1 else "does not hold"
    return Verdict(told, figure)


def constant_latency(devices: dict[str, Any]) -> Verdict:
    """Can be tested only where every branch has a device of its own."""
    rows = [row for row in _cases(devices)["latency, batch 1"] if row["family"].startswith(OURS)]
    count = devices["environment"]["world_size"]
    alone = [row for row in rows if row["branches"] <= count]
    sent = {row["network"]: max(row["payload_bytes"]) / 1000 for row in rows}
    figure = (
        f"{_processes(devices).capitalize()} share the branches; a forward pass sends one state whatever the number of "
        f"branches and their depth ({', '.join(f'{name}: {kilo:.0f} kB' for name, kilo in sent.items())})."
    )
    if len({row["branches"] for row in alone}) < 2:
        return Verdict("could not be tested here", f"There are not as many devices as branches. {figure}")
    slowest, fastest = (choose(map(_milliseconds, alone)) for choose in (max, min))
    return Verdict("holds" if slowest <= 1.1 * fastest else "does not hold", figure)


def depth_on_equal_devices(devices: dict[str, Any]) -> Verdict:
    """Holds where branches are faster than every other way of using the same devices in every case, with conditions
    where they are in some."""
    cases = _cases(devices)
    speeds = {}
    for case, rows in cases.items():
        peer = min((row for row in rows if not row["family"].startswith(OURS)), key=_milliseconds)
        speeds[case] = (_milliseconds(peer) / _milliseconds(_fastest(rows, OURS)), peer["family"])
    shown = ", ".join(f"{case} {speed:.2f} ({family})" for case, (speed, family) in speeds.items())
    return Verdict(
        answer([speed > 1 for speed, _ in speeds.values()]),
        f"Speed of shared branches over the best of one device, pipelines, tensor and data parallelism: {shown}.",
    )


def fused_branches(latency: dict[str, Any]) -> Verdict:
    """Holds where branches evaluated as batched tensors are more than a tenth faster than the best serial network and
    than the branches one after another, at equal batch, precision and threads; with conditions where in some."""
    settings: dict[str, dict[str, float]] = {}
    for row in latency["results"]:
        if row["way"] in ("batched", "loop"):
            name = f"{row['precision']}, batch {row['batch']}, {row['threads']} threads"
            best = settings.setdefault(name, {})
            best[row["way"]] = max(best.get(row["way"], 0.0), row["over_best_serial"]["median"])
    won = [best["batched"] > 1.1 and best["batched"] > 1.1 * best["loop"] for best in settings.values()]
    shown = "; ".join(f"{name}: {best['batched']:.2f} ({best['loop']:.2f})" for name, best in settings.items())
    return Verdict(
        answer(won),
        f"Best speed of stacked branches (and of branches one after another) over the best serial network: {shown}. On "
        f"{latency['environment']['device']}.",
    )


def _processes(devices: dict[str, Any]) -> str:
    environment = devices["environment"]
    return f"{environment['world_size']} processes ({environment['device']})"


BRANCH_CLAIMS = (
    BenchmarkClaim(
        Claim("constant-latency", "With a device for each branch latency depends on its depth only.", PARAFORMER),
        "devices",
        ("result.json",),
        constant_latency,
        _DEVICES,
    ),
    BenchmarkClaim(
        Claim(
            "faster-than-fairscale",
            "On several devices branches are 3.30 ± 0.86 times faster than FairScale.",
            PARAFORMER,
        ),
        "devices",
        ("result.json",),
        faster_than_fairscale,
        _DEVICES,
    ),
    BenchmarkClaim(
        Claim("devices-for-branches", "N layers as branches of M layers run N/M times faster than in series.", DUAT),
        "devices",
        ("result.json",),
        devices_for_branches,
        _DEVICES,
    ),
    BenchmarkClaim(
        Claim(
            "depth-on-equal-devices",
            "On equal devices, are branches faster than pipelines, tensor parallelism and data parallelism?",
            PARAFORMER,
            "question",
        ),
        "devices",
        ("result.json",),
        depth_on_equal_devices,
        _DEVICES,
    ),
    BenchmarkClaim(
        Claim("fused-branches", "Does fused execution of the branches make them faster?", PARAFORMER, "question"),
        "branch_latency",
        ("result.json",),
        fused_branches,
        _LATENCY,
    ),
)
