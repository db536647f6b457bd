"""The study of shapes: every way to cut the layers, matched in parameters and compute, and rules that decide."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from paradepth.models import create_model, model_class
from paradepth.recipes import get_recipe
from paradepth.studies import balance
from paradepth.studies.study import Cell
from paradepth.train.accounting import update_cost
from paradepth.train.config import Config, check_options
from paradepth.train.depth import check_depth
from paradepth.train.schedules import Annealing, Objective, build_schedule
from paradepth.train.tasks import task_class


def config_of(cell: Cell) -> Config:
    config = get_recipe(cell.recipe).replace(**cell.options)
    check_options(config)
    task_class(config)
    return config


def model_of(config: Config) -> Any:
    m = config.model_options
    fields = model_class(m.model).config_class.__dataclass_fields__
    shape = {f.name: getattr(m, f.name) for f in dataclasses.fields(m) if f.name in fields}
    shape = {name: value for name, value in shape.items() if value is not None}
    if "num_classes" in fields:
        shape |= {"num_classes": 10, "image_size": config.data_options.image_size or 28}
    return create_model(m.model, **{**shape, "width": 16, "heads": 2, "mlp": 8, "head_width": 4})


@pytest.mark.parametrize("size", ["smoke", "here", "paper"])
def test_shapes_of_a_table_are_runs_of_equal_parameters_and_compute(size: Any) -> None:
    study, layers = balance.study(size, seeds=(1,)), balance.SIZES[size]["layers"]
    sizes: dict[str, set[int]] = {}
    budgets: dict[str, set[str]] = {}
    shapes: dict[str, list[tuple[int, int]]] = {}
    for cell in study.cells:
        config = config_of(cell)
        model, schedule = model_of(config), config.schedule_options.schedule
        check_depth(model, config.depth_options, 1)
        build_schedule(schedule, list(model.parts()), Annealing(), {})
        n, d = cell.options["branches"], cell.options["depth"]
        assert update_cost(model, Objective(model.prefixes), model.parts()).layer_evals == n * d
        assert (model.prefixes, model.config.step, model.config.buffers) == (n, 1.0, (0, 0))
        task = cell.group.partition(",")[0]
        budgets.setdefault(task, set()).add(config.optimiser_options.budget)
        if balance.DEPTHS in cell.group:
            assert n == 4
            continue
        assert n * d == layers
        assert schedule == ("joint" if n == 1 else cell.group.partition(", ")[2])
        shapes.setdefault(cell.group, []).append((n, d))
        sizes.setdefault(task, set()).add(sum(p.numel() for p in model.parameters()))
    assert all(len(of_task) == 1 for of_task in (*sizes.values(), *budgets.values()))
    for group, found in shapes.items():
        assert found == [s for s in balance.shapes(layers) if s[0] > 1 or group.endswith(balance.STAGEWISE)]
    assert set(study.headline) == {cell.group for cell in study.cells}


def _records(**measures: dict[tuple[int, int], float]) -> list[dict[str, Any]]:
    """Records of the cells of two seeds: a measure for each shape, by task; the second seed's a thousandth above."""
    records = []
    for cell in balance.study("here", seeds=(0, 1)).cells:
        n, d = cell.options["branches"], cell.options["depth"]
        value = measures[cell.group.partition(",")[0]].get((n, d), 0.5) + 0.001 * cell.seed
        records.append(
            {
                "name": cell.name,
                "group": cell.group,
                "label": cell.label,
                "options": cell.options,
                "accuracy": [0.1, value],
                "loss": [9.0, value],
            }
        )
    return records


def test_balanced_shapes_win_where_they_beat_both_extremes() -> None:
    # Of text the measure is a loss: less is better.
    records = _records(images={(3, 4): 0.8, (4, 3): 0.8, (12, 1): 0.6}, text={(3, 4): 0.2, (4, 3): 0.2, (12, 1): 0.4})
    found = balance.verdicts(records)
    assert {verdict.verdict for verdict in found.values()} == {"holds"}
    figure = found[balance.BALANCED].figure
    assert figure.startswith("3×4 and 4×3 have, images, stagewise: +30.00 points against 1×12 (serial) and +20.00")
    assert "text, stagewise: 0.3000 less loss than 1×12 (serial) and 0.2000 less loss than 12×1" in figure
    texts = balance.findings(records)
    assert "Best: 3×4, not told apart from 4×3 by these seeds." in texts[0]
    assert "latency 1 layer 60.05 ± 0.07 (12×1), latency 3 layers 80.05 ± 0.07 (4×3). No other" in texts[1]
    # The slice has the shape that it shares with the table.
    assert "4×1 50.05 ± 0.07; 4×2 50.05 ± 0.07; 4×3 80.05 ± 0.07; 4×6 50.05 ± 0.07" in texts[4]

    records = _records(images={(12, 1): 0.9}, text={(3, 4): 0.2, (4, 3): 0.2, (12, 1): 0.4})
    found = balance.verdicts(records)
    assert [found[name].verdict for name in (balance.BALANCED, balance.SHALLOW)] == ["holds with conditions"] * 2
    records = _records(images={(12, 1): 0.9}, text={(12, 1): 0.1})
    found = balance.verdicts(records)
    assert [found[name].verdict for name in (balance.BALANCED, balance.SHALLOW)] == ["does not hold"] * 2


def test_differences_within_the_spread_of_the_seeds_do_not_count() -> None:
    records = _records(images={(3, 4): 0.5003, (4, 3): 0.5003}, text={})
    found = balance.verdicts(records)
    assert {verdict.verdict for verdict in found.values()} == {"does not hold"}
    single = balance.verdicts([record for record in records if record["name"].endswith("-0")])
    assert {verdict.verdict for verdict in single.values()} == {"could not be tested here"}
