"""Layers that share their weights, against the untied network, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import paradepth
from compress_helpers import classifier, images, text_model
from paradepth.branches import Batched, Threads
from paradepth.compress import check_plan, parse_plan
from paradepth.depth import MGRIT, Picard
from paradepth.export.graph import build_graph
from paradepth.models.sharing import own_parameters
from paradepth.nn import set_dropout_key
from paradepth.train import resume_run, start_run
from paradepth.train.accounting import part_sizes
from paradepth.train.config import OptimiserOptions
from paradepth.train.depth import check_depth
from paradepth.train.optimiser import Optimiser
from paradepth.train.options import DepthOptions
from paradepth.train.start import take_over
from runs import Stop, stop_at, tiny_config

SHARES = ("branches", "depth", "attention", "mlp")
shapes = st.fixed_dictionaries(
    {
        "share": st.sampled_from(SHARES),
        "branches": st.integers(1, 3),
        "depth": st.integers(1, 3),
        "dropout": st.sampled_from([0.0, 0.3]),
        "step": st.sampled_from([1.0, 0.5]),
    }
)


def network(**options: Any) -> Any:
    """A small classifier in training."""
    model = classifier(mlp=16, **options)
    set_dropout_key(model, seed=3, step=1)
    return model.train()


def serial(**options: Any) -> Any:
    return network(branches=0, **options)


def full_state(model: Any) -> dict[str, Tensor]:
    """Every name with its value, copies included."""
    return {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}


def untied(model: Any) -> Any:
    """The same network with weights of its own everywhere."""
    twin = type(model)(type(model.config)(**{**vars(model.config), "share": "none"})).double()
    missing = twin.load_state_dict(full_state(model), strict=False)
    assert not missing.unexpected_keys
    assert not set(missing.missing_keys) & set(dict(twin.named_parameters()))
    set_dropout_key(twin, seed=3, step=1)
    return twin.train(model.training)


def summed(model: Any, twin: Any) -> dict[str, Tensor]:
    """The gradients of the untied network, summed over the copies of each parameter of the tied one."""
    first: dict[int, str] = {}
    sums: dict[str, Tensor] = {}
    grads = {name: p.grad for name, p in twin.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        one = first.setdefault(id(parameter), name)
        grad = grads[name]
        assert grad is not None
        sums[one] = grad.clone() if one not in sums else sums[one] + grad
    return sums


def check_gradients(model: Any, twin: Any, x: Tensor) -> None:
    for one in (model, twin):
        one.zero_grad()
        one.prefix_logits(x).square().sum().backward()
    expected = summed(model, twin)
    found = {name: p.grad for name, p in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert grad is not None
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-10)


@settings(max_examples=15)
@given(shape=shapes)
def test_values_and_gradients_are_those_of_the_untied_network(shape: dict) -> None:
    model, x = network(**shape), images(3)[0]
    twin = untied(model)
    assert torch.equal(model.prefix_logits(x), twin.prefix_logits(x))
    check_gradients(model, twin, x)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("executor", [Batched(), Threads(2)])
def test_executors_of_branches_add_up_the_uses(share: str, executor: Any) -> None:
    model, x = network(share=share, branches=3, depth=2, dropout=0.2), images(3)[0]
    twin = untied(model)
    model.trunk.executor = executor
    check_gradients(model, twin, x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("share", ["depth", "attention", "mlp"])
@pytest.mark.parametrize("batched", [False, True])
def test_executors_of_depth_add_up_the_uses(share: str, batched: bool) -> None:
    model, x = serial(share=share, depth=6, step=0.5), images(3)[0]
    twin = untied(model)
    kinds = (
        MGRIT(coarsening=2, forward_iterations=8, backward_iterations=8, batched=batched),
        Picard(chunk=3, forward_iterations=8, backward_iterations=8, batched=batched),
    )
    for executor in kinds:
        model.trunk.executor = executor
        check_gradients(model, twin, x)


@pytest.mark.parametrize(
    ("share", "trunk"),
    [
        ("none", 6 * (4 * 64 + 4 * 8 + 2 * 16 + 2 * 128 + 16 + 8)),
        ("branches", 2 * (4 * 64 + 4 * 8 + 2 * 16 + 2 * 128 + 16 + 8)),
        ("depth", 3 * (4 * 64 + 4 * 8 + 2 * 16 + 2 * 128 + 16 + 8)),
        ("attention", (4 * 64 + 4 * 8 + 16) + 6 * (16 + 2 * 128 + 16 + 8)),
        ("mlp", 6 * (4 * 64 + 4 * 8 + 16) + (16 + 2 * 128 + 16 + 8)),
    ],
)
def test_parameters_count_once(share: str, trunk: int, tmp_path: Path) -> None:
    model, x = network(share=share, branches=3, depth=2).eval(), images(3)[0]
    assert sum(p.numel() for p in model.trunk.parameters()) == trunk
    sizes = part_sizes(model)
    assert sum(sizes.values()) == sum(p.numel() for p in model.parameters())
    assert sum(sizes[f"branch{i}"] for i in (1, 2, 3)) == trunk
    folder = model.save_pretrained(tmp_path)
    stored = load_file(folder / "model.safetensors")
    assert sum(value.numel() for name, value in stored.items() if name.startswith("trunk.")) == trunk
    again = paradepth.from_pretrained(folder)
    assert torch.equal(again(x), model(x))
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.mul_(1.01)
    assert len({id(p) for p in full_state(again).values()}) == len(full_state(again))
    twin = untied(again)
    assert torch.equal(again(x), twin(x)), "what was shared is shared again"
    assert sum(p.numel() for p in again.trunk.parameters()) == trunk


def test_a_translator_shares_encoder_with_encoder_and_decoder_with_decoder() -> None:
    pair = torch.randint(1, 19, (2, 5)), torch.randint(1, 19, (2, 4))
    for share in SHARES:
        model = text_model("translation", share=share, branches=2, depth=2)
        twin = untied(model)
        close = torch.testing.assert_close
        close(model(pair), twin(pair), rtol=0, atol=0)
        kinds = {name.split("layers.")[1] for name in model.trunk.state_dict()}
        assert kinds  # parts keep all names
        own = {name for name in model.state_dict() if name.startswith("trunk.")}
        if share == "depth":
            assert {name.split("layers.")[1][0] for name in own} == {"0", "2"}
        if share == "attention":
            shared = {n for n in own if ".attention" in n or ".cross" in n or ".memory" in n}
            assert {n.split("layers.")[0] + n.split("layers.")[1][0] for n in shared} == {
                "trunk.branches.0.0",
                "trunk.branches.0.2",
            }


@pytest.mark.parametrize("share", SHARES)
def test_growing_selecting_and_dropping_keep_the_sharing(share: str) -> None:
    model, x = network(share=share, branches=3, depth=2).eval(), images(3)[0]
    for k in (1, 2, 3):
        torch.testing.assert_close(model.truncate(k)(x), model.prefix_logits(x)[k - 1], rtol=0, atol=1e-12)
    state = model.stem(x)
    total = state + sum(model.trunk.branches[i](state) - state for i in (2, 1))
    picked = model.select([2, 1])
    torch.testing.assert_close(picked(x), model.head(total), rtol=0, atol=1e-12)
    assert sum(p.numel() for p in picked.parameters()) < sum(p.numel() for p in untied(picked).parameters())
    if share == "depth":
        grown = model.grow(1)
        assert torch.equal(grown(x), model(x))
    else:
        with pytest.raises(ValueError, match="cannot start at zero"):
            model.grow(1)
        grown = model.grow(1, init="random")
    assert torch.equal(grown.truncate(3)(x), model(x))
    assert torch.equal(grown.drop(1)(x), model(x))
    fresh = network(share=share, branches=3, depth=2).eval()
    assert take_over(fresh, model) == []
    assert torch.equal(fresh(x), model(x))
    with pytest.raises(ValueError, match="share is none here"):
        take_over(network(branches=3, depth=2), model)


def test_branches_that_share_everything_are_one_counted_several_times() -> None:
    model, x = network(share="branches", branches=3, depth=2).eval(), images(3)[0]
    state = model.stem(x)
    torch.testing.assert_close(model.trunk(state), state + 3 * (model.trunk.branches[0](state) - state))


@pytest.mark.parametrize("optimiser", ["adamw", "muon", "sgd"])
def test_an_optimiser_moves_a_shared_parameter_once_at_the_rate_of_its_first_part(optimiser: Any) -> None:
    model, x = network(share="attention", branches=2, depth=1), images(3)[0]
    own = own_parameters(model)
    shared = model.trunk.branches[1].layers[0].attention.qkv.weight
    assert any(p is shared for p in own["branch1"])
    assert not any(p is shared for p in own["branch2"])
    opt = Optimiser(model, OptimiserOptions(optimiser=optimiser, weight_decay=0.0))
    listed = [id(p) for o in opt.optimisers for group in o.param_groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    opt.set_rates({"stem": 0.0, "branch1": 0.0, "branch2": 1.0, "head": 0.0})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(x).square().sum().backward()
    opt.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(name.startswith("trunk.branches.1.layers.0.mlp") for name in moved)


@pytest.mark.parametrize(
    ("share", "kind", "options"),
    [
        ("depth", "stagewise", {"depth": 2, "ema": 0.9}),
        ("mlp", "stagewise-frozen", {"depth": 2, "optimiser": "muon"}),
        ("attention", "one_pass", {"depth": 1, "branch_executor": "batched"}),
        ("branches", "cycle", {"depth": 1}),
    ],
)
def test_training_stops_and_goes_on_to_the_same_weights(
    share: str, kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    config = tiny_config(kind, share=share, branches=2, budget="8 steps", validations=2, aggregate="gated", **options)
    whole = start_run(config, tmp_path / "whole")
    with pytest.raises(Stop):
        start_run(config, tmp_path / "cut", on_batch=stop_at(6))
    resume_run(tmp_path / "cut")
    one, other = (paradepth.from_pretrained(tmp_path / name) for name in ("whole", "cut"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert whole["parameters"] == sum(p.numel() for p in one.parameters())


def test_frozen_with_the_first_part_that_uses_it(tmp_path: Path) -> None:
    config = tiny_config(share="mlp", branches=2, budget="4 steps", validations=1, freeze=("branch1",))
    start_run(config, tmp_path / "run")
    trained = paradepth.from_pretrained(tmp_path / "run")
    with torch.random.fork_rng():
        torch.manual_seed(config.run_options.seed)
        fresh = type(trained)(trained.config)
    same = {n for n, p in trained.named_parameters() if torch.equal(p, dict(fresh.named_parameters())[n])}
    assert {n for n in same if "mlp." in n} == {n for n, _ in trained.named_parameters() if ".mlp." in n}
    assert "trunk.branches.1.layers.0.attention.qkv.weight" not in same
    assert "trunk.branches.0.layers.0.attention.qkv.weight" in same


def test_exported_and_compressed_where_that_makes_sense() -> None:
    model = network(share="attention", branches=3, depth=1).float().eval()
    x = images(3)[0].float()
    graph = build_graph(model)
    torch.testing.assert_close(graph.program().module()(x)[0], model(x), rtol=1e-4, atol=1e-5)
    check_plan(parse_plan("prefix=2+distil=5"), model)
    check_plan(parse_plan("subset=2+tune=5"), model)
    for plan in ("merge=2", "heads=1", "neurons=4", "magnitude=0.5", "int8"):
        with pytest.raises(ValueError, match="share weights"):
            check_plan(parse_plan(plan), model)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: network(share="layers"), "none, branches, depth, attention, mlp"),
        (lambda: serial(share="branches"), "a serial stack has none"),
        (lambda: check_depth(serial(share="depth", depth=4), DepthOptions(), 2), "would each have layers of their own"),
        (lambda: check_depth(network(share="mlp"), DepthOptions(), 2), "would each have layers of their own"),
        (lambda: paradepth.convert(serial(share="depth", depth=4), branches=2), "other places"),
    ],
)
def test_refusals(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
