"""The documentation says what is true: its code runs, its commands and options exist, its reference is complete."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import pkgutil
import re
import shlex
import subprocess
import sys
import types
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import paradepth
from paradepth.cli import COMMANDS, main
from paradepth.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SHORT = ["--budget", "2 steps", "--validations", "1", "--threads", "1", "--overwrite"]


def blocks(page: Path, language: str = "") -> list[str]:
    """The code blocks of a page in a language; "" are those that name none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [code for named, code in found if named == language]


def commands(page: Path) -> list[list[str]]:
    """The command lines of paradepth in the plain blocks of a page, in order, by words."""
    text = "\n".join(blocks(page)).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("paradepth ")]


@pytest.mark.parametrize("page", ["index", "concepts", "getting-started"])
def test_python_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = blocks(DOCS / f"{page}.md", "python")
    assert code
    names: dict[str, Any] = {}
    for block in code:
        exec(block, names)


@pytest.mark.slow
def test_the_commands_of_the_first_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draws = np.random.default_rng(0)
    for name in ("cat", "dog"):
        folder = tmp_path / "PICTURES" / "train" / name
        folder.mkdir(parents=True)
        for number in range(60):
            Image.fromarray(draws.integers(255, size=(8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    lines = commands(DOCS / "getting-started.md")
    assert [line[1] for line in lines] == ["train", "evaluate", "train", "report", "train", "predict", "train"]
    for line in lines:
        assert main([*line[1:], *(SHORT if line[1] == "train" else [])]) == 0, line
    assert (tmp_path / "comparison.html").is_file()
    assert json.loads((tmp_path / "runs" / "mgrit" / "config.json").read_text())["training"]["executor"] == "mgrit"


@pytest.mark.slow
def test_the_examples_of_extensions_are_one_program(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text("\n".join(blocks(DOCS / "extending.md", "python")))
    words = ["train", "stripes_gated", "--run-dir", "runs/stripes", "--json", "--precision", "float32"]
    done = subprocess.run([sys.executable, script, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["accuracy"]) == 3
    assert result["accuracy"][-1] > 0.9
    evaluation = json.loads((tmp_path / "runs" / "stripes" / "evaluation.json").read_text())
    assert len(evaluation["bits"]) == 3
    config = json.loads((tmp_path / "runs" / "stripes" / "config.json").read_text())
    assert config["model_type"] == "gated_classifier"
    assert config["training"]["schedule"] == "rotate"
    assert config["training"]["branch_executor"] == "forgetful"


def flags(words: list[str]) -> set[str]:
    """The options that a command says it has."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return set(re.findall(r"--[\w-]+", said.getvalue()))


def test_commands_and_their_options_exist() -> None:
    known: dict[str, set[str]] = {}
    training = flags(["train", "digits_paraformer"])
    assert "--run-dir" in training
    for page in PAGES:
        for line in commands(page):
            command = line[1]
            assert command in COMMANDS, (page.name, line)
            if command == "train":
                assert line[2].isupper() or line[2] in RECIPES, (page.name, line)
            if command not in known:
                known[command] = flags([command]) | (training if command in ("train", "finetune", "grow") else set())
            used = {word.partition("=")[0] for word in line if word.startswith("--")}
            missing = {name for name in used if name not in known[command] and f"--no-{name[2:]}" not in known[command]}
            assert not missing, (page.name, line, missing)


def packages() -> list[types.ModuleType]:
    names = [m.name for m in pkgutil.walk_packages(paradepth.__path__, "paradepth.") if m.ispkg]
    return [paradepth, *(importlib.import_module(name) for name in names)]


def public(package: types.ModuleType) -> dict[str, Any]:
    names = getattr(package, "__all__", None)
    if names is None:
        here = inspect.getmembers(package, lambda o: getattr(o, "__module__", None) == package.__name__)
        names = [name for name, thing in here if inspect.isfunction(thing) or inspect.isclass(thing)]
    return {name: getattr(package, name) for name in names if not name.startswith("_")}


def resolved(path: str) -> Any:
    """What a path names: attributes of the longest part of it that is a module."""
    parts = path.split(".")
    for count in range(len(parts) - 1, 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            found = importlib.import_module(".".join(parts[:count]))
            for part in parts[count:]:
                found = getattr(found, part)
            return found
    raise AssertionError(f"nothing is called {path}")


def test_every_public_name_is_in_the_reference() -> None:
    entries = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), flags=re.MULTILINE)
    assert len(entries) == len(set(entries))
    documented = [(path.rpartition(".")[2], resolved(path)) for path in entries]
    missing = [
        f"{package.__name__}.{name}"
        for package in packages()
        for name, thing in public(package).items()
        if not any(name == other and thing is value for other, value in documented)
    ]
    assert missing == []


def test_every_picture_is_drawn_by_the_script_and_reads_on_both_themes() -> None:
    script = (DOCS / "images" / "draw.py").read_text()
    drawn = {name.replace("_", "-") for name in re.findall(r"^def (\w+)\(\) -> Figure", script, flags=re.MULTILINE)}
    files = sorted((DOCS / "images").glob("*.svg"))
    assert {path.stem for path in files} == drawn
    used = "".join(page.read_text() for page in PAGES)
    for path in files:
        assert f"images/{path.name}" in used, path.name
        root = ET.parse(path).getroot()
        assert root.get("viewBox", "").startswith("0 0 420 "), path.name
        assert root.get("aria-label")
        style = root.findtext("{http://www.w3.org/2000/svg}style", "")
        assert "prefers-color-scheme:dark" in style
        assert not re.search(r"(?:fill|stroke): #(?!000)", path.read_text()), path.name  # a colour of one theme only
