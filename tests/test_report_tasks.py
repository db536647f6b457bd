"""Reports of every task: each page shows what belongs to its task and nothing of another's."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from fake_runs import make_run, write_json
from fake_task_runs import KINDS, make_task_run
from paradepth.report import write_report, write_study_report
from paradepth.report.kinds import kind_of
from paradepth.report.page import prefix_rows, table_measures
from paradepth.report.read import read_run
from paradepth.train.config import DataOptions
from paradepth.train.tasks import TASKS
from paradepth.train.tasks.base import EVERY_TASK_TAKES
from test_report import Page, edit, small_study

EXPECTED = {
    "causal_lm": ["bits per byte", "perplexity", "windows of 128 bytes", "that is the question", "What it writes"],
    "masked_lm": ["masked accuracy", "windows of 128 tokens", "masking", "the [MASK] of the king"],
    "sequence_classifier": ["Test F1", "Matthews correlation", "overlong and occasionally", "SST-2", "872 texts"],
    "hf_classifier": ["Test Matthews correlation", "Matthews correlation by prefix", "He left.", "CoLA"],
    "tagger": ["word accuracy", "features accuracy", "reflection", "is VERB", "sentences", "UD English EWT"],
    "translator": [
        "Test BLEU",
        "Signature of chrF: nrefs:1|nc:6",
        "tok:13a",
        "near many trees",
        "4 beams.",
        "prefix 3",
    ],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tasks")
    made = {kind: make_task_run(folder / kind, kind) for kind in KINDS}
    edit(made["sequence_classifier"] / "evaluation.json", lambda value: value.update(samples=872))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_shows_what_belongs_to_its_task(kind: str, runs: dict[str, Path]) -> None:
    page = Page(write_report([runs[kind]]))
    for wanted in EXPECTED[kind]:
        assert wanted in page.text, wanted
    for foreign in ("images", "patch size", "crop padding", "confidence 100") + (
        ("BLEU",) if kind != "translator" else ()
    ):
        assert foreign not in page.text, foreign
    assert page.tags["img"] == 0
    run = read_run(runs[kind])
    assert run.evaluation is not None
    for measure in run.measures:
        for value in run.evaluation[measure.key]:
            assert measure.show(value).replace("\u202f", " ") in page.text


@pytest.mark.parametrize(
    ("kind", "main", "curve"),
    [
        ("causal_lm", "bits_per_byte", "bits_per_byte"),
        ("masked_lm", "accuracy", "accuracy"),
        ("sequence_classifier", "accuracy", "accuracy"),
        ("hf_classifier", "matthews", "accuracy"),
        ("tagger", "accuracy", "accuracy"),
        ("translator", "bleu", "loss"),
    ],
)
def test_what_a_run_is_judged_by(kind: str, main: str, curve: str, runs: dict[str, Path]) -> None:
    run = read_run(runs[kind])
    assert (run.main.key, run.curve.key) == (main, curve)
    assert table_measures(run)[0].key == main
    values = run.values(main)
    assert [row["main"] for row in prefix_rows(run)] == [run.main.show(value) for value in values]
    assert prefix_rows(run)[1]["gain"] == run.main.difference(values[1] - values[0])


def test_an_unknown_measure_has_its_column(runs: dict[str, Path], tmp_path: Path) -> None:
    run = make_task_run(tmp_path / "run", "tagger")
    added = {"new_score": [0.1, 0.2, 0.3, 0.4567], "of_another_length": [1.0], "words_seen": 3, "colours": ["a"] * 4}
    edit(run / "evaluation.json", lambda value: value.update(added))
    page = Page(write_report([run]))
    assert "new score" in page.text
    assert "0.457" in page.text
    assert "of another length" not in page.text
    assert "colours" not in page.text


def test_what_an_evaluation_says_in_words_is_shown(tmp_path: Path) -> None:
    run = make_task_run(tmp_path / "run", "sequence_classifier")
    more = {"notes": ["Test labels are secret."], "mismatched": {"samples": 9832, "accuracy": [0.6, 0.7123]}}
    edit(run / "evaluation.json", lambda value: value.update(more))
    text = Page(write_report([run])).text
    assert "Test labels are secret." in text
    assert "Split 'mismatched' of 9,832 texts: accuracy 71.23 %." in text
    edit(run / "evaluation.json", lambda value: value.update(notes="Test labels are secret."))
    with pytest.raises(ValueError, match=r"'notes' is 'Test labels are secret\.', expected a list of sentences"):
        write_report([run])
    words = make_task_run(tmp_path / "words", "tagger")
    edit(words / "evaluation.json", lambda value: value.update(words=25094, samples=2077))
    assert "25,094 words in 2,077 sentences" in Page(write_report([words])).text


def test_an_encoder_of_another_library_is_named(tmp_path: Path) -> None:
    run = make_task_run(tmp_path / "run", "hf_classifier", branches=0, schedule="joint")
    inner = {"model_type": "bert", "num_hidden_layers": 6, "hidden_size": 384, "vocab_size": 30522}
    edit(run / "config.json", lambda value: value.update(model={"hf": inner, "context": 64, "num_classes": 2}))
    page = Page(write_report([run]))
    assert page.title == "bert depth 6 on CoLA"
    assert "Encoder of the transformers library of 6 layers, width 384" in page.text


def test_an_unknown_kind_of_model_is_shown_by_its_accuracy(tmp_path: Path) -> None:
    run = make_task_run(tmp_path / "run", "tagger")
    edit(run / "config.json", lambda value: value.update(model_type="fortune_teller"))
    assert "Test accuracy" in Page(write_report([run])).text
    assert kind_of("fortune_teller").main == ("accuracy",)


def test_validations_stand_in_for_an_evaluation(tmp_path: Path) -> None:
    page = Page(write_report([make_task_run(tmp_path / "run", "causal_lm", evaluated=False)]))
    assert "Validation bits per byte" in page.text
    assert "figures below are those of the last validation" in page.text
    page = Page(write_report([make_task_run(tmp_path / "other", "translator", evaluated=False)]))
    assert "Validation loss by prefix" in page.text
    assert "BLEU" not in page.text


def test_an_option_of_another_task_is_shown_where_it_is_set(tmp_path: Path) -> None:
    run = make_task_run(tmp_path / "run", "tagger")
    edit(run / "config.json", lambda value: value["training"].update(masking=0.2, columns=None, vocab_size=None))
    options = read_run(run).options
    assert options["masking"] == 0.2  # a kind that the table does not know well enough hides nothing
    assert "tags" in options
    assert "columns" not in options
    assert "vocab_size" not in options


def test_the_table_of_kinds_knows_every_task_and_its_options() -> None:
    known = {f.name for f in dataclasses.fields(DataOptions)} - set(EVERY_TASK_TAKES)
    for task in TASKS:
        kind = kind_of(task.model_class.model_type, task.data_names[0])
        assert kind.samples != "samples", task
        assert set(task.own_options) <= set(kind.options), task
        left = {name for name in known if not kind.foreign(name, None)}
        assert left <= set(task.own_options) | set(kind.options), (task, "an option that no kind has")


@pytest.mark.parametrize(
    ("kind", "example", "message"),
    [
        ("tagger", {"words": ["a"], "labels": ["X", "Y"], "prediction": ["X"]}, "not lists of the same length"),
        ("tagger", {"words": "a", "labels": ["X"], "prediction": ["X"]}, "not lists of the same length"),
        ("translator", {"source": "a", "reference": None, "translation": "b"}, "are not all text"),
        ("translator", {"source": "a", "reference": "", "translation": "", "by_prefix": 3}, "'by_prefix' is 3"),
        ("sequence_classifier", {"text": "a", "label": 2, "prediction": 0, "confidence": 1.0}, "class 2, allowed are"),
        ("sequence_classifier", {"text": "a", "label": 0, "prediction": "x", "confidence": "high"}, "'confidence' is"),
        ("masked_lm", ["a"], "expected an object"),
    ],
)
def test_examples_that_do_not_fit_are_refused(kind: str, example: Any, message: str, tmp_path: Path) -> None:
    run = make_task_run(tmp_path / "run", kind)
    edit(run / "evaluation.json", lambda value: value.update(examples=[example]))
    with pytest.raises(ValueError, match=rf"evaluation\.json: example 0.*{message}"):
        write_report([run])


def test_examples_are_escaped(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>"
    for kind, example in (
        ("causal_lm", {"prompt": attack, attack: attack}),
        ("tagger", {"words": [attack], "labels": [attack], "prediction": [attack + "2"]}),
        ("translator", {"source": attack, "reference": attack, "translation": attack}),
        ("sequence_classifier", {"text": attack, "label": attack, "prediction": attack + "2", "confidence": 0.5}),
    ):
        run = make_task_run(tmp_path / kind, kind)
        edit(
            run / "evaluation.json",
            lambda value, shown=example: value.update(examples=[shown], signatures={"bleu": attack}),
        )
        page = Page(write_report([run]))
        assert page.tags["script"] == 0
        assert attack in page.text


def test_comparison_ranks_by_what_the_task_is_judged_by(tmp_path: Path) -> None:
    good, bad = (make_task_run(tmp_path / name, "causal_lm", top=top) for name, top in (("good", 0.9), ("bad", 0.7)))
    # Accuracy the other way round: it must not decide.
    for run, accuracy in ((good, 0.1), (bad, 0.9)):
        edit(run / "evaluation.json", lambda value, low=accuracy: value.update(accuracy=[low] * 4))
    page = Page(write_report([bad, good], tmp_path / "out.html"))
    best = page.source.split('<tr class="best">')[1].split("</tr>")[0]
    assert "good" in best
    assert read_run(good).main.show(read_run(good).values("bits_per_byte")[-1]) in best
    for wanted in ("Validation bits per byte", "Validation next-token accuracy", "test bits per byte"):
        assert wanted in page.text


def test_comparison_of_runs_that_were_measured_differently(tmp_path: Path) -> None:
    tested, not_yet = (
        make_task_run(tmp_path / "a", "translator"),
        make_task_run(tmp_path / "b", "translator", evaluated=False),
    )
    page = Page(write_report([tested, not_yet], tmp_path / "out.html"))
    assert "BLEU" not in page.text  # only one has it: both are shown by their loss
    assert "others only validated" in page.text
    edit(not_yet / "config.json", lambda value: value["training"].update(data="multi30k"))
    images = make_run(tmp_path / "images", data="multi30k")
    page = Page(write_report([tested, images], tmp_path / "out.html"))
    assert "learned different tasks" in page.text
    assert '<tr class="best">' not in page.source


def test_a_study_is_ranked_by_the_measure_of_its_group(tmp_path: Path) -> None:
    study = small_study()
    first, second = study["groups"]
    first |= {"measure": "loss", "curve": "loss"}
    second |= {"measure": "bleu", "curve": "loss"}
    for row in first["rows"]:
        row["loss"] = [[2.5 - 2 * value for value in values] for values in row.pop("accuracy")]
    for row in second["rows"]:
        row["bleu"] = [[40 * value for value in values] for values in row.pop("accuracy")]
    page = Page(write_study_report(study, tmp_path / "study.html"))
    bodies = [part.split("</tbody>")[0] for part in page.source.split('<table class="wide">')[1:]]
    for body, group in zip(bodies, study["groups"], strict=True):
        rows = {row["label"]: math.fsum(x[-1] for x in row[group["measure"]]) / 3 for row in group["rows"]}
        order = sorted(rows, key=lambda label: rows[label] * (1 if group["measure"] == "loss" else -1))
        assert [body.index(f"{label}</th>") for label in order] == sorted(body.index(f"{x}</th>") for x in rows)
        digits = 4 if group["measure"] == "loss" else 2
        assert all(f"<td>{rows[label]:.{digits}f}</td>" in body for label in order)
    assert "Lower is better." in page.text
    del second["rows"][0]["bleu"]
    with pytest.raises(ValueError, match="'bleu' is missing"):
        write_study_report(study, tmp_path / "study.html")


def test_losses_that_overflow_are_left_out(tmp_path: Path) -> None:
    run = make_task_run(tmp_path / "run", "causal_lm")
    value = json.loads((run / "evaluation.json").read_text())
    write_json(run / "evaluation.json", value | {"perplexity": [math.inf] * 4})
    assert ">inf" not in Page(write_report([run])).source
