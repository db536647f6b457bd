"""From a serial stack to branches and back: models, stacks of other libraries, shapes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import paradepth
from compress_helpers import classifier, images, other_kinds, roughen, same
from paradepth.branches import Branches
from paradepth.compress import STEPS, check_plan, parse_plan
from paradepth.depth import AsBranches, ParallelLayers, Serial, Stack, restore
from paradepth.depth.as_branches import branch_depths, branch_layers
from paradepth.models import TrunkConfig
from paradepth.models.convert import converted_config
from paradepth.nn import EncoderLayer

GROUPS: tuple[Any, ...] = ("consecutive", "interleaved")


def in_parallel(stack: Any, x: Tensor, places: Any, sides: tuple[Any, ...] = ()) -> Tensor:
    """x + Σ (G(x) − x), by definition."""
    total = x
    for layers in places:
        state = x
        for n in layers:
            state = state + stack.step_of(n) * stack.layers[n].residual(state, *sides)
        total = total + (state - x)
    return total


# ---- which layers are where ------------------------------------------------------------------------------------


@given(layers=st.integers(1, 24), data=st.data(), groups=st.sampled_from(GROUPS))
def test_every_layer_is_in_one_branch_in_its_order(layers: int, data: st.DataObject, groups: Any) -> None:
    branches = data.draw(st.integers(1, layers))
    depths = branch_depths(layers, branches)
    assert sum(depths) == layers
    assert len(depths) == branches
    assert sorted(depths, reverse=True) == list(depths)
    assert depths[0] - depths[-1] <= 1
    places = branch_layers(depths, groups)
    assert tuple(map(len, places)) == depths
    assert sorted(place for each in places for place in each) == list(range(layers))
    assert all(list(each) == sorted(each) for each in places)
    steps = {b - a for each in places for a, b in itertools.pairwise(each)}
    assert steps <= ({1} if groups == "consecutive" else {branches})


@pytest.mark.parametrize("branches", [0, 4, 1.5])
def test_no_branch_is_empty(branches: Any) -> None:
    with pytest.raises(ValueError, match="3 layers can be shared out among 1 to 3"):
        branch_depths(3, branches)


# ---- models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", GROUPS)
@given(depth=st.integers(1, 6), data=st.data())
def test_a_converted_model_adds_up_what_its_groups_add(groups: Any, depth: int, data: st.DataObject) -> None:
    branches = data.draw(st.integers(1, depth))
    model, (inputs, _) = classifier(branches=0, depth=depth, step=0.5), images(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    new = model.convert(branches, groups=groups)
    assert isinstance(new.trunk, Branches)
    assert new.config.branch_depths == branch_depths(depth, branches)
    with torch.no_grad():
        x, _ = model.embed(inputs)
        wanted = model.decode(in_parallel(model.trunk, x, branch_layers(new.config.branch_depths, groups)), inputs)
        torch.testing.assert_close(new(inputs), wanted)
        model.trunk.executor = AsBranches(branches, groups=groups)
        torch.testing.assert_close(model(inputs), wanted)
    assert same(before, model.state_dict())
    again = new.convert(0, groups=groups)
    assert again.config == model.config
    assert same(again.state_dict(), before)


@pytest.mark.parametrize("groups", GROUPS)
def test_branches_become_other_branches_of_the_same_stack(groups: Any) -> None:
    model = classifier(branches=0, depth=7)
    direct = model.convert(2, groups=groups)
    assert same(model.convert(3, groups=groups).convert(2, groups=groups).state_dict(), direct.state_dict())
    one = direct.convert(1, groups=groups)
    assert (one.config.branches, one.config.depth) == (1, 7)
    torch.testing.assert_close(one(images()[0]), model(images()[0]))
    assert not torch.allclose(direct(images()[0]), model(images()[0]))


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kind", ["texts", "language", "translation"])
def test_models_of_every_task(kind: str, groups: Any, tmp_path: Path) -> None:
    model, inputs, _ = other_kinds(branches=0, depth=5)[kind]
    new = paradepth.convert(model, branches=2, groups=groups)
    assert new.config.branch_depths == (3, 2)
    assert new.config.layers == model.config.layers
    assert len(new.parts()) == 4
    with torch.no_grad():
        assert torch.isfinite(new(inputs)).all()
        torch.testing.assert_close(new.truncate(1)(inputs), new(inputs, branches=1))
        torch.testing.assert_close(paradepth.from_pretrained(new.save_pretrained(tmp_path))(inputs), new(inputs))
        torch.testing.assert_close(new.convert(1, groups=groups)(inputs), model(inputs))
        if kind != "translation":
            x, sides = model.embed(inputs)
            state = in_parallel(model.trunk, x, branch_layers((3, 2), groups), sides)
            torch.testing.assert_close(new(inputs), model.decode(state, inputs))


def test_an_encoder_decoder_is_split_in_both_halves() -> None:
    model, inputs, _ = other_kinds(branches=0, depth=4)["translation"]
    new = model.convert(2)
    mine, theirs = model.trunk.layers, [branch.layers for branch in new.trunk.branches]
    for branch, numbers in enumerate([(0, 1, 4, 5), (2, 3, 6, 7)]):
        for place, number in enumerate(numbers):
            assert same(theirs[branch][place].state_dict(), mine[number].state_dict())
    assert new(inputs).shape == model(inputs).shape


def test_mode_and_weights_are_taken_over_and_nothing_is_shared() -> None:
    model = classifier(branches=0, depth=4).train()
    new = model.convert(2)
    assert new.training
    assert all(p.dtype == torch.float64 for p in new.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    new(images()[0]).sum().backward()
    with torch.no_grad():
        for parameter in new.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad)
    assert same(before, model.state_dict())


def test_static_layers_keep_their_mixing_wherever_they_go() -> None:
    model, (inputs, _) = classifier(branches=0, depth=5, mixing="static", static_layers=(1, 2)), images()
    for groups, numbers in (("consecutive", (1, 2)), ("interleaved", (1, 3))):
        new = model.convert(2, groups=groups)
        assert new.config.static_layers == numbers
        assert new.convert(0, groups=groups).config == model.config
        torch.testing.assert_close(new.convert(1, groups=groups)(inputs), model(inputs))


def test_buffers_are_kept_in_series_and_nowhere_else() -> None:
    config = TrunkConfig(depth=6, buffers=(1, 1))
    assert converted_config(config, 2).buffers == (0, 0)  # h = 1 throughout
    assert converted_config(config, 1).buffers == (1, 1)
    slow = TrunkConfig(depth=6, step=0.25, buffers=(1, 1))
    assert converted_config(slow, 0) == slow
    with pytest.raises(ValueError, match=r"buffers are \(1, 1\): these layers take h = 1 and those between h = 0.25"):
        converted_config(slow, 2)


@pytest.mark.parametrize(
    ("options", "branches", "message"),
    [
        ({"branches": 0, "depth": 3}, 4, "3 layers can be shared out among 1 to 3"),
        ({"branches": 0, "depth": 3}, -1, "among 1 to 3"),
        ({"branches": 2, "depth": 1, "aggregate": "sum"}, 1, "aggregate is 'sum'"),
        ({"branches": 2, "depth": 1, "aggregate": "gated"}, 1, "aggregate is 'gated'"),
        ({"branches": 0, "depth": 2, "share": "mlp"}, 2, "share weights"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], branches: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classifier(**options).convert(branches)


def test_other_refusals() -> None:
    model = classifier(branches=0, depth=3)
    with pytest.raises(ValueError, match="groups is 'even'"):
        model.convert(2, groups="even")
    with pytest.raises(ValueError, match="they are for models of other libraries"):
        paradepth.convert(model, branches=2, path="trunk.layers")
    with pytest.raises(ValueError, match="the path of its list of layers is needed"):
        paradepth.convert(nn.Sequential(nn.Linear(2, 2)), branches=2)
    pytest.importorskip("transformers")
    hf = {"model_type": "bert", "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    hf |= {"num_hidden_layers": 2, "vocab_size": 30, "max_position_embeddings": 16}
    encoder = paradepth.create_model("hf_classifier", hf=hf, context=8, separator=2, num_classes=3)
    with pytest.raises(ValueError, match=r"paradepth.convert\(model.encoder"):
        encoder.convert(2)
    with pytest.raises(ValueError, match=r"paradepth.convert\(model.encoder"):
        check_plan(parse_plan("branches=2"), encoder)


# ---- stacks of other libraries ---------------------------------------------------------------------------------


def encoder(layers: int = 6) -> Any:
    layer = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=12, batch_first=True, dropout=0.0)
    return roughen(nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).double().eval())


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("branches", "buffers"), [(1, (0, 0)), (3, (0, 0)), (4, (0, 0)), (2, (1, 1)), (1, (2, 1))])
def test_layers_of_another_library_as_branches(branches: int, buffers: tuple[int, int], groups: Any) -> None:
    model, x = encoder(), torch.randn(2, 5, 8, dtype=torch.float64)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    new = paradepth.convert(model, branches=branches, groups=groups, path="layers", buffers=buffers)
    assert type(model.layers) is nn.ModuleList
    assert list(new.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        first, last = buffers
        state = x
        for layer in model.layers[:first]:
            state = layer(state, src_key_padding_mask=padding)
        total = state
        middle = list(model.layers)[first : len(model.layers) - last]
        for places in branch_layers(branch_depths(len(middle), branches), groups):
            inner = state
            for place in places:
                inner = middle[place](inner, src_key_padding_mask=padding)
            total = total + (inner - state)
        for layer in list(model.layers)[len(model.layers) - last :]:
            total = layer(total, src_key_padding_mask=padding)
        torch.testing.assert_close(new(x, src_key_padding_mask=padding), total)
        torch.testing.assert_close(restore(new, "layers")(x), model(x))


def test_such_a_model_is_trained_as_it_is() -> None:
    model = encoder().train()
    new = paradepth.convert(model, branches=2, path="layers")
    new(torch.randn(2, 5, 8, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in new.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert isinstance(new.layers, ParallelLayers)
    assert isinstance(paradepth.convert(new, branches=1, path="layers").layers.executor, Serial)


def test_executors_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"branches is 5, and 4 of the 6 layers lie between the buffers"):
        paradepth.convert(encoder(), branches=5, path="layers", buffers=(1, 1))
    with pytest.raises(ValueError, match="branches is 0; it must be a whole number, at least 1"):
        AsBranches(0)
    with pytest.raises(ValueError, match="two numbers of layers"):
        AsBranches(2, buffers=(1, -1))
    with pytest.raises(ValueError, match="groups is 'even'"):
        AsBranches(2, groups="even")  # pyright: ignore[reportArgumentType]
    stack = Stack([EncoderLayer(8, heads=2, mlp=12) for _ in range(4)], buffers=(1, 2))
    with pytest.raises(ValueError, match="1 of the 4 layers lie between the buffers"):
        stack(torch.randn(1, 2, 8), executor=AsBranches(2))


def test_buffers_of_a_stack_are_kept_in_series_too() -> None:
    stack = roughen(Stack([EncoderLayer(8, heads=2, mlp=12) for _ in range(6)], step=0.5, buffers=(1, 1)).double())
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    with torch.no_grad():
        state = stack.layers[0](x)
        state = in_parallel(stack, state, [(1, 2), (3, 4)])
        torch.testing.assert_close(stack(x, executor=AsBranches(2)), stack.layers[5](state))


# ---- plans -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "groups"), [("branches=2", "consecutive"), ("interleaved=2", "interleaved")])
def test_a_step_of_a_plan_converts(text: str, groups: Any) -> None:
    model = classifier(branches=0, depth=5)
    (step,) = parse_plan(text)
    assert str(step) == text
    assert type(step) is STEPS[step.name]
    new = step.apply(model, None)  # pyright: ignore[reportArgumentType]
    assert new.config == step.shape(model.config)
    assert same(new.state_dict(), model.convert(2, groups=groups).state_dict())
    check_plan(parse_plan(f"{text}+prefix=1+tune=3"), model)
    with pytest.raises(ValueError, match="prefix is 3, and the model has 2 branches"):
        check_plan(parse_plan(f"{text}+prefix=3"), model)
    with pytest.raises(ValueError, match="among 1 to 5"):
        check_plan(parse_plan(text.replace("2", "6")), model)
