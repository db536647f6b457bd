"""The benchmark of two devices runs on two processes and writes what its README's tables are made from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from processes import run_together

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "devices" / "run.py"
STATE_BYTES = 4 * 64 * 4  # of one image: 4 tokens of width 64 in float32
LAYERS = 4


def test_devices_benchmark_writes_a_complete_result(tmp_path: Path) -> None:
    out, markdown = tmp_path / "result.json", tmp_path / "table.md"
    options = ["--size", "smoke", "--rounds", "2", "--device", "cpu", "--out", out, "--markdown", markdown]
    for status, _, errors in run_together(2, SCRIPT, *options, cwd=tmp_path):
        assert status == 0, errors
    result = json.loads(out.read_text())
    assert result["environment"]["world_size"] == 2
    assert result["environment"]["threads"] == 1
    assert set(result["left_out"]) <= {f for f in result["left_out"] if "fairscale" in f or "torchgpipe" in f}

    rows = result["results"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    assert len(cases) == 5
    for case in cases:
        here = [row for row in rows if row["case"] == case]
        families = {row["family"] for row in here}
        must = {"one device", "pipeline (torch.distributed.pipelining)", "tensor parallel (DTensor)"}
        must |= {"branch-parallel, loop", "branch-parallel, batched"}
        must |= {"data parallel (DDP)"} if here[0]["batch"] > 1 else set()
        assert must <= families
        assert sum(row["is_best_peer"] for row in here) == 1
        if here[0]["training"]:
            assert {row["detail"].split(",")[0] for row in here if "torch.distributed" in row["family"]} == {
                "GPipe",
                "1F1B",
            }
        for row in here:
            check_row(row)
    memory = {(row["network"], row["family"]): row for row in result["memory"]}
    ours, alone = memory["2×2", "branch-parallel, loop"], memory["1×4", "one device"]
    assert max(ours["parameter_bytes"]) < alone["parameter_bytes"][0]
    assert alone["parameter_bytes"][1] == 0

    text = markdown.read_text()
    assert text.count("### ") == 6
    assert "peer wins" in text
    assert "The target" in text


def check_row(row: dict) -> None:
    time = row["milliseconds"]
    assert 0 < time["lower_quartile"] <= time["median"] <= time["upper_quartile"]
    assert row["difference"] <= 1e-4
    state, sent, payload = row["batch"] * STATE_BYTES, row["sent_bytes"], row["payload_bytes"]
    if row["branches"]:
        assert row["library_bytes"] == payload if not row["training"] else max(row["library_bytes"]) == 2 * state
    expected = {
        ("branch-parallel, loop", False): [state, state],
        ("tensor parallel (DTensor)", False): [2 * LAYERS * state] * 2,
        ("tensor parallel (DTensor)", True): [4 * LAYERS * state] * 2,
        ("pipeline (torch.distributed.pipelining)", False): [state, 0],
        ("pipeline (torch.distributed.pipelining)", True): [state, state],
        ("data parallel (DDP)", False): [0, 0],
        ("one device", True): [0, 0],
    }
    assert payload == expected.get((row["family"], row["training"]), payload)
    if sent is not None and "AsyncPipe" not in row["family"]:  # whose messages need not be sockets'
        for counted, least in zip(sent, payload, strict=True):
            assert least <= counted <= 1.1 * least + 8192  # each message has a header


@pytest.mark.parametrize("options", [["--rounds", "0"], ["--cases", "9"], ["--heads", "0"], []])
def test_devices_benchmark_refuses_what_cannot_be_measured(options: list[str]) -> None:
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (options[0] if options else "torchrun") in done.stderr
