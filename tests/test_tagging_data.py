"""Data for tagging: CoNLL-U by hand, hashed words, and samples in which every word is scored once."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paradepth.data import tagged_hub
from paradepth.data.tag_data import encode_treebank, pieces, sample_lengths
from paradepth.data.tagged import Sentence, read_conllu
from paradepth.data.treebank import Treebank, load_tagged
from paradepth.data.words import OWN, UNKNOWN, WordVocabulary, load_words, split_words
from paradepth.train.step import IGNORED
from paradepth.train.tasks.tagging import TaggingTask
from tagging_helpers import config, grammar, rows

BY_HAND = """\
# newdoc id = a
# text = They can't go home. (2-3 is one token, 3.1 was left out)
1\tThey\tthey\tPRON\tPRP\tPerson=3|Case=Nom\t4\tnsubj\t4:nsubj\t_
2-3\tcan't\t_\t_\t_\t_\t_\t_\t_\t_
2\tca\tcan\tAUX\tMD\tVerbForm=Fin\t4\taux\t4:aux\tSpaceAfter=No
3\tn't\tnot\tPART\tRB\tPolarity=Neg\t4\tadvmod\t4:advmod\t_
3.1\twant\twant\tVERB\tVB\tVerbForm=Inf\t_\t_\t0:root\tCopyOf=4
4\tgo\tgo\tVERB\tVB\tVerbForm=Inf\t0\troot\t0:root\t_
5\thome\thome\tADV\tRB\t_\t4\tadvmod\t4:advmod\tSpaceAfter=No
6\t.\t.\tPUNCT\t.\t_\t4\tpunct\t4:punct\t_

# a comment before nothing


