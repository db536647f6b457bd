"""A continual run: tasks learned one after another, measured on all of them after each; it goes on at task boundaries.

config.json, environment.json, metrics.jsonl, checkpoints/, model.safetensors, evaluation.json: an ordinary run
directory, whose evaluation has the accuracy matrix and what follows from it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from paradepth.atomic import write_json
from paradepth.continual.learner import Learner
from paradepth.continual.metrics import continual_metrics
from paradepth.continual.options import ContinualOptions
from paradepth.continual.scenario import load_scenario
from paradepth.continual.task import SequenceTask
from paradepth.distributed import World, join_world
from paradepth.models.pretrained import config_dict, save_pretrained
from paradepth.train.checkpoint import Checkpoint, CheckpointStore
from paradepth.train.config import Config, RunOptions, check_options
from paradepth.train.environment import command_line, environment
from paradepth.train.folder import check_folder, clear_folder
from paradepth.train.metrics import MetricsLog
from paradepth.train.precision import autocast_dtype
from paradepth.train.progress import ProgressView
from paradepth.train.run import read_run_config
from paradepth.train.signals import stop_on_signals
from paradepth.train.trainer import Interrupted, NonFiniteLoss

_UNUSED = ("init", "validations", "checkpoint_every", "tensorboard", "lipschitz")  # options of ordinary runs


def continual_run(
    config: Config, options: ContinualOptions, run_dir: str | Path, *, overwrite: bool = False
) -> dict[str, Any]:
    """Learns the tasks of a scenario one after another, into `run_dir`.

    Every task has the budget of `config`, so all strategies spend the same compute on it. The optimiser starts afresh
    with every task, and so do warm-up and decay. After each task the model is measured on the test samples of the tasks
    so far (of all, where they share their classes); nothing is chosen on them.

    Args:
        config: model, optimiser and running, as for other runs; the schedule is joint.
        options: scenario, setting and strategy.
        run_dir: folder for the run; must be new or empty unless `overwrite`.
        overwrite: replace the run that is in `run_dir`.

    Returns:
        A summary: run directory, the figures of `ContinualMetrics`, parameters, compute and time.

    Raises:
        ValueError: options, data or folder that cannot work.
        Interrupted: a signal came; the tasks before the present one are saved, and `resume_continual` goes on.
        NonFiniteLoss: the loss or a gradient became infinite or not a number.
    """
    folder = Path(run_dir)
    _check(config)
    check_folder(folder, overwrite=overwrite)
    with _learner(config, options) as (learner, world):
        clear_folder(folder)
        c = learner.model.config
        # So that the finished run can be evaluated as any other, on the (first) data set.
        told = config.replace(class_names=learner.scenario.class_names)
        if options.setting == "domain":
            told = told.replace(image_size=c.image_size[0], channels=c.channels)
        described = {**config_dict(learner.model), "training": told.flat(), "continual": dataclasses.asdict(options)}
        write_json(folder / "config.json", described)
        write_json(folder / "environment.json", environment(world, autocast=learner.autocast, command=command_line()))
        return _learn(learner, folder, None)


def resume_continual(run_dir: str | Path) -> dict[str, Any]:
    """Goes on with an interrupted continual run after the last task that was finished, exactly as if it had not been
    interrupted.

    Raises:
        ValueError: no such run, it is finished, or it has no usable checkpoint.
    """
    folder = Path(run_dir)
    config = read_run_config(folder)
    if not is_continual(folder):
        raise ValueError(f"{folder} is no continual run: its config.json has no entry 'continual'")
    if (folder / "model.safetensors").exists():
        raise ValueError(f"{folder} is finished: it has its model.safetensors")
    options = ContinualOptions(**json.loads((folder / "config.json").read_text())["continual"])
    checkpoint = CheckpointStore(folder / "checkpoints").latest()
    if checkpoint is None:
        raise ValueError(f"{folder} has no checkpoint to resume from; start it again with --overwrite")
    with _learner(config.replace(class_names=None), options) as (learner, _):
        return _learn(learner, folder, checkpoint)


def is_continual(run_dir: str | Path) -> bool:
    """Whether a run directory is that of a continual run.

    Raises:
        ValueError: no or a damaged config.json.
    """
    read_run_config(run_dir)
    return "continual" in json.loads((Path(run_dir) / "config.json").read_text())


def _check(config: Config) -> None:
    check_options(config)
    SequenceTask.check(config)
    values = {**dataclasses.asdict(config.run_options), **dataclasses.asdict(config.depth_options)}
    defaults = {
        f.name: f.default for group in (RunOptions, type(config.depth_options)) for f in dataclasses.fields(group)
    }
    for name in _UNUSED:
        if values[name] != defaults[name]:
            raise ValueError(f"{name} is {values[name]!r}; it means nothing to a continual run")
    for name, value, needed in (
        ("schedule", config.schedule_options.schedule, "joint"),
        ("executor", config.depth_options.executor, "serial"),
        ("freeze", config.optimiser_options.freeze, ()),
        ("class_names", config.data_options.class_names, None),
    ):
        if value != needed:
            raise ValueError(f"{name} is {value!r}; in a continual run it is {needed!r}, or follows from the strategy")


@contextmanager
def _learner(config: Config, options: ContinualOptions) -> Iterator[tuple[Learner, World]]:
    d, r = config.data_options, config.run_options
    with join_world(r.device) as world:
        if world.processes > 1:
            raise ValueError(f"a continual run takes one process, and there are {world.processes}")
        if r.threads is not None:
            torch.set_num_threads(r.threads)
        scenario = load_scenario(
            options.scenario,
            options.setting,
            seed=r.seed,
            data_dir=d.data_dir,
            image_size=d.image_size,
            validation_fraction=d.validation_fraction,
            train_fraction=d.train_fraction,
            channels=d.channels,
        ).to(world.device)
        autocast = autocast_dtype(r.precision, world.device)
        yield Learner(config, options, scenario, world=world, autocast=autocast), world


def _learn(learner: Learner, folder: Path, checkpoint: Checkpoint | None) -> dict[str, Any]:
    store = CheckpointStore(folder / "checkpoints", keep=learner.config.run_options.keep)
    position = None
    if checkpoint is not None:
        learner.load(checkpoint.tensors, checkpoint.state["learner"])
        position = checkpoint.state["metrics_position"]
    log = MetricsLog(folder, position=position)
    title = f"{learner.options.strategy} on {learner.scenario.name}"
    try:
        if checkpoint is None:
            log.write("start", **learner.start_fields())
        else:
            log.write("resumed", step=learner.step, layer_evals=learner.spent.layer_evals)
        with ProgressView(title=title) as view, stop_on_signals() as stop:
            view.say(learner.headline())
            while learner.done < len(learner.scenario.tasks):
                try:
                    view.say(learner.learn(log, stop))
                except Interrupted:
                    raise Interrupted(
                        f"stopped in task {learner.done + 1} on {stop.signal or 'a signal'}; the {learner.done} before "
                        "it are saved, and resuming starts it again"
                    ) from None
                except NonFiniteLoss as error:
                    raise NonFiniteLoss(
                        f"the loss or a gradient was not finite in task {learner.done + 1}; the {learner.done} before "
                        "it are saved. Try a lower learning_rate, a longer warmup, clip 1 or precision float32"
                    ) from error
                view.update(progress=learner.done / len(learner.scenario.tasks), loss=learner.loss, rate=learner.rate)
                state = {"learner": learner.state_dict(), "metrics_position": log.position()}
                store.save(learner.step, learner.tensors(), state)
        log.write("end", step=learner.step, **learner.spent_fields(), reason="all tasks")
    finally:
        log.close()
    figures = dataclasses.asdict(continual_metrics(learner.matrix, untrained=learner.untrained))
    report = learner.evaluation(figures)
    write_json(folder / "evaluation.json", report)
    described = json.loads((folder / "config.json").read_text())
    save_pretrained(learner.model, folder, extra={key: described[key] for key in ("training", "continual")})
    return {
        "run": str(folder),
        **figures,
        "parameters": learner.parameters,
        "layer_evals": learner.spent.layer_evals,
        "flops": learner.spent.flops,
        "seconds": learner.seconds,
    }
