"""Classification of texts and of pairs of texts: token stem → trunk → pooler and classifier.

Shapes: B batch, T tokens, N classes, D width, … leading dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from paradepth.models.encoder import EncoderConfig, EncoderModel, padding_mask
from paradepth.models.pretrained import register_model_type
from paradepth.nn import SegmentStem, TextClassifierHead, TokenStem
from paradepth.nn.heads import TextPool


@dataclass(frozen=True)
class SequenceClassifierConfig(EncoderConfig):
    """Everything that determines the shape of a `SequenceClassifier`: the fields of `EncoderConfig`, and

    Attributes:
        num_classes: N.
        class_names: names of the classes, empty when unknown.
        pool: what is classified: the "mean" of the tokens, the first one ("cls") or the "last".
        causal: a token sees itself and the ones before it only, as in a trunk that a causal language model was trained
            with; such a trunk is to be pooled at "last", or over the "mean".
        segments: texts of a sample that are told apart by an embedding of their own; 1 tells none apart.
        separator: number of the token that ends a text.

    Raises:
        ValueError: values outside the ranges above.
    """

    num_classes: int = 2
    class_names: tuple[str, ...] = ()
    pool: TextPool = "mean"
    causal: bool = False
    segments: int = 2
    separator: int = 258

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for num_classes {self.num_classes}")
        if self.segments < 1:
            raise ValueError(f"segments is {self.segments}; it must be at least 1")
        if self.causal and self.pool == "cls":
            raise ValueError("pool is 'cls', and a causal trunk's first token has seen no other; take 'last' or 'mean'")


@register_model_type("sequence_classifier")
class SequenceClassifier(EncoderModel):
    """Tokens (B, T), padded, to logits (B, N): an encoder (serial stack) or its parallel form (branches).

    Args:
        config: the shape.

    >>> import torch
    >>> config = SequenceClassifierConfig(context=16, width=16, mlp=32, branches=3, depth=1)
    >>> model = SequenceClassifier(config).eval()
    >>> texts_BT = torch.tensor([[257, 72, 105, 258, 72, 258], [257, 72, 258, 256, 256, 256]])  # a pair, a short text
    >>> model(texts_BT).shape, model.prefix_logits(texts_BT).shape
    (torch.Size([2, 2]), torch.Size([3, 2, 2]))
    >>> bool(torch.allclose(model(texts_BT)[1:], model(texts_BT[1:, :3]), atol=1e-6))
    True
    """

    model_type = "sequence_classifier"
    config_class = SequenceClassifierConfig

    config: SequenceClassifierConfig
    head: TextClassifierHead

    @property
    def causal(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether a token sees itself and the ones before it only."""
        return self.config.causal

    def _new_stem(self) -> TokenStem:
        c = self.config
        if c.segments == 1:
            return TokenStem(c.vocab_size, c.context, c.width, c.dropout)
        return SegmentStem(c.vocab_size, c.context, c.width, c.dropout, segments=c.segments, separator=c.separator)

    def _new_head(self) -> TextClassifierHead:
        c = self.config
        return TextClassifierHead(c.width, c.num_classes, pool=c.pool, dropout=c.dropout)

    def decode(self, state: Tensor, inputs: Any) -> Tensor:
        return self.head(state, padding_mask(self.tokens_of(inputs), self.config.pad)[:, 0, 0])
