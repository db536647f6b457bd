"""What a trained serial model loses as branches, and what training it further brings back."""

from __future__ import annotations

import copy
from pathlib import Path

from paradepth.compress import Distil, Tune, Workbench
from paradepth.compress.output import tuning_cost
from paradepth.depth import AsBranches, Stack
from paradepth.depth.as_branches import Groups
from paradepth.models import TrunkModel
from paradepth.studies.measurements._source import check_seed
from paradepth.studies.record import read_events

Figures = dict[str, float | list[float]]


def measure(
    *,
    seed: int,
    data_dir: Path | None,
    run_dir: Path,
    source: Path | None,
    branches: int,
    groups: Groups = "consecutive",
    buffers: tuple[int, int] = (0, 0),
    fractions: tuple[float, ...] = (),
    ways: tuple[str, ...] = ("tuned", "distilled"),
) -> Figures:
    """Accuracy and loss on the test split right after conversion and after further training of several lengths.

    Each length is a training of its own from the converted weights: AdamW, half the rate that the run was trained with,
    warm-up and cosine. Nothing is chosen on the test split.

    Args:
        seed: of the run; batches are those that it was trained on.
        data_dir: where the data lies.
        run_dir: not written to.
        source: a finished run of a serial stack.
        branches: how many to convert to; 1 leaves the serial stack as it is.
        groups: which layers make a branch.
        buffers: numbers of first and of last layers that are left in series; such a model is the serial one under
            another executor.
        fractions: lengths of further training, as parts of the updates that the run took.
        ways: of it: "tuned" on the targets alone, "distilled" towards the serial model as well.

    Returns:
        For each way lists, such as `tuned_accuracy` and `tuned_loss`: first right after conversion, then after each
        fraction; `parameters`, `layers`, and the `layer_evals` of all trainings together, where there were some.

    Raises:
        ValueError: no source, a run of another seed, fractions that make no update, unknown ways, or what cannot be
            converted.
    """
    if source is None:
        raise ValueError("a conversion starts from a finished run, and none is given")
    bench = Workbench.of_run(source, data_dir=data_dir)
    check_seed(seed, bench.config, source)
    steps = _steps(source)
    wrong = [fraction for fraction in fractions if not 0 < fraction <= 1 or round(fraction * steps) < 1]
    if wrong:
        raise ValueError(f"fractions are {list(fractions)}; of {steps} updates {wrong[0]} makes none")
    if not ways or not set(ways) <= {"tuned", "distilled"}:
        raise ValueError(f"ways are {list(ways)}; they must be some of 'tuned' and 'distilled'")
    model = _converted(bench.teacher, branches, groups, (int(buffers[0]), int(buffers[1])))
    converted = bench.test(model)
    found: dict[str, list[float]] = {}
    spent = 0.0
    for way in ways:
        teacher = bench.teacher if way == "distilled" else None
        results = [converted]
        for fraction in fractions:
            updates = round(fraction * steps)
            results.append(bench.test(bench.tune(model, steps=updates, teacher=teacher)))
            spent += tuning_cost((Distil(updates) if teacher else Tune(updates),), bench)[1].layer_evals
        found |= {f"{way}_{key}": [result[key] for result in results] for key in ("accuracy", "loss")}
    return {
        **found,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": model.config.layers,
        **({"layer_evals": spent} if fractions else {}),
    }


def _converted(model: TrunkModel, branches: int, groups: Groups, buffers: tuple[int, int]) -> TrunkModel:
    """A copy of the model as branches."""
    if buffers == (0, 0):
        return model.convert(branches, groups=groups).eval()
    executor = AsBranches(branches, groups=groups, buffers=buffers)
    new = copy.deepcopy(model).eval()
    if not isinstance(new.trunk, Stack):
        raise ValueError(
            f"buffers are {buffers}, and the run is one of branches; a serial stack has first and last layers"
        )
    executor.check(new.trunk)
    new.trunk.executor = executor
    return new


def _steps(run: Path) -> int:
    """Updates that a finished run took.

    Raises:
        ValueError: it is not finished.
    """
    ends = [event for event in read_events(run / "metrics.jsonl") if event["event"] == "end"]
    if not ends:
        raise ValueError(f"{run} is not finished: its log has no end")
    return int(ends[-1]["step"])
