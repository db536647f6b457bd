"""Heads that are not width / heads wide: what pruned models have. Everything that evaluates layers takes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import paradepth
from compress_helpers import classifier, images, other_kinds
from paradepth.branches import Batched, TrunkCache
from paradepth.models.pretrained import config_dict
from paradepth.nn import CrossAttention, EncoderLayer, MultiHeadAttention, TargetLayer
from paradepth.nn import attention as attention_module
from paradepth.train import Config, start_run
from paradepth.train.finetune import finetune_config
from paradepth.train.start import take_over
from paradepth.train.tasks import load_data
from runs import tiny_config


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def by_head(q: Tensor, k: Tensor, v: Tensor, heads: int, *, causal: bool = False) -> Tensor:
    """Attention with a loop over heads, without batch."""
    parts = []
    for q_TK, k_SK, v_SK in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
        scores = q_TK @ k_SK.T / q_TK.shape[1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
        parts.append(scores.softmax(dim=1) @ v_SK)
    return torch.cat(parts, dim=1)


@given(heads=st.integers(1, 4), head_width=st.integers(1, 5), causal=st.booleans(), bias=st.booleans())
def test_attention_with_heads_of_any_width(heads: int, head_width: int, causal: bool, bias: bool) -> None:
    own = MultiHeadAttention(7, heads, head_width=head_width, causal=causal, bias=bias).double()
    x, memory = torch.randn(1, 5, 7).double(), torch.randn(1, 6, 7).double()
    q, k, v = own.qkv(x[0]).chunk(3, dim=1)
    close(own(x)[0], own.out(by_head(q, k, v, heads, causal=causal)))
    cross = CrossAttention(7, heads, head_width=head_width, bias=bias).double()
    k, v = cross.kv(memory[0]).chunk(2, dim=1)
    close(cross(x, memory)[0], cross.out(by_head(cross.q(x[0]), k, v, heads)))
    assert own.out.in_features == cross.out.in_features == heads * head_width


@pytest.mark.parametrize(("heads", "head_width"), [(3, 4), (1, 2), (2, 8)])
def test_flops_are_those_that_torch_counts(heads: int, head_width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "fused_is_faster", lambda q: False)  # torch does not count fused kernels
    options: dict[str, Any] = {"heads": heads, "head_width": head_width, "mlp": 32}
    with FlopCounterMode(display=False) as counter:
        EncoderLayer(16, **options)(torch.randn(1, 9, 16))
    assert EncoderLayer(16, **options).flops(9) == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        TargetLayer(16, **options)((torch.randn(1, 6, 16), torch.randn(1, 9, 16)))
    assert TargetLayer(16, **options).flops((6, 9)) == counter.get_total_flops()


def test_width_over_heads_is_what_it_was() -> None:
    given_width, plain = (classifier(branches=2, **options) for options in ({"head_width": 4}, {}))
    given_width.load_state_dict(plain.state_dict())
    x, _ = images()
    assert torch.equal(given_width(x), plain(x))
    assert given_width.forward_flops() == plain.forward_flops()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": 3}, "width 8 cannot be split into 3 heads"),
        ({"heads": 0}, "cannot be split into 0 heads"),
        ({"heads": 3, "head_width": 0}, "3 heads of width 0"),
        ({"heads": 0, "head_width": 2}, "0 heads of width 2"),
    ],
)
def test_heads_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    for kind in (MultiHeadAttention, CrossAttention):
        with pytest.raises(ValueError, match=words):
            kind(8, **options)


@pytest.mark.parametrize("kind", ["texts", "language", "translation"])
def test_branches_of_such_layers_are_evaluated_as_batched_tensors(kind: str) -> None:
    model, inputs, _ = other_kinds(heads=3, head_width=5)[kind]
    expected = model(inputs)
    model.trunk.executor = Batched()
    close(model(inputs), expected)
    with torch.no_grad():
        close(model(inputs), expected)


def test_generation_remembers_keys_and_values_of_such_heads() -> None:
    model, tokens, _ = other_kinds(heads=3, head_width=5)["language"]
    x, sides = model.embed(tokens)
    cache = TrunkCache(model.trunk)
    close(torch.cat([cache.advance(x[:, :3]), cache.advance(x[:, 3:])], dim=1), model.trunk(x, *sides))


def test_a_model_saved_before_there_was_such_a_field_still_loads(tmp_path: Path) -> None:
    model = classifier(branches=2)
    folder = model.save_pretrained(tmp_path)
    described = json.loads((folder / "config.json").read_text())
    assert described["model"].pop("head_width") is None
    (folder / "config.json").write_text(json.dumps(described))
    x, _ = images()
    assert torch.equal(paradepth.from_pretrained(folder)(x), model(x))
    flat = Config().flat()
    assert flat.pop("head_width") is None
    assert Config.from_flat(flat) == Config()


def test_such_a_model_is_trained_and_fine_tuned(tmp_path: Path) -> None:
    options = {"width": 16, "heads": 1, "head_width": 4, "mlp": 16, "budget": "3 steps", "validations": 1}
    start_run(tiny_config(**options), tmp_path / "run")
    model = paradepth.from_pretrained(tmp_path / "run")
    assert model.trunk.branches[0].layers[0].attention.qkv.weight.shape == (12, 16)
    config = finetune_config(tmp_path / "run", "digits")
    assert (config.model_options.heads, config.model_options.head_width) == (1, 4)
    new = load_data(config).new_model()
    assert config_dict(new)["model"]["head_width"] == 4
    take_over(new, model)
    other = load_data(config.replace(heads=2, head_width=2)).new_model()
    with pytest.raises(ValueError, match="heads is 2 here and 1 in the source"):
        take_over(other, model)


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_such_a_model_is_exported(format: str, tmp_path: Path) -> None:
    from paradepth.export import export_run

    model = classifier(branches=2, heads=3, head_width=5).float()
    model.save_pretrained(tmp_path)
    done = export_run(tmp_path, format=format, latency=False)  # pyright: ignore[reportArgumentType]
    assert done["difference"] < 1e-4
