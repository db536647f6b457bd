"""Runs of gated models: training, what is left out, and what is reported of gates and calibration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import paradepth
from paradepth.atomic import write_text
from paradepth.cli.runs import COMMANDS
from paradepth.report.page import run_page
from paradepth.report.read import read_run
from paradepth.studies import gated, get_study
from paradepth.studies.gated import CONDITIONAL, DEPENDENT, GATED, LEFT_OUT, PLAIN
from paradepth.studies.measurements.routing import measure
from paradepth.studies.sharing import ABLATION, EFFICIENCY, NAMES, SIZES, TIMES, WIDENED
from paradepth.train import Config, resume_run, start_run
from paradepth.train.calibration import BINS, calibration_error
from paradepth.train.tasks import load_data
from paradepth.train.use import evaluate_run
from runs import Stop, stop_at, tiny_config

SHORT: dict[str, Any] = {"aggregate": "gated", "budget": "12 steps", "validations": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gates that pay, so that some of them close."""
    folder = tmp_path_factory.mktemp("gated") / "run"
    start_run(tiny_config(**SHORT, gate_penalty=2.0, optimiser="muon"), folder)
    model = paradepth.from_pretrained(folder)
    with torch.no_grad():  # as after long training: gates that tell samples apart
        for branch in model.trunk.branches:
            branch.gate.weight.normal_(std=4.0)
    model.save_pretrained(folder / "open")
    (folder / "open" / "model.safetensors").replace(folder / "model.safetensors")
    return folder


def test_gates_learn_and_the_penalty_closes_them(tmp_path: Path) -> None:
    found = []
    for penalty in (0.0, 5.0):
        start_run(tiny_config(**SHORT, gate_penalty=penalty), tmp_path / str(penalty))
        told = json.loads((tmp_path / str(penalty) / "evaluation.json").read_text())
        assert len(told["gate"]) == len(told["gate_spread"]) == 3
        assert any(spread > 0 for spread in told["gate_spread"])
        found.append(sum(told["gate"]))
    assert found[1] < found[0] - 0.1


def test_a_run_resumes_exactly(tmp_path: Path) -> None:  # under other schedules: test_sharing
    config = tiny_config("stagewise-plateau", **SHORT | {"budget": "8 steps"})
    start_run(config, tmp_path / "whole")
    with pytest.raises(Stop):
        start_run(config, tmp_path / "cut", on_batch=stop_at(6))
    resume_run(tmp_path / "cut")
    one, other = (paradepth.from_pretrained(tmp_path / name) for name in ("whole", "cut"))
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert any(p.any() for p in one.trunk.gate_parameters())


def test_evaluate_tells_what_is_left_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = evaluate_run(run)
    assert evaluate_run(run, skip_below=0.0) == full
    assert "branches_run" not in full
    found = COMMANDS["evaluate"][0]([str(run), "--skip-below", "1.0"])
    task = load_data(tiny_config(**SHORT))
    model = paradepth.from_pretrained(run)
    inputs, targets = task.ordered("test", 0, task.count("test"))
    gates = model.gates(inputs)
    needed = gates >= 1.0
    assert 0.05 < needed.double().mean() < 0.95
    assert found["branches_run"] == pytest.approx(needed.double().sum(0).mean().item())
    assert found["run"] == pytest.approx(needed.double().mean(1).tolist())
    assert found["layer_evals"] == pytest.approx(found["branches_run"])  # branches of one layer
    assert found["layer_evals_saved"] == pytest.approx(1 - found["branches_run"] / 3)
    x, sides = model.embed(inputs)
    with torch.no_grad():  # the oracle: those gates at 0
        plain = paradepth.from_pretrained(run)
        delta = torch.stack([branch(x, *sides) - x for branch in plain.trunk.branches])
        logits = model.decode(x + ((gates * needed)[..., None, None] * delta).sum(0), inputs)
    assert found["accuracy"][-1] == pytest.approx((logits.argmax(-1) == targets).double().mean().item())
    assert found["loss"][-1] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)


