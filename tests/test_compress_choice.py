"""Which point is chosen, which points lead, which plans are tried; the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import paradepth
from fake_runs import make_run
from paradepth.compress import check_plan, parse_plan, plan_text
from paradepth.compress.choose import Limits, NoSuchPoint, choose, lost, parse_size
from paradepth.compress.frontier import leading
from paradepth.compress.measure import latencies, weigh
from paradepth.compress.plans import default_plans
from paradepth.report import write_report
from paradepth.report.compression import frontier_rows, read_frontier

POINT = st.builds(
    lambda size, accuracy, loss, latency: {"bytes": size, "accuracy": accuracy / 40, "loss": loss, "latency": latency},
    st.integers(1, 40),
    st.integers(0, 40),
    st.floats(0, 5),
    st.floats(0.1, 9),
)
POINTS = st.lists(POINT, min_size=1, max_size=12).map(
    lambda found: [{"plan": "full" if n == 0 else f"plan{n}", **point} for n, point in enumerate(found)]
)
LIMITS = st.builds(
    Limits,
    size=st.none() | st.integers(1, 40),
    latency=st.none() | st.floats(0.1, 9),
    accuracy_loss=st.none() | st.integers(0, 60).map(float),
).filter(bool)


def meets(point: dict[str, Any], limits: Limits, full: dict[str, Any]) -> bool:
    """The limits in words, again."""
    return (
        (limits.size is None or point["bytes"] <= limits.size)
        and (limits.latency is None or point["latency"] <= limits.latency)
        and (
            limits.accuracy_loss is None
            or 2.5 * round(40 * (full["accuracy"] - point["accuracy"])) <= limits.accuracy_loss
        )
    )


@given(points=POINTS, limits=LIMITS)
def test_the_chosen_point_meets_the_limits_and_no_better_one_does(points: list[Any], limits: Limits) -> None:
    full = points[0]
    meeting = [point for point in points if meets(point, limits, full)]
    if not meeting:
        with pytest.raises(NoSuchPoint) as refused:
            choose(points, limits, full=full)
        nearest = next(p for p in points if f"nearest is {p['plan']}:" in str(refused.value))
        assert limits.excess(nearest, full) == min(limits.excess(point, full) for point in points)
        return
    chosen = choose(points, limits, full=full)
    assert chosen in meeting
    if limits.accuracy_loss is not None:
        assert chosen["bytes"] == min(point["bytes"] for point in meeting)
    else:
        assert chosen["accuracy"] == max(point["accuracy"] for point in meeting)
        same = [point for point in meeting if point["accuracy"] == chosen["accuracy"]]
        assert chosen["loss"] == min(point["loss"] for point in same)


@given(points=POINTS)
def test_a_point_leads_if_none_is_as_accurate_at_a_lower_cost(points: list[Any]) -> None:
    found = leading(points, cost=lambda point: point["bytes"])

    def beats(a: dict[str, Any], b: dict[str, Any]) -> bool:
        no_worse = a["bytes"] <= b["bytes"] and a["accuracy"] >= b["accuracy"]
        return no_worse and (a["bytes"], a["accuracy"]) != (b["bytes"], b["accuracy"])

    for point in points:
        twins = [p for p in points if (p["bytes"], p["accuracy"]) == (point["bytes"], point["accuracy"])]
        wanted = not any(beats(other, point) for other in points) and point is twins[0]
        assert (point["plan"] in found) == wanted


def test_a_loss_of_accuracy_is_in_percentage_points() -> None:
    full, other = {"accuracy": 0.91}, {"accuracy": 0.90}
    assert lost(other, full) == 1.0
    assert lost(full, other) == -1.0
    points = [{"plan": "full", "bytes": 9, "loss": 1.0, "latency": None, **full}]
    points.append({"plan": "half", "bytes": 4, "loss": 1.0, "latency": None, **other})
    assert choose(points, Limits(accuracy_loss=1.0), full=points[0])["plan"] == "half"
    assert choose(points, Limits(accuracy_loss=0.99), full=points[0])["plan"] == "full"
    with pytest.raises(NoSuchPoint, match=r"half: 4 bytes, accuracy 90\.00 %, 1\.00 points below the full model"):
        choose(points, Limits(size=3), full=points[0])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000", 1000),
        ("1kB", 1000),
        ("1.5 KiB", 1536),
        ("2MB", 2_000_000),
        ("0.25x", 1000),
        (".5x", 2000),
        *((wrong, None) for wrong in ("1e3", "", "-5", "x", "0", "5 parsecs", "0.0001x")),
    ],
)
def test_sizes(text: str, size: int | None) -> None:
    if size is None:
        with pytest.raises(ValueError, match="max_size is"):
            parse_size(text, full=4000)
    else:
        assert parse_size(text, full=4000) == size


@pytest.mark.parametrize(("name", "branches"), [("paraformer_nano", n) for n in (1, 2, 4, 8)] + [("vit_nano", 0)])
@pytest.mark.parametrize("quick", [False, True])
def test_default_plans_fit_the_model_and_begin_with_the_single_steps(name: str, branches: int, quick: bool) -> None:
    model = paradepth.create_model(name, **({"branches": branches} if branches else {}), depth=1)
    plans, left_out = default_plans(model, tune_steps=7, quick=quick)
    texts = [plan_text(plan) for plan in plans]
    assert len(set(texts)) == len(texts) <= 60
    for plan in plans:
        check_plan(plan, model)
    assert all("int4" in plan for plan in left_out)  # everything else fits images
    assert all(f"={count}" not in text for text in texts for count in (300, 100))
    assert ("prefix=1" in texts) == (branches > 1)
    assert {"int8", "magnitude=0.7", "magnitude=0.7+tune=7"} <= set(texts)


def frontier_file(run: Path, **more: Any) -> Path:
    rows = [("full", 0.9, 840_000, 4.0), ("int8", 0.899, 230_000, 5.0), ("prefix=2", 0.88, 420_000, 2.0)]
    rows += [("prefix=1+distil=300+int8", 0.87, 70_000, 1.2), ("magnitude=0.9", 0.2, 200_000, 4.1)]
    points = [
        {
            "plan": plan, "accuracy": accuracy, "loss": 0.4, "bytes": size, "parameters": 210_000, "nonzero": 200_000,
            "flops": 5_000_000, "seconds": 1.0, "test": None, "leads": [],
            "latency": [{"batch": b, "median_ms": ms * b, "low_ms": ms, "high_ms": ms, "runs": 9} for b in (1, 8)],
        }
        for plan, accuracy, size, ms in rows
    ]  # fmt: skip
    for cost, key in (("bytes", lambda p: p["bytes"]), ("latency", lambda p: p["latency"][0]["median_ms"])):
        for point in points:
            if point["plan"] in leading(points, cost=key):
                point["leads"].append(cost)
    machine = {"device": "cpu", "cpus": 2, "threads": 1, "load_average": 1.0, "torch": "2"}
    table = {"points": points, "split": "validation", "samples": 600, "machine": machine, "left_out": {}, **more}
    folder = run / "compression"
    folder.mkdir(exist_ok=True)
    (folder / "frontier.json").write_text(json.dumps(table))
    return folder / "frontier.json"


def test_the_page_of_a_compressed_run_shows_its_frontier(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert "Compression" not in write_report([run]).read_text()
    frontier_file(
        run,
        note="the machine was busy",
        chosen={"chosen": "int8"},
        left_out={"int4": "no kernel", "prefix=1+int4": "no kernel"},
    )
    page = write_report([run]).read_text()
    assert "Validation accuracy against bytes on disk, %" in page
    assert "Validation accuracy against latency at batch 1, %" in page
    assert "Triangles: points below the axis (1)." in page
    assert "Left out: int4, prefix=1+int4: no kernel." in page
    assert "Beware: the machine was busy." in page
    assert "mathdefault" not in page
    rows = frontier_rows(read_frontier(run) or {})
    assert rows[0]["plan"].replace("\u200b", "") == "prefix=1+distil=300+int8"
    assert [row["best"] for row in rows] == [True, False, True, True, True]
    assert rows[2]["remark"] == "chosen, bytes"
    assert rows[0]["smaller"] == "12.00"
    assert rows[0]["change"] == "−3.00"


def test_a_damaged_table_is_refused_by_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    file = frontier_file(run)
    file.write_text(file.read_text()[:50])
    with pytest.raises(ValueError, match=r"frontier.json is damaged"):
        write_report([run])
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"frontier.json is damaged: it has no 'points'"):
        write_report([run])


KINDS = {
    "text_classifier_nano": {"context": 6, "vocab_size": 19, "pad": 0, "separator": 2},
    "gpt_nano": {"context": 6, "vocab_size": 19},
    "bert_nano": {"context": 6, "vocab_size": 19, "pad": 0},
    "tagger_nano": {"context": 6},
    "translator_nano": {"context": 6, "vocab_size": 19, "pad": 0},
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("branches", [0, 2])
def test_models_of_texts_are_measured_and_have_plans_that_fit(name: str, branches: int) -> None:
    shape: dict[str, Any] = {"width": 8, "heads": 2, "mlp": 12, "depth": 1, "branches": branches, **KINDS[name]}
    model = paradepth.create_model(name, **shape).eval()
    plans, left_out = default_plans(model, tune_steps=1)
    texts = [plan_text(plan) for plan in plans]
    assert {"int8", "heads=1+tune=1", "neurons=6+tune=1"} <= set(texts)
    assert ("prefix=1" in texts) == (branches > 0)
    assert all("merge" in plan or "branches" in why for plan, why in left_out.items())
    before = torch.get_num_threads()
    found = latencies({"full": model, "int8": parse_plan("int8")[0].apply(model, None)}, threads=1, seconds=0.01)  # pyright: ignore[reportArgumentType]
    assert torch.get_num_threads() == before
    assert {name: [row["batch"] for row in rows] for name, rows in found.items()} == {"full": [1, 64], "int8": [1, 64]}


def test_weights_that_are_zero_or_integers_are_told_apart() -> None:
    model = paradepth.create_model("paraformer_nano", branches=2, depth=1).eval()
    whole = weigh(model)
    assert whole.parameters == sum(p.numel() for p in model.parameters())
    weight = model.trunk.branches[0].layers[0].mlp.up.weight
    with torch.no_grad():
        weight[: len(weight) // 2] = 0
    pruned = weigh(model)
    assert whole.nonzero - pruned.nonzero == weight.numel() // 2
    assert whole.bytes - pruned.bytes > 4 * weight.numel() // 2 - weight.numel() // 8 - 300  # less a bit for each
    integers = weigh(parse_plan("int8")[0].apply(model, None))  # pyright: ignore[reportArgumentType]
    assert (integers.parameters, integers.flops) == (whole.parameters, whole.flops)
    assert integers.nonzero <= pruned.nonzero
    assert integers.bytes < 0.3 * whole.bytes
