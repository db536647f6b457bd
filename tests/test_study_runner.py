"""The study runner: only what is missing, side by side, and nothing finished is ever lost."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

import paradepth
from paradepth.recipes import get_recipe
from paradepth.studies import get_study
from paradepth.studies.collect import collect
from paradepth.studies.forks import ForkServer
from paradepth.studies.record import read_run
from paradepth.studies.runner import Cell, Study, run_study
from paradepth.studies.study import train_command
from paradepth.train.config import check_options

# A training command in small: `fake.py train|resume RUN BEHAVIOUR SEED`. Like the real one it saves on SIGTERM.
FAKE = r"""
import json, os, pathlib, shutil, signal, sys, time
how, run, behaviour, seed = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
base = run.parent.parent.parent  # the test's folder
with open(base / "calls", "a") as calls:
    calls.write(f"{how} {run.name}\n")
if how == "train":
    shutil.rmtree(run, ignore_errors=True)
(run / "checkpoints").mkdir(parents=True, exist_ok=True)

def event(**values):
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(values) + "\n")

def save_and_end(*_):
    (run / "checkpoints" / "step-00000010").mkdir(exist_ok=True)
    event(event="interrupted", step=10, layer_evals=100.0)
    print("saved", flush=True)
    sys.exit(0)

def wait_for(path):
    deadline = time.monotonic() + 120
    while not path.exists():
        if time.monotonic() > deadline:
            sys.exit(f"{path.name} never came")
        time.sleep(0.01)

signal.signal(signal.SIGTERM, save_and_end)
print("hello from", run.name, flush=True)
if how == "train":
    event(event="start", parameters=1000, layers=4, forward_flops=[5, 6])
    event(event="stage", step=0, layer_evals=0.0, seconds=0.0, active=1, reason="start")
    event(event="validation", step=10, layer_evals=100.0, accuracy=[0.5, 0.5 + seed / 100], loss=[2.0, 2.0])
else:
    event(event="resumed", step=10, layer_evals=100.0)
(base / f"started-{run.name}").touch()
if behaviour == "fail":
    print("the loss is not finite in step 7", flush=True)
    sys.exit(1)
if behaviour == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "refuse resume" and how == "resume":
    print("every checkpoint is damaged", flush=True)
    sys.exit(2)
if behaviour == "diverge":
    (run / "environment.json").write_text(json.dumps({"python": "3.11", "command": f"paradepth train --run-dir {run}"}))
    event(event="diverged", step=12, layer_evals=120.0, flops=2e6, seconds=0.5, loss=None, gradient_norm=None)
    sys.exit(1)
if behaviour.startswith("meet "):
    wait_for(base / f"started-{behaviour[5:]}")
if behaviour == "wait":
    wait_for(base / "go")
event(event="validation", step=20, layer_evals=200.0, accuracy=[0.6, 0.7 + seed / 100], loss=[1.0, 1.0])
if behaviour != "no end":
    event(event="end", step=20, layer_evals=200.0, flops=3e6, seconds=1.5, reason="budget")
