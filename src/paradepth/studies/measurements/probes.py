"""What a layer-parallel run logged: convergence factors, cosines of its gradients, Lipschitz estimates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import correlation, mean
from typing import Any

from paradepth.studies.record import read_events

ENDS = 2  # layers at each end that count as an end


def measure(*, seed: int, data_dir: Path | None, run_dir: Path, source: Path | None) -> dict[str, float | list[float]]:
    """The probes of the run that this measurement starts from, which was trained with `control`, `exact_probe` and
    `lipschitz`.

    Returns:
        Lists: `step` of each probe, `rho` (the larger convergence factor of both directions), `bias` (1 − cosine of
        the gradient of ordinary iterations to the serial one), `lipschitz_first` and `lipschitz_last` (by layer, at
        the first and last validation). Numbers: `rank_correlation` of ρ and bias, `last_rho`, `last_bias`,
        `growth_of_ends` and `growth_of_middle`, the mean ratio of the last to the first Lipschitz estimate of the two
        first and two last layers, and of the others.

    Raises:
        ValueError: no source, or a run without two probes and two estimates.
    """
    if source is None:
        raise ValueError("probes are read from a run; the cell has to start from one")
    events = read_events(source / "metrics.jsonl")
    probes = [event for event in events if event["event"] == "probe" and _rhos(event)]
    estimates = [event["estimates"] for event in events if event["event"] == "lipschitz"]
    if len(probes) < 2 or len(estimates) < 2:
        raise ValueError(
            f"{source} has {len(probes)} probes and {len(estimates)} Lipschitz estimates; there must be at least two "
            "each: train with control, exact_probe and lipschitz"
        )
    rho = [max(_rhos(event)) for event in probes]
    bias = [1 - event["cosine"] for event in probes]
    first, last = estimates[0], estimates[-1]
    growth = [after / before if before else 1.0 for before, after in zip(first, last, strict=True)]
    return {
        "rank_correlation": rank_correlation(rho, bias),
        "last_rho": rho[-1],
        "last_bias": bias[-1],
        "growth_of_ends": mean(growth[:ENDS] + growth[-ENDS:]),
        "growth_of_middle": mean(growth[ENDS:-ENDS] or growth),
        "step": [event["step"] for event in probes],
        "rho": rho,
        "bias": bias,
        "lipschitz_first": first,
        "lipschitz_last": last,
    }


def _rhos(event: dict[str, Any]) -> list[float]:
    found = [event[side]["rho"] for side in ("forward", "backward") if side in event]
    return [rho for rho in found if rho is not None]


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Spearman's correlation of two series; 0 where one of them is constant.

    >>> rank_correlation([0.1, 0.2, 0.9], [1.0, 5.0, 7.0]), rank_correlation([1, 1, 1], [1, 2, 3])
    (1.0, 0.0)
    >>> round(rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]), 3)
    0.949
    """
    if len(set(xs)) == 1 or len(set(ys)) == 1:
        return 0.0
    return round(correlation(_ranks(xs), _ranks(ys)), 12)


def _ranks(values: Sequence[float]) -> list[float]:
    """The place of each value in their order; equal values share the mean of theirs."""
    order = sorted(values)
    return [order.index(value) + (order.count(value) - 1) / 2 for value in values]
