"""A run from options to run directory: start, resume, evaluate.

A run directory is the only hand-over between commands: config.json, model.safetensors, checkpoints/, metrics.jsonl,
environment.json, evaluation.json, report.html.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paradepth.atomic import write_json
from paradepth.branches import branch_executor
from paradepth.distributed import World, join_world, process_count
from paradepth.models import TrunkModel
from paradepth.models.pretrained import config_dict, quantisation_of, save_pretrained
from paradepth.models.quantised import check_learns
from paradepth.train.accounting import start_fields
from paradepth.train.checkpoint import Checkpoint, CheckpointStore
from paradepth.train.config import Config, ScheduleOptions, check_options
from paradepth.train.depth import branch_processes, check_depth, depth_processes
from paradepth.train.environment import command_line, environment
from paradepth.train.folder import check_folder, clear_folder
from paradepth.train.learning import check_parts
from paradepth.train.metrics import MetricsLog, SilentLog
from paradepth.train.precision import autocast_dtype
from paradepth.train.progress import ProgressView
from paradepth.train.schedules import Annealing, Schedule, build_schedule
from paradepth.train.signals import stop_on_signals
from paradepth.train.start import start_from
from paradepth.train.tasks import Task
from paradepth.train.tasks import load_data as load_data
from paradepth.train.trainer import Trainer


def start_run(
    config: Config,
    run_dir: str | Path,
    *,
    overwrite: bool = False,
    on_batch: Callable[[int], None] = lambda step: None,
) -> dict[str, Any]:
    """Trains as `config` says, into `run_dir`. Options are checked before anything is written.

    Args:
        config: all options, from a recipe.
        run_dir: folder for the run; must be new or empty unless `overwrite`.
        overwrite: replace the run that is in `run_dir`.
        on_batch: called with the step after each batch.

    Returns:
        A summary: run directory, test accuracy by prefix, compute and time.

    Raises:
        ValueError: options, data or folder that cannot work.
        Interrupted, NonFiniteLoss: training stopped early; its state is saved and `resume_run` continues it.
    """
    folder = Path(run_dir)
    check_options(config)
    with _joined(config) as world:
        check_folder(folder, overwrite=overwrite)
        world.barrier()
        parts = _prepare(config, world)
        source = config.run_options.init
        if source is not None:
            start_from(parts[0], source)
        if world.is_main:
            _write_head(config, folder, world, parts)
        world.barrier()
        return _train(config, folder, world, parts, checkpoint=None, on_batch=on_batch)


def begin_run(
    config: Config,
    run_dir: str | Path,
    *,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    shape: Any,
    assets: Path,
    schedule_state: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a run that `resume_run` trains: its options, and a checkpoint of step 0 with given weights and moments.

    It has its model.safetensors at once, so it can be evaluated before it is trained.

    Args:
        config: all options.
        run_dir: folder for the run; must be new or empty unless `overwrite`.
        weights: of the model, by name.
        moments: of the optimiser, as `Optimiser.state_tensors` names them; parameters without any start afresh.
        shape: configuration of the model that the weights are of; the data must ask for the same.
        assets: a run directory whose tokeniser and the like are taken over.
        schedule_state: where the schedule stands; None: at its beginning.
        overwrite: replace the run that is in `run_dir`.

    Returns:
        Run directory, number of parameters, layers and training samples.

    Raises:
        ValueError: options, data or folder that cannot work, several processes, or data for another shape.
    """
    folder = Path(run_dir)
    check_options(config)
    with _joined(config) as world:
        if world.processes > 1:
            raise ValueError(f"a run is begun on one process, and there are {world.processes}; resume it on several")
        check_folder(folder, overwrite=overwrite)
        parts = model, task, schedule, autocast = _prepare(config, world, assets=assets)
        if model.config != shape:
            mine, theirs = (asdict(c) for c in (model.config, shape))
            names = [name for name in theirs if mine.get(name) != theirs[name]]
            different = "; ".join(f"{name} is {mine.get(name)} instead of {theirs[name]}" for name in names)
            raise ValueError(f"data {task.data.name!r} asks for another model than the one there is: {different}")
        model.load_state_dict(weights)
        store = CheckpointStore(folder / "checkpoints", keep=config.run_options.keep)
        trainer = Trainer(model, task, schedule, config, world=world, autocast=autocast, store=store)
        trainer.optimiser.load_state_tensors(moments)
        if schedule_state is not None:
            schedule.load_state_dict(schedule_state)
        _write_head(config, folder, world, parts)
        log = MetricsLog(folder)
        try:
            started = _start_fields(trainer)
            log.write("start", **started)
            trainer.log_first_stage(log)
            trainer.save(log)
        finally:
            log.close()
        save_pretrained(model, folder, extra={"training": config.flat()})
    return {"run": str(folder), **{key: started[key] for key in ("parameters", "layers", "train_samples")}}