environment = {
    "python": "3.11", "cpu": "some cpu", "command": f"paradepth train --run-dir {run}",
    "threads": int(os.environ["OMP_NUM_THREADS"]) * int(os.environ["MKL_NUM_THREADS"]),
}
evaluation = {"accuracy": [0.61, 0.71 + seed / 100], "loss": [1.1, 0.9], "contribution": [0.3, 0.2], "samples": 7}
evaluation |= {"bleu": [30.0, 31.5 - seed], "signatures": {"bleu": "tok:13a"}}
evaluation |= {"class_names": ["a", "b"], "words": ["a", "b"]}
(run / "config.json").write_text("{}")
(run / "environment.json").write_text(json.dumps(environment))
(run / "evaluation.json").write_text(json.dumps(evaluation))
(run / "model.safetensors").touch()
"""


def _command(base: Path, how: str, *, forked: bool = False) -> Callable[[Cell, Path], list[str]]:
    script = base / "fake.py"
    script.write_text(FAKE)
    return lambda cell, run: [
        sys.executable,
        *(("-m", "fake") if forked else (str(script),)),  # modules are forked, by a server that runs in `base`
        how,
        str(run),
        str(cell.options.get("behaviour", "ok")),
        str(cell.seed),
    ]


def _cell(name: str, *, group: str = "small", label: str | None = None, seed: int = 0, **options: Any) -> Cell:
    return Cell(name=name, group=group, label=label or name, recipe="fake", options=options, seed=seed)


def _after(source: Cell, name: str, *, seed: int = 0, **options: Any) -> Cell:
    return dataclasses.replace(_cell(name, label="tuned", seed=seed, **options), after=source)


def _study(*cells: Cell, **fields: Any) -> Study:
    def findings(records: list[dict[str, Any]]) -> list[str]:
        best = max(records, key=lambda record: record["accuracy"][-1])
        return [f"{best['label']} is best of {len(records)}."]

    return Study(
        **{"name": "fake", "title": "A fake study", "question": "Does it run?", "findings": findings} | fields,
        cells=cells,
    )


class _Runner:
    """`run_study` on the fake command in the test's folder, with what it said and which commands it started."""

    def __init__(self, base: Path) -> None:
        self.base, self.out = base, base / "out"
        self.said: list[str] = []

    def __call__(self, study: Study, **options: Any) -> dict[str, Any]:
        self.said.clear()
        (self.base / "calls").write_text("")
        commands: dict[str, Any] = {"command": _command(self.base, "train"), "resume": _command(self.base, "resume")}
        summary = run_study(study, out=self.out, say=self.said.append, **(commands | options))
        assert not (self.out / ".lock").exists()
        return summary

    @property
    def calls(self) -> list[str]:
        return (self.base / "calls").read_text().splitlines()

    def record(self, name: str) -> dict[str, Any]:
        return json.loads((self.out / "cells" / f"{name}.json").read_text())


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Runner:
    # Plots take a second a time; the first test below draws them.
    monkeypatch.setattr("paradepth.report.write_study_report", lambda results, out: out.write_text(results["title"]))
    return _Runner(tmp_path)


def _wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie waits for nobody here: it is as good as gone.
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


# --- running -----------------------------------------------------------------------------------------------------


def test_a_study_from_nothing_to_its_report(tmp_path: Path) -> None:
    runner = _Runner(tmp_path)
    study = _study(_cell("b-0", label="b"), _cell("b-1", label="b", seed=1), _cell("a-0", label="a", group="large"))
    assert runner(study) == {"done": ["b-0", "b-1", "a-0"], "skipped": [], "failed": [], "out": str(runner.out)}
    assert runner.calls == ["train b-0", "train b-1", "train a-0"]
    assert runner.record("b-1") == {
        "name": "b-1",
        "group": "small",
        "label": "b",
        "recipe": "fake",
        "options": {},
        "seed": 1,
        "options_hash": study.cells[1].options_hash,
        "parameters": 1000,
        "layers": 4,
        "layer_evals": 200.0,
        "flops": 3e6,
        "seconds": 1.5,
        "accuracy": [0.61, 0.72],
        "validation_accuracy": [0.6, 0.71],
        "validation_loss": [1.0, 1.0],
        "loss": [1.1, 0.9],
        "measures": {"bleu": [30.0, 30.5]},
        "signatures": {"bleu": "tok:13a"},
        "contribution": [0.3, 0.2],
        "curve": [[100.0, 0.51], [200.0, 0.71]],
        "loss_curve": [[100.0, 2.0], [200.0, 1.0]],
        "stages": [{"event": "stage", "step": 0, "layer_evals": 0.0, "seconds": 0.0, "active": 1, "reason": "start"}],
        "environment": {"python": "3.11", "cpu": "some cpu", "threads": 1},
    }
    assert str(runner.base) not in (runner.out / "results.json").read_text()
    assert "hello from b-0" in (runner.out / "runs" / "b-0.log").read_text()
    page = (runner.out / "report.html").read_text().lower()
    for text in ("a fake study", "does it run?", "b is best of 3.", "small", "large"):
        assert text in page

    assert runner(study)["skipped"] == ["b-0", "b-1", "a-0"]
    assert runner.calls == []
    (runner.out / "cells" / "b-1.json").unlink()
    (runner.out / "runs" / "b-1.cell.json").unlink()
    summary = runner(study)
    assert (summary["done"], runner.calls) == (["b-1"], ["train b-1"])


