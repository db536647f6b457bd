"""The study runner stopped, killed or refused: what is finished is kept, and it goes on where it was."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from paradepth.studies.forks import ForkServer
from paradepth.studies.runner import Study, run_study
from study_runner_helpers import FakeRunner, fake_cell, fake_command, fake_study, is_alive, quick_runner, wait_until


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRunner:
    return quick_runner(tmp_path, monkeypatch)


@pytest.fixture
def terminal_signals() -> Iterator[None]:
    """Where the session runs in the background (nohup, &) it ignores SIGINT and SIGHUP, and so do studies it starts."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _interruptible() -> Study:
    return fake_study(fake_cell("quick"), fake_cell("slow", behaviour="wait"), fake_cell("slow2", behaviour="wait"))


def _run_interruptible(base: Path, forked: bool) -> None:
    os.chdir(base)
    with open(base / "said", "w") as said:
        run_study(
            _interruptible(),
            out=base / "out",
            workers=2,
            say=lambda line: print(line, file=said, flush=True),
            command=fake_command(base, "train", forked=forked),
            resume=fake_command(base, "resume", forked=forked),
            server=ForkServer(environment=os.environ, preloaded=()) if forked else None,
        )


def _start_in_background(base: Path, *, forked: bool = False) -> BaseProcess:
    # Forked, for a new interpreter would take seconds to import torch.
    child = multiprocessing.get_context("fork").Process(target=_run_interruptible, args=(base, forked))
    child.start()
    # The fake cells save their checkpoint on SIGTERM only once they have started.
    wait_until(lambda: (base / "started-slow").exists() and (base / "started-slow2").exists())
    return child


def _stop(child: BaseProcess, number: int) -> None:
    assert child.pid is not None
    os.kill(child.pid, number)
    child.join(120)
    assert child.exitcode is not None


def _cell_pids(base: Path) -> dict[str, int]:
    return json.loads((base / "out" / ".lock").read_text())["cells"]


@pytest.mark.usefixtures("terminal_signals")
@pytest.mark.parametrize("forked", [False, True], ids=["new processes", "forked"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_stopped_study_goes_on_where_it_was(runner: FakeRunner, number: signal.Signals, forked: bool) -> None:
    child = _start_in_background(runner.base, forked=forked)
    pids = _cell_pids(runner.base)
    assert sorted(pids) == ["slow", "slow2"]
    _stop(child, number)
    # multiprocessing makes 1 of a KeyboardInterrupt.
    assert child.exitcode == (1 if number == signal.SIGINT else 128 + number)
    said = (runner.base / "said").read_text()
    assert "stopped with 1 of 3 cells there; run it again to go on" in said
    assert "failed" not in said
    assert not any(is_alive(pid) for pid in pids.values())
    assert runner.record("quick")["accuracy"] == [0.61, 0.71]
    for name in ("slow", "slow2"):
        assert (runner.out / "runs" / name / "checkpoints" / "step-00000010").is_dir()
        assert not (runner.out / "cells" / f"{name}.json").exists()

    (runner.base / "go").touch()
    summary = runner(_interruptible())
    assert (summary["done"], summary["skipped"]) == (["slow", "slow2"], ["quick"])
    assert runner.calls == ["resume slow", "resume slow2"]
    log = (runner.out / "runs" / "slow.log").read_text()
    assert log.splitlines() == ["hello from slow", "saved", "hello from slow"]
    assert runner.record("slow")["curve"] == [[100.0, 0.5], [200.0, 0.7]]


def test_an_interrupted_run_of_other_options_is_not_resumed(runner: FakeRunner) -> None:
    child = _start_in_background(runner.base)
    _stop(child, signal.SIGTERM)
    assert runner(fake_study(fake_cell("slow", behaviour="ok")))["done"] == ["slow"]
    assert runner.calls == ["train slow"]


def test_a_refused_resume_starts_again(runner: FakeRunner) -> None:
    study = fake_study(fake_cell("a", behaviour="refuse resume"))
    runner(study)
    (runner.out / "cells" / "a.json").unlink()
    (runner.out / "runs" / "a" / "evaluation.json").unlink()
    (runner.out / "runs" / "a" / "checkpoints" / "step-00000010").mkdir()
    assert runner(study)["done"] == ["a"]
    assert runner.calls == ["resume a", "train a"]
    assert "a: cannot be resumed (every checkpoint is damaged); starts again" in runner.said


def test_a_finished_run_without_record_is_not_repeated(runner: FakeRunner) -> None:
    runner(fake_study(fake_cell("a")))
    before = runner.record("a")
    (runner.out / "cells" / "a.json").unlink()
    assert runner(fake_study(fake_cell("a")))["done"] == ["a"]
    assert runner.calls == []
    assert runner.record("a") == before


@pytest.mark.parametrize("forked", [False, True], ids=["new processes", "forked"])
def test_cells_of_a_killed_runner_keep_others_out_until_they_end(runner: FakeRunner, forked: bool) -> None:
    child = _start_in_background(runner.base, forked=forked)
    pids = _cell_pids(runner.base)
    try:
        with pytest.raises(ValueError, match=f"is in use by process {child.pid} .cells slow: {pids['slow']}, slow2:"):
            run_study(_interruptible(), out=runner.out)
        _stop(child, signal.SIGKILL)
        with pytest.raises(ValueError, match=f"is in use by process {child.pid} "):
            run_study(_interruptible(), out=runner.out)
        (runner.base / "go").touch()
        wait_until(lambda: not any(is_alive(pid) for pid in pids.values()))
    finally:
        for pid in pids.values():
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
    # What they achieved counts, and the lock file they left does not keep anyone out.
    assert runner(_interruptible())["done"] == ["slow", "slow2"]
    assert runner.calls == []
    assert runner.said[0].startswith(f"took over the lock that process {child.pid} ")


def test_one_runner_at_a_time(runner: FakeRunner) -> None:
    refusals: list[str] = []

    def say(line: str) -> None:
        if line == "a: started":
            with pytest.raises(ValueError, match="is in use by process") as caught:
                run_study(fake_study(fake_cell("b")), out=runner.out)
            refusals.append(str(caught.value))

    run_study(fake_study(fake_cell("a")), out=runner.out, say=say, command=fake_command(runner.base, "train"))
    assert len(refusals) == 1
    assert f"process {os.getpid()} (cells a: " in refusals[0]
    assert runner(fake_study(fake_cell("b")))["done"] == ["b"]  # nothing is left of the lock


def test_an_error_in_the_runner_leaves_no_process_behind(runner: FakeRunner) -> None:
    pids: list[int] = []

    def say(line: str) -> None:
        if line == "slow: started":
            wait_until((runner.base / "started-slow").exists)
            pids.extend(_cell_pids(runner.base).values())
            raise RuntimeError("the terminal is gone")

    with pytest.raises(RuntimeError, match="the terminal is gone"):
        run_study(
            fake_study(fake_cell("slow", behaviour="wait")),
            out=runner.out,
            say=say,
            command=fake_command(runner.base, "train"),
        )
    assert len(pids) == 1
    assert not is_alive(pids[0])
    assert not (runner.out / ".lock").exists()
