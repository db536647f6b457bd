"""Packed weights: nothing is lost, zeros cost a bit, and damaged files are refused.

Shapes: N numbers of a tensor.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import paradepth
from paradepth.models.packed import pack, unpack
from paradepth.models.quantised import quantise

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8)
UP = "trunk.branches.1.layers.0.mlp.up.weight"


@given(
    shape=st.lists(st.integers(0, 40), min_size=0, max_size=3),
    zeros=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)
def test_packing_loses_nothing_and_never_costs_anything(
    shape: list[int], zeros: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator).mul(50).to(dtype)
    tensor[torch.rand(shape, generator=generator) < zeros] = 0
    stored, shapes = pack({"w": tensor, "w.more": torch.ones(2)})
    again = unpack(stored, json.loads(json.dumps(shapes)))
    assert set(again) == {"w", "w.more"}
    assert again["w"].dtype == dtype
    assert torch.equal(again["w"], tensor)
    size, whole = (sum(t.nbytes for name, t in part.items() if name != "w.more") for part in (stored, {"w": tensor}))
    assert size <= whole
    if shapes:
        assert stored["w.values"].shape == (int((tensor != 0).sum()),)
        assert size == -(-tensor.numel() // 8) + stored["w.values"].nbytes
    else:
        saved = whole - (-(-tensor.numel() // 8) + int((tensor != 0).sum()) * tensor.element_size())
        assert saved <= 200, "what packing would save is less than it costs in the header"


def test_bits_are_in_order() -> None:
    tensor = torch.zeros(16, 16)
    tensor.view(-1)[[0, 1, 9, 255]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    stored, shapes = pack({"w": tensor})
    assert shapes == {"w": [16, 16]}
    assert stored["w.mask"].tolist() == [3, 2, *[0] * 29, 128]
    assert stored["w.values"].tolist() == [1, 2, 3, 4]


def pruned(part: float) -> Any:
    """A ParaFormer whose trunk has this part of zeros in its linear maps, some of them negative."""
    model = paradepth.create_model("paraformer_nano", image_size=8, patch_size=2, channels=1, depth=1, branches=3)
    with torch.no_grad():
        for name, parameter in model.trunk.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2:
                parameter.mul_(torch.rand_like(parameter) >= part)
        for parameter in model.parameters():
            if not parameter.any():
                parameter.fill_(0.5)
    return model.eval()


def size_of(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize(("part", "most"), [(0.5, 0.58), (0.7, 0.38), (0.9, 0.19)])
def test_a_pruned_model_is_smaller_by_its_zeros(part: float, most: float, tmp_path: Path) -> None:
    model = pruned(part)
    whole, packed = model.save_pretrained(tmp_path / "whole"), model.save_pretrained(tmp_path / "packed", packed=True)
    assert size_of(packed) <= most * size_of(whole)
    again, plain = paradepth.from_pretrained(packed), paradepth.from_pretrained(whole)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    images = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again.prefix_logits(images), model.prefix_logits(images))
    told = json.loads((packed / "config.json").read_text())["packed"]
    assert told[UP] == [256, 64]
    assert len(told) == 12, "the linear maps of the trunk, and nothing else"
    assert "packed" not in json.loads((whole / "config.json").read_text())


def test_a_model_without_zeros_is_stored_as_ever(tmp_path: Path) -> None:
    model = paradepth.create_model("vit_nano", image_size=8, patch_size=4, depth=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    whole, packed = model.save_pretrained(tmp_path / "whole"), model.save_pretrained(tmp_path / "packed", packed=True)
    for name in ("config.json", "model.safetensors"):
        assert (whole / name).read_bytes() == (packed / name).read_bytes()


@pytest.mark.parametrize("method", ["int8", "int8_dynamic"])
def test_the_zeros_of_a_quantised_model_are_left_out_too(method: Any, tmp_path: Path) -> None:
    small = quantise(pruned(0.7), method)
    whole, packed = small.save_pretrained(tmp_path / "whole"), small.save_pretrained(tmp_path / "packed", packed=True)
    assert size_of(packed) < 0.6 * size_of(whole)
    images = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(paradepth.from_pretrained(packed)(images), small(images))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({".mask": None}, r"there is no .*up\.weight\.mask"),
        ({".values": None}, r"there is no .*up\.weight\.values"),
        ({".mask": torch.zeros(2047, dtype=torch.uint8)}, r"shape \(2047,\); for 16384 numbers .* \(2048,\)"),
        ({".mask": torch.zeros(2048, dtype=torch.int8)}, r"mask is torch\.int8"),
        ({".mask": torch.full((2048,), 255, dtype=torch.uint8)}, "the mask has 16384 bits set"),
        ({".values": torch.ones(3)}, r"values has shape \(3,\), and the mask has"),
        ({".values": torch.ones(3, 4)}, r"values has shape \(3, 4\)"),
        ({"": torch.ones(256, 64)}, "there both packed and as it is"),
    ],
)
def test_damaged_files_are_refused(changes: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    pruned(0.7).save_pretrained(tmp_path, packed=True)
    tensors = load_file(tmp_path / "model.safetensors")
    for ending, value in changes.items():
        tensors.pop(UP + ending, None)
        if value is not None:
            tensors[UP + ending] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        paradepth.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], "must be the shapes of packed tensors"),
        ({UP: "256x64"}, "must be a shape"),
        ({UP: [256, -64]}, "must be a shape"),
        ({UP: [256, 64.0]}, "must be a shape"),
        ({UP: [256, 65]}, "for 16640 numbers"),
        ({UP: [64, 256]}, "do not fit the configuration"),
        ({"nothing": [1]}, r"there is no nothing\.mask"),
        ({}, "do not fit the configuration"),
    ],
)
def test_wrong_shapes_are_refused(entry: Any, message: str, tmp_path: Path) -> None:
    pruned(0.7).save_pretrained(tmp_path, packed=True)
    config = json.loads((tmp_path / "config.json").read_text())
    if isinstance(entry, dict) and entry:
        entry = {**config["packed"], **entry}
    (tmp_path / "config.json").write_text(json.dumps({**config, "packed": entry}))
    with pytest.raises(ValueError, match=message):
        paradepth.from_pretrained(tmp_path)


def test_bits_behind_the_last_number_are_refused() -> None:
    stored, shapes = pack({"w": torch.zeros(1001)})
    stored["w.mask"][-1] = 128
    with pytest.raises(ValueError, match="bits behind its 1001 numbers"):
        unpack(stored, shapes)