def test_a_pattern_chooses_cells_and_rerun_repeats_them(runner: _Runner) -> None:
    study = _study(_cell("a-0", label="a"), _cell("a-1", label="a", seed=1), _cell("b-0"))
    assert runner(study, only="a-*")["done"] == ["a-0", "a-1"]
    results = json.loads((runner.out / "results.json").read_text())
    assert results["missing"] == ["b-0"]
    assert runner(study, only="?-0")["done"] == ["b-0"]
    assert runner(study, only="a-1", rerun=True)["done"] == ["a-1"]
    assert runner.calls == ["train a-1"]
    with pytest.raises(ValueError, match=r"no cell of study fake matches 'c\*'; there are a-0, a-1, b-0"):
        runner(study, only="c*")


def test_changed_options_make_a_cell_missing_and_a_changed_label_does_not(runner: _Runner) -> None:
    cell = _cell("a", width=64)
    runner(_study(cell, _cell("b")))
    relabelled = dataclasses.replace(cell, label="new label", group="new group")
    assert runner(_study(relabelled, _cell("b")))["skipped"] == ["a", "b"]
    groups = json.loads((runner.out / "results.json").read_text())["groups"]
    assert [(group["name"], [row["label"] for row in group["rows"]]) for group in groups] == [
        ("new group", ["new label"]),
        ("small", ["b"]),
    ]
    for changed in (_cell("a", width=96), _cell("a", width=96, seed=1), dataclasses.replace(cell, recipe="other")):
        assert runner(_study(changed, _cell("b")))["done"] == ["a"]
        assert runner.calls == ["train a"]
        assert runner.said[0] == f"a counts as missing: {runner.out / 'cells' / 'a.json'} was made with other options"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_record_counts_as_missing(runner: _Runner, content: str) -> None:
    runner(_study(_cell("a")))
    (runner.out / "cells" / "a.json").write_text(content)
    assert runner(_study(_cell("a")))["done"] == ["a"]
    assert runner.said[0].startswith(f"a counts as missing: {runner.out / 'cells' / 'a.json'}")
    assert runner.record("a")["accuracy"] == [0.61, 0.71]


def test_a_failed_cell_is_explained_and_stops_no_other(runner: _Runner) -> None:
    cells = [_cell("a", behaviour="fail"), _cell("b", behaviour="die"), _cell("c", behaviour="no end"), _cell("d")]
    summary = runner(_study(*cells))
    assert summary["done"] == ["d"]
    failed = {failure["name"]: failure["reason"] for failure in summary["failed"]}
    assert list(failed) == ["a", "b", "c"]
    assert "ended with status 1" in failed["a"]
    assert failed["a"].endswith("hello from a\nthe loss is not finite in step 7")
    assert "ended by SIGKILL" in failed["b"]
    assert "no 'end' event: the run is not finished" in failed["c"]
    assert runner.said[-4] == "fake: 1 done, 0 already there, 3 failed"
    assert [line.split()[1] for line in runner.said[-3:]] == ["a", "b", "c"]
    results = json.loads((runner.out / "results.json").read_text())
    assert results["missing"] == ["a", "b", "c"]
    assert results["findings"] == ["No findings yet: 3 of 4 cells are missing."]

    again = runner(_study(_cell("a"), *cells[1:]))
    assert (again["done"], again["skipped"]) == (["a"], ["d"])


def test_a_cell_that_diverged_is_a_result_where_the_study_says_so(tmp_path: Path) -> None:
    runner = _Runner(tmp_path)
    cells = [_cell("a"), _cell("b", label="b", behaviour="diverge"), _cell("c", group="large", behaviour="diverge")]
    seen: list[dict[str, Any]] = []

    def findings(records: list[dict[str, Any]]) -> list[str]:
        seen[:] = records
        return ["Some diverged."]

    study = _study(*cells, findings=findings, may_diverge=True)
    summary = runner(study)
    assert (summary["done"], summary["failed"]) == (["a", "b", "c"], [])
    assert "[2/3] b: diverged at step 12 in 0 s" in runner.said
    assert runner.record("b") == {
        "name": "b",
        "group": "small",
        "label": "b",
        "recipe": "fake",
        "options": {"behaviour": "diverge"},
        "seed": 0,
        "options_hash": cells[1].options_hash,
        "parameters": 1000,
        "layers": 4,
        "layer_evals": 120.0,
        "flops": 2e6,
        "seconds": 0.5,
        "diverged": 12,
        "environment": {"python": "3.11"},
    }
    assert [record.get("diverged") for record in seen] == [None, 12, 12]
    results = json.loads((runner.out / "results.json").read_text())
    small, large = results["groups"]
    assert [row["label"] for row in small["rows"]] == ["a"]
    assert small["note"] == "Not in table and plots, because they diverged: b (seed 0, step 12)."
    assert large["rows"] == []
    assert results["missing"] == []
    assert "because they diverged" in (runner.out / "report.html").read_text()
    assert (runner(study)["skipped"], runner.calls) == (["a", "b", "c"], [])

    # A run that ended so while no runner watched is taken as it is.
    (runner.out / "cells" / "b.json").unlink()
    assert (runner(study)["done"], runner.calls) == (["b"], [])

    # Where it is no result, the record counts as missing and the cell fails.
    strict = runner(_study(*cells))
    assert (strict["done"], strict["skipped"]) == ([], ["a"])
    assert [failure["name"] for failure in strict["failed"]] == ["b", "c"]
    assert any("is the record of a run that diverged" in line for line in runner.said)
    results = json.loads((runner.out / "results.json").read_text())
    assert results["missing"] == ["b", "c"]

    with pytest.raises(ValueError, match="cell b starts from a, which may diverge"):
        _study(cells[0], _after(cells[0], "b"), may_diverge=True)


