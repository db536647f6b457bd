"""Translation: the model against plain layers and itself, the joined chain in parallel, runs, scores, the command."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import paradepth
import paradepth.nn.attention as attention_module
from paradepth.cli import main
from paradepth.data import load_tokenizer
from paradepth.depth import MGRIT, Picard, Serial
from paradepth.models import Translator, TranslatorConfig, translate
from paradepth.models.translator import CachedDecoder, too_long, translate_tokens
from paradepth.nn import set_dropout_key
from paradepth.recipes import get_recipe
from paradepth.train import Config, resume_run, start_run
from paradepth.train.accounting import update_cost
from paradepth.train.schedules import Objective
from paradepth.train.use import evaluate_run
from processes import run_together
from runs import Stop, events, stop_at
from test_pairs import NUMBERS as WORDS
from test_pairs import write_jsonl

NUMBERS = [
    (" ".join(de for de, _ in four), " ".join(en for _, en in four))
    for four in list(itertools.permutations(WORDS, 4))[::10]
]
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


# ---- runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("numbers")
    everything = NUMBERS
    write_jsonl(folder / "train.jsonl", everything * 6)
    write_jsonl(folder / "validation.jsonl", everything[:8])
    write_jsonl(folder / "test.jsonl", everything)
    return folder


def options(corpus: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": "translator_nano",
        "data": "pairs",
        "data_dir": corpus,
        "languages": ("de", "en"),
        "vocab_size": 280,
        "context": 24,
        "depth": 1,
        "dropout": 0.0,
        "batch_size": 12,
        "budget": "8 steps",
        "validations": 2,
        "precision": "float32",
        "device": "cpu",
        "threads": 1,
        "timeout": 60.0,
        **more,
    }


def config(corpus: Path, **more: Any) -> Config:
    return Config().replace(**options(corpus, **more))


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two branches that learn the numbers by heart."""
    place = tmp_path_factory.mktemp("run") / "numbers"
    more = {"branches": 2, "budget": "120 steps", "learning_rate": 5e-3, "label_smoothing": 0.1, "prefix_losses": True}
    start_run(config(corpus, schedule="stagewise", decay="inverse_sqrt", warmup=0.2, **more), place)
    return place


def test_a_run_learns_to_translate_and_is_scored_by_prefix(run: Path, corpus: Path) -> None:
    found = json.loads((run / "evaluation.json").read_text())
    references = [en for _, en in NUMBERS]
    assert found["bleu"][-1] > 90
    assert found["chrf"][-1] > 90
    built, tokenizer = paradepth.from_pretrained(run), load_tokenizer(run)
    for k in (1, 2):
        said = translate(built, tokenizer, [de for de, _ in NUMBERS], branches=k)
        assert said == [example["by_prefix"][k - 1] for example in found["examples"]]
        assert found["bleu"][k - 1] == pytest.approx(sacrebleu.corpus_bleu(said, [references]).score)
        assert found["chrf"][k - 1] == pytest.approx(sacrebleu.corpus_chrf(said, [references]).score)
    assert (
        found["signatures"]["bleu"] == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    )
    assert found["decoding"].startswith("beam search, 4 beams")
    first = found["examples"][0]
    assert (first["source"], first["reference"]) == NUMBERS[0]
    assert first["translation"] == first["by_prefix"][-1]
    assert len(found["loss"]) == len(found["accuracy"]) == 2
    assert "bleu" not in events(run, "validation")[-1]


def test_operations_are_counted_for_the_length_that_pairs_have(corpus: Path, tmp_path: Path) -> None:
    start_run(config(corpus, budget="4 steps"), tmp_path / "run")
    built, tokenizer = paradepth.from_pretrained(tmp_path / "run"), load_tokenizer(tmp_path / "run")
    source, target = (sum(len(tokenizer.encode(pair[side])) + 1 for pair in NUMBERS) / len(NUMBERS) for side in (0, 1))
    cost = update_cost(built, Objective(1), built.parts(), tokens=(round(source), round(target)))
    assert events(tmp_path / "run", "end")[0]["flops"] == pytest.approx(4 * 12 * cost.flops)
    assert cost.flops < update_cost(built, Objective(1), built.parts()).flops


