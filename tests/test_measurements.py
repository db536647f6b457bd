"""Cells that are measurements: their process, their records, and what the runner makes of them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paradepth.studies import measurements
from paradepth.studies.claim import PARAFORMER, Claim, Verdict
from paradepth.studies.collect import collect
from paradepth.studies.forks import ForkServer
from paradepth.studies.lines import lines
from paradepth.studies.measure import main, run_measurement
from paradepth.studies.measurements import MEASUREMENTS, check_measurement, composition, probes
from paradepth.studies.record import measured, read_diverged, read_run
from paradepth.studies.runner import run_study
from paradepth.studies.study import Cell, Curve, Study, Sweep, train_command

# A module of measurements, as one of paradepth.studies.measurements is.
MODULE = """
import json, math, time

def measure(*, seed, data_dir, run_dir, source, width=4, heights=(1, 2)):
    (run_dir / "note").write_text(str(data_dir))
    before = json.loads((source / "measured.json").read_text())["measures"]["area"] if source else 0
    return {"area": float(width * sum(heights) + seed), "sides": [1.0, 0.5, 0.25][: seed + 2], "before": before,
            "parameters": 10 * width, "layers": 2}

def lost(*, seed, data_dir, run_dir, source, how="return"):
    if how == "raise":
        raise FloatingPointError("the loss is nan in step 3")
    return {"error": math.nan}

def wrong(*, seed, data_dir, run_dir, source, what):
    if what == "refuse":
        raise ValueError("width is 0; it must be positive")
    if what == "fail":
        raise RuntimeError("no memory")
    return {"error": {"word": "much", "truth": True, "nested": [[1.0]]}[what]}

def wait(*, seed, data_dir, run_dir, source):
    (run_dir / "started").touch()
    time.sleep(60)
"""


@pytest.fixture
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`own`, `lost`, `wrong` and `wait` are measurements, in this process and in ones started from this folder."""
    (tmp_path / "own_measurements.py").write_text(MODULE)
    names = {"own": "own_measurements"} | {name: f"own_measurements:{name}" for name in ("lost", "wrong", "wait")}
    start = "\n".join(
        [
            "from paradepth.studies.measurements import MEASUREMENTS",
            f"MEASUREMENTS.update({names!r})",
            "from paradepth.studies.measure import main",
            "import sys",
            "sys.exit(main())",
        ]
    )
    (tmp_path / "start_measurement.py").write_text(start)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_measurements", raising=False)
    for name, place in names.items():
        monkeypatch.setitem(MEASUREMENTS, name, place)


pytestmark = pytest.mark.usefixtures("_module")


def cell(name: str, recipe: str = "own", *, label: str | None = None, seed: int = 0, **options: Any) -> Cell:
    return Cell(name, "sizes", label or name, recipe, options, seed, command="measure")


def study(*cells: Cell, **fields: Any) -> Study:
    own = {"name": "own", "title": "Sizes", "question": "How large?", "findings": lambda records: ["Large."]}
    return Study(**own | fields, cells=cells)


# ---- one measurement --------------------------------------------------------------------------------------------