def resume_run(
    run_dir: str | Path,
    *,
    branch_processes: int | None = None,
    on_batch: Callable[[int], None] = lambda step: None,
) -> dict[str, Any]:
    """Continues an interrupted run from its newest good checkpoint, exactly as if it had not been interrupted.

    A damaged newest checkpoint is reported and the one before it is used.

    Args:
        run_dir: the run.
        branch_processes: processes that share the branches from now on; None: as before, or all processes where their
            number is no multiple of that.
        on_batch: called with the step after each batch.

    Raises:
        ValueError: not a run directory, no usable checkpoint, or the run is already finished or quantised.
    """
    folder = Path(run_dir)
    config = _on_these_processes(read_run_config(folder), branch_processes)
    check_learns(quantisation_of(folder), str(folder))
    weights, evaluation = folder / "model.safetensors", folder / "evaluation.json"
    if weights.exists() and evaluation.exists():
        raise ValueError(
            f"{folder} is finished: it has its model.safetensors; train again with --overwrite to replace it"
        )
    with _joined(config) as world:
        parts = _prepare(config, world, assets=folder)
        view = ProgressView(enabled=world.is_main)
        checkpoint = CheckpointStore(folder / "checkpoints").latest(view.say)
        if checkpoint is None:
            raise ValueError(f"{folder} has no checkpoint to resume from; train again with --overwrite")
        if world.is_main:
            weights.unlink(missing_ok=True)  # of a run that `begin_run` wrote
        return _train(config, folder, world, parts, checkpoint=checkpoint, on_batch=on_batch)


