"""One process of training runs that share branches; run by test_branch_training.py on 2 to 4 processes.

Arguments: a folder for the runs and a JSON list of jobs, each of which is `start_run`, `resume_run` or `evaluate_run`
with its options, or what follows `paradepth predict RUN`; and maybe a step at which one process is asked to stop. What
was refused, measured or predicted goes to standard output.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from paradepth.cli.use import COMMANDS
from paradepth.distributed import join_world
from paradepth.train import resume_run, start_run
from paradepth.train.trainer import Interrupted
from paradepth.train.use import evaluate_run
from runs import tiny_config

RANK = int(os.environ.get("RANK", "0"))


def stop_at(stop: int | None, rank: int) -> Callable[[int], None]:
    def on_batch(step: int) -> None:
        if step == stop and rank == RANK:
            signal.raise_signal(signal.SIGTERM)

    return on_batch


def work(folder: Path, job: dict[str, Any]) -> None:
    on_batch = stop_at(job.get("stop"), job.get("by", 1))
    try:
        if job.get("evaluate"):
            found = evaluate_run(folder / job["run"], **job["options"])
            print(json.dumps({"run": job["run"], "loss": found["loss"], "accuracy": found["accuracy"]}))
        elif job.get("predict"):
            command = [str(folder / job["run"]), *job["predict"]]
            print(json.dumps(COMMANDS["predict"][0](command)))
        elif "kind" in job:
            start_run(tiny_config(job["kind"], **job["options"]), folder / job["run"], on_batch=on_batch)
        else:
            resume_run(folder / job["run"], on_batch=on_batch, **job.get("options", {}))
    except Interrupted:
        assert job.get("stop")
    except ValueError as error:
        print(json.dumps({"run": job["run"], "refused": str(error)}))


def main() -> None:
    torch.set_num_threads(1)
    with join_world("cpu", timeout=60):  # kept open from run to run
        for job in json.loads(sys.argv[2]):
            work(Path(sys.argv[1]), job)


if __name__ == "__main__":
    main()
