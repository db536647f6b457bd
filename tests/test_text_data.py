"""Text: reading, cutting and encoding a corpus, and windows that are a pure function of (seed, pass, batch)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paradepth.data import BPETokenizer, TextBatches, TextData, corpus, load_text
from paradepth.data.corpus import Segment, cut, read_bytes, read_text, token_tensor
from paradepth.data.text_batches import ordered_windows

sizes = {"length": st.integers(80, 300), "context": st.integers(1, 12), "batch_size": st.integers(1, 4)}


def whole(data: TextData) -> bytes:
    return bytes(torch.cat([data.train, data.validation, data.test]).tolist())


def test_a_file_is_cut_into_contiguous_parts(tmp_path: Path) -> None:
    content = bytes(range(256)) * 4 + "Käse".encode()
    (tmp_path / "any.md").write_bytes(content)
    data = load_text("text", data_dir=tmp_path / "any.md")
    assert whole(data) == content
    assert data.train.dtype == torch.uint8
    assert [len(part) for part in (data.train, data.validation, data.test)] == [927, 51, 51]
    other = load_text("text", data_dir=tmp_path / "any.md", validation_fraction=0.2)
    assert torch.equal(other.test, data.test)
    assert len(other.validation) == 206
    assert whole(other) == content


def test_a_folder_is_joined_in_the_order_of_names(tmp_path: Path) -> None:
    for name, letter in (("b.txt", "b"), ("a.txt", "a"), ("c.md", "c")):
        (tmp_path / name).write_text(letter * 50)
    assert whole(load_text("text", data_dir=tmp_path)) == b"a" * 50 + b"b" * 50


@pytest.mark.parametrize("place", ["input.txt", "tiny_shakespeare/input.txt"])
def test_tiny_shakespeare_is_found_in_its_folder_or_the_one_above(place: str, tmp_path: Path) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("First Citizen: " * 20)
    data = load_text("tiny_shakespeare", data_dir=tmp_path)
    assert data.name == "tiny_shakespeare"
    assert whole(data).startswith(b"First Citizen")


def test_what_is_missing_or_too_short_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("To be")
    (tmp_path / "empty").mkdir()
    cases: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("poems", {}, "Known: tiny_shakespeare, text"),
        ("tiny_shakespeare", {}, r"https://.*input\.txt.*data_dir"),
        ("tiny_shakespeare", {"data_dir": tmp_path}, "has neither input.txt"),
        ("text", {}, "needs data_dir"),
        ("text", {"data_dir": tmp_path / "nothing"}, "neither a file nor a folder"),
        ("text", {"data_dir": tmp_path / "empty"}, r"no \*\.txt files"),
        ("text", {"data_dir": tmp_path}, "has 5 bytes: too short"),
        ("text", {"data_dir": tmp_path, "validation_fraction": 0.95}, "validation_fraction is 0.95"),
        ("text", {"data_dir": tmp_path, "validation_fraction": 0.0}, "validation_fraction is 0.0"),
    )
    for name, options, words in cases:
        with pytest.raises(ValueError, match=words):
            load_text(name, **options)


# ---- tables and files of splits ----------------------------------------------------------------------------------

DOCUMENTS = {
    "train": ["to be or not\n", "to be", "", "größe 木 😀"],
    "validation": ["that is"],
    "test": ["the question"],
}


def write_table(path: Path, texts: list[Any]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path)
    else:
        path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts) + "\n")


def joined(texts: list[str]) -> bytes:
    return "".join(text if text.endswith("\n") else text + "\n" for text in texts if text).encode()


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_table_has_its_own_splits(suffix: str, tmp_path: Path) -> None:
    for split, texts in DOCUMENTS.items():
        write_table(tmp_path / f"{split}{suffix}", texts)
    (tmp_path / "notes.txt").write_text("not for training")
    data = load_text("text", data_dir=tmp_path)
    for split, texts in DOCUMENTS.items():
        assert bytes(getattr(data, split).tolist()) == joined(texts)
        assert data.sizes[split] == len(joined(texts))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_splits_that_a_table_lacks_are_cut_from_its_training_text(suffix: str, tmp_path: Path) -> None:
    many = [f"{n} größe Flaschen" for n in range(60)]
    write_table(tmp_path / f"train-00000-of-00002{suffix}", many[:31])
    write_table(tmp_path / f"train-00001-of-00002{suffix}", many[31:])
    write_table(tmp_path / f"test{suffix}", ["a test"])
    data = load_text("text", data_dir=tmp_path, validation_fraction=0.1)
    text = joined(many)
    assert bytes(torch.cat([data.train, data.validation]).tolist()) == text
    assert len(data.validation) == round(0.1 * len(text))
    assert bytes(data.test.tolist()) == b"a test\n"
    alone = load_text("text", data_dir=tmp_path / f"train-00000-of-00002{suffix}")
    assert whole(alone) == joined(many[:31])


def test_text_files_named_after_splits_are_the_splits(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a" * 200)
    (tmp_path / "other.txt").write_text("o" * 200)
    assert whole(load_text("text", data_dir=tmp_path)) == b"o" * 200 + b"a" * 200, "one name alone means nothing"
    (tmp_path / "validation.txt").write_text("v" * 20)
    data = load_text("text", data_dir=tmp_path)
    assert [bytes(getattr(data, split).tolist())[:1] for split in ("train", "validation", "test")] == [b"a", b"v", b"a"]
    assert [len(data.train), len(data.validation), len(data.test)] == [190, 20, 10]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train.jsonl", b'{"text": "a"}\n{"text": 3}\n', "row 1: text is 3, but must be a text"),
        ("train.jsonl", b'{"text": "a"}\nnothing\n', "line 2 is not JSON in UTF-8"),
        ("train.jsonl", b'{"text": "\xff"}\n', "line 1 is not JSON in UTF-8"),
        ("train.jsonl", b'{"words": "a"}\n', "line 1 has no 'text'"),
        ("train.jsonl", b'{"text": "a\\ud800"}\n', "row 0: text holds half a character at 1"),
        ("train.jsonl", b"", "has 0 bytes: too short"),
        ("train.parquet", b"PAR1 but not really", "train.parquet cannot be read as parquet"),
        ("validation.jsonl", b"", r"validation\.jsonl has 0 bytes of text: too short for a validation split"),
    ],
)
def test_tables_that_are_none_are_refused_in_words(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    write_table(tmp_path / "train.jsonl", ["enough text for two splits"] * 9)
    if name == "train.parquet":
        (tmp_path / "train.jsonl").unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load_text("text", data_dir=tmp_path)


def test_a_parquet_file_without_text_is_refused_in_words(tmp_path: Path) -> None:
    pq.write_table(pa.table({"words": ["a"]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="has the columns words; expected one called 'text'"):
        load_text("text", data_dir=tmp_path)
    write_table(tmp_path / "train.parquet", ["a", None])
    with pytest.raises(ValueError, match="row 1: text is None"):
        load_text("text", data_dir=tmp_path)


# ---- pieces and tokens -------------------------------------------------------------------------------------------

WORDS = st.lists(
    st.sampled_from(["the", "größe", "木木", "😀", " ", "  ", "\n", "\n\n", "a1", ".", "\u3000", "'s"]), max_size=40
)


@given(words=WORDS, piece=st.integers(1, 9), share=st.floats(0, 1))
def test_pieces_are_the_text_and_a_character_belongs_where_it_starts(
    words: list[str], piece: int, share: float
) -> None:
    text = "".join(words)
    content, middle = text.encode(), round(share * len(text.encode()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE", piece)
        with tempfile_of(content) as path:
            parts = [part for parts in cut([path], [middle, len(content) - middle]) for part in parts]
            assert b"".join(b for part in parts for b in read_bytes(part)) == content
            assert all(len(b) <= piece for part in parts for b in read_bytes(part))
            texts = ["".join(read_text(part)) for part in parts]
    assert "".join(texts) == text
    if len(texts) == 2:
        assert len(texts[0].encode()) - middle in range(4)


class tempfile_of:
    """A file with this content, for as long as it is needed; hypothesis does not go with tmp_path."""

    number = 0

    def __init__(self, content: bytes) -> None:
        tempfile_of.number += 1
        self.path = Path(os.environ["PARADEPTH_CACHE"]) / f"text-{os.getpid()}-{tempfile_of.number}.txt"
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_bytes(content)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *error: object) -> None:
        self.path.unlink()


BPE = BPETokenizer.train(["the größe the größe 木木 😀 the\n\n  of 'tis a1's "] * 5, vocab_size=300)


@given(words=WORDS, piece=st.integers(4, 30))
def test_encoding_in_pieces_is_encoding_at_once(words: list[str], piece: int) -> None:
    text = "".join(words)
    with pytest.MonkeyPatch.context() as patch, tempfile_of(text.encode()) as path:
        patch.setattr(corpus, "PIECE", piece)
        # Where a line has no space to cut at the pieces grow to four times the size; no text here is that long.
        patch.setattr(corpus, "_TOGETHER", 2)
        tokens = token_tensor((Segment(path, 0, len(text.encode())),), BPE)
    if not any(len(word) > 3 * piece for word in text.split()):
        assert tokens.tolist() == BPE.encode(text)
    assert BPE.decode(tokens.tolist()) == text


def test_a_corpus_by_bpe_is_the_text_of_each_split_encoded(tmp_path: Path) -> None:
    content = ("größe 木 the cat\n\n" * 400).encode()
    (tmp_path / "a.txt").write_bytes(content[:5001])  # within a character, perhaps: a file has to stand by itself
    (tmp_path / "a.txt").write_text(content[:5001].decode(errors="ignore"))
    (tmp_path / "b.txt").write_text("and the dog 😀 " * 300)
    data = load_text("text", data_dir=tmp_path, tokenizer="bpe", vocab_size=400)
    everything = (tmp_path / "a.txt").read_text() + (tmp_path / "b.txt").read_text()
    assert isinstance(data.tokenizer, BPETokenizer)
    assert data.vocab_size == data.tokenizer.vocab_size <= 400
    assert data.train.dtype == torch.uint16
    texts = [data.tokenizer.decode(getattr(data, split).tolist()) for split in ("train", "validation", "test")]
    assert "".join(texts) == everything
    for split, text in zip(("validation", "test"), texts[1:], strict=True):
        assert getattr(data, split).tolist() == data.tokenizer.encode(text)
        assert abs(data.sizes[split] - len(text.encode())) < 4
        assert data.bytes_per_token(split) == pytest.approx(data.sizes[split] / len(getattr(data, split)))
    as_bytes = load_text("text", data_dir=tmp_path)
    assert dict(as_bytes.sizes) == dict(data.sizes), "the same splits for every tokeniser"
    assert as_bytes.bytes_per_token("train") == 1


def test_large_vocabularies_take_four_bytes_a_token(tmp_path: Path) -> None:
    class Wide(BPETokenizer):
        def encode_many(self, texts: Any) -> list[list[int]]:
            return [[token + 70_000 for token in tokens] for tokens in super().encode_many(texts)]

        @property
        def identity(self) -> str:
            return "wide"

    wide = Wide(BPE.inner)
    wide.vocab_size = 71_000
    (tmp_path / "a.txt").write_text("the größe")
    tokens = token_tensor(cut([tmp_path / "a.txt"], [11])[0], wide)
    assert tokens.dtype == torch.int32
    assert (tokens - 70_000).tolist() == BPE.encode("the größe")


@pytest.mark.parametrize("content", [b"the caf\xe9 is open " * 30, "größe ".encode() * 30 + b"\xc3"])
def test_text_that_is_not_utf8_is_refused_with_its_place(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "PIECE", 5)
    path = tmp_path / "latin.txt"
    path.write_bytes(content)
    with pytest.raises(UnicodeDecodeError) as error:
        content.decode()
    (part,) = cut([path], [len(content)])[0]
    with pytest.raises(ValueError, match=rf"latin\.txt is not UTF-8 at byte {error.value.start:,},.*iconv"):
        list(read_text(part))
    choices: tuple[dict[str, Any], ...] = (
        {"tokenizer": "bpe", "vocab_size": 300},
        {"tokenizer": str(BPE.save(tmp_path))},
    )
    for options in choices:
        with pytest.raises(ValueError, match=r"is not UTF-8 at byte"):
            load_text("text", data_dir=path, **options)
    assert whole(load_text("text", data_dir=path)) == content


# ---- the file of tokens ------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PARADEPTH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def encoded(path: Path, tokenizer: Any = BPE) -> list[int]:
    return token_tensor(cut([path], [path.stat().st_size])[0], tokenizer).tolist()


def test_tokens_are_found_again_until_text_or_tokeniser_change(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("the größe " * 50)
    calls: list[int] = []
    once = BPETokenizer.encode_many
    monkeypatch.setattr(BPETokenizer, "encode_many", lambda self, texts: calls.append(1) or once(self, texts))
    first = encoded(path)
    assert encoded(path) == first == BPE.encode("the größe " * 50)
    assert len(calls) == 1
    other = BPETokenizer.train(["größe"], vocab_size=270)
    assert encoded(path, other) == other.encode("the größe " * 50)
    path.write_text("the cat " * 50)
    assert encoded(path) == BPE.encode("the cat " * 50)
    assert len(calls) == 3
    assert [p.suffix for p in cache.iterdir() if not p.name.startswith(".")] == [".tokens"] * 3
    assert not list(cache.glob("*.tmp")) + list(cache.glob(".*.tmp"))


@pytest.mark.parametrize("damage", ["flip", "shorten", "empty", "header"])
def test_a_damaged_file_of_tokens_is_made_anew(damage: str, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("the größe " * 50)
    first = encoded(path)
    (file,) = cache.glob("*.tokens")
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-5] ^= 1
    elif damage == "shorten":
        del content[-2:]
    elif damage == "empty":
        content.clear()
    else:
        content[5] ^= 64
    file.write_bytes(content)
    assert encoded(path) == first
    assert encoded(path) == first


def test_an_error_while_encoding_leaves_no_file(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"the cat " * 50 + b"\xff")
    with pytest.raises(ValueError, match="not UTF-8 at byte 400"):
        encoded(path)
    assert not [p for p in cache.iterdir() if p.suffix != ".lock"]


def test_a_cache_that_cannot_be_written_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PARADEPTH_CACHE", str(tmp_path / "file" / "cache"))
    path = tmp_path / "a.txt"
    path.write_text("the größe " * 50)
    with pytest.warns(UserWarning, match="tokens cannot be cached"):
        assert encoded(path) == BPE.encode("the größe " * 50)
    with pytest.warns(UserWarning, match="cannot be cached"):
        data = load_text("text", data_dir=path, tokenizer="bpe", vocab_size=300)
    assert data.tokenizer.decode(data.train.tolist()).startswith("the größe")


def test_processes_that_start_together_make_one_file(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the größe of the cat\n" * 5000)
    code = (
        "import sys; from paradepth.data import load_text;"
        "d = load_text('text', data_dir=sys.argv[1], tokenizer='bpe', vocab_size=300);"
        "print(d.tokenizer.identity, int(d.train.long().sum()))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.txt")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = {process.communicate(timeout=200)[0] for process in running}
    assert [process.returncode for process in running] == [0] * 2
    assert len(outputs) == 1
    assert len(list(cache.glob("*.tokens"))) == 3
    assert len(list(cache.glob("*.tokenizer.json"))) == 1


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_large_corpus_is_never_in_memory(
    tokenizer: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "PIECE", 2**13)
    monkeypatch.setattr(corpus, "_TOGETHER", 1)
    monkeypatch.setattr(corpus, "_IN_MEMORY", 2**16)
    line = "the größe of the cat and of the dog\n"
    with open(tmp_path / "a.txt", "w") as file:
        file.writelines([line] * 50_000)
    size = (tmp_path / "a.txt").stat().st_size
    options: dict[str, Any] = {"vocab_size": 300} if tokenizer == "bpe" else {}
    tracemalloc.start()
    data = load_text("text", data_dir=tmp_path / "a.txt", tokenizer=tokenizer, **options)
    batches = TextBatches(data.train, 64, 8, seed=0)
    inputs, targets = batches.get(0, 3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < size / 4
    for row, start in enumerate(batches.starts(0, 3).tolist()):
        assert torch.equal(inputs[row], data.train[start : start + 64].long())
        assert torch.equal(targets[row], data.train[start + 1 : start + 65].long())
    assert data.tokenizer.decode(data.test.tolist()).endswith(line)
    assert sum(data.sizes.values()) == size


# ---- windows -----------------------------------------------------------------------------------------------------


@given(**sizes, seed=st.integers(0, 5))
def test_in_a_pass_every_token_is_an_input_once_and_a_target_once(
    length: int, context: int, batch_size: int, seed: int
) -> None:
    batches = TextBatches(torch.arange(length), context, batch_size, seed)
    for pass_index in (0, 1):
        got = [batches.get(pass_index, index) for index in range(len(batches))]
        inputs, targets = (torch.cat(parts) for parts in zip(*got, strict=True))
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.shape == targets.shape == (len(batches) * batch_size, context)
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert len(inputs.unique()) == inputs.numel()
        # Left out: less than two windows at the ends, and what fills no batch.
        assert length - inputs.numel() < 2 * context + (batch_size - 1) * context + 1


@given(**sizes, order=st.permutations(range(4)))
def test_a_batch_depends_on_seed_pass_and_number_alone(
    length: int, context: int, batch_size: int, order: list[int]
) -> None:
    tokens = torch.arange(length)
    first, second = (TextBatches(tokens, context, batch_size, 3) for _ in range(2))
    expected = {(p, b): first.get(p, b) for p in range(4) for b in range(min(len(first), 3))}
    for pass_index in order:
        for index in reversed(range(min(len(second), 3))):
            for a, b in zip(second.get(pass_index, index), expected[pass_index, index], strict=True):
                assert torch.equal(a, b)


def test_passes_and_seeds_differ_in_start_and_order() -> None:
    tokens = torch.arange(1000)
    starts = [TextBatches(tokens, 16, 8, seed).starts(p, 0) for seed in (0, 1) for p in (0, 1, 2)]
    assert len({tuple(s.tolist()) for s in starts}) == 6
    assert len({int(s[0]) % 16 for s in starts}) > 2, "each pass cuts the text elsewhere"


@given(world_size=st.integers(1, 4), per_rank=st.integers(1, 3))
def test_the_slices_of_the_ranks_are_the_batch_of_one_process(world_size: int, per_rank: int) -> None:
    tokens, size = torch.randint(256, (400,), dtype=torch.uint8), world_size * per_rank
    one = TextBatches(tokens, 8, size, 0)
    many = [TextBatches(tokens, 8, size, 0, rank, world_size) for rank in range(world_size)]
    for index in range(len(one)):
        for whole_batch, *slices in zip(one.get(1, index), *(b.get(1, index) for b in many), strict=True):
            assert torch.equal(torch.cat(slices), whole_batch)


@given(length=st.integers(0, 100), context=st.integers(1, 12))
def test_ordered_windows_do_not_overlap(length: int, context: int) -> None:
    inputs, targets = ordered_windows(torch.arange(length), context)
    assert inputs.shape == targets.shape == (max(length - 1, 0) // context, context)
    assert inputs.flatten().tolist() == list(range(inputs.numel()))
    assert torch.equal(targets, inputs + 1)


def test_batches_that_cannot_be_are_refused() -> None:
    tokens = torch.zeros(100, dtype=torch.uint8)
    cases = (
        ((0, 4, 0), "context is 0"),
        ((8, 12, 0), "only 11 windows of 8"),
        ((8, 0, 0), "positive multiple"),
        ((8, 3, 0, 0, 2), "multiple of the 2"),
        ((8, 4, 0, 2, 2), "rank 2 of 2"),
    )
    for options, words in cases:
        with pytest.raises(ValueError, match=words):
            TextBatches(tokens, *options)  # pyright: ignore[reportArgumentType]
    batches = TextBatches(tokens, 8, 4, 0)
    for place in ((-1, 0), (0, 2), (0, -1)):
        with pytest.raises(IndexError, match="does not exist"):
            batches.get(*place)
