"""Tagging: CoNLL-U by hand, every word scored once, hashed words, oracles in float64, and runs from file to tags."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

import paradepth
from paradepth.cli import main
from paradepth.data import tagged_hub
from paradepth.data.tag_data import encode_treebank, pieces, sample_lengths
from paradepth.data.tagged import Sentence, read_conllu
from paradepth.data.treebank import Treebank, load_tagged
from paradepth.data.words import OWN, UNKNOWN, WordVocabulary, load_words, split_words
from paradepth.depth import MGRIT
from paradepth.distributed import World
from paradepth.models import Tagger, model_config
from paradepth.predict import tag
from paradepth.recipes import get_recipe
from paradepth.train import Config, resume_run, start_run
from paradepth.train.config import check_options
from paradepth.train.step import IGNORED
from paradepth.train.tasks import load_data
from paradepth.train.tasks.tagging import TaggingTask
from runs import Stop, events, stop_at

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


def rows(*words: tuple[str, str, str]) -> str:
    lines = [f"{i}\t{word}\t_\t{upos}\t_\t{f}\t0\troot\t_\t_" for i, (word, upos, f) in enumerate(words, start=1)]
    return "\n".join(lines) + "\n\n"


def grammar(count: int, seed: int, *, most: int = 3) -> str:
    """Sentences whose tags follow from the ends of words and from the word before."""
    draws = torch.Generator().manual_seed(seed)

    def pick(choices: Sequence[str]) -> str:
        return choices[int(torch.randint(len(choices), (), generator=draws))]

    text = ""
    for number in range(count):
        words = []
        for _ in range(1 + int(torch.randint(most, (), generator=draws))):
            stem = "".join(pick("abdegiklmnoprstu") for _ in range(3))
            plural = pick(["s", ""])
            words.append((pick(["the", "a"]), "DET", "PronType=Art"))
            words.append((stem + "ion" + plural, "NOUN", "Number=Plur" if plural else "Number=Sing"))
            words.append((stem + "ize" + plural, "VERB", "_" if plural else "VerbForm=Fin"))
        words.append((".", "PUNCT", "_"))
        text += f"# sent_id = {number}\n" + rows(*words)
    return text


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("treebank")
    odd = rows(("zzz", "INTJ", "Odd=Yes"), ("the", "DET", "PronType=Art"), ("x", "_", "_"))
    for part, count, seed in (("train", 160, 0), ("dev", 30, 1), ("test", 30, 2)):
        (folder / f"{part}.conllu").write_text(grammar(count, seed) + (odd if part == "test" else ""))
    return folder


def config(corpus: Path, **options: Any) -> Config:
    small: dict[str, Any] = {
        "model": "tagger_nano",
        "branches": 2,
        "depth": 1,
        "width": 16,
        "mlp": 16,
        "context": 8,
        "data": "conllu",
        "data_dir": corpus,
        "word_dropout": 0.2,
        "dropout": 0.1,
        "schedule": "one_pass",
        "budget": "40 steps",
        "batch_size": 16,
        "learning_rate": 1e-2,
        "validations": 4,
        "precision": "float32",
        "device": "cpu",
        "threads": 1,
    }
    return Config().replace(**{**small, **options})


def tagger(**options: Any) -> Tagger:
    small = {"vocab_size": 30, "features": 3, "context": 7, "width": 8, "heads": 2, "mlp": 16, "depth": 2}
    model = paradepth.create_model("tagger_nano", **{**small, "num_classes": 5, **options}).double().eval()
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # as after some training: a padded word is no zero behind a norm with a bias
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draws, dtype=torch.float64))
    return model


def padded(*lengths: int, features: int = 3, seed: int = 0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 30, (len(lengths), max(lengths), features), generator=draws)
    for row, length in zip(words, lengths, strict=True):
        row[length:] = 0
    return words


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


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


# ---- the model ---------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(branches=st.integers(0, 3), long=st.integers(1, 7), short=st.integers(1, 7))
def test_padding_and_company_change_nothing(branches: int, long: int, short: int) -> None:
    model, words = tagger(branches=branches), padded(long, short, 1)
    together = model.prefix_logits(words)
    for row, length in enumerate((long, short, 1)):
        alone = model.prefix_logits(words[row : row + 1, :length])
        close(together[:, row : row + 1, :length], alone)
        if branches:
            close(model.contributions(words)[:, row], model.contributions(words[row : row + 1, :length])[:, 0])


@settings(max_examples=8, deadline=None)
@given(branches=st.integers(1, 3), aggregate=st.sampled_from(["residual", "sum"]))
def test_prefix_k_is_the_truncated_model_and_growing_changes_nothing(branches: int, aggregate: str) -> None:
    model, words = tagger(branches=branches, aggregate=aggregate), padded(6, 3)
    logits = model.prefix_logits(words)
    for k in range(1, branches + 1):
        close(logits[k - 1], model(words, branches=k))
        close(logits[k - 1], model.truncate(k)(words))
    if aggregate == "residual":
        close(model.grow(1)(words), model(words))


def test_converged_layer_parallel_passes_equal_the_serial_one_with_padding() -> None:
    model, words = tagger(depth=8, step=0.25, buffers=(1, 1)), padded(7, 2, 5)
    targets = torch.randint(5, (3, 7)).masked_fill(words[..., 0] == 0, IGNORED)

    def loss_and_gradients(executor: Any) -> list[torch.Tensor]:
        model.trunk.executor = executor
        model.zero_grad()
        logits = model(words)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        loss.backward()
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return [logits.detach()[words[..., 0] != 0], loss.detach(), *found]

    serial = loss_and_gradients(model.trunk.executor)
    exact = MGRIT(levels=2, coarsening=2, forward_iterations=4, backward_iterations=4, relaxation="F")
    for a, b in zip(loss_and_gradients(exact), serial, strict=True):
        close(a, b)
    rough = loss_and_gradients(MGRIT(levels=2, coarsening=2, forward_iterations=1, backward_iterations=1))
    assert not torch.allclose(rough[0], serial[0], rtol=0, atol=1e-10), "one iteration is not exact"


def test_the_stem_adds_the_rows_of_a_word_and_leaves_padding_zero() -> None:
    plain, model, words = tagger(neighbours=False), tagger(), padded(3, 1)
    close(plain.stem(words), plain.stem.norm(plain.stem.embed.weight[words].sum(2)) + plain.stem.positions[:3])
    stem = model.stem
    e = stem.norm(stem.embed.weight[words].sum(dim=2))
    assert stem.before is not None
    assert stem.after is not None
    close(stem(words)[0, 1], e[0, 1] + stem.before(e[0, 0]) + stem.after(e[0, 2]) + stem.positions[1])
    close(stem(words)[0, 0], e[0, 0] + stem.after(e[0, 1]) + stem.positions[0])
    close(stem(words)[1, 0], e[1, 0] + stem.positions[0])
    model(words).square().sum().backward()
    assert stem.embed.weight.grad is not None
    assert not stem.embed.weight[0].any()
    assert not stem.embed.weight.grad[0].any()
    for bad, message in (
        (words[..., 0], r"takes \(batch, words, 3\)"),
        (words[..., :2], r"takes \(batch, words, 3\)"),
        (padded(8), "1 to 7 words"),
        (words.float(), "torch.float32"),
        (words + 29, "rows 0 to 29"),
    ):
        with pytest.raises(ValueError, match=message):
            stem(bad)
    with pytest.raises(ValueError, match="nothing but padding"):
        model(padded(3, 1) * torch.tensor([1, 0])[:, None, None])
    for options, message in (
        ({"features": 0}, "features is 0"),
        ({"pad": 1}, "padding is row 0"),
        ({"class_names": ("a", "b")}, "2 class names for 5 classes"),
        ({"num_classes": 0}, "num_classes is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            tagger(**options)


# ---- tagging sentences -------------------------------------------------------------------------------------------


def test_a_sentence_is_tagged_the_same_alone_and_among_others() -> None:
    vocabulary = WordVocabulary(["the", "dog"], buckets=25)
    model = tagger(vocab_size=vocabulary.size, features=11, class_names=("A", "B", "C", "D", "E"), branches=2, width=16)
    torch.manual_seed(0)
    for weight in (model.stem.embed.weight, model.head.classify.weight):  # far from zero, so that every word matters
        torch.nn.init.normal_(weight)
    sentences = [["the", "dog"], ["a"], ["some", "long", "sentence", "of", "many", "words", "in", "three", "parts"] * 2]
    for branches in (1, 2, None):
        together = tag(model, vocabulary, sentences, branches=branches)
        assert [len(labels) for labels in together] == [2, 1, 18]
        assert together == [tag(model, vocabulary, [sentence], branches=branches)[0] for sentence in sentences]
    assert len({label for labels in tag(model, vocabulary, sentences) for label in labels}) > 1
    alone = model(vocabulary.encode([sentences[2][:6]])).argmax(dim=-1)[0].tolist()
    assert tag(model, vocabulary, sentences)[2][:6] == ["ABCDE"[k] for k in alone], "18 words are three pieces of 6"
    unnamed = tagger(vocab_size=vocabulary.size, features=11)
    assert set(tag(unnamed, vocabulary, [["a"]])[0]) <= {"0", "1", "2", "3", "4"}

    image_model: Any = paradepth.create_model("vit_nano", image_size=8, patch_size=4, depth=1)
    text: Any = "a text"
    for arguments, words in (
        ((image_model, vocabulary, [["a"]]), "type 'image_classifier', and tag needs a tagger"),
        ((model, WordVocabulary([], buckets=25), [["a"]]), "27 rows and 11 numbers .* do not belong together"),
        ((model, vocabulary, []), "at least one sentence"),
        ((model, vocabulary, [["a"], []]), "sentence 1 has no words"),
        ((model, vocabulary, [["a", ""]]), "sentence 0 has an empty word"),
        ((model, vocabulary, [text]), "must be a list of words"),
    ):
        with pytest.raises(ValueError, match=words):
            tag(*arguments)
    with pytest.raises(ValueError, match="branches"):
        tag(model, vocabulary, [["a"]], branches=3)


# ---- runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tagging") / "run"
    start_run(config(corpus), folder)
    return folder


def test_a_run_learns_and_every_figure_is_what_its_tags_say(run: Path, corpus: Path) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())
    model, vocabulary = paradepth.from_pretrained(run), load_words(run)
    assert model.config.class_names == ("DET", "NOUN", "PUNCT", "VERB"), "the labels of the training sentences"
    sentences = read_conllu(corpus / "test.conllu")
    names = evaluation["class_names"]
    for k in (1, 2):
        labels = tag(model, vocabulary, [s.words for s in sentences], branches=k)
        pairs = [(g, p) for s, found in zip(sentences, labels, strict=True) for g, p in zip(s.upos, found, strict=True)]
        counted = [(gold, found) for gold, found in pairs if gold != "_"]
        assert len(pairs) == len(counted) + 1
        right = sum(gold == found for gold, found in counted) / len(counted)
        assert evaluation["accuracy"][k - 1] == pytest.approx(right, abs=1e-9)
    assert 0.9 < evaluation["accuracy"][1] < 1, "INTJ is in no training sentence, so it counts as wrong"
    assert (evaluation["words"], evaluation["unseen_labels"]) == (len(pairs), 1)
    confusion = [[sum(pair == (a, b) for pair in counted) for b in names] for a in names]
    assert evaluation["confusion"] == confusion
    examples = evaluation["examples"]
    assert examples[0]["labels"] != examples[0]["prediction"]
    assert all(len(e["words"]) == len(e["labels"]) == len(e["prediction"]) for e in examples)
    assert events(run, "start")[0]["train_samples"] == sum(
        len(pieces(len(s.words), 8)) for s in read_conllu(corpus / "train.conllu")
    )
    assert all(len(v["accuracy"]) == 2 for v in events(run, "validation"))


def test_the_loss_is_the_mean_over_known_labels(run: Path, corpus: Path) -> None:
    model, vocabulary = paradepth.from_pretrained(run), load_words(run)
    sums, count = torch.zeros(2, dtype=torch.float64), 0
    for sentence in read_conllu(corpus / "test.conllu"):
        start = 0
        for length in pieces(len(sentence.words), 8):
            with torch.no_grad():
                log_p = model.prefix_logits(vocabulary.encode([sentence.words[start : start + length]])).log_softmax(-1)
            for place, name in enumerate(sentence.upos[start : start + length]):
                if name in model.config.class_names:
                    sums -= log_p[:, 0, place, model.config.class_names.index(name)].double()
                    count += 1
            start += length
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["loss"] == pytest.approx((sums / count).tolist(), rel=1e-5)


@pytest.mark.parametrize("tags", ["features", "both"])
def test_features_and_pairs_are_scored_by_part(tags: str, corpus: Path, tmp_path: Path) -> None:
    start_run(config(corpus, tags=tags, pack=True, budget="30 steps", batch_size=8), tmp_path / "run")
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    task = load_data(config(corpus, tags=tags, pack=True), assets=tmp_path / "run")
    assert isinstance(task, TaggingTask)
    names, model = task.data.class_names, paradepth.from_pretrained(tmp_path / "run")
    assert ("_" in names) is (tags == "features"), "no features are a label of their own"
    right = {"accuracy": [0, 0], "upos_accuracy": [0, 0], "features_accuracy": [0, 0]}
    predicted_nW = task.predictions(model, "test")
    sentences = read_conllu(corpus / "test.conllu")
    words = [w for s in sentences for w in zip(s.labels(task.data.tags), s.upos, s.features, strict=True)]
    counted = [tags == "features" or label != "_" for label, _, _ in words]
    for k in range(2):
        for (label, upos, features), found, counts in zip(words, predicted_nW[k].tolist(), counted, strict=True):
            if counts:
                guess = names[found]
                right["accuracy"][k] += guess == label
                right["upos_accuracy"][k] += guess.partition("|")[0] == upos
                right["features_accuracy"][k] += guess.partition("|")[2] == features
    for key, values in right.items():
        if key == "accuracy" or tags == "both":
            assert evaluation[key] == pytest.approx([value / sum(counted) for value in values], abs=1e-9)
            assert evaluation[key] == events(tmp_path / "run", "validation")[-1][key] or evaluation[key][1] > 0.3
        else:
            assert key not in evaluation
    assert "confusion" not in evaluation
    assert len(events(tmp_path / "run", "validation")[-1]["loss"]) == 2


@pytest.mark.parametrize("kind", ["one_pass", "mgrit"])
def test_resuming_is_exact(kind: str, corpus: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint_every": 5, "budget": "14 steps", "accumulate": 2}
    if kind == "mgrit":
        options |= {"schedule": "joint", "branches": None, "depth": 4, "step": 0.5, "executor": "mgrit"}
        options |= {"coarsening": 2, "forward_iterations": 1, "backward_iterations": 1, "optimiser": "sgd"}
    start_run(config(corpus, **options), tmp_path / "whole")

    stop = stop_at(12)
    with pytest.raises(Stop):
        start_run(config(corpus, **options), tmp_path / "cut", on_batch=stop)
    resume_run(tmp_path / "cut")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert events(tmp_path / "cut", "validation") == events(tmp_path / "whole", "validation")


def test_word_dropout_hides_whole_words_and_is_a_function_of_the_step(corpus: Path) -> None:
    task = load_data(config(corpus, word_dropout=0.3))
    inputs, targets = task.ordered("train", 0, 200)
    once, same = task.prepare(inputs, targets, step=3, first=0)
    assert same is targets
    assert torch.equal(once, task.prepare(inputs, targets, step=3, first=0)[0])
    assert not torch.equal(once, task.prepare(inputs, targets, step=4, first=0)[0])
    second_half = task.prepare(inputs[100:, :-1], targets, step=3, first=100)[0]
    assert torch.equal(second_half, once[100:, :-1]), "however a batch is split and padded"
    changed = (once != inputs).any(dim=-1)
    assert (once[changed][:, :OWN] == UNKNOWN).all()
    assert torch.equal(once[..., OWN:], inputs[..., OWN:])
    known = (inputs[..., 0] > UNKNOWN).sum()
    assert 0.25 < (once[..., 0][inputs[..., 0] > UNKNOWN] == UNKNOWN).sum() / known < 0.35
    assert not once[inputs[..., 0] == 0].any(), "padding stays padding"
    plain = load_data(config(corpus, word_dropout=None))
    assert plain.prepare(inputs, targets, step=3, first=0)[0] is inputs


def test_a_batch_is_the_same_on_one_process_and_on_two(corpus: Path) -> None:
    task = load_data(config(corpus))
    whole, labels = task.batches(World(0, 1, torch.device("cpu"))).get(1, 2)
    parts = [task.batches(World(rank, 2, torch.device("cpu"))).get(1, 2) for rank in (0, 1)]
    rows_seen = [row[row[:, 0] != 0] for inputs, _ in parts for row in inputs]
    for row, part in zip(whole, rows_seen, strict=True):
        assert torch.equal(row[row[:, 0] != 0], part)
    assert sum(int((t != IGNORED).sum()) for _, t in parts) == int((labels != IGNORED).sum())


def test_a_new_task_starts_from_a_tagger_with_its_words_and_a_new_head(run: Path, corpus: Path, tmp_path: Path) -> None:
    options = {"init": run, "data_dir": corpus / "dev.conllu", "budget": "1 step", "learning_rate": 1e-9}
    for tags, same_head in (("upos", True), ("features", False)):
        start_run(config(corpus, **options, tags=tags), tmp_path / tags)
        assert load_words(tmp_path / tags).words == load_words(run).words
        before, after = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / tags))
        torch.testing.assert_close(before["stem.embed.weight"], after["stem.embed.weight"])
        name = "head.classify.weight"
        assert (before[name].shape == after[name].shape and torch.allclose(before[name], after[name])) is same_head


def test_commands_on_a_tagging_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = json.loads((run / "evaluation.json").read_text())
    assert main(["evaluate", str(run), "--branches", "1", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["accuracy"] == pytest.approx(kept["accuracy"][:1])
    assert main(["predict", str(run), "the station moves .", "a fabion opizes ."]) == 0
    said = capsys.readouterr().out
    assert "the/DET station/NOUN moves/" in said
    assert "a/DET fabion/NOUN opizes/VERB ./PUNCT" in said
    assert main(["predict", str(run), "The dabions opize.", "--raw", "--branches", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["predictions"]
    words = ["The", "dabions", "opize", "."]
    expected = tag(paradepth.from_pretrained(run), load_words(run), [words], branches=2)[0]
    assert told == [{"words": words, "tags": expected}]
    assert main(["report", str(run), "--out", str(tmp_path / "one.html")]) == 0
    assert "dabion" not in (tmp_path / "one.html").read_text()
    for arguments, message in (
        ([" "], "the sentence ' ' has no words"),
        ([], "at least one sentence"),
        (["a", "--top", "2"], "top is 2"),
        (["a", "--pairs"], "pairs are texts to classify"),
        (["a", "--branches", "9"], "branches"),
    ):
        assert main(["predict", str(run), *arguments]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "moved").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "moved" / name).write_bytes((run / name).read_bytes())
    assert main(["predict", str(tmp_path / "moved"), "a"]) == 2
    assert "has no vocabulary of words" in capsys.readouterr().err
    WordVocabulary(["other"]).save(tmp_path / "moved")
    assert main(["predict", str(tmp_path / "moved"), "a"]) == 2
    assert "do not belong together" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"flip": True}, "flip is True; it means nothing to data 'conllu', which is tagged sentences"),
        ({"tokenizer": "bpe"}, "tokenizer is 'bpe'; it means nothing"),
        ({"model": "gpt_nano"}, "'gpt_nano', which is not for tagged sentences.*tagger_nano"),
        ({"data": "digits", "data_dir": None, "model": "vit_nano"}, "means nothing to data 'digits'"),
        ({"tags": "lemmas"}, "tags is 'lemmas'; it must be 'upos', 'features' or 'both'"),
        ({"word_dropout": 1.0}, "word_dropout is 1.0"),
        ({"batch_size": 5000}, r"training samples \(sentences\)"),
        ({"context": 0}, "context is 0"),
        ({"data_dir": Path("nowhere")}, "nowhere is neither a file nor a folder"),
        ({"schedule": "joint", "branches": None, "executor": "mgrit", "coarsening": 9}, "coarsening"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    options: dict[str, Any], words: str, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        start_run(config(corpus, **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


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


def test_a_run_whose_training_labels_changed_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "train.conllu").write_text(grammar(40, 5) + rows(("new", "SYM", "_")) * 40)
    task = load_data(config(tmp_path), assets=run)
    assert task.data.class_names == paradepth.from_pretrained(run).config.class_names
    with pytest.raises(ValueError, match="have labels that this run does not know, such as 'SYM'"):
        task.batches(World(0, 1, torch.device("cpu")))


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("ewt_paraformer", ["--width", "16"]),
        ("ewt_mgrit", ["--width", "16", "--depth", "8"]),
        ("mc_gum_published", ["--width", "16", "--depth", "4", "--context", "64"]),
    ],
)
def test_recipes_train_from_the_command_line(recipe: str, options: list[str], corpus: Path, tmp_path: Path) -> None:
    words = ["train", recipe, "--data", "conllu", "--data-dir", str(corpus), "--run-dir", str(tmp_path / "run")]
    words += ["--budget", "2 steps", "--batch-size", "4", "--mlp", "16", "--validations", "1", *options]
    assert main([*words, "--json"]) == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["model_type"] == "tagger"
    assert load_words(tmp_path / "run").size == saved["model"]["vocab_size"]
    samples = events(tmp_path / "run", "start")[0]["train_samples"]
    assert samples == 160 if not saved["training"]["pack"] else samples < 40, "sentences that share their samples"


def test_the_published_size_is_what_the_paper_states() -> None:
    recipe = get_recipe("mc_gum_published")
    check_options(recipe)
    m, o, d = recipe.model_options, recipe.optimiser_options, recipe.depth_options
    shape = model_config(m.model)
    assert (shape.depth, shape.width, shape.heads, shape.mlp, shape.context) == (64, 128, 1, 128, 2048)
    assert (o.optimiser, o.learning_rate, o.momentum, o.batch_size) == ("sgd", 1e-2, 0.9, 8)
    assert (d.levels, d.coarsening, d.forward_iterations, d.backward_iterations) == (2, 2, 2, 1)
    assert recipe.data_options.pack
