"""Early stop: what a sample gets, what is saved, what calibration promises; the command on real runs."""

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
from commands import answer
from paradepth.cli import main
from paradepth.models import EarlyStop, SequenceClassifier, SequenceClassifierConfig, calibrate
from paradepth.models.early_stop import NEVER, confidence, stopping_points
from paradepth.train import start_run
from runs import tiny_config


def images(branches: int = 3, **options: Any) -> tuple[Any, Tensor]:
    shape = {"image_size": 8, "patch_size": 4, "channels": 1, "width": 8, "heads": 2, "mlp": 12, "num_classes": 3}
    model = paradepth.create_model("paraformer_nano", branches=branches, **{**shape, "depth": 1, **options})
    with torch.no_grad():
        model.head.classify.weight.mul_(20)  # confidences apart from 1/3
    return model.double().eval(), torch.rand(12, 1, 8, 8, dtype=torch.float64)


def texts(branches: int = 3) -> tuple[Any, Tensor]:
    config = SequenceClassifierConfig(context=9, width=8, heads=2, mlp=12, branches=branches, depth=2, num_classes=3)
    model = SequenceClassifier(config).double().eval()
    tokens = torch.randint(0, 255, (12, 9))
    for row in range(12):
        tokens[row, 1 + row % 9 :] = config.pad
    return model, tokens


@given(
    branches=st.integers(2, 4),
    aggregate=st.sampled_from(["residual", "sum"]),
    kind=st.sampled_from([images, texts]),
    quantile=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
)
def test_a_sample_gets_what_its_prefix_says_and_stops_at_the_first_threshold(
    branches: int, aggregate: str, kind: Any, quantile: float
) -> None:
    model, inputs = kind(branches)
    model.trunk.aggregate = aggregate
    with torch.no_grad():
        logits = model.prefix_logits(inputs)
    sure = confidence(logits)
    thresholds = [float(sure[k].quantile(quantile)) + 1e-7 for k in range(branches - 1)]
    result = EarlyStop(model, thresholds)(inputs)
    for sample in range(len(inputs)):
        first = next((k for k in range(branches - 1) if sure[k, sample] >= thresholds[k]), branches - 1)
        assert result.used_B[sample] == first + 1
        torch.testing.assert_close(result.logits_BN[sample], logits[first, sample], rtol=1e-9, atol=1e-9)
    assert torch.equal(stopping_points(sure, thresholds), result.used_B)


def test_branches_are_evaluated_on_the_samples_that_are_left_and_not_at_all_when_none_is() -> None:
    model, inputs = images(4)
    seen: dict[int, int] = {}
    for i, branch in enumerate(model.trunk.branches):
        branch.register_forward_hook(lambda module, given, out, i=i: seen.update({i: len(given[0])}))
    with torch.no_grad():
        sure = confidence(model.prefix_logits(inputs))
    seen.clear()
    median = float(sure[0].median()) + 1e-9
    used = EarlyStop(model, [median, NEVER, 0.0])(inputs).used_B
    left = int((sure[0] < median).sum())
    assert 0 < left < 12
    assert seen == {0: 12, 1: left, 2: left}, "the last branch has nothing to do"
    assert used.bincount().tolist() == [0, 12 - left, 0, left]


@given(
    samples=st.integers(1, 40),
    branches=st.integers(2, 5),
    tolerance=st.sampled_from([0.0, 0.01, 0.1, 0.3]),
    seed=st.integers(0, 10_000),
    coarse=st.booleans(),
)
def test_calibration_keeps_its_promise_on_the_samples_it_saw(
    samples: int, branches: int, tolerance: float, seed: int, coarse: bool
) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(branches, samples, 3, generator=draw)
    if coarse:
        logits = logits.round()  # equal confidences
    targets = torch.randint(0, 3, (samples,), generator=draw)
    thresholds = calibrate(logits, targets, tolerance=tolerance)
    assert len(thresholds) == branches - 1
    used = stopping_points(confidence(logits), thresholds)
    right = logits.argmax(dim=-1) == targets
    stopped_right = right[used - 1, torch.arange(samples)]
    assert int(right[-1].sum()) - int(stopped_right.sum()) <= tolerance * samples + 1e-9


