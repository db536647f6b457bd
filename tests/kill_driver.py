"""Trains, kills the training process with SIGKILL at random points, resumes, and prints what came out as JSON.

usage: kill_driver.py FOLDER SCHEDULE KILLS SEED

Every run is a forked child of this process, which has imported everything and computed nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from paradepth.train import resume_run, start_run
from paradepth.train.checkpoint import CheckpointStore
from runs import events, tiny_config


def child(folder: Path, schedule: str, *, resume: bool, kill_at: int | None, pause: float) -> int:
    """Runs in a forked process; returns the signal that ended it (0: it finished)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):

                def report(step: int) -> None:
                    os.write(writer, step.to_bytes(4, "little"))

                if resume:
                    resume_run(folder, on_batch=report)
                else:
                    options = {"checkpoint_every": 3, "keep": 2, "ema": 0.9, "accumulate": 2}
                    start_run(tiny_config(schedule, **options), folder, overwrite=True, on_batch=report)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    while kill_at is not None and (data := os.read(reader, 4)):
        if int.from_bytes(data, "little") >= kill_at:
            time.sleep(pause)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            break
    _, status = os.waitpid(pid, 0)
    os.close(reader)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"a run failed with status {os.WEXITSTATUS(status)}")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def summary(folder: Path) -> dict[str, object]:
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return {"weights": weights, "validation": events(folder, "validation"), "stage": events(folder, "stage")}


def main() -> None:
    base, schedule, kills, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    draw = random.Random(seed)
    child(base / "whole", schedule, resume=False, kill_at=None, pause=0.0)
    hit, started = [], False
    while len(hit) < kills:
        # Steps left after the last checkpoint; a later kill must lie behind it for the run to get anywhere.
        done = max(CheckpointStore(base / "killed" / "checkpoints").steps(), default=0) if started else 0
        step = draw.randint(done + 1, min(done + 8, 23)) if done < 23 else 23
        ended = child(base / "killed", schedule, resume=started, kill_at=step, pause=draw.uniform(0, 0.03))
        if ended == 0:
            break  # the kill came too late: the run had finished
        hit.append(step)
        started = True
    if not (base / "killed" / "model.safetensors").exists():
        child(base / "killed", schedule, resume=started, kill_at=None, pause=0.0)
    print(json.dumps({"kills": hit, "whole": summary(base / "whole"), "killed": summary(base / "killed")}))


if __name__ == "__main__":
    main()
