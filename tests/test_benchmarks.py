"""Every benchmark script runs and writes what its README's table is made from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


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
