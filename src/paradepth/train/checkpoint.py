"""Checkpoints that survive SIGKILL, a full disk and damaged files: tensors in safetensors, state in JSON, checksums.

folder/step-00001200/tensors.safetensors
                     state.json
                     checksums.json          SHA-256 of the two files above
folder/step-00001200.previous/               only while step 1200 is being replaced
folder/.saving-…, folder/.removing-…         unfinished business of a killed process; the next save removes it
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from paradepth.atomic import sync_folder, write_json

_TENSORS, _STATE, _CHECKSUMS = "tensors.safetensors", "state.json", "checksums.json"
_STEP_FOLDER = re.compile(r"step-(\d{8,})(\.previous)?")
_LEFTOVERS = (".saving-*", ".removing-*")


@dataclass(frozen=True)
class Checkpoint:
    """One loaded checkpoint.

    Attributes:
        tensors: by name, on the CPU, bit for bit as saved.
        state: the JSON part.
        path: the folder it was read from.
        step: the step it was saved at.
    """

    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]
    path: Path
    step: int


def _print_to_stderr(message: str) -> None:
    print(message, file=sys.stderr)


class CheckpointStore:
    """The newest checkpoints of one run. At every moment, whatever happens, the last good one can be loaded.

    A checkpoint is written into a hidden folder, flushed to the disk and then renamed, so a `step-…` folder is
    complete; older ones are removed only afterwards. One process at a time may save into a folder.

    Args:
        folder: where the checkpoints lie; created at the first save.
        keep: how many of the newest to keep, at least 1. The one just saved always stays.

    Raises:
        ValueError: `keep` below 1.

    >>> import tempfile
    >>> store = CheckpointStore(Path(tempfile.mkdtemp()), keep=2)
    >>> for step in (10, 20, 30):
    ...     path = store.save(step, {"weight": torch.full((2,), float(step))}, {"epoch": step / 10})
    >>> store.steps()
    [20, 30]
    >>> newest = store.latest()
    >>> newest.step, newest.state, newest.tensors["weight"]
    (30, {'epoch': 3.0}, tensor([30., 30.]))
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}, but at least 1 checkpoint must be kept")
        self.folder = Path(folder)
        self.keep = keep

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> Path:
        """Save a checkpoint; a step that was saved before is replaced.

        Args:
            step: number of the step, 0 or more.
            tensors: dense tensors of any dtype and device; they may share storage or be non-contiguous.
            state: dicts with string keys, lists, strings, numbers, booleans and None. Non-finite floats survive
                (`state.json` then holds `NaN` or `Infinity`, which Python reads); tuples come back as lists.

        Returns:
            The folder of the checkpoint.

        Raises:
            ValueError: negative step, a tensor without dense data, or a state that JSON would change or cannot hold.
            OSError: disk full, no permission …; the message names the folder and the last good checkpoint, which is
                left untouched.
        """
        if step < 0:
            raise ValueError(f"step is {step}, but steps count from 0")
        state = dict(state)
        _check_state(state, "state")
        ready = _ready_for_disk(tensors)
        target = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".saving-{target.name}-{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._recover()
            temporary.mkdir()
            _write_tensors(temporary / _TENSORS, ready)
            write_json(temporary / _STATE, state, indent=None, allow_nan=True)
            checksums = {name: _sha256(temporary / name) for name in (_TENSORS, _STATE)}
            write_json(temporary / _CHECKSUMS, checksums)
            sync_folder(temporary)
            self._move_into_place(temporary, target)
            self._remove_old(target)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            message = (
                f"could not save the checkpoint of step {step} in {self.folder}: {error.strerror or error}; "
                f"{self._last_good()}"
            )
            raise (OSError(error.errno, message) if error.errno is not None else OSError(message)) from error
        return target

    def latest(self, report: Callable[[str], None] = _print_to_stderr) -> Checkpoint | None:
        """Load the newest checkpoint whose checksums hold.

        Args:
            report: called with one sentence (path, what is wrong) for each damaged checkpoint that is passed over;
                prints to standard error by default.

        Returns:
            The checkpoint, or None where none was ever saved.

        Raises:
            ValueError: there are checkpoints but every one is damaged.
        """
        folders = self._folders()
        problems: list[str] = []
        for step, path in reversed(folders):
            try:
                _verify(path)
                tensors = load_file(path / _TENSORS)
                state = json.loads((path / _STATE).read_bytes())
            except (OSError, ValueError, SafetensorError) as error:
                problems.append(f"damaged checkpoint {path}: {error}")
                report(problems[-1])
                continue
            return Checkpoint(tensors=tensors, state=state, path=path, step=step)
        if problems:
            raise ValueError(
                f"no usable checkpoint in {self.folder}: all {len(problems)} are damaged ({'; '.join(problems)})"
            )
        return None

    def steps(self) -> list[int]:
        """The saved steps in ascending order, damaged ones included."""
        return sorted({step for step, _ in self._folders()})

    def _folders(self) -> list[tuple[int, Path]]:
        """Checkpoint folders from oldest to newest; for one step, the replaced one comes before its replacement."""
        found = []
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                match = _STEP_FOLDER.fullmatch(path.name)
                if match and path.is_dir():
                    found.append((int(match[1]), not match[2], path))
        return [(step, path) for step, _, path in sorted(found)]

    def _recover(self) -> None:
        """Tidy up after a process that was killed: temporary folders go, an interrupted replacement is settled."""
        for pattern in _LEFTOVERS:
            for path in self.folder.glob(pattern):
                shutil.rmtree(path)
        for previous in self.folder.glob("step-*.previous"):
            current = previous.with_suffix("")
            if current.exists() and _is_good(current):
                self._remove(previous)
            else:
                if current.exists():
                    self._remove(current)
                os.rename(previous, current)

    def _move_into_place(self, temporary: Path, target: Path) -> None:
        # A folder cannot be renamed over another one; the old one steps aside under a name that `latest` reads too.
        previous = target.with_name(target.name + ".previous")
        replaces = target.exists()
        if replaces:
            os.rename(target, previous)
        try:
            os.rename(temporary, target)
        except BaseException:
            if replaces and not target.exists():
                os.rename(previous, target)
            raise
        sync_folder(self.folder)
        if replaces:
            self._remove(previous)

    def _remove_old(self, just_saved: Path) -> None:
        others = [path for _, path in self._folders() if path != just_saved]
        for path in others[: max(0, len(others) - (self.keep - 1))]:
            self._remove(path)

    def _remove(self, path: Path) -> None:
        # Renamed first: a kill in the middle of the removal must not leave half a checkpoint under a good name.
        doomed = path.with_name(f".removing-{path.name}-{os.getpid()}")
        os.rename(path, doomed)
        shutil.rmtree(doomed)

    def _last_good(self) -> str:
        for _, path in reversed(self._folders()):
            if _is_good(path):
                return f"the last good checkpoint is {path}"
        return "there is no earlier checkpoint"


