"""Which number format to train in."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch


def cpu_flags() -> frozenset[str]:
    """Instruction-set flags of the processor, empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(flag for line in lines if line.startswith("flags") for flag in line.split(":", 1)[1].split())


def has_bf16_units(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(cpu_flags() & {"amx_bf16", "avx512_bf16"})


def autocast_dtype(precision: Literal["auto", "bf16", "float32"], device: torch.device) -> torch.dtype | None:
    """The autocast dtype for a precision; None is plain float32.

    >>> autocast_dtype("float32", torch.device("cpu")) is None
    True
    """
    if precision == "auto":
        precision = "bf16" if has_bf16_units(device) else "float32"
    return torch.bfloat16 if precision == "bf16" else None
