"""Commands that use a trained model: predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from paradepth.cli.parse import Commands, parse
from paradepth.models import from_pretrained


@dataclass(frozen=True)
class _Predict:
    """Classify image files, or tag sentences, by the kind of the model."""

    run: tyro.conf.Positional[Path]
    """Run directory, or a folder with config.json and model.safetensors."""
    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Image files; for a tagger sentences, whose words are separated by spaces."""
    branches: int | None = None
    """Use the first K branches only."""
    top: int = 1
    """How many classes to name for each image."""
    raw: bool = False
    """Taggers: split English text into words, punctuation too."""
    json: bool = False
    """Print the result as one JSON object."""


def _predict(options: Sequence[str]) -> dict[str, Any]:
    o = parse(_Predict, options, "predict")
    model = from_pretrained(o.run)
    if model.model_type == "tagger":
        return {"predictions": _tag(model, o)}
    if o.raw:
        raise ValueError(f"raw splits sentences into words; it means nothing to a model of type {model.model_type!r}")
    return {"predictions": _classify_images(model, o)}


def _classify_images(model: Any, o: _Predict) -> list[dict[str, Any]]:
    from paradepth.train.use import predict_images

    return predict_images(model, o.inputs, branches=o.branches, top=o.top)


def _tag(model: Any, o: _Predict) -> list[dict[str, Any]]:
    from paradepth.data.words import load_words, split_words
    from paradepth.train.tag import tag

    if o.top != 1:
        raise ValueError(f"top is {o.top}; a tagger names one tag for each word")
    if not o.inputs:
        raise ValueError('predict needs at least one sentence, such as "A sentence to tag ."')
    sentences = [split_words(text) if o.raw else text.split() for text in o.inputs]
    for text, words in zip(o.inputs, sentences, strict=True):
        if not words:
            raise ValueError(f"the sentence {text!r} has no words")
    tags = tag(model, load_words(o.run), sentences, branches=o.branches)
    return [{"words": words, "tags": found} for words, found in zip(sentences, tags, strict=True)]


COMMANDS: Commands = {
    "predict": (_predict, "classify image files, or tag sentences"),
}
