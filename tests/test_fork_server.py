"""Processes forked from a server behave as new ones do: output, environment, session, signals, exit status, locks."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paradepth.studies.forks import ForkedProcess, ForkServer
from paradepth.studies.lock import StudyLock
from paradepth.studies.spawn import Spawn

TARGET = """
import json, os, signal, sys, time
what = sys.argv[1]
print(json.dumps({"arguments": sys.argv[1:], "name": __name__, "x": os.environ.get("X"), "here": os.getcwd(),
                  "leads": os.getsid(0) == os.getpid(), "loaded": "json.tool" in sys.modules,
                  "input": sys.stdin.read()}), flush=True)
if what == "raise":
    raise RuntimeError("out of luck")
if what == "exit":
    sys.exit(7)
if what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "save":
    signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(3)))
if what in ("save", "wait"):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServer]:
    (tmp_path / "target.py").write_text(TARGET)
    monkeypatch.chdir(tmp_path)
    server = ForkServer(environment=os.environ, preloaded=("json.tool",))
    yield server
    server.close()


def start(server: ForkServer, *arguments: str, keep: tuple[int, ...] = ()) -> ForkedProcess:
    with open(f"log-{arguments[0]}", "wb") as log:
        words = [sys.executable, "-m", "target", *arguments]
        return server.start(words, log=log.fileno(), environment={**os.environ, "X": "1"}, keep=keep)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def ended(process: ForkedProcess) -> int | None:
    wait_until(lambda: process.poll() is not None)
    return process.returncode


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_forked_process_is_as_a_new_one(server: ForkServer) -> None:
    assert ended(start(server, "fine", "a b", "--c")) == 0
    assert json.loads(Path("log-fine").read_text()) == {
        "arguments": ["fine", "a b", "--c"],
        "name": "__main__",
        "x": "1",
        "here": os.getcwd(),
        "leads": True,
        "loaded": True,
        "input": "",
    }


def test_how_it_ends_is_told(server: ForkServer) -> None:
    processes = {what: start(server, what) for what in ("raise", "exit", "kill")}
    assert {what: ended(process) for what, process in processes.items()} == {"raise": 1, "exit": 7, "kill": -9}
    assert "RuntimeError: out of luck" in Path("log-raise").read_text()


def test_it_heeds_signals(server: ForkServer) -> None:
    processes = {what: start(server, what) for what in ("save", "wait")}
    wait_until(lambda: all("ready" in Path(f"log-{what}").read_text() for what in processes))
    for process in processes.values():
        assert process.poll() is None
        process.terminate()
    assert ended(processes["save"]) == 3
    assert Path("log-save").read_text().endswith("saved\n")
    assert ended(processes["wait"]) == -signal.SIGTERM
    processes["wait"].kill()  # of one that has ended: nothing


def test_it_holds_the_lock_as_long_as_it_runs(server: ForkServer, tmp_path: Path) -> None:
    lock = StudyLock(tmp_path / "lock")
    process = start(server, "wait", keep=(lock.descriptor,))
    os.close(lock.descriptor)  # as if the runner were gone
    with pytest.raises(ValueError, match="is in use by process"):
        StudyLock(tmp_path / "lock")
    process.kill()
    ended(process)
    StudyLock(tmp_path / "lock", say=lambda line: None).release()


def test_what_was_started_outlives_a_server_that_is_closed(server: ForkServer) -> None:
    process = start(server, "wait")
    server.close()
    try:
        assert is_running(process.pid)
        with pytest.raises(OSError, match=r"closed|Bad file"):
            start(server, "fine")
    finally:
        os.kill(process.pid, signal.SIGKILL)


def test_nothing_is_left_running_when_the_server_is_killed(server: ForkServer) -> None:
    process = start(server, "wait")
    os.kill(server._process.pid, signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL
    wait_until(lambda: not is_running(process.pid))
    with pytest.raises(OSError, match=r"gone|Broken pipe"):
        start(server, "fine")


def test_where_nothing_can_be_forked_processes_are_new_ones(
    tmp_path: Path, server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    said: list[str] = []
    lock = StudyLock(tmp_path / "lock")
    spawn = Spawn(lock.descriptor, None, said.append)
    for name in ("one", "two"):
        with open(f"log-{name}", "wb") as log:
            process = spawn([sys.executable, "-m", "target", name], log)
        wait_until(lambda process=process: process.poll() is not None)
        found = json.loads(Path(f"log-{name}").read_text())
        assert (found["arguments"], found["leads"], found["loaded"]) == ([name], True, False)
    assert said == ["every cell imports for itself: processes are not forked on darwin"]
    spawn.close()
    lock.release()


def test_only_modules_are_forked(server: ForkServer) -> None:
    with pytest.raises(ValueError, match="only `python -m MODULE …` can be forked, not ls -l"):
        server.start(["ls", "-l"], log=1, environment={})
