"""Which point to take, by limits on size, latency and accuracy.

All figures are those of the validation split. Where a loss of accuracy is allowed, the smallest point that meets all
limits is taken; with limits on size and latency only, the most accurate one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Point = dict[str, Any]
"""A record of `Frontier.compute` with "latency", the milliseconds of the median at batch 1, None where it was not
measured."""

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Limits:
    """What a chosen model must meet; None asks for nothing.

    Attributes:
        size: bytes of model.safetensors at most.
        latency: milliseconds at batch 1 at most, the median.
        accuracy_loss: percentage points of accuracy below the full model at most.

    Raises:
        ValueError: a limit that is not a positive number; of a loss of accuracy, one below 0.
    """

    size: int | None = None
    latency: float | None = None
    accuracy_loss: float | None = None

    def __post_init__(self) -> None:
        for name, value, ok, allowed in (
            ("max_size", self.size, self.size is None or self.size > 0, "positive"),
            ("max_latency", self.latency, self.latency is None or 0 < self.latency < math.inf, "positive"),
            (
                "max_loss_of_accuracy",
                self.accuracy_loss,
                self.accuracy_loss is None or 0 <= self.accuracy_loss < math.inf,
                "at least 0, in percentage points",
            ),
        ):
            if not ok:
                raise ValueError(f"{name} is {value}; it must be {allowed}")

    def __bool__(self) -> bool:
        return (self.size, self.latency, self.accuracy_loss) != (None, None, None)

    def __str__(self) -> str:
        said = [
            None if self.size is None else f"at most {self.size:,} bytes",
            None if self.latency is None else f"at most {self.latency:g} ms at batch 1",
            None if self.accuracy_loss is None else f"at most {self.accuracy_loss:g} points of accuracy lost",
        ]
        return ", ".join(part for part in said if part)

    @property
    def rule(self) -> str:
        """What is taken of the points that meet the limits."""
        return "most accurate" if self.accuracy_loss is None else "smallest"

    def excess(self, point: Point, full: Point) -> float:
        """By how much a point misses the limits, 0 for one that meets them: the largest relative excess of size and
        latency, and of the loss of accuracy in points (in parts of what is allowed, where that is more than a point).
        """
        missed = [0.0]
        if self.size is not None:
            missed.append(point["bytes"] / self.size - 1)
        if self.latency is not None:
            latency = point["latency"]
            missed.append(math.inf if latency is None else latency / self.latency - 1)
        if self.accuracy_loss is not None:
            missed.append((lost(point, full) - self.accuracy_loss) / max(self.accuracy_loss, 1.0))
        return max(missed)


class NoSuchPoint(ValueError):
    """No point meets the limits."""


def lost(point: Point, full: Point) -> float:
    """Percentage points of accuracy that a point is below the full model; negative where it is above.

    >>> lost({"accuracy": 0.905}, {"accuracy": 0.91})
    0.5
    """
    return round(100 * (full["accuracy"] - point["accuracy"]), 9)  # 91 % less 90 % is one point, not a little more


def choose(points: Sequence[Point], limits: Limits, *, full: Point) -> Point:
    """The point to take.

    Args:
        points: to choose from.
        limits: at least one.
        full: the point of the full model.

    Raises:
        NoSuchPoint: no point meets the limits; the message names the one that misses them least.
        ValueError: no limits, or no points.

    >>> points = [
    ...     {"plan": p, "bytes": b, "accuracy": a, "loss": 1.0, "latency": 1.0}
    ...     for p, b, a in (("full", 100, 0.90), ("int8", 30, 0.895), ("prefix=1", 20, 0.80))
    ... ]
    >>> choose(points, Limits(accuracy_loss=1.0), full=points[0])["plan"]
    'int8'
    >>> choose(points, Limits(size=10), full=points[0])
    Traceback (most recent call last):
    paradepth.compress.choose.NoSuchPoint: no point meets the limits (at most 10 bytes); the nearest is prefix=1: 20 bytes, 1.00 ms at batch 1, accuracy 80.00 %, 10.00 points below the full model
    """  # noqa: E501 (what is printed is one line)
    if not limits:
        raise ValueError("no limit is given; name a size, a latency or a loss of accuracy")
    if not points:
        raise ValueError("there is no point to choose from")
    meeting = [point for point in points if limits.excess(point, full) <= 0]
    if not meeting:
        nearest = min(points, key=lambda point: limits.excess(point, full))
        raise NoSuchPoint(f"no point meets the limits ({limits}); the nearest is {_described(nearest, full)}")
    if limits.accuracy_loss is not None:
        return min(meeting, key=lambda point: (point["bytes"], -point["accuracy"], _loss(point)))
    return min(meeting, key=lambda point: (-point["accuracy"], _loss(point), point["bytes"]))


def _loss(point: Point) -> float:
    return math.inf if point["loss"] is None else point["loss"]


def _described(point: Point, full: Point) -> str:
    difference = lost(point, full)
    latency = "" if point["latency"] is None else f", {point['latency']:.2f} ms at batch 1"
    side = "below" if difference >= 0 else "above"
    return (
        f"{point['plan']}: {point['bytes']:,} bytes{latency}, accuracy {100 * point['accuracy']:.2f} %, "
        f"{abs(difference):.2f} points {side} the full model"
    )


def parse_size(text: str, *, full: int) -> int:
    """A number of bytes: "200000", "200kB", "1.5 MiB"; or a part of the full model: "0.3x".

    Args:
        text: as the user wrote it.
        full: bytes of the full model.

    Raises:
        ValueError: no such size, or not a positive one.

    >>> parse_size("200kB", full=10**6), parse_size("0.3x", full=10**6), parse_size("4096", full=10**6)
    (200000, 300000, 4096)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z×]*)\s*", text)
    unit = match[2].lower() if match else ""
    factor = full if unit in ("x", "×") else _UNITS.get(unit)
    if match is None or factor is None:
        raise ValueError(
            f"max_size is {text!r}; it must be a number of bytes (200000, 200kB, 1.5MiB) or a part of the full model "
            "(0.3x)"
        )
    size = math.floor(float(match[1]) * factor)
    if size < 1:
        raise ValueError(f"max_size is {text!r}, which is less than a byte; it must be positive")
    return size
