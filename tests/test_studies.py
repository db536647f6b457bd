"""Every study: it runs at size smoke, is well-formed at the others, and what is committed of it is up to date."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import answer
from paradepth.continual import ContinualOptions
from paradepth.depth import IterativeExecutor
from paradepth.models import model_class, model_config
from paradepth.recipes import get_recipe
from paradepth.studies import STUDIES, get_study
from paradepth.studies.collect import collect
from paradepth.studies.forks import ForkServer
from paradepth.studies.measurements import check_measurement
from paradepth.studies.record import read_record
from paradepth.studies.runner import run_study
from paradepth.studies.study import Cell, Size
from paradepth.studies.tiny_data import write_tiny_data
from paradepth.train.config import Config, ModelOptions, ScheduleOptions, check_options
from paradepth.train.depth import build_controller, build_executor
from paradepth.train.schedules import Annealing, build_schedule
from paradepth.train.tasks import task_class
from test_docs import DOCS, blocks

ROOT = Path(__file__).resolve().parents[1]

# Cells, and a digest of their names and option hashes, of studies whose runs took hours: whoever changes them throws
# the runs away. A cell may be added.
COMMITTED = {
    "schedules": (69, "0ca40744f4ecec4e"),
    "stagewise": (33, "6eeb0671d27232cf"),
    "tasks": (96, "598d411fff162527"),
    "finetune_glue": (33, "069d43d4715cb6dd"),
    "continual": (90, "2f9e0ccb72056fc2"),
    "transfer": (114, "0cc61a04e4e86cfd"),
    "stability": (200, "46cad6ba7a124db1"),
}

# Pixels a side and channels, which the data would tell.
IMAGES = {"digits": (8, 1), "fashion_mnist": (28, 1), "cifar10": (32, 3), "cifar100": (32, 3)}


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    """One for all studies: they start in a moment each."""
    server = ForkServer(environment=os.environ)
    yield server
    server.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_every_study_runs_at_size_smoke(
    name: str, server: ForkServer, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[dict[str, Any]] = []
    monkeypatch.setattr("paradepth.report.write_study_report", lambda results, out: pages.append(results))
    study, said = get_study(name, "smoke"), []
    summary = run_study(study, out=tmp_path, data_dir=data, say=said.append, server=server)
    assert summary["failed"] == []
    assert not [line for line in said if "imports for itself" in line]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["missing"] == []
    assert results["findings"]
    assert results["protocol"]
    assert results["claims"]
    assert all(claim["verdict"] and claim["figure"] for claim in results["claims"])
    assert results["command"] == f"paradepth study {name} --size smoke"
    assert pages


def test_a_smoke_study_makes_its_own_data_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], server: ForkServer
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("paradepth.studies.spawn.ForkServer", lambda **_: server)
    monkeypatch.setattr(server, "close", lambda: None)
    summary = answer(capsys, "study", "finetune_glue", "--size", "smoke", "--only", "pretraining-serial-0")
    assert summary["out"] == "studies/finetune_glue-smoke"
    assert (tmp_path / "studies/finetune_glue-smoke/data/glue/sst2/train.jsonl").exists()
    page = (tmp_path / "studies/finetune_glue-smoke/report.html").read_text()
    for text in ("not run yet", "Protocol", "paradepth study finetune_glue --size smoke"):
        assert text in page


def test_the_example_of_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: ForkServer, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("paradepth.studies.spawn.ForkServer", lambda **_: server)
    monkeypatch.setattr(server, "close", lambda: None)
    names: dict[str, Any] = {}
    for block in blocks(DOCS / "studies.md", "python"):
        exec(block, names)
    assert names["done"]["failed"] == []
    assert len(names["done"]["done"]) == 6
    page = (tmp_path / "depths" / "report.html").read_text()
    for shown in ("A deeper ViT is more accurate at equal compute.", "accuracy over layers", "--size smoke"):
        assert shown.lower() in page.lower()
    assert names["measure"](seed=1, data_dir=None, run_dir=tmp_path, source=None)["by_depth"] == [1.0, 0.5, 0.25]


@pytest.mark.parametrize("size", ["here", "paper"])
@pytest.mark.parametrize("name", sorted(STUDIES))
def test_every_cell_is_well_formed(name: str, size: Size) -> None:
    study = get_study(name, size)
    seen: set[tuple[Any, ...]] = set()
    built: set[str] = set()
    for cell in study.cells:
        key = (cell.command, cell.recipe, json.dumps(dict(cell.options)), cell.after is None)
        if key not in seen:
            seen.add(key)
            _check(cell, built)
    assert {cell.seed for cell in study.cells} >= {0, 1, 2}
    assert study.protocol
    assert study.claims


def _check(cell: Cell, built: set[str]) -> None:
    """`built` has the shapes of which there has been a model."""
    options = dict(cell.options)
    if cell.command == "measure":
        check_measurement(cell.recipe, options)
        return
    if cell.command == "continual":
        own = {key: options.pop(key) for key in ("setting", "strategy", "memory", "new_depth") if key in options}
        ContinualOptions(scenario=cell.recipe, **own)
        check_options(Config().replace(**options))
        return
    start = get_recipe(cell.recipe) if cell.after is None else Config().replace(data=cell.recipe)
    config = start.replace(**options)
    check_options(config)
    if cell.after is not None:
        return  # the model is that of another cell
    task_class(config)
    m = config.model_options
    fields = model_class(m.model).config_class.__dataclass_fields__
    shape = {key: getattr(m, key) for key in ModelOptions.__dataclass_fields__ if key in fields}
    shape = {key: value for key, value in shape.items() if value is not None}
    d = config.data_options
    if d.data in IMAGES:
        size, channels = IMAGES[d.data]
        shape |= {"image_size": d.image_size or size, "channels": d.channels or channels}
    made = model_config(m.model, **shape)
    if repr(made) not in built:
        built.add(repr(made))
        with torch.device("meta"):
            model_class(m.model)(made)
    executor = build_executor(config.depth_options)
    if config.depth_options.control:
        assert isinstance(executor, IterativeExecutor)
        build_controller(executor, config.depth_options)
    chosen = {f.name: getattr(config.schedule_options, f.name) for f in dataclasses.fields(ScheduleOptions)}
    chosen = {f.name: chosen[f.name] for f in dataclasses.fields(ScheduleOptions) if chosen[f.name] != f.default}
    name = config.schedule_options.schedule
    chosen.pop("schedule", None)
    parts = ["stem", *(f"branch{k + 1}" for k in range(made.branches)), "head"]
    assert made.branches or name == "joint"
    build_schedule(name, parts if made.branches else ["stem", "trunk", "head"], Annealing(), chosen)


@pytest.mark.parametrize("name", sorted(COMMITTED))
def test_options_of_cells_that_took_hours_stay_as_they_are(name: str) -> None:
    count, digest = COMMITTED[name]
    cells = get_study(name).cells
    found = json.dumps(sorted([cell.name, cell.options_hash] for cell in cells))
    assert (len(cells), hashlib.sha256(found.encode()).hexdigest()[:16]) == (count, digest)


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_committed_records_are_of_the_study_as_it_is(name: str) -> None:
    study, folder = get_study(name), ROOT / "studies" / name
    cells = {cell.name: cell for cell in study.cells}
    for path in sorted((folder / "cells").glob("*.json")):
        assert path.stem in cells, f"{path.name} is of no cell"
        record, reason = read_record(cells[path.stem], folder, may_diverge=study.may_diverge)
        assert record is not None, reason
    if (folder / "results.json").exists():
        committed, now = json.loads((folder / "results.json").read_text()), collect(study, folder)
        assert committed["missing"] == now["missing"]
        assert committed["findings"] == now["findings"]
        assert committed.get("claims") == now["claims"]


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="size is 'huge', but must be one of smoke, here, paper"):
        get_study("tasks", "huge")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="unknown study 'none'; known are"):
        get_study("none")
