"""`paradepth compress`: points, sharing, resuming, the chosen run, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import paradepth
from commands import answer, call
from paradepth.compress import Workbench, parse_plan
from paradepth.compress.frontier import Frontier
from paradepth.compress.measure import weigh
from paradepth.compress.run import compress_run
from paradepth.train import Interrupted, start_run
from paradepth.train.run import read_run_config
from paradepth.train.tasks import load_data
from paradepth.train.use import evaluate_run
from runs import tiny_config

PLANS = ("prefix=1+distil=2+int8", "prefix=1", "prefix=2", "prefix=1+distil=2", "magnitude=0.5")


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compress") / "trained"
    start_run(tiny_config("one_pass"), folder)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def records(run: Path) -> dict[str, Any]:
    found = [json.loads(path.read_text()) for path in (run / "compression" / "points").glob("*.json")]
    return {record["plan"]: {k: v for k, v in record.items() if k != "seconds"} for record in found}


def test_the_command_in_a_process_of_its_own_chooses_and_writes_a_run(run: Path) -> None:
    plans = [PLANS[0], "prefix=2", "magnitude=0.5"]
    words = ["compress", str(run), "--plans", *plans, "--max-size", "0.2x", "--test", "--threads", "1", "--json"]
    done = subprocess.run([sys.executable, "-m", "paradepth", *words], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    points = {point["plan"]: point for point in result["points"]}
    assert set(points) == {"full", *plans}
    full = points["full"]
    assert full["bytes"] == (run / "model.safetensors").stat().st_size
    assert full["test"]["accuracy"] == json.loads((run / "evaluation.json").read_text())["accuracy"][-1]
    for point in points.values():
        assert [row["batch"] for row in point["latency"]] == [1, 64]
        assert all(row["low_ms"] <= row["median_ms"] <= row["high_ms"] for row in point["latency"])
        assert 0 <= point["test"]["accuracy"] <= 1
    assert points["magnitude=0.5"]["nonzero"] < points["magnitude=0.5"]["parameters"] == full["parameters"]
    assert result["chosen"] == "prefix=1+distil=2+int8"  # nothing else is that small
    assert result["out"] == f"{run}-compressed"
    small = Path(result["out"])
    assert (small / "model.safetensors").stat().st_size == points[result["chosen"]]["bytes"] <= 0.2 * full["bytes"]
    origin = json.loads((small / "compression.json").read_text())
    assert (origin["plan"], origin["from"]) == (result["chosen"], str(run))
    assert origin["points"]["chosen"]["test"]["accuracy"] == points[result["chosen"]]["test"]["accuracy"]
    assert "Compression" in Path(result["report"]).read_text()
    assert "How it was made" in (small / "report.html").read_text()
    assert "measuring the latencies of 4 models" in done.stderr


def test_what_is_shared_is_computed_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = []
    tune = Workbench.tune
    monkeypatch.setattr(
        Workbench, "tune", lambda self, model, **options: tuned.append(1) or tune(self, model, **options)
    )
    plans = ["prefix=1+tune=2+neurons=32", "prefix=1+tune=2+magnitude=0.5", "prefix=1+tune=2"]
    compress_run(run, plans=plans, latency=False, say=quiet)
    assert len(tuned) == 1
    compress_run(run, plans=[*plans, "prefix=1+tune=2+heads=1"], latency=False, say=quiet)
    assert len(tuned) == 1


def test_a_point_is_what_its_steps_make_of_the_model(run: Path) -> None:
    compress_run(run, plans=["prefix=2", "prefix=2+magnitude=0.5"], latency=False, say=quiet)
    full = paradepth.from_pretrained(run)
    bench = Workbench.of_run(run, device="cpu")
    wanted = full.truncate(2)
    found = records(run)["prefix=2"]
    weight = weigh(wanted)
    assert (found["parameters"], found["bytes"], found["flops"]) == (weight.parameters, weight.bytes, weight.flops)
    result = bench.validate(wanted)
    assert (found["accuracy"], found["loss"]) == (result.accuracy[-1], result.loss[-1])
    stored = paradepth.from_pretrained(run / "compression" / "models" / "prefix=2+magnitude=0.5")
    pruned = parse_plan("magnitude=0.5")[0].apply(wanted, bench)
    for name, value in pruned.state_dict().items():
        torch.testing.assert_close(stored.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_frontier_that_was_stopped_goes_on_to_the_same_records(run: Path, tmp_path: Path, number: int) -> None:
    whole = shutil.copytree(run, tmp_path / "whole")
    compress_run(whole, plans=PLANS, latency=False, say=quiet)
    lines: list[str] = []

    def stop(line: str) -> None:
        lines.append(line)
        if line.startswith("[3/6]"):
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="goes on with the rest"):
        compress_run(run, plans=PLANS, latency=False, say=stop)
    assert signal.getsignal(number) == before
    assert len(records(run)) == 3
    lines.clear()
    compress_run(run, plans=PLANS, latency=False, say=lines.append)
    assert lines[0] == "3 of 6 points are there already"
    assert records(run) == records(whole)


def test_points_of_other_weights_are_missing(run: Path) -> None:
    compress_run(run, plans=["prefix=1"], latency=False, say=quiet)
    model = paradepth.from_pretrained(run)
    with torch.no_grad():
        model.head.classify.weight.mul_(2)
    training = json.loads((run / "config.json").read_text())["training"]
    model.save_pretrained(run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "training": training}))
    before = records(run)["prefix=1"]
    lines: list[str] = []
    compress_run(run, plans=["prefix=1"], latency=False, say=lines.append)
    after = records(run)["prefix=1"]
    assert before["model"] != after["model"]
    assert before["loss"] != after["loss"]
    assert [line[:5] for line in lines] == ["[1/2]", "[2/2]"]


def test_a_damaged_model_is_computed_again(run: Path) -> None:
    compress_run(run, plans=["prefix=1+magnitude=0.5"], latency=False, say=quiet)
    before = records(run)
    weights = run / "compression" / "models" / "prefix=1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    (run / "compression" / "points" / "prefix=1+magnitude=0.5.json").unlink()
    shutil.rmtree(run / "compression" / "models" / "prefix=1+magnitude=0.5")
    lines: list[str] = []
    compress_run(run, plans=["prefix=1+magnitude=0.5"], latency=False, say=lines.append)
    assert any("computed again" in line for line in lines)
    assert records(run) == before


def test_latencies_are_of_one_measurement(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[list[str]] = []

    def pretend(models: dict[str, Any], *, threads: int | None) -> dict[str, Any]:
        measured.append(sorted(models))
        return {
            name: [{"batch": b, "median_ms": 1.0, "low_ms": 1.0, "high_ms": 1.0} for b in (1, 64)] for name in models
        }

    load = [90.0]
    monkeypatch.setattr("os.getloadavg", lambda: (load[0],) * 3)
    monkeypatch.setattr("paradepth.compress.frontier.latencies", pretend)
    compress_run(run, plans=["prefix=1"], threads=1, say=quiet)
    compress_run(run, plans=["prefix=1"], threads=1, say=quiet)
    compress_run(run, plans=["prefix=2"], threads=1, say=quiet)
    compress_run(run, plans=["prefix=2"], threads=2, say=quiet)
    assert measured == [["full", "prefix=1"], *[["full", "prefix=1", "prefix=2"]] * 2]
    load[0] = 0.1  # what a busy machine measured is measured again on a quiet one, and not the other way round
    compress_run(run, plans=["prefix=2"], threads=2, say=quiet)
    load[0] = 90.0
    compress_run(run, plans=["prefix=2"], threads=2, say=quiet)
    assert len(measured) == 4


@pytest.mark.parametrize("plan", ["heads=1+neurons=40", "prefix=2+neurons=40+int8", "subset=1+magnitude=0.6"])
def test_the_chosen_run_is_like_any_other(
    run: Path, tmp_path: Path, plan: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    result = compress_run(run, plans=[plan], max_size="0.99x", out=out, latency=False, say=quiet)
    assert result["chosen"] == plan
    model = paradepth.from_pretrained(out)
    task = load_data(read_run_config(out), assets=out)
    assert task.shape == model.config
    measured = evaluate_run(out)
    assert measured["accuracy"] == pytest.approx(json.loads((out / "evaluation.json").read_text())["accuracy"])
    assert measured["parameters"] == json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["parameters"]
    assert evaluate_run(out, split="validation")["accuracy"][-1] == records(run)[plan]["accuracy"]
    report = answer(capsys, "report", out, run, "--out", tmp_path / "two.html")
    assert Path(report["report"]).exists()
    status, _, error = call(capsys, "resume", out)
    assert status == 2
    assert ("quantised" if "int8" in plan else "finished") in error
    if "int8" not in plan:  # it is finished, and can be shrunk further
        again = compress_run(out, plans=["magnitude=0.9"], latency=False, say=quiet)
        assert {point["plan"] for point in again["points"]} == {"full", "magnitude=0.9"}


def test_the_chosen_run_can_be_exported_and_predicts(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    compress_run(run, plans=["prefix=2+heads=1"], max_size="0.9x", out=out, latency=False, say=quiet)
    exported = answer(capsys, "export", out, "--format", "torch", "--no-latency")
    assert exported["difference"] < 1e-4
    from PIL import Image

    Image.new("L", (8, 8), 200).save(tmp_path / "grey.png")
    result = answer(capsys, "predict", out, tmp_path / "grey.png")
    assert len(result["predictions"]) == 1


def test_a_choice_is_among_the_named_plans_or_among_all(run: Path, tmp_path: Path) -> None:
    compress_run(run, plans=["prefix=1"], latency=False, say=quiet)
    limit = {"max_loss_of_accuracy": 100.0, "latency": False, "say": quiet}
    named = compress_run(run, plans=["prefix=2"], out=tmp_path / "a", **limit)
    assert named["chosen"] == "prefix=2"
    assert {point["plan"] for point in named["points"]} == {"full", "prefix=1", "prefix=2"}
    table = json.loads((run / "compression" / "frontier.json").read_text())
    assert table["chosen"]["chosen"] == "prefix=2"
    compress_run(run, plans=["prefix=2"], latency=False, say=quiet)
    assert json.loads((run / "compression" / "frontier.json").read_text())["chosen"] == table["chosen"]


def test_the_test_split_is_evaluated_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    options: dict[str, Any] = {"plans": ["prefix=1", "prefix=2"], "latency": False, "say": lines.append}
    compress_run(run, max_size="0.5x", out=tmp_path / "out", **options)
    compress_run(run, test=True, **options)
    assert [line for line in lines if "test split" in line] == ["evaluating the test split: prefix=2"]
    monkeypatch.setattr("paradepth.compress.workbench.Workbench.test", lambda *_, **__: pytest.fail("evaluated again"))
    again = compress_run(run, test=True, **options)
    assert all(point["test"] for point in again["points"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-size", "10"], "no point meets the limits (at most 10 bytes); the nearest is prefix=1"),
        (["--max-size", "much"], "max_size is 'much'"),
        (["--max-size", "0x"], "less than a byte"),
        (["--max-latency", "-1"], "max_latency is -1"),
        (["--max-latency", "1", "--no-latency"], "latencies are not to be measured"),
        (["--max-loss-of-accuracy", "-1"], "max_loss_of_accuracy is -1"),
        (["--out", "elsewhere"], "no limit is given"),
        (["--overwrite"], "no limit is given"),
        (["--max-size", "0.5x", "--out", "RUN"], "neither RUN nor around or inside it"),
        (["--max-size", "0.5x", "--out", "RUN/small"], "neither RUN nor around or inside it"),
        (["--max-size", "0.5x", "--out", "/dev/null/run"], "/dev/null/run"),
        (["--threads", "0"], "threads is 0"),
        (["--tune-steps", "3"], "tune_steps and quick belong to the default plans"),
        (["--quick"], "tune_steps and quick belong to the default plans"),
        (["--plans", "prefix=9"], "plan prefix=9 does not fit this run"),
        (["--plans", "prefix=1+subset=2"], "plan prefix=1+subset=2 does not fit this run"),
        (["--plans", "shrink"], "unknown step 'shrink'"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_bad_input_is_refused_with_status_2(
    run: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [] if "--plans" in words else ["--plans", "prefix=1"]
    latency = [] if "--max-latency" in words else ["--no-latency"]
    words = [word.replace("RUN", str(run)) for word in [*words, *named, *latency]]
    status, _, error = call(capsys, "compress", run, *words)
    assert status == 2, error
    assert said.replace("RUN", str(run)) in error
    if "nearest" not in said:
        assert not (run / "compression").exists()  # refused before work started


def test_runs_that_cannot_be_shrunk_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: object) -> str:
        status, _, error = call(capsys, "compress", *words, "--no-latency")
        assert status == 2
        return error

    assert "is not a run directory" in refused(tmp_path / "nothing")
    small = tmp_path / "small"
    compress_run(run, plans=["int8"], max_size="0.9x", out=small, latency=False, say=quiet)
    assert "quantised" in refused(small)
    assert "is not empty" in refused(run, "--plans", "prefix=1", "--max-size", "0.9x", "--out", small)
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    (unfinished / "model.safetensors").unlink()
    assert "is not finished" in refused(unfinished)
    blocked = shutil.copytree(run, tmp_path / "blocked")
    shutil.rmtree(blocked / "compression")
    (blocked / "compression").write_text("a file")
    assert "cannot be written" in refused(blocked, "--plans", "prefix=1")
    serial = tmp_path / "serial"
    start_run(tiny_config(model="vit_nano", branches=0, depth=2, budget="2 steps", validations=1), serial)
    assert "this model is a serial stack" in refused(serial, "--plans", "prefix=1")
    done = compress_run(serial, quick=True, tune_steps=1, latency=False, say=quiet)
    assert {point["plan"] for point in done["points"]} == {"full", "magnitude=0.7", "magnitude=0.7+tune=1", "int8"}


def test_a_model_of_texts_keeps_its_tokeniser(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("To be, or not to be: that is the question.\n" * 60)
    run, out = tmp_path / "run", tmp_path / "out"
    options: dict[str, Any] = {"model": "gpt_nano", "data": "text", "data_dir": tmp_path / "text.txt", "context": 16}
    options |= {"flip": False, "crop_padding": 0, "patch_size": None, "tokenizer": "bpe", "vocab_size": 300}
    start_run(tiny_config("one_pass", budget="2 steps", validations=1, **options), run)
    result = compress_run(run, plans=["prefix=1+distil=1"], max_size="0.9x", out=out, latency=False, say=quiet)
    assert result["chosen"] == "prefix=1+distil=1"
    assert (out / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    assert evaluate_run(out)["accuracy"] == pytest.approx(json.loads((out / "evaluation.json").read_text())["accuracy"])
    generated = answer(capsys, "generate", out, "--prompt", "To", "--max-tokens", "4")
    assert generated


def test_long_plans_have_files_of_their_own(run: Path) -> None:
    frontier = Frontier(Workbench.of_run(run, device="cpu"), run, say=quiet)
    steps = "+".join(f"tune={n}" for n in range(100, 140))
    one, other = (frontier.place(parse_plan(f"{steps}+tune={n}")).name for n in (1, 2))
    assert one != other
    assert max(len(one), len(other)) <= 120
