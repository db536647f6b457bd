"""Encoder-decoders for translation: joint stem → trunk over the joined state (X, Y) → head over the target's Y.

Shapes: B batch, S source tokens, T target tokens, V vocabulary, K beams.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from paradepth.branches import TrunkCache
from paradepth.depth import Stack
from paradepth.models.base import TrunkModel
from paradepth.models.beam import Hypothesis, beam_search, greedy_search
from paradepth.models.pretrained import register_model_type
from paradepth.models.shape import TrunkConfig
from paradepth.nn import JointStem, SourceLayer, TargetHead, TargetLayer


@dataclass(frozen=True)
class TranslatorConfig(TrunkConfig):
    """Everything that determines the shape of a `Translator`: the fields of `TrunkConfig`, and

    Attributes:
        vocab_size: V, of both languages together.
        context: the longest source and the longest target, in tokens, with the ones that mark start and end.
        pad: number of the token that fills up a source.
        depth: d; a branch, or the stack, has d layers of an encoder and then d of a decoder.
        buffers: of `TrunkConfig`, numbers of the 2d layers.
        tied: whether the head uses the weight of the embedding, which source and target share anyway.

    Raises:
        ValueError: values outside the ranges above.
    """

    vocab_size: int = 8192
    context: int = 64
    pad: int = 0
    depth: int = 3
    tied: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixing != "attention":
            raise ValueError(
                f"mixing is {self.mixing!r}; a translator takes attention, since its decoder mixes the tokens of two "
                "texts, whose lengths are not known beforehand"
            )
        if not 0 <= self.pad < self.vocab_size:
            raise ValueError(f"pad is {self.pad}; it must be a token, between 0 and {self.vocab_size - 1}")

    @property
    def layers(self) -> int:
        """Number of layers in the trunk, of encoder and decoder together."""
        return 2 * sum(self.branch_depths)


@register_model_type("translator")
class Translator(TrunkModel):
    """An encoder-decoder, serial or as branches: (source (B, S), target (B, T)) to logits (B, T, V) of the target token
    after each.

    The trunk is over the joined state (X, Y): a stack of d encoder layers, which advance X, and d decoder layers, which
    advance Y and look at X. Every algorithm that evaluates stacks so covers encoder and decoder as one chain of 2d
    steps. With branches each one is such a stack, whose decoder reads its own encoder's X, and what they add to the
    embedded (X, Y) is added up.

    Args:
        config: the shape.

    >>> model = Translator(TranslatorConfig(vocab_size=50, width=16, mlp=32, branches=3, depth=1))
    >>> pair = torch.randint(1, 50, (2, 7)), torch.randint(1, 50, (2, 5))
    >>> model(pair).shape, model.prefix_logits(pair).shape
    (torch.Size([2, 5, 50]), torch.Size([3, 2, 5, 50]))
    >>> bool(torch.allclose(model.truncate(2)(pair), model(pair, branches=2), atol=1e-6))
    True
    """

    model_type = "translator"
    config_class = TranslatorConfig

    config: TranslatorConfig
    stem: JointStem
    head: TargetHead

    def _new_stem(self) -> JointStem:
        c = self.config
        return JointStem(c.vocab_size, c.context, c.width, c.dropout)

    def _new_head(self) -> TargetHead:
        c = self.config
        return TargetHead(c.width, c.vocab_size, tied=self.stem.embed if c.tied else None)

    def _new_stack(self, depth: int, first: int = 0) -> Stack:
        c = self.config
        options: dict[str, Any] = {
            "heads": c.heads,
            "head_width": c.head_width,
            "mlp": c.mlp,
            "bias": c.bias,
            "dropout": c.dropout,
            "attention_dropout": c.attention_dropout,
            "deep_init": c.layers if c.deep_init else None,
        }
        kinds = [SourceLayer] * depth + [TargetLayer] * depth
        return Stack([kind(c.width, **options) for kind in kinds], step=c.step, buffers=c.buffers)

    def embed(self, inputs: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor]]:
        """((X, Y), (mask of the source's real tokens, (B, 1, 1, S),))."""
        return self.stem(inputs), (self.source_mask(inputs[0]),)

    def source_mask(self, source_BS: Tensor) -> Tensor:
        """Where the source has tokens and no padding, as attention takes it, (B, 1, 1, S)."""
        return (source_BS != self.config.pad)[:, None, None, :]

    def decode(self, state: tuple[Tensor, Tensor], inputs: Any) -> Tensor:
        """Logits (…, B, T, V) of the target's states."""
        return self.head(state[1])


class CachedDecoder:
    """Logits of the next target token, one token after another, with keys and values of everything before remembered.

    Args:
        model: in evaluation mode.
        source_BS: sources, padded.
        branches: use the first branches only (default: all); a serial stack counts as one.

    >>> model = Translator(TranslatorConfig(vocab_size=50, width=16, mlp=32, depth=1)).eval()
    >>> source, target = torch.randint(1, 50, (2, 7)), torch.randint(1, 50, (2, 3))
    >>> decoder = CachedDecoder(model, source)
    >>> steps = [decoder.advance(target[:, t]) for t in range(3)]
    >>> bool(torch.allclose(torch.stack(steps, dim=1), model((source, target)), atol=1e-5))
    True
    """

    def __init__(self, model: Translator, source_BS: Tensor, *, branches: int | None = None) -> None:
        self.model = model
        self.cache = TrunkCache(model.trunk, branches=branches if model.config.branches else None)
        self.x_BSD = model.stem.source(source_BS)
        self.mask = model.source_mask(source_BS)

    def advance(self, tokens_B: Tensor) -> Tensor:
        """Takes up a token of each target and returns the logits (B, V) of the one after it."""
        y_B1D = self.model.stem.target(tokens_B.unsqueeze(1), start=self.cache.length)
        state = self.cache.advance((self.x_BSD, y_B1D), self.mask)
        return self.model.head(state)[:, -1]

    def reorder(self, rows_B: Tensor) -> None:
        """Keeps the batch rows `rows_B`, in that order; a row may appear several times."""
        self.cache.reorder(rows_B)
        self.x_BSD, self.mask = self.x_BSD[rows_B], self.mask[rows_B]


class _Tokenizer(Protocol):
    vocab_size: int
    specials: dict[str, int]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def special(self, name: str) -> int: ...


def check_search(
    model: Translator,
    *,
    beams: int,
    branches: int | None = None,
    max_tokens: int | None = None,
    length_penalty: float = 1.0,
    batch_size: int = 1,
) -> None:
    """Refuses options of `translate` that are out of range.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    for name, value in (("beams", beams), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not 0 <= length_penalty < float("inf"):
        raise ValueError(f"length_penalty is {length_penalty}; it must be at least 0")
    if max_tokens is not None and not 1 <= max_tokens <= model.config.context:
        raise ValueError(
            f"max_tokens is {max_tokens}; it must be between 1 and {model.config.context}, the model's context"
        )
    if branches is not None and not 1 <= branches <= model.prefixes:
        raise ValueError(f"branches is {branches}; this model has {model.prefixes}, and at least 1 is needed")


def too_long(model: Translator, tokenizer: _Tokenizer, sentences: Sequence[str]) -> list[int]:
    """Which sentences, counted from 1, have more tokens than the model takes."""
    encoded = tokenizer.encode_many([sentence.strip() for sentence in sentences])
    return [number for number, tokens in enumerate(encoded, start=1) if len(tokens) + 1 > model.config.context]


@torch.no_grad()
def translate_tokens(
    model: Translator,
    sources: Sequence[Sequence[int]],
    *,
    start: int,
    end: int,
    beams: int = 4,
    branches: int | None = None,
    max_tokens: int | None = None,
    length_penalty: float = 1.0,
    forbidden: Sequence[int] = (),
) -> list[Hypothesis]:
    """Translations of sources that are tokens, evaluated as one batch.

    Args:
        model: in evaluation mode.
        sources: tokens of each sentence as in training, so with their end; at least one sentence.
        start, end: tokens that targets start and end with.
        beams: 1 is greedy decoding.
        branches: use the first branches only (default: all).
        max_tokens: most tokens of a target, its end included; None is what the model's context leaves.
        length_penalty: α of `beam_search`.
        forbidden: tokens that are never chosen.

    Raises:
        ValueError: numbers out of range.
    """
    c = model.config
    check_search(model, beams=beams, branches=branches, max_tokens=max_tokens, length_penalty=length_penalty)
    device = next(model.parameters()).device
    longest = max(len(source) for source in sources)
    padded = [[*source, *[c.pad] * (longest - len(source))] for source in sources]
    decoder = CachedDecoder(model, torch.tensor(padded, device=device), branches=branches)
    starts_B = torch.full((len(sources),), start, device=device)
    options: dict[str, Any] = {"end": end, "max_tokens": max_tokens or c.context}
    options["forbidden"] = (c.pad, start, *forbidden)
    if beams == 1:
        return greedy_search(decoder, starts_B, **options)
    return [found[0] for found in beam_search(decoder, starts_B, beams=beams, length_penalty=length_penalty, **options)]


def translate(
    model: Translator,
    tokenizer: _Tokenizer,
    sentences: Sequence[str],
    *,
    beams: int = 4,
    branches: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 32,
    length_penalty: float = 1.0,
) -> list[str]:
    """Translates sentences.

    A translation does not depend on what else is translated with it. A sentence that is longer than the model's context
    is cut there, with a warning; a blank one has a blank translation.

    Args:
        model: in evaluation mode.
        tokenizer: the one that the model was trained with.
        sentences: texts.
        beams: hypotheses that beam search keeps; 1 is greedy decoding.
        branches: use the first branches only (default: all).
        max_tokens: most tokens of a translation; None is what the model's context leaves.
        batch_size: sentences that are translated at a time.
        length_penalty: α of `beam_search`: larger ones favour long translations.

    Raises:
        ValueError: a tokeniser for another vocabulary, or numbers out of range.
    """
    c = model.config
    if tokenizer.vocab_size != c.vocab_size:
        raise ValueError(
            f"the tokeniser has {tokenizer.vocab_size} tokens and the model a vocabulary of {c.vocab_size}: they do "
            "not belong together"
        )
    check_search(
        model,
        beams=beams,
        branches=branches,
        max_tokens=max_tokens,
        length_penalty=length_penalty,
        batch_size=batch_size,
    )
    start, end = tokenizer.special("<s>"), tokenizer.special("</s>")
    encoded = tokenizer.encode_many([sentence.strip() for sentence in sentences])
    cut = sum(len(tokens) + 1 > c.context for tokens in encoded)
    if cut:
        warnings.warn(f"{cut} sentence(s) are longer than the model's {c.context} tokens and were cut", stacklevel=2)
    sources = [[*tokens, end][: c.context] for tokens in encoded]
    # Sentences of like length make batches with little padding.
    order = sorted((i for i, tokens in enumerate(encoded) if tokens), key=lambda i: len(sources[i]))
    results = [""] * len(encoded)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        found = translate_tokens(
            model,
            [sources[i] for i in chosen],
            start=start,
            end=end,
            beams=beams,
            branches=branches,
            max_tokens=max_tokens,
            length_penalty=length_penalty,
            forbidden=[number for name, number in tokenizer.specials.items() if name != "</s>"],
        )
        for i, hypothesis in zip(chosen, found, strict=True):
            results[i] = tokenizer.decode(hypothesis.tokens).strip()
    return results
