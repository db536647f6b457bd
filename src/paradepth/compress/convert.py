"""From a finished run to a run of the same layers as branches, trained further or not."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paradepth.compress.measure import weigh
from paradepth.compress.output import tuning_cost, write_run
from paradepth.compress.step import Plan, check_plan, plan_text
from paradepth.compress.to_branches import ToBranches, ToInterleavedBranches
from paradepth.compress.tune import Distil, Tune
from paradepth.compress.workbench import Workbench, check_run
from paradepth.depth.as_branches import Groups
from paradepth.models import TrunkModel
from paradepth.train.folder import derived_folder

SUFFIX = "-converted"  # of the run that is written


def convert_run(
    run_dir: str | Path,
    *,
    branches: int,
    groups: Groups = "consecutive",
    tune: int = 0,
    distil: int = 0,
    learning_rate: float | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    data_dir: str | Path | None = None,
    device: str = "auto",
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Writes a run whose model has the layers of another run's, shared out among branches, and says what it costs.

    The result is a finished run, evaluated on the test split: `evaluate`, `predict`, `export`, `compress` take it,
    `finetune` and `train --init` train it further.

    Args:
        run_dir: a finished run of a serial stack, or of branches; it is left alone.
        branches: how many; 1 is the serial stack again.
        groups: which layers make a branch, see `paradepth.convert`.
        tune: updates on the targets after conversion; 0: none.
        distil: updates towards what the given run's model says and towards the targets, after those of `tune`.
        learning_rate: peak of both; None is half the run's.
        out: folder of the new run; RUN-converted by default.
        overwrite: replace the run that is in `out`.
        data_dir: where the data lies now; None takes the place that was used in training.
        device: "auto", "cpu" or "cuda".
        say: told what is done, line by line.

    Returns:
        "run" (the new one), "plan", "branches", "depths", "parameters"; "accuracy" and "loss" on the test split, each
        with "before", "converted" (right after) and "after" (trained further); "updates" and "layer_evals" spent.

    Raises:
        ValueError: not a finished run, layers that cannot be shared out so, numbers out of range, data without a
            validation split, or a folder that cannot be written.
    """
    run = Path(run_dir)
    for name, value in (("tune", tune), ("distil", distil)):
        if value < 0:
            raise ValueError(f"{name} is {value}; it is a number of updates, at least 0")
    if learning_rate is not None and tune + distil == 0:
        raise ValueError(f"learning_rate is {learning_rate}, and nothing is trained; give tune or distil")
    check_run(run)
    target = derived_folder(run, out, suffix=SUFFIX, overwrite=overwrite)
    plan = conversion_plan(branches, groups=groups, tune=tune, distil=distil)
    bench = Workbench.of_run(run, data_dir=data_dir, device=device, learning_rate=learning_rate)
    check_plan(plan, bench.teacher)
    return _convert(run, target, plan, bench, say)


def conversion_plan(branches: int, *, groups: Groups = "consecutive", tune: int = 0, distil: int = 0) -> Plan:
    """The steps that convert a model and train it further.

    Raises:
        ValueError: fewer than one branch, or other groups.

    >>> plan_text(conversion_plan(4, groups="interleaved", distil=300))
    'interleaved=4+distil=300'
    """
    kinds = {"consecutive": ToBranches, "interleaved": ToInterleavedBranches}
    if groups not in kinds:
        raise ValueError(f"groups is {groups!r}; it must be one of {', '.join(kinds)}")
    steps = [*([Tune(tune)] if tune else []), *([Distil(distil)] if distil else [])]
    return (kinds[groups](branches), *steps)


def _convert(run: Path, out: Path, plan: Plan, bench: Workbench, say: Callable[[str], object]) -> dict[str, Any]:
    begun = time.perf_counter()
    model: TrunkModel = bench.teacher
    tested = [bench.test(model)]
    say(f"before: {_described(tested[0])}")
    for step in plan[:-1]:
        model = step.apply(model, bench)
        tested.append(bench.test(model))
        say(f"{step}: {_described(tested[-1])}")
    model = plan[-1].apply(model, bench)
    seconds = time.perf_counter() - begun
    key = hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()
    points = {"full": _point(bench.teacher, "full", bench), "chosen": _point(model, plan_text(plan), bench)}
    points["full"]["test"] = tested[0]
    origin = {"plan": plan_text(plan), "from": str(run), "model": key, "limits": "", "rule": "", "points": points}
    with tempfile.TemporaryDirectory() as folder:
        saved = model.save_pretrained(folder)
        write_run(out, model, plan, bench, saved=saved, origin=origin, seconds=seconds)
    tested.append(points["chosen"]["test"])
    say(f"{plan[-1]}: {_described(tested[-1])}")
    cost = tuning_cost(plan, bench)
    return {
        "run": str(out),
        "plan": plan_text(plan),
        "branches": model.config.branches,
        "depths": list(model.config.branch_depths),
        "parameters": points["chosen"]["parameters"],
        **{
            name: {"before": tested[0][name], "converted": tested[1][name], "after": tested[-1][name]}
            for name in ("accuracy", "loss")
        },
        "updates": cost[0],
        "layer_evals": cost[1].layer_evals,
    }


def _point(model: TrunkModel, plan: str, bench: Workbench) -> dict[str, Any]:
    found = bench.validate(model)
    return {"plan": plan, **asdict(weigh(model)), "accuracy": found.accuracy[-1], "loss": found.loss[-1]}


def _described(tested: dict[str, float]) -> str:
    return f"test accuracy {100 * tested['accuracy']:.2f} %, loss {tested['loss']:.4f}"
