"""Masked language models, BERT with layers normalised at their start: token stem → trunk → head over the vocabulary.

Shapes: B batch, T tokens, P places, V vocabulary, D width, … leading dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from paradepth.models.encoder import EncoderConfig, EncoderModel
from paradepth.models.pretrained import register_model_type
from paradepth.nn import MaskedLMHead


@dataclass(frozen=True)
class MaskedLMConfig(EncoderConfig):
    """Everything that determines the shape of a `MaskedLM`: the fields of `EncoderConfig`, and

    Attributes:
        tied: whether the head uses the weight of the token embedding.
    """

    tied: bool = True


@register_model_type("masked_lm")
class MaskedLM(EncoderModel):
    """BERT's encoder (serial stack) or its parallel form (branches) with the head that guesses hidden tokens.

    Inputs are tokens (B, T), for logits (B, T, V) of every token; or (tokens, places (B, P)), for logits (B, P, V) of
    the tokens at these places only, which is what training needs: most of a small model's work is its vocabulary.

    Args:
        config: the shape.

    >>> model = MaskedLM(MaskedLMConfig(context=16, width=16, mlp=32, branches=3, depth=1))
    >>> tokens_BT = torch.randint(250, (2, 16))
    >>> model(tokens_BT).shape, model.prefix_logits((tokens_BT, torch.tensor([[3, 5], [0, 9]]))).shape
    (torch.Size([2, 16, 260]), torch.Size([3, 2, 2, 260]))
    """

    model_type = "masked_lm"
    config_class = MaskedLMConfig

    config: MaskedLMConfig
    head: MaskedLMHead

    def _new_head(self) -> MaskedLMHead:
        c = self.config
        return MaskedLMHead(c.width, c.vocab_size, tied=self.stem.embed if c.tied else None)

    def decode(self, state: Tensor, inputs: Any) -> Tensor:
        if isinstance(inputs, tuple):
            places_BP1 = inputs[1].unsqueeze(-1)
            index = places_BP1.expand(*state.shape[:-2], -1, state.shape[-1])
            state = state.gather(-2, index)
        return self.head(state)


class Guesser(Protocol):
    """What `fill_mask` needs of a model: a `MaskedLM`, or an exported one."""

    config: Any

    @property
    def device(self) -> torch.device:
        """Where inputs have to be."""
        ...

    def __call__(self, inputs: Any, *, branches: int | None = None) -> Tensor:
        """Logits (B, P, V) of (tokens (B, T), places (B, P))."""
        ...


class Vocabulary(Protocol):
    """What `fill_mask` needs of a tokeniser."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without special ones."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        ...

    def special(self, name: str) -> int:
        """The number of a special token."""
        ...


@torch.no_grad()
def fill_mask(
    model: Guesser, tokenizer: Vocabulary, text: str, *, top: int = 5, branches: int | None = None
) -> list[list[tuple[str, float]]]:
    """The likeliest tokens at every <mask> of a text.

    A token that begins a word has the space before it as its first character, so one space before a <mask> belongs to
    what is guessed.

    Args:
        model: in evaluation mode.
        tokenizer: the one that it was trained with.
        text: with <mask> where a token shall be guessed.
        top: how many to name.
        branches: use the first branches only.

    Returns:
        For each <mask>, in order, `top` tokens as text with their probabilities, the likeliest first.

    Raises:
        ValueError: a text without <mask> or longer than the model's context, `top` out of range, or a tokeniser of
            another vocabulary.

    >>> from paradepth.data.tokenizer import ByteTokenizer
    >>> model = MaskedLM(MaskedLMConfig(context=16, width=16, mlp=32)).eval()
    >>> guesses = fill_mask(model, ByteTokenizer(special=True), "the c<mask>t", top=3)
    >>> len(guesses), len(guesses[0])
    (1, 3)
    """
    first, *others = text.split("<mask>")
    if not others:
        raise ValueError(f"the text {text[:60]!r} has no <mask>; write one where a word shall be guessed")
    if not 1 <= top <= model.config.vocab_size:
        raise ValueError(f"top is {top}; it must be between 1 and {model.config.vocab_size}, the vocabulary's size")
    tokens = [tokenizer.special("<s>")]
    places = []
    for place, part in enumerate([first, *others]):
        tokens += tokenizer.encode(part.removesuffix(" ") if place < len(others) else part)
        if place < len(others):
            places.append(len(tokens))
            tokens.append(tokenizer.special("<mask>"))
    tokens.append(tokenizer.special("</s>"))
    if len(tokens) > model.config.context:
        raise ValueError(
            f"the text has {len(tokens)} tokens with its ends, and the model's context is {model.config.context}; take "
            "a shorter one"
        )
    inputs = torch.tensor([tokens], device=model.device), torch.tensor([places], device=model.device)
    best = model(inputs, branches=branches)[0].float().softmax(dim=-1).topk(top)
    return [
        [(tokenizer.decode([number]), value) for number, value in zip(numbers, values, strict=True)]
        for numbers, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
