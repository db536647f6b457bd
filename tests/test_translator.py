"""The translator: against plain layers and itself, its joined chain in parallel, and decoding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import paradepth
import paradepth.nn.attention as attention_module
from paradepth.depth import MGRIT, Picard, Serial
from paradepth.models import Translator, TranslatorConfig
from paradepth.models.translator import CachedDecoder, translate_tokens
from paradepth.nn import set_dropout_key
from paradepth.train.accounting import update_cost
from paradepth.train.schedules import Objective

V, PAD, START, END = 29, 0, 1, 2
kinds = st.sampled_from(["stack", "residual", "sum"])


def model(kind: str = "stack", *, seed: int = 0, **shape: Any) -> Translator:
    """In float64; weights are large, so that nothing hangs on rounding."""
    torch.manual_seed(seed)
    used = {"vocab_size": V, "context": 12, "width": 8, "heads": 2, "mlp": 16, "depth": 2, "step": 0.5, **shape}
    if kind != "stack":
        used |= {"branches": 3, "depth": 1, "aggregate": kind}
    built: Translator = paradepth.create_model("translator_nano", **used).double().eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
        built.stem.embed.weight.mul_(2)
    return built


def pair(batch: int = 3, source: int = 6, target: int = 5, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sources of different lengths, padded, and targets."""
    draws = torch.Generator().manual_seed(seed)
    source_BS = torch.randint(3, V, (batch, source), generator=draws)
    lengths_B = torch.randint(1, source + 1, (batch,), generator=draws)
    source_BS[torch.arange(source) >= lengths_B[:, None]] = PAD
    return source_BS, torch.randint(3, V, (batch, target), generator=draws)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def prefixes(built: Translator) -> list[int | None]:
    return [None] if built.prefixes == 1 else [None, 1, 2, 3]


