"""What a study collects: by which measure, in which order, and of which runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paradepth.studies.collect import collect
from paradepth.studies.record import read_run
from study_runner_helpers import FakeRunner, fake_cell, fake_study, quick_runner


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRunner:
    return quick_runner(tmp_path, monkeypatch)


# --- what cells are compared by -------------------------------------------------------------------------------------


def test_a_study_says_what_its_groups_are_compared_by(tmp_path: Path) -> None:
    runner = FakeRunner(tmp_path)
    cells = [
        fake_cell("a-0"),
        fake_cell("b-0", label="b"),
        fake_cell("b-1", label="b", seed=1),
        fake_cell("c-0", group="large"),
    ]
    runner(fake_study(*cells, headline={"small": "bleu", "large": "loss"}))
    assert any("b-1: test bleu 30.5 in" in line for line in runner.said)
    small, large = json.loads((runner.out / "results.json").read_text())["groups"]
    assert (small["measure"], small["curve"], large["measure"], large["curve"]) == ("bleu", "loss", "loss", "loss")
    assert (small["note"], large["note"]) == ("Signature: tok:13a.", "")
    assert small["rows"][1]["bleu"] == [[30.0, 31.5], [30.0, 30.5]]
    assert large["rows"][0]["curves"] == [[[100.0, 2.0], [200.0, 1.0]]]
    page = (runner.out / "report.html").read_text()
    for text in ("<th>BLEU</th>", "<th>loss</th>", "<td>31.50</td>", "<td>0.9000</td>", "Validation loss over compute"):
        assert text in page


def test_a_measure_that_was_not_made_is_named(runner: FakeRunner) -> None:
    summary = runner(fake_study(fake_cell("a"), headline={"small": "chrf"}))
    assert "the record of a has no 'chrf'; measured are accuracy, loss, bleu" in summary["failed"][0]["reason"]
    assert not (runner.out / "cells" / "a.json").exists()
    runner(fake_study(fake_cell("a")))
    with pytest.raises(ValueError, match="the record of a has no 'chrf'"):
        collect(fake_study(fake_cell("a"), headline={"small": "chrf"}), runner.out)


# --- collecting --------------------------------------------------------------------------------------------------


def test_what_is_collected_stands_in_the_order_of_the_study(runner: FakeRunner) -> None:
    study = fake_study(
        fake_cell("z-1", label="z", seed=1),
        fake_cell("y-0", label="y", width=8),
        fake_cell("z-0", label="z", seed=0),
        fake_cell("x-0", label="x", group="large"),
        fake_cell("w-0", label="w", group="large", behaviour="fail"),
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


def test_what_a_killed_process_logged_after_its_checkpoint_does_not_count(runner: FakeRunner) -> None:
    cell = fake_cell("a")
    runner(fake_study(cell))
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
def test_an_unfinished_or_damaged_run_is_named(
    runner: FakeRunner, name: str, content: str | None, message: str
) -> None:
    cell = fake_cell("a")
    runner(fake_study(cell))
    path = runner.out / "runs" / "a" / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_run(cell, path.parent)
