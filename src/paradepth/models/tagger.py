"""Taggers: word stem → trunk → a label for every word.

Shapes: B sentences, T words, F numbers of a word, D width, N labels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from paradepth.models.encoder import EncoderConfig, EncoderModel, padding_mask
from paradepth.models.pretrained import register_model_type
from paradepth.nn import TokenClassifierHead, WordStem


@dataclass(frozen=True)
class TaggerConfig(EncoderConfig):
    """Everything that determines the shape of a `Tagger`; fields of the trunk as in `EncoderConfig`.

    Attributes:
        vocab_size: rows of the embedding table; of the vocabulary of words, all its buckets included.
        features: F, numbers of a word.
        neighbours: whether the stem tells a word the ones before and after it.
        pad: row of padding, always 0.
        context: most words of a sample.
        num_classes: N.
        class_names: the labels; empty, or one for each class.

    Raises:
        ValueError: values outside the ranges above.
    """

    vocab_size: int = 2**15
    pad: int = 0
    features: int = 11
    neighbours: bool = True
    num_classes: int = 17
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if self.context < 1:
            raise ValueError(f"context is {self.context}; it must be at least 1 word")
        if self.pad != 0:
            raise ValueError(f"pad is {self.pad}; a tagger's padding is row 0")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"there are {len(self.class_names)} class names for {self.num_classes} classes")


@register_model_type("tagger")
class Tagger(EncoderModel):
    """An encoder that gives every word of a sentence a label: (B, T, F) whole numbers to logits (B, T, N).

    Padding changes nothing: the logits of a sentence's words do not depend on what it is batched with.

    Args:
        config: the shape.

    >>> import torch
    >>> model = Tagger(TaggerConfig(vocab_size=50, features=3, context=16, width=16, mlp=32, branches=3, depth=1))
    >>> words = torch.randint(1, 50, (2, 9, 3))
    >>> model(words).shape, model.prefix_logits(words).shape
    (torch.Size([2, 9, 17]), torch.Size([3, 2, 9, 17]))
    >>> bool(torch.allclose(model.truncate(2)(words), model(words, branches=2), atol=1e-6))
    True
    """

    model_type = "tagger"
    config_class = TaggerConfig

    config: TaggerConfig
    stem: WordStem
    head: TokenClassifierHead

    def _new_stem(self) -> WordStem:
        c = self.config
        return WordStem(c.vocab_size, c.features, c.context, c.width, c.dropout, neighbours=c.neighbours)

    def _new_head(self) -> TokenClassifierHead:
        return TokenClassifierHead(self.config.width, self.config.num_classes)

    def embed(self, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """States (B, T, D) and the padding mask (B, 1, 1, T), which every layer gets."""
        return self.stem(inputs), (padding_mask(inputs[..., 0], self.config.pad),)
