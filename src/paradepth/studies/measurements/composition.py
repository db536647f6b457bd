"""Do four processes, two that share the model and two that share the batch, learn what one process learns?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

_COMMON = ["--budget", "{steps} steps", "--batch-size", "32", "--optimiser", "sgd", "--learning-rate", "0.05"]
_COMMON += ["--ema", "0", "--validations", "1", "--warmup", "0", "--threads", "1", "--precision", "float32"]
_SIZE = ["--width", "16", "--heads", "2", "--mlp", "32", "--patch-size", "4"]
_MODELS: dict[str, list[str]] = {
    "layers": ["--model", "vit_nano", "--depth", "8", "--schedule", "joint", "--step", "0.125", "--executor", "mgrit"],
    "branches": ["--branches", "4", "--depth", "2", "--schedule", "one_pass"],
}
_MODELS["layers"] += ["--levels", "2", "--coarsening", "2", "--forward-iterations", "1", "--backward-iterations", "1"]
_SHARED = {"layers": ["--depth-processes", "2"], "branches": ["--branch-processes", "2"]}


def measure(
    *,
    seed: int,
    data_dir: Path | None,
    run_dir: Path,
    source: Path | None,
    shared: Literal["layers", "branches"],
    steps: int = 8,
) -> dict[str, float | list[float]]:
    """Trains the embedded digits for some steps on one process and on a mesh of 2 (data) × 2 (layers or branches).

    Args:
        seed: of both runs.
        data_dir: not needed.
        run_dir: gets both run directories.
        source: not needed.
        shared: what two processes share: the layers of a stack that MGRIT solves, or branches.
        steps: of training.

    Returns:
        `difference`: the largest difference of a weight between the two, as a part of the largest change of a weight
        in training; `test_difference`: of the test accuracies.

    Raises:
        ValueError: anything else to share.
        RuntimeError: a run failed; the message has the end of its output.
    """
    from safetensors.torch import load_file

    if shared not in _MODELS:
        raise ValueError(f"shared is {shared!r}, but must be one of {', '.join(_MODELS)}")
    words = [word.format(steps=steps) for word in [*_COMMON, *_SIZE, *_MODELS[shared], "--seed", str(seed)]]
    start = ["-m", "paradepth", "train", "digits_paraformer", *words, "--overwrite", "--no-report", "--json"]
    mesh = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", *start, *_SHARED[shared]]
    _run([*start, "--run-dir", str(run_dir / "one")])
    _run([*mesh, "--run-dir", str(run_dir / "four")])
    fresh = [*start, "--run-dir", str(run_dir / "start"), "--learning-rate", "1e-30"]
    _run(fresh)
    one, four, before = (load_file(run_dir / name / "model.safetensors") for name in ("one", "four", "start"))
    change = max(float((one[name] - before[name]).abs().max()) for name in one)
    difference = max(float((one[name] - four[name]).abs().max()) for name in one)
    tests = [_accuracy(run_dir / name) for name in ("one", "four")]
    return {"difference": difference / change, "test_difference": abs(tests[0] - tests[1])}


def _accuracy(run: Path) -> float:
    evaluation: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
    return evaluation["accuracy"][-1]


def _run(arguments: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,  # torchrun's processes end with it
    )
    try:
        output, _ = process.communicate()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}:\n{output[-2000:]}")
