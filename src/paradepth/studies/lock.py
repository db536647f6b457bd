"""One runner at a time in a study's folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path


class StudyLock:
    """An exclusive lock on a folder, held by the runner and by every training process that inherits it.

    The operating system drops the lock when the last of these processes ends, however it ends, so a lock file that a
    killed runner left behind is seen to be stale; and a killed runner's cells that still train keep others out of
    their run directories. The file holds the process ids, to be named in the refusal.

    Args:
        path: the lock file.
        say: told when a stale lock is taken over.

    Raises:
        ValueError: another process holds it, or the system has no POSIX file locks.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "lock"
    >>> lock = StudyLock(path)
    >>> StudyLock(path)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: ... is in use by process ...
    >>> lock.release(); path.exists()
    False
    """

    def __init__(self, path: Path, *, say: Callable[[str], object] = print) -> None:
        try:
            import fcntl
        except ImportError as error:
            raise ValueError("studies run on systems with POSIX file locks only (Linux, macOS)") from error
        self.path = path
        while True:
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holders = self._read()
                os.close(self.descriptor)
                raise ValueError(
                    f"{path.parent} is in use by {holders or 'another process'}; wait for it or stop it"
                ) from error
            except BaseException:
                os.close(self.descriptor)
                raise
            # Between open and flock the former holder may have removed the file: then this lock protects nothing.
            if _same_file(path, self.descriptor):
                break
            os.close(self.descriptor)
        holders = self._read()
        if holders:
            say(f"took over the lock that {holders} left in {path.parent}")
        self.write({})

    def write(self, cells: dict[str, int]) -> None:
        """Note which cells run under the lock, as name → process id."""
        text = json.dumps({"pid": os.getpid(), "cells": cells}).encode()
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, text, 0)

    def release(self) -> None:
        """Remove the lock file and give the lock up."""
        self.path.unlink(missing_ok=True)
        os.close(self.descriptor)

    def _read(self) -> str:
        try:
            content = json.loads(os.pread(self.descriptor, 1 << 20, 0))
            cells = ", ".join(f"{name}: {pid}" for name, pid in content["cells"].items())
            return f"process {content['pid']}" + (f" (cells {cells})" if cells else "")
        except (ValueError, KeyError, TypeError, AttributeError):  # empty, or half written by a killed process
            return ""


def _same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
