"""Claims about how small a trained model gets, which the benchmark of compression answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paradepth.studies.claim import PARAFORMER, Answer, Claim, Verdict
from paradepth.studies.claims.source import BenchmarkClaim
from paradepth.studies.rules import answer

SETS = {"Fashion-MNIST": "fashion_mnist.json", "CIFAR-10": "cifar10.json"}
TOLERATED = 0.005  # loss of test accuracy that counts as minimal

_COMMAND = "for run in fashion cifar10; do paradepth compress runs/$run --no-latency --test; done"

Point = dict[str, Any]  # a plan with its test accuracy, parameters and bytes
Result = dict[str, Any]  # of `paradepth compress`


def compression_at_minimal_loss(*of_sets: Result) -> Verdict:
    """Holds where dropping branches alone makes 4.8 times fewer parameters within 0.5 points, with conditions where
    quantisation on top of it makes a file so much smaller."""
    return _over_sets(lambda found: _compressed(found, 4.8, TOLERATED), of_sets)


def compression_at_most(*of_sets: Result) -> Verdict:
    """The same for 15.07 times, whose loss is not stated: here within 5 points."""
    return _over_sets(lambda found: _compressed(found, 15.07, 0.05), of_sets)


def quantisation_and_pruning(*of_sets: Result) -> Verdict:
    """Holds where both quantisation and pruning make the file that dropping branches leaves smaller, within 0.5 points
    of the full model; with conditions where one of them does."""
    return _over_sets(_added, of_sets)


def _over_sets(rule: Callable[[Result], Verdict], of_sets: tuple[Result, ...]) -> Verdict:
    """What the rule says of each set of data together: with conditions where they differ."""
    verdicts = [rule(found) for found in of_sets]
    told: set[Answer] = {verdict.verdict for verdict in verdicts}
    figure = " ".join(f"{name}: {verdict.figure}" for name, verdict in zip(SETS, verdicts, strict=True))
    return Verdict(told.pop() if len(told) == 1 else "holds with conditions", figure)


def _plans(compression: Result) -> tuple[Point, list[Point]]:
    full = next(point for point in compression["points"] if point["plan"] == "full")
    return full, [point for point in compression["points"] if point is not full]


def _loss(full: Point, point: Point) -> float:
    return full["test"]["accuracy"] - point["test"]["accuracy"]


def _is_prefix(point: Point) -> bool:
    """Whether branches are dropped and nothing else changes the number of weights."""
    return all(part.startswith(("prefix", "distil")) for part in point["plan"].split("+"))


def _smallest(points: list[Point], key: str) -> Point:
    return min(points, key=lambda point: point[key])


def _described(full: Point, point: Point, key: str) -> str:
    times = full[key] / point[key]
    return f"{point['plan']}: {times:.2f} times smaller in {key} for {100 * _loss(full, point):.2f} points"


def _compressed(compression: Result, times: float, tolerated: float) -> Verdict:
    full, points = _plans(compression)
    kept = [point for point in points if _loss(full, point) <= tolerated]
    prefix = _smallest([point for point in kept if _is_prefix(point)], "parameters")
    small = _smallest(kept, "bytes")
    figure = (
        f"{_described(full, prefix, 'parameters')}; with quantisation and pruning {_described(full, small, 'bytes')}."
    )
    if full["parameters"] / prefix["parameters"] >= times:
        return Verdict("holds", figure)
    return Verdict("holds with conditions" if full["bytes"] / small["bytes"] >= times else "does not hold", figure)


def _added(compression: Result) -> Verdict:
    full, points = _plans(compression)
    kept = [point for point in points if _loss(full, point) <= TOLERATED]
    prefix = _smallest([point for point in kept if _is_prefix(point)], "bytes")
    quantised = [p for p in kept if "int" in p["plan"] and not _is_pruned(p) and p["bytes"] < prefix["bytes"]]
    int8 = _smallest([p for p in quantised if "int8" in p["plan"]] or [prefix], "bytes")
    pruned = [p for p in kept if _is_pruned(p) and "int8" in p["plan"] and p["bytes"] < int8["bytes"]]
    best = [
        _described(full, _smallest(plans, "bytes"), "bytes") if plans else f"no {name} model is smaller at that loss"
        for name, plans in (("quantised", quantised), ("pruned", pruned))
    ]
    figure = f"Branches alone, {_described(full, prefix, 'bytes')}; on top of that {'; '.join(best)}."
    return Verdict(answer([bool(quantised), bool(pruned)]), figure)


def _is_pruned(point: Point) -> bool:
    return any(part.startswith(("heads", "neurons", "magnitude")) for part in point["plan"].split("+"))


COMPRESSION_CLAIMS = (
    BenchmarkClaim(
        Claim(
            "compression-at-minimal-loss",
            "Keeping the leading branches makes a model 4.8 times smaller at minimal loss.",
            PARAFORMER,
        ),
        "compression",
        tuple(SETS.values()),
        compression_at_minimal_loss,
        _COMMAND,
    ),
    BenchmarkClaim(
        Claim(
            "compression-at-most", "Keeping the leading branches makes a model up to 15.07 times smaller.", PARAFORMER
        ),
        "compression",
        tuple(SETS.values()),
        compression_at_most,
        _COMMAND,
    ),
    BenchmarkClaim(
        Claim(
            "quantisation-and-pruning",
            "Can quantisation and pruning be added to dropping branches?",
            PARAFORMER,
            "question",
        ),
        "compression",
        tuple(SETS.values()),
        quantisation_and_pruning,
        _COMMAND,
    ),
)
