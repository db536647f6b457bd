"""What encoders of texts share: padded tokens, which no other token sees.

    tokens   <s> the cat </s> <pad> <pad>        the mask goes to every layer of the trunk as a side input, so that
    mask      1   1   1   1     0     0          every executor hands it on

Shapes: B batch, T tokens, D width, n branches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paradepth.branches import Branches
from paradepth.models.base import TrunkModel
from paradepth.models.shape import TrunkConfig
from paradepth.nn import TokenStem


@dataclass(frozen=True)
class EncoderConfig(TrunkConfig):
    """What determines the shape of every encoder's stem and trunk: the fields of `TrunkConfig`, and those below. A
    task's model adds its own.

    Attributes:
        vocab_size: V, special tokens included.
        context: the longest text, in tokens.
        pad: number of the token that fills up short texts.

    Raises:
        ValueError: values outside the ranges above.
    """

    vocab_size: int = 260
    context: int = 128
    pad: int = 256
    depth: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.pad < self.vocab_size:
            raise ValueError(f"pad is {self.pad}; it must be a token of the vocabulary, 0 to {self.vocab_size - 1}")


def padding_mask(tokens_BT: Tensor, pad: int) -> Tensor:
    """Which tokens may be seen, booleans (B, 1, 1, T).

    Raises:
        ValueError: a text of padding alone (on the CPU, where looking does not make the device wait).

    >>> padding_mask(torch.tensor([[5, 6, 0], [7, 0, 0]]), pad=0)[:, 0, 0].tolist()
    [[True, True, False], [True, False, False]]
    """
    real_BT = tokens_BT != pad
    if real_BT.device.type == "cpu" and not torch.compiler.is_compiling():
        empty = (~real_BT.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"text {empty[0]} of the batch is nothing but padding (token {pad})")
    return real_BT[:, None, None, :]


class EncoderModel(TrunkModel):
    """Stem and trunk over padded tokens (B, T); a task's model adds the head.

    Padding changes nothing: the states of a text's own tokens do not depend on what it is batched with.

    Args:
        config: the shape; an `EncoderConfig`, or one derived from it.
    """

    config: Any
    stem: TokenStem

    def _new_stem(self) -> TokenStem:
        c = self.config
        return TokenStem(c.vocab_size, c.context, c.width, c.dropout)

    def tokens_of(self, inputs: Any) -> Tensor:
        """The tokens (B, T) among the inputs: the first of several."""
        return inputs[0] if isinstance(inputs, tuple) else inputs

    def embed(self, inputs: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        """States (B, T, D) and the padding mask (B, 1, 1, T), which every layer gets."""
        tokens_BT = self.tokens_of(inputs)
        x_BTD = self.stem(tokens_BT)
        return x_BTD, (padding_mask(tokens_BT, self.config.pad),)

    def contributions(self, inputs: Any) -> Tensor:
        """Relative size of each branch's contribution over the tokens that are no padding, shape (n, B)."""
        x_BTD, sides = self.embed(inputs)
        if not isinstance(self.trunk, Branches):
            return x_BTD.new_zeros(0, len(x_BTD))
        real_BT1 = sides[0][:, 0, 0, :, None]
        delta_nBTD = self.trunk.contributions(x_BTD, *sides) * real_BT1
        return delta_nBTD.flatten(2).norm(dim=-1) / (x_BTD * real_BT1).flatten(1).norm(dim=-1)
