"""The benchmark of MGRIT on one device runs in its CPU form and writes what its README's table is made from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "single_device_mgrit" / "run.py"


def run(*options: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, "--size", "smoke", "--device", "cpu", "--no-compile", "--threads", "1", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_every_variant_is_measured_beside_its_gradient(tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "result.json"
    text.write_text("To be, or not to be, that is the question.\n" * 20)
    options = ["--text", text, "--train-steps", "2", "--iterations", "0", "2", "--steps", "0.125", "1", "--rounds", "2"]
    done = run(*options, "--out", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["environment"]["device"] == "cpu"
    assert len(result["results"]) == 2 * 10
    for step in (1 / 8, 1.0):
        rows = {row["way"]: row for row in result["results"] if row["step"] == step}
        assert len(rows) == 10
        assert rows["serial"]["cosine"] == pytest.approx(1.0)
        assert rows["serial"]["over_best_serial"]["median"] == 1.0
        assert rows["serial"]["sequential"] == [8, 8]
        for row in rows.values():
            assert row["milliseconds"]["median"] > 0
            if (row.get("forward_iterations"), row.get("relaxation")) == (2, "FCF"):  # four intervals: exact
                assert row["cosine"] == pytest.approx(1.0, abs=1e-5)
                assert row["relative_norm"] == pytest.approx(1.0, abs=1e-3)
        batched, one_by_one = (
            rows["MGRIT branch, c = 2, F 0/0"],
            rows["MGRIT branch, c = 2, F 0/0, layers one by one"],
        )
        assert batched["cosine"] == pytest.approx(one_by_one["cosine"], abs=1e-5)
        assert batched["evaluations"] == one_by_one["evaluations"] == one_by_one["sequential"]
        assert max(batched["sequential"]) < min(one_by_one["sequential"])
    assert done.stdout.count("| serial |") == 2
    assert "fastest at a cosine of 0.999: MGRIT" in done.stdout


@pytest.mark.parametrize("options", [["--iterations", "-1"], ["--device", "cuda"]])
def test_what_cannot_be_measured_is_refused(tmp_path: Path, options: list[str]) -> None:
    if options[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has one")
    done = run(*options, cwd=tmp_path)
    assert done.returncode == 2
    assert options[0] in done.stderr
