"""Stacked layers against the layers one after another: values, gradients, masks, dropout, and what is remembered."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from paradepth.nn import EncoderLayer, SourceLayer, StackedLayers, TargetLayer, set_dropout_key
from paradepth.nn.stacked import signature

shapes = st.fixed_dictionaries(
    {
        "layers": st.integers(1, 4),
        "batch": st.integers(1, 3),
        "tokens": st.integers(1, 5),
        "heads": st.sampled_from([1, 2]),
        "mlp": st.sampled_from([4, 12]),
        "bias": st.booleans(),
        "causal": st.booleans(),
        "dropout": st.sampled_from([0.0, 0.3]),
        "attention_dropout": st.sampled_from([0.0, 0.3]),
        "mask": st.sampled_from([None, "keys", "pairs", "one"]),
        "training": st.booleans(),
        "shared": st.booleans(),
    }
)
WIDTH = 8


def some_layers(
    count: int, kind: Any = EncoderLayer, *, dtype: torch.dtype = torch.float64, **options: Any
) -> list[Any]:
    """Layers with random norms and biases and keys of their own."""
    layers = [kind(WIDTH, **{"heads": 2, "mlp": 12, **options}).to(dtype) for _ in range(count)]
    for step, layer in enumerate(layers):
        set_dropout_key(layer, seed=3, step=step)
        for parameter in layer.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, mean=1.0)
    return layers


def one_by_one(layers: list[Any], x: Tensor) -> Tensor:
    return torch.stack([layer.residual(x) for layer in layers])


def some_mask(kind: str | None, batch: int, heads: int, tokens: int) -> Tensor | None:
    if kind is None:
        return None
    shape = {"keys": (batch, 1, 1, tokens), "pairs": (batch, heads, tokens, tokens), "one": (tokens, tokens)}[kind]
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = True  # a query that sees nothing has no defined result
    return mask


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def gradients(outputs: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view(outputs.shape)
    found = torch.autograd.grad((outputs * weights).sum(), tensors, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)]


@given(shape=shapes)
def test_stacked_layers_equal_layers_in_values_and_gradients(shape: dict[str, Any]) -> None:
    options = {name: shape[name] for name in ("heads", "mlp", "bias", "causal", "dropout", "attention_dropout")}
    m, B, T = shape["layers"], shape["batch"], shape["tokens"]
    layers = [layer.train(shape["training"]) for layer in some_layers(m, **options)]
    mask = some_mask(shape["mask"], B, shape["heads"], T)
    x = torch.randn(*(() if shape["shared"] else (m,)), B, T, WIDTH, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([f.residual(x if shape["shared"] else x[i], mask) for i, f in enumerate(layers)])
    stacked = StackedLayers()
    found, total = stacked.increments(layers, x, mask), stacked.total(layers, x, mask)
    close(found, expected)
    close(total, expected.sum(0))
    tensors = [x, *(p for layer in layers for p in layer.parameters())]
    for a, b in zip(gradients(found, tensors), gradients(expected, tensors), strict=True):
        close(a, b)
    for a, b in zip(gradients(total, tensors), gradients(expected.sum(0), tensors), strict=True):
        close(a, b)
    with torch.no_grad():
        close(stacked.increments(layers, x, mask), expected)
        close(stacked.total(layers, x, mask), expected.sum(0))


@pytest.mark.parametrize("kind", [SourceLayer, TargetLayer])
@pytest.mark.parametrize("shared", [(True, True), (False, True), (False, False)])
def test_layers_of_a_joined_state(kind: Any, shared: tuple[bool, bool]) -> None:
    layers = some_layers(3, kind, dropout=0.2, attention_dropout=0.1)
    mask = some_mask("keys", 2, 2, 5)
    z = tuple(
        torch.randn(*(() if one else (3,)), 2, tokens, WIDTH, dtype=torch.float64, requires_grad=True)
        for one, tokens in zip(shared, (5, 4), strict=True)
    )
    half = 0 if kind is SourceLayer else 1
    own = [tuple(part if one else part[i] for part, one in zip(z, shared, strict=True)) for i in range(3)]
    expected = torch.stack([layer.residual(own[i], mask)[half] for i, layer in enumerate(layers)])
    stacked = StackedLayers()
    found, total = stacked.increments(layers, z, mask), stacked.total(layers, z, mask)
    assert found[1 - half] is None
    assert total[1 - half] is None
    close(found[half], expected)
    close(total[half], expected.sum(0))
    tensors = [*z, *(p for layer in layers for p in layer.parameters())]
    for a, b in zip(gradients(found[half], tensors), gradients(expected, tensors), strict=True):
        close(a, b)


def test_float32_and_bfloat16_are_as_close_as_their_digits() -> None:
    layers = some_layers(4, dtype=torch.float32)
    x = torch.randn(2, 5, WIDTH)
    stacked = StackedLayers()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            expected = one_by_one(layers, x)
            close(stacked.increments(layers, x), expected, 1e-5)
            close(stacked.total(layers, x), expected.sum(0), 1e-5)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found, total = stacked.increments(layers, x), stacked.total(layers, x)
                again = one_by_one(layers, x)
        assert found.dtype == again.dtype
        assert not torch.equal(found.float(), expected)  # it was bfloat16
        close(found.float(), expected, 5e-2)
        close(total.float(), expected.sum(0), 1e-1)


def test_frozen_layers_get_no_gradient() -> None:
    layers = some_layers(3)
    layers[1].requires_grad_(False)
    layers[2].mlp.down.requires_grad_(False)
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    StackedLayers().total(layers, x).sum().backward()
    assert all(p.grad is None for p in layers[1].parameters())
    assert layers[2].mlp.down.weight.grad is None
    assert all(p.grad is not None for p in layers[0].parameters())
    assert layers[2].mlp.up.weight.grad is not None


@pytest.mark.parametrize("tokens", [1, 3])
def test_gradients_of_different_layers_lie_in_memory_of_their_own(tokens: int) -> None:
    layers, x = some_layers(3), torch.randn(1, tokens, WIDTH, dtype=torch.float64)
    StackedLayers().total(layers, x).sum().backward()
    parameters = [p for layer in layers for p in layer.parameters()]
    once = [p.grad.clone() for p in parameters if p.grad is not None]
    StackedLayers().total(layers, x).sum().backward()  # adds in place
    for parameter, grad in zip(parameters, once, strict=True):
        assert parameter.grad is not None
        close(parameter.grad, 2 * grad)


def test_kept_weights_follow_their_parameters() -> None:
    layers = some_layers(3)
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    stacked = StackedLayers()

    @torch.no_grad()
    def check() -> None:
        close(stacked.increments(layers, x), one_by_one(layers, x))
        close(stacked.increments(layers[:2], x), one_by_one(layers[:2], x))

    check()
    for optimiser in (
        torch.optim.AdamW(layers[0].parameters(), lr=0.01),
        torch.optim.AdamW(layers[1].parameters(), lr=0.01, foreach=True),
        torch.optim.AdamW(layers[2].parameters(), lr=0.01, fused=True),
        torch.optim.SGD(layers[2].parameters(), lr=0.01, foreach=True),
    ):
        optimiser.zero_grad()
        stacked.total(layers, x).square().sum().backward()
        optimiser.step()
        check()
    layers[1].load_state_dict(some_layers(1)[0].state_dict())
    check()
    layers[1].load_state_dict(some_layers(1)[0].state_dict(), assign=True)
    check()
    layers[2].mlp.down.weight = nn.Parameter(torch.randn_like(layers[2].mlp.down.weight))
    check()
    layers[0].zero_output_()
    check()
    with torch.inference_mode():
        close(stacked.total(layers, x), one_by_one(layers, x).sum(0))
    x.requires_grad_()  # the copies made in inference mode serve a backward pass as well
    for layer in layers:
        layer.requires_grad_(False)
    (grad,) = torch.autograd.grad(stacked.total(layers, x).sum(), x)
    (expected,) = torch.autograd.grad(one_by_one(layers, x).sum(), x)
    close(grad, expected)
    for layer in layers:
        layer.float()
    x = x.detach().float()
    with torch.no_grad():
        close(stacked.total(layers, x), one_by_one(layers, x).sum(0), 1e-5)
    layers[0].mlp.down.weight.data.add_(1.0)  # behind autograd's back
    stacked.forget()
    with torch.no_grad():
        close(stacked.total(layers, x), one_by_one(layers, x).sum(0), 1e-4)


def test_layers_made_in_inference_mode_are_evaluated_afresh() -> None:
    with torch.inference_mode():
        layers = some_layers(2)
        x = torch.randn(2, 4, WIDTH, dtype=torch.float64)
        stacked = StackedLayers()
        stacked.total(layers, x)
        layers[0].mlp.down.weight.add_(1.0)
        close(stacked.total(layers, x), one_by_one(layers, x).sum(0))


def test_copies_remember_nothing_and_dead_layers_are_forgotten() -> None:
    layers, x, stacked = some_layers(2), torch.randn(1, 3, WIDTH, dtype=torch.float64), StackedLayers()
    with torch.no_grad():
        stacked.total(layers, x)
    assert len(stacked._kept) == 1
    assert len(copy.deepcopy(stacked)._kept) == len(pickle.loads(pickle.dumps(stacked))._kept) == 0
    del layers
    assert len(stacked._kept) == 0


class OtherLinear(nn.Linear):
    pass


def changed(change: Any) -> EncoderLayer:
    layer = EncoderLayer(WIDTH, heads=2, mlp=12, dropout=0.1)
    change(layer)
    return layer


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.double(),
        lambda layer: layer.eval(),
        lambda layer: setattr(layer.attention, "causal", True),
        lambda layer: setattr(layer.attention, "heads", 4),
        lambda layer: setattr(layer.mlp_norm, "eps", 1e-3),
        lambda layer: setattr(layer.mlp.dropout, "p", 0.2),
        lambda layer: setattr(layer.mlp.act, "approximate", "tanh"),
        lambda layer: layer.mlp.up.register_parameter("bias", None),
        lambda layer: layer.to("meta"),
    ],
)
def test_layers_that_differ_have_other_signatures(change: Any) -> None:
    plain = changed(lambda layer: None)
    assert signature(plain) == signature(changed(lambda layer: None))
    assert signature(plain) != signature(changed(change))
    assert signature(plain) != signature(SourceLayer(WIDTH, heads=2, mlp=12, dropout=0.1))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Linear(2, 2), "type Linear"),
        (changed(lambda layer: layer.mlp.register_forward_hook(lambda *a: None)), "hooks"),
        (changed(lambda layer: layer.register_full_backward_hook(lambda *a: None)), "hooks"),
        (changed(lambda layer: setattr(layer.mlp, "up", OtherLinear(WIDTH, 12))), "OtherLinear"),
        (changed(lambda layer: setattr(layer.mlp, "act", nn.ReLU())), "ReLU"),
    ],
)
def test_layers_that_cannot_be_stacked_say_why(layer: nn.Module, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        signature(layer)
