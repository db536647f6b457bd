"""Checkpoints interrupted by errors, full disks and kills: the last good one is there whatever happens."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from checkpoint_helpers import hidden, save, silent
from paradepth.train import checkpoint as checkpoint_module
from paradepth.train.checkpoint import CheckpointStore

FILES = ["checksums.json", "state.json", "tensors.safetensors"]


def test_leftovers_of_a_killed_process_do_not_count_and_go_at_the_next_save(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    (tmp_path / "step-00000001").rename(tmp_path / ".saving-step-00000009-1")
    save(store, 2)
    (tmp_path / "step-00000002").rename(tmp_path / ".removing-step-00000002-1")
    assert store.steps() == []
    assert store.latest(silent) is None
    save(store, 3)
    assert store.steps() == [3]
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("state", ["aside only", "both", "new one damaged"])
def test_an_interrupted_replacement_loses_nothing(tmp_path: Path, state: str) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 4, value=1.0)
    (tmp_path / "step-00000004").rename(tmp_path / "step-00000004.previous")
    if state != "aside only":
        other = CheckpointStore(tmp_path / "other")
        save(other, 4, value=2.0)
        (tmp_path / "other" / "step-00000004").rename(tmp_path / "step-00000004")
        (tmp_path / "other").rmdir()
    if state == "new one damaged":
        os.truncate(tmp_path / "step-00000004" / "tensors.safetensors", 100)
    expected = 2.0 if state == "both" else 1.0
    reports: list[str] = []
    for save_next in (False, True):
        if save_next:
            save(store, 3)  # tidies up; an older step, so that 4 stays the newest
        found = store.latest(reports.append)
        assert found is not None
        assert (found.step, found.tensors["w"][0]) == (4, expected)
        assert store.steps() == ([3, 4] if save_next else [4])
    assert len(reports) == (state == "new one damaged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("same_step", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("elsewhere")], ids=["interrupt", "error"])
@pytest.mark.parametrize("moment", ["save_file", "write_json", "sync_folder"])
def test_an_exception_in_the_middle_leaves_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, error: BaseException, same_step: bool
) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1, 2)

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, moment, fail)
        with pytest.raises(type(error)):
            save(store, 2 if same_step else 3, value=9.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    found = store.latest(silent)
    assert found is not None
    assert (found.step, found.tensors["w"][0]) == (2, 2.0)


def test_a_failing_rename_puts_the_replaced_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 2)
    rename = os.rename

    def refuse_new(source: Path, target: Path) -> None:
        if Path(source).name.startswith(".saving-"):
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_new)
    with pytest.raises(
        PermissionError, match=r"step 2 in .*Permission denied; the last good checkpoint is .*step-00000002"
    ):
        save(store, 2, value=9.0)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match=r"could not save the checkpoint of step 1 in .*file: .*; there is no earlier checkpoint"
    ):
        CheckpointStore(tmp_path / "file").save(1, {}, {})


def _start(work: Callable[..., None], *arguments: object) -> BaseProcess:
    # Forked, for a new interpreter would take seconds to import torch.
    child = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    child.start()
    return child


def _fill_the_disk(folder: Path, said: Path) -> None:
    store = CheckpointStore(folder)
    store.save(1, {"w": torch.ones(1000)}, {"good": True})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    with open(said, "w") as file:
        for tensors, state in (({"w": torch.zeros(100_000)}, {}), ({}, {"text": "x" * 100_000})):
            for step in (1, 2):  # replaces the good one, and comes after it
                try:
                    store.save(step, tensors, state)
                except OSError as error:
                    print(error.errno, error, file=file)


def test_a_file_that_cannot_be_written_to_its_end(tmp_path: Path) -> None:
    folder, said = tmp_path / "checkpoints", tmp_path / "said"
    child = _start(_fill_the_disk, folder, said)
    child.join()
    assert child.exitcode == 0
    lines = said.read_text().splitlines()
    assert len(lines) == 4
    for step, line in zip((1, 2, 1, 2), lines, strict=True):
        assert line.startswith("27 [Errno 27] ")  # EFBIG, what RLIMIT_FSIZE makes of a full disk
        assert f"step {step} in {folder}: File too large" in line
        assert line.endswith(f"the last good checkpoint is {folder / 'step-00000001'}")
    found = CheckpointStore(folder).latest(silent)
    assert found is not None
    assert found.state == {"good": True}
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]


def test_a_full_file_system(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system needs rights this machine does not give")
    try:
        store = CheckpointStore(disk / "checkpoints", keep=5)
        saved = 0
        error = None
        while error is None and saved < 20:
            try:
                store.save(saved + 1, {"w": torch.full((10_000,), saved + 1)}, {})
                saved += 1
            except OSError as full:
                error = full
        assert error is not None
        assert error.errno == 28
        assert "No space left on device; the last good checkpoint is" in str(error)
        assert saved >= 1
        found = store.latest(silent)
        assert found is not None
        assert found.step == saved
        del found  # its tensors are mapped from the file, and a disk in use cannot be unmounted
        assert hidden(disk / "checkpoints") == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _save_forever(folder: Path, said: Path) -> None:
    store = CheckpointStore(folder, keep=2)
    log = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for step in itertools.count(store.steps()[-1] + 1 if store.steps() else 1):
        for _ in range(2):  # the second one replaces the first
            store.save(step, {"w": torch.full((20_000,), float(step))}, {"step": step})
            os.write(log, f"{step}\n".encode())


def test_sigkill_at_random_moments_loses_no_saved_checkpoint(tmp_path: Path) -> None:
    """Each child goes on where the one before was killed, so leftovers of one kill meet the next."""
    random.seed(1)
    folder = tmp_path / "checkpoints"
    store = CheckpointStore(folder, keep=2)
    before = 0
    for kill in range(15):
        said = tmp_path / f"said-{kill}"
        child = _start(_save_forever, folder, said)
        while not said.exists() or not said.read_text().endswith("\n"):
            assert child.is_alive()
            time.sleep(0.001)
        time.sleep(random.uniform(0.0, 0.05))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        steps = [int(line) for line in said.read_text().splitlines()]
        assert steps[0] > before
        found = store.latest(silent)
        assert found is not None
        assert found.step >= steps[-1]
        assert found.step == found.state["step"]
        assert torch.equal(found.tensors["w"], torch.full((20_000,), float(found.step)))
        before = found.step
    assert len(store.steps()) <= 4  # the two, one killed before the removal of the oldest, and one in hand


_FILE_OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")


def _save_and_die(folder: Path, step: int, operation: int) -> None:
    """Save, and be killed right before the file operation of that number."""
    remaining = operation

    def watch(event: str, _: object) -> None:
        nonlocal remaining
        if event in _FILE_OPERATIONS:
            remaining -= 1
            if remaining == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    store = CheckpointStore(folder, keep=1)
    sys.addaudithook(watch)
    store.save(step, {"w": torch.full((64,), 9.0)}, {"step": step, "value": 9.0})
    os._exit(0)  # before anything else opens a file


@pytest.mark.parametrize("step", [2, 3], ids=["the same step", "the next step"])
def test_a_kill_before_any_file_operation_leaves_a_good_checkpoint(tmp_path: Path, step: int) -> None:
    kills = 0
    for operation in itertools.count(1):
        folder = tmp_path / str(operation)
        store = CheckpointStore(folder, keep=1)
        save(store, 2)
        child = _start(_save_and_die, folder, step, operation)
        child.join()
        found = store.latest(silent)
        assert found is not None
        assert (found.step, found.tensors["w"][0]) in ((2, 2.0), (step, 9.0))
        for path in folder.glob("step-*"):  # nothing half removed goes by a good name
            assert sorted(file.name for file in path.iterdir()) == FILES
        save(store, 4)
        assert [path.name for path in folder.iterdir()] == ["step-00000004"]
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        kills += 1
    assert (found.step, found.tensors["w"][0]) == (step, 9.0)
    assert kills >= 10
