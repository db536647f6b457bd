"""The README's examples run as printed, and its commands and files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from paradepth.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(code, names)
    assert names["y"].shape == (2, 16, 64)
    assert names["mgrit"].report.forward.evaluations > 28
    assert names["logits"].shape == (16, 10)
    assert names["by_prefix"].shape == (4, 16, 10)
    assert names["large"].prefixes == 6
    assert (tmp_path / "my-model" / "model.safetensors").exists()


def test_commands_and_linked_files_exist() -> None:
    for command in re.findall(r"^(?:paradepth|torchrun .* -m paradepth) (\w+)", README, flags=re.MULTILINE):
        assert command in COMMANDS
    for link in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / link).exists(), link
