"""Cache of decoded images on disk: one safetensors file a split, checked when it is read."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT = "paradepth-images-1"  # to be raised whenever decoding changes


def cache_folder() -> Path:
    """`$PARADEPTH_CACHE`, or `~/.cache/paradepth`."""
    folder = os.environ.get("PARADEPTH_CACHE")
    return Path(folder).expanduser() if folder else Path.home() / ".cache" / "paradepth"


def file_identity(path: Path) -> str:
    """Path, size and modification time: what a cached result of reading the file depends on."""
    path = path.resolve()
    stat = path.stat()
    return f"{path}|{stat.st_size}|{stat.st_mtime_ns}"


def cached_images(identity: Iterable[str], decode: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return what `decode` returned the last time for this identity, or call it and keep the result.

    A damaged file is decoded afresh and replaced. When the cache cannot be written, a warning says so.

    Args:
        identity: strings that name the sources and the options of decoding.
        decode: returns a uint8 tensor.
    """
    digest = hashlib.sha256()
    for part in (FORMAT, *identity):
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    path = cache_folder() / f"{digest.hexdigest()}.safetensors"
    images = _read(path)
    if images is None:
        images = decode()
        _write(path, images)
    return images


def _read(path: Path) -> torch.Tensor | None:
    if not path.exists():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            checksum = (file.metadata() or {}).get("crc32")
            # A copy, because the file is mapped into memory: a file that shrinks later would end the process.
            images = file.get_tensor("images").clone()
    except (SafetensorError, OSError, ValueError):
        return None
    return images if checksum == _checksum(images) and images.dtype == torch.uint8 else None


def _write(path: Path, images: torch.Tensor) -> None:
    """Write under another name in the same folder and rename, so that nobody sees half a file."""
    name = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem[:16], suffix=".tmp")
        os.close(handle)
        save_file({"images": images.contiguous()}, name, metadata={"format": "pt", "crc32": _checksum(images)})
        os.replace(name, path)
    except (SafetensorError, OSError) as error:
        if name is not None:
            Path(name).unlink(missing_ok=True)
        warnings.warn(f"decoded images are not cached: {error}; set PARADEPTH_CACHE to a writable folder", stacklevel=3)


def _checksum(images: torch.Tensor) -> str:
    return str(zlib.crc32(images.contiguous().numpy().data))
