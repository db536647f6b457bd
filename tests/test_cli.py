"""The command line as a user types it: real processes, exit statuses, JSON on standard output."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from commands import answer, call
from paradepth.cli import COMMANDS, main
from paradepth.continual import ContinualOptions
from paradepth.recipes import RECIPES, get_recipe
from paradepth.studies import STUDIES
from paradepth.studies.measurements import check_measurement
from paradepth.train import start_run
from paradepth.train.config import Config, check_options
from paradepth.train.tasks import TASKS
from runs import tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    start_run(tiny_config("one_pass"), folder)
    return folder


def test_train_in_a_process_of_its_own_prints_one_json_object(tmp_path: Path) -> None:
    words = ["train", "digits_paraformer", "--run-dir", str(tmp_path / "run"), "--budget", "4 steps", "--branches", "2"]
    words += ["--schedule", "one_pass", "--prefix-weights", "1", "2", "--detach", "--validations", "2", "--json"]
    done = subprocess.run([sys.executable, "-m", "paradepth", *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["steps"] == 4
    assert len(result["accuracy"]) == 2
    assert Path(result["report"]).read_text().startswith("<!")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["training"]["prefix_weights"] == [1.0, 2.0]
    assert config["training"]["detach"] is True
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["command"].startswith("paradepth train digits_paraformer --run-dir ")


def test_evaluate_all_branches_and_some(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = answer(capsys, "evaluate", run)
    assert whole["accuracy"] == pytest.approx(json.loads((run / "evaluation.json").read_text())["accuracy"])
    part = answer(capsys, "evaluate", run, "--branches", 2)
    assert part["accuracy"] == whole["accuracy"][:2]
    assert part["parameters"] < whole["parameters"]
    other = answer(capsys, "evaluate", run, "--split", "validation")
    assert other["accuracy"] != whole["accuracy"]


def test_predict_names_class_and_confidence(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "seven.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(picture)
    result = answer(capsys, "predict", run, picture, picture, "--top", 3)
    assert len(result["predictions"]) == 2
    classes = result["predictions"][0]["classes"]
    assert len(classes) == 3
    assert classes[0]["confidence"] >= classes[1]["confidence"] > 0
    status, out, _ = call(capsys, "predict", run, picture, "--branches", 1)
    assert status == 0
    assert "seven.png: " in out
    assert "%" in out


def test_report_of_one_run_and_of_several(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = answer(capsys, "report", run, "--out", tmp_path / "one.html")
    assert "<svg" in Path(result["report"]).read_text()
    twin = shutil.copytree(run, tmp_path / "twin")
    result = answer(capsys, "report", run, twin, "--out", tmp_path / "two.html")
    assert (tmp_path / "two.html").exists()


@pytest.mark.parametrize("what", ["recipes", "models", "studies"])
def test_list(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = answer(capsys, "list", what)
    assert result[what]
    some = answer(capsys, "list", what, "*zzz*")
    assert not some[what]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["paint"], "unknown command"),
        (["train"], "needs a recipe"),
        (["train", "imagenet_huge"], "unknown recipe"),
        (["train", "digits_paraformer", "--budget", "soon"], "number and a unit"),
        (["train", "digits_paraformer", "--schedule", "joint", "--patience", "3"], "takes no option patience"),
        (["resume", "no/such/run"], "not a run directory"),
        (["evaluate", "no/such/run"], "not a run directory"),
        (["predict", "no/such/run", "x.png"], "not a folder"),
        (["report", "no/such/run"], "no/such/run"),
        (["study", "everything"], "unknown study"),
    ],
)
def test_bad_input_is_refused_with_status_2(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, error = capsys.readouterr()
    assert said in error
    assert "Traceback" not in out + error


@pytest.mark.parametrize("words", [["train", "digits_paraformer", "--colour", "red"], ["evaluate"], ["list", "cats"]])
def test_words_that_cannot_be_parsed_end_with_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2


def test_more_bad_input_about_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    for words in (
        ["evaluate", run, "--branches", 9],
        ["predict", run, text],
        ["predict", run, tmp_path / "missing.png"],
        ["predict", run],
        ["predict", run, text, "--top", 99],
        ["train", "digits_paraformer", "--run-dir", run],
        ["report", tmp_path],
    ):
        assert main([str(word) for word in words]) == 2, words
        assert "refused: " in capsys.readouterr().err


def test_every_command_of_every_module_can_be_called() -> None:
    for name in set(COMMANDS.values()):
        module = import_module(f"paradepth.cli.{name}")
        assert set(module.COMMANDS) == {command for command, where in COMMANDS.items() if where == name}


def test_help_is_there_for_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    commands = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert commands == [
        *("train", "finetune", "resume", "compress", "explain", "grow", "convert", "predict", "generate", "translate"),
        *("export", "evaluate", "report", "list", "study", "continual"),
    ]
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code in (0, None)
    with pytest.raises(SystemExit):
        main(["train", "digits_paraformer", "--help"])
    assert "--prefix-weights" in capsys.readouterr().out


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_and_their_docstrings_state_time_and_accuracy(name: str) -> None:
    recipe = get_recipe(name)
    check_options(recipe)
    assert recipe.recipe == name
    text = RECIPES[name].__doc__ or ""
    assert "minutes" in text or "hours" in text
    assert "%" in text


@pytest.mark.parametrize("name", STUDIES)
def test_studies_name_known_recipes_and_options(name: str) -> None:
    data = {known for task in TASKS for known in task.data_names}
    for cell in STUDIES[name]("here").cells:
        if cell.command == "measure":
            check_measurement(cell.recipe, cell.options)
        elif cell.command == "continual":
            own = {name: value for name, value in cell.options.items() if name in ContinualOptions.__dataclass_fields__}
            ContinualOptions(scenario=cell.recipe, **own)
            check_options(Config().replace(**{k: v for k, v in cell.options.items() if k not in own}))
        elif cell.after is None:
            check_options(get_recipe(cell.recipe).replace(**cell.options))
        else:  # is fine-tuned, on data that its recipe names
            assert cell.recipe in data
            check_options(Config().replace(data=cell.recipe, **cell.options))
