"""The studies of tasks and of fine-tuning: every cell can be started, rows are matched, findings are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paradepth.cli import main
from paradepth.models import create_model, model_class, model_config
from paradepth.recipes import get_recipe
from paradepth.studies import _tasks_said, finetune_glue, tasks
from paradepth.studies.study import Cell, Study, train_command
from paradepth.train.accounting import update_cost
from paradepth.train.config import Config, ModelOptions, check_options
from paradepth.train.depth import check_depth
from paradepth.train.finetune import finetune_config
from paradepth.train.schedules import Objective
from paradepth.train.tasks import task_class

ROWS = [(name, label) for name in tasks.TASKS for label in tasks.rows(name)]


def config_of(cell: Cell, source: Path | None = None) -> Config:
    start = get_recipe(cell.recipe) if cell.after is None else finetune_config(str(source), cell.recipe)
    config = start.replace(**cell.options)
    check_options(config)
    task_class(config)
    return config


def model_of(config: Config) -> Any:
    """The model of a cell, of a small vocabulary."""
    m = config.model_options
    fields = model_class(m.model).config_class.__dataclass_fields__
    shape = {name: getattr(m, name) for name in ModelOptions.__dataclass_fields__ if name in fields}
    return create_model(m.model, **{name: value for name, value in shape.items() if value is not None})


def cell_of(study: Study, group: str, label: str) -> Cell:
    return next(cell for cell in study.cells if (cell.group, cell.label) == (group, label))


@pytest.mark.parametrize(("name", "label"), ROWS)
def test_rows_of_a_task_are_runs_of_equal_parameters(name: str, label: str) -> None:
    study = tasks.study()
    config, serial = (config_of(cell_of(study, name, row)) for row in (label, _tasks_said.SERIAL))
    model, other = model_of(config), model_of(serial)
    sizes, costs = zip(
        *(
            (sum(p.numel() for p in m.parameters()), update_cost(m, Objective(m.prefixes), m.parts()).layer_evals)
            for m in (model, other)
        ),
        strict=True,
    )
    if label == _tasks_said.SHALLOW:
        assert sizes[0] < sizes[1]
        assert costs == (4, 12)
    else:
        assert sizes[0] == sizes[1]
        assert costs == (12, 12)
    assert config.optimiser_options.budget == serial.optimiser_options.budget
    check_depth(model, config.depth_options, 1)
    assert (config.depth_options.executor == "mgrit") == label.startswith(_tasks_said.PARALLEL)
    assert config.depth_options.control == (label == _tasks_said.CONTROLLED)


def test_layer_parallel_rows_train_the_network_of_their_serial_counterpart() -> None:
    study = tasks.study()
    for name in tasks.TASKS:
        shapes = [
            config_of(cell_of(study, name, label)).model_options
            for label in (_tasks_said.ODE, _tasks_said.PARALLEL, _tasks_said.CONTROLLED)
        ]
        assert shapes[0] == shapes[1] == shapes[2]
        assert shapes[0].step == 1 / 12


def test_cells_of_fine_tuning_are_runs(tmp_path: Path) -> None:
    study = finetune_glue.study()
    source = model_of(config_of(cell_of(study, finetune_glue.PRETRAINING, finetune_glue.SERIAL)))
    source.save_pretrained(tmp_path)
    for cell in study.cells:
        config = config_of(cell, tmp_path)
        if cell.group == finetune_glue.PRETRAINING:
            assert cell.after is None
            continue
        tuned = model_config(config.model_options.model).__class__
        assert tuned.__name__ == "SequenceClassifierConfig"
        m = config.model_options
        assert (m.width, m.depth, m.step, m.context, m.dropout) == (64, 12, 1 / 12, 64, 0.1)
        assert config.depth_options.executor == "serial"
        assert (cell.after is None) == (cell.label == finetune_glue.SCRATCH)
        if cell.after is not None:
            assert (cell.after.label, cell.after.seed) == (cell.label, cell.seed)


@pytest.mark.parametrize("module", [tasks, finetune_glue])
def test_the_command_line_of_a_cell_says_what_its_options_say(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a row for each kind of cell."""
    started: list[Config] = []
    monkeypatch.setattr("paradepth.train.start_run", lambda config, folder, **_: started.append(config))
    monkeypatch.setattr("paradepth.cli.train.with_report", lambda result, **options: {})
    study = module.study(seeds=(1,))
    for cell in study.cells:
        if cell.after is not None and not (tmp_path / cell.after.name).exists():
            model_of(config_of(cell.after)).save_pretrained(tmp_path / cell.after.name)
        assert main(train_command(cell, tmp_path / cell.name)[3:]) == 0, cell.name
        source = tmp_path / cell.after.name if cell.after is not None else None
        assert started.pop() == config_of(cell, source).replace(seed=1, threads=1)


