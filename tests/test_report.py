"""The HTML report: what it shows, that it stands alone, what it refuses."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fake_runs import CLASSES, make_run, make_study
from paradepth.report import write_report, write_study_report
from paradepth.report.examples import first_right
from paradepth.report.figure import SERIES_LIGHT, css_color, dash, series
from paradepth.report.page import write_page
from paradepth.report.plots import late_range
from paradepth.report.read import read_run

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects text, ids, and what a browser would fetch; checks that tags nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: Counter[str] = Counter()
        self.words: list[str] = []
        self.source = path.read_text()
        self.feed(self.source)
        assert self.open == [], f"tags left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in VOID:
            self.open.append(tag)
        self._attributes(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self._attributes(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def _attributes(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            assert not name.startswith("on"), f"an event handler: {name}"
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                self.references.append(value or "")

    @property
    def text(self) -> str:
        return re.sub(r"[\s\u202f]+", " ", " ".join(self.words))

    @property
    def title(self) -> str:
        found = re.search(r"<h1>(.*?)</h1>", self.source)
        assert found is not None
        return found[1]


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def replace_line(path: Path, number: int, text: str) -> None:
    lines = path.read_text().splitlines()
    lines[number - 1] = text
    path.write_text("\n".join(lines) + "\n")


def small_study(seeds: int = 3) -> dict[str, Any]:
    """The first three rows of each group, which draw faster than all."""
    study = make_study(seeds=seeds)
    for group in study["groups"]:
        group["rows"] = group["rows"][:3]
    return study


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "finished")


def test_run_page_shows_what_the_files_say(finished: Path) -> None:
    out = write_report([finished])
    assert out == finished / "report.html"
    page, run = Page(out), read_run(finished)
    assert page.title == "PF 4×2 on Fashion-MNIST"
    assert run.evaluation is not None
    for value in run.evaluation["accuracy"]:
        assert f"{100 * value:.2f} %" in page.text
    for wanted in ("404,618", "520,000,000", "21 min 40 s", "2.65 PFLOP", "AMD EPYC 7B13", "stagewise"):
        assert wanted in page.text
    assert "paradepth train fashion_paraformer --schedule stagewise --seed 0" in page.text
    assert page.tags["img"] == 24
    assert all(name in page.text for name in CLASSES)
    diagonal = [run.evaluation["confusion"][k][k] for k in range(10)]
    assert re.findall(r'class="right"[^>]*>(\d+)<', page.source) == [str(count) for count in diagonal]


@pytest.mark.parametrize("kind", ["run", "serial", "comparison", "study"])
def test_pages_are_self_contained(kind: str, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    if kind == "study":
        write_study_report(make_study(), out)
    elif kind == "comparison":
        write_report([finished, make_run(tmp_path / "vit", branches=0, depth=8)], out)
    else:
        write_report([finished if kind == "run" else make_run(tmp_path / "vit", branches=0, depth=8)], out)
    page = Page(out)
    assert all(ref.startswith(("#", "data:image/png;base64,")) for ref in page.references)
    assert not re.search(r"https?://|@import|url\((?!#)", page.source)
    assert page.tags["script"] == page.tags["link"] == page.tags["iframe"] == 0
    assert [name for name, count in Counter(page.ids).items() if count > 1] == []
    inside = {ref[1:] for ref in page.references if ref.startswith("#")} | set(
        re.findall(r"url\(#([^)]+)\)", page.source)
    )
    assert inside, "plots refer to their markers and clip paths"
    assert inside <= set(page.ids)
    assert not re.search(r"#0[12]0[234][0-9a-f]{2}\b", page.source), "a marker colour was left in a drawing"
    declared = set(re.findall(r"(--[a-z0-9]+):", page.source))
    assert set(re.findall(r"var\((--[a-z0-9]+)\)", page.source)) <= declared | {"--share"}


def test_same_run_gives_the_same_page(finished: Path, tmp_path: Path) -> None:
    first, second = (write_report([finished], tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_serial_run_has_no_branches(tmp_path: Path) -> None:
    page = Page(write_report([make_run(tmp_path / "vit", branches=0, depth=8, schedule="joint")]))
    assert page.title == "serial depth 8 on Fashion-MNIST"
    assert "What each branch adds" not in page.text
    assert "right from prefix" not in page.text


def test_many_classes_are_drawn_not_tabulated(tmp_path: Path) -> None:
    names = [f"kind {index}" for index in range(100)]
    page = Page(write_report([make_run(tmp_path / "run", branches=8, depth=1, classes=names)]))
    assert 'class="confusion' not in page.source
    assert "<image" in page.source
    assert "Most frequent confusions" in page.text


def test_interrupted_run_says_so(tmp_path: Path) -> None:
    page = Page(write_report([make_run(tmp_path / "run", progress=0.4)]))
    assert "Training did not reach its end" in page.text
    assert "step 960" in page.text
    assert "no test evaluation" in page.text
    assert "Only 2 of 4 branches were in use" in page.text
    assert "Validation accuracy" in page.text
    assert len(read_run(tmp_path / "run").accuracy) == 2


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", progress=0.5, evaluated=False)
    before = write_report([run], tmp_path / "before.html").read_text()
    with open(run / "metrics.jsonl", "ab") as log:
        log.write(b'{"event": "train", "step": 99')
    assert write_report([run], tmp_path / "after.html").read_text() == before


def test_run_that_has_only_started(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", progress=0.0)
    page = Page(write_report([run]))
    assert "Nothing has been logged yet" in page.text
    assert "Nothing has been measured yet" in page.text
    assert "different" not in Page(write_report([run, make_run(tmp_path / "other")], tmp_path / "both.html")).title


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    for number, line in enumerate(lines):
        event = json.loads(line)
        if event["event"] == "train" and number % 5 == 0:
            lines[number] = json.dumps(event | {"loss": float("nan"), "accuracy": None})
        if event["event"] == "validation" and event["step"] > 2000:
            lines[number] = json.dumps(event | {"loss": [float("inf")] * 4, "accuracy": [None] * 4})
    (run / "metrics.jsonl").write_text("\n".join(lines))
    edit(run / "evaluation.json", lambda value: value.update(accuracy=[None] * 4, loss=[float("nan")] * 4))
    page = Page(write_report([run]))
    assert not re.search(r">\s*(nan|inf)\b", page.source, flags=re.IGNORECASE)
    Page(write_report([run, make_run(tmp_path / "other")], tmp_path / "both.html"))


def test_resumed_run_forgets_what_it_repeats(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines()
    steps = [json.loads(line).get("step", 0) for line in lines]
    killed = [line for line, step in zip(lines, steps, strict=True) if step <= 1500]
    again = [line for line, step in zip(lines, steps, strict=True) if step > 1200]
    log.write_text("\n".join([*killed, json.dumps({"event": "resumed", "step": 1200, "layer_evals": 2.6e8}), *again]))
    once = [json.loads(line)["step"] for line in lines if '"train"' in line]
    loaded = read_run(run)
    assert [event["step"] for event in loaded.train] == once
    assert [event["active"] for event in loaded.stages] == [1, 2, 3, 4]
    assert "resumed once" in Page(write_report([run])).text


def test_text_from_files_is_escaped(tmp_path: Path) -> None:
    attack = '<script>alert("x")</script>'
    names = [f"{attack}{index}" for index in range(3)]
    run = make_run(tmp_path / "run", classes=names)
    edit(run / "environment.json", lambda value: value.update(command=f"paradepth train {attack}", cpu=attack))
    edit(run / "config.json", lambda value: value["training"].update(data=attack, note="$x_{$ & <b>"))
    page = Page(write_report([run]))
    assert page.tags["script"] == page.tags["b"] - 24 == 0
    assert attack in page.text
    study = small_study()
    study |= {"title": attack, "findings": [attack]}
    study["groups"][0]["rows"][0]["label"] = "<b>$\\frac$ & " + attack
    study["groups"][0]["name"] = attack
    page = Page(write_study_report(study, tmp_path / "study.html"))
    assert page.tags["script"] == page.tags["b"] == 0
    assert attack in page.title.replace("&lt;", "<").replace("&gt;", ">").replace("&#34;", '"')


@pytest.mark.parametrize("name", ["config.json", "environment.json", "metrics.jsonl", "evaluation.json"])
@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe\x00", b'{"a": 1', b"[1]\n", b"null"])
def test_empty_or_damaged_files_are_named(name: str, content: bytes, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}(, line 1)?:"):
        write_report([run])
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("name", ["config.json", "environment.json", "metrics.jsonl"])
def test_missing_files_are_named(name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        write_report([run])


@pytest.mark.parametrize(
    "line",
    [
        "garbage",
        '{"event": "train", "step": 3',
        '{"step": 3}',
        '{"event": "train", "step": "three", "layer_evals": 1}',
        '{"event": "train", "step": 3, "layer_evals": 1, "loss": "low"}',
        '{"event": "validation", "step": 3, "layer_evals": 1, "loss": [1], "accuracy": []}',
        '{"event": "validation", "step": 3, "layer_evals": 1, "loss": [1], "accuracy": ["good"]}',
        '{"event": "stage", "step": 3, "layer_evals": 1}',
    ],
)
def test_damaged_line_of_the_log_is_named(line: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    replace_line(run / "metrics.jsonl", 17, line)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 17: "):
        write_report([run])


def test_damaged_json_names_its_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    replace_line(run / "config.json", 5, '"image_size": oops,')
    with pytest.raises(ValueError, match=r"config\.json, line 5: not valid JSON"):
        write_report([run])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accuracy": []}, "'accuracy' is \\[\\]"),
        ({"confusion": [[1, 2], [3]]}, "not a square table"),
        ({"confusion": [[1]]}, "1 rows for 10 classes"),
        ({"examples": [{"png": "aGVsbG8=", "label": 1, "prediction": 1, "confidence": 1.0}]}, "not a base64 PNG"),
        ({"examples": [{"png": "", "label": 10, "prediction": 1, "confidence": 1.0}]}, "class 10, allowed are 0 to 9"),
    ],
)
def test_evaluation_that_does_not_fit_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    edit(run / "evaluation.json", lambda value: value.update(change))
    with pytest.raises(ValueError, match=rf"evaluation\.json: .*{message}"):
        write_report([run])


def test_wrong_calls_are_refused(finished: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other")
    with pytest.raises(ValueError, match="no run directory"):
        write_report([])
    with pytest.raises(ValueError, match="needs an output file"):
        write_report([finished, other])
    with pytest.raises(ValueError, match="given twice"):
        write_report([other, other / "." / ".." / "other"], tmp_path / "out.html")
    with pytest.raises(ValueError, match="does not exist"):
        write_report([tmp_path / "nowhere"])


def test_comparison_says_when_compute_is_not_matched(finished: Path, tmp_path: Path) -> None:
    near = make_run(tmp_path / "near", seed=1, compute=5.2e8 * 1.015)
    far = make_run(tmp_path / "far", seed=2, compute=5.2e8 * 1.05)
    small = make_run(tmp_path / "small", branches=0, depth=2)
    out = tmp_path / "out.html"
    assert Page(write_report([finished, near], out)).title.endswith("matched in layer evaluations and parameters")
    assert "not matched" not in Page(out).title
    assert Page(write_report([finished, far], out)).title.endswith(", not matched in layer evaluations")
    assert Page(write_report([finished, small], out)).title.endswith(", not matched in parameters")
    assert Page(write_report([far, small], out)).title.endswith(", not matched in layer evaluations and parameters")


def test_comparison_ranks_runs_and_tells_equal_names_apart(tmp_path: Path) -> None:
    low = make_run(tmp_path / "a" / "run", schedule="joint", top=0.80, learning_rate=0.5)
    high = make_run(tmp_path / "b" / "run", top=0.90)
    page = Page(write_report([low, high], tmp_path / "out.html"))
    best = re.search(r'<tr class="best">(.*?)</tr>', page.source, flags=re.DOTALL)
    assert best is not None
    assert "b/run" in best[1]
    assert page.source.count('<tr class="best">') == 1
    untested = make_run(tmp_path / "untested", progress=0.5)
    assert '<tr class="best">' not in Page(write_report([high, untested], tmp_path / "both.html")).source
    for wanted in ("a/run", "schedule", "learning rate", "0.5", "What differs"):
        assert wanted in page.text


def test_axis_shows_the_end_of_every_line() -> None:
    short, long = ([1.0, 2.0, 3.0], [0.1, 0.5, 0.6]), ([10.0, 50.0, 100.0], [0.2, 0.8, 0.9])
    low, high = late_range([short, long], low=True) or (0.0, 0.0)
    assert low < 0.6 < 0.9 < high


def test_options_that_were_left_open_are_compared_by_what_was_built(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "asked", heads=2), make_run(tmp_path / "left", heads=None)]
    assert "heads" not in Page(write_report(runs, tmp_path / "out.html")).text


def test_study_shows_mean_and_sample_deviation(tmp_path: Path) -> None:
    study = small_study()
    page = Page(write_study_report(study, tmp_path / "study.html"))
    for group in study["groups"]:
        for row in group["rows"]:
            full = [100 * values[-1] for values in row["accuracy"]]
            assert f"{statistics.fmean(full):.2f}" in page.text
            assert f"± {statistics.stdev(full):.2f}" in page.text
    assert page.source.count('<tr class="best">') == len(study["groups"])
    assert "Small budget, not matched in parameters" in page.text
    first = re.search(r"<tbody>(.*?)</tbody>", page.source, flags=re.DOTALL)
    assert first is not None
    means = [float(value) for value in re.findall(r"<td>(\d\d\.\d\d)</td>", first[1])]
    assert means == sorted(means, reverse=True)
    assert len(means) == len(study["groups"][0]["rows"])


def test_study_of_one_seed_without_curves(tmp_path: Path) -> None:
    study = small_study(seeds=1)
    for group in study["groups"]:
        for row in group["rows"]:
            del row["curves"], row["seconds"]
    page = Page(write_study_report(study, tmp_path / "study.html"))
    assert "±" not in page.text
    assert "over compute" not in page.text


@pytest.mark.parametrize(
    ("key", "value"),
    [("seeds", []), ("accuracy", [[0.5]]), ("accuracy", [[0.5], [0.5, 0.6], [0.5]]), ("curves", [[(1, 0.5)]])],
)
def test_study_that_does_not_fit_together_is_refused(key: str, value: object, tmp_path: Path) -> None:
    study = make_study()
    study["groups"][1]["rows"][2][key] = value
    with pytest.raises(ValueError, match="group 'four times larger budget', row 'PF 4×2 joint'"):
        write_study_report(study, tmp_path / "study.html")
    assert not (tmp_path / "study.html").exists()


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "deep" / "page.html"
    write_page("old", target)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match="No space left"):
            write_page("new", target)
    assert target.read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == ["page.html"]
    assert write_page("new", target).read_text() == "new"


@pytest.mark.parametrize(
    ("by_prefix", "label", "expected"),
    [
        ([3, 3, 3], 3, "right from prefix 1"),
        ([1, 3, 3], 3, "right from prefix 2"),
        ([3, 1, 3], 3, "first right at prefix 1"),
        ([3, 1, 1], 3, "right at prefix 1, then lost"),
        ([1, 1, 1], 3, "no prefix right"),
        ([], 3, ""),
    ],
)
def test_first_right_prefix(by_prefix: list[int], label: int, expected: str) -> None:
    assert first_right({"label": label, "by_prefix": by_prefix}, 3) == expected


def test_series_are_told_apart() -> None:
    looks = {(css_color(series(index)), dash(index)) for index in range(4 * len(SERIES_LIGHT))}
    assert len(looks) == 4 * len(SERIES_LIGHT)
