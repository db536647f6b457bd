"""Independent random streams from one seed."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator that depends on all arguments, seeded by their hash.

    Neighbouring numbers are poor seeds, and sums like seed + pass would repeat one run's draws in another; hashed, two
    purposes or two passes have nothing in common. On the CPU because its generator draws the same numbers everywhere.

    >>> a, b = (int(torch.randint(10**9, (), generator=generator(0, "order", i))) for i in (1, 2))
    >>> a != b
    True
    """
    digest = hashlib.sha256(" ".join([purpose, *(str(number) for number in (seed, *numbers))]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