1\tNew York\tNew York\t_\t_\t_\t0\troot\t_\t_
"""


# ---- files -------------------------------------------------------------------------------------------------------


def test_words_are_tagged_and_multiword_tokens_and_empty_nodes_are_not(tmp_path: Path) -> None:
    path = tmp_path / "a.conllu"
    path.write_text(BY_HAND)
    expected = (
        Sentence(
            ("They", "ca", "n't", "go", "home", "."),
            ("PRON", "AUX", "PART", "VERB", "ADV", "PUNCT"),
            ("Case=Nom|Person=3", "VerbForm=Fin", "Polarity=Neg", "VerbForm=Inf", "_", "_"),
        ),
        Sentence(("New York",), ("_",), ("_",)),
    )
    assert read_conllu(path) == expected
    assert expected[0].labels("both")[0] == "PRON|Case=Nom|Person=3"
    assert expected[1].labels("both") == ("_",)
    path.write_bytes(b"\xef\xbb\xbf" + BY_HAND.rstrip().replace("\n", "\r\n").encode())
    assert read_conllu(path) == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no sentences"),
        (b"# only a comment\n\n\n", "has no sentences"),
        (b"1\tD\xffgs\t_\n", "line 1: not UTF-8"),
        (BY_HAND.encode() + b"\n" + b"1\ta\t_\n", "line 17: 3 columns; CoNLL-U has 10"),
        (rows(("a", "X", "_")).replace("\t", "    ").encode(), "line 1: 1 columns"),
        (rows(("a", "X", "_"), ("b", "X", "_")).replace("2\tb", "3\tb").encode(), "line 2: word 3 follows word 1"),
        (b"# text\n" + rows(("a", "X", "_")).replace("1\ta", "one\ta").encode(), "line 2: .*'one' is not a valid ID"),
        (rows(("a", "X", "_")).replace("1\ta", "_\ta").encode(), "line 1: a word without a number"),
        (rows(("", "X", "_")).encode(), "line 1: a word without letters"),
        (rows(("a  b", "X", "_")).encode(), "line 1: two spaces"),
        (rows(("a", "X", "_")).replace("1\ta", "1-2\ta").encode(), "line 1: a sentence without words"),
    ],
)
def test_damaged_files_are_refused_with_file_and_line(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "damaged.conllu").write_bytes(content)
    with pytest.raises(ValueError, match=rf"damaged\.conllu.*{words}"):
        read_conllu(tmp_path / "damaged.conllu")


def test_what_a_folder_lacks_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "en_x-ud-train.conllu").write_text(grammar(100, 0))
    data = load_tagged("conllu", data_dir=tmp_path, validation_fraction=0.2, seed=1)
    assert [len(data.train), len(data.validation), len(data.test)] == [72, 18, 10]
    everything = read_conllu(tmp_path / "en_x-ud-train.conllu")
    assert sorted(data.train + data.validation + data.test, key=str) == sorted(everything, key=str)
    one_file = load_tagged("conllu", data_dir=tmp_path / "en_x-ud-train.conllu", seed=2)
    assert one_file.test == data.test, "the test split is the same whatever the seed"
    assert one_file.validation != data.validation[: len(one_file.validation)]
    (tmp_path / "test.conllu").write_text(BY_HAND)
    assert load_tagged("conllu", data_dir=tmp_path).test == read_conllu(tmp_path / "test.conllu")


def test_universal_dependencies_are_found_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "ud_english_ewt").mkdir()
    for part in ("train", "dev", "test"):
        (tmp_path / "ud_english_ewt" / f"en_ewt-ud-{part}.conllu").write_text(rows((part, "X", "_")))
    for place in (tmp_path, tmp_path / "ud_english_ewt"):
        data = load_tagged("ud_english_ewt", data_dir=place)
        assert [split[0].words for split in (data.train, data.validation, data.test)] == [
            ("train",),
            ("dev",),
            ("test",),
        ]


def test_missing_places_are_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "one.conllu").write_text(rows(("a", "X", "_")))
    (tmp_path / "twice").mkdir()
    for name in ("a-train.conllu", "b-train.conllu"):
        (tmp_path / "twice" / name).write_text(BY_HAND)
    cases: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("poems", {}, "Known: ud_english_ewt, ud_english_gum, conllu"),
        ("conllu", {}, "needs data_dir"),
        ("conllu", {"data_dir": tmp_path / "nothing"}, "neither a file nor a folder"),
        ("conllu", {"data_dir": tmp_path}, r"no train\.conllu"),
        ("conllu", {"data_dir": tmp_path / "twice"}, "several files for train: a-train.conllu, b-train.conllu"),
        ("conllu", {"data_dir": tmp_path / "one.conllu"}, "too few to hold 1 out"),
        ("conllu", {"data_dir": tmp_path / "one.conllu", "validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ("ud_english_gum", {"data_dir": tmp_path}, "en_gum-ud-train.conllu"),
    )
    for name, options, words in cases:
        with pytest.raises(ValueError, match=words):
            load_tagged(name, **options)


def test_the_hub_has_the_same_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parquet file in the Hub's form, which lists multiword tokens and empty nodes among the words."""
    import conllu
    import huggingface_hub
    from datasets import ClassLabel, Dataset, Features, Sequence, Value

    text = Sequence(Value("string"))
    tags = ["NOUN", "PUNCT", "AUX", "PART", "VERB", "ADV", "PRON", "_"]
    features = Features({"tokens": text, "upos": Sequence(ClassLabel(names=tags)), "feats": text, "head": text})
    table: dict[str, list[Any]] = {name: [] for name in features}
    for sentence in conllu.parse(BY_HAND):
        table["tokens"].append([token["form"] for token in sentence])
        table["upos"].append([token["upos"] for token in sentence])
        table["feats"].append([str(token["feats"]) for token in sentence])
        table["head"].append([str(token["head"]) for token in sentence])
    (tmp_path / "a.conllu").write_text(BY_HAND)
    Dataset.from_dict(table, features=features).to_parquet(str(tmp_path / "0000.parquet"))
    asked = []

    def download(repository: str, file: str, **options: Any) -> str:
        asked.append((repository, file, options["revision"]))
        return str(tmp_path / "0000.parquet")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    data = load_tagged("ud_english_ewt")
    assert data.train == data.validation == data.test == read_conllu(tmp_path / "a.conllu")
    assert [file for _, file, _ in asked] == [f"en_ewt/{s}/0000.parquet" for s in ("train", "validation", "test")]

    def offline(*arguments: Any, **options: Any) -> str:
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ValueError, match=r"cannot get en_gum/train/0000\.parquet .*no network.*--data-dir DIR"):
        load_tagged("ud_english_gum")
    (tmp_path / "not.parquet").write_text("nothing")
    with pytest.raises(ValueError, match="is not a treebank in parquet"):
        tagged_hub.read_rows(tmp_path / "not.parquet")


