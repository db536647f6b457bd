"""Cells and studies: their commands, hashes and names, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import paradepth
from paradepth.recipes import get_recipe
from paradepth.studies import get_study
from paradepth.studies.runner import Cell
from paradepth.studies.study import train_command
from paradepth.train.config import check_options
from study_runner_helpers import cell_after, fake_cell, fake_study


def test_what_a_cell_starts_from_is_part_of_it() -> None:
    a, other = fake_cell("a"), fake_cell("a", x=1)
    assert cell_after(a, "b").options_hash != fake_cell("b").options_hash
    assert cell_after(a, "b").options_hash != cell_after(other, "b").options_hash
    assert cell_after(a, "b").options_hash == cell_after(dataclasses.replace(a, label="new label"), "b").options_hash
    assert train_command(cell_after(a, "b", head_rate=2), Path("out/runs/b"), data_dir=Path("data"))[3:] == [
        *("finetune", "out/runs/a", "--task", "fake", "--head-rate", "2", "--seed", "0", "--threads", "1"),
        *("--data-dir", "data", "--run-dir", "out/runs/b", "--overwrite", "--no-report", "--json"),
    ]
    for option in ("init", "task"):
        with pytest.raises(ValueError, match=f"'{option}' is not an option of its own"):
            cell_after(a, "b", seed=0, **{option: "elsewhere"})


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
    assert fake_cell("a", x=1, y=[2]).options_hash == fake_cell("b", label="other", y=(2,), x=1).options_hash
    different = [
        fake_cell("a"),
        fake_cell("a", x=1),
        fake_cell("a", x=2),
        fake_cell("a", x="1"),
        fake_cell("a", x=1, seed=1),
    ]
    assert len({cell.options_hash for cell in different}) == len(different)


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".a", "a b", "a.log", "a.cell.json", "ä"])
def test_names_that_are_not_safe_as_files_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"cell name .* is not allowed"):
        fake_cell(name)


@pytest.mark.parametrize("options", [{"seed": 1}, {"data-dir": "x"}, {"threads": 2}])
def test_options_of_the_runner_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the runner sets"):
        Cell(name="a", group="g", label="l", recipe="r", options=options, seed=0)


@pytest.mark.parametrize("value", [{"a": 1}, [[1]], Path("x"), {1}], ids=repr)
def test_option_values_that_are_no_words_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"option 'x' is .*, but must be"):
        fake_cell("a", x=value)


@pytest.mark.parametrize(
    ("cells", "fields", "message"),
    [
        ((), {}, "has no cells"),
        ((fake_cell("a"), fake_cell("a", label="b")), {}, "two cells named 'a'"),
        ((fake_cell("a", label="l"), fake_cell("b", label="l", seed=1, x=1)), {}, "differ in more than their seed"),
        ((fake_cell("a", label="l"), fake_cell("b", label="l")), {}, "the same seed twice"),
        ((fake_cell("a"),), {"notes": {"big": "?"}}, r"notes for groups without cells: \['big'\]"),
        ((fake_cell("a"),), {"headline": {"big": "loss"}}, r"headlines for groups without cells: \['big'\]"),
        ((cell_after(fake_cell("a"), "b"),), {}, "cell b starts from a, which is no cell of fake"),
        (
            (
                fake_cell("a"),
                fake_cell("b"),
                cell_after(fake_cell("a"), "c-0"),
                cell_after(fake_cell("b"), "c-1", seed=1),
            ),
            {},
            "differ in more than their seed",
        ),
    ],
)
def test_studies_that_contradict_themselves_are_refused(
    cells: tuple[Cell, ...], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fake_study(*cells, **fields)