def read_run_config(run_dir: str | Path) -> Config:
    """The options of a run.

    Raises:
        ValueError: not a run directory, or a damaged config.json.
    """
    path = Path(run_dir) / "config.json"
    if not path.is_file():
        raise ValueError(f"{run_dir} is not a run directory: it has no config.json")
    try:
        content = json.loads(path.read_text())
        return Config.from_flat(content["training"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold the options of a run: {error!r}") from error


def _joined(config: Config) -> AbstractContextManager[World]:
    r, depth, branch = config.run_options, config.depth_options, config.branch_options
    return join_world(
        r.device,
        depth=depth_processes(depth),
        branch=branch_processes(branch),
        timeout=r.timeout,
        options=config.flat(),
    )


def _on_these_processes(config: Config, branches: int | None) -> Config:
    """The options of a run that may have begun on another number of processes."""
    saved, count = config.branch_options.branch_processes, process_count()
    if branches is None and saved is not None and count % saved:
        branches = count
    return config if branches is None else config.replace(branch_processes=branches)


def _write_head(config: Config, folder: Path, world: World, parts: _Parts) -> None:
    """Empties the folder and writes what a run has before its first batch, besides its log."""
    model, task, _, autocast = parts
    clear_folder(folder)
    task.save_assets(folder)
    write_json(folder / "config.json", {**config_dict(model), "training": config.flat()})
    write_json(folder / "environment.json", environment(world, autocast=autocast, command=command_line()))


_Parts = tuple[TrunkModel, Task, Schedule, torch.dtype | None]


def _prepare(config: Config, world: World, *, assets: Path | None = None) -> _Parts:
    """Model, task, schedule and autocast dtype; everything that can be refused is refused here."""
    o, r, m = config.optimiser_options, config.run_options, config.model_options
    if r.threads is not None:
        torch.set_num_threads(r.threads)
    if o.batch_size % (world.size * o.accumulate):
        raise ValueError(
            f"batch_size {o.batch_size} cannot be cut into {world.size} processes × {o.accumulate} parts (accumulate): "
            f"it must be a multiple of {world.size * o.accumulate}"
        )
    task = load_data(config, assets=assets or r.init)
    samples = task.count("train")
    if samples < o.batch_size:
        raise ValueError(
            f"batch_size is {o.batch_size} but {task.data.name} has only {samples} training samples ({task.unit})"
        )
    s: ScheduleOptions = config.schedule_options
    if task.shape.branches == 0 and s.schedule != "joint":
        raise ValueError(f"schedule {s.schedule!r} needs a model with branches, and {m.model} is serial; use joint")
    if o.gate_penalty and getattr(task.shape, "aggregate", None) != "gated":
        raise ValueError(
            f"gate_penalty is {o.gate_penalty}, and this model has no gates; take branches and aggregate gated"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(r.seed)
        model = task.new_model()
        options = {
            f.name: getattr(s, f.name) for f in fields(s) if f.name != "schedule" and getattr(s, f.name) != f.default
        }
        annealing = Annealing(warmup=o.warmup, decay=o.decay)
        schedule = build_schedule(s.schedule, list(model.parts()), annealing, options)
        check_parts(o, list(model.parts()), classes=getattr(model.config, "num_classes", 0))
        schedule.prepare(model)
    check_depth(model, config.depth_options, world.row.size, config.branch_options)
    if r.compile and (config.depth_options.executor != "serial" or world.row.size > 1):
        what = "branches" if task.shape.branches else "layers"
        raise ValueError(
            f"compile does not go with executor {config.depth_options.executor!r} on {world.row.size} process(es) that "
            f"share the {what}: torch.compile traces neither an iterative solve nor messages; leave one of them out"
        )
    _check_branch_executor(config, world)
    task.normalise(model)
    return model.to(world.device), task.to(world.device), schedule, autocast_dtype(r.precision, world.device)


def _check_branch_executor(config: Config, world: World) -> None:
    name = config.branch_options.branch_executor
    branch_executor(name)
    if name != "loop" and config.run_options.compile:
        raise ValueError(
            f"compile does not go with branch_executor {name!r}: torch.compile traces a loop over branches"
        )
    if name == "threads" and world.device.type != "cpu":
        raise ValueError(
            f"branch_executor 'threads' is for CPUs, and the device is {world.device}; take batched or auto"
        )
    if name == "auto" and world.processes > 1:
        raise ValueError(
            f"branch_executor 'auto' chooses for one process, and there are {world.processes}, which may choose "
            "differently; name the executor"
        )


def _train(
    config: Config,
    folder: Path,
    world: World,
    parts: _Parts,
    *,
    checkpoint: Checkpoint | None,
    on_batch: Callable[[int], None],
) -> dict[str, Any]:
    model, task, schedule, autocast = parts
    r = config.run_options
    store = CheckpointStore(folder / "checkpoints", keep=r.keep)
    trainer = Trainer(model, task, schedule, config, world=world, autocast=autocast, store=store)
    position = None
    if checkpoint is not None:
        trainer.load(checkpoint.tensors, checkpoint.state)
        position = checkpoint.state["metrics_position"]
    log = MetricsLog(folder, tensorboard=r.tensorboard, position=position) if world.is_main else SilentLog()
    try:
        if checkpoint is None:
            log.write("start", **_start_fields(trainer))
        else:
            log.write("resumed", step=trainer.step, layer_evals=trainer.spent.layer_evals)
        title = f"{config.model_options.model} on {task.data.name}"
        with ProgressView(enabled=world.is_main, title=title) as view, stop_on_signals() as stop:
            view.say(_headline(config, trainer))
            trainer.train(log, stop=stop, view=view, on_batch=on_batch)
    finally:
        log.close()
    return _finish(config, folder, world, trainer)


def _finish(config: Config, folder: Path, world: World, trainer: Trainer) -> dict[str, Any]:
    weights = trainer.final_weights()
    report: dict[str, Any] = {}
    if world.is_main:
        final = trainer.task.new_model().to(world.device)  # whole, where the trained one may have been shared out
        final.load_state_dict(weights)
        report = trainer.task.details(final, "test")
        write_json(folder / "evaluation.json", report)
        save_pretrained(final, folder, extra={"training": config.flat()})
    world.barrier()
    return {
        "run": str(folder),
        "accuracy": report.get("accuracy"),
        "loss": report.get("loss"),
        **trainer.task.measures(report.get("loss", []), "test"),
        **{name: report.get(name) for name in trainer.task.score_names},
        "parameters": sum(trainer.sizes.values()),
        "steps": trainer.step,
        "layer_evals": trainer.spent.layer_evals,
        "flops": trainer.spent.flops,
        "seconds": trainer.seconds,
    }


def _start_fields(trainer: Trainer) -> dict[str, Any]:
    return start_fields(trainer.model, trainer.task, trainer.budget, sizes=trainer.sizes)


def _headline(config: Config, trainer: Trainer) -> str:
    c, task, start = trainer.model.config, trainer.task, _start_fields(trainer)
    each = [str(depth) for depth in dict.fromkeys(c.branch_depths)] if c.branches else []
    shape = f"{c.branches} branches × {' or '.join(each)} layers" if c.branches else f"{c.layers} layers in series"
    return (
        f"{config.model_options.model}: {shape}, width {c.width}, {start['parameters']:,} parameters; "
        f"{task.data.name}: {task.count('train'):,} training, {task.count('validation'):,} validation, "
        f"{task.count('test'):,} test {task.unit}; "
        f"schedule {config.schedule_options.schedule}, budget {config.optimiser_options.budget}, "
        f"{'bf16' if trainer.autocast else 'float32'} on {trainer.world.device}"
    )