def record(cell: Cell, accuracy: float, **other: float) -> dict[str, Any]:
    measures = {name: [0.0, value] for name, value in other.items() if name != "loss"}
    loss = [0.0, other.get("loss", 1.0)]
    shown = {"name": cell.name, "group": cell.group, "label": cell.label, "seed": cell.seed}
    return shown | {"accuracy": [0.0, accuracy], "loss": loss, "measures": measures}


def test_findings_of_tasks_say_who_wins_and_what_is_within_its_limit() -> None:
    one_pass, stagewise = "PF 3×4 one_pass", "PF 3×4 stagewise"

    def made(cell: Cell) -> dict[str, Any]:
        noise = 0.001 * cell.seed
        accuracy = {one_pass: 0.9, stagewise: 0.7}.get(cell.label, 0.8) + noise
        loss = {one_pass: 0.9, stagewise: 1.2, _tasks_said.PARALLEL: 1.02, _tasks_said.CONTROLLED: 1.009}.get(
            cell.label, 1.0
        )
        bleu = {_tasks_said.PARALLEL: 29.4, _tasks_said.CONTROLLED: 29.6}.get(cell.label, 30.0)
        return record(cell, accuracy, loss=loss + noise, bleu=bleu + noise)

    study = tasks.study()
    texts = study.findings([made(cell) for cell in study.cells])
    assert len(texts) == 2 * len(tasks.TASKS)
    words = texts[0]
    assert "the serial stack has 1.0010 ± 0.0010" in words
    assert "better: PF 3×4 one_pass 0.9010" in words
    assert "worse: PF 3×4 stagewise 1.2010" in words
    assert "not told apart from it by these seeds: PF 3×4 joint 1.0010" in words
    assert "layer-parallel has a loss 2.00 % above serial training: not within 1 % of the loss" in texts[1]
    assert "layer-parallel, controller has a loss 0.90 % above serial training: within 1 % of the loss" in texts[1]
    assert "0.60 BLEU less: not within 1 % of the loss and 0.5 BLEU" in texts[-1]
    assert "0.40 BLEU less: within 1 % of the loss and 0.5 BLEU" in texts[-1]
    assert "a third of the layers, in three times the steps: 1.0010 ± 0.0010" in words
    assert "0.00 points of accuracy" in texts[3]


@pytest.mark.parametrize(("parallel", "verdict"), [(0.812, "1.00 points less: within"), (0.8, "2.20 points less: not")])
def test_findings_of_fine_tuning_hold_the_difference_against_the_papers(parallel: float, verdict: str) -> None:
    study = finetune_glue.study(seeds=(0,))
    reached = {finetune_glue.SERIAL: 0.822, finetune_glue.PARALLEL: parallel, finetune_glue.SCRATCH: 0.7}
    texts = study.findings([record(cell, reached[cell.label], matthews=0.3) for cell in study.cells])
    assert verdict in texts[1]
    assert "Without pretraining 70.00" in texts[1]
    assert "Matthews' correlation: 0.300 (serial)" in texts[2]
