"""What belongs to each kind of model: the unit of a sample, the figures that matter, the options that mean something.

A new kind of model is one entry here; one without an entry is shown by its accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

_BYTES = 260  # a vocabulary up to this size is the 256 bytes and a few special tokens

_GLUE_SCORE = {"cola": "matthews", "mrpc": "f1", "qqp": "f1"}  # what the benchmark ranks by; accuracy elsewhere

# Options of the command line that mean something to some tasks only.
_PIXELS = ("patch_size", "embedding", "pool", "image_size", "channels", "flip", "crop_padding", "rand_augment")
_IMAGES = (*_PIXELS, "class_names")
_TEXTS = ("context", "tokenizer", "vocab_size")
_WORDS = ("context", "tags", "pack", "word_dropout")
_TASK_OPTIONS = frozenset(
    (*_IMAGES, *_TEXTS, *_WORDS, "masking", "columns", "languages", "causal", "class_names", "length")
)


@dataclass(frozen=True)
class Kind:
    """How the runs of one type of model are shown.

    Attributes:
        samples: what a sample is, in the plural; `{context}` and `{tokens}` stand for the length and kind of a text.
        counted: what a confusion matrix counts, in the plural.
        main: keys of the measure by which runs are ranked, the first that a run has.
        headline: keys of the figures shown large, those that a run has.
        names: names that a measure has in this kind of run instead of its own.
        options: the task's own options.
        section: headline of the example predictions.
    """

    samples: str = "samples"
    counted: str = "samples"
    main: tuple[str, ...] = ("accuracy",)
    headline: tuple[str, ...] = ("accuracy",)
    names: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    section: str = "Example predictions"

    def unit(self, model: Mapping[str, Any]) -> str:
        """What a sample of a model with this configuration is, in the plural."""
        vocabulary = model.get("vocab_size")
        tokens = "bytes" if isinstance(vocabulary, int) and vocabulary <= _BYTES else "tokens"
        return self.samples.format(context=model.get("context", "?"), tokens=tokens)

    def foreign(self, name: str, value: object) -> bool:
        """Whether a training option is another task's and, as it has to be then, not set."""
        return name in _TASK_OPTIONS and name not in self.options and value in (None, False, 0)


_CLASSIFIER = Kind(
    samples="texts",
    counted="texts",
    headline=("accuracy", "f1", "matthews"),
    options=(*_TEXTS, "pool", "causal", "columns", "class_names"),
)
_KINDS = {
    "image_classifier": Kind(samples="images", counted="images", options=_IMAGES),
    "causal_lm": Kind(
        samples="windows of {context} {tokens}",
        counted="tokens",
        # Losses per token compare only where the tokeniser is the same; bits per byte always do.
        main=("bits_per_byte", "loss"),
        headline=("bits_per_byte", "perplexity", "loss"),
        names={"accuracy": "next-token accuracy"},
        options=_TEXTS,
        section="What it writes",
    ),
    "masked_lm": Kind(
        samples="windows of {context} {tokens}",
        counted="tokens",
        headline=("accuracy", "loss"),
        names={"accuracy": "masked accuracy"},
        options=(*_TEXTS, "masking"),
    ),
    "sequence_classifier": _CLASSIFIER,
    "hf_classifier": _CLASSIFIER,
    "tagger": Kind(
        samples="sentences",
        counted="words",
        headline=("accuracy", "upos_accuracy", "features_accuracy"),
        names={"accuracy": "word accuracy"},
        options=_WORDS,
        section="Tagged sentences",
    ),
    "translator": Kind(
        samples="pairs of sentences",
        counted="tokens",
        main=("bleu", "loss"),
        headline=("bleu", "chrf", "loss"),
        names={"accuracy": "next-token accuracy"},
        options=(*_TEXTS, "languages"),
        section="Translations",
    ),
}


_SEQUENCES = Kind(
    samples="sequences of {context} tokens",
    counted="answers",
    headline=("accuracy", "exact_accuracy", "loss"),
    names={"accuracy": "accuracy of answers"},
    options=("length",),
    section="Sequences and answers",
)
_GENERATED = frozenset({"recall", "copying", "copying_fixed", "sorting"})  # data that causal language models answer


def kind_of(model_type: object, data: object = None) -> Kind:
    """The kind of a model type; text classifiers are ranked by what the benchmark ranks this data by, and causal
    language models on sequences made by a rule by their answers.

    >>> kind_of("tagger").samples, kind_of("sequence_classifier", "cola").main
    ('sentences', ('matthews', 'accuracy'))
    >>> kind_of("something new").main
    ('accuracy',)
    """
    if model_type == "causal_lm" and data in _GENERATED:
        return _SEQUENCES
    found = _KINDS.get(str(model_type), Kind())
    score = _GLUE_SCORE.get(str(data))
    if found is not _CLASSIFIER or score is None:
        return found
    return replace(found, main=(score, "accuracy"))
