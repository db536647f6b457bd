"""The page of one run, and the entry point that writes the page of one run or of several."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from paradepth.report import compression, depth, explanation, figure, plots, text
from paradepth.report.confusion import confusion_table
from paradepth.report.examples import example_groups
from paradepth.report.measures import Measure
from paradepth.report.read import Run, is_numbers, number, read_run

SMALL = ("accuracy", "loss")  # measures that every run has: shown after its own ones


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of one run (default `<run>/report.html`) or the comparison of several (then `out` is required).

    Args:
        runs: run directories. One that was interrupted or never evaluated is reported as such.
        out: the HTML file to write. It is replaced in one step, so a reader never sees half a page.

    Returns:
        The path written.

    Raises:
        ValueError: no runs, the same run twice, no `out` for several, or a file that is missing or damaged (named with
            its line).
        OSError: the page cannot be written.
    """
    from paradepth.report.compare import comparison_page

    paths = [Path(run) for run in runs]
    if not paths:
        raise ValueError("no run directory was given; one or more are needed")
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"a run directory was given twice: {', '.join(map(str, paths))}")
    if len(paths) > 1 and out is None:
        raise ValueError(f"a comparison of {len(paths)} runs needs an output file; only a single run has a default")
    loaded = [read_run(path) for path in paths]
    target = Path(out) if out is not None else paths[0] / "report.html"
    return write_page(run_page(loaded[0]) if len(loaded) == 1 else comparison_page(loaded), target)


def write_page(html: str, target: Path) -> Path:
    """Write a page atomically: a temporary file beside it, then one replacement."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(html)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files private; a report has ordinary permissions
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target


def render(template: str, **context: Any) -> str:
    """Render one of the package's templates; every value is escaped unless it is Markup."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("paradepth.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    light, dark = figure.theme_variables(dark=False), figure.theme_variables(dark=True)
    return environment.get_template(template).render(light=light, dark=dark, fmt=text, **context)


def run_page(run: Run) -> str:
    """HTML of the page of one run."""
    frontier, origin = compression.read_frontier(run.path), compression.read_origin(run.path)
    explained = explanation.read_explanation(run.path)
    with figure.style():
        progress, prefixes, branches = plots.progress(run), plots.prefix_curves(run), plots.branches(run)
        found = run.evaluation or {}
        confusion = confusion_table(found["confusion"], run.class_names) if found.get("confusion") else None
        layer_parallel = depth.depth_plots(run)
        frontier_plots = compression.frontier_plots(frontier, run) if frontier else []
        explained_plots = explanation.explanation_plots(explained) if explained else []
    return render(
        "run.html.j2",
        title=f"{run.label} on {run.data}",
        subtitle=subtitle(run),
        facts=facts(run),
        notices=notices(run),
        progress=progress,
        prefixes=prefixes,
        branches=branches,
        layer_parallel=layer_parallel,
        depth_rows=depth.depth_rows(run),
        frontier_plots=frontier_plots,
        frontier_rows=compression.frontier_rows(frontier) if frontier else [],
        frontier_notes=compression.frontier_notes(frontier, run) if frontier else [],
        explained_plots=explained_plots,
        explained_rows=explanation.explanation_rows(explained) if explained else [],
        explained_notes=explanation.explanation_notes(explained) if explained else [],
        origin=origin,
        origin_rows=compression.origin_rows(origin) if origin else [],
        serial=run.branches == 0,
        main=run.main,
        split=run.split,
        counted=run.kind.counted,
        section=run.kind.section,
        prefix_columns=[measure.name for measure in table_measures(run)],
        prefix_rows=prefix_rows(run),
        remarks=remarks(run),
        confusion=confusion,
        examples=example_groups(found.get("examples") or [], run.class_names, run.branches),
        cost=cost(run),
        environment=text.settings(run.environment, ("command",)),
        model=text.settings(run.model, ("class_names", "tag_names", "label_names")),
        training=text.settings({name: value for name, value in run.options.items() if value is not None}),
        defaults=[name.replace("_", " ") for name, value in run.options.items() if value is None],
        command=str(run.environment.get("command", "")),
    )


def subtitle(run: Run) -> str:
    """One sentence: what was trained on what, and what it cost."""
    how = f", {run.schedule} schedule" if run.schedule else ""
    if run.branches:
        body = f"ParaFormer of {text.plural(run.branches, 'branch')}"
        depths = run.model.get("depths")
        each = f"{', '.join(map(str, depths))} layers" if depths else None
        body += f", {each or text.plural(int(run.model.get('depth', 0)), 'layer') + ' each'}"
    elif "encoder" in run.model:
        body = f"Encoder of the transformers library of {text.plural(int(run.model.get('depth', 0)), 'layer')}"
    else:
        body = f"Serial Transformer of {text.plural(int(run.model.get('depth', 0)), 'layer')}"
    samples = number(run.start, "train_samples")
    on = f", trained on {samples:,.0f} {run.unit}" if math.isfinite(samples) else ""
    seed = run.training.get("seed")
    return f"{body}, width {run.model.get('width', '?')}{how}{on}{f', seed {seed}' if seed is not None else ''}."


