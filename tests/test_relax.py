"""Attention relaxed to static mixing after training: the best matrices, the naive ones, and what stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import paradepth
from compress_helpers import classifier, images, other_kinds, roughen, same, weights
from paradepth.branches import Branches
from paradepth.models import TrunkConfig
from paradepth.models.quantised import quantise
from paradepth.theory.relax import layers_of, relax

DRAWS = torch.Generator().manual_seed(0)


def pictures(samples: int = 40) -> Tensor:
    return torch.rand(samples, 1, 8, 8, generator=DRAWS, dtype=torch.float64)


def features(model: Any, layer: Any, x_BTD: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the heads would add if each mixed one token alone, (B, T, H, D), and the attention's output without bias."""
    attention = layer.attention
    normed = layer.attention_norm(x_BTD)
    v_BTHK = attention.qkv(normed).chunk(3, dim=2)[2].unflatten(2, (attention.heads, -1))
    if mask is not None:
        v_BTHK = v_BTHK * mask[:, 0, 0, :, None, None]
    w_DHK = attention.out.weight.unflatten(1, (attention.heads, -1))
    return torch.einsum("dhk,bthk->bthd", w_DHK, v_BTHK), attention(normed, mask) - attention.out.bias


def first_layer(model: Any) -> Any:
    stack: Any = model.trunk.branches[0] if isinstance(model.trunk, Branches) else model.trunk
    return stack.layers[0]


def best(model: Any, inputs: Any, *, causal: bool) -> Tensor:
    """The best matrices of the first layer, row by row with torch's least squares, (H, T, T)."""
    x_BTD, sides = model.embed(inputs)
    mask = sides[0] if sides else None
    f_BTHD, a_BTD = features(model, first_layer(model), x_BTD, mask)
    B, T, H, _ = f_BTHD.shape
    real_BT = torch.ones(B, T, dtype=torch.bool) if mask is None else mask[:, 0, 0]
    m_HTS = torch.zeros(H, T, T, dtype=torch.float64)
    for t in range(T):
        seen = t + 1 if causal else T
        use = real_BT[:, t]
        f = f_BTHD[use, :seen].permute(0, 3, 1, 2).flatten(2).flatten(0, 1)
        m = torch.linalg.lstsq(f, a_BTD[use, t].flatten()[:, None], driver="gelsd").solution
        m_HTS[:, t, :seen] = m.view(seen, H).T
    return m_HTS


@settings(max_examples=6, deadline=None)
@given(kind=st.sampled_from(["images", "language", "texts"]), samples=st.integers(20, 40), batches=st.integers(1, 3))
def test_the_matrices_are_those_of_least_squares(kind: str, samples: int, batches: int) -> None:
    if kind == "images":
        model, inputs = classifier(branches=2, depth=2), pictures(samples)
    else:
        model, tokens, _ = other_kinds(branches=2, depth=2)[kind]
        inputs = torch.randint(1, 19, (samples, tokens.shape[1]), generator=DRAWS)
        inputs[::3, 4:] = 0 if kind == "texts" else inputs[::3, 4:]
        inputs[:7] = torch.randint(1, 19, (7, tokens.shape[1]), generator=DRAWS)  # some are long
    with torch.no_grad():
        relaxed = relax(model, inputs.tensor_split(batches), layers=[0], ridge=1e-13).model
        wanted = best(model, inputs, causal=kind == "language")
        mix = first_layer(relaxed).attention
        f, a = features(
            model, first_layer(model), *(lambda x, sides: (x, sides[0] if sides else None))(*model.embed(inputs))
        )
    real = torch.ones(a.shape[:2]) if kind != "texts" else (inputs != 0).double()

    def missed(m_HTS: Tensor) -> float:
        return float(((torch.einsum("hts,bshd->btd", m_HTS.detach(), f) - a).square().sum(2) * real).sum())

    assert missed(mix.mixing) == pytest.approx(missed(wanted), rel=1e-6, abs=1e-9)
    other = mix.mixing + 1e-3 * torch.randn(mix.mixing.shape, dtype=torch.float64).tril(0 if kind == "language" else 99)
    assert missed(other) > missed(mix.mixing)


