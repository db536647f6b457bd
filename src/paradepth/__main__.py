"""Run the command line with `python -m paradepth`; under `torchrun`, with `torchrun -m paradepth`."""

from __future__ import annotations

import sys

from paradepth.cli import main

if __name__ == "__main__":
    sys.exit(main())