def test_a_measurement_becomes_a_record(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    result = run_measurement("own", options={"width": 3, "heights": [4]}, seed=1, run_dir=run, data_dir=tmp_path)
    assert result["measures"] == {"area": 13.0, "sides": [1.0, 0.5, 0.25], "before": 0}
    assert json.loads((run / "measured.json").read_text()) == result
    assert (run / "note").read_text() == str(tmp_path)
    a = cell("a", width=3, heights=[4], seed=1)
    record = read_run(a, run)
    assert {key: record[key] for key in ("command", "parameters", "layers", "measures", "options_hash")} == {
        "command": "measure",
        "parameters": 30,
        "layers": 2,
        "measures": result["measures"],
        "options_hash": a.options_hash,
    }
    assert "layer_evals" not in record
    assert record["seconds"] >= 0
    assert record["environment"]["threads"] == 1
    assert "command" not in record["environment"]
    assert (measured(record, "area"), measured(record, "sides")) == ([13.0], [1.0, 0.5, 0.25])
    assert read_diverged(a, run) is None
    with pytest.raises(ValueError, match="the record of a has no 'error'; measured are area, sides, before"):
        measured(record, "error")


def test_a_measurement_empties_its_folder_first(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "measured.json").write_text("{}")
    with pytest.raises(RuntimeError, match="no memory"):
        run_measurement("wrong", options={"what": "fail"}, seed=0, run_dir=tmp_path / "run")
    with pytest.raises(ValueError, match=r"measured.json cannot be read"):
        read_run(cell("a", "wrong", what="fail"), tmp_path / "run")


@pytest.mark.parametrize(("how", "message"), [("return", "error is nan"), ("raise", "the loss is nan in step 3")])
def test_what_is_not_finite_is_no_figure(tmp_path: Path, how: str, message: str) -> None:
    with pytest.raises(FloatingPointError, match=message):
        run_measurement("lost", options={"how": how}, seed=0, run_dir=tmp_path / "run")
    found = read_diverged(cell("a", "lost", how=how), tmp_path / "run")
    assert found is not None
    assert (found["diverged"], found["name"]) == (message, "a")
    with pytest.raises(ValueError, match=message):
        read_run(cell("a", "lost"), tmp_path / "run")


@pytest.mark.parametrize("what", ["word", "truth", "nested"])
def test_what_is_no_number_is_an_error(tmp_path: Path, what: str) -> None:
    with pytest.raises(TypeError, match=r"measure 'error' is .*, but must be a number or a list of numbers"):
        run_measurement("wrong", options={"what": what}, seed=0, run_dir=tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("none", {}, "unknown measurement 'none'; known are"),
        ("own", {"depth": 1}, "measurement own has no option 'depth'; its options are width, heights"),
        ("wrong", {}, "measurement wrong needs the option 'what'"),
    ],
)
def test_options_are_checked_before_work_starts(
    tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_measurement(name, options)
    with pytest.raises(ValueError, match=message):
        run_measurement(name, options=options, seed=0, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["own", "--options", '{"width": 2}'], 0, '"area": 6.0'),
        (["own", "--options", "[1]"], 2, "refused: options are '[1]', but must be a JSON object"),
        (["wrong", "--options", '{"what": "refuse"}'], 2, "refused: width is 0"),
        (["wrong", "--options", '{"what": "fail"}'], 1, "failed: no memory"),
        (["lost"], 1, "failed: error is nan"),
    ],
)
def test_the_exit_status_says_how_it_went(
    tmp_path: Path,
    words: list[str],
    status: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)  # this process keeps its own
    assert main([*words, "--run-dir", str(tmp_path / "run")]) == status
    shown = capsys.readouterr()
    assert said in shown.out + shown.err


def test_the_command_line_of_a_measurement() -> None:
    before = cell("before")
    after = dataclasses.replace(cell("a", width=2, heights=(1, 2), seed=3), after=before, folder="c4")
    assert train_command(after, Path("out/runs/a"), data_dir=Path("data")) == [
        *(sys.executable, "-m", "paradepth.studies.measure", "own"),
        *("--options", '{"width": 2, "heights": [1, 2]}', "--seed", "3"),
        *("--data-dir", "data/c4", "--source", "out/runs/before", "--run-dir", "out/runs/a"),
    ]


# ---- studies of them ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forks() -> Iterator[ForkServer]:
    server = ForkServer(environment=os.environ, preloaded=("paradepth.studies.measure",))
    yield server
    server.close()


def command(cell: Cell, run: Path) -> list[str]:
    words = train_command(cell, run)
    return [*words[:2], "start_measurement", *words[3:]]


