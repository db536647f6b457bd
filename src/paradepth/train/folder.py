"""The folder of a run: what may lie there before it starts."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

_RUN_FILES = (
    "config.json",
    "tokenizer.json",
    "words.json",
    "model.safetensors",
    "metrics.jsonl",
    "environment.json",
    "evaluation.json",
    "early_stop.json",
    "compression.json",
    "explanation.json",
    "explanation.html",
    "report.html",
)
_RUN_FOLDERS = ("checkpoints", "tensorboard", "exported", "compression")


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuses a folder that a run cannot be written into.

    Raises:
        ValueError: it is not empty and not to be overwritten, holds something that is no run, is a file, or cannot be
            written.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"run directory {folder} is a file; name a new folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"run directory {folder} is not empty; name another, resume it, or pass --overwrite")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").exists():
        strange = sorted(p.name for p in folder.iterdir() if p.name not in (*_RUN_FILES, *_RUN_FOLDERS))
        if strange:
            raise ValueError(
                f"{folder} holds {strange[:3]} and no config.json, so it is not a run; it is not overwritten"
            )
    check_writable(folder, f"run directory {folder}")


def derived_folder(run: Path, out: str | Path | None, *, suffix: str, overwrite: bool) -> Path:
    """The folder for a run that is made from another one.

    Args:
        run: the other one, which is left alone.
        out: as asked for; None: beside `run`, with its name and `suffix`.
        suffix: such as "-compressed".
        overwrite: whether a run may lie there.

    Raises:
        ValueError: it is the run itself, around or inside it, or `check_folder` refuses it.
    """
    named = run if run.name not in ("", "..") else run.resolve()
    target = Path(out) if out is not None else named.with_name(f"{named.name}{suffix}")
    source, place = run.resolve(), target.resolve()
    if place == source or place in source.parents or source in place.parents:
        raise ValueError(f"out is {target}; it must be a folder of its own, neither {run} nor around or inside it")
    check_folder(target, overwrite=overwrite)
    return target


def check_writable(folder: Path, what: str) -> None:
    """Refuses a folder, existing or to be made, that cannot be written into.

    Args:
        folder: where something will be written.
        what: it is, for the message.

    Raises:
        ValueError: it cannot be written.
    """
    parent = folder
    while not parent.exists():
        parent = parent.parent
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise ValueError(f"{what} cannot be written: {error}") from error


def clear_folder(folder: Path) -> None:
    """Makes the folder, or removes what a run has written there, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    for name in _RUN_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
