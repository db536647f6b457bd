"""Quantising: what the integers are, that nothing is lost on disk, and what is refused.

Shapes: B batch, N outputs, K inputs, G groups.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import paradepth
from paradepth.compress import STEPS, check_plan, parse_plan
from paradepth.models.quantised import _apart, _pairs, _table, _table_values, quantise, stored_tensors
from paradepth.train.finetune import finetune_config
from paradepth.train.start import start_from
from quantise_helpers import KINDS, METHODS, build, inputs_of, randomised, same_bits

# ---- what is rounded, and how --------------------------------------------------------------------------------


def linear_of(weight_NK: Tensor, method: Any) -> Any:
    """The linear map with this weight in a quantised model."""
    N, K = weight_NK.shape
    model = paradepth.create_model("vit_nano", image_size=8, patch_size=4, width=K, heads=1, mlp=N, depth=1).eval()
    with torch.no_grad():
        model.trunk.layers[0].mlp.up.weight.copy_(weight_NK)
        model.trunk.layers[0].mlp.up.bias.zero_()
    return quantise(model, method).trunk.layers[0].mlp.up


@settings(max_examples=12)
@given(N=st.integers(1, 9), K=st.sampled_from([2, 7, 32, 48, 64]), B=st.integers(1, 5), seed=st.integers(0, 9))
@pytest.mark.parametrize("method", METHODS)
def test_integers_are_the_nearest_and_products_are_those_of_an_oracle(
    method: str, N: int, K: int, B: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight_NK = torch.randn(N, K, generator=generator) * torch.rand(N, 1, generator=generator).mul(20).sub(10).exp()
    x_BK = torch.randn(B, K, generator=generator) * torch.rand(B, 1, generator=generator).mul(8).sub(4).exp()
    linear = linear_of(weight_NK, method)
    group = 32 if method == "int4" and K % 32 == 0 else K
    low, high = (-8, 7) if method == "int4" else (-128, 127)
    groups_NG = weight_NK.double().view(N, K // group, group)
    scale_NG1 = (groups_NG.abs().amax(dim=2, keepdim=True) / ((high - low) / 2)).clamp(min=2.0**-23)
    if method == "int4":
        scale_NG1 = scale_NG1.float().bfloat16().double()
    integers = linear.weight.qdata.double()
    assert low <= integers.min() <= integers.max() <= high
    rounded_NG = integers.view(groups_NG.shape) * scale_NG1
    nearest = 0.5 + (0.04 if method == "int4" else 1e-4)  # steps; the largest is clipped by what the scale is rounded
    assert ((rounded_NG - groups_NG).abs() <= nearest * scale_NG1).all()
    rounded_NK = rounded_NG.view(N, K)
    torch.testing.assert_close(linear.weight.dequantize().double(), rounded_NK, rtol=1e-5, atol=1e-12)
    bound_BN = 1e-5 * (x_BK.double().abs() @ rounded_NK.abs().T) + 1e-12
    if method == "int8_dynamic":  # what comes in is off by at most half a step of its own
        step_B1 = (x_BK.double().abs().amax(dim=1, keepdim=True) / 127.5).clamp(min=2.0**-23)
        bound_BN = bound_BN + 0.501 * step_B1 * rounded_NK.abs().sum(dim=1)
    with torch.no_grad():
        error_BN = (linear(x_BK).double() - x_BK.double() @ rounded_NK.T).abs()
    assert (error_BN <= bound_BN).all()
    if method == "int8_dynamic" and K >= 32:
        assert (error_BN > 1e-3 * bound_BN).any(), "it is rounded"


@given(rows=st.integers(1, 6), width=st.integers(1, 9), size=st.floats(-140, 100), seed=st.integers(0, 99))
def test_a_table_is_rounded_to_8_bits_and_rounding_twice_is_rounding_once(
    rows: int, width: int, size: float, seed: int
) -> None:
    values = (torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).double() * 2.0**size).float()
    values[0, 0] = 0.0 if seed % 2 else 127 * 2.0**-9
    integers, scale = _table(values)
    assert integers.abs().max() <= 127
    assert torch.equal(scale.frexp().mantissa, torch.full_like(scale, 0.5)), "powers of two"
    rounded = _table_values(integers, scale)
    assert ((values.double() - rounded.double()).abs() <= scale.double() / 2).all()
    full = values.abs().amax(dim=1, keepdim=True) >= 2.0**-119
    assert (integers.abs().amax(dim=1, keepdim=True) >= 64)[full].all(), "no bit is wasted"
    again, same_scale = _table(rounded)
    assert torch.equal(_table_values(again, same_scale), rounded)
    assert torch.equal(_table_values(again, same_scale.bfloat16().float()), rounded)


@given(rows=st.integers(1, 5), width=st.integers(1, 9), seed=st.integers(0, 99))
def test_two_integers_share_a_byte(rows: int, width: int, seed: int) -> None:
    integers = torch.randint(-8, 8, (rows, width), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    pairs = _pairs(integers)
    assert pairs.dtype == torch.uint8
    assert pairs.shape == (rows, (width + 1) // 2)
    for n in range(rows):
        for k in range(width):
            assert (int(pairs[n, k // 2]) >> (4 * (k % 2))) % 16 - 8 == integers[n, k]
    assert torch.equal(_apart(pairs, width), integers)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [*KINDS, "hf"])
def test_linear_maps_of_trunk_and_head_are_integers_and_the_rest_is_float32(kind: str, method: Any) -> None:
    model = build(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = quantise(model, method)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "left alone"
    inside = {*small.trunk.modules(), *small.head.modules()}
    tables = {f"{name}.weight" for name, module in small.named_modules() if isinstance(module, nn.Embedding)}
    for name, tensor in small.state_dict().items():
        module = small.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear) and module in inside and name.endswith("weight"):
            assert type(tensor).__name__ == ("IntxUnpackedToInt8Tensor" if method == "int4" else "Int8Tensor")
            continue
        assert type(tensor) is Tensor
        assert tensor.dtype == before[name].dtype
        if name in dict(small.named_buffers()):
            assert torch.equal(tensor, before[name])
        elif name not in tables:
            assert torch.equal(tensor, before[name].half().float())
    assert not any(parameter.requires_grad for parameter in small.parameters())
    assert not small.training
    inputs = inputs_of(model)
    with torch.no_grad():
        expected, found = model(inputs), small(inputs)
    error = (found - expected).norm() / (expected - expected.mean()).norm()
    assert 0 < error < {"int8": 0.05, "int8_dynamic": 0.1, "int4": 0.6}[method]


# ---- storage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [*KINDS, "hf"])
def test_a_saved_and_loaded_model_computes_the_same_bits(kind: str, method: Any, tmp_path: Path) -> None:
    small = quantise(build(kind), method)
    again = paradepth.from_pretrained(small.save_pretrained(tmp_path / "a"))
    assert again.quantisation == small.quantisation
    assert same_bits(small, again, inputs_of(build(kind)))
    again.save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not any(parameter.requires_grad for parameter in again.parameters())
    kept = {tensor.dtype for tensor in load_file(tmp_path / "a" / "model.safetensors").values()}
    assert kept <= {torch.int8, torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.int64}


IMAGES = {"image_size": 28, "patch_size": 4, "channels": 1}  # as Fashion-MNIST


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((f"{family}_{size}", IMAGES) for family in ("paraformer", "vit") for size in ("nano", "pico", "tiny")),
        ("bert_nano", {"vocab_size": 8192}),
        ("gpt_nano", {}),
        ("translator_nano", {}),
    ],
)
def test_the_file_is_less_than_three_tenths(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = randomised(paradepth.create_model(name, **options))
    whole = (model.save_pretrained(tmp_path) / "model.safetensors").stat().st_size
    tables = hasattr(model.config, "vocab_size")  # of 8 bits by any method
    for method, most in (("int8", 0.3), ("int8_dynamic", 0.3), ("int4", 0.25 if tables else 0.2)):
        small = quantise(model, method)  # pyright: ignore[reportArgumentType]
        size = (small.save_pretrained(tmp_path) / "model.safetensors").stat().st_size
        assert size <= most * whole, f"{method}: {size / whole:.3f}"


def test_the_entry_of_the_configuration(tmp_path: Path) -> None:
    for method, entry in {
        "int8": {"method": "int8"},
        "int8_dynamic": {"method": "int8_dynamic", "reduce_range": quantise(build("images"), "int8_dynamic")
                         .quantisation.reduce_range},
        "int4": {"method": "int4", "group": 32},
    }.items():  # fmt: skip
        quantise(build("images"), method).save_pretrained(tmp_path)  # pyright: ignore[reportArgumentType]
        assert json.loads((tmp_path / "config.json").read_text())["quantisation"] == entry


QKV = "trunk.branches.1.layers.0.attention.qkv.weight"


def change(tensors: dict[str, Tensor], name: str, value: Tensor | None) -> None:
    del tensors[name]
    if value is not None:
        tensors[name] = value


@pytest.mark.parametrize(
    ("method", "name", "value", "message"),
    [
        ("int8", f"{QKV}.scale", None, r"there is no trunk.*qkv.weight.scale"),
        ("int8", f"{QKV}.int8", None, r"there is no trunk.*qkv.weight.int8"),
        ("int8", f"{QKV}.int8", torch.zeros(48, 15, dtype=torch.int8), r"int8 of shape \(48, 15\).*\(48, 16\)"),
        ("int8", f"{QKV}.int8", torch.zeros(48, 16), r"torch.float32 of shape.*needs torch.int8"),
        ("int8", f"{QKV}.scale", torch.zeros(48), r"scale is torch.float32 of shape \(48,\)"),
        ("int8_dynamic", f"{QKV}.scale", torch.zeros(48, 1, dtype=torch.float64), "float64"),
        ("int4", f"{QKV}.int4", torch.zeros(48, 16, dtype=torch.uint8), r"shape \(48, 16\).*\(48, 8\)"),
        ("int4", f"{QKV}.scale", torch.zeros(48, 2, dtype=torch.bfloat16), r"shape \(48, 2\)"),
        ("int8", "stem.positions", torch.zeros(7, 16, dtype=torch.int8), "torch.float32 or torch.float16"),
    ],
)
def test_damaged_files_are_refused_with_words(
    method: Any, name: str, value: Tensor | None, message: str, tmp_path: Path
) -> None:
    quantise(build("images"), method).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors, name, value)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        paradepth.from_pretrained(tmp_path)


def test_a_damaged_table_and_a_tensor_too_many_are_refused(tmp_path: Path) -> None:
    quantise(build("masked_lm"), "int8").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "more": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="there is more, which the model does not have"):
        paradepth.from_pretrained(tmp_path)
    change(tensors, "stem.embed.weight.scale", torch.ones(260, 1))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"embed.weight.scale is torch.float32.*bfloat16"):
        paradepth.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"method": "int3"}, "quantisation is 'int3'; it must be one of int8, int8_dynamic, int4"),
        ({"method": ["int8"]}, "must be one of"),
        ({"method": "int8", "group": 32}, "group is 32"),
        ({"method": "int4"}, "group is None"),
        ({"method": "int4", "group": 0}, "group is 0"),
        ({"method": "int4", "group": True}, "group is True"),
        ({"method": "int8_dynamic"}, "reduce_range is None"),
        ({"method": "int8", "bits": 3}, "does not know"),
        ({}, "does not know"),
        ("int8", "does not know"),
        (None, "does not know"),
    ],
)
def test_unknown_entries_are_refused(entry: Any, message: str, tmp_path: Path) -> None:
    quantise(build("images"), "int8").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantisation": entry}))
    with pytest.raises(ValueError, match=message):
        paradepth.from_pretrained(tmp_path)


def test_a_processor_whose_sums_would_overflow_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchao.utils.should_reduce_range", lambda device: True)
    small = quantise(build("images"), "int8_dynamic")
    assert small.quantisation.reduce_range is True
    assert small.head.classify.weight.qdata.abs().max() <= 64
    assert same_bits(small, paradepth.from_pretrained(small.save_pretrained(tmp_path)), inputs_of(build("images")))
    monkeypatch.setattr("torchao.utils.should_reduce_range", lambda device: False)
    quantise(build("images"), "int8_dynamic").save_pretrained(tmp_path)
    monkeypatch.setattr("torchao.utils.should_reduce_range", lambda device: True)
    with pytest.raises(ValueError, match="without VNNI"):
        paradepth.from_pretrained(tmp_path)


# ---- refusals ------------------------------------------------------------------------------------------------


def test_what_cannot_be_quantised_is_refused() -> None:
    model = build("images")
    with pytest.raises(ValueError, match="quantisation is 'int2'; it must be one of int8, int8_dynamic, int4"):
        quantise(model, "int2")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"quantised already \(int8\)"):
        quantise(quantise(model, "int8"), "int4")
    with pytest.raises(ValueError, match=r"weights in torch\.float64; models are quantised from torch\.float32"):
        quantise(build("images").double(), "int8")
    with torch.no_grad():
        model.trunk.branches[1].layers[0].mlp.up.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"branches\.1\.layers\.0\.mlp\.up\.weight has numbers that are infinite"):
        quantise(model, "int8")


def test_weights_beyond_half_precision_stay_as_they_are(tmp_path: Path) -> None:
    model = build("images")
    with torch.no_grad():
        model.stem.positions[0, 0] = 1e6
    small = quantise(model, "int8")
    assert small.stem.positions[0, 0] == 1e6
    again = paradepth.from_pretrained(small.save_pretrained(tmp_path))
    assert torch.equal(again.stem.positions, small.stem.positions)


def test_quantised_models_do_not_learn(tmp_path: Path) -> None:
    small = quantise(build("images"), "int8")
    for change_shape in (lambda: small.grow(1), lambda: small.grow(classes=1), lambda: small.drop(1)):
        with pytest.raises(ValueError, match="the one in float32 that it was made from"):
            change_shape()
    small.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the source is quantised \(int8\).*take the run in float32"):
        start_from(build("images"), tmp_path)
    with pytest.raises(ValueError, match=r"is quantised \(int8\).*take the run in float32"):
        finetune_config(tmp_path, "digits")


def test_steps_of_a_plan() -> None:
    model = build("images")
    assert set(METHODS) <= set(STEPS)
    for method in METHODS:
        plan = parse_plan(f"prefix=2+{method}")
        check_plan(plan, model)
        bench: Any = None
        found = plan[1].apply(model.truncate(2), bench)
        assert found.quantisation is not None
        assert found.quantisation.method == method
        with pytest.raises(ValueError, match="must be the last step"):
            parse_plan(f"{method}+prefix=2")
        with pytest.raises(ValueError, match="quantised already"):
            check_plan(parse_plan(method), found)
    with pytest.raises(ValueError, match="int8 has no setting"):
        parse_plan("int8=3")


# ---- without torchao -----------------------------------------------------------------------------------------

WITHOUT = """
import sys
import paradepth, paradepth.cli, paradepth.compress, paradepth.export, paradepth.train
from paradepth.models.quantised import quantise
assert not any(name.split(".")[0] == "torchao" for name in sys.modules), "imported with the package"
sys.modules["torchao"] = None
folder, plain = sys.argv[1:]
assert paradepth.cli.main(["export", folder, "--format", "torch"]) == 2
model = paradepth.from_pretrained(plain)
for call in (lambda: paradepth.from_pretrained(folder), lambda: quantise(model, "int4"),
             lambda: paradepth.compress.check_plan(paradepth.compress.parse_plan("int8"), model)):
    try:
        call()
    except ValueError as error:
        assert "pip install 'paradepth[quantize]'" in str(error), error
    else:
        raise AssertionError("not refused")
"""


def test_torchao_is_optional_and_missed_in_words(tmp_path: Path) -> None:
    model = build("images")
    model.save_pretrained(tmp_path / "plain")
    quantise(model, "int8").save_pretrained(tmp_path / "small")
    command = [sys.executable, "-c", WITHOUT, str(tmp_path / "small"), str(tmp_path / "plain")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "refused: " in done.stderr
    assert "paradepth[quantize]" in done.stderr


def test_what_is_stored_is_plain() -> None:
    for method in METHODS:
        stored = stored_tensors(quantise(build("masked_lm"), method))  # pyright: ignore[reportArgumentType]
        assert all(type(tensor) is Tensor for tensor in stored.values())
