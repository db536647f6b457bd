"""What `explain` says of a model: figures against their definitions, the command, the report, what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import paradepth
from commands import answer
from compress_helpers import classifier, images, other_kinds, roughen
from paradepth.branches import Branches
from paradepth.cli import main
from paradepth.theory import (
    Explanation,
    Kronecker,
    Variation,
    closed_form,
    effective_rank,
    explain,
    singular_values,
)
from paradepth.theory.share import frozen_parts
from paradepth.theory.spectrum import moments
from paradepth.train import start_run
from paradepth.train.explain import chosen_batches, explain_run
from paradepth.train.run import read_run_config
from paradepth.train.tasks import load_data
from runs import tiny_config


def defined(values: Tensor) -> float:
    """√(E‖v − E v‖² / E‖v‖²) with the variance of a sample, as written."""
    flat = values.detach().flatten(1).double()
    return float((flat.var(dim=0).sum() / flat.square().mean(dim=0).sum()).sqrt())


# ---- figures against their definitions -----------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_variation_is_its_definition_however_the_inputs_are_cut_into_batches(sizes: list[int], seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(sizes), 2, 3, generator=draws) + 1
    gathered = Variation()
    for part in values.split(sizes):
        gathered.add(part)
    if len(values) < 2:
        assert gathered.value() == 0.0
    else:
        assert gathered.value() == pytest.approx(min(defined(values), 1.0), abs=1e-9)


def test_variation_leaves_out_what_is_not_there_and_what_one_input_has_alone() -> None:
    gathered = Variation()
    there = torch.tensor([[True, False], [True, True]])
    gathered.add(torch.tensor([[1.0, 99.0], [3.0, 7.0]]), there)
    assert gathered.value() == pytest.approx((2 / 5) ** 0.5)
    gathered.add(torch.tensor([[2.0, 7.0, 5.0]]))  # a longer text: its third entry is alone, the second one constant
    assert gathered.value() == pytest.approx((1 / (14 / 3 + 49)) ** 0.5)
    assert Variation().value() == 0.0


@pytest.mark.parametrize("options", [{"branches": 2, "depth": 2}, {"branches": 0, "depth": 2}])
def test_variations_of_layers_and_branches_are_those_of_the_explicit_operators(options: dict[str, Any]) -> None:
    model, (x, _) = classifier(**options), images(10)
    found = explain(model, [x[:4], x[4:]], probe_count=1000)
    form = closed_form(model, x)
    layers = [block for branch in form.trunk.branches for block in branch.blocks]
    for facts, block in zip(found.layers, layers, strict=True):
        assert facts.attention == pytest.approx(defined(block.attention.operator.dense()), rel=1e-6)
        assert facts.gates == pytest.approx(defined(block.gates_BTM), rel=1e-6)
        assert facts.active == pytest.approx(float((block.gates_BTM > 0.5).double().mean()))
        always = (block.gates_BTM > 0.5).double().mean(0)
        assert facts.steady == pytest.approx(float(((always == 0) | (always == 1)).double().mean()))
        norms: list[Any] = [block.attention_norm.operator, block.mlp_norm.operator]
        norms = [norm.terms[0][0].diagonal(dim1=1, dim2=2) for norm in norms]
        assert (facts.attention_norm, facts.mlp_norm) == pytest.approx(tuple(map(defined, norms)), rel=1e-6)
    for index, facts in enumerate(found.branches):
        dense = form.trunk.contribution(index).operator.dense()
        assert facts.variation == pytest.approx(defined(dense), rel=0.1)
        assert facts.depth == form.trunk.branches[index].serial_blocks + 1
        values = torch.linalg.svdvals(dense[:8])
        torch.testing.assert_close(torch.tensor(facts.spectrum).double(), values[:, :16].mean(0), rtol=1e-3, atol=0)
        rank = float((values.square().sum(1).square() / values.pow(4).sum(1)).mean())
        assert facts.effective_rank == pytest.approx(rank, rel=0.3)
    assert found.error < 1e-10


def test_a_model_of_static_mixing_has_no_variation_of_attention() -> None:
    model, (x, _) = classifier(branches=2, mixing="static"), images(6)
    found = explain(model, x)
    assert [layer.attention for layer in found.layers] == pytest.approx([0.0, 0.0], abs=1e-6)
    assert min(layer.gates for layer in found.layers) > 0


def test_spectra_need_no_matrix_and_are_those_of_the_matrix() -> None:
    draws = torch.Generator().manual_seed(0)
    terms = [
        (torch.randn(3, 4, 4, generator=draws, dtype=torch.float64), torch.randn(5, 5, generator=draws).double())
        for _ in range(2)
    ]
    operator = Kronecker(terms, cols=(4, 5), rows=(4, 5))
    like = torch.zeros(1, dtype=torch.float64)
    values = torch.linalg.svdvals(operator.dense())
    found = singular_values(operator, batch=3, like=like, count=20)
    torch.testing.assert_close(found, values, rtol=1e-9, atol=1e-9)
    few = singular_values(operator, batch=3, like=like, count=5, iterations=30)
    torch.testing.assert_close(few, values[:, :5], rtol=1e-4, atol=1e-6)
    second, fourth = moments(operator, batch=3, like=like, count=5000)
    torch.testing.assert_close(second, values.square().sum(1), rtol=0.03, atol=0)
    torch.testing.assert_close(fourth, values.pow(4).sum(1), rtol=0.06, atol=0)
    ranks = effective_rank(operator, batch=3, like=like, count=5000)
    torch.testing.assert_close(ranks, values.square().sum(1).square() / values.pow(4).sum(1), rtol=0.05, atol=0)
    zero = Kronecker([(None, torch.zeros(5, 5, dtype=torch.float64))], cols=(4, 5), rows=(4, 5))
    assert effective_rank(zero, batch=1, like=like).tolist() == [0.0]
    with pytest.raises(ValueError, match="count is 0"):
        singular_values(operator, batch=3, like=like, count=0)


@pytest.mark.parametrize("aggregate", ["residual", "sum", "gated"])
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_shares_add_up_to_one_and_are_those_of_the_parts(aggregate: str, pool: str) -> None:
    model, (x, _) = classifier(branches=3, aggregate=aggregate, pool=pool), images(7)
    found = explain(model, x)
    shares = [branch.share for branch in found.branches]
    assert sum(shares) + found.input_share + found.constant_share == pytest.approx(1.0)
    assert sum(branch.prefix_share for branch in found.branches) + found.input_prefix_share == pytest.approx(1.0)
    with torch.no_grad():
        form, logits = closed_form(model, x), model(x)
        torch.testing.assert_close(frozen_parts(form).sum(0).squeeze(1), logits)
        centred = logits - logits.mean(dim=1, keepdim=True)
        before = torch.zeros_like(form.x_BTD) if aggregate == "sum" else form.x_BTD
        steps = torch.cat([model.head(before)[None], model.prefix_logits(x)]).diff(dim=0)
        wanted = [float((step * centred).sum() / centred.square().sum()) for step in steps]
        assert [branch.prefix_share for branch in found.branches] == pytest.approx(wanted)
        # By hand: the last norm's scale is taken from the full state.
        assert isinstance(model.trunk, Branches)
        state = model.trunk(form.x_BTD)
        pooled = state[:, 0] if pool == "cls" else state.mean(1)
        scale = (pooled.var(dim=1, correction=0) + model.head.norm.eps).rsqrt()[:, None]
        for delta, share in zip(model.trunk.contributions(form.x_BTD), shares, strict=True):
            own = delta[:, 0] if pool == "cls" else delta.mean(1)
            own = (own - own.mean(dim=1, keepdim=True)) * scale * model.head.norm.weight
            part = own @ model.head.classify.weight.T
            assert share == pytest.approx(float((part * centred).sum() / centred.square().sum()))


@pytest.mark.parametrize("kind", ["texts", "language"])
def test_padding_counts_nowhere(kind: str) -> None:
    model, tokens, _ = other_kinds(branches=2)[kind]
    found = explain(model, tokens)
    assert found.error < 1e-10
    assert (found.model, found.tokens) == (model.model_type, 7)
    if kind == "texts":
        short = tokens[::2][:, :5]  # these have two tokens of padding behind them, which batches of their own lack
        padded, bare = explain(model, tokens[::2]).to_dict(), explain(model, short).to_dict()
        assert padded.pop("tokens") == 7
        assert bare.pop("tokens") == 5
        spectra = [[branch.pop("spectrum") for branch in values["branches"]] for values in (padded, bare)]
        ranks = [[branch.pop("effective_rank") for branch in values["branches"]] for values in (padded, bare)]
        assert ranks[0] == pytest.approx(ranks[1], rel=0.5)  # other random signs
        for long, other in zip(*spectra, strict=True):
            assert long == pytest.approx(other, rel=1e-3)
        flat = [
            [value for part in values["layers"] + values["branches"] for value in part.values()]
            + [values[key] for key in ("constant_share", "input_share", "input_prefix_share")]
            for values in (padded, bare)
        ]
        assert flat[0] == pytest.approx(flat[1], rel=1e-6)


def test_masked_models_are_explained_at_the_places_that_are_asked_for() -> None:
    small: dict[str, Any] = {"width": 8, "heads": 2, "mlp": 12, "depth": 1, "branches": 2, "vocab_size": 19, "pad": 0}
    model = roughen(paradepth.create_model("bert_nano", **small, context=7).double()).eval()
    tokens = torch.randint(1, 19, (4, 7), generator=torch.Generator().manual_seed(1))
    found = explain(model, (tokens, torch.tensor([[0, 3]] * 4)))
    assert sum(branch.share for branch in found.branches) + found.input_share + found.constant_share == pytest.approx(1)


def test_the_same_seed_gives_the_same_figures_and_json_gives_them_back() -> None:
    model, (x, _) = classifier(branches=2), images(6)
    found = explain(model, x)
    assert explain(model, x) == found
    assert explain(model, x, seed=1).branches != found.branches
    assert Explanation.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    with pytest.raises(ValueError, match="no explanation"):
        Explanation.from_dict({"layers": []})


def test_what_cannot_be_explained_is_refused() -> None:
    model, (x, _) = classifier(branches=2), images(6)
    for options, words in (
        ({"probe_count": 0}, "probe_count is 0"),
        ({"spectrum_samples": 0}, "spectrum_samples is 0"),
        ({"spectrum_values": -1}, "spectrum_values is -1"),
    ):
        with pytest.raises(ValueError, match=words):
            explain(model, x, **options)
    with pytest.raises(ValueError, match="there are 1 samples"):
        explain(model, x[:1])
    with pytest.raises(ValueError, match="source and target at once"):
        explain(*other_kinds()["translation"][:2])


def test_plots_need_a_page_and_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, _) = classifier(branches=2), images(6)
    found = explain(model, x)
    page = found.plot(tmp_path / "model.html").read_text()
    assert "Share of the final logits" in page
    assert page.count("<svg") >= 4
    serial = explain(classifier(branches=0), x).plot(tmp_path / "serial.html").read_text()
    assert "Share of the final logits" not in serial
    with pytest.raises(ValueError, match=r"must end in \.html"):
        found.plot(tmp_path / "model.png")
    monkeypatch.delitem(sys.modules, "paradepth.report.explanation")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(ValueError, match=r"plots need matplotlib.*paradepth\[train\]"):
        found.plot(tmp_path / "again.html")


# ---- runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explain") / "run"
    start_run(tiny_config("one_pass", budget="4 steps", validations=1), folder)
    return folder


def test_the_command_writes_json_page_and_a_section_of_the_report(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    result = answer(capsys, "explain", run, "--samples", "40")
    written = json.loads((run / "explanation.json").read_text())
    assert Explanation.from_dict({k: v for k, v in written.items() if k != "split"}).samples == 40
    assert written["branches"] == result["branches"]
    assert written["split"] == "validation"
    assert "What it computes" in Path(result["report"]).read_text()
    assert "<svg" in Path(result["plots"]).read_text()
    assert main(["explain", str(run), "--samples", "3", "--branches", "2", "--split", "test"]) == 0
    shown = capsys.readouterr().out
    assert "share" in shown
    assert len(json.loads((run / "explanation.json").read_text())["branches"]) == 2
    start_run(tiny_config("joint", budget="2 steps", validations=1), run, overwrite=True)
    assert not (run / "explanation.json").exists(), "an explanation of other weights does not stay"


def test_samples_are_spread_over_the_split_and_none_is_taken_twice(trained: Path) -> None:
    task = load_data(read_run_config(trained), assets=trained)
    count = task.count("validation")
    whole = torch.cat(chosen_batches(task, "validation", 10**6))
    assert torch.equal(whole, task.ordered("validation", 0, count)[0])
    some = torch.cat(chosen_batches(task, "validation", 70))
    places = [int((whole == image).flatten(1).all(1).nonzero()[0]) for image in some]
    assert len(set(places)) == 70
    assert places[0] == 0
    assert places[-1] > count - 40


def test_runs_that_cannot_be_explained_are_refused_in_words(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in (
        (["--samples", "1"], "samples is 1"),
        (["--split", "holdout"], "0 samples in a split 'holdout'"),
        (["--branches", "9"], "between 1 and 3"),
    ):
        assert main(["explain", str(trained), *words]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match="config"):
        explain_run(tmp_path / "nothing")
    broken = shutil.copytree(trained, tmp_path / "broken")
    (broken / "explanation.json").write_text("{}")
    assert main(["report", str(broken)]) == 2
    assert "is damaged: it has no 'layers'" in capsys.readouterr().err
