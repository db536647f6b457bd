"""FSDP2 on what branches that are shared leave on every process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from processes import fork_together

DRIVER = Path(__file__).with_name("branch_fsdp.py")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_losses_and_gradients_are_those_of_one_process(processes: int, tmp_path: Path) -> None:
    for status, _, errors in fork_together(processes, DRIVER, tmp_path):
        assert status == 0, errors
    found = [json.loads(path.read_text()) for path in tmp_path.glob("rank*.json")]
    assert len(found) == processes
    for part in found:
        for what in ("joint", "prefixes", "detach"):
            loss, gradients = part[what]
            assert loss < 1e-10, what
            assert gradients < 1e-9, what
    assert sum(part["share"] for part in found) < 1.2, "hardly anything is held twice"
