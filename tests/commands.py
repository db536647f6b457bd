"""Commands of `paradepth` in the process of the test, given as words of any type."""

from __future__ import annotations

import json
from typing import Any

import pytest

from paradepth.cli import main


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """The status of a command, and what it wrote to standard output and to standard error."""
    capsys.readouterr()
    status = main([str(word) for word in words])
    out, error = capsys.readouterr()
    return status, out, error


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    """What a command that succeeds answers with `--json`."""
    status, out, error = call(capsys, *words, "--json")
    assert status == 0, error
    return json.loads(out)
