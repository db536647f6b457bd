"""A claim that a benchmark answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from paradepth.studies.claim import Claim, Verdict


@dataclass(frozen=True)
class BenchmarkClaim:
    """A claim with the rule by which a benchmark's figures become its verdict.

    Attributes:
        claim: the claim.
        benchmark: folder of the benchmark.
        files: its JSON files that the rule reads.
        verdict: from their contents, in that order, to the verdict.
        command: makes them again.
    """

    claim: Claim
    benchmark: str
    files: tuple[str, ...]
    verdict: Callable[..., Verdict]
    command: str
