"""From a run to the frontier of what it can be shrunk to, and from a limit to a run of its own."""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from paradepth.atomic import write_json
from paradepth.compress.choose import Limits, Point, choose, parse_size
from paradepth.compress.frontier import FOLDER, FULL, Frontier, Record, leading, name_of
from paradepth.compress.output import write_run
from paradepth.compress.plans import QUICK_STEPS, TUNE_STEPS, default_plans
from paradepth.compress.step import Plan, check_plan, parse_plan, plan_text
from paradepth.compress.workbench import Workbench, check_run
from paradepth.export.latency import warning
from paradepth.train import Interrupted
from paradepth.train.folder import check_writable, derived_folder

FILE = "frontier.json"  # in RUN/compression: the table
SUFFIX = "-compressed"  # of the run that is chosen


def compress_run(
    run_dir: str | Path,
    *,
    plans: Sequence[str] = (),
    tune_steps: int | None = None,
    quick: bool = False,
    max_size: str | int | None = None,
    max_latency: float | None = None,
    max_loss_of_accuracy: float | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    test: bool = False,
    data_dir: str | Path | None = None,
    device: str = "auto",
    latency: bool = True,
    threads: int | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Computes the frontier of a finished run; with limits, writes the run of a point that meets them.

    Every point is on disk (RUN/compression) as soon as it is computed; the same call later goes on with the rest.
    Points are computed and chosen on the validation split. The test split is evaluated after choosing: for the chosen
    point, and with `test` for every point.

    Args:
        run_dir: the run.
        plans: what to try, as in "prefix=2+distil=300+int8"; none: the plans of `default_plans`.
        tune_steps: updates of each recovery and distillation of the default plans (300, or 100 with `quick`).
        quick: fewer default plans.
        max_size: bytes at most, as a number or as `parse_size` reads it.
        max_latency: milliseconds at batch 1 at most.
        max_loss_of_accuracy: percentage points below the full model at most; the smallest point that meets all limits
            is taken. Without this limit the most accurate one is.
        out: folder of the chosen run; RUN-compressed by default.
        overwrite: replace the run that is in `out`.
        test: evaluate the test split for every point of the table.
        data_dir: where the data lies now; None takes the place that was used in training.
        device: "auto", "cpu" or "cuda".
        latency: measure latencies.
        threads: CPU threads of that measurement; None is PyTorch's present number.
        say: told what is done, line by line.

    Returns:
        "run", "frontier" (the file of the table), "points", "left_out" (default plans that do not fit and plans whose
        training broke down, with reasons), and of a choice "chosen", "rule" and "out".

    Raises:
        ValueError: not a finished run, a quantised one, plans that do not fit, options that contradict each other,
            folders that cannot be written, or limits that no point meets (`NoSuchPoint`).
        Interrupted: SIGTERM or SIGINT; what was computed is kept.
    """
    run = Path(run_dir)
    check_run(run)
    limits = _limits(run, max_size, max_latency, max_loss_of_accuracy)
    if limits.latency is not None and not latency:
        raise ValueError(
            f"max_latency is {limits.latency}, and latencies are not to be measured; leave one of them out"
        )
    target = _target(run, out, limits, overwrite=overwrite)
    if plans and (quick or tune_steps is not None):
        raise ValueError("tune_steps and quick belong to the default plans; in a plan write tune=300 or distil=300")
    if tune_steps is not None and tune_steps < 1:
        raise ValueError(f"tune_steps is {tune_steps}; it must be at least 1")
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; it must be at least 1")
    named = [parse_plan(text) for text in plans]
    bench = Workbench.of_run(run, data_dir=data_dir, device=device)
    for plan in named:
        _check_plan(plan, bench)
    left_out: dict[str, str] = {}
    if not named:
        steps = tune_steps or (QUICK_STEPS if quick else TUNE_STEPS)
        named, left_out = default_plans(bench.teacher, tune_steps=steps, quick=quick)
    check_writable(run / FOLDER, str(run / FOLDER))
    for reason in dict.fromkeys(left_out.values()):
        say(f"left out: {', '.join(plan for plan, why in left_out.items() if why == reason)} ({reason})")
    with _stoppable():
        frontier = Frontier(bench, run, say=say)
        return _run(frontier, named, left_out, limits, target, chosen_from_all=not plans, latency=latency, test=test,
                    threads=threads)  # fmt: skip


def _run(
    frontier: Frontier,
    plans: Sequence[Plan],
    left_out: dict[str, str],
    limits: Limits,
    target: Path | None,
    *,
    chosen_from_all: bool,
    latency: bool,
    test: bool,
    threads: int | None,
) -> dict[str, Any]:
    computed = {record["plan"] for record in frontier.compute(plans)}
    known = [_plan_of(record) for record in frontier.known()]
    if latency:
        frontier.time([plan for plan in known if plan], threads=threads)
    points = _points(frontier)
    table: dict[str, Any] = {
        "model": frontier.key,
        "split": "validation",
        "samples": frontier.bench.task.count("validation"),
        "machine": frontier.timed().get("machine"),
        "note": _busy(frontier),
        "points": points,
        "left_out": {**left_out, **frontier.failed},
        "chosen": _chosen_before(frontier),
    }
    file = frontier.folder / FILE
    write_json(file, table)
    result: dict[str, Any] = {"run": str(frontier.run), "frontier": str(file)}
    if target is not None:
        allowed = [point for point in points if chosen_from_all or point["plan"] in computed]
        result |= _choose(frontier, allowed, limits, target)
        table["chosen"] = {key: result[key] for key in ("chosen", "rule", "limits")}
    if test:
        for plan in known:
            _test(frontier, plan)
    table["points"] = points = _points(frontier)
    write_json(file, table)
    return {**result, "points": points, "left_out": table["left_out"]}


def _busy(frontier: Frontier) -> str | None:
    """What to say of the latencies, where they were measured on a busy machine."""
    machine = frontier.timed().get("machine")
    return None if machine is None else warning(machine)


def _chosen_before(frontier: Frontier) -> dict[str, Any] | None:
    try:
        found = json.loads((frontier.folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found["chosen"] if found.get("model") == frontier.key else None


def _choose(frontier: Frontier, points: Sequence[Record], limits: Limits, target: Path) -> dict[str, Any]:
    by_plan = {point["plan"]: point for point in points}
    full = _comparable(by_plan[FULL])
    chosen = choose([_comparable(point) for point in points], limits, full=full)["plan"]
    plan = _plan_of(by_plan[chosen])
    frontier.say(f"chosen: {chosen}, the {limits.rule} with {limits}")
    origin = {
        "plan": chosen,
        "from": str(frontier.run),
        "model": frontier.key,
        "limits": str(limits),
        "rule": limits.rule,
        "points": {"full": dict(by_plan[FULL]), "chosen": dict(by_plan[chosen])},
    }
    origin["points"]["full"]["test"] = _test(frontier, ())
    seconds = sum((frontier.record(plan[:k]) or {}).get("seconds", 0.0) for k in range(1, len(plan) + 1))
    evaluation = write_run(
        target, frontier.model(plan), plan, frontier.bench, saved=frontier.place(plan), origin=origin, seconds=seconds
    )
    _keep_test(frontier, plan, {"accuracy": evaluation["accuracy"][-1], "loss": evaluation["loss"][-1]})
    return {"chosen": chosen, "rule": limits.rule, "limits": str(limits), "out": str(target)}


def _comparable(point: Record) -> Point:
    latency = None if point["latency"] is None else point["latency"][0]["median_ms"]
    return {**point, "latency": latency}


def _points(frontier: Frontier) -> list[Record]:
    """The table: records with "latency" (rows by batch size, or None), "test" (or None), and "leads", which says of
    which costs the point is not beaten: "bytes", "latency" (at batch 1)."""
    timed = frontier.timed().get("points", {})
    tested = _tests(frontier)
    points = [
        {key: _finite(value) for key, value in record.items() if key != "model"}
        | {"latency": timed.get(record["plan"]), "test": tested.get(record["plan"])}
        for record in frontier.known()
    ]
    lead = {"bytes": leading(points, cost=lambda point: point["bytes"])}
    if all(point["latency"] for point in points):
        lead["latency"] = leading(points, cost=lambda point: point["latency"][0]["median_ms"])
    return [point | {"leads": [cost for cost, plans in lead.items() if point["plan"] in plans]} for point in points]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- the test split ------------------------------------------------------------------------------------------


def _tests(frontier: Frontier) -> dict[str, Any]:
    try:
        found = json.loads((frontier.folder / "test.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found["points"] if found.get("model") == frontier.key else {}


def _keep_test(frontier: Frontier, plan: Plan, found: dict[str, Any]) -> None:
    points = _tests(frontier) | {name_of(plan): _finite(found)}
    write_json(frontier.folder / "test.json", {"model": frontier.key, "points": points})


def _test(frontier: Frontier, plan: Plan) -> dict[str, Any]:
    """Accuracy and loss of a point on the test split, evaluated once; of the full model as training left them."""
    known = _tests(frontier).get(name_of(plan))
    if known is not None:
        return known
    bench = frontier.bench
    found = _evaluation(frontier.run) if not plan else None
    if found is None:
        frontier.say(f"evaluating the test split: {name_of(plan)}")
        found = bench.test(frontier.model(plan))
    _keep_test(frontier, plan, found)
    return found


def _evaluation(run: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
        return {key: found[key][-1] for key in ("accuracy", "loss")} if found["split"] == "test" else None
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


# ---- what is refused -----------------------------------------------------------------------------------------


def _limits(run: Path, size: str | int | None, latency: float | None, accuracy_loss: float | None) -> Limits:
    if isinstance(size, str):
        size = parse_size(size, full=(run / "model.safetensors").stat().st_size)
    return Limits(size=size, latency=latency, accuracy_loss=accuracy_loss)


def _target(run: Path, out: str | Path | None, limits: Limits, *, overwrite: bool) -> Path | None:
    if not limits:
        for name, value in (("out", out), ("overwrite", overwrite or None)):
            if value is not None:
                raise ValueError(
                    f"{name} is {value}, and no limit is given that a point could be chosen by; name a size, a latency "
                    "or a loss of accuracy"
                )
        return None
    return derived_folder(run, out, suffix=SUFFIX, overwrite=overwrite)


def _check_plan(plan: Plan, bench: Workbench) -> None:
    try:
        check_plan(plan, bench.teacher)
    except ValueError as error:
        raise ValueError(f"plan {plan_text(plan)} does not fit this run: {error}") from error


@contextmanager
def _stoppable() -> Iterator[None]:
    """Turns SIGTERM and SIGINT into `Interrupted`. Files are written atomically, so work can stop anywhere."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        raise Interrupted(f"stopped by {name}; finished points are kept, and the same command goes on with the rest")

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _plan_of(record: Record) -> Plan:
    return () if record["plan"] == FULL else parse_plan(record["plan"])
