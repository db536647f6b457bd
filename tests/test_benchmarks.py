"""Every benchmark script runs and writes what its README's table is made from."""

from __future__ import annotations

import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paradepth.depth import Stack

ROOT = Path(__file__).resolve().parents[1]
COARSE_OPERATORS = ROOT / "benchmarks" / "coarse_operators"


def test_train_step_benchmark_writes_a_complete_result(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    script = ROOT / "benchmarks" / "train_step" / "run.py"
    command = [sys.executable, script, "--sizes", "smoke", "--rounds", "1", "--threads", "1", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())

    assert result["environment"]["threads"] == 1
    assert {"cpu", "flags", "torch", "bf16_units", "command"} <= set(result["environment"])
    rows = {(row["model"], row["precision"]): row for row in result["results"]}
    assert set(rows) == {(m, p) for m in ("PyTorch ViT-8", "ViT-8", "PF 4x2") for p in ("float32", "bf16")}
    assert len({row["parameters"] for row in rows.values()}) == 1
    for row in rows.values():
        speed = row["samples_per_second"]
        assert 0 < speed["lower_quartile"] <= speed["median"] <= speed["upper_quartile"]
    assert rows["PyTorch ViT-8", "bf16"]["over_pytorch"]["median"] == 1.0
    assert done.stdout.count("\n| 8x8x1") == 6


@pytest.mark.parametrize("options", [["--rounds", "0"], ["--clock", "cpu", "--threads", "2"]])
def test_train_step_benchmark_refuses_what_cannot_be_measured(tmp_path: Path, options: list[str]) -> None:
    script = ROOT / "benchmarks" / "train_step" / "run.py"
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert options[0] in done.stderr


def test_branch_latency_benchmark_measures_every_variant(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    script = ROOT / "benchmarks" / "branch_latency" / "run.py"
    options = ["--size", "smoke", "--batches", "1", "2", "--threads", "2", "--rounds", "2", "--no-compile"]
    done = subprocess.run(
        [sys.executable, script, *options, "--out", out], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["results"]
    ways = {("1×4", way) for way in ("eager", "nn.TransformerEncoder")}
    ways |= {("4×1", way) for way in ("loop", "batched", "threads", "auto")}
    onnx = {("1×4", "onnxruntime, sequential"), ("4×1", "onnxruntime, sequential"), ("4×1", "onnxruntime, parallel")}
    for batch, (precision, expected) in itertools.product((1, 2), {"float32": ways | onnx, "bf16": ways}.items()):
        here = [row for row in rows if (row["batch"], row["precision"]) == (batch, precision)]
        assert {(row["shape"], row["way"]) for row in here} == expected
        assert len(here) == len(expected)
        assert min(row["milliseconds"]["median"] for row in here) > 0
        (best,) = {row["best_serial"] for row in here}
        assert next(row for row in here if row["way"] == best)["over_best_serial"]["median"] == 1.0
    assert done.stdout.count("\n| 1×4 |") == 5


def test_branch_latency_benchmark_measures_some_ways_only(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    script = ROOT / "benchmarks" / "branch_latency" / "run.py"
    options = ["--size", "smoke", "--batches", "1", "--threads", "1", "--rounds", "1", "--precisions", "float32"]
    command = [sys.executable, script, *options, "--out", out, "--ways"]
    done = subprocess.run([*command, "compiled"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["results"]
    assert [(row["shape"], row["way"]) for row in rows] == [("1×4", "compiled"), ("4×1", "compiled")]
    done = subprocess.run([*command, "loop"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "['loop']" in done.stderr


def coarse_operators(*options: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    shape = ["--layers", "8", "--width", "8", "--heads", "2", "--context", "8", "--batch", "2", "--passages", "2"]
    command = [sys.executable, COARSE_OPERATORS / "run.py", *shape, "--cache", cwd / "weights", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.fixture(scope="module")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "small.txt"
    path.write_text("To be, or not to be, that is the question.\n" * 40)
    return path


def test_coarse_operators_benchmark_writes_results_tables_and_plots(tmp_path: Path, small_text: Path) -> None:
    out = tmp_path / "result.json"
    grid = ["--training", "0", "2", "--coarsening", "2"]
    done = coarse_operators("--text", small_text, *grid, "--processes", "2", "--out", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["settings"]["layers"] == 8
    assert "/" not in result["settings"]["text"]

    rows = result["results"]
    keys = ("h", "training", "coarsening", "coarse", "relaxation")
    assert len({tuple(row[key] for key in keys) for row in rows}) == len(rows) == 2 * 2 * 3 * 2
    for row in rows:
        gradients = {(g["forward"], g["backward"]): g for g in row["gradients"]}
        states = {s["iterations"]: s for s in row["states"]}
        reach = 2 if row["relaxation"] == "FCF" else 1
        for k in (0, 1, 2, 3):
            if reach * k >= 3:  # all C-points have been reached by exact steps
                assert states[k]["error"] < 1e-12
                assert states[k]["chain"] == 8
        if row["relaxation"] == "FCF":
            assert gradients[2, 2]["cosine"] == gradients[2, 2]["norm"] == 1.0
            assert gradients[2, 2]["error"] < 1e-10
        for (forward, backward), gradient in gradients.items():
            if forward == "serial":
                assert gradient["forward_cost"] == {"evaluations": 8, "chain": 8}
            if backward == "serial":
                assert gradient["backward_cost"] == {"evaluations": 8, "chain": 8}
    assert done.stdout.count("### ") == 7
    assert done.stdout.count("| h = 1, 2 steps | 2 | FCF |") == 4

    drawn = subprocess.run([sys.executable, COARSE_OPERATORS / "plot.py", out], capture_output=True, text=True)
    assert drawn.returncode == 0, drawn.stderr
    assert {path.name for path in tmp_path.glob("*.svg")} == {"states.svg", "gradients.svg"}

    again = coarse_operators(
        "--text", small_text, *grid, "--steps", "1", "--out", tmp_path / "again.json", cwd=tmp_path
    )
    assert "step 0" in done.stderr
    assert "step 0" not in again.stderr  # the weights were found
    assert json.loads((tmp_path / "again.json").read_text())["results"] == rows[12:]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--coarsening", "3"], "--coarsening 3 does not cut 8 layers"),
        (["--buffers", "4"], "--buffers 4 at either end do not fit 8 layers"),
        (["--training", "-1"], "--training is [-1]"),
    ],
)
def test_coarse_operators_benchmark_refuses_what_cannot_be_measured(
    tmp_path: Path, small_text: Path, options: list[str], words: str
) -> None:
    done = coarse_operators("--text", small_text, *options, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr


def test_coarse_operators_benchmark_says_that_the_text_is_missing(tmp_path: Path) -> None:
    done = coarse_operators("--text", "nowhere.txt", "--coarsening", "2", cwd=tmp_path)
    assert done.returncode == 1
    assert "nowhere.txt" in done.stderr
    assert "Traceback" not in done.stderr


class Timed(Tensor):
    """A tensor that knows how many layer evaluations it waited for."""

    waited = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, Timed):
            tensors = [x for arg in args for x in (arg if isinstance(arg, list | tuple) else [arg])]
            result.waited = max((x.waited for x in tensors if isinstance(x, Timed)), default=0)
        return result


class TimedLayer(nn.Module):
    def residual(self, x: Timed) -> Tensor:
        result = torch.tanh(x)
        result.waited = x.waited + 1  # pyright: ignore[reportAttributeAccessIssue]
        return result

    def forward(self, x: Timed, *, step: float = 1.0) -> Tensor:
        return x + step * self.residual(x)


@pytest.mark.parametrize(("layers", "c"), [(8, 2), (24, 4), (32, 8)])
def test_sequential_depth_is_the_longest_chain_that_the_executor_waits_for(
    monkeypatch: pytest.MonkeyPatch, layers: int, c: int
) -> None:
    monkeypatch.syspath_prepend(str(COARSE_OPERATORS))
    monkeypatch.delitem(sys.modules, "run", raising=False)
    run = importlib.import_module("run")
    assert Path(str(run.__file__)).parent == COARSE_OPERATORS
    stack = Stack([TimedLayer() for _ in range(layers)])
    x = torch.randn(2, 3).as_subclass(Timed)
    for coarse in ("sample", "branch", "half", "branch:3"):
        for relaxation in ("F", "FCF"):
            setting = run.Setting(c, coarse, relaxation)
            executor = setting.executor()
            for executor.forward_iterations in (0, 1, 2, 3, "serial"):
                with torch.no_grad():
                    waited = stack(x, executor=executor).waited
                assert waited == run.chain(setting, layers=layers, iterations=executor.forward_iterations)