def facts(run: Run) -> list[tuple[str, str, str]]:
    """The headline figures: name, value, remark."""
    measures = [run.measure(key) for key in run.kind.headline if run.values(key)] or [run.main]
    samples = number(run.evaluation or {}, "samples")
    counted = number(run.evaluation or {}, run.kind.counted) if run.kind.counted != run.unit else math.nan
    remark = f"{samples:,.0f} {run.unit}" if math.isfinite(samples) else ""
    remark = f"{counted:,.0f} {run.kind.counted} in {remark}" if remark and math.isfinite(counted) else remark
    headline = []
    for place, measure in enumerate(measures):
        values = run.values(measure.key)
        name = f"{run.split.capitalize()} {measure.name}" if values else measure.capital
        shown = measure.show(values[-1]) if values else text.MISSING
        missing = "not tested" if values else "not measured"
        headline.append((name, shown, (missing if run.evaluation is None else remark) if place == 0 else ""))
    seconds, device = run.seconds, str(run.environment.get("device", ""))
    layers = number(run.start, "layers")
    return [
        *headline,
        ("Parameters", text.count(run.start["parameters"]), f"{layers:.0f} layers" if math.isfinite(layers) else ""),
        ("Layer evaluations", text.count(run.layer_evals), "of training"),
        ("Training compute", text.count(run.flops, "FLOP"), ""),
        ("Training time", text.duration(seconds), f"on {device}" if device else ""),
    ]


def notices(run: Run) -> list[str]:
    """What a reader must know before believing the numbers."""
    found = []
    if run.end is None:
        step = number(run.last, "step")
        where = (
            f" The last entry of its log is step {step:,.0f}."
            if math.isfinite(step)
            else " Its log has no entries yet."
        )
        found.append(f"Training did not reach its end: it was interrupted, or is still going on.{where}")
    elif run.end.get("reason", "budget") != "budget":
        found.append(f"Training ended early: {run.end['reason']}.")
    if run.evaluation is None:
        if run.active and run.active < run.branches:
            found.append(f"Only {run.active} of {run.branches} branches were in use at the last validation.")
        rest = "figures below are those of the last validation." if run.accuracy else "there is nothing to show."
        found.append(f"This run has no test evaluation; {rest}")
    resumed = sum(event["event"] == "resumed" for event in run.interruptions)
    if resumed:
        found.append(f"Training was resumed {'once' if resumed == 1 else f'{resumed} times'} from a checkpoint.")
    return found


def table_measures(run: Run) -> list[Measure]:
    """The columns of the table by prefix: what the run is judged by, the other measures, then what every run has."""
    if not run.measures:
        return []
    others = [measure for measure in run.measures if measure.key != run.main.key]
    return [run.main, *sorted(others, key=lambda measure: measure.key in SMALL)]


def prefix_rows(run: Run) -> list[dict[str, Any]]:
    """The table by prefix: measures, gain in the first of them, parameters, forward FLOPs, contribution."""
    contribution, main = run.contribution, run.values(run.main.key)
    parameters, flops = run.start["parameters_by_prefix"], run.start.get("forward_flops") or []
    rows = []
    for k in range(len(main)):
        shown = [measure.show(run.values(measure.key)[k]) for measure in table_measures(run)]
        rows.append(
            {
                "prefix": str(k + 1),
                "main": shown[0],
                "gain": run.main.difference(main[k] - main[k - 1]) if k else text.MISSING,
                "others": shown[1:],
                "parameters": text.count(parameters[k]) if k < len(parameters) else text.MISSING,
                "flops": text.count(flops[k], "FLOP") if k < len(flops) else text.MISSING,
                "contribution": text.decimal(contribution[k], 3) if k < len(contribution) else text.MISSING,
            }
        )
    return rows


def remarks(run: Run) -> list[str]:
    """What an evaluation says in words: notes on the data, the signature of a score, results of further splits."""
    found = run.evaluation or {}
    said = [f"{note[:1].upper()}{note[1:]}".rstrip(".") + "." for note in map(str, found.get("notes") or [])]
    if found.get("decoding"):
        said.append(f"Decoding: {found['decoding']}.")
    for key, signature in (found.get("signatures") or {}).items():
        said.append(f"Signature of {run.measure(key).name}: {signature}")
    for name, other in found.items():
        if isinstance(other, Mapping) and is_numbers(other.get("accuracy")):
            samples = number(other, "samples")
            of = f" of {samples:,.0f} {run.unit}" if math.isfinite(samples) else ""
            reached = run.measure("accuracy").show(float(other["accuracy"][-1]))
            said.append(f"Split {name!r}{of}: {run.measure('accuracy').name} {reached}.")
    return said


def cost(run: Run) -> list[tuple[str, str]]:
    """Parameters, FLOPs and time, in full."""
    budget = run.start.get("budget") or {}
    per_sample = run.start.get("forward_flops") or [math.nan]
    speed = [number(event, "samples_per_second") for event in run.train]
    speed = [value for value in speed if math.isfinite(value)]
    rows = [
        ("parameters", f"{run.start['parameters']:,}"),
        ("forward pass of one sample", text.count(float(per_sample[-1] or math.nan), "FLOP")),
        ("training compute", text.count(run.flops, "FLOP")),
        ("layer evaluations", f"{run.layer_evals:,.0f}"),
        (
            "budget",
            f"{text.evals(float(budget['value']))} {str(budget.get('unit', '')).replace('_', ' ')}"
            if budget.get("value")
            else "",
        ),
        ("steps", f"{number(run.last, 'step'):,.0f}" if "step" in run.last else ""),
        ("training time", text.duration(run.seconds)),
        ("samples per second, median", f"{np.median(speed):,.0f}" if speed else ""),
    ]
    for name in ("train", "validation", "test"):
        if math.isfinite(samples := number(run.start, f"{name}_samples")):
            rows.append((f"{name} samples", f"{samples:,.0f} {run.unit}"))
    return [row for row in rows if row[1]]
