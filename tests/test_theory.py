"""The closed form equals the model, in float64, to 1e-10: parts, blocks, branches, trunks, models; explicit and not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import paradepth
from compress_helpers import classifier, images, other_kinds, roughen
from paradepth.branches import Branches
from paradepth.branches.gates import Gate
from paradepth.depth import Stack
from paradepth.models.quantised import Quantisation
from paradepth.nn import (
    CrossAttention,
    EncoderLayer,
    FeedForward,
    LanguageModelHead,
    MultiHeadAttention,
    PatchStem,
    SourceLayer,
    TargetLayer,
)
from paradepth.nn.static_mixing import StaticMixing
from paradepth.theory import (
    Diagonal,
    Kronecker,
    Operator,
    block_form,
    closed_form,
    closed_form_error,
    identity,
    stack_form,
    trunk_form,
)
from paradepth.theory.ends import head_map, stem_map
from paradepth.theory.parts import attention_map, attention_weights, linear_map, norm_map

FEW = settings(max_examples=15, deadline=None)

shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "tokens": st.integers(1, 5),
        "heads": st.integers(1, 3),
        "head_width": st.sampled_from([None, 1, 3]),
        "mlp": st.integers(1, 9),
        "bias": st.booleans(),
        "causal": st.booleans(),
        "mask": st.sampled_from(["none", "padding", "any"]),
        "scale": st.sampled_from([0.1, 1.0, 10.0]),
        "seed": st.integers(0, 2**16),
    }
)


def random_layer(shape: dict[str, Any], generator: torch.Generator) -> EncoderLayer:
    """A layer whose weights, norms and biases are all random."""
    layer = EncoderLayer(
        2 * shape["heads"],
        heads=shape["heads"],
        head_width=shape["head_width"],
        mlp=shape["mlp"],
        bias=shape["bias"],
        causal=shape["causal"],
    ).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(shape["scale"] * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def random_mask(shape: dict[str, Any], generator: torch.Generator) -> Tensor | None:
    """None, padding behind the tokens of a text, or any tokens for any head, of which each sees at least itself."""
    B, T, H = shape["batch"], shape["tokens"], shape["heads"]
    if shape["mask"] == "none":
        return None
    if shape["mask"] == "padding":
        lengths = torch.randint(1, T + 1, (B, 1), generator=generator)
        return (torch.arange(T) < lengths)[:, None, None]
    return (torch.rand(B, H, T, T, generator=generator) < 0.5) | torch.eye(T, dtype=torch.bool)


def drawn(shape: dict[str, Any], layers: int) -> tuple[list[EncoderLayer], Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(shape["seed"])
    made = [random_layer(shape, generator) for _ in range(layers)]
    size = shape["batch"], shape["tokens"], 2 * shape["heads"]
    x = shape["scale"] * torch.randn(size, generator=generator, dtype=torch.float64)
    return made, x, random_mask(shape, generator)


def same(found: Tensor, wanted: Tensor) -> None:
    """Equal to 1e-10 of the largest entry."""
    wanted = wanted.detach()
    scale = wanted.abs().max().clamp(min=1e-3)
    torch.testing.assert_close(found.detach().reshape(wanted.shape) / scale, wanted / scale, rtol=0, atol=1e-10)


def as_matrix(operator: Operator) -> Tensor:
    """The matrix of an operator from its products with unit vectors, (B, rows, columns)."""
    unit = torch.eye(operator.shape[1], dtype=torch.float64).view(-1, 1, *operator.cols)
    columns = operator.matvec(unit.expand(-1, operator.batch or 1, -1, -1))
    return columns.flatten(-2).permute(1, 2, 0)


# ---- operators -----------------------------------------------------------------------------------------------


def test_the_matrix_of_a_kronecker_product_acts_on_tokens_one_after_another() -> None:
    a, m, x = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 3), (4, 2), (3, 2)))
    operator = Kronecker([(a, m)], cols=(3, 2), rows=(5, 4))
    torch.testing.assert_close(operator.dense(), torch.kron(a, m))
    torch.testing.assert_close(operator.dense() @ x.flatten(), (a @ x @ m.T).flatten())
    by_columns = torch.kron(m, a) @ x.T.flatten()  # vec(A X Mᵀ) = (M ⊗ A) vec(X) where columns stand in a row
    torch.testing.assert_close(by_columns, (a @ x @ m.T).T.flatten())


@FEW
@given(shape=shapes)
def test_products_transposes_and_norms_are_those_of_the_explicit_matrices(shape: dict[str, Any]) -> None:
    (layer,), x, mask = drawn(shape, 1)
    block = block_form(layer, x, mask, step=0.3)
    for operator in (block.attend.operator, block.hidden.operator, block.skip.operator, block.relaxed.operator):
        dense = operator.dense().expand(len(x), -1, -1)
        assert dense.shape[1:] == operator.shape
        scale = dense.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(as_matrix(operator) / scale, dense / scale, rtol=0, atol=1e-10)
        torch.testing.assert_close(as_matrix(operator.T) / scale, dense.mT / scale, rtol=0, atol=1e-10)
        torch.testing.assert_close(operator.T.dense().expand_as(dense.mT) / scale, dense.mT / scale)
        if isinstance(operator, Kronecker):
            norms = operator.squared_norm().expand(len(x))
            torch.testing.assert_close(norms, dense.square().sum((1, 2)), rtol=1e-9, atol=1e-9)


def test_what_does_not_fit_is_refused_and_products_still_work() -> None:
    weight = torch.randn(512, 512, dtype=torch.float64)
    operator = Kronecker([(None, weight)], cols=(64, 512), rows=(64, 512))
    with pytest.raises(ValueError, match=r"1,073,741,824 entries .* 8.0 GiB .* products, which need no matrix"):
        operator.dense()
    assert operator.matvec(torch.randn(1, 64, 512, dtype=torch.float64)).shape == (1, 64, 512)
    layer = EncoderLayer(64, heads=2, mlp=256)
    with pytest.raises(ValueError, match="closed form of 12,288 units for 2 samples"):
        block_form(layer, torch.randn(2, 32, 64)).units()


def test_sizes_that_do_not_fit_together_are_refused() -> None:
    small, large = identity((2, 3)), identity((2, 4))
    for wrong in (lambda: small @ large, lambda: small + large, lambda: small.times(large), lambda: small.plus(large)):
        with pytest.raises(ValueError, match="needs equal sizes"):
            wrong()
    with pytest.raises(ValueError, match="one of 3 × 3 is needed"):
        Kronecker([(None, torch.zeros(2, 2))], cols=(2, 3), rows=(2, 3))
    with pytest.raises(ValueError, match="the identity"):
        Kronecker([(None, None)], cols=(2, 3), rows=(2, 4))
    with pytest.raises(ValueError, match="at least one term"):
        Kronecker([], cols=(2, 3), rows=(2, 3))


# ---- parts ---------------------------------------------------------------------------------------------------


@FEW
@given(shape=shapes)
def test_every_part_is_its_affine_map_for_any_weights_and_masks(shape: dict[str, Any]) -> None:
    (layer,), x, mask = drawn(shape, 1)
    same(norm_map(layer.attention_norm, x)(x), layer.attention_norm(x))
    same(linear_map(layer.mlp.up, x.shape[1])(x), layer.mlp.up(x))
    same(attention_map(layer.attention, x, mask)(x), layer.attention(x, mask))
    assert isinstance(layer.attention, MultiHeadAttention)
    weights = attention_weights(layer.attention, x, mask)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    if shape["causal"]:
        assert not weights.triu(1).any()
    if mask is not None:
        assert not weights.masked_select(~mask.expand_as(weights)).any()


@FEW
@given(shape=shapes, rank=st.sampled_from([None, 2]))
def test_static_mixing_is_a_map_that_depends_on_nothing(shape: dict[str, Any], rank: int | None) -> None:
    _, x, mask = drawn(shape, 1)
    mixing = StaticMixing(
        x.shape[2], shape["heads"], tokens=6, head_width=shape["head_width"], rank=rank, bias=shape["bias"],
        causal=shape["causal"],
    ).double()  # fmt: skip
    found = attention_map(mixing, x, mask)
    same(found(x), mixing(x, mask))
    if mask is None:
        other = attention_map(mixing, torch.randn_like(x))
        torch.testing.assert_close(found.operator.dense(), other.operator.dense(), rtol=0, atol=0)


# ---- blocks, branches, trunks --------------------------------------------------------------------------------


@FEW
@given(shape=shapes, step=st.sampled_from([1.0, 0.25]))
def test_a_block_is_one_sum_of_units(shape: dict[str, Any], step: float) -> None:
    (layer,), x, mask = drawn(shape, 1)
    block = block_form(layer, x, mask, step=step)
    wanted = layer(x, mask, step=step)
    units = block.units()
    tokens, width = x.shape[1:]
    assert units.count == tokens * (shape["mlp"] + 2 * width)
    same(block(x), wanted)
    same(units(x), wanted)
    same(block.relaxed(x), wanted)
    # The parameters themselves, evaluated as the theorem writes it.
    hidden = torch.einsum("bjn,bn->bj", units.weight, x.flatten(1)) + units.offset
    same(torch.einsum("boj,bj->bo", units.out, nn.functional.gelu(hidden)), wanted)


@settings(max_examples=25, deadline=None)
@given(
    shape=shapes,
    depths=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    aggregate=st.sampled_from(["residual", "sum", "gated"]),
    step=st.sampled_from([1.0, 0.5]),
    buffered=st.booleans(),
)
def test_a_trunk_is_its_closed_form(
    shape: dict[str, Any], depths: list[int], aggregate: Any, step: float, buffered: bool
) -> None:
    layers, x, mask = drawn(shape, sum(depths))
    if aggregate == "gated" and shape["mask"] == "any":
        mask = None
    left = iter(layers)
    stacks = [
        Stack([next(left) for _ in range(d)], step=step, buffers=(1, 0) if buffered and d > 1 else (0, 0))
        for d in depths
    ]
    per = "token" if shape["causal"] else "sample"
    gates = [Gate(x.shape[2], per=per).double() for _ in depths] if aggregate == "gated" else None
    for gate in gates or ():
        nn.init.normal_(gate.weight)
    trunk = Branches(stacks, aggregate=aggregate, gates=gates)
    sides = () if mask is None else (mask,)
    form, wanted = trunk_form(trunk, x, *sides), trunk(x, *sides)
    same(form(x), wanted)
    same(form.relaxed(x), wanted)
    same(form.units()(x), wanted)
    for index, delta in enumerate(trunk.contributions(x, *sides)):
        same(form.contribution(index)(x), delta)
        assert form.branches[index].serial_blocks == depths[index] - 1
    first = trunk_form(trunk, x, *sides, branches=1)
    same(first(x), trunk(x, *sides, branches=1))
    serial = stack_form(stacks[0], x, mask)
    same(serial(x), stacks[0](x, *sides))
    same(serial.units()(x), stacks[0](x, *sides))


@FEW
@given(shape=shapes, source=st.integers(1, 4), decoders=st.integers(0, 2), step=st.sampled_from([1.0, 0.5]))
def test_an_encoder_decoder_is_a_stack_of_blocks_over_the_tokens_of_both_texts(
    shape: dict[str, Any], source: int, decoders: int, step: float
) -> None:
    generator = torch.Generator().manual_seed(shape["seed"])
    width = 2 * shape["heads"]
    options = {key: shape[key] for key in ("heads", "head_width", "mlp", "bias")}
    stack = Stack([SourceLayer(width, **options), *(TargetLayer(width, **options) for _ in range(decoders))], step=step)
    with torch.no_grad():
        for parameter in stack.double().parameters():
            parameter.copy_(shape["scale"] * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    sizes = (shape["batch"], source, width), (shape["batch"], shape["tokens"], width)
    x, y = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    lengths = torch.randint(1, source + 1, (shape["batch"], 1), generator=generator)
    sides = () if shape["mask"] == "none" else ((torch.arange(source) < lengths)[:, None, None],)
    form, wanted = trunk_form(stack, (x, y), *sides), torch.cat(stack((x, y), *sides), dim=1)
    both = torch.cat([x, y], dim=1)
    for found in (form(both), form.relaxed(both), form.units()(both)):
        same(found, wanted)
    branches = Branches([stack, stack], aggregate="sum")
    same(trunk_form(branches, (x, y), *sides).units()(both), torch.cat(branches((x, y), *sides), dim=1))


def test_units_of_branches_of_depth_one_depend_on_nothing_that_other_units_compute() -> None:
    """The parameters of a branch do not change with the weights of the others, nor of its own MLP."""
    layers, x, _ = drawn({**SHAPE, "seed": 5}, 2)
    trunk = Branches([Stack([layer]) for layer in layers])
    before = trunk_form(trunk, x).branches[0].units()
    with torch.no_grad():
        for parameter in layers[1].parameters():
            parameter.add_(1.0)
        layers[0].mlp.down.weight.add_(1.0)
    after = trunk_form(trunk, x).branches[0].units()
    torch.testing.assert_close(before.weight, after.weight, rtol=0, atol=0)
    torch.testing.assert_close(before.offset, after.offset, rtol=0, atol=0)
    assert not torch.equal(before.out, after.out)


SHAPE: dict[str, Any] = {
    "batch": 2, "tokens": 3, "heads": 2, "head_width": None, "mlp": 5, "bias": True, "causal": False, "mask": "none",
    "scale": 1.0, "seed": 0,
}  # fmt: skip


# ---- models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"branches": 3, "depth": 1},
        {"branches": 2, "depth": 2, "aggregate": "sum", "pool": "cls", "step": 0.5},
        {"branches": 2, "depth": 2, "depths": (2, 1), "aggregate": "gated"},
        {"branches": 0, "depth": 2, "patch_size": 3},  # patches that stick out of the image
        {"branches": 2, "embedding": "convolutions"},
        {"branches": 2, "channels": 3, "mixing": "static"},
    ],
)
def test_image_classifiers_from_pixels_to_logits(options: dict[str, Any]) -> None:
    model = classifier(**options)
    model.stem.set_normalisation([0.4] * model.config.channels, [0.3] * model.config.channels)
    x = torch.rand(2, model.config.channels, 8, 8, dtype=torch.float64)
    form, wanted = closed_form(model, x), model(x)
    units = form.units()
    same(form.logits(), wanted)
    same(units(form.read), wanted)
    convolutional = options.get("embedding") == "convolutions"
    assert units.weight.shape[2] == (form.x_BTD[0].numel() if convolutional else x[0].numel())
    for k in range(1, model.prefixes + 1):
        same(closed_form(model, x, branches=k).logits(), model(x, branches=k))
    assert closed_form_error(model.float(), x.float()) < 1e-10


@pytest.mark.parametrize("branches", [0, 2])
@pytest.mark.parametrize("kind", ["texts", "language", "translation", "masked", "tagger", "masked at places"])
def test_models_of_texts_from_tokens_to_logits(kind: str, branches: int) -> None:
    if kind in ("texts", "language", "translation"):
        model, inputs, _ = other_kinds(branches=branches, depth=2)[kind]
        inputs = tuple(part[:3] for part in inputs) if kind == "translation" else inputs[:3]
    else:
        small: dict[str, Any] = {"width": 8, "heads": 2, "mlp": 12, "depth": 2, "branches": branches, "context": 7}
        small |= {"vocab_size": 19, "pad": 0}
        inputs = torch.randint(1, 19, (3, 7), generator=torch.Generator().manual_seed(4))
        inputs[0, 4:] = 0
        if kind == "tagger":
            model = paradepth.create_model("tagger_nano", **small, features=2, num_classes=3)
            inputs = torch.stack([inputs, inputs], dim=-1)
        else:
            model = paradepth.create_model("bert_nano", **small)
        model = roughen(model.double()).eval()
        if kind == "masked at places":
            inputs = (inputs, torch.tensor([[0, 3], [2, 2], [1, 6]]))
    form, wanted = closed_form(model, inputs), model(inputs)
    same(form.logits(), wanted)
    same(form.units()(form.read), wanted)
    assert closed_form_error(model, inputs, units=True) < 1e-10


@pytest.mark.parametrize("pool", ["mean", "cls", "last"])
def test_every_pool_of_a_classifier_of_texts(pool: Any) -> None:
    small: dict[str, Any] = {
        "width": 8,
        "heads": 2,
        "mlp": 12,
        "depth": 1,
        "branches": 2,
        "vocab_size": 19,
        "context": 7,
    }
    model = paradepth.create_model("text_classifier_nano", **small, pad=0, separator=2, pool=pool, num_classes=3)
    tokens = torch.tensor([[5, 2, 7, 9, 2, 0, 0], [1, 3, 4, 2, 6, 8, 2]])
    assert closed_form_error(roughen(model).eval(), tokens, units=True) < 1e-10


def test_a_stem_is_its_operator_and_one_without_is_told() -> None:
    stem = PatchStem((5, 7), (2, 3), channels=2, width=4, class_token=True).double()
    assert stem.class_token is not None
    nn.init.normal_(stem.class_token)
    stem.set_normalisation([0.1, 0.5], [0.2, 0.7])
    x = torch.rand(3, 2, 5, 7, dtype=torch.float64)
    found = stem_map(stem, x, x)
    assert found is not None
    same(found[0](found[1]), stem(x))
    same(found[0].operator.dense() @ x[0].flatten() + found[0].offset.flatten(), stem(x)[0].flatten())
    pulled = found[0].operator.rmatvec(stem(x))
    same(pulled, torch.einsum("rn,br->bn", found[0].operator.dense(), stem(x).flatten(1)).unsqueeze(1))
    assert stem_map(PatchStem((4, 4), (2, 2), channels=1, width=4, embedding="convolutions"), x, x) is None


# ---- refusals ------------------------------------------------------------------------------------------------


def test_what_has_no_closed_form_is_refused_in_words() -> None:
    x = torch.randn(1, 3, 8)
    with pytest.raises(ValueError, match="the layer is TargetLayer; the closed form is of EncoderLayer"):
        block_form(TargetLayer(8, heads=2, mlp=8), x)
    with pytest.raises(ValueError, match="call its eval"):
        block_form(EncoderLayer(8, heads=2, mlp=8, dropout=0.1), x)
    layer = EncoderLayer(8, heads=2, mlp=8)
    with pytest.raises(ValueError, match="attention to nothing"):
        block_form(layer, x, torch.zeros(1, 1, 1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="mixed by Identity"):
        attention_map(nn.Identity(), x)
    with pytest.raises(ValueError, match="CrossAttention needs a memory"):
        attention_map(CrossAttention(8, 2), x)
    with pytest.raises(ValueError, match="MultiHeadAttention has no memory"):
        attention_map(layer.attention, x, memory_BSD=x)
    layer.mlp.act = nn.ReLU()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="closed form is of GELU"):
        block_form(layer, x)
    with pytest.raises(ValueError, match="whose closed form is not known"):
        head_map(FeedForward(8, 8), x)
    stack = Stack([EncoderLayer(8, heads=2, mlp=8)])
    with pytest.raises(ValueError, match="branches is 2"):
        trunk_form(stack, x, branches=2)
    with pytest.raises(ValueError, match="the layer is EncoderLayer; of a joined state"):
        trunk_form(stack, (x, x))
    with pytest.raises(ValueError, match="state is a list"):
        trunk_form(stack, [x, x])
    with pytest.raises(ValueError, match="2 inputs besides"):
        trunk_form(stack, x, None, None)
    with pytest.raises(ValueError, match="between 1 and 2"):
        trunk_form(Branches([stack, stack]), x, branches=3)


def test_models_without_a_closed_form_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="this is a LanguageModelHead"):
        closed_form(LanguageModelHead(8, 8), images()[0])  # pyright: ignore[reportArgumentType]
    dropping = classifier(dropout=0.1).train()
    with pytest.raises(ValueError, match="training mode"):
        closed_form(dropping, images()[0])
    quantised = classifier()
    quantised.quantisation = Quantisation("int8")
    with pytest.raises(ValueError, match=r"quantised \(int8\)"):
        closed_form(quantised, images()[0])


def test_diagonals_broadcast() -> None:
    gates = torch.tensor([[[2.0], [3.0]]], dtype=torch.float64)
    operator = Diagonal(gates, (2, 2))
    assert operator.dense()[0].diagonal().tolist() == [2.0, 2.0, 3.0, 3.0]
    assert as_matrix(operator).equal(operator.dense())
