"""Targets that do not count: in the loss of a step, over parts of a batch, and over processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import paradepth
from paradepth.models import CausalLM
from paradepth.train.schedules import Objective
from paradepth.train.step import IGNORED, TrainStep, split
from processes import run_together
from runs import events


def tiny(branches: int = 2) -> CausalLM:
    torch.manual_seed(0)
    options = {"vocab_size": 11, "context": 6, "width": 8, "heads": 2, "mlp": 16, "branches": branches, "depth": 1}
    return paradepth.create_model("gpt_nano", **options).double()


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31 - 1))
def test_the_loss_is_the_mean_over_the_targets_that_count(samples: int, tokens: int, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    model = tiny()
    inputs_BT = torch.randint(11, (samples, tokens), generator=draws)
    targets_BT = torch.randint(11, (samples, tokens), generator=draws)
    targets_BT[torch.rand(samples, tokens, generator=draws) < 0.5] = IGNORED
    loss, hits = TrainStep(model)(inputs_BT, targets_BT, Objective(2))
    counted = targets_BT != IGNORED
    if not counted.any():
        assert loss.item() == 0
        assert hits.item() == 0
        return
    logits_NV = model(inputs_BT)[counted].float()
    torch.testing.assert_close(loss, F.cross_entropy(logits_NV, targets_BT[counted]))
    assert hits.item() == (logits_NV.argmax(-1) == targets_BT[counted]).sum().item()


def test_a_batch_without_targets_leaves_finite_gradients() -> None:
    model = tiny()
    targets_BT = torch.full((2, 3), IGNORED)
    loss, _ = TrainStep(model, label_smoothing=0.1)(torch.zeros(2, 3, dtype=torch.long), targets_BT, Objective(2))
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_tuples_of_inputs_are_cut_along_their_samples() -> None:
    inputs = (torch.arange(4), torch.arange(8).view(4, 2))
    first, second = split(inputs, 2)
    assert first[0].tolist() == [0, 1]
    assert second[1].tolist() == [[4, 5], [6, 7]]


def sentences() -> str:
    """CoNLL-U sentences of 1 to 8 words, four of each length."""
    tags = ("NOUN", "VERB", "ADJ", "DET")
    rows = []
    for length in [*range(1, 9)] * 4:
        for i in range(length):
            rows.append(f"{i + 1}\tw{(3 * i + length) % 5}\t_\t{tags[(i + length) % 4]}\t_\t_\t0\t_\t_\t_\n")
        rows.append("\n")
    return "".join(rows)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_with_unequal_numbers_of_targets_train_as_one(accumulate: int, tmp_path: Path) -> None:
    """Sentences of 1 to 8 words: no two parts of a batch have as many targets."""
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.conllu").write_text(sentences())
    words = ["--data=conllu", f"--data-dir={tmp_path}", "--depth=1", "--budget=6 steps", "--batch-size=8"]
    words += ["--validations=3", "--precision=float32", "--threads=1", "--device=cpu", "--dropout=0"]
    words += [f"--accumulate={accumulate}"]
    for processes in (1, 2):
        run = tmp_path / str(processes)
        ended = run_together(processes, "-m", "paradepth", "train", "ewt_tagger", *words, f"--run-dir={run}")
        assert [status for status, *_ in ended] == [0] * processes, ended[0][2][-2000:]
    one, two = (events(tmp_path / str(p), "validation") for p in (1, 2))
    assert [b["loss"] for b in two] == [pytest.approx(a["loss"], rel=1e-4) for a in one]
    assert one[0]["loss"] != pytest.approx(one[-1]["loss"], rel=1e-3)
    trained = [events(tmp_path / str(p), "train") for p in (1, 2)]
    assert [e["loss"] for e in trained[1]] == [pytest.approx(e["loss"], rel=1e-4) for e in trained[0]]
    assert [e["accuracy"] for e in trained[1]] == [e["accuracy"] for e in trained[0]]
