"""The page of claims says what the committed figures say, and leaves no claim out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paradepth.studies import STUDIES, get_study
from paradepth.studies.claims import BENCHMARKS, SUBJECTS, Row, page, rows
from paradepth.studies.claims import branches as of_branches
from paradepth.studies.claims import compression as of_sizes
from paradepth.studies.claims import layers as of_layers
from paradepth.studies.claims.__main__ import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def found() -> list[Row]:
    return rows(ROOT)


def test_the_committed_page_is_what_the_figures_give() -> None:
    assert (ROOT / "docs" / "claims.md").read_text() == page(ROOT), "run `make claims`"


def test_every_subject_has_a_claim_and_every_claim_a_source(found: list[Row]) -> None:
    names = {row.claim.name for row in found}
    missing = [(subject, name) for subject, wanted in SUBJECTS.items() for name in wanted if name not in names]
    assert missing == []
    assert len(names) == len(found)
    for row in found:
        assert row.link.startswith(("studies/", "benchmarks/"))
        assert row.command


def test_no_row_is_empty_once_its_study_has_run(found: list[Row]) -> None:
    """A study whose results are all there gives a verdict and a figure for each of its claims, and so does every
    benchmark; only of a study that lacks results a row may say so."""
    done = {name for name in STUDIES if _is_done(name)}
    for row in found:
        is_study = row.link.startswith("studies/")
        if not is_study or row.link.split("/")[1] in done:
            assert row.verdict is not None, row.claim.name
            assert (ROOT / row.link).exists(), row.link
    assert len(done) < len(STUDIES) or "not run yet" not in page(ROOT)


def _is_done(name: str) -> bool:
    results = ROOT / "studies" / name / "results.json"
    return results.exists() and json.loads(results.read_text())["missing"] == []


def test_the_command_writes_the_page_and_refuses_other_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("studies", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    assert main([str(tmp_path)]) == 2
    assert "has docs/ and studies/" in capsys.readouterr().err
    (tmp_path / "docs").mkdir()
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "docs" / "claims.md").read_text()
    assert text == page(ROOT)
    table = [line for line in text.splitlines() if line.startswith("| ") and line.endswith("` |")]
    assert len(table) == len(rows(ROOT))
    assert all(line.replace("\\|", "").count("|") == 5 for line in table)


def test_two_claims_of_one_name_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paradepth.studies.claims.BENCHMARKS", (*BENCHMARKS, BENCHMARKS[0]))
    with pytest.raises(ValueError, match=f"claims of the same name: {BENCHMARKS[0].claim.name}"):
        rows(ROOT)


def test_claims_of_studies_are_of_all_sizes_alike() -> None:
    for name in STUDIES:
        assert get_study(name, "smoke").claims == get_study(name, "paper").claims == get_study(name).claims


# ---- the rules of benchmarks -------------------------------------------------------------------------------------


def row(case: str, family: str, milliseconds: float, branches: int = 1) -> dict[str, Any]:
    network = f"{branches}×{12 // branches}"
    shown = {"case": case, "family": family, "network": network, "branches": branches, "payload_bytes": [151000]}
    return shown | {"milliseconds": {"median": milliseconds}}


def devices(*found: dict[str, Any], world: int = 2) -> dict[str, Any]:
    return {"results": list(found), "environment": {"world_size": world, "device": "cpu"}}


OURS, OLD, ALONE = "branch-parallel, loop", "pipeline (fairscale Pipe)", "one device"


@pytest.mark.parametrize(
    ("ours", "answer"),
    [((10.0, 10.0), "holds"), ((10.0, 20.0), "holds with conditions"), ((20.0, 20.0), "does not hold")],
)
def test_speed_over_old_pipelines(ours: tuple[float, float], answer: str) -> None:
    cases = [row(f"case {n}", *pair) for n, time in enumerate(ours) for pair in ((OURS, time), (OLD, 30.0))]
    verdict = of_branches.faster_than_fairscale(devices(*cases))
    assert verdict.verdict == answer
    assert f"case 0 {30 / ours[0]:.2f}" in verdict.figure


@pytest.mark.parametrize(
    ("ours", "answer"), [(11.0, "holds"), (15.0, "holds with conditions"), (19.0, "does not hold")]
)
def test_speed_of_devices(ours: float, answer: str) -> None:
    case = "latency, batch 1"
    verdict = of_branches.devices_for_branches(devices(row(case, OURS, ours, 6), row(case, ALONE, 20.0)))
    assert verdict.verdict == answer
    assert f"{20 / ours:.2f} times as fast, of at most 2" in verdict.figure


def test_latency_is_told_only_with_a_device_for_each_branch() -> None:
    case = "latency, batch 1"
    some = [row(case, OURS, 10.0, 4), row(case, OURS, 10.5, 6)]
    assert of_branches.constant_latency(devices(*some)).verdict == "could not be tested here"
    assert of_branches.constant_latency(devices(*some, world=6)).verdict == "holds"
    slow = [row(case, OURS, 10.0, 4), row(case, OURS, 15.0, 6)]
    assert of_branches.constant_latency(devices(*slow, world=6)).verdict == "does not hold"


@pytest.mark.parametrize(
    ("peer", "answer"), [(30.0, "holds with conditions"), (60.0, "holds"), (10.0, "does not hold")]
)
def test_devices_against_all_peers(peer: float, answer: str) -> None:
    found = [row("a", OURS, 20.0), row("a", ALONE, peer), row("b", OURS, 40.0), row("b", "data parallel (DDP)", peer)]
    assert of_branches.depth_on_equal_devices(devices(*found)).verdict == answer


@pytest.mark.parametrize(("batched", "answer"), [(1.3, "holds"), (1.05, "does not hold")])
def test_fused_branches(batched: float, answer: str) -> None:
    shared = {"precision": "bf16", "batch": 1, "threads": 2}
    found = [
        {**shared, "way": way, "over_best_serial": {"median": speed}}
        for way, speed in (("batched", batched), ("loop", 0.9), ("threads", 9.0))
    ]
    verdict = of_branches.fused_branches({"results": found, "environment": {"device": "cpu"}})
    assert verdict.verdict == answer
    assert f"{batched:.2f} (0.90)" in verdict.figure


def plan(name: str, accuracy: float, parameters: int, size: int) -> dict[str, Any]:
    return {"plan": name, "test": {"accuracy": accuracy}, "parameters": parameters, "bytes": size}


@pytest.mark.parametrize(
    ("prefix", "size", "answer"),
    [(20, 20, "holds"), (30, 19, "holds with conditions"), (30, 30, "does not hold")],
)
def test_compression(prefix: int, size: int, answer: str) -> None:
    points = [plan("full", 0.9, 100, 100), plan("prefix=1", 0.896, prefix, 30), plan("int8", 0.9, 100, 40)]
    points += [plan("prefix=1+int8", 0.896, prefix, size), plan("prefix=1+int4", 0.5, prefix, 1)]
    found, same = {"points": points}, {"points": [points[0], plan("prefix=1", 0.896, 20, 20)]}
    verdict = of_sizes.compression_at_minimal_loss(found, found)
    assert verdict.verdict == answer
    mixed = of_sizes.compression_at_minimal_loss(found, same)  # one set of data where it holds
    assert mixed.verdict == (answer if answer == "holds" else "holds with conditions")
    assert f"prefix=1: {100 / prefix:.2f} times smaller in parameters for 0.40 points" in verdict.figure


@pytest.mark.parametrize(
    ("extra", "answer"),
    [
        ([("prefix=1+int8", 0.9, 10), ("prefix=1+magnitude=0.5+int8", 0.9, 8)], "holds"),
        ([("prefix=1+int8", 0.9, 10), ("prefix=1+magnitude=0.5+int8", 0.8, 8)], "holds with conditions"),
        ([("prefix=1+int8", 0.8, 10)], "does not hold"),
    ],
)
def test_quantisation_and_pruning(extra: list[tuple[str, float, int]], answer: str) -> None:
    points = [plan("full", 0.9, 100, 100), plan("prefix=1", 0.9, 30, 30)]
    points += [plan(name, accuracy, 30, size) for name, accuracy, size in extra]
    verdict = of_sizes.quantisation_and_pruning({"points": points}, {"points": points})
    assert verdict.verdict == answer
    assert ("no pruned model" in verdict.figure) == (answer != "holds")
    assert ("no quantised model" in verdict.figure) == (answer == "does not hold")


def solved(cosine: float, **fields: Any) -> dict[str, Any]:
    cost = {"evaluations": 40, "chain": 15}
    gradients = [{"forward": 1, "backward": 1, "cosine": cosine, "forward_cost": cost, "backward_cost": cost}]
    own = {"h": "1/N", "training": 0, "coarse": "sample", "relaxation": "F", "coarsening": 4}
    return own | fields | {"gradients": gradients}


@pytest.mark.parametrize(
    ("cosines", "answer"),
    [((1.0, 0.99, 0.9), "holds"), ((1.0, 0.9, 0.95), "does not hold"), ((1.0, 0.999, 0.995), "does not hold")],
)
def test_bias_of_gradients(cosines: tuple[float, ...], answer: str) -> None:
    found = [solved(cosine, training=100 * n) for n, cosine in enumerate(cosines)]
    assert of_layers.gradient_bias({"results": found}).verdict == answer


@pytest.mark.parametrize(
    ("after", "answer"),
    [((1.0, 0.3), "holds"), ((0.9, 0.3), "holds with conditions"), ((0.9, 0.05), "does not hold")],
)
def test_buffers(after: tuple[float, float], answer: str) -> None:
    before = {"results": [solved(0.2), solved(0.1, h="1")]}
    verdict = of_layers.buffer_layers(before, {"results": [solved(after[0]), solved(after[1], h="1")]})
    assert verdict.verdict == answer
    assert f"h = 1/N: 0.20 without, {after[0]:.2f} with" in verdict.figure


def test_a_choice_that_serves_in_every_network() -> None:
    poor = [solved(0.999), solved(0.5, h="1")]
    good = [solved(0.995, coarse="branch"), solved(0.992, coarse="branch", h="1")]
    found = {"results": [*poor, *good], "settings": {"layers": 32}}
    verdict = of_layers.choice_of_coarse_solver(found)
    assert verdict.verdict == "holds"
    assert "by branch, c = 4, F, 1 iterations forward and 1 backward" in verdict.figure
    assert "depth of 30 of 64" in verdict.figure
    assert "in at most 1 of 2 networks" in verdict.figure
    assert of_layers.choice_of_coarse_solver(found | {"results": poor}).verdict == "does not hold"
    assert of_layers.choice_of_coarse_solver(found | {"settings": {"layers": 15}}).verdict == "does not hold"


@pytest.mark.parametrize(
    ("ranks", "time", "slower", "speed_up"),
    [
        (2, 1.2, "holds", "could not be tested here"),
        (2, 0.8, "does not hold", "could not be tested here"),
        (8, 0.3, "does not hold", "holds"),
        (8, 0.5, "does not hold", "does not hold"),
    ],
)
def test_times_of_layer_parallel_training(ranks: int, time: float, slower: str, speed_up: str) -> None:
    found = {"ranks": ranks, "cheapest": {"h = 1": {"setting": "half/F 1/1", "time": time}}}
    assert of_layers.two_devices_may_be_slower(found).verdict == slower
    assert of_layers.layer_parallel_speed_up(found).verdict == speed_up


@pytest.mark.parametrize(("ours", "answer"), [(5, "holds"), (7, "holds with conditions"), (11, "does not hold")])
def test_memory(ours: int, answer: str) -> None:
    variants = {"serial": 10, "serial on 2 processes": 6, "MGRIT on 2 processes, recompute": ours}
    found = [{"variant": name, "peak_megabytes": peak} for name, peak in variants.items()]
    assert of_layers.memory({"results": found}).verdict == answer
