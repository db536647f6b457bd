"""`paradepth convert`: from a finished serial run to a run of branches that every command takes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from commands import answer
from compress_helpers import same
from paradepth import from_pretrained
from paradepth.cli import main
from paradepth.compress import STEPS, Workbench
from paradepth.compress.convert import convert_run
from paradepth.train import start_run
from paradepth.train.use import evaluate_run
from runs import tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a serial stack of five layers on digits."""
    folder = tmp_path_factory.mktemp("convert") / "run"
    start_run(tiny_config(model="vit_nano", branches=None, depth=5, width=16, mlp=32, learning_rate=3e-3), folder)
    return folder


def test_the_command_writes_a_run_that_others_take(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    result = answer(capsys, "convert", run, "--branches", 2, "--tune", 3, "--distil", 2, "--out", new)
    assert (result["run"], result["plan"], result["depths"]) == (str(new), "branches=2+tune=3+distil=2", [3, 2])
    assert result["updates"] == 5
    assert result["layer_evals"] == pytest.approx(32 * 5 * (5 + 2 / 3))
    before, converted, after = (result["accuracy"][name] for name in ("before", "converted", "after"))
    assert before == evaluate_run(run)["accuracy"][-1]
    evaluation = evaluate_run(new)
    assert evaluation["accuracy"][-1] == after
    assert len(evaluation["accuracy"]) == 2
    assert json.loads((new / "evaluation.json").read_text())["accuracy"] == evaluation["accuracy"]
    page = (new / "report.html").read_text()
    assert "Converted from" in page
    assert "branches=2+" in page
    tuned, kept = from_pretrained(new), from_pretrained(run)
    assert not same(tuned.convert(0).state_dict(), kept.state_dict())
    words = ["--budget", "2 steps", "--validations", 1, "--validation-fraction", 0.1, "--threads", 1]
    again = answer(capsys, "finetune", new, "--task", "digits", *words, "--run-dir", tmp_path / "tuned")
    assert again["steps"] == 2
    assert from_pretrained(tmp_path / "tuned").config.branch_depths == (3, 2)
    shrunk = answer(capsys, "compress", new, "--plans", "prefix=1", "--no-latency")
    assert [point["plan"] for point in shrunk["points"]] == ["full", "prefix=1"]
    assert converted != before


def test_without_training_further_it_is_the_model_s_own_conversion(run: Path, tmp_path: Path) -> None:
    for branches, groups in ((1, "consecutive"), (5, "consecutive"), (2, "interleaved")):
        out = tmp_path / f"{branches}-{groups}"
        said: list[str] = []
        result = convert_run(run, branches=branches, groups=groups, out=out, device="cpu", say=said.append)  # pyright: ignore
        assert same(
            from_pretrained(out).state_dict(), from_pretrained(run).convert(branches, groups=groups).state_dict()
        )
        assert result["accuracy"]["converted"] == result["accuracy"]["after"] == evaluate_run(out)["accuracy"][-1]
        assert (result["updates"], result["layer_evals"]) == (0, 0)
        assert len(said) == 2
        if branches == 1:
            assert result["loss"]["after"] == pytest.approx(result["loss"]["before"], rel=1e-5)


def test_there_and_back_again(run: Path, tmp_path: Path) -> None:
    convert_run(run, branches=2, groups="interleaved", out=tmp_path / "there", device="cpu", say=lambda _: None)
    convert_run(tmp_path / "there", branches=1, groups="interleaved", out=tmp_path / "back", device="cpu", say=print)
    assert evaluate_run(tmp_path / "back")["accuracy"] == evaluate_run(run)["accuracy"]
    assert same(from_pretrained(tmp_path / "back").convert(0).state_dict(), from_pretrained(run).state_dict())


def test_distillation_is_towards_the_serial_model(run: Path) -> None:
    bench = Workbench.of_run(run, device="cpu", teacher_weight=1.0, learning_rate=3e-3)
    inputs, _ = bench.task.ordered("test", 0, 200)
    model = STEPS["branches"].parse("5").apply(bench.teacher, bench)
    with torch.no_grad():
        wanted = bench.teacher(inputs)
        before = float((model(inputs) - wanted).norm())
    distilled = STEPS["distil"].parse("40").apply(model, bench)
    with torch.no_grad():
        after = float((distilled(inputs) - wanted).norm())
    assert after < before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--branches", "6"], "5 layers can be shared out among 1 to 5"),
        (["--branches", "0"], "branches is 0"),
        (["--branches", "2", "--tune", "-1"], "tune is -1"),
        (["--branches", "2", "--learning-rate", "0.1"], "nothing is trained"),
        (["--branches", "2", "--tune", "1", "--learning-rate", "-0.1"], "learning_rate is -0.1"),
        (["--branches", "2", "--out", "RUN"], "a folder of its own"),
    ],
)
def test_the_command_refuses_in_words(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    out = [] if "--out" in words else ["--out", str(tmp_path / "new")]
    assert main(["convert", str(run), *(str(run) if w == "RUN" else w for w in words), *out]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_no_run_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tmp_path), "--branches", "2"]) == 2
    assert "is not a run directory: it has no config.json" in capsys.readouterr().err
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine.txt").write_text("kept")
    assert main(["convert", str(run), "--branches", "2", "--out", str(tmp_path / "new")]) == 2
    assert "not empty" in capsys.readouterr().err


def test_the_guide_runs_as_printed() -> None:
    guide = (Path(__file__).resolve().parents[1] / "docs" / "convert.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    assert blocks
    for code in blocks:
        exec(code, {})
