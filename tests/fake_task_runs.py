"""Run directories of every kind of task with plausible numbers: `fake_runs.make_run`, told as another task."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from fake_runs import make_run, write_json

TAGS = ["ADJ", "ADP", "ADV", "AUX", "DET", "NOUN", "PRON", "PROPN", "PUNCT", "VERB"]
SENTENCE = [("The", "DET"), ("cat", "NOUN"), ("saw", "VERB"), ("her", "PRON"), ("reflection", "NOUN"), (".", "PUNCT")]
REVIEW = (
    "an overlong and occasionally brilliant film that never quite decides whether it wants to be a satire or a family "
    "drama , and loses its way in both"
)
TEXT = {"context": 128, "vocab_size": 4096, "width": 128, "heads": 4, "mlp": 512}


def _language_measures(loss: list[float]) -> dict[str, list[float]]:
    return {"perplexity": [math.exp(x) for x in loss], "bits_per_byte": [x / math.log(2) for x in loss]}


def _causal_lm(loss: list[float], rng: random.Random) -> dict[str, Any]:
    verse = "To be, or not to be:\nthat is the question of the duke,\nAnd he that hath the state"
    return {**_language_measures(loss), "examples": [{"prompt": "To be", "text": verse}]}


def _masked_lm(loss: list[float], rng: random.Random) -> dict[str, Any]:
    example = {"text": "the [MASK] of the king", "truth": "crown", "prediction": "crown", "confidence": 0.4}
    return {"perplexity": [math.exp(x) for x in loss], "examples": [example]}


def _classifier(loss: list[float], rng: random.Random) -> dict[str, Any]:
    examples = [
        {"text": REVIEW, "label": 0, "prediction": index % 2, "confidence": rng.uniform(0.5, 1)} for index in range(4)
    ]
    examples.append(
        {"text": ["He left.", "He went."], "label": "positive", "prediction": "positive", "confidence": 0.9}
    )
    return {
        "f1": [1 - x / 4 for x in loss],
        "matthews": [0.8 - x / 4 for x in loss],
        "confusion": [[400, 50], [70, 352]],
        "class_names": ["negative", "positive"],
        "examples": examples,
    }


def _tagger(loss: list[float], rng: random.Random) -> dict[str, Any]:
    words, labels = [word for word, _ in SENTENCE], [tag for _, tag in SENTENCE]
    wrong = [*labels[:2], "NOUN", *labels[3:]]
    confusion = [[900 if i == j else rng.randrange(30) for j in range(len(TAGS))] for i in range(len(TAGS))]
    return {
        "upos_accuracy": [0.92 - x / 50 for x in loss],
        "features_accuracy": [0.89 - x / 50 for x in loss],
        "class_names": TAGS,
        "confusion": confusion,
        "examples": [
            {"words": words * 3, "labels": labels * 3, "prediction": wrong * 3},
            {"words": words, "labels": labels, "prediction": labels},
        ],
    }


def _translator(loss: list[float], rng: random.Random) -> dict[str, Any]:
    example = {
        "source": "Zwei junge weiße Männer sind im Freien in der Nähe vieler Büsche.",
        "reference": "Two young, White males are outside near many bushes.",
        "translation": "Two young white men are outside near many trees.",
        "by_prefix": ["Two men are outside.", "Two young men are outside.", "Two young men.", "Two young white men."],
    }
    return {
        "bleu": [36 - 5 * x for x in loss],
        "chrf": [58 - 5 * x for x in loss],
        "signatures": {"bleu": "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.5.1", "chrf": "nrefs:1|nc:6"},
        "decoding": "beam search, 4 beams",
        "examples": [example, example],
    }


KINDS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "causal_lm": (_causal_lm, TEXT | {"vocab_size": 256}, {"data": "tiny_shakespeare"}),
    "masked_lm": (_masked_lm, TEXT, {"data": "text", "tokenizer": "bpe", "vocab_size": 4096, "masking": 0.15}),
    "sequence_classifier": (_classifier, TEXT, {"data": "sst2", "tokenizer": "bpe"}),
    "hf_classifier": (_classifier, TEXT, {"data": "cola"}),
    "tagger": (_tagger, TEXT, {"data": "ud_english_ewt", "tags": "both"}),
    "translator": (_translator, TEXT, {"data": "multi30k", "languages": ["de", "en"]}),
}
UNSET = {"patch_size": None, "image_size": None, "flip": False, "crop_padding": 0, "masking": None, "tags": None}


def make_task_run(path: Path, kind: str, *, branches: int = 4, evaluated: bool = True, **options: Any) -> Path:
    """A run of that model type."""
    make_run(path, branches=branches, evaluated=evaluated, **options)
    build, model, training = KINDS[kind]
    config = json.loads((path / "config.json").read_text())
    shape = {**model, "branches": branches, "depth": config["model"]["depth"]}
    write_json(
        path / "config.json",
        config | {"model_type": kind, "model": shape, "training": {**config["training"], **UNSET, **training}},
    )
    measures = _language_measures if kind == "causal_lm" else lambda loss: {}
    events = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    events = [e | measures(e["loss"]) if e["event"] == "validation" else e for e in events]
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if evaluated:
        plain = json.loads((path / "evaluation.json").read_text())
        kept = {key: plain[key] for key in ("split", "samples", "loss", "accuracy", "contribution")}
        write_json(path / "evaluation.json", kept | build(kept["loss"], random.Random(1)))
    return path