# ---- words -------------------------------------------------------------------------------------------------------


def test_hashed_words_are_the_same_in_every_process() -> None:
    program = (
        "from paradepth.data.words import WordVocabulary as V\n"
        "v = V(['the', 'dog'], buckets=1000)\nprint([v.numbers(w) for w in ('The', 'dogs', 'naïve', '3,000')])"
    )
    seed = str(1 + hash("any text") % 1000)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={"PYTHONHASHSEED": seed}, timeout=200
    )
    assert done.returncode == 0, done.stderr
    vocabulary = WordVocabulary(["the", "dog"], buckets=1000)
    found = ast.literal_eval(done.stdout)
    assert found == [vocabulary.numbers(word) for word in ("The", "dogs", "naïve", "3,000")]
    assert vocabulary.numbers("dog") == PINNED, "saved models need the same numbers for ever"


PINNED = (3, 5, 399, 105, 977, 164, 475, 242, 132, 724, 380)


def test_words_share_the_numbers_of_what_they_have_in_common(tmp_path: Path) -> None:
    vocabulary = WordVocabulary.learn([["The", "dog", "barks"], ["the", "Dog", "dog", "The"]], buckets=10**6)
    assert vocabulary.words == ("The", "dog")
    assert vocabulary.size == 2 + 2 + 2 + 10**6
    assert vocabulary.numbers("the")[:OWN] == (UNKNOWN, vocabulary.numbers("The")[1])
    assert vocabulary.numbers("cat")[:OWN] == (UNKNOWN, UNKNOWN)
    dogs, logs = vocabulary.numbers("dogs"), vocabulary.numbers("Logs")
    assert [a == b for a, b in zip(dogs[OWN:], logs[OWN:], strict=True)] == [False] * 4 + [True] * 3 + [False] * 2
    numbers = vocabulary.encode([["dogs", "a"], ["The"], []])
    assert numbers.shape == (3, 2, 11)
    assert tuple(numbers[0, 0].tolist()) == dogs
    assert numbers[1, 1].tolist() == numbers[2, 0].tolist() == [0] * 11
    assert len(set(numbers[0, 1].tolist()[OWN:])) == 9, "the same letters as a beginning and as an end are two things"
    again = load_words(vocabulary.save(tmp_path).parent)
    assert (again.words, again.buckets, again.numbers("dogs")) == (vocabulary.words, 10**6, dogs)


def test_damaged_vocabularies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        load_words(tmp_path)
    good = json.loads(WordVocabulary(["a"]).save(tmp_path).read_text())
    for content, words in (
        ("{", "does not hold"),
        (json.dumps({**good, "version": 99}), "version is 99"),
        (json.dumps({**good, "words": ["a", "a"]}), "'a' is twice"),
        (json.dumps({**good, "words": [1]}), "something else"),
        (json.dumps({**good, "buckets": 0}), "buckets is 0"),
    ):
        (tmp_path / "words.json").write_text(content)
        with pytest.raises(ValueError, match=words):
            load_words(tmp_path)


def test_text_is_split_into_words() -> None:
    assert split_words("I can't; they're at John's, 10:30 a.m. -- really?!") == (
        ["I", "ca", "n't", ";", "they", "'re", "at", "John", "'s", ",", "10:30", "a.m.", "--", "really", "?", "!"]
    )


# ---- samples -----------------------------------------------------------------------------------------------------