def test_calibration_lets_as_many_stop_as_it_may() -> None:
    sure, unsure = [4.0, 0.0], [0.3, 0.0]
    wrong = [0.0, 0.2]
    logits = torch.tensor([[sure, unsure, wrong], [sure, sure, sure]])
    targets = torch.tensor([0, 0, 0])
    (strict,) = calibrate(logits, targets)
    assert stopping_points(confidence(logits), [strict]).tolist() == [1, 1, 2]
    assert calibrate(logits, targets, tolerance=0.34) == (0.0,)
    lost_then_won = torch.tensor([[[0.0, 5.0], [4.0, 0.0]], [sure, [0.0, 1.0]]])  # no more is lost than won, in the end
    assert calibrate(lost_then_won, torch.tensor([0, 0])) == (NEVER,)
    confident_but_wrong = torch.tensor([[[0.0, 5.0], sure], [sure, sure]])
    assert calibrate(confident_but_wrong, torch.tensor([0, 0])) == (NEVER,)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: EarlyStop(images()[0], [0.5]), "takes 2"),
        (lambda: EarlyStop(images()[0], [0.5, -0.1]), "at least 0"),
        (lambda: EarlyStop(images(1)[0], []), "at least two branches"),
        (lambda: EarlyStop(paradepth.create_model("vit_nano"), []), "at least two branches"),
        (lambda: EarlyStop(paradepth.create_model("tagger_nano"), [0.5]), "one decision for each sample"),
        (lambda: calibrate(torch.zeros(2, 3, 2), torch.zeros(3), tolerance=1.0), "below 1"),
        (lambda: calibrate(torch.zeros(2, 0, 2), torch.zeros(0)), "there are none"),
    ],
)
def test_refusals(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_the_command_on_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    start_run(tiny_config("one_pass", budget="60 steps", validations=1, detach=False), run)
    found = answer(capsys, "evaluate", run, "--early-stop", "0.03")
    saved = json.loads((run / "early_stop.json").read_text())
    assert saved == {key: value for key, value in found.items() if key not in ("run", "file")}
    evaluated = answer(capsys, "evaluate", run)
    assert found["full_accuracy"] == pytest.approx(evaluated["accuracy"][-1])
    curve = {point["tolerance"]: point for point in found["curve"]}
    assert set(curve) == {0.0, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05}
    at = curve[0.03]
    assert found["stopped"] == at["stopped"], "stopping in earnest is what the curve says"
    assert found["stopping_accuracy"] == pytest.approx(at["stopping_accuracy"])
    assert sum(found["stopped"]) == found["samples"]
    assert found["layer_evals"] == pytest.approx(found["mean_branches"])  # branches of one layer
    branches = [point["mean_branches"] for point in found["curve"]]
    assert branches[0] > branches[-1]
    assert main(["evaluate", str(run), "--early-stop", "0.03", "--branches", "2"]) == 0
    assert "accepted loss" in capsys.readouterr().out
    for options in (["--early-stop", "1.5"], ["--early-stop", "0", "--branches", "1"]):
        assert main(["evaluate", str(run), *options]) == 2


def test_the_command_on_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, count in (("train", 48), ("validation", 16), ("test", 12)):
        rows = [
            {"sentence": f"{'good' if i % 2 else 'bad'} film {i}" + " really" * (i % 5), "label": i % 2}
            for i in range(count)
        ]
        (tmp_path / "sst2").mkdir(exist_ok=True)
        (tmp_path / "sst2" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"model": "text_classifier_nano", "patch_size": None, "flip": False, "crop_padding": 0, "data": "sst2"}
    more = {"data_dir": tmp_path, "tokenizer": "bytes", "context": 48, "batch_size": 16, "budget": "12 steps"}
    start_run(tiny_config("one_pass", **options, **more, validations=1), tmp_path / "run")
    found = answer(capsys, "evaluate", tmp_path / "run", "--early-stop", "0.02")
    assert sum(found["stopped"]) == found["samples"]
    assert found["stopped"] == next(p["stopped"] for p in found["curve"] if p["tolerance"] == 0.02)