def test_a_run_that_failed_otherwise_has_not_diverged(runner: _Runner) -> None:
    cells = [_cell("a", behaviour="fail"), _cell("b", behaviour="die"), _cell("c", behaviour="no end")]
    summary = runner(_study(*cells, may_diverge=True))
    assert [failure["name"] for failure in summary["failed"]] == ["a", "b", "c"]
    assert not list((runner.out / "cells").iterdir())


def test_a_group_without_rows_is_left_out_of_the_report(tmp_path: Path) -> None:
    runner = _Runner(tmp_path)
    assert runner(_study(_cell("a"), _cell("b", group="large")), only="a")["done"] == ["a"]
    assert "small" in (runner.out / "report.html").read_text().lower()


def test_a_command_that_cannot_be_started_is_a_failed_cell(runner: _Runner) -> None:
    summary = runner(_study(_cell("a")), command=lambda cell, run: [str(runner.base / "no such program")])
    assert "could not be started" in summary["failed"][0]["reason"]
    assert "no such program" in summary["failed"][0]["reason"]
    assert not (runner.out / "report.html").exists()


def test_cells_run_side_by_side(runner: _Runner) -> None:
    # Each waits for the other to have started, and c for d: with two workers only these pairs can meet.
    cells = [_cell(name, behaviour=f"meet {other}") for name, other in ("ab", "ba", "cd", "dc")]
    assert sorted(runner(_study(*cells), workers=2)["done"]) == ["a", "b", "c", "d"]


def test_bad_arguments_are_refused(runner: _Runner) -> None:
    study = _study(_cell("a"))
    with pytest.raises(ValueError, match="workers is 0"):
        run_study(study, out=runner.out, workers=0)
    with pytest.raises(ValueError, match=r"data folder .*nowhere does not exist"):
        run_study(study, out=runner.out, data_dir=runner.base / "nowhere")
    assert not runner.out.exists()


# --- cells that start from others -------------------------------------------------------------------------------


def test_a_cell_waits_for_the_one_it_starts_from(runner: _Runner) -> None:
    # b meets c, so both run at a time; d needs b, which needs a.
    a = _cell("a")
    b = _after(a, "b", behaviour="meet c")
    d, c = dataclasses.replace(_after(b, "d"), label="twice tuned"), _cell("c", behaviour="meet b")
    assert sorted(runner(_study(d, b, a, c), workers=2)["done"]) == ["a", "b", "c", "d"]
    order = [call.split()[1] for call in runner.calls]
    assert order.index("a") < order.index("b") < order.index("d")
    assert runner.record("b")["after"] == "a"
    assert "after" not in runner.record("a")


def test_a_source_whose_run_is_gone_runs_again(runner: _Runner) -> None:
    a, study = _cell("a"), _study(_cell("a"), _after(_cell("a"), "b"))
    runner(study)
    (runner.out / "cells" / "b.json").unlink()
    (runner.out / "runs" / "b.cell.json").unlink()
    assert (runner(study)["done"], runner.calls) == (["b"], ["train b"])

    (runner.out / "cells" / "b.json").unlink()
    (runner.out / "runs" / "b.cell.json").unlink()
    (runner.out / "runs" / "a" / "model.safetensors").unlink()
    summary = runner(study, only="b")
    assert (summary["done"], summary["skipped"], runner.calls) == (["a", "b"], [], ["train a", "train b"])
    assert "a runs, too: b starts from it and its run directory is not there" in runner.said
    assert (runner(_study(a, _after(a, "b")))["skipped"], runner.calls) == (["a", "b"], [])