# ---- the model ---------------------------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, allowed: Tensor) -> Tensor:
    """Written with a loop over queries and heads."""
    rows = []
    for t in range(len(q)):
        parts = []
        for q_K, k_SK, v_SK in zip(q[t].chunk(heads), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
            weights = (k_SK @ q_K / math.sqrt(len(q_K)))[allowed[t]].softmax(0)
            parts.append(weights @ v_SK[allowed[t]])
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def plain(built: Translator, source: list[int], target: list[int]) -> Tensor:
    """Logits of one pair without padding, from the formulas."""
    c, weights = built.config, dict(built.named_modules())

    def embedded(tokens: list[int]) -> Tensor:
        return built.stem.embed.weight[tokens] * math.sqrt(c.width) + built.stem.positions[: len(tokens)]

    def normed(name: str, x: Tensor) -> Tensor:
        layer: Any = weights[name]
        return F.layer_norm(x, (c.width,), layer.weight, layer.bias)

    def mlp(name: str, x: Tensor) -> Tensor:
        layer: Any = weights[name]
        return layer.down(F.gelu(layer.up(x)))

    x, y = embedded(source), embedded(target)
    everything = torch.ones(len(source), len(source), dtype=torch.bool)
    past = torch.ones(len(target), len(target), dtype=torch.bool).tril()
    for n in range(2 * c.depth):
        name = f"trunk.layers.{n}.layer" if n < c.depth else f"trunk.layers.{n}"
        own: Any = weights[f"{name}.attention"]
        state, allowed = (x, everything) if n < c.depth else (y, past)
        q, k, v = own.qkv(normed(f"{name}.attention_norm", state)).chunk(3, dim=1)
        a = own.out(attention(q, k, v, c.heads, allowed))
        if n >= c.depth:
            cross: Any = weights[f"{name}.cross"]
            k, v = cross.kv(normed(f"{name}.memory_norm", x)).chunk(2, dim=1)
            q = cross.q(normed(f"{name}.cross_norm", y + a))
            a = a + cross.out(attention(q, k, v, c.heads, torch.ones(len(y), len(x), dtype=torch.bool)))
        f = a + mlp(f"{name}.mlp", normed(f"{name}.mlp_norm", state + a))
        if n < c.depth:
            x = x + c.step * f
        else:
            y = y + c.step * f
    return normed("head.norm", y) @ built.stem.embed.weight.T


def test_the_logits_are_those_of_the_formulas() -> None:
    built = model()
    angles = [[t / 10_000 ** (i / 3) for i in range(4)] for t in range(12)]
    positions = [[f(angle) for f in (math.sin, math.cos) for angle in row] for row in angles]
    close(built.stem.positions, torch.tensor(positions, dtype=torch.float64), 1e-6)
    source_BS, target_BT = pair()
    logits_BTV = built((source_BS, target_BT))
    for source, target, found in zip(source_BS, target_BT, logits_BTV, strict=True):
        close(found, plain(built, source[source != PAD].tolist(), target.tolist()))


@settings(max_examples=12)
@given(kinds, st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_prefix_k_is_the_truncated_model_and_padding_changes_nothing(
    kind: str, source: int, target: int, tied: bool
) -> None:
    built = model(kind, tied=tied)
    inputs = pair(source=source, target=target)
    everything = built.prefix_logits(inputs)
    assert everything.shape == (built.prefixes, 3, target, V)
    for k in range(1, built.prefixes + 1):
        used = built.truncate(k) if built.config.branches else built
        close(used(inputs), everything[k - 1])
        close(built(inputs, branches=k), everything[k - 1])
    longer = F.pad(inputs[0], (0, 3), value=PAD), F.pad(inputs[1], (0, 2), value=5)
    close(built.prefix_logits(longer)[:, :, :target], everything)
    if built.config.branches:
        assert built.contributions(inputs).shape == (3, 3)
        grown = built.grow(2) if kind == "residual" else built.grow(2, init="random")
        close(grown(inputs, branches=3), everything[-1])
        if kind == "residual":
            close(grown(inputs), everything[-1])


def test_the_future_of_the_target_does_not_matter_and_the_source_does() -> None:
    built = model()
    source, target = pair()
    other = target.clone()
    other[:, 3:] = (other[:, 3:] + 1) % V
    close(built((source, target))[:, :3], built((source, other))[:, :3])
    changed = source.clone()
    changed[:, 0] = (changed[:, 0] - 2) % (V - 3) + 3
    difference = (built((source, target)) - built((changed, target))).detach()
    assert float(difference.abs().amax(dim=(1, 2)).min()) > 1e-3


def test_one_embedding_serves_source_target_and_head() -> None:
    built = model()
    names = [name for name, p in built.named_parameters() if V in p.shape]
    assert names == ["stem.embed.weight"]
    free = model(tied=False)
    assert [name for name, p in free.named_parameters() if V in p.shape] == [*names, "head.vocabulary.weight"]
    again = model(seed=1)
    again.load_state_dict(built.state_dict())
    close(again(pair()), built(pair()))


def test_layers_are_counted_on_both_sides() -> None:
    serial, branched = model(), model("residual", depth=1)
    assert (serial.config.layers, branched.config.layers) == (4, 6)
    assert update_cost(serial, Objective(1), serial.parts()).layer_evals == 4
    assert update_cost(branched, Objective(2), branched.parts()).layer_evals == 4
    deep = model(deep_init=True, depth=3)
    same = model(depth=3)
    ratio = deep.trunk.layers[0].layer.mlp.up.weight / same.trunk.layers[0].layer.mlp.up.weight  # pyright: ignore
    close(ratio, torch.full_like(ratio, math.sqrt(math.log(12))), 1e-5)


def test_flops_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "fused_is_faster", lambda q: False)  # the fused CPU kernel is not counted
    built = model("residual", depth=2, tied=False)
    full = pair(1, 12, 12)
    with FlopCounterMode(display=False) as counter:
        built((full[0].clamp(min=1), full[1]))
    assert built.tokens == (12, 12)
    assert built.forward_flops() == counter.get_total_flops()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.ones(2, 3, dtype=torch.long), "this model takes source and target tokens"),
        ((torch.ones(2, 3, dtype=torch.long), torch.ones(3, 3, dtype=torch.long)), "equally many of each"),
        ((torch.ones(2, 13, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)), r"source tokens.*1 to 12 tokens"),
        ((torch.ones(2, 3, dtype=torch.long), torch.ones(2, 0, dtype=torch.long)), r"target tokens have shape \(2, 0"),
        ((torch.ones(2, 3), torch.ones(2, 3, dtype=torch.long)), r"source tokens are torch\.float"),
        ((torch.ones(2, 3, dtype=torch.long), torch.full((2, 3), V)), f"target tokens run from {V} to {V}"),
    ],
)
def test_inputs_that_the_model_does_not_take_are_refused(inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model()(inputs)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"pad": 99, "vocab_size": 50}, "pad is 99; it must be a token, between 0 and 49"),
        ({"depth": 0}, "depth is 0"),
        ({"buffers": (3, 1), "depth": 2}, "leave some of the 4 layers"),
        ({"context": 0}, "context is 0"),
    ],
)
def test_shapes_out_of_range_are_refused(shape: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Translator(TranslatorConfig(**shape))


# ---- the joined chain in parallel ----------------------------------------------------------------------------------


def gradients(built: Translator, executor: Any) -> dict[str, Tensor]:
    built.train()
    set_dropout_key(built, seed=1, step=2)
    built.zero_grad()
    built.trunk.executor = executor
    logits = built(pair(2))
    F.cross_entropy(logits.flatten(0, 1), pair(2, seed=1)[1].flatten()).backward()
    found = {name: p.grad for name, p in built.named_parameters() if p.grad is not None}
    assert len(found) == len(list(built.parameters()))
    return {"logits": logits.detach(), **found}


@pytest.mark.parametrize("coarse", ["sample", "branch", "half"])
@pytest.mark.parametrize(("coarsening", "levels"), [(2, 2), (3, 2), (4, 2), (2, 3), (3, 3)])
def test_converged_multigrid_over_the_joined_chain_is_serial(coarsening: int, levels: int, coarse: str) -> None:
    """Five source and five target layers, with a buffer at each end for c = 4: an interval has both kinds."""
    built = model(depth=5, dropout=0.2, attention_dropout=0.1, buffers=(2, 1) if coarsening == 4 else (0, 0))
    serial = gradients(built, Serial())
    options: dict[str, Any] = {"coarsening": coarsening, "levels": levels, "coarse": coarse}
    for more in ({"relaxation": "F", "recompute": True}, {"relaxation": "FCF", "recompute": False}):
        enough = gradients(built, MGRIT(**options, **more, forward_iterations=10, backward_iterations=10))
        for name, value in serial.items():
            close(enough[name], value)
    none = gradients(built, MGRIT(**options, forward_iterations=0, backward_iterations=0))
    assert all(bool(value.isfinite().all()) for value in none.values())
    exact = coarsening == 2 and coarse == "half"  # two sums of one layer each
    assert (float((none["logits"] - serial["logits"]).abs().max()) < 1e-10) == exact


def test_sweeps_and_checkpointing_over_the_joined_chain_are_serial_too() -> None:
    built = model(depth=3, dropout=0.2)
    serial = gradients(built, Serial())
    for executor in (Picard(forward_iterations=6, backward_iterations=6), Serial(checkpoint=True)):
        for name, value in gradients(built, executor).items():
            close(value, serial[name])


# ---- decoding ----------------------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(kinds, st.integers(1, 7), st.integers(0, 3))
def test_cached_logits_are_the_uncached_ones(kind: str, target: int, seed: int) -> None:
    inputs = pair(target=target, seed=seed)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        built = model(kind).to(dtype)
        for k in prefixes(built):
            expected = built(inputs, branches=k)
            decoder = CachedDecoder(built, inputs[0], branches=k)
            rows = torch.tensor([2, 0, 0])
            for t in range(target):
                close(decoder.advance(inputs[1][:, t]), expected[:, t], tolerance * float(expected.abs().max()))
            decoder = CachedDecoder(built, inputs[0], branches=k)
            decoder.advance(inputs[1][:, 0])
            decoder.reorder(rows)
            if target > 1:
                found = decoder.advance(inputs[1][rows, 1])
                moved = built((inputs[0][rows], inputs[1][rows]), branches=k)[:, 1]
                moved_first = inputs[1][rows, 0] == inputs[1][:, 0][rows]
                assert bool(moved_first.all())
                close(found, moved, tolerance * float(expected.abs().max()))


@settings(max_examples=8)
@given(kinds, st.integers(1, 4), st.integers(0, 5))
def test_a_translation_depends_on_its_source_alone(kind: str, beams: int, seed: int) -> None:
    built = model(kind, seed=seed)
    source_BS, _ = pair(4, seed=seed)
    sources = [row[row != PAD].tolist() for row in source_BS]
    options: dict[str, Any] = {"start": START, "end": END, "beams": beams, "max_tokens": 7}
    for k in prefixes(built):
        together = translate_tokens(built, sources, **options, branches=k)
        alone = [translate_tokens(built, [source], **options, branches=k)[0] for source in sources]
        assert [h.tokens for h in together] == [h.tokens for h in alone]
        if k is not None:
            used = translate_tokens(built.truncate(k), sources, **options)
            assert [h.tokens for h in together] == [h.tokens for h in used]
        for source, h in zip(sources, together, strict=True):
            text = [START, *h.tokens, END][: len(h.tokens) + 1 + h.ended]
            logits = built((torch.tensor([source]), torch.tensor([text[:-1]])), branches=k)[0]
            logits[:, [PAD, START]] = -torch.inf
            total = logits.log_softmax(-1)[range(len(text) - 1), text[1:]].sum()
            assert h.log_probability == pytest.approx(total.item(), abs=1e-9)
            if beams == 1:
                assert logits.argmax(-1).tolist() == text[1:]
