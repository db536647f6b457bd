"""Starting the processes of a distributed run, as torchrun would, on this machine."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PRELOADED = ["paradepth.train.use", "paradepth.data.sources", "torch.distributed.fsdp", "sklearn.datasets"]


def _rendezvous(processes: int) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def start(commands: Sequence[Sequence[Any]], **options: Any) -> list[subprocess.Popen[str]]:
    """One process for each list of arguments to Python, rank by rank."""
    environment = os.environ | _rendezvous(len(commands))
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        for rank, command in enumerate(commands)
    ]


def finish(processes: Sequence[subprocess.Popen[str]], timeout: float = 240) -> list[tuple[int, str, str]]:
    """Exit status, standard output and standard error of each; all are killed if one hangs."""
    try:
        ended = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, ended, strict=True)]


def run_together(processes: int, *command: Any, **options: Any) -> list[tuple[int, str, str]]:
    """The same command on some processes."""
    return finish(start([command] * processes, **options))


def fork_together(processes: int, script: Path, *arguments: Any, timeout: float = 240) -> list[tuple[int, str, str]]:
    """What `run_together` does, by processes forked from one that has imported torch and this package: for scripts,
    which cost less than their imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    common, deadline = _rendezvous(processes), time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(processes):
            environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            chosen = (str(script), [str(argument) for argument in arguments], environment, folder)
            started.append(context.Process(target=_run_script, args=chosen))
        try:
            for process in started:
                process.start()
            for process in started:
                process.join(max(deadline - time.monotonic(), 0))
            hanging = [process for process in started if process.exitcode is None]
        finally:
            for process in started:
                process.kill()
                process.join()
        texts = [[Path(folder, f"{stream}{r}").read_text() for stream in ("out", "err")] for r in range(processes)]
    assert not hanging, (f"{len(hanging)} processes did not end", texts)
    return [(process.exitcode or 0, out, err) for process, (out, err) in zip(started, texts, strict=True)]


def _run_script(script: str, arguments: list[str], environment: dict[str, str], folder: str) -> None:
    os.environ.update(environment)
    for descriptor, stream in ((1, "out"), (2, "err")):
        file = os.open(f"{folder}/{stream}{environment['RANK']}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
    sys.path.insert(0, str(Path(script).parent))
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
