"""The tagger in float64: padding, prefixes, layer-parallel passes, the stem, and tagging of sentences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import paradepth
from paradepth.data.words import WordVocabulary
from paradepth.depth import MGRIT
from paradepth.models import Tagger
from paradepth.predict import tag
from paradepth.train.step import IGNORED


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