def test_a_cell_fails_with_the_one_it_starts_from(runner: _Runner) -> None:
    a = _cell("a", behaviour="fail")
    b = _after(a, "b")
    summary = runner(_study(a, b, dataclasses.replace(_after(b, "c"), label="twice tuned"), _cell("d")))
    assert summary["done"] == ["d"]
    reasons = {failure["name"]: failure["reason"] for failure in summary["failed"]}
    assert list(reasons) == ["a", "b", "c"]
    assert reasons["b"] == "a, which it starts from, failed"
    assert reasons["c"] == "b, which it starts from, failed"


def test_what_a_cell_starts_from_is_part_of_it() -> None:
    a, other = _cell("a"), _cell("a", x=1)
    assert _after(a, "b").options_hash != _cell("b").options_hash
    assert _after(a, "b").options_hash != _after(other, "b").options_hash
    assert _after(a, "b").options_hash == _after(dataclasses.replace(a, label="new label"), "b").options_hash
    assert train_command(_after(a, "b", head_rate=2), Path("out/runs/b"), data_dir=Path("data"))[3:] == [
        *("finetune", "out/runs/a", "--task", "fake", "--head-rate", "2", "--seed", "0", "--threads", "1"),
        *("--data-dir", "data", "--run-dir", "out/runs/b", "--overwrite", "--no-report", "--json"),
    ]
    for option in ("init", "task"):
        with pytest.raises(ValueError, match=f"'{option}' is not an option of its own"):
            _after(a, "b", seed=0, **{option: "elsewhere"})


# --- what cells are compared by -------------------------------------------------------------------------------------


def test_a_study_says_what_its_groups_are_compared_by(tmp_path: Path) -> None:
    runner = _Runner(tmp_path)
    cells = [_cell("a-0"), _cell("b-0", label="b"), _cell("b-1", label="b", seed=1), _cell("c-0", group="large")]
    runner(_study(*cells, headline={"small": "bleu", "large": "loss"}))
    assert any("b-1: test bleu 30.5 in" in line for line in runner.said)
    small, large = json.loads((runner.out / "results.json").read_text())["groups"]
    assert (small["measure"], small["curve"], large["measure"], large["curve"]) == ("bleu", "loss", "loss", "loss")
    assert (small["note"], large["note"]) == ("Signature: tok:13a.", "")
    assert small["rows"][1]["bleu"] == [[30.0, 31.5], [30.0, 30.5]]
    assert large["rows"][0]["curves"] == [[[100.0, 2.0], [200.0, 1.0]]]
    page = (runner.out / "report.html").read_text()
    for text in ("<th>BLEU</th>", "<th>loss</th>", "<td>31.50</td>", "<td>0.9000</td>", "Validation loss over compute"):
        assert text in page


def test_a_measure_that_was_not_made_is_named(runner: _Runner) -> None:
    summary = runner(_study(_cell("a"), headline={"small": "chrf"}))
    assert "the record of a has no 'chrf'; measured are accuracy, loss, bleu" in summary["failed"][0]["reason"]
    assert not (runner.out / "cells" / "a.json").exists()
    runner(_study(_cell("a")))
    with pytest.raises(ValueError, match="the record of a has no 'chrf'"):
        collect(_study(_cell("a"), headline={"small": "chrf"}), runner.out)


@pytest.mark.parametrize("name", ["schedules", "stagewise"])
def test_every_cell_can_still_be_trained_whatever_its_recipe_has_become(name: str) -> None:
    for options in {json.dumps([cell.recipe, dict(cell.options)]) for cell in get_study(name).cells}:
        recipe, chosen = json.loads(options)
        config = get_recipe(recipe).replace(**chosen)
        check_options(config)
        m = config.model_options
        given = {f.name: getattr(m, f.name) for f in dataclasses.fields(m) if f.name != "model"}
        given = {option: value for option, value in given.items() if value is not None}
        model = paradepth.create_model(m.model, image_size=28, channels=1, **given)
        assert model.config.layers in (2, 8)


# --- interruptions -----------------------------------------------------------------------------------------------