def _check_state(value: Any, where: str) -> None:
    """Refuse what JSON cannot hold or would silently change."""
    if isinstance(value, dict):
        wrong = [key for key in value if not isinstance(key, str)]
        if wrong:
            raise ValueError(f"{where} has the key {wrong[0]!r}, but JSON keys are strings")
        for key, item in value.items():
            _check_state(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_state(item, f"{where}[{index}]")
    elif not (value is None or isinstance(value, (bool, int, float, str))):
        allowed = "dict, list, str, int, float, bool and None (tensors go into `tensors`)"
        raise ValueError(f"{where} is a {type(value).__name__}, but a state holds {allowed}")


def _ready_for_disk(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous CPU tensors that share no storage, copied only where needed."""
    ready: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            kind = f"{tensor.layout} on {tensor.device}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"tensor {name!r} is {kind}, but a checkpoint holds dense tensors with data")
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        storage = flat.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != flat.numel() * flat.element_size():
            flat = flat.clone()
        storages.add(flat.untyped_storage().data_ptr())
        ready[name] = flat
    return ready


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # carries the operating system's error in its text only
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(path: Path) -> None:
    """Raise ValueError or OSError saying what is wrong with the checkpoint in `path`."""
    for name in (_CHECKSUMS, _STATE, _TENSORS):
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
    try:
        checksums = json.loads((path / _CHECKSUMS).read_bytes())
        expected = {name: checksums[name] for name in (_STATE, _TENSORS)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{_CHECKSUMS} is not readable ({type(error).__name__}: {error})") from error
    for name, digest in expected.items():
        if _sha256(path / name) != digest:
            raise ValueError(f"{name} ({(path / name).stat().st_size} bytes) does not match its checksum")


def _is_good(path: Path) -> bool:
    try:
        _verify(path)
    except (OSError, ValueError):
        return False
    return True
