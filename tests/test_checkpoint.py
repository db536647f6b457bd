"""Checkpoints and atomic files: bit-exact, the newest are kept, and damage is reported."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_helpers import hidden, save, silent
from paradepth.atomic import write_bytes, write_json, write_text
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


# --- content -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (3, 4, 2)], ids=str)
def test_round_trip_is_bit_exact(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    count = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)  # NaN payloads included
    tensor = raw.view(dtype).reshape(shape)
    store = CheckpointStore(tmp_path)
    store.save(0, {"a.b/c": tensor}, {})
    found = store.latest(silent)
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
    found = store.latest(silent)
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
    found = store.latest(silent)
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
    assert store.latest(silent) is None
    assert not (tmp_path / "none").exists()


def test_the_newest_are_kept_and_the_just_saved_one_always(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 1, 2, 100_000_000, 30)
    assert store.steps() == [30, 100_000_000]
    found = store.latest(silent)
    assert found is not None
    assert (found.step, found.path, found.state["step"]) == (100_000_000, tmp_path / "step-100000000", 100_000_000)
    assert store.save(5, {}, {}) == tmp_path / "step-00000005"
    assert store.steps() == [5, 100_000_000]
    assert hidden(tmp_path) == []
    with pytest.raises(ValueError, match="keep is 0"):
        CheckpointStore(tmp_path, keep=0)
    with pytest.raises(ValueError, match="step is -1"):
        store.save(-1, {}, {})


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 7, value=1.0)
    save(store, 7, value=2.0)
    found = store.latest(silent)
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
    save(store, 10, 20)
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
    save(store, 20)  # computed again: replaces the damaged one
    found = store.latest(silent)
    assert found is not None
    assert found.step == 20


def test_damage_is_printed_to_standard_error_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1, 2)
    _flip(tmp_path / "step-00000002")
    store.latest()
    out, err = capsys.readouterr()
    assert out == ""
    assert "damaged checkpoint" in err


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
