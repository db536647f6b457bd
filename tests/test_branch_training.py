"""Training runs whose branches processes share: schedules, optimisers, resuming elsewhere, lost processes."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from paradepth.cli.use import COMMANDS
from paradepth.train import resume_run, start_run
from paradepth.train.trainer import Interrupted
from paradepth.train.use import evaluate_run
from processes import finish, fork_together, start
from runs import events, tiny_config

DRIVER = Path(__file__).with_name("branch_runs.py")
TWO = {"branch_processes": 2, "timeout": 60.0}
SMALL: dict[str, Any] = {"budget": "12 steps", "validations": 3, "weight_decay": 0.1, "clip": 0.5}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "muon": ("joint", {"optimiser": "muon", "ema": 0.9}),
    "accumulate": ("cycle", {"accumulate": 2, "branch_executor": "batched"}),
    "boosting": ("one_pass", {"aggregate": "sum", "prefix_weights": (1.0, 2.0, 3.0)}),
    "gated": ("one_pass", {"aggregate": "gated", "gate_penalty": 0.2}),
    "frozen": ("stagewise-frozen", {"freeze": ("stem", "head")}),
    "plateau": ("stagewise-plateau", {"optimiser": "sgd", "learning_rate": 0.1}),
}


def work(processes: int, folder: Path, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lets processes do jobs; what every one of them refused or measured."""
    ended = fork_together(processes, DRIVER, folder, json.dumps(jobs))
    for status, _, errors in ended:
        assert status == 0, errors
    said = [[json.loads(line) for line in out.splitlines() if line.startswith("{")] for _, out, _ in ended]
    assert all(part == said[0] for part in said)
    return said[0]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def furthest(a: Path, b: Path) -> float:
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in events(run, "train")]


def job(name: str, **more: Any) -> dict[str, Any]:
    kind, options = RUNS[name]
    return {"run": name, "kind": kind, "options": {**SMALL, **options, **TWO}, **more}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [job(name) for name in RUNS]
    jobs += [job("muon", run="again", stop=5), {"run": "again"}]
    jobs += [job("frozen", run="moved", stop=3)]
    assert work(2, folder, jobs) == []
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_like_one(name: str, two: Path, tmp_path: Path) -> None:
    kind, options = RUNS[name]
    start_run(tiny_config(kind, **SMALL, **options), tmp_path / "one")
    assert losses(two / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert furthest(tmp_path / "one", two / name) < 1e-4
    for mine, theirs in zip(events(two / name, "validation"), events(tmp_path / "one", "validation"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["contribution"] == pytest.approx(theirs["contribution"], rel=1e-3)
    a, b = (events(run, "train")[-1] for run in (two / name, tmp_path / "one"))
    assert (a["layer_evals"], a["flops"]) == (b["layer_evals"], b["flops"])
    assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)
    start = json.loads((two / name / "config.json").read_text())
    assert start["training"]["branch_processes"] == 2


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_on_as_many_processes(two: Path) -> None:
    assert [event["step"] for event in events(two / "again", "resumed")] == [5]
    assert furthest(two / "again", two / "muon") == 0.0
    assert losses(two / "again") == losses(two / "muon")


@pytest.mark.slow
def test_a_run_moves_from_two_processes_to_one_and_to_three(two: Path, tmp_path: Path) -> None:
    kind, options = RUNS["frozen"]
    start_run(tiny_config(kind, **SMALL, **options), tmp_path / "whole")

    def stop_at_7(step: int) -> None:
        if step == 7:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        resume_run(two / "moved", on_batch=stop_at_7)
    picture = tmp_path / "picture.png"
    Image.fromarray(torch.arange(64, dtype=torch.uint8).view(8, 8).numpy()).save(picture)
    jobs = [
        {"run": "moved", "options": {"branch_processes": 2}},
        {"run": "moved"},
        {"run": "moved", "evaluate": True, "options": {"branch_processes": 3, "device": "cpu"}},
        {"run": "moved", "predict": [str(picture), "--branch-processes", "3", "--branches", "2"]},
    ]
    refused, found, predicted = work(3, two, jobs)
    assert "3 processes cannot be cut into rows of 2" in refused["refused"]
    (mine,), (theirs,) = (
        [sample["classes"] for sample in result["predictions"]]
        for result in (predicted, COMMANDS["predict"][0]([str(two / "moved"), str(picture), "--branches", "2"]))
    )
    assert mine[0]["class"] == theirs[0]["class"]
    assert mine[0]["confidence"] == pytest.approx(theirs[0]["confidence"], rel=1e-5)
    alone = evaluate_run(two / "moved", device="cpu")
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert found["accuracy"] == alone["accuracy"]
    assert [event["step"] for event in events(two / "moved", "resumed")] == [3, 7]
    assert losses(two / "moved") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    assert furthest(two / "moved", tmp_path / "whole") < 1e-4


@pytest.mark.slow
def test_data_and_branches_make_a_mesh(tmp_path: Path) -> None:
    options = {**SMALL, "budget": "6 steps", "dropout": 0.0}  # each data rank draws dropout of its own
    start_run(tiny_config("cycle", **options), tmp_path / "one")
    jobs = [{"run": "mesh", "kind": "cycle", "options": {**options, **TWO}}]
    jobs += [{"run": "wide", "kind": "cycle", "options": {**options, "branch_processes": 4}}]
    said = work(4, tmp_path, jobs)
    assert [s["run"] for s in said] == ["wide"]
    assert "4 processes cannot share 3 branches" in said[0]["refused"]
    assert not (tmp_path / "wide").exists()
    assert losses(tmp_path / "mesh") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert furthest(tmp_path / "one", tmp_path / "mesh") < 1e-4


@pytest.mark.slow
def test_when_a_process_dies_the_others_say_so(tmp_path: Path) -> None:
    run = tmp_path / "run"
    chosen = ["--budget", "4000 steps", "--checkpoint-every", "1", "--timeout", "60", "--branch-processes", "2"]
    command = ["-m", "paradepth", "train", "digits_paraformer", "--run-dir", run, "--device", "cpu", *chosen]
    processes = start([command] * 2)
    for _ in range(1200):
        if len(list((run / "checkpoints").glob("step-*"))) >= 2 or processes[0].poll() is not None:
            break
        time.sleep(0.1)
    processes[1].kill()
    (status, _, errors), (killed, _, _) = finish(processes, timeout=90)
    assert (status, killed) == (1, -signal.SIGKILL), errors
    assert "another process of this run stopped" in errors
    assert "paradepth resume" in errors

    def stop_now(step: int) -> None:
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        resume_run(run, on_batch=stop_now)
    assert events(run, "resumed")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"branch_processes": 0}, "branch_processes is 0; it must be at least 1"),
        ({"branch_processes": 2}, "1 processes cannot be cut into rows of 2 that share branches"),
        ({"branch_processes": 2, "depth_processes": 2}, "depth_processes is 2 and branch_processes 2"),
        ({"branch_processes": 1, "model": "vit_nano", "branches": None}, "this model is a serial stack"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        start_run(tiny_config(**options), tmp_path / "run")
    assert not (tmp_path / "run").exists()