def test_the_report_shows_gates_and_calibration(run: Path) -> None:
    page = run_page(read_run(run))
    assert "calibration error" in page
    assert "mean gate" in page


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"skip_below": -0.1}, "at least 0"),
        ({"skip_below": 0.1, "branch_executor": "batched"}, "one after another"),
        ({"skip_below": 0.1, "branch_processes": 2}, "one after another"),
    ],
)
def test_evaluate_refuses(run: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        evaluate_run(run, **options)


def test_what_cannot_be_gated_is_refused_before_work_starts(tmp_path: Path) -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"gate_penalty": 0.1}, "no gates"),
        ({"gate_penalty": -0.1, "aggregate": "gated"}, "gate_penalty is -0.1"),
        ({"share": "mlp", "schedule": "stagewise"}, "new_branch=random"),
        ({"share": "mlp", "branch_processes": 2}, "start a multiple of 2"),
    )
    for options, words in cases:
        with pytest.raises(ValueError, match=words):
            start_run(tiny_config(**options), tmp_path / "run")
        assert not (tmp_path / "run").exists()
    start_run(tiny_config(budget="1 steps", validations=1), tmp_path / "plain")
    with pytest.raises(ValueError, match="has no gates that say"):
        evaluate_run(tmp_path / "plain", skip_below=0.1)
    with pytest.raises(ValueError, match="own rule"):
        COMMANDS["evaluate"][0]([str(tmp_path / "plain"), "--skip-below", "0.1", "--early-stop", "0.01"])


# ---- calibration -----------------------------------------------------------------------------------------------


