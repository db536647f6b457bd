"""The metrics log of a run: one JSON object a line, and TensorBoard when asked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends events to `metrics.jsonl`; optionally mirrors their numbers to TensorBoard.

    Args:
        folder: the run directory.
        tensorboard: also write TensorBoard event files.
        position: size in bytes to continue from (what is behind it is dropped: a resumed run writes it again); None
            starts afresh.

    Raises:
        ValueError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False, position: int | None = None) -> None:
        self.path = folder / "metrics.jsonl"
        self._file = open(self.path, "ab" if position is not None else "wb")  # noqa: SIM115 (closed by close)
        if position is not None:
            self._file.truncate(min(position, self.path.stat().st_size))
        self._board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError("tensorboard is asked for but not installed; pip install tensorboard") from error
            self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, event: str, **values: Any) -> None:
        """Appends one event; a number that is not finite becomes null."""
        self._file.write(json.dumps({"event": event, **_finite(values)}, allow_nan=False).encode() + b"\n")
        self._file.flush()
        if self._board is not None and "step" in values:
            for name, value in values.items():
                numbers = value if isinstance(value, list) else [value]
                for index, number in enumerate(numbers, start=1):
                    if isinstance(number, int | float) and name != "step":
                        tag = f"{event}/{name}" + (f"/{index}" if isinstance(value, list) else "")
                        self._board.add_scalar(tag, number, values["step"])

    def position(self) -> int:
        """Bytes written so far, safely on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


class SilentLog:
    """Stands for the log on processes that do not write one."""

    def write(self, event: str, **values: Any) -> None:
        """Does nothing."""

    def position(self) -> int:
        """0."""
        return 0

    def close(self) -> None:
        """Does nothing."""


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value
