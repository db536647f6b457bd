"""The process of a measurement: `python -m paradepth.studies.measure NAME --options '{…}' --seed 0 --run-dir DIR`.

Exit status: 0 measured, 1 failed, 2 refused because of bad input.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paradepth.atomic import write_json
from paradepth.studies.measurements import check_measurement
from paradepth.studies.record import MEASURED, SPENT


def run_measurement(
    name: str,
    *,
    options: Mapping[str, Any],
    seed: int,
    run_dir: Path,
    data_dir: Path | None = None,
    source: Path | None = None,
) -> dict[str, Any]:
    """Measure into `run_dir`, which is emptied first: `environment.json`, then `measured.json`, written last.

    Args:
        name: of the measurement, in `paradepth.studies.measurements`.
        options: its own options.
        seed: the seed.
        run_dir: folder for whatever it writes.
        data_dir: folder with local data sets.
        source: the finished run directory that it starts from.

    Returns:
        What `measured.json` holds: `measures`, `seconds` and, where the measurement gives them, `parameters`, `layers`
        and `layer_evals`.

    Raises:
        ValueError: unknown measurement, or options that it does not take.
        TypeError: a measure that is neither a number nor a list of numbers.
        FloatingPointError: the measurement raised it, or a measure is not finite; `measured.json` then holds
            `diverged`, the message, instead of measures.
    """
    function = check_measurement(name, options)
    import torch  # seconds, and only now is it sure to be needed

    from paradepth.distributed import World
    from paradepth.train.environment import command_line, environment
    from paradepth.train.trainer import NonFiniteLoss

    torch.set_num_threads(1)
    world = World(rank=0, size=1, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    write_json(run_dir / "environment.json", environment(world, autocast=None, command=command_line()))
    start = time.perf_counter()
    try:
        found = function(seed=seed, data_dir=data_dir, run_dir=run_dir, source=source, **options)
        measures = {key: _checked(key, value) for key, value in found.items()}
    except (FloatingPointError, NonFiniteLoss) as error:
        write_json(run_dir / MEASURED, {"diverged": str(error), "seconds": time.perf_counter() - start})
        raise FloatingPointError(str(error)) from error
    spent = {key: measures.pop(key) for key in SPENT if key in measures}
    result = {**spent, "seconds": time.perf_counter() - start, "measures": measures}
    write_json(run_dir / MEASURED, result)
    return result


def _checked(key: str, value: Any) -> float | list[float]:
    values = value if isinstance(value, (list, tuple)) else [value]
    for item in values:
        if isinstance(item, bool) or not isinstance(item, (int, float)):
            raise TypeError(f"measure {key!r} is {item!r}, but must be a number or a list of numbers")
        if not math.isfinite(item):
            raise FloatingPointError(f"{key} is {item}")
    return list(values) if isinstance(value, (list, tuple)) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one measurement; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m paradepth.studies.measure", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--options", default="{}", help="its options, a JSON object")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--source", type=Path, help="the finished run that it starts from")
    chosen = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # what it started ends with it
    try:
        options = json.loads(chosen.options)
        if not isinstance(options, dict):
            raise ValueError(f"options are {chosen.options!r}, but must be a JSON object")
        result = run_measurement(
            chosen.name,
            options=options,
            seed=chosen.seed,
            run_dir=chosen.run_dir,
            data_dir=chosen.data_dir,
            source=chosen.source,
        )
    except ValueError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError, ArithmeticError, TypeError) as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
