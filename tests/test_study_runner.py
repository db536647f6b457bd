"""The study runner: only what is missing, side by side, and cells that start from others."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from paradepth.studies.runner import run_study
from study_runner_helpers import FakeRunner, cell_after, fake_cell, fake_study, quick_runner


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRunner:
    return quick_runner(tmp_path, monkeypatch)


# --- running -----------------------------------------------------------------------------------------------------


def test_a_study_from_nothing_to_its_report(tmp_path: Path) -> None:
    runner = FakeRunner(tmp_path)
    study = fake_study(
        fake_cell("b-0", label="b"), fake_cell("b-1", label="b", seed=1), fake_cell("a-0", label="a", group="large")
    )
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


def test_a_pattern_chooses_cells_and_rerun_repeats_them(runner: FakeRunner) -> None:
    study = fake_study(fake_cell("a-0", label="a"), fake_cell("a-1", label="a", seed=1), fake_cell("b-0"))
    assert runner(study, only="a-*")["done"] == ["a-0", "a-1"]
    results = json.loads((runner.out / "results.json").read_text())
    assert results["missing"] == ["b-0"]
    assert runner(study, only="?-0")["done"] == ["b-0"]
    assert runner(study, only="a-1", rerun=True)["done"] == ["a-1"]
    assert runner.calls == ["train a-1"]
    with pytest.raises(ValueError, match=r"no cell of study fake matches 'c\*'; there are a-0, a-1, b-0"):
        runner(study, only="c*")


def test_changed_options_make_a_cell_missing_and_a_changed_label_does_not(runner: FakeRunner) -> None:
    cell = fake_cell("a", width=64)
    runner(fake_study(cell, fake_cell("b")))
    relabelled = dataclasses.replace(cell, label="new label", group="new group")
    assert runner(fake_study(relabelled, fake_cell("b")))["skipped"] == ["a", "b"]
    groups = json.loads((runner.out / "results.json").read_text())["groups"]
    assert [(group["name"], [row["label"] for row in group["rows"]]) for group in groups] == [
        ("new group", ["new label"]),
        ("small", ["b"]),
    ]
    for changed in (
        fake_cell("a", width=96),
        fake_cell("a", width=96, seed=1),
        dataclasses.replace(cell, recipe="other"),
    ):
        assert runner(fake_study(changed, fake_cell("b")))["done"] == ["a"]
        assert runner.calls == ["train a"]
        assert runner.said[0] == f"a counts as missing: {runner.out / 'cells' / 'a.json'} was made with other options"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_record_counts_as_missing(runner: FakeRunner, content: str) -> None:
    runner(fake_study(fake_cell("a")))
    (runner.out / "cells" / "a.json").write_text(content)
    assert runner(fake_study(fake_cell("a")))["done"] == ["a"]
    assert runner.said[0].startswith(f"a counts as missing: {runner.out / 'cells' / 'a.json'}")
    assert runner.record("a")["accuracy"] == [0.61, 0.71]


def test_a_failed_cell_is_explained_and_stops_no_other(runner: FakeRunner) -> None:
    cells = [
        fake_cell("a", behaviour="fail"),
        fake_cell("b", behaviour="die"),
        fake_cell("c", behaviour="no end"),
        fake_cell("d"),
    ]
    summary = runner(fake_study(*cells))
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

    again = runner(fake_study(fake_cell("a"), *cells[1:]))
    assert (again["done"], again["skipped"]) == (["a"], ["d"])


def test_a_cell_that_diverged_is_a_result_where_the_study_says_so(tmp_path: Path) -> None:
    runner = FakeRunner(tmp_path)
    cells = [
        fake_cell("a"),
        fake_cell("b", label="b", behaviour="diverge"),
        fake_cell("c", group="large", behaviour="diverge"),
    ]
    seen: list[dict[str, Any]] = []

    def findings(records: list[dict[str, Any]]) -> list[str]:
        seen[:] = records
        return ["Some diverged."]

    study = fake_study(*cells, findings=findings, may_diverge=True)
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
    strict = runner(fake_study(*cells))
    assert (strict["done"], strict["skipped"]) == ([], ["a"])
    assert [failure["name"] for failure in strict["failed"]] == ["b", "c"]
    assert any("is the record of a run that diverged" in line for line in runner.said)
    results = json.loads((runner.out / "results.json").read_text())
    assert results["missing"] == ["b", "c"]

    with pytest.raises(ValueError, match="cell b starts from a, which may diverge"):
        fake_study(cells[0], cell_after(cells[0], "b"), may_diverge=True)


def test_a_run_that_failed_otherwise_has_not_diverged(runner: FakeRunner) -> None:
    cells = [fake_cell("a", behaviour="fail"), fake_cell("b", behaviour="die"), fake_cell("c", behaviour="no end")]
    summary = runner(fake_study(*cells, may_diverge=True))
    assert [failure["name"] for failure in summary["failed"]] == ["a", "b", "c"]
    assert not list((runner.out / "cells").iterdir())


def test_a_group_without_rows_is_left_out_of_the_report(tmp_path: Path) -> None:
    runner = FakeRunner(tmp_path)
    assert runner(fake_study(fake_cell("a"), fake_cell("b", group="large")), only="a")["done"] == ["a"]
    assert "small" in (runner.out / "report.html").read_text().lower()


def test_a_command_that_cannot_be_started_is_a_failed_cell(runner: FakeRunner) -> None:
    summary = runner(fake_study(fake_cell("a")), command=lambda cell, run: [str(runner.base / "no such program")])
    assert "could not be started" in summary["failed"][0]["reason"]
    assert "no such program" in summary["failed"][0]["reason"]
    assert not (runner.out / "report.html").exists()


def test_cells_run_side_by_side(runner: FakeRunner) -> None:
    # Each waits for the other to have started, and c for d: with two workers only these pairs can meet.
    cells = [fake_cell(name, behaviour=f"meet {other}") for name, other in ("ab", "ba", "cd", "dc")]
    assert sorted(runner(fake_study(*cells), workers=2)["done"]) == ["a", "b", "c", "d"]


def test_bad_arguments_are_refused(runner: FakeRunner) -> None:
    study = fake_study(fake_cell("a"))
    with pytest.raises(ValueError, match="workers is 0"):
        run_study(study, out=runner.out, workers=0)
    with pytest.raises(ValueError, match=r"data folder .*nowhere does not exist"):
        run_study(study, out=runner.out, data_dir=runner.base / "nowhere")
    assert not runner.out.exists()


# --- cells that start from others -------------------------------------------------------------------------------


def test_a_cell_waits_for_the_one_it_starts_from(runner: FakeRunner) -> None:
    # b meets c, so both run at a time; d needs b, which needs a.
    a = fake_cell("a")
    b = cell_after(a, "b", behaviour="meet c")
    d, c = dataclasses.replace(cell_after(b, "d"), label="twice tuned"), fake_cell("c", behaviour="meet b")
    assert sorted(runner(fake_study(d, b, a, c), workers=2)["done"]) == ["a", "b", "c", "d"]
    order = [call.split()[1] for call in runner.calls]
    assert order.index("a") < order.index("b") < order.index("d")
    assert runner.record("b")["after"] == "a"
    assert "after" not in runner.record("a")


def test_a_source_whose_run_is_gone_runs_again(runner: FakeRunner) -> None:
    a, study = fake_cell("a"), fake_study(fake_cell("a"), cell_after(fake_cell("a"), "b"))
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
    assert (runner(fake_study(a, cell_after(a, "b")))["skipped"], runner.calls) == (["a", "b"], [])


def test_a_cell_fails_with_the_one_it_starts_from(runner: FakeRunner) -> None:
    a = fake_cell("a", behaviour="fail")
    b = cell_after(a, "b")
    summary = runner(fake_study(a, b, dataclasses.replace(cell_after(b, "c"), label="twice tuned"), fake_cell("d")))
    assert summary["done"] == ["d"]
    reasons = {failure["name"]: failure["reason"] for failure in summary["failed"]}
    assert list(reasons) == ["a", "b", "c"]
    assert reasons["b"] == "a, which it starts from, failed"
    assert reasons["c"] == "b, which it starts from, failed"
