"""Causal language models in the layout of GPT-2: token stem → trunk of causal layers → head over the vocabulary.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from paradepth.branches import Aggregate
from paradepth.models.base import TrunkModel, check_trunk
from paradepth.models.pretrained import register_model_type
from paradepth.nn import LanguageModelHead, TokenStem


@dataclass(frozen=True)
class CausalLMConfig:
    """Everything that determines the shape of a `CausalLM`.

    Attributes:
        vocab_size: V; 256 for bytes.
        context: the longest text, in tokens.
        width: D. heads: attention heads. mlp: hidden width of the feed-forward part.
        branches: number of branches; 0 makes the trunk a serial stack.
        depth: layers of each branch, or of the stack.
        aggregate: how branches are added up, "residual" or "sum".
        tied: whether the head uses the weight of the token embedding.
        bias: whether linear maps have biases.
        dropout, attention_dropout: probabilities.
        step: h of every layer between the buffers; 1 is the ordinary Transformer.
        buffers: numbers of first and of last layers (of each branch, or of the stack) that take h = 1.
        deep_init: scale value, output and MLP projections by √(log 2L), L the number of layers in the trunk.

    Raises:
        ValueError: values outside the ranges above.
    """

    vocab_size: int = 256
    context: int = 64
    width: int = 64
    heads: int = 2
    mlp: int = 256
    branches: int = 0
    depth: int = 8
    aggregate: Aggregate = "residual"
    tied: bool = True
    bias: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    step: float = 1.0
    buffers: tuple[int, int] = (0, 0)
    deep_init: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "buffers", tuple(self.buffers))
        check_trunk(self)

    @property
    def layers(self) -> int:
        """Number of layers in the trunk."""
        return max(self.branches, 1) * self.depth


@register_model_type("causal_lm")
class CausalLM(TrunkModel):
    """A GPT (serial stack) or its parallel form (branches): tokens (B, T) to logits (B, T, V) of the token after each.

    A model of one branch computes what a GPT of the same depth and weights computes. A weight that embedding and head
    share belongs to the stem: it is listed, trained and saved there, once.

    Args:
        config: the shape.

    >>> import torch
    >>> model = CausalLM(CausalLMConfig(context=16, width=16, mlp=32, branches=3, depth=1))
    >>> tokens = torch.randint(256, (2, 16))
    >>> model(tokens).shape, model.prefix_logits(tokens).shape
    (torch.Size([2, 16, 256]), torch.Size([3, 2, 16, 256]))
    >>> bool(torch.allclose(model.truncate(2)(tokens), model(tokens, branches=2), atol=1e-6))
    True
    """

    model_type = "causal_lm"
    config_class = CausalLMConfig
    causal = True

    config: CausalLMConfig
    stem: TokenStem
    head: LanguageModelHead

    def _new_stem(self) -> TokenStem:
        c = self.config
        return TokenStem(c.vocab_size, c.context, c.width, c.dropout)

    def _new_head(self) -> LanguageModelHead:
        c = self.config
        return LanguageModelHead(c.width, c.vocab_size, tied=self.stem.embed if c.tied else None)
