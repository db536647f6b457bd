"""What a run was made with: versions, machine, command."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from paradepth.distributed import World


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(world: World, *, autocast: torch.dtype | None, command: str) -> dict[str, Any]:
    """What `environment.json` holds."""
    from paradepth import __version__

    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else str(world.device)
    return {
        "paradepth": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "precision": "bf16" if autocast else "float32",
        "world_size": world.processes,
        "command": command,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def command_line() -> str:
    """The command that started this process, as one would type it."""
    program = Path(sys.argv[0]).name
    words = ["paradepth" if program in ("__main__.py", "paradepth", "-m") else program, *sys.argv[1:]]
    return " ".join(word if word and not set(word) & set(" '\"$*") else f"'{word}'" for word in words)
