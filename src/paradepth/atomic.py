"""Atomic file writes: a reader sees the old file or the whole new one, never half of it, even after a power cut."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` atomically.

    The bytes go to a temporary file in the same folder, are flushed to the disk, and the file is renamed over `path`.
    When anything fails the temporary file is removed and whatever was at `path` stays as it was.

    Args:
        path: the file to create or replace; its folder must exist.
        data: the content.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "note.bin"
    >>> write_bytes(target, b"done")
    >>> target.read_bytes()
    b'done'
    """
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of `path` when the context ends well: `write_bytes` for data in pieces.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "lines.txt"
    >>> with replacing(target) as file:
    ...     _ = file.write(b"one"), file.write(b"two"), print(target.exists())
    False
    >>> target.read_bytes()
    b'onetwo'
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        # "x" and not tempfile.mkstemp, whose files nobody but the owner may read.
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path` atomically; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(
    path: str | os.PathLike[str],
    value: Any,
    *,
    indent: int | None = 2,
    allow_nan: bool = False,
) -> None:
    """Write `value` as JSON to `path` atomically; see `write_bytes`.

    Args:
        path: the file to create or replace.
        value: dicts, lists, strings, numbers, booleans and None.
        indent: spaces per level; None for a single line.
        allow_nan: write non-finite floats as `NaN`, `Infinity` and `-Infinity`, which Python reads back and strict
            JSON readers do not.

    Raises:
        ValueError: `value` is not JSON, or holds a non-finite float and `allow_nan` is off. Nothing is written.
        OSError: as `write_bytes`.
    """
    try:
        text = json.dumps(value, indent=indent, allow_nan=allow_nan, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"cannot write {path} as JSON: {error}") from error
    write_text(path, text + "\n")


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Flush a folder's entries to the disk, so that a rename in it survives a power cut."""
    if os.name == "nt":  # Windows opens no folders, and orders renames itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
