"""Where an exported file goes, and what came of an export."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paradepth.export.graph import Graph
from paradepth.export.verify import Verification


@dataclass(frozen=True)
class Exported:
    """A file that was exported, and compared with PyTorch.

    Attributes:
        path: the file.
        description: what the file says of itself.
        verification: how it compares with PyTorch.
        graph: what was exported.
    """

    path: Path
    description: dict[str, Any]
    verification: Verification
    graph: Graph = field(repr=False, compare=False)


def check_target(path: str | Path, *, suffix: str, overwrite: bool) -> Path:
    """The place of a new file; its folder is made if missing.

    Raises:
        ValueError: another suffix, a file that exists unless `overwrite`, or a folder that cannot be made.
    """
    path = Path(path).expanduser()
    if path.suffix != suffix:
        raise ValueError(f"output is {path}; the name of such a file ends in {suffix}")
    if path.is_dir():
        raise ValueError(f"output {path} is a folder; name a file")
    if path.exists() and not overwrite:
        raise ValueError(f"output {path} exists; name another file, or overwrite it (--overwrite)")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output {path}: its folder cannot be made: {error}") from error
    return path


def missing_extra(package: str) -> ValueError:
    """What to say where a package of the extra is not installed."""
    return ValueError(f"this needs the package {package}; install it with: pip install 'paradepth[export]'")
