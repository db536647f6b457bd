"""What the tests of quantised models share: a small model of every kind, and inputs for it."""

from __future__ import annotations

from typing import Any

import torch

import paradepth
from paradepth.data import WordVocabulary
from paradepth.export.graph import build_graph
from paradepth.models import HFClassifier, HFClassifierConfig

METHODS = ("int8", "int8_dynamic", "int4")
WORDS = WordVocabulary(["the", "dog"], buckets=50)
SMALL: dict[str, Any] = {"width": 16, "heads": 2, "mlp": 64, "depth": 1, "branches": 3}
SPECIAL = {"vocab_size": 260, "pad": 256, "context": 12, **SMALL}  # of bytes
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "images": ("paraformer_nano", {**SMALL, "image_size": (9, 8), "patch_size": 4, "channels": 1, "pool": "cls"}),
    "serial images": ("vit_nano", {"image_size": 8, "patch_size": 2, "channels": 1, "width": 16, "depth": 2}),
    "causal_lm": ("gpt_nano", {**SMALL, "context": 12, "tied": False}),
    "masked_lm": ("bert_nano", SPECIAL),
    "sequence_classifier": ("text_classifier_nano", {**SPECIAL, "class_names": ("bad", "good"), "segments": 2}),
    "tagger": ("tagger_nano", {**SMALL, "vocab_size": WORDS.size, "context": 12, "num_classes": 2}),
    "translator": ("translator_nano", {**SPECIAL, "bias": False}),
}
HF = {
    "model_type": "bert",
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}


def randomised(model: Any) -> Any:
    """With large weights everywhere, so that what is forgotten shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        if model.model_type == "image_classifier":
            model.stem.set_normalisation([0.3], [0.6])
    return model.eval()


def build(kind: str, **options: Any) -> Any:
    """A model of one of `KINDS`, or 'hf'; `options` replace its shape."""
    if kind == "hf":
        return randomised(HFClassifier(HFClassifierConfig(hf=HF, context=16, pad=0, separator=2)))
    name, shape = KINDS[kind]
    return randomised(paradepth.create_model(name, **{**shape, **options}))


def inputs_of(model: Any, batch: int = 3) -> Any:
    """Inputs that the model takes, always the same."""
    inputs = build_graph(model).sample(batch, seed=1)
    return inputs[0] if len(inputs) == 1 else inputs


@torch.no_grad()
def same_bits(a: Any, b: Any, inputs: Any) -> bool:
    """Whether two models say the same of them at every prefix, bit for bit."""
    return torch.equal(a.prefix_logits(inputs), b.prefix_logits(inputs))
