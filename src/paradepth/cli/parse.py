"""What the commands share: parsing of options, and the report that ends a run."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

Command = Callable[[Sequence[str]], dict[str, Any]]
Commands = dict[str, tuple[Command, str]]
"""Commands by name, each with a line of help."""

FLAT = tyro.conf.OmitArgPrefixes


def parse(cls: type, options: Sequence[str], name: str, *, default: Any = None, about: str | None = None) -> Any:
    """Parses a command's options; what is wrong is printed by tyro, with exit status 2."""
    annotated: Any = Annotated[cls, tyro.conf.arg(name="")]
    extra = {} if default is None else {"default": default}
    return tyro.cli(
        cls if default is None else annotated,
        args=list(options),
        prog=f"paradepth {name}",
        description=about or inspect.getdoc(cls),
        console_outputs=True,
        **extra,
    )


def first_line(function: Callable[..., Any]) -> str:
    """The first line of its docstring."""
    return (inspect.getdoc(function) or "").splitlines()[0]


def is_main_process() -> bool:
    """Whether this process is the one that speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0  # torchrun numbers its processes


def with_report(result: dict[str, Any], *, wanted: bool = True) -> dict[str, Any]:
    """Writes the report of a finished run, where one is wanted, and adds its place to the result."""
    if wanted and is_main_process():
        from paradepth.report import write_report  # matplotlib

        result["report"] = str(write_report([Path(result["run"])]))
    return result
