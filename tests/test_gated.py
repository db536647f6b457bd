"""Gated branches: x + Σ α_i(x) δ_i(x), in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import paradepth
from paradepth.branches import Batched, Branches, Gate, Threads
from paradepth.branches.gates import readings
from paradepth.compress import check_plan, parse_plan
from paradepth.depth import Stack
from paradepth.export.graph import build_graph
from paradepth.models import EarlyStop
from paradepth.models.early_stop import NEVER
from paradepth.nn import EncoderLayer
from paradepth.train.schedules import Objective
from paradepth.train.step import TrainStep

shapes = st.fixed_dictionaries(
    {
        "branches": st.integers(1, 4),
        "depth": st.integers(1, 2),
        "pool": st.sampled_from(["cls", "mean"]),
        "step": st.sampled_from([1.0, 0.25]),
    }
)
TINY: dict[str, Any] = {"width": 8, "heads": 2, "mlp": 16, "aggregate": "gated"}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "images": ("paraformer_nano", {"image_size": 8, "patch_size": 4, "channels": 1, "num_classes": 3}),
    "texts": ("text_classifier_nano", {"branches": 3, "depth": 1, "context": 12}),
    "masked": ("bert_nano", {"branches": 3, "depth": 1, "context": 12}),
    "causal": ("gpt_nano", {"branches": 3, "depth": 1, "context": 12}),
    "causal texts": ("text_classifier_nano", {"branches": 3, "depth": 1, "context": 12, "causal": True}),
    "translation": ("translator_nano", {"branches": 3, "depth": 1, "context": 12, "vocab_size": 40}),
}


def gated(kind: str = "images", *, open_wide: float = 2.0, **options: Any) -> Any:
    """A model whose gates depend on the input."""
    name, own = KINDS[kind]
    model = paradepth.create_model(name, **{**TINY, **own, **options}).double().eval()
    if open_wide:
        for parameter in model.trunk.gate_parameters():
            torch.nn.init.normal_(parameter, std=open_wide)
    return model


def inputs_of(kind: str, batch: int = 4) -> Any:
    if kind == "images":
        return torch.rand(batch, 1, 8, 8, dtype=torch.float64)
    tokens = torch.randint(1, 40, (batch, 12))
    if kind == "translation":
        tokens[1, 7:] = 0
        return tokens, torch.randint(1, 40, (batch, 9))
    if kind != "causal":
        tokens[1, 5:] = 256
    return tokens


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def image_gates(model: Any, state: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """α_i by the definition, token by token."""
    n = (state - state.mean(-1, keepdim=True)) / (state.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    found = []
    for branch in model.trunk.branches:
        means = [sample.mean(dim=0) if mask is None else sample[mask[b]].mean(dim=0) for b, sample in enumerate(n)]
        z = torch.stack([(branch.gate.weight * mean).sum() / 8**0.5 + branch.gate.bias[0] for mean in means])
        found.append(1 + z.tanh())
    return found


@settings(max_examples=12)
@given(shape=shapes)
def test_prefix_k_is_the_defining_sum_and_the_truncated_model(shape: dict) -> None:
    model, x = gated(**shape), inputs_of("images")
    state = model.stem(x)
    total, logits, alphas = state, model.prefix_logits(x), image_gates(model, state)
    close(model.gates(x), torch.stack(alphas))
    for k, (branch, alpha) in enumerate(zip(model.trunk.branches, alphas, strict=True), start=1):
        total = total + alpha[:, None, None] * (branch(state) - state)
        close(logits[k - 1], model.head(total))
        close(model(x, branches=k), logits[k - 1])
        close(model.truncate(k)(x), logits[k - 1])
        close(model.gates(x, branches=k), model.gates(x)[:k])
    added = model.trunk.contributions(state)
    close(state + added.sum(0), total)


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_gates_are_exactly_one_and_growing_changes_nothing(kind: str) -> None:
    model, x = gated(kind, open_wide=0.0), inputs_of(kind)
    assert (model.gates(x) == 1).all()
    plain = paradepth.create_model(KINDS[kind][0], **{**TINY, **KINDS[kind][1], "aggregate": "residual"}).double()
    own = {name: value for name, value in model.state_dict().items() if ".gate." not in name}
    plain.load_state_dict(own)  # strict: gates are all that is new
    assert torch.equal(plain.eval()(x), model(x))
    trained = gated(kind)
    grown = trained.grow(1)
    assert torch.equal(grown(x), trained(x))
    assert (grown.gates(x)[-1] == 1).all()
    assert grown.drop(1).config == trained.config
    assert torch.equal(grown.drop(1)(x), trained(x))
    picked = trained.select([2, 0])
    close(picked.gates(x), trained.gates(x)[[2, 0]])


@pytest.mark.parametrize("kind", ["texts", "masked", "translation"])
def test_padding_changes_no_gate(kind: str) -> None:
    model, x = gated(kind), inputs_of(kind)
    short = (x[0][1:2, :7], x[1][1:2]) if kind == "translation" else x[1:2, :5]
    close(model.gates(short), model.gates(x)[:, 1:2])
    close(model(x)[1:2, :5] if kind == "masked" else model(x)[1:2], model(short))


@pytest.mark.parametrize("kind", ["causal", "causal texts"])
def test_a_token_never_sees_what_comes_after_it(kind: str) -> None:
    model = gated(kind)
    a = torch.randint(1, 40, (3, 12))
    b = a.clone()
    b[:, 8:] = torch.randint(40, 80, (3, 4))
    assert model.gates(a).shape == (3, 3, 12)
    close(model.gates(a)[..., :8], model.gates(b)[..., :8])
    assert not torch.allclose(model.gates(a)[..., 8:], model.gates(b)[..., 8:])
    states = [model.trunk(*(lambda x, sides: (x, *sides))(*model.embed(tokens))) for tokens in (a, b)]
    close(states[0][:, :8], states[1][:, :8])
    stacks = [Stack([EncoderLayer(8, heads=2, mlp=16, causal=True)])]
    with pytest.raises(ValueError, match="tell a token what comes after it"):
        Branches(stacks, aggregate="gated", gates=[Gate(8)])


def test_generation_with_remembered_keys_reads_the_same_gates() -> None:
    model, tokens = gated("causal"), torch.randint(1, 40, (2, 9))
    cache = model.new_cache(branches=2)
    in_three = torch.cat([model(part, cache=cache) for part in tokens.split([4, 1, 4], dim=1)], dim=1)
    close(in_three, model(tokens, branches=2))
    from paradepth.models.translator import CachedDecoder

    translator, (source, target) = gated("translation"), inputs_of("translation")
    decoder = CachedDecoder(translator, source)
    steps = [decoder.advance(target[:, t]) for t in range(5)]
    close(torch.stack(steps, dim=1), translator((source, target))[:, :5])
    rows = torch.tensor([2, 0, 1, 1])
    decoder.reorder(rows)
    close(decoder.advance(target[rows, 5]), translator((source[rows], target[rows]))[:, 5])


@pytest.mark.parametrize("kind", ["images", "texts", "translation"])
def test_skipping_is_evaluating_with_those_gates_at_zero(kind: str) -> None:
    model, x = gated(kind, **({"branches": 3, "depth": 1} if kind == "images" else {})), inputs_of(kind, batch=6)
    full, gates = model.prefix_logits(x), model.gates(x)
    with torch.no_grad():
        threshold = gates.flatten().median().item()  # some samples need a branch and some do not
    model.trunk.skip_below = threshold
    skipped = model.prefix_logits(x)
    close(skipped[-1], model(x))
    assert not torch.allclose(skipped, full)
    calls: list[int] = []
    for branch in model.trunk.branches:
        branch.register_forward_pre_hook(
            lambda _, args: calls.append(len(args[0][0] if isinstance(args[0], tuple) else args[0]))
        )
    close(model(x), skipped[-1])
    needed = model.trunk.needed(gates)
    assert calls == [int(each.sum()) for each in needed if each.any()], "only the samples that need a branch"
    # The oracle: α below the threshold set to 0, everything evaluated.
    embedded, sides = model.embed(x)
    parts = embedded if isinstance(embedded, tuple) else (embedded,)
    states = list(parts)
    for branch, alpha in zip(model.trunk.branches, gates * needed, strict=True):
        outputs = branch(embedded, *sides)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        states = [s + alpha.view(-1, 1, 1) * (g - p) for s, g, p in zip(states, outputs, parts, strict=True)]
    close(skipped[-1], model.decode(tuple(states) if len(states) > 1 else states[0], x))
    model.trunk.skip_below = 0.0
    assert torch.equal(model.prefix_logits(x), full)
    model.trunk.skip_below = threshold
    close(model.train().prefix_logits(x), full)  # in evaluation mode only
    with torch.no_grad():
        for branch in model.eval().trunk.branches:
            branch.gate.bias.fill_(-90.0)
    close(model(x), model.decode(embedded, x))  # nothing is run


@pytest.mark.parametrize("executor", [Batched(), Threads(2)])
def test_executors_agree_forward_and_backward(executor: Any) -> None:
    model, x = gated(branches=3, depth=2), inputs_of("images")
    found = []
    for one in (model.trunk.executor, executor):
        model.trunk.executor = one
        model.zero_grad()
        model.prefix_logits(x, detach=True).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        close(a, b)


def test_boosting_trains_the_newest_branch_and_its_gate_alone() -> None:
    model, x = gated(branches=3, depth=1), inputs_of("images")
    state = model.stem(x).detach()
    model.trunk.prefix_states(state, detach=True)[1].square().sum().backward()
    for index, branch in enumerate(model.trunk.branches):
        has = [p.grad is not None and bool(p.grad.any()) for p in (branch.gate.weight, branch.layers[0].mlp.up.weight)]
        assert has == [index == 1] * 2


def test_the_penalty_closes_gates_and_is_what_it_says() -> None:
    model, x, y = gated(branches=2, depth=1), inputs_of("images"), torch.tensor([0, 1, 2, 0])
    plain, _ = TrainStep(model)(x, y, Objective(2))
    fined, _ = TrainStep(model, gate_penalty=0.5)(x, y, Objective(2))
    close(fined - plain, 0.5 * model.gates(x).mean())
    first, _ = TrainStep(model, gate_penalty=0.5)(x, y, Objective(1))
    close(first - TrainStep(model)(x, y, Objective(1))[0], 0.5 * model.gates(x)[0].mean())


def test_early_stop_takes_the_gated_prefixes() -> None:
    model, x = gated(branches=3, depth=1), inputs_of("images", batch=5)
    logits = model.prefix_logits(x)
    stopped = EarlyStop(model, [0.4, NEVER])(x)
    close(stopped.logits_BN, logits[stopped.used_B - 1, torch.arange(5)])


def test_saving_exporting_and_compressing(tmp_path: Path) -> None:
    model, x = gated(branches=3, depth=1), inputs_of("images")
    again = paradepth.from_pretrained(model.save_pretrained(tmp_path))
    assert torch.equal(again(x), model(x))
    graph = build_graph(model.float(), prefixes=True)
    x = x.float()
    torch.testing.assert_close(graph.program().module()(x), tuple(model.prefix_logits(x)), rtol=1e-4, atol=1e-5)
    check_plan(parse_plan("subset=2+magnitude=0.5"), model)
    with pytest.raises(ValueError, match="its own gate"):
        check_plan(parse_plan("merge=2"), model)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Branches([stack()], aggregate="gated"), "a gate for each of the 1 branches"),
        (lambda: Branches([stack()], gates=[Gate(8)]), "has no gates"),
        (lambda: Branches([stack(), stack()], aggregate="gated", gates=[Gate(8), Gate(8, per="token")]), "one kind"),
        (lambda: Gate(8, per="word"), "'sample' or 'token'"),  # pyright: ignore[reportArgumentType]
        (lambda: Gate(0), "at least 1"),
        (lambda: readings(torch.zeros(1, 3, 8), per="sample", mask=torch.ones(1, 1, 3, 3)), "mask of padding"),
        (lambda: setattr(gated().trunk, "skip_below", 2.0), "below 2"),
        (lambda: setattr(gated("causal").trunk, "skip_below", 0.1), "needs all tokens"),
        (lambda: setattr(gated(aggregate="sum", open_wide=0.0).trunk, "skip_below", 0.1), "no gates"),
        (lambda: gated(aggregate="residual", open_wide=0.0).gates(inputs_of("images")), "no gates"),
        (lambda: paradepth.create_model("vit_nano").gates(torch.rand(1, 3, 32, 32)), "needs a model with branches"),
    ],
)
def test_refusals(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def stack() -> Stack:
    return Stack([EncoderLayer(8, heads=2, mlp=16)])
