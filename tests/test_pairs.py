"""Pairs of sentences: every layout of files, splits, tokens, batches, and bad input in words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paradepth.data.pairs import PairData, decode_lines, load_pairs
from paradepth.distributed import World
from paradepth.train import Config
from paradepth.train.step import IGNORED
from paradepth.train.tasks import load_data
from paradepth.train.tasks.translation import TranslationTask

NUMBERS = [("eins", "one"), ("zwei", "two"), ("drei", "three"), ("vier", "four"), ("fünf", "five")]


def sentences(count: int, shift: int = 0) -> list[tuple[str, str]]:
    """Different pairs of numbers in words."""
    chosen = []
    for i in range(shift, shift + count):
        digits, rest = [], i
        while True:
            rest, digit = divmod(rest, 5)
            digits.append(NUMBERS[digit])
            if not rest:
                break
        chosen.append((" ".join(d for d, _ in digits), " ".join(e for _, e in digits)))
    return chosen


def write_jsonl(path: Path, pairs: Sequence[tuple[str, str]]) -> None:
    lines = [json.dumps({"en": en, "de": de, "id": i}, ensure_ascii=False) for i, (de, en) in enumerate(pairs)]
    path.write_text("\n".join(lines) + "\n")


def write_texts(folder: Path, stem: str, pairs: Sequence[tuple[str, str]], *, end: str = "\n") -> None:
    for side, language in enumerate(("de", "en")):
        folder.joinpath(f"{stem}.{language}").write_text("".join(pair[side] + end for pair in pairs), newline="")


def load(place: Path, **options: Any) -> PairData:
    return load_pairs("pairs", data_dir=place, **{"languages": ("de", "en"), "tokenizer": "bytes", **options})


def test_every_layout_gives_the_same_pairs(tmp_path: Path) -> None:
    train, validation, test = sentences(30), sentences(6, 100), sentences(7, 200)
    (tmp_path / "json").mkdir()
    (tmp_path / "texts").mkdir()
    for stem, pairs in (("train", train), ("val", validation), ("test", test)):
        write_jsonl(tmp_path / "json" / f"{stem}.jsonl", pairs)
        write_texts(tmp_path / "texts", stem.replace("val", "dev"), pairs, end="\r\n")
    for data in (load(tmp_path / "json"), load(tmp_path / "texts")):
        assert data.train.texts == train
        assert data.validation.texts == validation
        assert data.test.texts == test
    swapped = load(tmp_path / "json", languages=("en", "de"))
    assert swapped.train.texts == [(b, a) for a, b in train]
    named = load_pairs("multi30k", data_dir=tmp_path / "json", tokenizer="bytes")
    assert named.languages == ("de", "en")
    (tmp_path / "json").rename(tmp_path / "multi30k")
    assert load_pairs("multi30k", data_dir=tmp_path, tokenizer="bytes").train.texts == named.train.texts


def test_the_hub_has_multi30k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stem, pairs in (("train", sentences(9)), ("val", sentences(3, 50)), ("test", sentences(4, 70))):
        write_jsonl(tmp_path / f"{stem}.jsonl", pairs)
    asked = []

    def download(repository: str, name: str, *, repo_type: str) -> str:
        asked.append((repository, name, repo_type))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    data = load_pairs("multi30k", tokenizer="bytes")
    assert (len(data.train), len(data.validation), len(data.test)) == (9, 3, 4)
    assert asked == [("bentrevett/multi30k", f"{stem}.jsonl", "dataset") for stem in ("train", "val", "test")]

    def absent(*args: Any, **options: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", absent)
    with pytest.raises(ValueError, match=r"train.jsonl of bentrevett/multi30k cannot be fetched.*pass data_dir"):
        load_pairs("multi30k")


def test_one_corpus_is_cut_into_splits_that_share_nothing(tmp_path: Path) -> None:
    pairs = sentences(200)
    write_jsonl(tmp_path / "all.jsonl", pairs)
    write_texts(tmp_path, "corpus", pairs)
    for place in (tmp_path / "all.jsonl", tmp_path / "corpus"):
        data = load(place, validation_fraction=0.1)
        assert (len(data.train), len(data.validation), len(data.test)) == (171, 19, 10)
        assert sorted(data.train.texts + data.validation.texts + data.test.texts) == sorted(pairs)
    other = load(tmp_path / "all.jsonl", validation_fraction=0.1, seed=1)
    assert other.test.texts == data.test.texts
    assert other.validation.texts != data.validation.texts


def test_tokens_have_their_marks_and_one_vocabulary_serves_both_languages(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", sentences(120))
    data = load(tmp_path, tokenizer=None, vocab_size=280)
    tokenizer = data.tokenizer
    assert 260 < tokenizer.vocab_size <= 280
    start, end = tokenizer.special("<s>"), tokenizer.special("</s>")
    for i, (source, target) in enumerate(data.train.texts):
        assert data.train.sources[i].tolist() == [*tokenizer.encode(source), end]
        assert data.train.targets[i].tolist() == [start, *tokenizer.encode(target), end]
        assert tokenizer.decode(data.train.targets[i].tolist()) == target
    assert max(len(tokenizer.encode(word)) for pair in NUMBERS for word in pair) < 5  # words of both were merged


def test_lines_are_cut_at_line_feeds_only() -> None:
    text = "ein\u2028zwei\x0bdrei\r\nvier\n"
    assert decode_lines(text.encode(), "it") == ["ein\u2028zwei\x0bdrei\r", "vier"]
    assert decode_lines(b"\xef\xbb\xbfone\n\ntwo", "it") == ["one", "", "two"]


def test_blank_training_pairs_are_left_out_and_counted(tmp_path: Path) -> None:
    pairs = sentences(20)
    write_texts(tmp_path, "train", [*pairs[:10], ("", "nothing"), ("nichts", "  "), *pairs[10:]])
    write_texts(tmp_path, "validation", pairs[:3])
    write_texts(tmp_path, "test", pairs[:3])
    data = load(tmp_path)
    assert (data.blank, data.train.texts) == (2, pairs)
    write_texts(tmp_path, "test", [pairs[0], ("zwei", "")])
    with pytest.raises(ValueError, match="pair 2 of the test split has no en text"):
        load(tmp_path)


def _refused(tmp_path: Path, kind: str) -> dict[str, Any]:
    """Writes bad data and returns options for it."""
    write_jsonl(tmp_path / "train.jsonl", sentences(10))
    texts = tmp_path / "texts"
    texts.mkdir()
    write_texts(texts, "train", sentences(10))
    if kind == "unaligned":
        (texts / "train.en").write_text("one\n" * 7)
    elif kind == "one side":
        (texts / "train.de").unlink()
    elif kind == "empty":
        (texts / "train.en").write_text(" \n")
    elif kind == "encoding":
        (texts / "train.en").write_bytes(b"one\ntwo\nfa\xe7ade\n")
    elif kind == "blank":
        write_texts(texts, "train", [("", "one"), ("zwei", "")])
    elif kind == "few":
        write_texts(texts, "train", sentences(1))
    elif kind == "json":
        with (tmp_path / "train.jsonl").open("a") as file:
            file.write("{'de': 1}\n")
    elif kind == "no object":
        (tmp_path / "train.jsonl").write_text("[1]\n")
    elif kind == "no text":
        (tmp_path / "train.jsonl").write_text('{"de": "eins", "en": 1}\n')
    elif kind == "nothing":
        (tmp_path / "train.jsonl").unlink()
    folders = {"unaligned", "one side", "empty", "encoding", "blank", "few"}
    return {
        "name": "pairs",
        "languages": ("de", "en"),
        "tokenizer": "bytes",
        "data_dir": texts if kind in folders else tmp_path,
    }


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("unaligned", {}, r"train\.de has 10 lines and .*train\.en has 7"),
        ("one side", {}, r"there is .*train\.en but no .*train\.de"),
        ("empty", {}, r"train\.en is empty"),
        ("encoding", {}, r"train\.en is not UTF-8: line 3 has the byte 0xe7"),
        ("blank", {}, "holds no pair of sentences"),
        ("few", {}, "has 1 pairs: too few to hold out a test split"),
        ("json", {}, r"train\.jsonl, line 11 is not JSON"),
        ("no object", {}, r"line 1 is no JSON object with the keys de and en"),
        ("no text", {}, r"has no text 'en'; languages are de and en, and there are texts under de"),
        ("nothing", {}, r"has neither train\.jsonl nor train\.de and train\.en"),
        ("fine", {"languages": ("de", "xx")}, r"line 1 has no text 'xx'.*and there are texts under en, de"),
        ("fine", {"languages": ("de", "de")}, "languages are de, de; they must be two different ones"),
        ("fine", {"languages": None}, "needs languages"),
        ("fine", {"data_dir": None}, "needs data_dir"),
        ("fine", {"data_dir": "/nowhere/x"}, r"neither a file nor a folder, and there is no /nowhere/x\.de either"),
        ("fine", {"name": "pears"}, "unknown pairs 'pears'. Known: multi30k, pairs"),
        ("fine", {"validation_fraction": 1.0}, "strictly between 0 and 1"),
        ("fine", {"tokenizer": "bpe", "vocab_size": 12}, "vocab_size is 12; a BPE needs at least 260"),
        ("fine", {"vocab_size": 300}, "only a BPE is given a size"),
    ],
)
def test_bad_input_is_told_in_words(tmp_path: Path, kind: str, options: dict[str, Any], message: str) -> None:
    chosen = {**_refused(tmp_path, kind), **options}
    with pytest.raises(ValueError, match=message):
        load_pairs(chosen.pop("name"), **chosen)


# ---- batches -----------------------------------------------------------------------------------------------------


def task(place: Path, **options: Any) -> TranslationTask:
    chosen = {"model": "translator_nano", "data": "pairs", "languages": ("de", "en"), "tokenizer": "bytes"}
    loaded = load_data(Config().replace(**{**chosen, "data_dir": place, "batch_size": 8, **options}))
    assert isinstance(loaded, TranslationTask)
    return loaded


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "train.jsonl", sentences(60))
    write_jsonl(folder / "validation.jsonl", sentences(11, 100))
    write_jsonl(folder / "test.jsonl", [*sentences(5, 200), (" ".join(["eins"] * 9), " ".join(["one"] * 12))])
    return folder


@given(st.integers(0, 3), st.sampled_from([1, 2, 4]))
def test_a_batch_teaches_every_target_token_once(corpus: Path, number: int, processes: int) -> None:
    used = task(corpus, context=40)
    pad, start, end = (used.data.tokenizer.special(name) for name in ("<pad>", "<s>", "</s>"))
    seen = []
    worlds = [World(rank, processes, torch.device("cpu")) for rank in range(processes)]
    parts = [used.batches(world) for world in worlds]
    for batch in range(len(parts[0])):
        for part in parts:
            (source_BS, target_BT), wanted_BT = part.get(number, batch)
            assert target_BT.shape == wanted_BT.shape
            assert len(source_BS) == len(target_BT) == 8 // processes
            for source, target, wanted in zip(source_BS, target_BT, wanted_BT, strict=True):
                text = source[source != pad].tolist()
                real = wanted[wanted != IGNORED].tolist()
                assert text[-1] == end
                assert (target[0], real[-1]) == (start, end)
                assert target[1 : len(real)].tolist() == real[:-1]
                assert (wanted[len(real) :] == IGNORED).all()
                assert (target[len(real) + 1 :] == pad).all()
                seen.append((used.data.tokenizer.decode(text), used.data.tokenizer.decode(real)))
    assert len(seen) == len(set(seen)) == 56
    assert set(seen) <= set(used.data.train.texts)


def test_all_pairs_of_a_split_are_evaluated_once_and_long_ones_are_cut(corpus: Path) -> None:
    used = task(corpus, context=40)
    found = [used.ordered("test", start, start + 4) for start in (0, 4)]
    assert [len(targets) for _, targets in found] == [4, 2]
    (source_BS, target_BT), wanted_BT = found[1]
    assert source_BS.shape == target_BT.shape == wanted_BT.shape == (2, 40)
    assert not (source_BS[-1] == used.data.tokenizer.special("<pad>")).any()
    assert (wanted_BT[-1] != IGNORED).all()
    counted = sum(int((targets != IGNORED).sum()) for _, targets in found)
    assert counted == sum(min(len(target.encode()) + 1, 40) for _, target in used.data.test.texts)


def test_training_pairs_that_are_too_long_are_left_out_and_counted(corpus: Path) -> None:
    """A token is a byte, and one marks the end."""
    kept = [pair for pair in sentences(60) if max(len(side.encode()) for side in pair) < 10]
    long = 60 - len(kept)
    assert 8 <= len(kept) < 60
    with pytest.warns(UserWarning, match=f"with a blank side, {long} with a side longer than 10 tokens"):
        used = task(corpus, context=10)
    assert used.data.train.texts == kept
    assert (used.count("train"), used.data.long) == (len(kept), long)
    moved = used.to("cpu")
    assert (moved.count("train"), moved.data.long) == (len(kept), long)
    with pytest.raises(ValueError, match="context is 3; all 60 training pairs"):
        task(corpus, context=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "gpt_nano"}, "model is 'gpt_nano', which is not for pairs of sentences"),
        ({"flip": True}, "flip is True; it means nothing to data 'pairs'"),
        ({"patch_size": 2}, "patch_size is 2; it means nothing to data 'pairs'"),
        ({"data": "digits", "data_dir": None}, "not for images"),
    ],
)
def test_options_that_do_not_belong_are_refused(corpus: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(corpus, **options)
