"""Checkpoints: bit-exact, and the last good one is there whatever happens."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import random
import re
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
from hypothesis import given
from hypothesis import strategies as st

from paradepth.atomic import write_bytes, write_json, write_text
from paradepth.train import checkpoint as checkpoint_module
from paradepth.train.checkpoint import CheckpointStore

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _save(store: CheckpointStore, *steps: int, value: float | None = None) -> None:
    for step in steps:
        tensors = {"w": torch.full((64,), float(step if value is None else value))}
        store.save(step, tensors, {"step": step, "value": value})


def _silent(message: str) -> None:
    raise AssertionError(f"nothing should be reported, but: {message}")


def _hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("step-"))


FILES = ["checksums.json", "state.json", "tensors.safetensors"]


# --- content -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (3, 4, 2)], ids=str)
def test_round_trip_is_bit_exact(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    count = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)  # NaN payloads included
    tensor = raw.view(dtype).reshape(shape)
    store = CheckpointStore(tmp_path)
    store.save(0, {"a.b/c": tensor}, {})
    found = store.latest(_silent)
    assert found is not None
    back = found.tensors["a.b/c"]
    assert back.dtype == dtype
    assert back.shape == tensor.shape
    assert _bits(back) == _bits(tensor)


def test_tensors_may_share_storage_and_be_views(tmp_path: Path) -> None:
    base = torch.arange(24.0, requires_grad=True)
    tensors = {
        "whole": base,
        "again": base,
        "slice": base[3:7],
        "transposed": base.detach().reshape(4, 6).T,
        "strided": base.detach()[::5],
        "expanded": base.detach()[:1].expand(7),
        "conjugate": torch.view_as_complex(base.detach().reshape(-1, 2)).conj(),
        "imaginary": torch.view_as_complex(base.detach().reshape(-1, 2)).conj().imag,
    }
    store = CheckpointStore(tmp_path)
    store.save(1, tensors, {})
    with torch.no_grad():
        expected = {name: tensor.clone() for name, tensor in tensors.items()}
        base += 100  # what is on the disk must not follow
    found = store.latest(_silent)
    assert found is not None
    assert found.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found.tensors[name], tensor.resolve_conj().resolve_neg()), name


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(state=st.dictionaries(st.text(), _JSON, max_size=4))
def test_any_json_state_survives(tmp_path_factory: pytest.TempPathFactory, state: dict) -> None:
    store = CheckpointStore(tmp_path_factory.mktemp("store"))
    store.save(3, {}, state)
    found = store.latest(_silent)
    assert found is not None
    assert repr(found.state) == repr(state)  # repr tells -0.0 from 0.0 and True from 1, and NaN equals NaN


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {1: "x"}}, r"state\['a'\] has the key 1"),
        ({"a": [0, torch.zeros(1)]}, r"state\['a'\]\[1\] is a Tensor"),
        ({"a": {2, 3}}, r"state\['a'\] is a set"),
        ({"a": Path("x")}, r"state\['a'\] is a \w*Path"),
    ],
)
def test_state_that_json_would_change_is_refused(tmp_path: Path, state: dict, message: str) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=message):
        store.save(1, {}, state)
    assert store.steps() == []


@pytest.mark.parametrize(
    "tensor", [torch.eye(3).to_sparse(), torch.empty(3, device="meta"), [1.0]], ids=["sparse", "meta", "list"]
)
def test_tensors_without_dense_data_are_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"tensor 'w' is .* dense tensors with data"):
        CheckpointStore(tmp_path).save(1, {"w": tensor}, {})


# --- the store ---------------------------------------------------------------------------------------------------


def test_an_empty_store(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "none")
    assert store.steps() == []
    assert store.latest(_silent) is None
    assert not (tmp_path / "none").exists()


def test_the_newest_are_kept_and_the_just_saved_one_always(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    _save(store, 1, 2, 100_000_000, 30)
    assert store.steps() == [30, 100_000_000]
    found = store.latest(_silent)
    assert found is not None
    assert (found.step, found.path, found.state["step"]) == (100_000_000, tmp_path / "step-100000000", 100_000_000)
    assert store.save(5, {}, {}) == tmp_path / "step-00000005"
    assert store.steps() == [5, 100_000_000]
    assert _hidden(tmp_path) == []
    with pytest.raises(ValueError, match="keep is 0"):
        CheckpointStore(tmp_path, keep=0)
    with pytest.raises(ValueError, match="step is -1"):
        store.save(-1, {}, {})


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    _save(store, 7, value=1.0)
    _save(store, 7, value=2.0)
    found = store.latest(_silent)
    assert found is not None
    assert found.tensors["w"][0] == 2.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000007"]


def _truncate(path: Path) -> None:
    os.truncate(path / "tensors.safetensors", 100)


def _flip(path: Path) -> None:
    data = bytearray((path / "tensors.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "tensors.safetensors").write_bytes(data)


def _empty_state(path: Path) -> None:
    (path / "state.json").write_text("")


def _remove_state(path: Path) -> None:
    (path / "state.json").unlink()


def _garbage_checksums(path: Path) -> None:
    (path / "checksums.json").write_text("[1")


def _no_checksums(path: Path) -> None:
    (path / "checksums.json").write_text("{}")


DAMAGE = {
    _truncate: r"tensors.safetensors \(100 bytes\) does not match",
    _flip: r"tensors.safetensors \(\d+ bytes\) does not match",
    _empty_state: r"state.json \(0 bytes\) does not match",
    _remove_state: r"state.json is missing",
    _garbage_checksums: r"checksums.json is not readable",
    _no_checksums: r"checksums.json is not readable",
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.items(), ids=lambda item: getattr(item, "__name__", ""))
def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(
    tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    store = CheckpointStore(tmp_path)
    _save(store, 10, 20)
    damage(tmp_path / "step-00000020")
    reports: list[str] = []
    found = store.latest(reports.append)
    assert found is not None
    assert found.step == 10
    assert found.tensors["w"][0] == 10
    assert len(reports) == 1
    assert reports[0].startswith(f"damaged checkpoint {tmp_path / 'step-00000020'}: ")
    assert re.search(words, reports[0])

    damage(tmp_path / "step-00000010")
    with pytest.raises(ValueError, match=r"all 2 are damaged .*step-00000020: .*step-00000010: "):
        store.latest(reports.append)
    _save(store, 20)  # computed again: replaces the damaged one
    found = store.latest(_silent)
    assert found is not None
    assert found.step == 20


def test_damage_is_printed_to_standard_error_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = CheckpointStore(tmp_path)
    _save(store, 1, 2)
    _flip(tmp_path / "step-00000002")
    store.latest()
    out, err = capsys.readouterr()
    assert out == ""
    assert "damaged checkpoint" in err


# --- interruptions -----------------------------------------------------------------------------------------------


def test_leftovers_of_a_killed_process_do_not_count_and_go_at_the_next_save(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    _save(store, 1)
    (tmp_path / "step-00000001").rename(tmp_path / ".saving-step-00000009-1")
    _save(store, 2)
    (tmp_path / "step-00000002").rename(tmp_path / ".removing-step-00000002-1")
    assert store.steps() == []
    assert store.latest(_silent) is None
    _save(store, 3)
    assert store.steps() == [3]
    assert _hidden(tmp_path) == []


@pytest.mark.parametrize("state", ["aside only", "both", "new one damaged"])
def test_an_interrupted_replacement_loses_nothing(tmp_path: Path, state: str) -> None:
    store = CheckpointStore(tmp_path)
    _save(store, 4, value=1.0)
    (tmp_path / "step-00000004").rename(tmp_path / "step-00000004.previous")
    if state != "aside only":
        other = CheckpointStore(tmp_path / "other")
        _save(other, 4, value=2.0)
        (tmp_path / "other" / "step-00000004").rename(tmp_path / "step-00000004")
        (tmp_path / "other").rmdir()
    if state == "new one damaged":
        _flip(tmp_path / "step-00000004")
    expected = 2.0 if state == "both" else 1.0
    reports: list[str] = []
    for save_next in (False, True):
        if save_next:
            _save(store, 3)  # tidies up; an older step, so that 4 stays the newest
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
    _save(store, 1, 2)

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, moment, fail)
        with pytest.raises(type(error)):
            _save(store, 2 if same_step else 3, value=9.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    found = store.latest(_silent)
    assert found is not None
    assert (found.step, found.tensors["w"][0]) == (2, 2.0)


def test_a_failing_rename_puts_the_replaced_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    _save(store, 2)
    rename = os.rename

    def refuse_new(source: Path, target: Path) -> None:
        if Path(source).name.startswith(".saving-"):
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_new)
    with pytest.raises(
        PermissionError, match=r"step 2 in .*Permission denied; the last good checkpoint is .*step-00000002"
    ):
        _save(store, 2, value=9.0)
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
    found = CheckpointStore(folder).latest(_silent)
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
        found = store.latest(_silent)
        assert found is not None
        assert found.step == saved
        del found  # its tensors are mapped from the file, and a disk in use cannot be unmounted
        assert _hidden(disk / "checkpoints") == []
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
        found = store.latest(_silent)
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
        _save(store, 2)
        child = _start(_save_and_die, folder, step, operation)
        child.join()
        found = store.latest(_silent)
        assert found is not None
        assert (found.step, found.tensors["w"][0]) in ((2, 2.0), (step, 9.0))
        for path in folder.glob("step-*"):  # nothing half removed goes by a good name
            assert sorted(file.name for file in path.iterdir()) == FILES
        _save(store, 4)
        assert [path.name for path in folder.iterdir()] == ["step-00000004"]
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        kills += 1
    assert (found.step, found.tensors["w"][0]) == (step, 9.0)
    assert kills >= 10


# --- atomic files ------------------------------------------------------------------------------------------------


def test_atomic_writes_replace_and_leave_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "größer")
    assert path.read_bytes() == "größer".encode()
    write_json(path, {"a": [1, None, "φ"]})
    assert json.loads(path.read_text()) == {"a": [1, None, "φ"]}
    write_bytes(path, b"")
    assert path.read_bytes() == b""
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("value", [{"a": math.nan}, {"a": {1, 2}}, {(1, 2): 3}])
def test_values_that_are_not_json_are_refused_and_the_old_file_stays(tmp_path: Path, value: object) -> None:
    path = tmp_path / "file.json"
    write_json(path, "old")
    with pytest.raises(ValueError, match=r"cannot write .*file.json as JSON"):
        write_json(path, value)
    assert json.loads(path.read_text()) == "old"


def test_a_failed_atomic_write_removes_its_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()  # a file cannot be renamed over a folder
    with pytest.raises(OSError, match="target"):
        write_text(tmp_path / "target", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
