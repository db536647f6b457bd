"""Masked language models, BERT with layers normalised at their start: token stem → trunk → head over the vocabulary.

Shapes: B batch, T tokens, P places, V vocabulary, D width, … leading dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


@torch.no_grad()
def fill_mask(
    model: MaskedLM, tokens: Sequence[int], *, mask: int, top: int = 5, branches: int | None = None
) -> list[list[tuple[int, float]]]:
    """The likeliest tokens at every masked place of one text.

    Args:
        model: in evaluation mode.
        tokens: of the text, special ones included.
        mask: number of the mask token.
        top: how many to name.
        branches: use the first branches only.

    Returns:
        For each masked place, in order, `top` tokens with their probabilities, the likeliest first.

    Raises:
        ValueError: no masked place, or `top` out of range.

    >>> model = MaskedLM(MaskedLMConfig(context=16, width=16, mlp=32)).eval()
    >>> [len(place) for place in fill_mask(model, [257, 72, 259, 33, 258], mask=259, top=3)]
    [3]
    """
    places = [place for place, token in enumerate(tokens) if token == mask]
    if not places:
        raise ValueError("the text has no <mask>; write it where a word shall be guessed")
    if not 1 <= top <= model.config.vocab_size:
        raise ValueError(f"top is {top}; it must be between 1 and {model.config.vocab_size}, the vocabulary's size")
    device = next(model.parameters()).device
    inputs = torch.tensor([list(tokens)], device=device), torch.tensor([places], device=device)
    best = model(inputs, branches=branches)[0].float().softmax(dim=-1).topk(top)
    return [
        list(zip(numbers, values, strict=True))
        for numbers, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
