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

from paradepth.branches import Aggregate, Branches
from paradepth.models.base import TrunkModel, check_trunk
from paradepth.nn import TokenStem


@dataclass(frozen=True)
class EncoderConfig:
    """What determines the shape of every encoder's stem and trunk; a task's model adds its own fields.

    Attributes:
        vocab_size: V, special tokens included.
        context: the longest text, in tokens.
        pad: number of the token that fills up short texts.
        width: D. heads: attention heads. mlp: hidden width of the feed-forward part.
        branches: number of branches; 0 makes the trunk a serial stack.
        depth: layers of each branch, or of the stack.
        aggregate: how branches are added up, "residual" or "sum".
        bias: whether linear maps have biases.
        dropout, attention_dropout: probabilities.
        step: h of every layer between the buffers; 1 is the ordinary Transformer.
        buffers: numbers of first and of last layers (of each branch, or of the stack) that take h = 1.
        deep_init: scale value, output and MLP projections by √(log 2L), L the number of layers in the trunk.

    Raises:
        ValueError: values outside the ranges above.
    """

    vocab_size: int = 260
    context: int = 128
    pad: int = 256
    width: int = 64
    heads: int = 2
    mlp: int = 256
    branches: int = 0
    depth: int = 4
    aggregate: Aggregate = "residual"
    bias: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    step: float = 1.0
    buffers: tuple[int, int] = (0, 0)
    deep_init: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "buffers", tuple(self.buffers))
        check_trunk(self)
        if not 0 <= self.pad < self.vocab_size:
            raise ValueError(f"pad is {self.pad}; it must be a token of the vocabulary, 0 to {self.vocab_size - 1}")

    @property
    def layers(self) -> int:
        """Number of layers in the trunk."""
        return max(self.branches, 1) * self.depth


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
