"""Using a tagger: labels for the words of sentences.

Shapes: B pieces of sentences, T words, F numbers of a word, N labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paradepth.data.tag_data import pieces
from paradepth.data.words import WordVocabulary, check_words
from paradepth.predict.model import Model

_WORDS_AT_A_TIME = 2**14


@torch.no_grad()
def tag(
    model: Model, vocabulary: WordVocabulary, sentences: Sequence[Sequence[str]], *, branches: int | None = None
) -> list[list[str]]:
    """Labels of the words of sentences.

    What a sentence is tagged with does not depend on the others. One that is longer than the model's context is cut
    into even pieces, as it is in training.

    Args:
        model: a tagger in evaluation mode, or an exported one.
        vocabulary: that of its training, which lies beside it: `load_words(run)`.
        sentences: lists of words, tokenised as the training data are; `split_words` comes close for English.
        branches: use the first branches only.

    Returns:
        For each sentence the labels of its words; numbers of classes, as text, where the model has no names for them.

    Raises:
        ValueError: another kind of model or another vocabulary, no sentences, one without words, an empty word, or
            `branches` that the model does not have.

    >>> import paradepth
    >>> vocabulary = WordVocabulary(["the", "dog"], buckets=100)
    >>> shape = {"vocab_size": vocabulary.size, "num_classes": 2, "class_names": ("DET", "NOUN"), "context": 8}
    >>> model = paradepth.create_model("tagger_nano", **shape).eval()
    >>> short, long = tag(model, vocabulary, [["the", "dog"], ["the"] * 20])
    >>> len(short), len(long)
    (2, 20)
    """
    if getattr(model, "model_type", None) != "tagger":
        raise ValueError(f"this is a model of type {getattr(model, 'model_type', model)!r}, and tag needs a tagger")
    c = model.config
    check_words(vocabulary, c.vocab_size, c.features)
    if not sentences:
        raise ValueError("tag needs at least one sentence")
    for number, sentence in enumerate(sentences):
        if isinstance(sentence, str):
            raise ValueError(f"sentence {number} is the text {sentence!r}; it must be a list of words")
        if not sentence or not all(sentence):
            raise ValueError(f"sentence {number} has {'an empty word' if sentence else 'no words'}")
    names = c.class_names or tuple(str(number) for number in range(c.num_classes))
    cut: list[Sequence[str]] = []
    for sentence in sentences:
        start = 0
        for length in pieces(len(sentence), c.context):
            cut.append(sentence[start : start + length])
            start += length
    order = sorted(range(len(cut)), key=lambda i: len(cut[i]))  # of similar lengths, so that little is padding
    size = max(1, _WORDS_AT_A_TIME // c.context)
    found: dict[int, list[str]] = {}
    for first in range(0, len(order), size):
        chosen = order[first : first + size]
        words_BTF = vocabulary.encode([cut[i] for i in chosen]).to(model.device)
        classes = model(words_BTF, branches=branches).argmax(dim=-1).tolist()
        found |= {i: [names[k] for k in row[: len(cut[i])]] for i, row in zip(chosen, classes, strict=True)}
    flat = iter([label for i in range(len(cut)) for label in found[i]])
    return [[next(flat) for _ in sentence] for sentence in sentences]
