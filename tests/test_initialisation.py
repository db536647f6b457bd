"""How weights start: distributions, layers that are the identity, and that the seed of the run decides."""

from __future__ import annotations

from math import log, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import paradepth
from paradepth.models import TrunkConfig
from paradepth.models.initial import DEVIATION
from paradepth.train import start_run
from paradepth.train.config import Config
from paradepth.train.finetune import finetune_config
from paradepth.train.tasks import task_class
from runs import tiny_config

TRUNCATED_SD = 0.8796 * DEVIATION  # of a normal distribution that is cut at two deviations
MODELS: dict[str, dict[str, Any]] = {
    "paraformer_nano": {"image_size": 8, "patch_size": 4},
    "vit_nano": {"image_size": 8, "patch_size": 4, "embedding": "convolutions"},
    "gpt_nano": {"context": 8},
    "bert_nano": {"context": 8, "vocab_size": 300},
    "text_classifier_nano": {"context": 8, "vocab_size": 300},
    "tagger_nano": {"context": 8, "vocab_size": 50},
    "translator_nano": {"context": 8, "vocab_size": 300},
}
SHAPE: dict[str, Any] = {"width": 32, "heads": 2, "mlp": 64}


def made(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return paradepth.create_model(name, **SHAPE, **MODELS[name], **options).double()


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("deep", [False, True])
def test_truncated_normal_weights(name: str, deep: bool) -> None:
    model, default = (made(name, init_weights=how, deep_init=deep) for how in ("truncated_normal", "default"))
    scale = sqrt(log(2 * model.config.layers)) if deep else 1.0
    found: dict[float, list[torch.Tensor]] = {1.0: [], scale: []}
    for key, linear in linears(model).items():
        inside = key.startswith("trunk.")
        if inside and key.endswith(("qkv", "kv", ".q")):
            parts = linear.weight.chunk(3 if key.endswith("qkv") else 2 if key.endswith("kv") else 1)
            scaled = parts[-1:] if len(parts) > 1 else ()
            found[1.0] += [part.flatten() for part in (parts[:-1] if scaled else parts)]
            found[scale] += [part.flatten() for part in scaled]
        else:
            found[scale if inside else 1.0].append(linear.weight.flatten())
        assert linear.bias is None or not linear.bias.any()
    for factor, weights in found.items():
        values = torch.cat(weights) / factor
        assert values.abs().max() <= 2 * DEVIATION * (1 + 1e-6)
        assert values.std().item() == pytest.approx(TRUNCATED_SD, rel=0.1)
        assert abs(values.mean().item()) < 5 * DEVIATION / sqrt(len(values))
    # What is no linear map is as it was.
    others = {key for key in default.state_dict() if key.rsplit(".", 1)[0] not in linears(default)}
    assert others
    for key in others:
        assert torch.equal(model.state_dict()[key], default.state_dict()[key]), key


@given(branches=st.integers(0, 3), depth=st.integers(1, 3), step=st.sampled_from([1.0, 0.25]), deep=st.booleans())
@settings(max_examples=10)
def test_zero_output_makes_the_trunk_the_identity(branches: int, depth: int, step: float, deep: bool) -> None:
    name = "paraformer_nano" if branches else "vit_nano"
    model = made(name, branches=branches, depth=depth, step=step, deep_init=deep, init_weights="zero_output")
    x_BTD = torch.randn(2, 4, 32, dtype=torch.float64)
    assert torch.equal(model.trunk(x_BTD), x_BTD)
    default = made(name, branches=branches, depth=depth, step=step, deep_init=deep)
    assert not torch.allclose(default.trunk(x_BTD), x_BTD)
    different = {key for key, value in model.state_dict().items() if not torch.equal(value, default.state_dict()[key])}
    assert different == {
        key
        for key in model.state_dict()
        if key.startswith("trunk.") and key.endswith((".attention.out.weight", ".mlp.down.weight"))
    }


@pytest.mark.parametrize("name", MODELS)
def test_zero_output_of_every_model(name: str) -> None:
    model = made(name, init_weights="zero_output").eval()
    B, T = 2, 8
    inputs: Any = torch.randint(5, 50, (B, T))
    if name in ("paraformer_nano", "vit_nano"):
        inputs = torch.rand(B, 3, 8, 8, dtype=torch.float64)
    elif name == "tagger_nano":
        inputs = torch.randint(1, 50, (B, T, model.config.features))
    elif name == "translator_nano":
        inputs = (inputs, inputs)
    elif name == "bert_nano":
        inputs = (inputs, torch.zeros(B, 1, dtype=torch.int64))
    x, sides = model.embed(inputs)
    state = model.trunk(x, *sides)
    for before, after in zip(*((s if isinstance(s, tuple) else (s,)) for s in (x, state)), strict=True):
        assert torch.equal(before, after)
    model.train()
    logits = model(inputs)
    logits.square().sum().backward()
    # Maps that are zero learn at once; a translator's encoder waits for the cross-attention's.
    learning = [bool(p.grad.any()) for key, p in model.named_parameters() if key.endswith("down.weight")]
    assert all(learning[len(learning) // 2 if name == "translator_nano" else 0 :])


def test_the_seed_of_the_run_decides(tmp_path: Path) -> None:
    options: dict[str, Any] = {"budget": "1 steps", "validations": 1, "learning_rate": 1e-9, "warmup": 0.0}
    weights = []
    for name, seed in (("a", 4), ("again", 4), ("other", 5)):
        torch.manual_seed(len(name))  # is not what is drawn from
        start_run(tiny_config(init_weights="truncated_normal", seed=seed, **options), tmp_path / name)
        weights.append(load_file(tmp_path / name / "model.safetensors")["trunk.branches.0.layers.0.mlp.up.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])
    assert weights[0].abs().max() <= 2 * DEVIATION + 1e-6


def test_unknown_ways_are_refused_and_a_fine_tuned_run_draws_anew(tmp_path: Path) -> None:
    words = "init_weights is 'orthogonal'; it must be one of default, truncated_normal, zero_output"
    with pytest.raises(ValueError, match=words):
        TrunkConfig(init_weights="orthogonal")  # pyright: ignore[reportArgumentType]
    config = Config().replace(model="hf_classifier", data="sst2", init_weights="zero_output")
    with pytest.raises(ValueError, match="init_weights is 'zero_output'; it means nothing"):
        task_class(config)
    made("paraformer_nano", init_weights="zero_output").float().save_pretrained(tmp_path)
    assert paradepth.from_pretrained(tmp_path).config.init_weights == "zero_output"
    assert finetune_config(tmp_path, "digits").model_options.init_weights == "default"