def test_evaluating_measures_again(run: Path, corpus: Path) -> None:
    found = json.loads((run / "evaluation.json").read_text())
    again = evaluate_run(run)
    assert again["bleu"] == found["bleu"]
    assert again["loss"] == pytest.approx(found["loss"])
    one = evaluate_run(run, branches=1, split="validation")
    assert len(one["bleu"]) == 1
    assert len(one["examples"]) == 8


def test_the_loss_is_the_mean_over_all_target_tokens(run: Path, corpus: Path) -> None:
    built, tokenizer = paradepth.from_pretrained(run), load_tokenizer(run)
    start, end = tokenizer.special("<s>"), tokenizer.special("</s>")
    total, count = 0.0, 0
    for de, en in NUMBERS:
        source, target = [*tokenizer.encode(de), end], [start, *tokenizer.encode(en), end]
        with torch.no_grad():
            logits = built((torch.tensor([source]), torch.tensor([target[:-1]])))[0]
        total += float(F.cross_entropy(logits.double(), torch.tensor(target[1:]), reduction="sum"))
        count += len(target) - 1
    assert json.loads((run / "evaluation.json").read_text())["loss"][-1] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("kind", ["joint", "one_pass", "stagewise", "mgrit"])
def test_resuming_is_exact(kind: str, corpus: Path, tmp_path: Path) -> None:
    parallel = {"executor": "mgrit", "coarsening": 2, "depth": 2, "forward_iterations": 1, "backward_iterations": 1}
    more = parallel if kind == "mgrit" else {"branches": 2, "schedule": kind}
    chosen = config(corpus, dropout=0.1, checkpoint_every=3, **more)

    stop = stop_at(5)  # between two checkpoints
    start_run(chosen, tmp_path / "whole")
    with pytest.raises(Stop):
        start_run(chosen, tmp_path / "cut", on_batch=stop)
    resume_run(tmp_path / "cut")
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert events(tmp_path / "whole", "train")[-1] == events(tmp_path / "cut", "train")[-1]


