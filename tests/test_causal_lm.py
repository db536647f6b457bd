"""Causal language models in float64: attention, the stem, prefixes, tied weights and buffers."""

from __future__ import annotations

import copy
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
from paradepth.depth import Stack
from paradepth.models import CausalLM, list_models, model_config
from paradepth.nn import EncoderLayer, LanguageModelHead, MultiHeadAttention, TokenStem
from paradepth.nn import attention as attention_module
from paradepth.train import Config
from paradepth.train.optimiser import Optimiser

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
