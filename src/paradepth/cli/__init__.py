"""The command line: `paradepth COMMAND …`, or `python -m paradepth COMMAND …` (under torchrun, too).

Every command takes --json: one JSON object on standard output, everything else on standard error.
Exit status: 0 done, 1 failed or interrupted, 2 refused because of bad input.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from paradepth import __version__
from paradepth.cli.parse import is_main_process
from paradepth.cli.show import show

COMMANDS = {
    "train": "train",
    "finetune": "train",
    "resume": "train",
    "compress": "compress",
    "explain": "explain",
    "grow": "grow",
    "convert": "convert",
    "predict": "use",
    "generate": "generate",
    "translate": "translate",
    "export": "export",
    "evaluate": "runs",
    "report": "runs",
    "list": "runs",
    "study": "runs",
    "continual": "continual",
}
"""Commands, and the module of each. A module is imported for its own commands only: what an exported file is used with
needs no package for training."""


def _module(name: str) -> ModuleType:
    return import_module(f"paradepth.cli.{name}")


def _usage() -> str:
    lines = ["usage: paradepth COMMAND …", ""]
    for command, module in COMMANDS.items():
        try:
            about = _module(module).COMMANDS[command][1]
        except ModuleNotFoundError as error:
            about = _missing(error)
        lines.append(f"  {command:10} {about}")
    return "\n".join(lines)


def _missing(error: ModuleNotFoundError) -> str:
    if error.name is None or error.name.split(".")[0] == "paradepth":
        raise error
    return f"needs the package {error.name.split('.')[0]}: pip install 'paradepth[train]'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage() + "\n\n`paradepth COMMAND --help` explains a command.")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    command, *options = arguments
    if command not in COMMANDS:
        print(f"unknown command {command!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    try:
        result = _module(COMMANDS[command]).COMMANDS[command][0](options)
    except ModuleNotFoundError as error:
        print(f"refused: {command} {_missing(error)}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    except SystemExit as stop:
        if stop.code in (None, 0, 2):
            raise
        print(f"stopped: {stop.code}", file=sys.stderr)  # a signal while a study runs
        return 1
    if not is_main_process():
        return 0
    if "--json" in options:
        print(json.dumps(result))
    else:
        show(result)
    return 0
