"""What a person sees while training: a live line on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressView:
    """Shows progress on standard error.

    Args:
        enabled: False prints nothing (processes other than the first).
        title: what is being trained.
    """

    def __init__(self, *, enabled: bool = True, title: str = "") -> None:
        self.console = Console(stderr=True, soft_wrap=True)
        self.enabled = enabled
        self.live = enabled and sys.stderr.isatty()
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:.0f} samples/s"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
        )
        self._task = self._bar.add_task(title, total=1.0, loss=float("nan"), rate=0.0)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, *, progress: float, loss: float, rate: float) -> None:
        """Moves the live line."""
        if self.live:
            self._bar.update(self._task, completed=progress, loss=loss, rate=rate)

    def say(self, text: str) -> None:
        """Prints a line."""
        if self.enabled:
            self.console.print(text, highlight=False, markup=False)

    def validation(self, *, progress: float, active: int, accuracy: list[float], loss: list[float]) -> None:
        """Prints the result of a validation."""
        by_prefix = "  ".join(f"{100 * a:.2f}" for a in accuracy[:active])
        self.say(f"{100 * progress:5.1f} %   validation loss {loss[active - 1]:.4f}   accuracy by prefix: {by_prefix}")
