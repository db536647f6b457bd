"""Causal language models: oracles in float64, tied weights, and runs from a text file to a report."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import paradepth
from paradepth.branches import Branches
from paradepth.cli import main
from paradepth.data import BPETokenizer, ByteTokenizer, load_tokenizer
from paradepth.depth import Stack
from paradepth.models import CausalLM, generate, list_models, model_config
from paradepth.nn import EncoderLayer, LanguageModelHead, MultiHeadAttention, TokenStem
from paradepth.nn import attention as attention_module
from paradepth.recipes import get_recipe
from paradepth.report import write_report
from paradepth.train import Config, resume_run, start_run
from paradepth.train.budget import Budget
from paradepth.train.config import check_options
from paradepth.train.optimiser import Optimiser
from paradepth.train.tasks import load_data, task_class
from runs import Stop, events, stop_at

shapes = st.fixed_dictionaries(
    {
        "branches": st.integers(1, 3),
        "depth": st.integers(1, 3),
        "aggregate": st.sampled_from(["residual", "sum"]),
        "tied": st.booleans(),
        "step": st.sampled_from([1.0, 0.25]),
    }
)


def gpt(**options: Any) -> CausalLM:
    small = {"vocab_size": 11, "context": 6, "width": 8, "heads": 2, "mlp": 16, "depth": 2}
    return paradepth.create_model("gpt_nano", **{**small, **options}).double().eval()


def tokens(batch: int = 2, length: int = 6) -> Tensor:
    return torch.randint(11, (batch, length))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


# ---- layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_causal_attention_is_the_same_fused_explicit_and_by_a_mask(
    monkeypatch: pytest.MonkeyPatch, masked: bool
) -> None:
    causal = MultiHeadAttention(16, 4, causal=True).double()
    plain = MultiHeadAttention(16, 4).double()
    plain.load_state_dict(causal.state_dict())
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    past = torch.ones(7, 7, dtype=torch.bool).tril()
    mask = (torch.rand(3, 1, 7, 7) > 0.4) | torch.eye(7, dtype=torch.bool) if masked else None
    results = []
    for fused in (True, False):
        monkeypatch.setattr(attention_module, "fused_is_faster", lambda q, fused=fused: fused)
        causal.zero_grad()
        y = causal(x, mask)
        y.square().sum().backward()
        assert causal.qkv.weight.grad is not None
        results.append((y.detach(), causal.qkv.weight.grad.clone()))
        close(y, plain(x, past if mask is None else mask & past))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-10)


def test_attention_dropout_keeps_the_layer_causal() -> None:
    layer = EncoderLayer(8, heads=2, mlp=16, attention_dropout=0.5, causal=True).double().train()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    later = x.clone()
    later[:, 3:] = torch.randn(2, 8, dtype=torch.float64)
    close(layer(x)[:, :3], layer(later)[:, :3])


def test_stem_adds_token_and_position_and_refuses_what_it_cannot_embed() -> None:
    stem = TokenStem(11, 6, 8)
    seen = torch.tensor([[3, 0, 10]])
    close(stem(seen), (stem.embed.weight[seen[0]] + stem.positions[:3]).unsqueeze(0))
    assert torch.equal(stem(seen.int()), stem(seen))
    assert stem.tokens == 6
    assert stem.flops() == 0
    wide = TokenStem(256, 64, 512)
    for parameter in wide.parameters():
        assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
    for bad, words in (
        (tokens(1, 7), "1 to 6 tokens"),
        (tokens(1, 0), "1 to 6 tokens"),
        (tokens()[0], "takes \\(batch, tokens\\)"),
        (tokens().float(), "torch.float32; this model takes torch.int64"),
        (tokens().to(torch.uint8), "torch.uint8"),
        (tokens() + 5 * torch.eye(2, 6).long() * 11, "vocabulary is 0 to 10"),
    ):
        with pytest.raises(ValueError, match=words):
            stem(bad)
    for make in (lambda: TokenStem(0, 6, 8), lambda: TokenStem(11, 0, 8), lambda: LanguageModelHead(8, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            make()
    with pytest.raises(ValueError, match=r"\(12, 8\)"):
        LanguageModelHead(8, 12, tied=stem.embed)


# ---- the model ---------------------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(shape=shapes)
def test_prefix_k_is_the_truncated_model(shape: dict) -> None:
    model, x = gpt(**shape), tokens()
    trunk = model.trunk
    assert isinstance(trunk, Branches)
    logits = model.prefix_logits(x)
    assert logits.shape == (shape["branches"], 2, 6, 11)
    state, outputs = model.stem(x), [branch(model.stem(x)) for branch in trunk.branches]
    for k in range(1, shape["branches"] + 1):
        total = sum(outputs[:k])
        if shape["aggregate"] == "residual":
            total = state + sum(g - state for g in outputs[:k])
        close(logits[k - 1], model.head(total))
        close(logits[k - 1], model(x, branches=k))
        close(logits[k - 1], model.truncate(k)(x))
        close(model.truncate(k).contributions(x), model.contributions(x)[:k])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("depth", [1, 3])
def test_one_branch_is_a_gpt_weight_for_weight(tied: bool, depth: int) -> None:
    para, serial = gpt(branches=1, depth=depth, tied=tied), gpt(depth=depth, tied=tied)
    serial.load_state_dict(
        {name.replace("trunk.branches.0.", "trunk."): value for name, value in para.state_dict().items()}
    )
    x = tokens()
    assert torch.equal(para(x), serial(x))
    assert torch.equal(serial.prefix_logits(x)[0], serial(x))
    para(x).square().sum().backward()
    serial(x).square().sum().backward()
    for name, parameter in serial.named_parameters():
        twin = dict(para.named_parameters())[name.replace("trunk.", "trunk.branches.0.")]
        assert parameter.grad is not None
        assert twin.grad is not None
        close(parameter.grad, twin.grad)


def test_a_gpt_is_the_textbook_transformer() -> None:
    model, x = gpt(step=0.5), tokens()
    state = model.stem.embed(x) + model.stem.positions
    past = torch.ones(6, 6, dtype=torch.bool).tril()
    assert isinstance(model.trunk, Stack)
    for layer in model.trunk.layers:
        h = layer.attention_norm(state)  # pyright: ignore[reportCallIssue]
        q, k, v = layer.attention.qkv(h).view(2, 6, 3, 2, 4).permute(2, 0, 3, 1, 4)  # pyright: ignore
        weights = (q @ k.transpose(-1, -2) / 2).masked_fill(~past, -math.inf).softmax(dim=-1)
        a = layer.attention.out((weights @ v).transpose(1, 2).reshape(2, 6, 8))  # pyright: ignore
        state = state + 0.5 * (a + layer.mlp(layer.mlp_norm(state + a)))  # pyright: ignore[reportCallIssue]
    close(model(x), F.layer_norm(state, (8,)) @ model.stem.embed.weight.T)


@given(branches=st.integers(0, 3), length=st.integers(1, 6))
def test_the_future_does_not_matter_and_shorter_texts_give_the_same(branches: int, length: int) -> None:
    model, x = gpt(branches=branches), tokens()
    other = x.clone()
    other[:, length:] = (other[:, length:] + 1) % 11
    for k in range(1, model.prefixes + 1):
        logits = model.prefix_logits(x)[k - 1]
        close(logits[:, :length], model.prefix_logits(other)[k - 1][:, :length])
        close(logits[:, :length], model.prefix_logits(x[:, :length])[k - 1])
    assert length == 6 or not torch.allclose(model(x), model(other))


@settings(max_examples=12)
@given(branches=st.integers(1, 3), more=st.integers(1, 2), tied=st.booleans())
def test_growing_leaves_outputs_unchanged_and_shares_no_storage(branches: int, more: int, tied: bool) -> None:
    model, x = gpt(branches=branches, tied=tied), tokens()
    grown = model.grow(more)
    assert grown.prefixes == branches + more
    before = model(x)
    assert torch.equal(grown(x), before)
    assert torch.equal(grown.truncate(branches)(x), before)
    assert not torch.allclose(model.grow(more, init="random")(x), before)
    with torch.no_grad():
        for parameter in grown.parameters():
            parameter.add_(1.0)
    assert torch.equal(model(x), before)
    if tied:
        assert grown.head.weight is grown.stem.embed.weight
        assert copy.deepcopy(grown).head.weight is not grown.head.weight


def test_a_tied_weight_is_listed_trained_and_saved_once(tmp_path: Path) -> None:
    model = gpt(branches=2).float()
    listed = [name for part, module in model.parts().items() for name, _ in module.named_parameters(prefix=part)]
    assert listed.count("stem.embed.weight") == 1
    assert not any(name.startswith("head") and "norm" not in name for name in listed)
    counted = sum(p.numel() for part in model.parts().values() for p in part.parameters())
    assert counted == sum(p.numel() for p in model.parameters())
    assert counted + 11 * 8 == sum(p.numel() for p in gpt(branches=2, tied=False).parameters())

    x, before = tokens(), model.stem.embed.weight.detach().clone()
    optimiser = Optimiser(model, Config().optimiser_options)
    F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
    by_hand = model.stem.embed.weight.grad
    assert by_hand is not None
    assert by_hand.abs().sum(dim=1).count_nonzero() == 11, "the head's gradient reaches tokens that were not read"
    optimiser.step()
    assert not torch.equal(model.stem.embed.weight, before)

    model.eval().save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert [name for name, value in saved.items() if value.shape == (11, 8)] == ["stem.embed.weight"]
    again = paradepth.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(x), model(x))
    assert again.head.weight is again.stem.embed.weight
    untied = gpt(tied=False)
    assert torch.equal(paradepth.from_pretrained(untied.save_pretrained(tmp_path / "untied"))(x), untied(x))


def test_buffers_take_a_step_of_one() -> None:
    for branches in (0, 2):
        model = gpt(branches=branches, depth=4, step=0.25, buffers=(1, 2))
        stack = model.trunk.branches[0] if isinstance(model.trunk, Branches) else model.trunk
        assert isinstance(stack, Stack)
        assert [stack.step_of(n) for n in range(4)] == [1.0, 0.25, 1.0, 1.0]
        x = model.stem(tokens())
        expected = x
        for n, layer in enumerate(stack.layers):
            expected = layer(expected, step=stack.step_of(n))
        close(stack(x), expected)
    assert paradepth.create_model("vit_nano", depth=3, buffers=(1, 1)).trunk.buffer_layers == (1, 1)
    with pytest.raises(ValueError, match="buffers"):
        gpt(depth=2, buffers=(1, 1))
    with pytest.raises(ValueError, match="buffers is"):
        gpt(depth=2, buffers=(-1, 0))


def test_registered_gpts_and_their_options() -> None:
    assert list_models("gpt*") == ["gpt2", "gpt_mini", "gpt_nano"]
    mini, large = model_config("gpt_mini"), model_config("gpt2")
    assert (mini.width, mini.depth, mini.buffers, mini.step * 28) == (128, 32, (2, 2), 1.0)
    assert (large.width, large.heads, large.mlp, large.depth, large.vocab_size, large.context) == (
        768,
        12,
        3072,
        12,
        50257,
        1024,
    )
    with torch.device("meta"):
        assert sum(p.numel() for p in CausalLM(large).parameters()) == 124_439_808, "as published"
    with pytest.raises(ValueError, match=r"unknown options \['patch_size'\] for gpt_nano; known are .*context"):
        paradepth.create_model("gpt_nano", patch_size=4)
    with pytest.raises(ValueError, match=r"unknown options \['context'\] for vit_nano"):
        paradepth.create_model("vit_nano", context=4)
    with pytest.raises(ValueError, match="known are"):
        CausalLM.from_config({"colour": 3})
    for name in ("vocab_size", "context", "depth", "width"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            CausalLM.from_config({name: 0})


def test_flops_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "fused_is_faster", lambda q: False)  # the fused CPU kernel is not counted
    with FlopCounterMode(display=False) as counter:
        gpt(branches=2, tied=False)(tokens(1))
    assert gpt(branches=2).forward_flops() == counter.get_total_flops()


# ---- runs --------------------------------------------------------------------------------------------------------


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
    assert main(["evaluate", str(tmp_path / "run"), "--split", "validation", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
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
    model = gpt()
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
    assert main(["evaluate", str(run), "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    kept = json.loads((run / "evaluation.json").read_text())
    assert whole["loss"] == pytest.approx(kept["loss"])
    assert whole["bits_per_byte"] == pytest.approx(kept["bits_per_byte"])
    assert main(["evaluate", str(run), "--branches", "2", "--split", "validation", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["perplexity"]) == 2
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
