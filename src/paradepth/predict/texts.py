"""Using classifiers of texts on texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from paradepth.data.labelled import encoded
from paradepth.data.tokenizer import Tokenizer, check_vocabulary
from paradepth.predict.model import Model

_TOGETHER = 64  # texts


def check_tokenizer(tokenizer: Tokenizer, model: Model) -> None:
    """Refuses a tokeniser that was not made for a model of texts.

    Raises:
        ValueError: their vocabularies differ.
    """
    if model.model_type != "hf_classifier":  # theirs may have more rows than tokens
        check_vocabulary(tokenizer, model.config.vocab_size)


@torch.no_grad()
def predict_texts(
    model: Model,
    tokenizer: Tokenizer,
    texts: Sequence[tuple[str, ...]],
    *,
    branches: int | None = None,
    top: int = 1,
) -> list[dict[str, Any]]:
    """Classifies texts or pairs of texts; one that is longer than the model's context is cut, with a warning.

    Args:
        model: a `SequenceClassifier` or an `HFClassifier`, in evaluation mode, or an exported one.
        tokenizer: the one that it was trained with.
        texts: text or texts of each sample.
        branches: use the first branches only.
        top: number of classes named for each.

    Returns:
        For each sample its text, or list of texts, and `top` classes with their confidence, the likeliest first.

    Raises:
        ValueError: no texts, samples of different numbers of texts, or `branches` or `top` out of range.

    >>> from paradepth import create_model
    >>> from paradepth.data.tokenizer import ByteTokenizer
    >>> model = create_model("text_classifier_nano", context=32, num_classes=3).eval()
    >>> found = predict_texts(model, ByteTokenizer(special=True), [("fine",), ("not so fine",)], top=2)
    >>> {len(sample["classes"]) for sample in found}
    {2}
    """
    c = model.config
    if not texts:
        raise ValueError("predict needs at least one text")
    if len({len(sample) for sample in texts}) != 1 or not 1 <= len(texts[0]) <= 2:
        raise ValueError("samples are texts or pairs of texts, all of one kind")
    if not 1 <= top <= c.num_classes:
        raise ValueError(f"top is {top}; it must be between 1 and {c.num_classes}, the number of classes")
    names = c.class_names or tuple(str(i) for i in range(c.num_classes))
    tokens = encoded(texts, tokenizer, c.context)
    found = []
    for places_B in torch.arange(len(texts)).split(_TOGETHER):
        p_BN = model(tokens.padded(places_B, pad=c.pad).to(model.device), branches=branches).float().softmax(dim=-1)
        best = p_BN.topk(top, dim=-1)
        for place, values, numbers in zip(places_B.tolist(), best.values.tolist(), best.indices.tolist(), strict=True):
            sample = texts[place]
            classes = [{"class": names[i], "confidence": p} for p, i in zip(values, numbers, strict=True)]
            found.append({"text": sample[0] if len(sample) == 1 else list(sample), "classes": classes})
    return found
