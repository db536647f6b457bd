"""Commands that use a trained model: predict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro

from paradepth.cli.parse import Commands, parse

_TEXTS = ("sequence_classifier", "hf_classifier")


@dataclass(frozen=True)
class _Predict:
    """Classify image files or texts, fill in masked words, or tag sentences, by the kind of the model."""

    run: tyro.conf.Positional[Path]
    """Run directory, a folder with config.json and model.safetensors, or a file FILE.onnx of `paradepth export`."""
    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Image files; texts to classify; texts with <mask> for a masked language model; for a tagger sentences, whose
    words are separated by spaces."""
    branches: int | None = None
    """Use the first K branches only."""
    top: int = 1
    """How many classes, or words for a <mask>, to name for each input."""
    pairs: bool = False
    """Classifiers of texts: inputs are pairs of texts, two after two."""
    raw: bool = False
    """Taggers: split English text into words, punctuation too."""
    branch_executor: Literal["loop", "batched", "threads", "auto"] | str = "loop"
    """How branches are evaluated; an exported file has its own way."""
    branch_processes: int = 1
    """Processes that share the branches, under torchrun: all that it starts."""
    json: bool = False
    """Print the result as one JSON object."""


@dataclass(frozen=True)
class Assets:
    """What using a model needs besides its weights; looked for when it is needed."""

    tokenizer: Callable[[], Any]
    words: Callable[[], Any]


def _predict(options: Sequence[str]) -> dict[str, Any]:
    o = parse(_Predict, options, "predict")
    model, assets = _model(o.run, o.branch_executor)
    if o.raw and model.model_type != "tagger":
        raise ValueError(f"raw splits sentences into words; it means nothing to a model of type {model.model_type!r}")
    if o.pairs and model.model_type not in _TEXTS:
        raise ValueError(f"pairs are texts to classify; they mean nothing to a model of type {model.model_type!r}")
    with _shared(model, o.branch_processes):
        if model.model_type == "masked_lm":
            return {"predictions": _fill(model, assets, o)}
        if model.model_type in _TEXTS:
            return {"predictions": _classify_texts(model, assets, o)}
        if model.model_type == "tagger":
            return {"predictions": _tag(model, assets, o)}
        return {"predictions": _classify_images(model, o)}


@contextmanager
def _shared(model: Any, processes: int) -> Iterator[None]:
    """Lets processes share the model's branches within the context."""
    if processes == 1:
        yield
        return
    from paradepth.branches import Branches
    from paradepth.distributed import join_world, shard_branches

    trunk = getattr(model, "trunk", None)
    if not isinstance(trunk, Branches):
        raise ValueError(f"branch_processes is {processes}; this is no model with branches that processes could share")
    with join_world("cpu", branch=processes) as world:
        if world.size > 1:
            raise ValueError(f"branch_processes is {processes}, but {world.processes} processes were started")
        shard_branches(trunk, world.row)
        yield


def _model(place: Path, branch_executor: str) -> tuple[Any, Assets]:
    """A run's model, or an exported one; and what else is needed to use it."""
    if place.is_file() or place.suffix == ".onnx":
        from paradepth.export.runtime import OnnxModel

        if branch_executor != "loop":
            raise ValueError(
                f"branch_executor is {branch_executor!r}; an exported file is evaluated by its own runtime"
            )
        model = OnnxModel(place.expanduser())
        return model, Assets(model.tokenizer, model.words)
    from paradepth.branches import choose_executor
    from paradepth.data.tokenizer import load_tokenizer
    from paradepth.data.words import load_words
    from paradepth.models import from_pretrained

    model = from_pretrained(place)
    choose_executor(model.trunk, branch_executor)
    return model, Assets(partial(load_tokenizer, place), partial(load_words, place))


def _classify_images(model: Any, o: _Predict) -> list[dict[str, Any]]:
    from paradepth.predict import predict_images

    return predict_images(model, o.inputs, branches=o.branches, top=o.top)


def _classify_texts(model: Any, assets: Assets, o: _Predict) -> list[dict[str, Any]]:
    from paradepth.predict import predict_texts

    size = 2 if o.pairs else 1
    if len(o.inputs) % size:
        raise ValueError(f"pairs of texts are an even number of inputs, and there are {len(o.inputs)}")
    texts = [o.inputs[i : i + size] for i in range(0, len(o.inputs), size)]
    return predict_texts(model, _tokenizer(model, assets), texts, branches=o.branches, top=o.top)


def _tokenizer(model: Any, assets: Assets) -> Any:
    from paradepth.predict import check_tokenizer

    tokenizer = assets.tokenizer()
    check_tokenizer(tokenizer, model)
    return tokenizer


def _fill(model: Any, assets: Assets, o: _Predict) -> list[dict[str, Any]]:
    from paradepth.models import fill_mask

    if not o.inputs:
        raise ValueError('predict needs at least one text, such as "A <mask> to fill."')
    tokenizer = _tokenizer(model, assets)
    found = [(text, fill_mask(model, tokenizer, text, top=o.top, branches=o.branches)) for text in o.inputs]
    return [
        {"text": text, "masks": [[{"token": token, "confidence": p} for token, p in place] for place in places]}
        for text, places in found
    ]


def _tag(model: Any, assets: Assets, o: _Predict) -> list[dict[str, Any]]:
    from paradepth.data.words import split_words
    from paradepth.predict import tag

    if o.top != 1:
        raise ValueError(f"top is {o.top}; a tagger names one tag for each word")
    if not o.inputs:
        raise ValueError('predict needs at least one sentence, such as "A sentence to tag ."')
    sentences = [split_words(text) if o.raw else text.split() for text in o.inputs]
    for text, words in zip(o.inputs, sentences, strict=True):
        if not words:
            raise ValueError(f"the sentence {text!r} has no words")
    tags = tag(model, assets.words(), sentences, branches=o.branches)
    return [{"words": words, "tags": found} for words, found in zip(sentences, tags, strict=True)]


COMMANDS: Commands = {
    "predict": (_predict, "classify images or texts, fill in masked words, tag sentences"),
}