@pytest.mark.slow
def test_two_processes_share_encoder_and_decoder_and_train_like_one(corpus: Path, tmp_path: Path) -> None:
    more = {"depth": 2, "dropout": 0.1, "executor": "mgrit", "coarsening": 2, "budget": "4 steps"}
    more |= {"forward_iterations": 1, "backward_iterations": 1}
    start_run(config(corpus, **more), tmp_path / "one")
    flags: list[str] = []
    for name, value in options(corpus, **more).items():
        flags += [f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    command = ["-m", "paradepth", "train", "multi30k_transformer", "--run-dir", tmp_path / "two", *flags]
    settings_of_recipe = get_recipe("multi30k_transformer").optimiser_options
    same = ["--learning-rate", "1e-3", "--warmup", "0.05", "--label-smoothing", "0"]
    assert settings_of_recipe.weight_decay == 0.05
    for status, _, errors in run_together(2, *command, *same):
        assert status == 0, errors
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4
    scores = [json.loads((tmp_path / name / "evaluation.json").read_text())["bleu"] for name in ("one", "two")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


# ---- the command ---------------------------------------------------------------------------------------------------


def test_sentences_files_and_standard_input_are_translated(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    german, english = zip(*NUMBERS[:9], strict=True)
    assert main(["translate", str(run), *german[:2]]) == 0
    assert capsys.readouterr().out == f"{english[0]}\n{english[1]}\n"
    source, out = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("\n".join([*german[:4], "", *german[4:]]) + "\n")
    arguments = ["translate", str(run), "--file", str(source), "--batch-size", "2"]
    assert main([*arguments, "--out", str(out), "--json"]) == 0
    assert out.read_text().split("\n") == [*english[:4], "", *english[4:], ""]
    told = json.loads(capsys.readouterr().out)
    assert (told["sentences"], told["cut"], told["out"]) == (10, [], str(out))
    assert main([*arguments, "--json", "--beams", "1", "--branches", "1"]) == 0
    said = json.loads(capsys.readouterr().out)["translations"]
    built, tokenizer = paradepth.from_pretrained(run), load_tokenizer(run)
    assert said == translate(built, tokenizer, source.read_text().split("\n")[:-1], beams=1, branches=1)
    monkeypatch.setattr("sys.stdin", _Input(source.read_bytes()))
    assert main(["translate", str(run)]) == 0
    assert capsys.readouterr().out == out.read_text()


class _Input:
    def __init__(self, content: bytes) -> None:
        import io

        self.buffer = io.BytesIO(content)

    def isatty(self) -> bool:
        return False


def test_long_sentences_are_cut_and_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built, tokenizer = paradepth.from_pretrained(run), load_tokenizer(run)
    short, long = NUMBERS[0][0], " ".join(["eins"] * 40)
    assert too_long(built, tokenizer, [short, long]) == [2]
    with pytest.warns(UserWarning, match="1 sentence"):
        said = translate(built, tokenizer, [short, long])
    assert said[0] == NUMBERS[0][1]
    assert main(["translate", str(run), short, long, "--json"]) == 0
    captured = capsys.readouterr()
    assert "longer than the model's 24 tokens, and so cut: sentences 2" in captured.err
    assert json.loads(captured.out)["cut"] == [2]
    assert json.loads(captured.out)["translations"] == said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eins", "--file", "x.txt"], "sentences or a file, and it was given both"),
        (["--file", "missing.txt"], "missing.txt cannot be read"),
        (["eins", "--out", "missing/out.txt"], "in a folder that exists"),
        (["eins", "--beams", "0"], "beams is 0; it must be at least 1"),
        (["eins", "--batch-size", "0"], "batch_size is 0"),
        (["eins", "--branches", "3"], "branches is 3; this model has 2"),
        (["eins", "--max-tokens", "25"], "max_tokens is 25; it must be between 1 and 24"),
        (["eins", "--length-penalty", "-1"], "length_penalty is -1.0"),
    ],
)
def test_the_command_refuses_in_words(
    run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["translate", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_not_utf8_leaves_the_old_output(run: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_bytes(b"eins\nz\xfcei\n")
    out.write_text("old")
    assert main(["translate", str(run), "--file", str(source), "--out", str(out)]) == 2
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.txt"]


def test_another_tokeniser_and_another_model_are_refused(run: Path, tmp_path: Path) -> None:
    from paradepth.data import ByteTokenizer

    built = paradepth.from_pretrained(run)
    with pytest.raises(ValueError, match="the tokeniser has 260 tokens and the model a vocabulary of"):
        translate(built, ByteTokenizer(special=True), ["eins"])
    paradepth.create_model("vit_nano", image_size=8, patch_size=4, depth=1).save_pretrained(tmp_path / "vit")
    assert main(["translate", str(tmp_path / "vit"), "eins"]) == 2


def test_the_published_size_is_what_the_paper_states() -> None:
    chosen = get_recipe("opus_published")
    with torch.device("meta"):
        built = paradepth.create_model(chosen.model_options.model)
    c = built.config
    assert (c.depth, c.layers, c.width, c.heads, c.mlp, c.context) == (6, 12, 512, 8, 2048, 274)
    o, d = chosen.optimiser_options, chosen.depth_options
    assert (o.batch_size, o.learning_rate, o.decay, o.label_smoothing) == (8, 5e-4, "inverse_sqrt", 0.1)
    assert o.warmup * 160_000 == 8_000
    assert (d.levels, d.coarsening, d.forward_iterations, d.backward_iterations) == (2, 3, 2, 1)