def test_a_study_of_measurements_from_nothing_to_its_report(tmp_path: Path, forks: ForkServer) -> None:
    a = [cell(f"a-{seed}", label="a", seed=seed, width=2) for seed in (0, 1)]
    b = [dataclasses.replace(cell(f"b-{s}", label="b", seed=s, width=8), after=a[s], group="after") for s in (0, 1)]
    lost = dataclasses.replace(cell("lost", "lost"), group="after")
    claim = Claim("large", "It is large.", PARAFORMER)
    curves = (Curve("sides", (1, 2, 4), "place", log_x=True, log_y=True), Sweep("area", "width", "width"))
    own = study(
        *a,
        *b,
        lost,
        may_diverge=False,
        claims=(claim,),
        protocol="Measured.",
        verdicts=lambda records: {"large": Verdict("holds", f"{len(records)} sizes.")},
        curves={"sizes": curves},
    )
    out, said = tmp_path / "out", []
    summary = run_study(own, out=out, say=said.append, command=command, server=forks)
    assert summary["done"] == ["a-0", "a-1", "b-0", "b-1"]
    assert [failure["name"] for failure in summary["failed"]] == ["lost"]
    assert "failed: error is nan" in summary["failed"][0]["reason"]
    assert any("a-1: area 7, sides of 3 values, before 0 in" in line for line in said)
    results = json.loads((out / "results.json").read_text())
    assert results["claims"] == [dataclasses.asdict(claim) | {"verdict": "", "figure": ""}]
    assert results["missing"] == ["lost"]
    sizes, after = results["groups"]
    assert sizes["measures"] == ["area", "sides", "before"]
    assert sizes["rows"][0]["measures"] == {
        "area": [6.0, 7.0],
        "sides": [[1.0, 0.5], [1.0, 0.5, 0.25]],
        "before": [0, 0],
    }
    assert after["rows"][0]["measures"]["before"] == [6.0, 7.0]
    assert [drawn["lines"] for drawn in sizes["drawn"]] == [
        [{"label": "a", "points": [[1, [1.0, 1.0]], [2, [0.5, 0.5]], [4, [0.25]]]}],
        [{"label": "", "points": [[2, [6.0, 7.0]]]}],
    ]
    page = (out / "report.html").read_text()
    for text in ("It is large.", "not run yet", "Measured.", "6.50 ± 0.71", "Missing cells: lost."):
        assert text in page

    # What is there is not measured again, and a measurement whose folder is gone is, for the one that starts from it.
    done = dataclasses.replace(own, cells=(*a, *b))
    assert run_study(done, out=out, say=said.append, command=command, server=forks)["done"] == []
    assert json.loads((out / "results.json").read_text())["claims"][0]["figure"] == "4 sizes."
    assert "4 sizes." in (out / "report.html").read_text()
    (out / "cells" / "b-1.json").unlink()
    for name in ("a-1", "b-1"):
        (out / "runs" / name / "measured.json").unlink()
    assert run_study(done, out=out, say=said.append, command=command, server=forks)["done"] == ["a-1", "b-1"]


def test_a_measurement_that_was_lost_is_a_result_where_the_study_says_so(tmp_path: Path, forks: ForkServer) -> None:
    own = study(cell("a"), cell("b", "lost", label="b"), may_diverge=True)
    said: list[str] = []
    summary = run_study(own, out=tmp_path / "out", say=said.append, command=command, server=forks)
    assert (summary["done"], summary["failed"]) == (["a", "b"], [])
    assert any("b: diverged: error is nan in" in line for line in said)
    note = collect(own, tmp_path / "out")["groups"][0]["note"]
    assert note == "Not in table and plots, because they diverged: b (seed 0, error is nan)."


def test_verdicts_are_those_of_the_claims(tmp_path: Path) -> None:
    claim = Claim("large", "It is large.", PARAFORMER)
    own = study(cell("a"), claims=(claim,), protocol="Measured.", verdicts=lambda records: {})
    run_measurement("own", options={}, seed=0, run_dir=tmp_path / "runs" / "a")
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "a.json").write_text(json.dumps(read_run(cell("a"), tmp_path / "runs" / "a")))
    with pytest.raises(ValueError, match=r"study own has verdicts for \[\], and claims \['large'\]"):
        collect(own, tmp_path)


def test_definitions_that_contradict_themselves_are_refused() -> None:
    run = Cell("run", "sizes", "run", "digits_vit", {}, 0)
    claim = Claim("large", "It is large.", PARAFORMER)
    with pytest.raises(ValueError, match="group 'sizes' has training runs and measurements"):
        study(cell("a"), run)
    with pytest.raises(ValueError, match="it needs a protocol and verdicts, too"):
        study(cell("a"), claims=(claim,))
    with pytest.raises(ValueError, match=r"curves for groups without cells: \['times'\]"):
        study(cell("a"), curves={"times": (Sweep("area", "width", "width"),)})
    with pytest.raises(ValueError, match="the runner sets 'source'"):
        cell("a", source="b")
    assert cell("a", init="b").options == {"init": "b"}  # not an option of training


def test_claims_and_verdicts_are_checked() -> None:
    for name in ("Large", "a b", "", "a--b"):
        with pytest.raises(ValueError, match="claim name"):
            Claim(name, "It is large.", PARAFORMER)
    with pytest.raises(ValueError, match="source is 'a paper'"):
        Claim("large", "It is large.", "a paper")
    with pytest.raises(ValueError, match="has no text"):
        Claim("large", " ", PARAFORMER)
    with pytest.raises(ValueError, match="verdict is 'perhaps'"):
        Verdict("perhaps", "Some.")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="needs the figures"):
        Verdict("holds", "")


# ---- what is drawn -----------------------------------------------------------------------------------------------