lengths = st.lists(st.integers(1, 20), min_size=1, max_size=8)


@given(lengths=lengths, context=st.integers(1, 9), pack=st.booleans())
def test_samples_are_stretches_of_the_words_no_longer_than_the_context(
    lengths: list[int], context: int, pack: bool
) -> None:
    samples = sample_lengths(lengths, context, pack=pack).tolist()
    assert sum(samples) == sum(lengths)
    assert all(1 <= sample <= context for sample in samples)
    if not pack:
        assert samples == [piece for length in lengths for piece in pieces(length, context)]
        for length in lengths:
            cut = pieces(length, context)
            assert max(cut) - min(cut) <= 1
            assert len(cut) == -(-length // context)


@settings(max_examples=15, deadline=None)
@given(lengths=lengths, context=st.integers(1, 9), pack=st.booleans(), seed=st.integers(0, 99))
def test_every_word_of_a_split_is_scored_once(lengths: list[int], context: int, pack: bool, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    names = ("A", "B", "C", "_")
    sentences = []
    for number, length in enumerate(lengths):
        tags = tuple(names[i] for i in torch.randint(4, (length,), generator=draws).tolist())
        sentences.append(Sentence(tuple(f"w{number}x{i}" for i in range(length)), tags, ("_",) * length))
    first = Sentence(("a", "b"), ("A", "B"), ("_", "_"))
    treebank = Treebank("made", (first,) * 20, (first,), (*sentences, first))
    options = {"context": context, "pack": pack, "branches": None, "schedule": "joint"}
    task = TaggingTask(config(Path(), **options), encode_treebank(treebank, "upos"))
    seen, targets = [], []
    for start in range(0, task.count("test"), 3):
        words_BTF, targets_BT = task.ordered("test", start, start + 3)
        real_BT = words_BTF[..., 0] != 0
        seen.append(words_BTF[real_BT])
        targets += targets_BT[real_BT].tolist()
        assert (targets_BT[~real_BT] == IGNORED).all()
    expected = [task.data.vocabulary.numbers(word) for s in treebank.test for word in s.words]
    assert sorted(map(tuple, torch.cat(seen).tolist())) == sorted(expected)
    labels = [label for s in treebank.test for label in s.upos]
    assert sum(target == IGNORED for target in targets) == labels.count("_")
    for number, name in enumerate(("A", "B")):
        assert targets.count(number) == labels.count(name)
    assert sum(target < IGNORED for target in targets) == labels.count("C")
    model = task.new_model().eval()
    predicted_W = task.predictions(model, "test")[0]
    position = 0
    for sentence in treebank.test:
        for piece in [] if pack else pieces(len(sentence.words), context):
            words = sentence.words[: len(sentence.words)]
            start = position - sum(len(s.words) for s in treebank.test[: treebank.test.index(sentence)])
            alone = model(task.data.vocabulary.encode([words[start : start + piece]])).argmax(dim=-1)[0]
            assert torch.equal(predicted_W[position : position + piece], alone)
            position += piece


def test_columns_and_labels_that_are_missing_are_refused(tmp_path: Path) -> None:
    plain = Sentence(("a", "b"), ("X", "Y"), ("_", "_"))
    bare = Sentence(("a", "b"), ("_", "_"), ("F=1", "_"))
    one = Sentence(("a", "b"), ("X", "X"), ("F=1", "F=2"))
    for sentences, tags, words in (
        (
            (plain, plain, plain),
            "features",
            r"no word of the train sentences has a morphological features \(column 6\)",
        ),
        ((plain, plain, plain), "both", "column 6"),
        ((plain, bare, plain), "upos", r"validation sentences has a part of speech \(column 4\)"),
        ((one, one, one), "upos", "all training words have the same label, 'X'"),
    ):
        made = Treebank("made", *((sentence,) for sentence in sentences))
        with pytest.raises(ValueError, match=words):
            encode_treebank(made, tags)  # pyright: ignore[reportArgumentType]
