"""Layers: the residual form, attention kernels, reproducible dropout, stem and head."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from paradepth.nn import ClassifierHead, Dropout, EncoderLayer, MultiHeadAttention, PatchStem, set_dropout_key
from paradepth.nn import attention as attention_module


def layer(**options: object) -> EncoderLayer:
    return EncoderLayer(16, heads=4, mlp=32, **options).double()  # pyright: ignore[reportArgumentType]


def test_layer_is_the_pre_norm_transformer_layer() -> None:
    ours = layer()
    theirs = nn.TransformerEncoderLayer(16, 4, 32, 0.0, "gelu", batch_first=True, norm_first=True).double()
    theirs.load_state_dict(
        {
            "self_attn.in_proj_weight": ours.attention.qkv.weight,
            "self_attn.in_proj_bias": ours.attention.qkv.bias,
            "self_attn.out_proj.weight": ours.attention.out.weight,
            "self_attn.out_proj.bias": ours.attention.out.bias,
            "linear1.weight": ours.mlp.up.weight,
            "linear1.bias": ours.mlp.up.bias,
            "linear2.weight": ours.mlp.down.weight,
            "linear2.bias": ours.mlp.down.bias,
            "norm1.weight": ours.attention_norm.weight,
            "norm1.bias": ours.attention_norm.bias,
            "norm2.weight": ours.mlp_norm.weight,
            "norm2.bias": ours.mlp_norm.bias,
        }
    )
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-10)


@given(step=st.floats(0.01, 1.0), bias=st.booleans())
def test_forward_is_input_plus_step_times_residual(step: float, bias: bool) -> None:
    block = layer(bias=bias)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    a = block.attention(block.attention_norm(x))
    expected = x + step * (a + block.mlp(block.mlp_norm(x + a)))
    torch.testing.assert_close(block(x, step=step), expected, rtol=0, atol=1e-12)
    assert bias == any(name.endswith("bias") for name, _ in block.named_parameters())


@pytest.mark.parametrize("masked", [False, True])
def test_fused_and_explicit_attention_agree(monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    attention = MultiHeadAttention(16, 4).double()
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    mask = (torch.rand(3, 1, 7, 7) > 0.4) | torch.eye(7, dtype=torch.bool) if masked else None
    results = []
    for fused in (True, False):
        monkeypatch.setattr(attention_module, "fused_is_faster", lambda q, fused=fused: fused)
        attention.zero_grad()
        y = attention(x, mask)
        y.square().sum().backward()
        assert attention.qkv.weight.grad is not None
        results.append((y.detach(), attention.qkv.weight.grad.clone()))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-10)


def test_bf16_training_on_cpu_avoids_the_fused_kernel() -> None:
    q = torch.randn(1, 1, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    assert not attention_module.fused_is_faster(q)
    assert attention_module.fused_is_faster(q.detach())
    assert attention_module.fused_is_faster(q.float())
    with torch.no_grad():
        assert attention_module.fused_is_faster(q)


def test_deep_init_scales_value_output_and_mlp_projections_only() -> None:
    torch.manual_seed(0)
    plain = layer()
    torch.manual_seed(0)
    scaled = layer(deep_init=32)
    factor = math.sqrt(math.log(64))
    width = 16
    ratio = {
        name: (b / a).nan_to_num() for (name, a), b in zip(plain.named_parameters(), scaled.parameters(), strict=True)
    }
    for name in ("attention.out.weight", "mlp.up.weight", "mlp.down.weight"):
        torch.testing.assert_close(ratio[name], torch.full_like(ratio[name], factor))
    torch.testing.assert_close(ratio["attention.qkv.weight"][: 2 * width], torch.ones(2 * width, width).double())
    torch.testing.assert_close(ratio["attention.qkv.weight"][2 * width :], torch.full((width, width), factor).double())


def test_zero_output_makes_the_layer_the_identity_but_trainable() -> None:
    block = layer()
    block.zero_output_()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert block.mlp.down.weight.grad is not None
    assert block.mlp.down.weight.grad.abs().sum() > 0


def test_dropout_mask_is_a_function_of_seed_step_place_and_rank() -> None:
    block = layer(dropout=0.5, attention_dropout=0.5)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    seen = []
    for seed, step, rank in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]:
        set_dropout_key(block, seed=seed, step=step, rank=rank)
        torch.rand(7)  # the global random stream has no say
        seen.append(block(x))
        assert torch.equal(seen[-1], block(x)), "a recomputation draws the same mask"
    assert torch.equal(seen[0], seen[-1])
    assert all(not torch.equal(seen[0], other) for other in seen[1:-1])
    pair = nn.ModuleList([Dropout(0.5), Dropout(0.5)])
    set_dropout_key(pair, seed=0, step=0)
    ones = torch.ones(64)
    assert not torch.equal(pair[0](ones), pair[1](ones)), "places have masks of their own"


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_the_right_share_and_keeps_the_mean(p: float) -> None:
    drop, share = Dropout(p), []
    for step in range(20):
        set_dropout_key(drop, seed=3, step=step)
        share.append((drop(torch.ones(100, 100)) == 0).float())
    stacked = torch.stack(share)
    assert abs(stacked.mean().item() - p) < 0.005
    # Masks of different steps are independent: they agree as often as independent draws would.
    assert abs((stacked[0] == stacked[1]).float().mean().item() - (p * p + (1 - p) ** 2)) < 0.03
    assert torch.equal(drop.eval()(torch.ones(3)), torch.ones(3))


@given(
    size=st.tuples(st.integers(3, 20), st.integers(3, 20)),
    patch=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    channels=st.sampled_from([1, 3]),
    class_token=st.booleans(),
)
def test_stem_takes_any_image_and_patch_size(
    size: tuple[int, int], patch: tuple[int, int], channels: int, class_token: bool
) -> None:
    if patch[0] > size[0] or patch[1] > size[1]:
        with pytest.raises(ValueError, match="larger than image_size"):
            PatchStem(size, patch, channels=channels, width=8, class_token=class_token)
        return
    stem = PatchStem(size, patch, channels=channels, width=8, class_token=class_token).double()
    y = stem(torch.rand(2, channels, *size, dtype=torch.float64))
    patches = math.ceil(size[0] / patch[0]) * math.ceil(size[1] / patch[1])
    assert y.shape == (2, patches + class_token, 8)


def test_stem_is_the_patch_convolution_of_normalised_pixels() -> None:
    stem = PatchStem((8, 12), (4, 3), channels=3, width=5).double()
    stem.set_normalisation([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    images = torch.rand(2, 3, 8, 12, dtype=torch.float64)
    normal = (images - stem.pixel_mean.view(-1, 1, 1)) / stem.pixel_std.view(-1, 1, 1)
    kernel = stem.embed.weight.view(5, 3, 4, 3)
    expected = nn.functional.conv2d(normal, kernel, stem.embed.bias, stride=(4, 3)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(stem(images), expected + stem.positions, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MultiHeadAttention(10, 3), "heads must divide"),
        (lambda: Dropout(1.0), "below 1"),
        (lambda: ClassifierHead(8, 2, pool="max"), "'cls' or 'mean'"),  # pyright: ignore[reportArgumentType]
        (lambda: ClassifierHead(8, 0), "at least 1"),
        (lambda: PatchStem((8, 8), (4, 4), channels=1, width=4)(torch.rand(2, 3, 8, 8)), r"takes \(batch, 1, 8, 8\)"),
        (lambda: PatchStem((8, 8), (4, 4), channels=1, width=4)(torch.ones(2, 1, 8, 8, dtype=torch.uint8)), "floating"),
        (lambda: PatchStem((8, 8), (4, 4), channels=1, width=4).set_normalisation([0.0], [0.0]), "positive"),
    ],
)
def test_bad_input_is_refused_in_words(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_flops_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        attention_module, "fused_is_faster", lambda q: False
    )  # torch does not count its fused CPU kernel
    block = EncoderLayer(16, heads=4, mlp=32)
    with FlopCounterMode(display=False) as counter:
        block(torch.randn(1, 9, 16))
    assert block.flops(9) == counter.get_total_flops()
