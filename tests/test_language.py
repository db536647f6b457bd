"""Language runs: perplexity and bits per byte, resuming, tokenisers, commands, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import paradepth
from commands import answer
from paradepth.cli import main
from paradepth.data import BPETokenizer, ByteTokenizer, load_tokenizer
from paradepth.models import generate, model_config
from paradepth.recipes import get_recipe
from paradepth.report import write_report
from paradepth.train import Config, resume_run, start_run
from paradepth.train.budget import Budget
from paradepth.train.config import check_options
from paradepth.train.optimiser import Optimiser
from paradepth.train.tasks import load_data, task_class
from runs import Stop, events, stop_at


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "verses.txt"
    path.write_text("".join(f"{n} green bottles hanging on the wall, " for n in range(99, 0, -1)) * 3)
    return path


def config(corpus: Path, **options: Any) -> Config:
    chosen: dict[str, Any] = {
        "model": "gpt_nano",
        "branches": 3,
        "depth": 1,
        "context": 16,
        "data": "text",
        "data_dir": corpus,
        "schedule": "one_pass",
        "budget": "24 steps",
        "batch_size": 8,
        "dropout": 0.1,
        "learning_rate": 3e-3,
        "validations": 4,
        "precision": "float32",
        "device": "cpu",
        "threads": 1,
        **options,
    }
    return Config().replace(**chosen)


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language") / "run"
    start_run(config(corpus), folder)
    return folder


def test_a_run_learns_and_logs_perplexity_and_bits_per_byte(run: Path, corpus: Path) -> None:
    validations = events(run, "validation")
    assert [v["step"] for v in validations] == [6, 12, 18, 24]
    assert validations[-1]["loss"][-1] < 0.8 * math.log(256)
    for v in (*validations, json.loads((run / "evaluation.json").read_text())):
        assert len(v["loss"]) == len(v["accuracy"]) == len(v["contribution"]) == 3
        assert v["perplexity"] == pytest.approx([math.exp(value) for value in v["loss"]])
        assert v["bits_per_byte"] == pytest.approx([value / math.log(2) for value in v["loss"]])
    task = load_data(config(corpus))
    start = events(run, "start")[0]
    assert start["train_samples"] == task.count("train") == (len(task.data.train) - 16) // 16
    assert start["test_samples"] == (len(task.data.test) - 1) // 16
    assert events(run, "end")[0]["layer_evals"] == 24 * 8 * 3
    assert all(0 <= event["accuracy"] <= 1 for event in events(run, "train"))


def test_the_evaluation_is_the_mean_over_all_bytes_that_fill_windows(run: Path, corpus: Path) -> None:
    model, test = paradepth.from_pretrained(run), load_data(config(corpus)).data.test.long()
    count = (len(test) - 1) // 16
    inputs, targets = test[: 16 * count].view(count, 16), test[1 : 16 * count + 1].view(count, 16)
    with torch.no_grad():
        logits = model.prefix_logits(inputs).double()
    evaluation = json.loads((run / "evaluation.json").read_text())
    for k in range(3):
        loss = F.cross_entropy(logits[k].flatten(0, 1), targets.flatten()).item()
        assert evaluation["loss"][k] == pytest.approx(loss, rel=1e-5)
        right = (logits[k].argmax(dim=-1) == targets).double().mean().item()
        assert evaluation["accuracy"][k] == pytest.approx(right, abs=1e-9)


@pytest.mark.parametrize("schedule", ["stagewise", "serial"])
def test_resuming_is_exact(schedule: str, corpus: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"schedule": schedule, "checkpoint_every": 5, "budget": "16 steps", "accumulate": 2}
    if schedule == "serial":
        options |= {"schedule": "joint", "branches": None, "depth": 4, "step": 0.5, "buffers": (1, 1), "ema": 0.9}
    start_run(config(corpus, **options), tmp_path / "whole")

    stop = stop_at(13)
    with pytest.raises(Stop):
        start_run(config(corpus, **options), tmp_path / "cut", on_batch=stop)
    resume_run(tmp_path / "cut")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert events(tmp_path / "cut", "validation") == events(tmp_path / "whole", "validation")


@pytest.mark.parametrize("branches", [None, 2])
def test_resuming_with_a_bpe_is_exact_and_does_not_learn_it_again(
    branches: int | None, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = "one_pass" if branches else "joint"
    used = config(
        corpus,
        tokenizer="bpe",
        vocab_size=280,
        budget="8 steps",
        checkpoint_every=3,
        branches=branches,
        schedule=schedule,
    )
    start_run(used, tmp_path / "whole")

    stop = stop_at(5)
    with pytest.raises(Stop):
        start_run(used, tmp_path / "cut", on_batch=stop)
    monkeypatch.setattr(BPETokenizer, "train", lambda *words, **options: pytest.fail("learned again"))
    monkeypatch.setenv("PARADEPTH_CACHE", str(tmp_path / "another"))
    resume_run(tmp_path / "cut")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert first["stem.embed.weight"].shape == (280, 64)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert events(tmp_path / "cut", "validation") == events(tmp_path / "whole", "validation")
    assert (tmp_path / "cut" / "tokenizer.json").read_bytes() == (tmp_path / "whole" / "tokenizer.json").read_bytes()


def test_bits_per_byte_of_a_bpe_are_over_the_bytes_of_the_split(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    used = config(corpus, tokenizer="bpe", vocab_size=300, budget="4 steps", validations=1)
    result = start_run(used, tmp_path / "run")
    task = load_data(used, assets=tmp_path / "run")
    text = corpus.read_bytes()
    test, validation = (round(share * len(text)) for share in (0.05, 0.1))
    parts = {"validation": text[-test - validation : -test], "test": text[-test:]}
    told = {"validation": events(tmp_path / "run", "validation")[-1], "test": result}
    for split, entry in told.items():
        tokens = len(task.data.tokenizer.encode(parts[split].decode()))
        assert tokens < 0.7 * len(parts[split])
        expected = [loss * tokens / len(parts[split]) / math.log(2) for loss in entry["loss"]]
        assert entry["bits_per_byte"] == pytest.approx(expected)
        assert entry["perplexity"] == pytest.approx([math.exp(loss) for loss in entry["loss"]])
    measured = answer(capsys, "evaluate", tmp_path / "run", "--split", "validation")
    assert measured["bits_per_byte"] == pytest.approx(told["validation"]["bits_per_byte"], rel=1e-4)
    assert task.unit == "windows of 16 tokens"


@pytest.mark.parametrize("branches", [None, 2])
def test_an_evaluation_shows_what_the_model_writes(branches: int | None, corpus: Path, tmp_path: Path) -> None:
    schedule = "one_pass" if branches else "joint"
    used = config(corpus, budget="2 steps", validations=1, branches=branches, schedule=schedule)
    start_run(used, tmp_path / "run")
    examples = json.loads((tmp_path / "run" / "evaluation.json").read_text())["examples"]
    model = paradepth.from_pretrained(tmp_path / "run")
    test = load_data(used).data.test
    assert [e["prompt"] for e in examples] == [bytes(test[i : i + 8].tolist()).decode() for i in (0, 35 // 2 * 16)]
    names = {"continuation": 1} if branches is None else {"1 branch": 1, "2 branches": 2}
    for name, k in names.items():
        made = generate(
            model, ByteTokenizer(), [e["prompt"] for e in examples], max_tokens=100, temperature=0.8, branches=k
        )
        assert [e[name] for e in examples] == [m.text for m in made]
    page = write_report([tmp_path / "run"]).read_text()
    assert "What it writes" in page
    corpus_of_noise = tmp_path / "noise.bin"
    corpus_of_noise.write_bytes(bytes(range(128, 256)) * 40)
    start_run(used.replace(data_dir=corpus_of_noise), tmp_path / "noise")  # no text, and prompts that grow


def test_a_run_that_starts_from_another_keeps_its_tokeniser(corpus: Path, tmp_path: Path) -> None:
    bpe = {"tokenizer": "bpe", "vocab_size": 280, "budget": "2 steps", "validations": 1}
    start_run(config(corpus, **bpe), tmp_path / "first")
    (tmp_path / "other.txt").write_text("quite another text about zebras and quartz, " * 60)
    more = config(tmp_path / "other.txt", **bpe, init=tmp_path / "first", learning_rate=1e-9)
    start_run(more, tmp_path / "second")
    kept, first = (load_tokenizer(tmp_path / name) for name in ("second", "first"))
    assert kept.identity == first.identity
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)
    bytes_again = config(corpus, budget="2 steps", validations=1, init=tmp_path / "first")
    assert load_data(bytes_again, assets=tmp_path / "first").data.vocab_size == 280


def test_betas_are_those_of_the_optimiser(corpus: Path) -> None:
    model = paradepth.create_model("gpt_nano", depth=1)
    for betas in ((0.9, 0.999), (0.8, 0.95)):
        optimiser = Optimiser(model, Config().replace(betas=betas).optimiser_options)
        assert [group["betas"] for o in optimiser.optimisers for group in o.param_groups] == [betas] * len(
            optimiser.optimisers[0].param_groups
        )
    for betas in ((0.9,), (0.9, 1.0), (-0.1, 0.9)):
        with pytest.raises(ValueError, match="betas is"):
            check_options(config(corpus, betas=betas))


def test_the_published_gpt2_is_the_published_shape() -> None:
    recipe = get_recipe("gpt2_openwebtext")
    m, o, d = recipe.model_options, recipe.optimiser_options, recipe.depth_options
    shape = model_config(m.model, depth=m.depth, step=m.step, buffers=m.buffers)
    assert (shape.width, shape.heads, shape.mlp, shape.depth, shape.context) == (768, 12, 3072, 20, 1024)
    assert (shape.step * 16, shape.buffers, shape.vocab_size) == (1, (2, 2), 50257)
    assert (o.learning_rate, o.betas, o.weight_decay, o.batch_size, o.decay) == (6e-4, (0.9, 0.95), 0.1, 256, "cosine")
    assert Budget.parse(o.budget).value * o.warmup == pytest.approx(2000)
    assert (d.executor, d.forward_iterations, d.backward_iterations, d.levels) == ("mgrit", "serial", 1, 2)
    small = get_recipe("shakespeare_gpt2")
    assert small.depth_options == d
    assert (small.model_options.depth, small.model_options.step) == (m.depth, m.step)


def test_commands_on_a_language_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = answer(capsys, "evaluate", run)
    kept = json.loads((run / "evaluation.json").read_text())
    assert whole["loss"] == pytest.approx(kept["loss"])
    assert whole["bits_per_byte"] == pytest.approx(kept["bits_per_byte"])
    assert len(answer(capsys, "evaluate", run, "--branches", "2", "--split", "validation")["perplexity"]) == 2
    assert main(["predict", str(run), "picture.png"]) == 2
    assert "refused: predict classifies images, and this is a model of type 'causal_lm'" in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(tmp_path / "one.html")]) == 0
    page = (tmp_path / "one.html").read_text()
    assert "images" not in page
    for absent in ("Confusion of classes", "Example predictions", "patch size", "crop padding", "image size"):
        assert absent not in page
    for present in ("<dt>Test loss</dt>", "bits per byte", "windows of 16 bytes", f"{kept['loss'][-1]:.4f}"):
        assert present in page
    assert (
        page.index("<dt>Test bits per byte</dt>") < page.index("<dt>Test loss</dt>") < page.index("<dt>Parameters</dt>")
    )


def test_the_recipe_trains_from_the_command_line(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_bytes(corpus.read_bytes())
    words = ["train", "shakespeare_gpt", "--data-dir", str(tmp_path), "--run-dir", str(tmp_path / "run"), "--json"]
    words += ["--depth", "6", "--buffers", "1", "1", "--step", "0.25", "--context", "8", "--budget", "2 steps"]
    assert main(words) == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["model_type"] == "causal_lm"
    assert (saved["model"]["buffers"], saved["model"]["step"], saved["model"]["context"]) == ([1, 1], 0.25, 8)
    assert "Tiny Shakespeare" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"flip": True}, "flip is True; it means nothing to data 'text'"),
        ({"crop_padding": 2}, "crop_padding is 2"),
        ({"rand_augment": (2, 5)}, "rand_augment"),
        ({"image_size": 8}, "image_size is 8"),
        ({"patch_size": 4}, "patch_size is 4; it means nothing"),
        ({"pool": "cls"}, "pool is 'cls'"),
        ({"embedding": "linear"}, "embedding"),
        (
            {"model": "vit_nano", "branches": None},
            "model is 'vit_nano', which is not for text.*gpt2, gpt_mini, gpt_nano",
        ),
        ({"data": "digits", "data_dir": None}, "'gpt_nano', which is not for images"),
        ({"data": "texts"}, "did you mean 'text'"),
        ({"data_dir": None}, "needs data_dir"),
        ({"context": 100_000}, "context is 100000, but the train text of 'text' has only"),
        ({"batch_size": 5000}, r"training samples \(windows of 16 bytes\)"),
        ({"branches": None}, "serial"),
        ({"buffers": (1, 1)}, "buffers"),
        ({"validation_fraction": 0.96}, "validation_fraction"),
        ({"vocab_size": 300}, "vocab_size is 300; only a BPE is given a size"),
        ({"tokenizer": "bpe", "vocab_size": 100}, "vocab_size is 100; a BPE needs at least 260"),
        ({"tokenizer": "poems"}, "poems is no tokeniser"),
        ({"tokenizer": "bpe", "vocab_size": 300, "context": 9999}, "has only .* tokens; take a shorter context"),
        ({"masking": 0.1}, "masking is 0.1; it means nothing"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    options: dict[str, Any], words: str, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        start_run(config(corpus, **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_images_refuse_the_options_of_text() -> None:
    with pytest.raises(ValueError, match="context is 8; it means nothing to data 'digits', which is images"):
        task_class(Config().replace(context=8))
