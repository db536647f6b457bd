"""Layer-parallel training runs: executors, processes, the controller, resuming elsewhere, lost processes."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from paradepth.recipes import get_recipe
from paradepth.train import Config, resume_run, start_run
from paradepth.train.config import DepthOptions
from paradepth.train.depth import build_executor
from paradepth.train.trainer import Interrupted
from processes import finish, run_together, start
from runs import events

CONVERGED = {"executor": "mgrit", "coarsening": 2, "forward_iterations": 3, "backward_iterations": 3}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["depth", "branch", "layer", "stack", "the", "of", "solves", "reads"]
    draw = torch.Generator().manual_seed(0)
    path.write_text(" ".join(words[i] for i in torch.randint(8, (6000,), generator=draw).tolist()))
    return path


def options(text: Path, **more: Any) -> dict[str, Any]:
    """A GPT of 8 layers, two of them buffers, for 8 steps."""
    chosen: dict[str, Any] = {
        "model": "gpt_nano",
        "data": "text",
        "data_dir": text,
        "depth": 8,
        "buffers": (1, 1),
        "step": 0.25,
        "context": 16,
        "dropout": 0.1,
        "batch_size": 8,
        "budget": "8 steps",
        "validations": 2,
        "clip": 0.5,
        "weight_decay": 0.1,
        "precision": "float32",
        "device": "cpu",
        "threads": 1,
        "timeout": 60.0,
        **more,
    }
    return chosen


def flags(values: dict[str, Any]) -> list[str]:
    """The same options for the command line."""
    found: list[str] = []
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            found.append(flag if value else f"--no-{name.replace('_', '-')}")
        else:
            found += [flag, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return found


def command(run: Path, values: dict[str, Any]) -> list[Any]:
    left = {name: value for name, value in values.items() if name != "model"}
    return ["-m", "paradepth", "train", "shakespeare_gpt", "--run-dir", run, "--model", values["model"], *flags(left)]


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in events(run, "train")]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def base(text: Path, **more: Any) -> Config:
    return get_recipe("shakespeare_gpt").replace(**options(text, **more))


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.slow
def test_every_executor_that_converges_trains_like_serial(text: Path, tmp_path: Path) -> None:
    start_run(base(text), tmp_path / "serial")
    for name, more in {
        "mgrit": CONVERGED,
        "keep": {**CONVERGED, "recompute": False, "coarse": "half", "relaxation": "FCF"},
        "batched": {**CONVERGED, "coarse": "branch", "batched": True},
        "picard": {"executor": "picard", "forward_iterations": 6, "backward_iterations": 6},
        "checkpoint": {"checkpoint_layers": True},
        "mixed": {**CONVERGED, "forward_iterations": "serial"},
    }.items():
        start_run(base(text, **more), tmp_path / name)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "serial"), rel=1e-5), name
    for told in events(tmp_path / "batched", "train"):
        assert all(0 < a < b for a, b in zip(told["sequential"], told["evaluations"], strict=True))
    short = {**CONVERGED, "forward_iterations": 0, "backward_iterations": 0}
    start_run(base(text, **short), tmp_path / "short")
    assert losses(tmp_path / "short") != pytest.approx(losses(tmp_path / "serial"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("more", [CONVERGED, {"depth_processes": 2}], ids=["mgrit", "serial"])
def test_two_processes_train_like_one(text: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    one = {name: value for name, value in more.items() if name != "depth_processes"}
    start_run(base(text, ema=0.9, **one), tmp_path / "one")
    for status, _, errors in run_together(2, *command(tmp_path / "two", options(text, ema=0.9, **more))):
        assert status == 0, errors
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert furthest(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-4
    evaluations = [json.loads((tmp_path / run / "evaluation.json").read_text())["loss"] for run in ("one", "two")]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-4)


@pytest.mark.slow
def test_data_and_depth_make_a_mesh(text: Path, tmp_path: Path) -> None:
    chosen = {**CONVERGED, "dropout": 0.0, "budget": "4 steps"}  # each data rank draws dropout of its own
    start_run(base(text, **chosen), tmp_path / "one")
    mesh = options(text, **chosen, depth_processes=2)
    for status, _, errors in run_together(4, *command(tmp_path / "mesh", mesh)):
        assert status == 0, errors
    assert losses(tmp_path / "mesh") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert furthest(weights(tmp_path / "one"), weights(tmp_path / "mesh")) < 1e-4


@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_processes(text: Path, tmp_path: Path) -> None:
    chosen = {**CONVERGED, "checkpoint_every": 2}
    start_run(base(text, **chosen), tmp_path / "whole")

    def stop_at_4(step: int) -> None:
        if step == 4:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        start_run(base(text, **chosen), tmp_path / "moved", on_batch=stop_at_4)
    resume = ["-m", "paradepth", "resume", tmp_path / "moved"]
    for status, _, errors in run_together(2, *resume):
        assert status == 0, errors
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert furthest(weights(tmp_path / "whole"), weights(tmp_path / "moved")) < 1e-4


@pytest.mark.slow
def test_when_a_process_dies_the_others_say_so_and_the_run_resumes_on_one(text: Path, tmp_path: Path) -> None:
    chosen = {**CONVERGED, "checkpoint_every": 1, "budget": "400 steps"}
    run = tmp_path / "run"
    processes = start([command(run, options(text, **chosen))] * 2)
    for _ in range(1200):
        if len(list((run / "checkpoints").glob("step-*"))) >= 2 or processes[0].poll() is not None:
            break
        time.sleep(0.1)
    processes[1].kill()
    (status, _, errors), (killed, _, _) = finish(processes, timeout=90)
    assert killed == -signal.SIGKILL
    assert status == 1, errors
    assert "another process of this run stopped" in errors
    assert "paradepth resume" in errors

    def stop_now(step: int) -> None:
        signal.raise_signal(signal.SIGTERM)

    before = len(losses(run))
    with pytest.raises(Interrupted):
        resume_run(run, on_batch=stop_now)
    assert events(run, "resumed")
    assert len(losses(run)) >= min(before, 1)


@pytest.mark.slow
def test_processes_with_different_options_are_refused(text: Path, tmp_path: Path) -> None:
    first = command(tmp_path / "run", options(text, **CONVERGED))
    second = command(tmp_path / "run", options(text, **{**CONVERGED, "learning_rate": 0.5}))
    ended = finish(start([first, second]))
    for status, _, errors in ended:
        assert status == 2, errors
        assert "different options: learning_rate" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "more", "said"),
    [
        (2, {**CONVERGED, "coarsening": 3, "depth": 5}, "nothing to coarsen"),
        (3, {**CONVERGED, "depth": 6}, "3 processes cannot share 4 layers in intervals of 2"),
        (3, {**CONVERGED, "depth_processes": 2}, "3 processes cannot be cut into rows of 2"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_every_process(
    text: Path, tmp_path: Path, processes: int, more: dict[str, Any], said: str
) -> None:
    for status, _, errors in run_together(processes, *command(tmp_path / "run", options(text, **more))):
        assert status == 2, errors
        assert said in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_controller_switches_and_comes_back_and_a_resumed_run_goes_on_alike(text: Path, tmp_path: Path) -> None:
    chosen = {
        "executor": "mgrit",
        "coarsening": 2,
        "control": True,
        "probe_every": 2,
        "max_iterations": 2,
        "exact_probe": True,
        "budget": "12 steps",
        "checkpoint_every": 3,
        "lipschitz": True,
    }
    start_run(base(text, **chosen), tmp_path / "calm")
    calm = events(tmp_path / "calm", "probe")
    assert [probe["step"] for probe in calm] == [0, 2, 4, 6, 8, 10]
    assert all(probe["forward"]["mode"] == "parallel" for probe in calm)
    assert all(0.95 < probe["cosine"] < 0.99999 for probe in calm)
    assert [len(event["estimates"]) for event in events(tmp_path / "calm", "lipschitz")] == [8, 8]

    strict = {**chosen, "depth": 14, "step": 1.0, "rho_threshold": 1e-9, "rho_return": 1e-9}
    start_run(base(text, **strict), tmp_path / "strict")
    modes = [
        (probe["forward"]["mode"], probe["forward"]["iterations"]) for probe in events(tmp_path / "strict", "probe")
    ]
    assert modes[0] == ("parallel", 2)
    assert ("serial", 2) in modes
    assert events(tmp_path / "strict", "train")[-1]["forward_iterations"] is None

    def stop_at_7(step: int) -> None:
        if step == 7:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        start_run(base(text, **strict), tmp_path / "again", on_batch=stop_at_7)
    resume_run(tmp_path / "again")
    for kind in ("probe", "train", "lipschitz"):
        assert events(tmp_path / "again", kind) == events(tmp_path / "strict", kind)
    assert furthest(weights(tmp_path / "again"), weights(tmp_path / "strict")) == 0.0


def test_first_guesses_from_earlier_batches_do_not_break_resuming(text: Path, tmp_path: Path) -> None:
    chosen = {
        "executor": "mgrit",
        "coarsening": 2,
        "initial": "previous",
        "forward_iterations": 0,
        "checkpoint_every": 3,
        "dropout": 0.0,
    }
    start_run(base(text, **chosen), tmp_path / "whole")

    def stop_at_5(step: int) -> None:
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        start_run(base(text, **chosen), tmp_path / "cut", on_batch=stop_at_5)
    # The stop saved at step 5, where the whole run did not: from there on first guesses differ, weights nearly not.
    resume_run(tmp_path / "cut")
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"executor": "serial", "coarsening": 2}, "'serial' does not take coarsening"),
        ({"executor": "picard", "coarse": "half"}, "'picard' does not take coarse"),
        ({"executor": "mgrit", "chunk": 2}, "'mgrit' does not take chunk"),
        ({"executor": "mgrit", "probe_every": 5}, "probe_every: only with control"),
        ({"executor": "serial", "control": True}, "nothing to watch"),
        ({"executor": "mgrit", "coarse": "nearest"}, "coarse is 'nearest'"),
        ({"executor": "mgrit", "checkpoint_layers": True}, "does not take checkpoint_layers"),
    ],
)
def test_options_that_mean_nothing_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_executor(DepthOptions(**given))


def test_compiling_an_iterative_solve_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compile does not go with executor 'mgrit'"):
        start_run(base(text, compile=True, **CONVERGED), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_of_branches_takes_no_depth_executor(tmp_path: Path) -> None:
    config = get_recipe("digits_paraformer").replace(executor="mgrit", budget="2 steps")
    with pytest.raises(ValueError, match="has branches"):
        start_run(config, tmp_path / "run")