def _interruptible() -> Study:
    return _study(_cell("quick"), _cell("slow", behaviour="wait"), _cell("slow2", behaviour="wait"))


def _run_interruptible(base: Path, forked: bool) -> None:
    os.chdir(base)
    with open(base / "said", "w") as said:
        run_study(
            _interruptible(),
            out=base / "out",
            workers=2,
            say=lambda line: print(line, file=said, flush=True),
            command=_command(base, "train", forked=forked),
            resume=_command(base, "resume", forked=forked),
            server=ForkServer(environment=os.environ, preloaded=()) if forked else None,
        )


def _start_in_background(base: Path, *, forked: bool = False) -> BaseProcess:
    # Forked, for a new interpreter would take seconds to import torch.
    child = multiprocessing.get_context("fork").Process(target=_run_interruptible, args=(base, forked))
    child.start()
    # The fake cells save their checkpoint on SIGTERM only once they have started.
    _wait_until(lambda: (base / "started-slow").exists() and (base / "started-slow2").exists())
    return child


def _stop(child: BaseProcess, number: int) -> None:
    assert child.pid is not None
    os.kill(child.pid, number)
    child.join(120)
    assert child.exitcode is not None


def _cell_pids(base: Path) -> dict[str, int]:
    return json.loads((base / "out" / ".lock").read_text())["cells"]


