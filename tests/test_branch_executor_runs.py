"""Training, resuming, evaluating and predicting with a branch executor."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from commands import answer
from paradepth.branches import auto
from paradepth.cli import main
from paradepth.distributed import World
from paradepth.train import Config, Interrupted, resume_run, start_run
from paradepth.train.run import _check_branch_executor
from runs import events, tiny_config

SHORT: dict[str, Any] = {"budget": "12 steps", "validations": 3}


@pytest.mark.parametrize(("name", "kind", "threads"), [("batched", "stagewise-frozen", 1), ("threads", "joint", 2)])
def test_a_run_is_that_of_the_loop_up_to_rounding(name: str, kind: str, threads: int, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    options = {**SHORT, "ema": 0.5, "budget": "12 steps" if threads == 1 else "2 steps"}
    start_run(tiny_config(kind, **options), tmp_path / "loop")
    start_run(tiny_config(kind, branch_executor=name, **{**options, "threads": threads}), tmp_path / name)
    torch.set_num_threads(before)
    for event in ("train", "validation"):
        for own, loop in zip(events(tmp_path / name, event), events(tmp_path / "loop", event), strict=True):
            assert own["loss"] == pytest.approx(loop["loss"], rel=1e-3)
    config = json.loads((tmp_path / name / "config.json").read_text())
    assert config["training"]["branch_executor"] == name


def test_a_resumed_run_keeps_what_auto_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock favours the executors by turns, run by run: without the stored choices the resumed run would differ."""
    favourite, measured = "batched", []

    def clock(name: str, run: Callable[[], Any]) -> float:
        measured.append(name)
        return 1.0 if name == favourite else 2.0

    monkeypatch.setattr(auto, "_seconds", clock)
    config = tiny_config("one_pass", branch_executor="auto", ema=0.5, **SHORT)
    start_run(config, tmp_path / "whole")

    def interrupt(step: int) -> None:
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        start_run(config, tmp_path / "cut", on_batch=interrupt)
    favourite = "loop"
    measured.clear()
    resume_run(tmp_path / "cut")
    assert not measured
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert events(tmp_path / "whole", "validation") == events(tmp_path / "cut", "validation")


def test_evaluate_and_predict_take_an_executor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_run(tiny_config(**SHORT), tmp_path / "run")
    found = []
    for name in ("loop", "batched", "threads", "auto"):
        found.append(answer(capsys, "evaluate", tmp_path / "run", "--branch-executor", name))
    assert [result["loss"] for result in found[1:]] == [pytest.approx(found[0]["loss"], rel=1e-5)] * 3
    from PIL import Image

    Image.new("L", (8, 8), 200).save(tmp_path / "a.png")
    for name in ("loop", "batched"):
        assert main(["predict", str(tmp_path / "run"), str(tmp_path / "a.png"), "--branch-executor", name]) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "vit_nano", "branches": None, "branch_executor": "batched"}, "serial stack"),
        ({"branch_executor": "vmap"}, "must be one of loop, batched"),
        ({"branch_executor": "threads", "compile": True}, "compile does not go"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        start_run(tiny_config(**options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_several_processes_and_gpus_have_executors_of_their_own() -> None:
    two = World(0, 2, torch.device("cpu"))
    with pytest.raises(ValueError, match="chooses for one process"):
        _check_branch_executor(Config().replace(branch_executor="auto"), two)
    _check_branch_executor(Config().replace(branch_executor="batched"), two)
    with pytest.raises(ValueError, match="is for CPUs"):
        _check_branch_executor(Config().replace(branch_executor="threads"), World(0, 1, torch.device("cuda")))


def test_evaluating_a_serial_run_with_a_branch_executor_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start_run(tiny_config(model="vit_nano", branches=None, **SHORT), tmp_path / "run")
    assert main(["evaluate", str(tmp_path / "run"), "--branch-executor", "batched"]) == 2
    assert "serial stack" in capsys.readouterr().err
