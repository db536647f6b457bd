"""A chosen model as an ordinary run directory."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from paradepth.atomic import write_bytes, write_json
from paradepth.compress.step import Plan, shapes
from paradepth.compress.tune import Distil, Tune
from paradepth.compress.workbench import Workbench
from paradepth.distributed import World
from paradepth.models import TrunkModel
from paradepth.models.registry import name_with_branches
from paradepth.train.accounting import Cost, start_fields, update_cost
from paradepth.train.budget import Budget
from paradepth.train.config import Config
from paradepth.train.environment import command_line, environment
from paradepth.train.folder import clear_folder
from paradepth.train.metrics import MetricsLog
from paradepth.train.options import ModelOptions
from paradepth.train.schedules import Objective

FILE = "compression.json"  # in the chosen run: where it comes from


def write_run(
    out: Path,
    model: TrunkModel,
    plan: Plan,
    bench: Workbench,
    *,
    saved: Path,
    origin: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Writes the run of a shrunk model: what `evaluate`, `predict`, `export`, `finetune` and `report` read.

    That is the model with options that fit it, tokeniser or vocabulary, environment, log and evaluation of the test
    split.

    Args:
        out: folder, emptied of a run that is there.
        model: the shrunk model, on the bench's device.
        plan: how it was made.
        bench: of the run that it was made from.
        saved: folder that the model was saved into.
        origin: what `compression.json` holds; "points" gets the figures of the test split.
        seconds: that making it took.

    Returns:
        The evaluation of the test split.
    """
    clear_folder(out)
    task, config = bench.task, shrunk_options(bench.config, bench.teacher, model)
    task.save_assets(out)
    write_json(
        out / "environment.json",
        environment(World(0, 1, bench.device), autocast=None, command=command_line()),
    )
    log = MetricsLog(out)
    try:
        updates, cost = tuning_cost(plan, bench)
        log.write("start", **start_fields(model, task, Budget(updates, "steps")))
        totals = {"step": updates, "layer_evals": cost.layer_evals, "flops": cost.flops, "seconds": seconds}
        log.write("end", **totals, reason="budget")
    finally:
        log.close()
    evaluation = task.details(model, "test")
    write_json(out / "evaluation.json", evaluation)
    origin["points"]["chosen"]["test"] = {"accuracy": evaluation["accuracy"][-1], "loss": evaluation["loss"][-1]}
    write_json(out / FILE, origin)
    write_bytes(out / "model.safetensors", (saved / "model.safetensors").read_bytes())
    described = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    write_json(out / "config.json", {**described, "training": config.flat()})
    return evaluation


def shrunk_options(config: Config, full: TrunkModel, model: TrunkModel) -> Config:
    """The options of a run whose model has been shrunk or converted: those of its shape follow the shape.

    Args:
        config: of the run.
        full: its model.
        model: what became of it.

    >>> import paradepth
    >>> full = paradepth.create_model("paraformer_nano", branches=4)
    >>> shrunk_options(Config(), full, full.truncate(1)).model_options.branches
    1
    """
    options = {field.name for field in fields(ModelOptions)}
    changed = {
        field.name: getattr(model.config, field.name)
        for field in fields(model.config)
        if field.name in options and getattr(model.config, field.name) != getattr(full.config, field.name)
    }
    if {"depths", "branches"} & set(changed):  # which stand for the depth as well
        changed["depth"] = model.config.depth
    if "branches" in changed:
        changed["model"] = name_with_branches(config.model_options.model, model.config.branches)
    return config.replace(**changed)


def tuning_cost(plan: Plan, bench: Workbench) -> tuple[int, Cost]:
    """Updates and compute of a plan's recoveries and distillations; a teacher's forward pass is a third of the compute
    of an update of it."""
    updates, cost = 0, Cost()
    samples = bench.config.optimiser_options.batch_size
    for step, model in shapes(plan, bench.teacher):
        if isinstance(step, Tune | Distil):
            updates += step.count
            cost += _update(model, bench) * (step.count * samples)
            if isinstance(step, Distil):
                teacher = _update(bench.teacher, bench) * (step.count * samples)
                cost += Cost(teacher.layer_evals / 3, teacher.flops / 3)
    return updates, cost


def _update(model: TrunkModel, bench: Workbench) -> Cost:
    return update_cost(model, Objective(model.prefixes), model.parts(), tokens=bench.task.mean_tokens(model))