@pytest.mark.parametrize("how", ["least_squares", "mean"])
@pytest.mark.parametrize("kind", ["images", "language"])
def test_attention_that_does_not_depend_on_the_input_is_relaxed_without_loss(kind: str, how: Any) -> None:
    model = classifier(branches=2, depth=2) if kind == "images" else other_kinds(depth=2, branches=0)[kind][0]
    inputs = pictures() if kind == "images" else other_kinds()[kind][1].repeat(4, 1)
    if kind == "language":
        inputs = torch.randint(19, (60, 7), generator=DRAWS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv" in name:
                parameter[: 2 * len(parameter) // 3] = 0.0  # all scores are equal
    relaxed = relax(model, [inputs], how=how, ridge=1e-12)
    torch.testing.assert_close(relaxed.model(inputs), model(inputs), rtol=0, atol=1e-5 if how != "mean" else 1e-10)
    assert max(relaxed.errors.values()) < 1e-8
    mean_TS = relax(model, [inputs], how="mean").model
    attention = first_layer(mean_TS).attention
    assert torch.allclose(attention.matrix().sum(dim=2), torch.ones((), dtype=torch.float64))


def test_least_squares_leaves_less_than_the_mean_and_says_how_much() -> None:
    model, inputs = classifier(branches=2, depth=1), pictures(60)
    found = {how: relax(model, [inputs[:30], inputs[30:]], how=how) for how in ("least_squares", "mean")}
    x, _ = model.embed(inputs)
    for n, branch in enumerate(model.trunk.branches):
        layer = branch.layers[0]
        a = layer.attention(layer.attention_norm(x))
        for how, relaxed in found.items():
            mixed = relaxed.model.trunk.branches[n].layers[0].attention(layer.attention_norm(x))
            error = (mixed - a).square().sum() / (a - layer.attention.out.bias).square().sum()
            assert relaxed.errors[n] == pytest.approx(float(error), rel=1e-6), how
        assert found["least_squares"].errors[n] < found["mean"].errors[n] < 2


def test_other_layers_and_branches_stay_as_they_are(tmp_path: Path) -> None:
    model, inputs = classifier(branches=3, depth=2), pictures()
    before = weights(model)
    relaxed = relax(model, [inputs], layers=layers_of(model.config, 1)).model
    assert relaxed.config.static_layers == (2, 3)
    assert same(before, weights(model))
    ours, theirs = (m.trunk.contributions(m.embed(inputs)[0]) for m in (relaxed, model))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[2], theirs[2])
    assert not torch.equal(ours[1], theirs[1])
    again = paradepth.from_pretrained(relaxed.save_pretrained(tmp_path))
    assert torch.equal(again(inputs), relaxed(inputs))
    further = relax(relaxed, [inputs], layers=[0])
    assert further.model.config.static_layers == (0, 2, 3)
    assert set(further.errors) == {0}
    assert relax(model, [inputs]).model.config.static_layers is None


def test_a_later_layer_makes_up_for_the_ones_before_it() -> None:
    model, inputs = classifier(branches=0, depth=3), pictures(200)
    both = relax(model, [inputs], layers=[0, 1]).model
    apart = relax(model, [inputs], layers=[1]).model  # fitted to the states of the original
    x, _ = model.embed(inputs)
    behind_first = both.trunk.layers[0](x)
    wanted = model.trunk.layers[0](x)
    layer = model.trunk.layers[1]
    wanted = wanted + layer.attention(layer.attention_norm(wanted))
    missed = [
        float((behind_first + m.trunk.layers[1].attention(layer.attention_norm(behind_first)) - wanted).square().sum())
        for m in (both, apart)
    ]
    assert missed[0] < missed[1]


def test_shorter_samples_leave_the_rest_of_the_matrix_zero() -> None:
    model, tokens, _ = other_kinds(branches=2)["texts"]
    mixing = first_layer(relax(model, [tokens[:, :4].clamp(min=1)]).model).attention.mixing
    assert bool(mixing[:, :4, :4].any())
    assert not bool(mixing[:, 4:].any())
    assert not bool(mixing[:, :, 4:].any())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": [6]}, r"layers is \[6\]; it must be some of those with attention, \[0, 1, 2\]"),
        ({"layers": []}, "each at most once"),
        ({"layers": [1, 1]}, "each at most once"),
        ({"how": "median"}, "how is 'median'"),
        ({"ridge": -1.0}, "ridge is -1"),
    ],
)
def test_what_cannot_be_relaxed_so(options: dict[str, Any], words: str) -> None:
    model = classifier(branches=3)
    with pytest.raises(ValueError, match=words):
        relax(model, [torch.zeros(2, 1, 8, 8, dtype=torch.float64)], **options)


def test_heads_that_give_nothing_need_a_ridge() -> None:
    model, inputs = classifier(branches=2), pictures()
    with torch.no_grad():
        for parameter in (first_layer(model).attention.qkv.weight, first_layer(model).attention.qkv.bias):
            parameter[16:20] = 0.0  # values of the first head
    assert not bool(first_layer(relax(model, [inputs], layers=[0]).model).attention.mixing[0].any())
    with pytest.raises(ValueError, match="take more data or a larger ridge"):
        relax(model, [inputs], layers=[0], ridge=0.0)
    model.trunk.branches[0].zero_output_()
    assert torch.equal(relax(model, [inputs], layers=[0], ridge=0.0).model(inputs), model(inputs))


def test_models_that_are_not_relaxed() -> None:
    x, _ = images()
    with pytest.raises(ValueError, match="no data"):
        relax(classifier(branches=1), [])
    with pytest.raises(ValueError, match="a model of type 'translator' is not relaxed"):
        relax(other_kinds()["translation"][0], [])
    with pytest.raises(ValueError, match="rank 2"):
        relax(classifier(branches=2, mixing="static", static_layers=(0,), mixing_rank=2), [x])
    with pytest.raises(ValueError, match="weights of their own"):
        relax(classifier(branches=2, share="mlp"), [x])
    long = paradepth.create_model("text_classifier_nano", context=512, heads=8, width=8, mlp=8, depth=1)
    with pytest.raises(ValueError, match="which is too much"):
        relax(long, [torch.randint(250, (1, 512))])
    with pytest.raises(ValueError, match="branch is 2; there are 2"):
        layers_of(TrunkConfig(branches=2, depth=1), 2)
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match="is quantised"):
        relax(quantise(roughen(paradepth.create_model("paraformer_nano")), "int8"), [])
