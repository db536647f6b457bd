"""Quantised models in use: prefixes, executors, caches, exports, and every command on such a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import paradepth
from commands import answer
from paradepth.branches import choose_executor
from paradepth.cli import main
from paradepth.data import ByteTokenizer
from paradepth.distributed.shard import Elsewhere
from paradepth.export import load_program
from paradepth.export.graph import build_graph
from paradepth.models import CausalLM, EarlyStop, TrunkModel, generate, translate
from paradepth.models.quantised import float_weights, quantise
from paradepth.train import resume_run, start_run
from quantise_helpers import METHODS, WORDS, build, inputs_of, same_bits
from runs import tiny_config

# ---- prefixes, executors, exports ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["images", "masked_lm", "translator"])
def test_truncating_is_quantising_the_truncated_model(kind: str, method: Any) -> None:
    model = build(kind)
    small, inputs = quantise(model, method), inputs_of(model)
    with torch.no_grad():
        prefixes = small.prefix_logits(inputs)
    for k in (1, 2):
        cut = small.truncate(k)
        assert cut.quantisation == small.quantisation
        assert same_bits(cut, quantise(model.truncate(k), method), inputs)
        with torch.no_grad():
            assert torch.equal(cut(inputs), small(inputs, branches=k))
            torch.testing.assert_close(cut(inputs), prefixes[k - 1], rtol=1e-5, atol=1e-5)
        assert not any(parameter.requires_grad for parameter in cut.parameters())
    assert same_bits(small.select([2, 0]), quantise(model.select([2, 0]), method), inputs)
    shared = {t.data_ptr() for t in small.state_dict().values() if type(t) is Tensor and t.numel()}
    assert not shared & {t.data_ptr() for t in cut.state_dict().values() if type(t) is Tensor and t.numel()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("executor", ["batched", "threads", "auto"])
def test_executors_of_branches_give_the_same(executor: str, method: Any) -> None:
    small = quantise(build("images"), method)
    inputs = inputs_of(build("images"))
    with torch.no_grad():
        expected = small.prefix_logits(inputs)
        choose_executor(small.trunk, executor)
        torch.testing.assert_close(small.prefix_logits(inputs), expected, rtol=1e-5, atol=1e-5)
    if executor == "batched":
        assert list(small.trunk.executor.alone) == [0, 1, 2]
        assert all("only plain tensors are stacked" in reason for reason in small.trunk.executor.alone.values())
    Elsewhere(small.trunk.branches[0].layers[0])  # what a process keeps of another one's layers


@pytest.mark.parametrize("method", METHODS)
def test_early_stop_gives_a_sample_what_its_prefix_says(method: Any) -> None:
    small, inputs = quantise(build("images"), method), inputs_of(build("images"))
    with torch.no_grad():
        prefixes = small.prefix_logits(inputs)
    stopped = EarlyStop(small, [0.0, 0.0])(inputs)
    torch.testing.assert_close(stopped.logits_BN, prefixes[0])


@pytest.mark.parametrize("method", METHODS)
def test_generation_and_translation_with_caches(method: Any) -> None:
    gpt = quantise(build("causal_lm"), method)
    assert isinstance(gpt, CausalLM)
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 0}
    assert generate(gpt, ByteTokenizer(), ["ab", "c"], **options) == generate(
        gpt, ByteTokenizer(), ["ab", "c"], cached=False, **options
    )
    small = quantise(build("translator"), method)
    texts = translate(small, ByteTokenizer(special=True), ["ein", "Haus"], beams=2, max_tokens=4)
    alone = translate(small, ByteTokenizer(special=True), ["Haus"], beams=2, max_tokens=4)
    assert texts[1:] == alone


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_graphs_hold_the_float32_that_integers_stand_for(method: Any) -> None:
    small = quantise(build("images"), method)
    inputs = inputs_of(build("images"))
    graph = build_graph(small)
    assert graph.model.quantisation is None
    assert all(type(tensor) is Tensor for tensor in graph.model.state_dict().values())
    with torch.no_grad():
        torch.testing.assert_close(graph.run((inputs,))[0], small(inputs), rtol=1e-5, atol=1e-5)


def test_no_plain_weights_compute_what_rounded_inputs_do() -> None:
    small = quantise(build("images"), "int8_dynamic")
    for refused in (float_weights, build_graph):
        with pytest.raises(ValueError, match="take one quantised by int8, or the run in float32"):
            refused(small)


# ---- runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "float32"
    options: dict[str, Any] = {"budget": "130 steps", "learning_rate": 5e-3, "dropout": 0.0, "crop_padding": 0}
    start_run(tiny_config(**options, flip=False, validations=1), run)
    return run


def quantised_run(trained: Path, folder: Path, method: Any) -> Path:
    shutil.copytree(trained, folder)
    small = quantise(paradepth.from_pretrained(trained), method)
    small.save_pretrained(folder / "small")
    described = json.loads((folder / "small" / "config.json").read_text())
    training = json.loads((trained / "config.json").read_text())["training"]
    (folder / "config.json").write_text(json.dumps({**described, "training": training}))
    shutil.copy(folder / "small" / "model.safetensors", folder / "model.safetensors")
    shutil.rmtree(folder / "small")
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_commands_take_a_quantised_run(
    method: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = quantised_run(trained, tmp_path / method, method)
    before, after = (answer(capsys, "evaluate", place) for place in (trained, run))
    assert before["accuracy"][-1] > 0.75, "it has learned"
    assert after["parameters"] == before["parameters"]
    loss = 0.05 if method == "int4" else 0.01
    assert after["accuracy"] == pytest.approx(before["accuracy"], abs=loss)
    one = answer(capsys, "evaluate", run, "--branches", 1, "--branch-executor", "threads")
    assert one["accuracy"][0] == pytest.approx(after["accuracy"][0], abs=1e-3)
    stopped = answer(capsys, "evaluate", run, "--early-stop", "0.02")
    assert stopped["full_accuracy"] == pytest.approx(after["accuracy"][-1])
    picture = tmp_path / "digit.png"
    Image.fromarray(np.full((8, 8), 99, np.uint8)).save(picture)
    (prediction,) = answer(capsys, "predict", run, picture)["predictions"]
    (same,) = answer(capsys, "predict", run, picture, "--branch-executor", "batched")["predictions"]
    assert same["classes"][0] == pytest.approx(prediction["classes"][0], abs=1e-4)
    assert main(["report", str(run)]) == 0
    if method == "int8":
        exported = answer(capsys, "export", run, "--format", "torch", "--no-latency")
        program, description = load_program(exported["file"])
        assert "quantisation" not in description
        small, images = paradepth.from_pretrained(run), torch.rand(5, 1, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(program(images)[0], small(images), rtol=1e-4, atol=1e-4)
    if method == "int8_dynamic":
        assert main(["export", str(run), "--format", "onnx", "--no-latency"]) == 2
        assert "refused: the model is quantised by int8_dynamic" in capsys.readouterr().err


def test_commands_that_train_refuse_a_quantised_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = quantised_run(trained, tmp_path / "run", "int8")
    for words in (
        ["resume", run],
        ["finetune", run, "--task", "digits", "--run-dir", tmp_path / "new"],
        ["train", "digits_paraformer", "--init", run, "--run-dir", tmp_path / "new", "--branches", "3", "--depth", "1"],
        ["grow", run, "--branches", "1", "--out", tmp_path / "new"],
    ):
        assert main([str(word) for word in words]) == 2
        told = capsys.readouterr().err
        assert "quantised" in told
        assert "made from" in told
    with pytest.raises(ValueError, match="is quantised"):
        resume_run(run)


@pytest.mark.parametrize("kind", ["causal_lm", "masked_lm", "sequence_classifier", "tagger", "translator"])
def test_models_of_texts_are_used_as_before(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small: TrunkModel = quantise(build(kind), "int8")
    small.save_pretrained(tmp_path)
    WORDS.save(tmp_path)
    ByteTokenizer(special=kind != "causal_lm").save(tmp_path)
    words = {
        "causal_lm": ["generate", tmp_path, "--prompt", "ab", "--max-tokens", 3],
        "masked_lm": ["predict", tmp_path, "a <mask> b"],
        "sequence_classifier": ["predict", tmp_path, "a text"],
        "tagger": ["predict", tmp_path, "the dog"],
        "translator": ["translate", tmp_path, "ein"],
    }[kind]
    assert answer(capsys, *words)