@pytest.mark.parametrize("forked", [False, True], ids=["new processes", "forked"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_stopped_study_goes_on_where_it_was(runner: _Runner, number: signal.Signals, forked: bool) -> None:
    child = _start_in_background(runner.base, forked=forked)
    pids = _cell_pids(runner.base)
    assert sorted(pids) == ["slow", "slow2"]
    _stop(child, number)
    # multiprocessing makes 1 of a KeyboardInterrupt.
    assert child.exitcode == (1 if number == signal.SIGINT else 128 + number)
    said = (runner.base / "said").read_text()
    assert "stopped with 1 of 3 cells there; run it again to go on" in said
    assert "failed" not in said
    assert not any(_is_alive(pid) for pid in pids.values())
    assert runner.record("quick")["accuracy"] == [0.61, 0.71]
    for name in ("slow", "slow2"):
        assert (runner.out / "runs" / name / "checkpoints" / "step-00000010").is_dir()
        assert not (runner.out / "cells" / f"{name}.json").exists()

    (runner.base / "go").touch()
    summary = runner(_interruptible())
    assert (summary["done"], summary["skipped"]) == (["slow", "slow2"], ["quick"])
    assert runner.calls == ["resume slow", "resume slow2"]
    log = (runner.out / "runs" / "slow.log").read_text()
    assert log.splitlines() == ["hello from slow", "saved", "hello from slow"]
    assert runner.record("slow")["curve"] == [[100.0, 0.5], [200.0, 0.7]]


def test_an_interrupted_run_of_other_options_is_not_resumed(runner: _Runner) -> None:
    child = _start_in_background(runner.base)
    _stop(child, signal.SIGTERM)
    assert runner(_study(_cell("slow", behaviour="ok")))["done"] == ["slow"]
    assert runner.calls == ["train slow"]


def test_a_refused_resume_starts_again(runner: _Runner) -> None:
    study = _study(_cell("a", behaviour="refuse resume"))
    runner(study)
    (runner.out / "cells" / "a.json").unlink()
    (runner.out / "runs" / "a" / "evaluation.json").unlink()
    (runner.out / "runs" / "a" / "checkpoints" / "step-00000010").mkdir()
    assert runner(study)["done"] == ["a"]
    assert runner.calls == ["resume a", "train a"]
    assert "a: cannot be resumed (every checkpoint is damaged); starts again" in runner.said


def test_a_finished_run_without_record_is_not_repeated(runner: _Runner) -> None:
    runner(_study(_cell("a")))
    before = runner.record("a")
    (runner.out / "cells" / "a.json").unlink()
    assert runner(_study(_cell("a")))["done"] == ["a"]
    assert runner.calls == []
    assert runner.record("a") == before


@pytest.mark.parametrize("forked", [False, True], ids=["new processes", "forked"])
def test_cells_of_a_killed_runner_keep_others_out_until_they_end(runner: _Runner, forked: bool) -> None:
    child = _start_in_background(runner.base, forked=forked)
    pids = _cell_pids(runner.base)
    try:
        with pytest.raises(ValueError, match=f"is in use by process {child.pid} .cells slow: {pids['slow']}, slow2:"):
            run_study(_interruptible(), out=runner.out)
        _stop(child, signal.SIGKILL)
        with pytest.raises(ValueError, match=f"is in use by process {child.pid} "):
            run_study(_interruptible(), out=runner.out)
        (runner.base / "go").touch()
        _wait_until(lambda: not any(_is_alive(pid) for pid in pids.values()))
    finally:
        for pid in pids.values():
            if _is_alive(pid):
                os.kill(pid, signal.SIGKILL)
    # What they achieved counts, and the lock file they left does not keep anyone out.
    assert runner(_interruptible())["done"] == ["slow", "slow2"]
    assert runner.calls == []
    assert runner.said[0].startswith(f"took over the lock that process {child.pid} ")


def test_one_runner_at_a_time(runner: _Runner) -> None:
    refusals: list[str] = []

    def say(line: str) -> None:
        if line == "a: started":
            with pytest.raises(ValueError, match="is in use by process") as caught:
                run_study(_study(_cell("b")), out=runner.out)
            refusals.append(str(caught.value))

    run_study(_study(_cell("a")), out=runner.out, say=say, command=_command(runner.base, "train"))
    assert len(refusals) == 1
    assert f"process {os.getpid()} (cells a: " in refusals[0]
    assert runner(_study(_cell("b")))["done"] == ["b"]  # nothing is left of the lock


def test_an_error_in_the_runner_leaves_no_process_behind(runner: _Runner) -> None:
    pids: list[int] = []

    def say(line: str) -> None:
        if line == "slow: started":
            _wait_until((runner.base / "started-slow").exists)
            pids.extend(_cell_pids(runner.base).values())
            raise RuntimeError("the terminal is gone")

    with pytest.raises(RuntimeError, match="the terminal is gone"):
        run_study(
            _study(_cell("slow", behaviour="wait")),
            out=runner.out,
            say=say,
            command=_command(runner.base, "train"),
        )
    assert len(pids) == 1
    assert not _is_alive(pids[0])
    assert not (runner.out / ".lock").exists()


# --- collecting --------------------------------------------------------------------------------------------------


def test_what_is_collected_stands_in_the_order_of_the_study(runner: _Runner) -> None:
    study = _study(
        _cell("z-1", label="z", seed=1),
        _cell("y-0", label="y", width=8),
        _cell("z-0", label="z", seed=0),
        _cell("x-0", label="x", group="large"),
        _cell("w-0", label="w", group="large", behaviour="fail"),
        notes={"small": "Six epochs."},
    )
    runner(study)
    path = runner.out / "cells" / "y-0.json"
    path.write_text(json.dumps(runner.record("y-0") | {"layer_evals": 300.0, "environment": {"python": "3.12"}}))
    results = collect(study, runner.out)
    assert {key: results[key] for key in ("name", "title", "question", "command", "missing", "environment")} == {
        "name": "fake",
        "title": "A fake study",
        "question": "Does it run?",
        "command": "paradepth study fake",
        "missing": ["w-0"],
        "environment": {"python": "3.11 / 3.12", "cpu": "some cpu", "threads": 1},
    }
    small, large = results["groups"]
    assert small["name"] == "small"
    assert small["note"] == "Six epochs. Not matched in compute: from 200 to 300 layer evaluations."
    assert large["note"] == "Missing cells: w-0."
    assert [row["label"] for row in small["rows"]] == ["z", "y"]
    row = small["rows"][0]
    assert row["seeds"] == [1, 0]
    assert row["accuracy"] == [[0.61, 0.72], [0.61, 0.71]]
    assert row["curves"] == [[[100.0, 0.51], [200.0, 0.71]], [[100.0, 0.5], [200.0, 0.7]]]
    assert (row["layers"], row["parameters"], row["layer_evals"], row["seconds"]) == (4, 1000, 200.0, [1.5, 1.5])
    assert small["rows"][1]["options"] == {"width": 8}


def test_what_a_killed_process_logged_after_its_checkpoint_does_not_count(runner: _Runner) -> None:
    cell = _cell("a")
    runner(_study(cell))
    run = runner.out / "runs" / "a"
    start, *rest = (run / "metrics.jsonl").read_text().splitlines()
    lost = json.dumps({"event": "validation", "step": 15, "layer_evals": 150.0, "accuracy": [0.1, 0.1]})
    resumed = json.dumps({"event": "resumed", "step": 10, "layer_evals": 100.0})
    (run / "metrics.jsonl").write_text("\n".join([start, *rest[:2], lost, resumed, *rest[2:]]))
    assert read_run(cell, run)["curve"] == [[100.0, 0.5], [200.0, 0.7]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{"event": "start"}\n{"ev', r"metrics.jsonl, line 2, is damaged"),
        ("metrics.jsonl", "", r"metrics.jsonl has no 'start' event"),
        ("evaluation.json", "{", r"evaluation.json is damaged"),
        ("evaluation.json", '{"accuracy": []}', r"evaluation.json has no test accuracy"),
        ("evaluation.json", '{"accuracy": [1]}', r"lacks 'loss'"),
        ("environment.json", None, r"environment.json cannot be read"),
        ("config.json", None, r"config.json cannot be read"),
    ],
)
def test_an_unfinished_or_damaged_run_is_named(runner: _Runner, name: str, content: str | None, message: str) -> None:
    cell = _cell("a")
    runner(_study(cell))
    path = runner.out / "runs" / "a" / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_run(cell, path.parent)


# --- definitions -------------------------------------------------------------------------------------------------


def test_the_command_line_of_a_cell() -> None:
    options = {
        "schedule": "one_pass",
        "mlp_ratio": 2.5,
        "freeze": True,
        "ema": False,
        "weights": (1, 0.5),
        "init": None,
        "recompute": False,
    }
    cell = Cell(name="a", group="g", label="l", recipe="fashion_paraformer", options=options, seed=7)
    assert train_command(cell, Path("out/runs/a"), data_dir=Path("data")) == [
        *(sys.executable, "-m", "paradepth", "train", "fashion_paraformer"),
        *("--schedule", "one_pass", "--mlp-ratio", "2.5", "--freeze", "--no-ema", "--weights", "1", "0.5"),
        *("--init", "None", "--recompute", "False", "--seed", "7", "--threads", "1", "--data-dir", "data"),
        *("--run-dir", "out/runs/a", "--overwrite", "--no-report", "--json"),
    ]
    assert "--data-dir" not in train_command(cell, Path("out/runs/a"))


def test_the_hash_depends_on_values_and_not_on_their_order() -> None:
    assert _cell("a", x=1, y=[2]).options_hash == _cell("b", label="other", y=(2,), x=1).options_hash
    different = [_cell("a"), _cell("a", x=1), _cell("a", x=2), _cell("a", x="1"), _cell("a", x=1, seed=1)]
    assert len({cell.options_hash for cell in different}) == len(different)


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".a", "a b", "a.log", "a.cell.json", "ä"])
def test_names_that_are_not_safe_as_files_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"cell name .* is not allowed"):
        _cell(name)


