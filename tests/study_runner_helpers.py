"""A study runner on a training command in small, for tests of what it starts, keeps and says."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paradepth.studies.runner import Cell, Study, run_study

# A training command in small: `fake.py train|resume RUN BEHAVIOUR SEED`. Like the real one it saves on SIGTERM.
FAKE = r"""
import json, os, pathlib, shutil, signal, sys, time
how, run, behaviour, seed = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
base = run.parent.parent.parent  # the test's folder
with open(base / "calls", "a") as calls:
    calls.write(f"{how} {run.name}\n")
if how == "train":
    shutil.rmtree(run, ignore_errors=True)
(run / "checkpoints").mkdir(parents=True, exist_ok=True)

def event(**values):
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(values) + "\n")

def save_and_end(*_):
    (run / "checkpoints" / "step-00000010").mkdir(exist_ok=True)
    event(event="interrupted", step=10, layer_evals=100.0)
    print("saved", flush=True)
    sys.exit(0)

def wait_for(path):
    deadline = time.monotonic() + 120
    while not path.exists():
        if time.monotonic() > deadline:
            sys.exit(f"{path.name} never came")
        time.sleep(0.01)

signal.signal(signal.SIGTERM, save_and_end)
print("hello from", run.name, flush=True)
if how == "train":
    event(event="start", parameters=1000, layers=4, forward_flops=[5, 6])
    event(event="stage", step=0, layer_evals=0.0, seconds=0.0, active=1, reason="start")
    event(event="validation", step=10, layer_evals=100.0, accuracy=[0.5, 0.5 + seed / 100], loss=[2.0, 2.0])
else:
    event(event="resumed", step=10, layer_evals=100.0)
(base / f"started-{run.name}").touch()
if behaviour == "fail":
    print("the loss is not finite in step 7", flush=True)
    sys.exit(1)
if behaviour == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "refuse resume" and how == "resume":
    print("every checkpoint is damaged", flush=True)
    sys.exit(2)
if behaviour == "diverge":
    (run / "environment.json").write_text(json.dumps({"python": "3.11", "command": f"paradepth train --run-dir {run}"}))
    event(event="diverged", step=12, layer_evals=120.0, flops=2e6, seconds=0.5, loss=None, gradient_norm=None)
    sys.exit(1)
if behaviour.startswith("meet "):
    wait_for(base / f"started-{behaviour[5:]}")
if behaviour == "wait":
    wait_for(base / "go")
event(event="validation", step=20, layer_evals=200.0, accuracy=[0.6, 0.7 + seed / 100], loss=[1.0, 1.0])
if behaviour != "no end":
    event(event="end", step=20, layer_evals=200.0, flops=3e6, seconds=1.5, reason="budget")
environment = {
    "python": "3.11", "cpu": "some cpu", "command": f"paradepth train --run-dir {run}",
    "threads": int(os.environ["OMP_NUM_THREADS"]) * int(os.environ["MKL_NUM_THREADS"]),
}
evaluation = {"accuracy": [0.61, 0.71 + seed / 100], "loss": [1.1, 0.9], "contribution": [0.3, 0.2], "samples": 7}
evaluation |= {"bleu": [30.0, 31.5 - seed], "signatures": {"bleu": "tok:13a"}}
evaluation |= {"class_names": ["a", "b"], "words": ["a", "b"]}
(run / "config.json").write_text("{}")
(run / "environment.json").write_text(json.dumps(environment))
(run / "evaluation.json").write_text(json.dumps(evaluation))
(run / "model.safetensors").touch()
"""


def fake_command(base: Path, how: str, *, forked: bool = False) -> Callable[[Cell, Path], list[str]]:
    """What starts `FAKE` for a cell; `how` is 'train' or 'resume'."""
    script = base / "fake.py"
    script.write_text(FAKE)
    return lambda cell, run: [
        sys.executable,
        *(("-m", "fake") if forked else (str(script),)),  # modules are forked, by a server that runs in `base`
        how,
        str(run),
        str(cell.options.get("behaviour", "ok")),
        str(cell.seed),
    ]


def fake_cell(name: str, *, group: str = "small", label: str | None = None, seed: int = 0, **options: Any) -> Cell:
    """A cell of `fake_study`; its option `behaviour` says what `FAKE` does."""
    return Cell(name=name, group=group, label=label or name, recipe="fake", options=options, seed=seed)


def cell_after(source: Cell, name: str, *, seed: int = 0, **options: Any) -> Cell:
    """A cell that starts from the run of another."""
    return dataclasses.replace(fake_cell(name, label="tuned", seed=seed, **options), after=source)


def fake_study(*cells: Cell, **fields: Any) -> Study:
    """A study of these cells that finds out which is best."""

    def findings(records: list[dict[str, Any]]) -> list[str]:
        best = max(records, key=lambda record: record["accuracy"][-1])
        return [f"{best['label']} is best of {len(records)}."]

    return Study(
        **{"name": "fake", "title": "A fake study", "question": "Does it run?", "findings": findings} | fields,
        cells=cells,
    )


class FakeRunner:
    """`run_study` on the fake command in the test's folder, with what it said and which commands it started."""

    def __init__(self, base: Path) -> None:
        self.base, self.out = base, base / "out"
        self.said: list[str] = []

    def __call__(self, study: Study, **options: Any) -> dict[str, Any]:
        self.said.clear()
        (self.base / "calls").write_text("")
        commands: dict[str, Any] = {
            "command": fake_command(self.base, "train"),
            "resume": fake_command(self.base, "resume"),
        }
        summary = run_study(study, out=self.out, say=self.said.append, **(commands | options))
        assert not (self.out / ".lock").exists()
        return summary

    @property
    def calls(self) -> list[str]:
        return (self.base / "calls").read_text().splitlines()

    def record(self, name: str) -> dict[str, Any]:
        return json.loads((self.out / "cells" / f"{name}.json").read_text())


def quick_runner(base: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRunner:
    """A runner whose reports are a title: plots take a second a time, and where they matter a test draws them."""
    monkeypatch.setattr("paradepth.report.write_study_report", lambda results, out: out.write_text(results["title"]))
    return FakeRunner(base)


def wait_until(condition: Callable[[], object]) -> None:
    """Waits for it, and fails where it does not come."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether the process still runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie waits for nobody here: it is as good as gone.
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
