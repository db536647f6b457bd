"""Static mixing: matrices over tokens in place of attention, in some layers or in all, everywhere that models go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import paradepth
from compress_helpers import bench_for, classifier, images, roughen, text_model, texts
from paradepth.branches import Batched, Loop, Threads, TrunkCache
from paradepth.compress.merge import Merge
from paradepth.compress.structured import Heads, Neurons
from paradepth.data import ByteTokenizer
from paradepth.depth import MGRIT, Picard
from paradepth.models import TrunkConfig, generate
from paradepth.nn import EncoderLayer, StaticMixing, set_dropout_key
from paradepth.nn.static_mixing import equal_mlp, mixing_parameters
from paradepth.train import Config, start_run
from paradepth.train.finetune import finetune_config
from paradepth.train.start import take_over
from paradepth.train.tasks import load_data
from runs import tiny_config

STATIC: dict[str, Any] = {"mixing": "static"}


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def by_head(mix: StaticMixing, x_TD: Tensor, seen_TS: Tensor | None = None) -> Tensor:
    """One sample, a loop over heads, the matrices written out."""
    T = len(x_TD)
    m_HNN = mix.mixing if mix.rank is None else mix.left @ mix.right
    parts = []
    for head, v_TK in enumerate(mix.value(x_TD).chunk(mix.heads, dim=1)):
        m_TS = m_HNN[head, :T, :T]
        m_TS = m_TS.tril() if mix.causal else m_TS
        parts.append((m_TS if seen_TS is None else m_TS * seen_TS) @ v_TK)
    return mix.out(torch.cat(parts, dim=1))


@given(
    heads=st.integers(1, 3),
    head_width=st.integers(1, 4),
    tokens=st.integers(1, 6),
    more=st.integers(0, 2),
    rank=st.sampled_from([None, 1, 3]),
    causal=st.booleans(),
    bias=st.booleans(),
    masked=st.sampled_from(["no", "keys", "pairs"]),
)
def test_every_head_is_its_matrix_times_its_values(
    heads: int, head_width: int, tokens: int, more: int, rank: int | None, causal: bool, bias: bool, masked: str
) -> None:
    options: dict[str, Any] = {"head_width": head_width, "rank": rank, "causal": causal, "bias": bias}
    mix = StaticMixing(5, heads, tokens=tokens + more, **options).double()
    x_BTD = torch.randn(2, tokens, 5).double()
    mask = {"no": None, "keys": torch.rand(2, 1, 1, tokens) < 0.6, "pairs": torch.rand(2, 1, tokens, tokens) < 0.6}[
        masked
    ]
    seen = [None, None] if mask is None else [m[0].expand(tokens, tokens) for m in mask]
    close(mix(x_BTD, mask), torch.stack([by_head(mix, x_BTD[i], seen[i]) for i in (0, 1)]))
    close(
        mix.matrix(tokens),
        (mix.mixing if rank is None else mix.left @ mix.right)[:, :tokens, :tokens].tril(0 if causal else tokens),
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rank", [None, 2])
def test_operations_are_those_that_torch_counts(rank: int | None, causal: bool) -> None:
    layer = EncoderLayer(16, heads=2, mlp=32, mixing="static", tokens=9, mixing_rank=rank, causal=causal)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(1, 9, 16))
    assert layer.flops(9) == counter.get_total_flops()


def test_rows_start_near_averages_of_what_they_see() -> None:
    mix = StaticMixing(8, 2, tokens=64, causal=True)
    sums_HT = mix.matrix().sum(dim=2)
    assert 0.8 < float(sums_HT.detach().mean()) < 1.2
    assert float(mix.mixing.detach().triu(1).abs().max()) == 0
    squares = [float(StaticMixing(8, 8, tokens=32, rank=rank).matrix().detach().square().mean()) for rank in (None, 8)]
    assert 0.5 < squares[0] * 32 / 1 < 2
    assert 0.5 < squares[1] * 32 < 2


def test_dropout_falls_on_the_entries_of_the_matrices_anew_for_every_sample() -> None:
    mix = StaticMixing(4, 1, tokens=6, attention_dropout=0.5, bias=False).double()
    with torch.no_grad():
        mix.value.weight.copy_(torch.eye(4))
        mix.out.weight.copy_(torch.eye(4))
    one_hot = torch.zeros(2, 6, 4).double()
    one_hot[:, 3, 0] = 1.0  # so that the first column of the result is column 3 of the matrix
    set_dropout_key(mix, seed=0, step=1)
    column_BT = mix(one_hot)[:, :, 0]
    ratio_BT = column_BT / mix.mixing[0, :, 3]
    assert {round(value, 6) for value in ratio_BT.flatten().tolist()} == {0.0, 2.0}
    assert not torch.equal(ratio_BT[0], ratio_BT[1])
    close(mix.eval()(one_hot)[0, :, 0], mix.mixing[0, :, 3])


@pytest.mark.parametrize("kind", ["texts", "language"])
def test_padding_or_later_tokens_change_nothing(kind: str) -> None:
    model, x = text_model(kind, **STATIC), texts()
    short = x[:1, :5]  # the first text has five tokens and two of padding
    whole, own = model(x)[:1], model(short)
    close(whole if kind == "texts" else whole[:, :5], own)
    changed = x[:1].clone()
    changed[:, 1] = 7
    assert not torch.allclose(model(changed), model(x[:1]))


def test_values_are_remembered() -> None:
    model = text_model("language", **STATIC, static_layers=(0, 2))
    x, sides = model.embed(texts())
    cache = TrunkCache(model.trunk)
    close(
        torch.cat([cache.advance(x[:, :3]), cache.advance(x[:, 3:4]), cache.advance(x[:, 4:])], 1),
        model.trunk(x, *sides),
    )
    with pytest.raises(ValueError, match="a matrix of 7"):
        cache.advance(x)


def test_texts_of_several_lengths_are_continued_as_each_by_itself() -> None:
    model = roughen(paradepth.create_model("gpt_nano", context=12, branches=2, depth=1, **STATIC))
    prompts = ["to be", "or", "not to be"]
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0}
    together = generate(model, ByteTokenizer(), prompts, **options)
    alone = [generate(model, ByteTokenizer(), prompt, **options)[0] for prompt in prompts]
    assert [made.tokens for made in together] == [made.tokens for made in alone]
    with pytest.raises(ValueError, match="by their places"):
        model.new_cache(padding=torch.tensor([0, 2]))


# ---- shapes of models ----------------------------------------------------------------------------------------------


def test_which_layers_are_static() -> None:
    model = classifier(branches=3, depth=2, mixing="static", static_layers=(4, 1))
    kinds = [type(layer.attention).__name__ for stack in model.trunk.branches for layer in stack.layers]
    assert [n for n, kind in enumerate(kinds) if kind == "StaticMixing"] == [1, 4]
    assert model.config.static_layers == (1, 4)
    assert classifier(branches=3, mixing="static", static_layers=(0, 1, 2)).config.static_layers is None
    x, _ = images()
    close(model.truncate(2)(x), model(x, branches=2))
    assert model.truncate(2).config.static_layers == (1,)
    chosen = model.select([2, 0])
    assert chosen.config.static_layers == (0, 3)
    close(chosen.trunk.branches[0](model.embed(x)[0]), model.trunk.branches[2](model.embed(x)[0]))
    plain = classifier(branches=3, mixing="static", static_layers=(2,)).select([0])
    assert (plain.config.mixing, plain.config.static_layers) == ("attention", None)


def test_growth_and_its_inverse() -> None:
    x, _ = images()
    some, all_static = (classifier(branches=2, mixing="static", static_layers=chosen) for chosen in ((1,), None))
    for model, kind in ((some, "MultiHeadAttention"), (all_static, "StaticMixing")):
        grown = model.grow(1, classes=1)
        close(grown(x)[:, :3], model(x))
        assert type(grown.trunk.branches[2].layers[0].attention).__name__ == kind
        back = grown.drop(1, classes=1)
        assert back.config == model.config
        assert torch.equal(back(x), model(x))


@pytest.mark.parametrize("options", [STATIC, {"mixing": "static", "static_layers": (1,)}, {**STATIC, "mixing_rank": 2}])
def test_saved_and_loaded(options: dict[str, Any], tmp_path: Path) -> None:
    model, (x, _) = classifier(branches=2, **options), images()
    again = paradepth.from_pretrained(model.save_pretrained(tmp_path))
    assert again.config == model.config
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mixing": "fourier"}, "must be one of attention, static"),
        ({"static_layers": (0,)}, "means nothing to mixing 'attention'"),
        ({"mixing_rank": 2}, "means nothing to mixing 'attention'"),
        ({**STATIC, "mixing_rank": 0}, "mixing_rank is 0"),
        ({**STATIC, "static_layers": (3,), "branches": 3, "depth": 1}, "at least one of 0 to 2"),
        ({**STATIC, "static_layers": (1, 1), "branches": 3, "depth": 1}, "each at most once"),
        ({**STATIC, "static_layers": (), "branches": 3, "depth": 1}, "at least one of"),
        (
            {**STATIC, "static_layers": (0,), "branches": 3, "depth": 1, "share": "mlp"},
            "only all of them can be static",
        ),
    ],
)
def test_shapes_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrunkConfig(**options)


def test_who_does_not_take_it() -> None:
    with pytest.raises(ValueError, match="a translator takes attention"):
        paradepth.create_model("translator_nano", **STATIC)
    with pytest.raises(ValueError, match="needs the number of tokens"):
        EncoderLayer(8, heads=2, mlp=8, mixing="static")
    with pytest.raises(ValueError, match="mixing_rank is 2, and attention has none"):
        EncoderLayer(8, heads=2, mlp=8, mixing_rank=2)
    with pytest.raises(ValueError, match="there are 5 tokens"):
        StaticMixing(8, 2, tokens=4)(torch.randn(1, 5, 8))
    model = classifier(branches=2, **STATIC)
    for step in (Merge(1), Heads(1)):
        with pytest.raises(ValueError, match="static matrices"):
            step.check(model)


def test_parameters_are_equal_where_it_is_said() -> None:
    for tokens in (16, 64, 100):
        static = equal_mlp(256, 64, 2, tokens=tokens)
        sizes = [
            sum(p.numel() for p in EncoderLayer(64, heads=2, mlp=mlp, mixing=mixing, tokens=tokens).parameters())  # pyright: ignore
            for mlp, mixing in ((256, "attention"), (static, "static"))
        ]
        assert abs(sizes[0] - sizes[1]) <= 65
    assert mixing_parameters(64, 2, tokens=1024, rank=2) == (8320, 8192)
    with pytest.raises(ValueError, match="take a rank"):
        equal_mlp(256, 64, 2, tokens=1024)


# ---- executors, runs, files ------------------------------------------------------------------------------------------


def test_executors_of_branches_give_what_the_loop_gives() -> None:
    model, (x, _) = classifier(branches=4, mixing="static", static_layers=(1,)), images()
    wanted = model(x)
    for executor in (Loop(), Batched(), Threads()):
        model.trunk.executor = executor
        close(model(x), wanted)
    model.trunk.executor = batched = Batched()
    model(x)
    assert batched.groups == ((0, 2, 3),)
    assert "StaticMixing" in batched.alone[1]


def test_executors_of_layers_give_what_the_serial_one_gives() -> None:
    model, (x, _) = classifier(branches=0, depth=6, step=1 / 6, mixing="static", static_layers=(2, 5)), images()
    wanted = model(x)
    gradients = torch.autograd.grad(wanted.square().sum(), list(model.parameters()))
    for executor in (
        MGRIT(levels=2, coarsening=2, forward_iterations=3, backward_iterations=3),
        Picard(forward_iterations=6, backward_iterations=6),
    ):
        model.trunk.executor = executor
        found = model(x)
        close(found, wanted)
        for ours, theirs in zip(
            torch.autograd.grad(found.square().sum(), list(model.parameters())), gradients, strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


def test_neurons_of_such_layers_are_pruned() -> None:
    model, (x, y) = classifier(branches=2, **STATIC), images()
    smaller: Any = Neurons(6).apply(model, bench_for(model, x, y))
    assert smaller.config.mlp == 6
    assert smaller.config.mixing == "static"
    assert torch.equal(
        smaller.trunk.branches[1].layers[0].attention.mixing, model.trunk.branches[1].layers[0].attention.mixing
    )


def test_trained_fine_tuned_and_refused(tmp_path: Path) -> None:
    options = {"width": 16, "heads": 1, "mlp": 16, "budget": "6 steps", "validations": 1, "mixing": "static"}
    start_run(tiny_config(**options, static_layers=(2,), attention_dropout=0.1), tmp_path / "run")
    model = paradepth.from_pretrained(tmp_path / "run")
    assert model.config.static_layers == (2,)
    config = finetune_config(tmp_path / "run", "digits")
    assert (config.model_options.mixing, config.model_options.static_layers) == ("static", (2,))
    take_over(load_data(config).new_model(), model)
    with pytest.raises(ValueError, match="mixing is attention here and static in the source"):
        take_over(load_data(config.replace(mixing=None, static_layers=None)).new_model(), model)
    with pytest.raises(ValueError, match="static_layers is"):
        load_data(Config().replace(model="paraformer_nano", data="digits", mixing="static", static_layers=(9,)))


@pytest.mark.parametrize(("format", "rank"), [("onnx", None), ("torch", 2)])
def test_exported(format: str, rank: int | None, tmp_path: Path) -> None:
    from paradepth.export import OnnxModel, export_onnx, export_program, load_program
    from paradepth.export.graph import build_graph

    shape = {"width": 16, "heads": 2, "mlp": 32, "depth": 1, "branches": 2, "vocab_size": 260, "context": 12}
    model = paradepth.create_model(
        "text_classifier_nano", **shape, mixing="static", static_layers=(0,), mixing_rank=rank
    ).eval()
    if format == "onnx":
        export_onnx(model, tmp_path / "model.onnx")
        exported = OnnxModel(tmp_path / "model.onnx")
    else:
        exported = load_program(export_program(model, tmp_path / "model.pt2").path)[0]
    for seed, (batch, share) in enumerate(
        [(1, 0.0), (3, 0.5), (2, 1.0)]
    ):  # as short, half as long and as long as can be
        (tokens,) = build_graph(model).sample(batch, share=share, seed=seed)
        found = exported(tokens)
        found = found if format == "onnx" else found[-1]
        torch.testing.assert_close(found, model(tokens), rtol=0, atol=1e-4)