def rows(*found: tuple[str, dict[str, Any], dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [[{"name": label, "label": label, "options": o, "measures": m}] for label, o, m in found]


def test_a_sweep_groups_rows_by_options_and_leaves_out_what_is_no_number() -> None:
    of = rows(
        ("a", {"n": 4, "kind": "joint", "big": True}, {"error": 0.2}),
        ("b", {"n": 1, "kind": "joint", "big": True}, {"error": 0.4}),
        ("c", {"n": 1, "kind": "cycle", "big": False}, {"error": 0.3}),
        ("d", {"n": None, "kind": "cycle"}, {"error": 0.1}),
    )
    assert lines(Sweep("error", "n", "branches", lines=("kind", "big")), of)["lines"] == [
        {"label": "joint, big", "points": [[1, [0.4]], [4, [0.2]]]},
        {"label": "cycle, not big", "points": [[1, [0.3]]]},
    ]


def test_a_curve_takes_its_x_values_from_a_measure() -> None:
    of = rows(("a", {}, {"y": [1.0, 2.0], "x": [5, 7]}), ("b", {}, {"y": [3.0], "x": [5]}))
    assert lines(Curve("y", "x", "steps"), of)["lines"][1] == {"label": "b", "points": [[5, [3.0]]]}
    for curve in (Curve("y", (1,), "steps"), Curve("y", "z", "steps")):
        with pytest.raises(ValueError, match=r"a: y has 2 values for 1|has no 'z'"):
            lines(curve, of)


# ---- measurements of their own -----------------------------------------------------------------------------------


def test_every_measurement_is_there_and_takes_its_arguments_by_name() -> None:
    import inspect

    for name in MEASUREMENTS:
        function = measurements.get_measurement(name)
        parameters = inspect.signature(function).parameters
        assert set(measurements._GIVEN) <= set(parameters), name
        assert {p.kind for p in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}, name
        assert function.__doc__ or name in ("own", "lost", "wrong", "wait")


def test_probes_of_a_run(tmp_path: Path) -> None:
    def probe(step: int, forward: float | None, backward: float | None, cosine: float) -> dict[str, Any]:
        sides = {"forward": {"rho": forward}, "backward": {"rho": backward}}
        return {"event": "probe", "step": step, "cosine": cosine, **sides}

    events = [
        probe(0, None, None, 1.0),
        probe(20, 0.1, 0.05, 0.999),
        probe(40, 0.3, None, 0.99),
        probe(60, 0.2, 0.5, 0.9),
        {"event": "lipschitz", "step": 10, "estimates": [1.0, 1.0, 2.0, 4.0, 1.0, 1.0]},
        {"event": "lipschitz", "step": 60, "estimates": [2.0, 2.0, 2.0, 2.0, 4.0, 4.0]},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    found = probes.measure(seed=0, data_dir=None, run_dir=tmp_path, source=tmp_path)
    assert (found["step"], found["rho"]) == ([20, 40, 60], [0.1, 0.3, 0.5])
    assert (found["rank_correlation"], found["last_rho"]) == (1.0, 0.5)
    assert math.isclose(float(str(found["last_bias"])), 0.1)
    assert (found["growth_of_ends"], found["growth_of_middle"]) == (3.0, 0.75)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(events[1]))
    with pytest.raises(ValueError, match="has 1 probes and 0 Lipschitz estimates"):
        probes.measure(seed=0, data_dir=None, run_dir=tmp_path, source=tmp_path)
    with pytest.raises(ValueError, match="has to start from one"):
        probes.measure(seed=0, data_dir=None, run_dir=tmp_path, source=None)


@pytest.mark.parametrize("shared", ["layers", "branches"])
def test_four_processes_are_held_against_one(shared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import save_file

    calls: list[list[str]] = []

    def run(arguments: list[str]) -> None:
        calls.append(arguments)
        folder = Path(arguments[arguments.index("--run-dir") + 1])
        folder.mkdir(parents=True)
        value = {"one": 3.0, "four": 3.02, "start": 1.0}[folder.name]
        save_file({"w": torch.tensor([value, 1.0])}, folder / "model.safetensors")
        (folder / "evaluation.json").write_text(json.dumps({"accuracy": [0.1, value / 10]}))

    monkeypatch.setattr(composition, "_run", run)
    found = composition.measure(seed=2, data_dir=None, run_dir=tmp_path, source=None, shared=shared)
    assert math.isclose(float(str(found["difference"])), 0.01, rel_tol=1e-4)
    assert math.isclose(float(str(found["test_difference"])), 0.002, rel_tol=1e-4)
    assert calls[1][:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    assert f"--{'depth' if shared == 'layers' else 'branch'}-processes" in calls[1]
    with pytest.raises(ValueError, match="shared is 'heads'"):
        composition.measure(seed=2, data_dir=None, run_dir=tmp_path, source=None, shared="heads")  # pyright: ignore[reportArgumentType]
