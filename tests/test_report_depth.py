"""The layer-parallel part of a run's page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fake_runs import make_run
from paradepth.report import write_report
from paradepth.report.depth import depth_plots, depth_rows
from paradepth.report.figure import style
from paradepth.report.read import read_run


def found(rho: float | None, mode: str = "parallel", change: str = "") -> dict[str, Any]:
    return {"rho": rho, "residual": 0.01, "iterations": 2, "mode": mode, "change": change}


def layer_parallel_run(path: Path) -> Path:
    run = make_run(path, branches=0, depth=8, schedule="joint")
    metrics = run / "metrics.jsonl"
    events = [json.loads(line) for line in metrics.read_text().splitlines()]
    for index, event in enumerate(events):
        if event["event"] == "train":
            event |= {"forward_iterations": None if index > 20 else 1, "backward_iterations": 1, "evaluations": [9, 12]}
    first, second = found(1.3, "serial", "serial"), found(None, change="more iterations")
    early, late = [300.0, 0.1, 0.0, None, 0.1, 0.1, 0.2, 2.0], [400.0, 0.2, 0.1, 0.1, 0.2, 0.1, 0.2, 3.0]
    extra = [
        {"event": "probe", "step": 0, "forward": found(0.0), "backward": found(0.2), "cosine": 1.0, "relative_norm": 1},
        {"event": "probe", "step": 50, "forward": first, "backward": second, "cosine": 0.3, "relative_norm": 1.7},
        {"event": "probe", "step": 90, "backward": found(0.4)},
        {"event": "lipschitz", "step": 40, "layer_evals": 10.0, "estimates": early},
        {"event": "lipschitz", "step": 80, "layer_evals": 20.0, "estimates": late},
    ]
    metrics.write_text("".join(json.dumps(event) + "\n" for event in [*events, *extra]))
    return run


def test_the_page_shows_probes_iterations_gradients_and_lipschitz_constants(tmp_path: Path) -> None:
    run = layer_parallel_run(tmp_path / "run")
    page = write_report([run]).read_text()
    for title in (
        "Depth in parallel",
        "Convergence factor ρ",
        "Iterations and mode",
        "Gradient against the serial one",
        "Lipschitz constant by layer",
        "What the controller changed",
    ):
        assert title in page
    assert "mathdefault" not in page  # formulas would be printed as text
    assert depth_rows(read_run(run)) == [
        {"step": "50", "direction": "forward", "rho": "1.3", "change": "serial", "iterations": "serial"},
        {"step": "50", "direction": "backward", "rho": "not finite", "change": "more iterations", "iterations": "2"},
    ]


def test_an_ordinary_run_has_no_such_part(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert "Depth in parallel" not in write_report([run]).read_text()
    with style():
        assert depth_plots(read_run(run)) == []