@pytest.mark.parametrize("options", [{"seed": 1}, {"data-dir": "x"}, {"threads": 2}])
def test_options_of_the_runner_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the runner sets"):
        Cell(name="a", group="g", label="l", recipe="r", options=options, seed=0)


@pytest.mark.parametrize("value", [{"a": 1}, [[1]], Path("x"), {1}], ids=repr)
def test_option_values_that_are_no_words_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"option 'x' is .*, but must be"):
        _cell("a", x=value)


@pytest.mark.parametrize(
    ("cells", "fields", "message"),
    [
        ((), {}, "has no cells"),
        ((_cell("a"), _cell("a", label="b")), {}, "two cells named 'a'"),
        ((_cell("a", label="l"), _cell("b", label="l", seed=1, x=1)), {}, "differ in more than their seed"),
        ((_cell("a", label="l"), _cell("b", label="l")), {}, "the same seed twice"),
        ((_cell("a"),), {"notes": {"big": "?"}}, r"notes for groups without cells: \['big'\]"),
        ((_cell("a"),), {"headline": {"big": "loss"}}, r"headlines for groups without cells: \['big'\]"),
        ((_after(_cell("a"), "b"),), {}, "cell b starts from a, which is no cell of fake"),
        (
            (_cell("a"), _cell("b"), _after(_cell("a"), "c-0"), _after(_cell("b"), "c-1", seed=1)),
            {},
            "differ in more than their seed",
        ),
    ],
)
def test_studies_that_contradict_themselves_are_refused(
    cells: tuple[Cell, ...], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _study(*cells, **fields)
