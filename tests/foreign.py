"""What the tests of `parallelize` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from paradepth.depth import MGRIT, Picard, Serial

DEPTH = 6
EXECUTORS: dict[str, Callable[[], Any]] = {
    "serial": Serial,
    "serial-checkpoint": lambda: Serial(checkpoint=True),
    "mgrit-F": lambda: MGRIT(coarsening=2, forward_iterations=3, backward_iterations=3),
    "mgrit-FCF-branch": lambda: MGRIT(
        coarsening=4, relaxation="FCF", coarse="branch", forward_iterations=1, backward_iterations=1, recompute=False
    ),
    "picard": lambda: Picard(forward_iterations=DEPTH, backward_iterations=DEPTH),
}


def assert_close(got: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-10) -> None:
    """Equal up to `tolerance`, relative to the largest entry of each tensor where that is above 1."""
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).detach().abs().max() <= tolerance * max(1.0, float(b.detach().abs().max()))
