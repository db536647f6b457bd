"""The command line: `paradepth COMMAND …`, or `python -m paradepth COMMAND …` (under torchrun, too).

Every command takes --json: one JSON object on standard output, everything else on standard error.
Exit status: 0 done, 1 failed or interrupted, 2 refused because of bad input.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from paradepth import __version__
from paradepth.cli import generate, runs, train, translate, use
from paradepth.cli.parse import Commands, is_main_process
from paradepth.cli.show import show

COMMANDS: Commands = {**train.COMMANDS, **use.COMMANDS, **generate.COMMANDS, **translate.COMMANDS, **runs.COMMANDS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    usage = "usage: paradepth COMMAND …\n\n" + "\n".join(f"  {n:10} {about}" for n, (_, about) in COMMANDS.items())
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage + "\n\n`paradepth COMMAND --help` explains a command.")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    command, *options = arguments
    if command not in COMMANDS:
        print(f"unknown command {command!r}\n\n{usage}", file=sys.stderr)
        return 2
    try:
        result = COMMANDS[command][0](options)
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