@given(samples=st.integers(1, 60), classes=st.integers(2, 5), seed=st.integers(0, 9))
def test_calibration_error_is_its_definition(samples: int, classes: int, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    p_nBN = (3 * torch.randn(2, samples, classes, generator=draws)).softmax(dim=-1)
    targets = torch.randint(-1, classes, (samples,), generator=draws)
    assert calibration_error(p_nBN, targets) == pytest.approx(
        [by_bins(p[targets >= 0], targets) for p in p_nBN], abs=1e-6
    )


def by_bins(p_BN: Tensor, targets: Tensor) -> float:
    confidence, predicted = p_BN.max(dim=-1)
    right, total = predicted == targets[targets >= 0], 0.0
    for low in range(BINS):
        inside = (confidence > low / BINS) & (confidence <= (low + 1) / BINS)
        if inside.any():
            total += abs(float(right[inside].double().sum() - confidence[inside].double().sum()))
    return total / max(len(p_BN), 1)


def test_classifiers_of_images_and_texts_have_it_by_prefix(tmp_path: Path) -> None:
    rows = "".join(f"{word} thing,{label}\n" for label, word in enumerate(("good", "bad")) for _ in range(30))
    write_text(tmp_path / "texts.csv", "text,label\n" + rows)
    config = Config().replace(
        model="text_classifier_nano", branches=2, depth=1, width=16, heads=2, mlp=16, context=16, aggregate="gated",
        data="labelled", data_dir=tmp_path / "texts.csv", columns=("text", "label"), tokenizer="bytes",
        budget="4 steps", batch_size=8, validations=1, device="cpu", precision="float32",
    )  # fmt: skip
    start_run(config, tmp_path / "texts")
    start_run(tiny_config(budget="4 steps", validations=1), tmp_path / "images")
    for name, branches in (("texts", 2), ("images", 3)):
        told = json.loads((tmp_path / name / "evaluation.json").read_text())
        assert len(told["calibration_error"]) == branches
        assert all(0 <= error <= 1 for error in told["calibration_error"])
        assert ("gate" in told) == (name == "texts")


# ---- studies ---------------------------------------------------------------------------------------------------


def test_routing_measures_what_the_model_does(run: Path, tmp_path: Path) -> None:
    found = measure(seed=0, data_dir=None, run_dir=tmp_path, source=run, tolerance=0.02)
    full = evaluate_run(run)
    assert found["full"] == pytest.approx(full["accuracy"][-1])
    assert isinstance(found["subsets"], list)
    assert found["subsets"][0] == pytest.approx(full["accuracy"][-1])
    threshold = found["threshold"]
    assert isinstance(threshold, float)
    routed = evaluate_run(run, skip_below=threshold) if threshold else full
    assert found["routed"] == pytest.approx(routed["accuracy"][-1], abs=1e-6)
    assert found["saved"] == pytest.approx(routed.get("layer_evals_saved", 0.0), abs=1e-6)
    assert isinstance(found["parts_saved"], list)
    assert found["parts_saved"] == sorted(found["parts_saved"])
    with pytest.raises(ValueError, match="give the cell one"):
        measure(seed=0, data_dir=None, run_dir=tmp_path, source=None)


def test_widened_trunks_have_the_parameters_of_one_that_shares_nothing() -> None:
    for size in ("here", "paper"):
        chosen = SIZES[size]
        base = {"width": 64, "heads": 2, "mlp": 256} if size == "here" else {"width": 192, "heads": 3, "mlp": 768}
        shape = {key: chosen["shape"][key] for key in ("branches", "depth")}
        with torch.device("meta"):
            whole = parameters({**base, **shape})
            for task in chosen["wider"].values():
                for share, wider in task.items():
                    assert parameters({**wider, **shape, "share": share}) == pytest.approx(whole, rel=0.02), share


def parameters(options: dict[str, Any]) -> int:
    return sum(p.numel() for p in paradepth.create_model("paraformer_nano", **options).trunk.parameters())


def record(group: str, label: str, seed: int, **measures: float) -> dict[str, Any]:
    return {
        "name": f"{group} {label} {seed}", "group": group, "label": label, "seed": seed, "parameters": 1000,
        "accuracy": [measures.get("accuracy", 0.0)], "loss": [1.0], "measures": measures,
    }  # fmt: skip


@pytest.mark.parametrize(("gain", "answer"), [(0.02, "holds"), (-0.02, "does not hold"), (0.0, "does not hold")])
def test_verdicts_of_gates_follow_from_the_figures(gain: float, answer: str) -> None:
    study, records = get_study("gated"), []
    tasks = gated.SIZES["here"]["tasks"]
    for task in tasks:
        for row in (PLAIN, GATED):
            for seed in range(3):
                accuracy = 0.8 + (gain if row == GATED else 0.0) + 0.001 * seed
                records.append(record(task, row, seed, accuracy=accuracy, calibration_error=0.05))
                routed = {"routed": accuracy, "saved": 0.3, "fixed": accuracy - gain, "threshold": 0.1}
                routed |= {"full": accuracy, "constant": accuracy, "gate_spread": 0.1, "gate": 0.9}
                records.append(record(task + LEFT_OUT, row, seed, **routed))
    assert study.verdicts is not None
    found = study.verdicts(records)
    assert found[DEPENDENT].verdict == answer
    assert found[CONDITIONAL].verdict == answer
    assert len(study.findings(records)) == 2 * len(tasks)
    assert study.verdicts(records[:2])[DEPENDENT].verdict == "could not be tested here"


@pytest.mark.parametrize(("cost", "answer"), [(0.02, "holds"), (-0.02, "does not hold")])
def test_verdicts_of_sharing_follow_from_the_figures(cost: float, answer: str) -> None:
    study, records = get_study("sharing"), []
    for share, row in NAMES.items():
        for seed in range(3):
            accuracy = 0.8 + 0.001 * seed
            records.append(record("Fashion-MNIST", row, seed, accuracy=accuracy))
            if share != "none":
                records.append(record("Fashion-MNIST" + WIDENED, row, seed, accuracy=accuracy - cost))
            speed = 1.0 if share == "none" or cost < 0 else 1.5
            times = {"loop_speedup": 1.0, "batched_speedup": speed, "chain": 2, "serial_chain": 8}
            records.append(record(TIMES, row, seed, **times))
    assert study.verdicts is not None
    found = study.verdicts(records)
    assert found[ABLATION].verdict == answer
    assert found[EFFICIENCY].verdict == answer
    assert len(study.findings(records)) == 3
