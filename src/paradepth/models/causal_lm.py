"""Causal language models in the layout of GPT-2: token stem → trunk of causal layers → head over the vocabulary.

Shapes: B batch, T tokens, S tokens read so far, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paradepth.branches import Branches
from paradepth.branches.cached import TrunkCache
from paradepth.models.base import TrunkModel
from paradepth.models.pretrained import register_model_type
from paradepth.models.shape import TrunkConfig
from paradepth.nn import LanguageModelHead, TokenStem


@dataclass(frozen=True)
class CausalLMConfig(TrunkConfig):
    """Everything that determines the shape of a `CausalLM`: the fields of `TrunkConfig`, and

    Attributes:
        vocab_size: V; 256 for bytes.
        context: the longest text, in tokens.
        tied: whether the head uses the weight of the token embedding.

    Raises:
        ValueError: values outside the ranges above.
    """

    vocab_size: int = 256
    context: int = 64
    tied: bool = True


class TextCache:
    """What a `CausalLM` remembers of the tokens that it has read; see `CausalLM.new_cache`.

    Attributes:
        length: S, tokens read so far, with padding.
        rows: B, or None as long as nothing was read.
    """

    def __init__(self, trunk: TrunkCache, padding_B: Tensor | None = None) -> None:
        self.trunk = trunk
        self.padding_B = padding_B
        self.rows: int | None = None if padding_B is None else len(padding_B)

    @property
    def length(self) -> int:
        """S, tokens read so far, with padding."""
        return self.trunk.length

    def reorder(self, rows_B: Tensor) -> None:
        """Keeps the batch rows `rows_B`, in that order: a row may appear several times, as beams need it."""
        self.trunk.reorder(rows_B)
        self.rows = len(rows_B)
        if self.padding_B is not None:
            self.padding_B = self.padding_B[rows_B]

    def check_rows(self, rows: int) -> None:
        """Refuses another number of rows than before.

        Raises:
            ValueError: naming both.
        """
        if self.rows not in (None, rows):
            raise ValueError(f"there are {rows} rows of tokens, and the cache is of {self.rows}")
        self.rows = rows

    def start(self) -> int | Tensor:
        """Position of the next token in its text: one number, or (B,); below 0 in the padding."""
        return self.length if self.padding_B is None else self.length - self.padding_B

    def mask(self, tokens: int) -> Tensor | None:
        """Which of S + T tokens the T next ones may see, if not all before them: (B, 1, T, S + T)."""
        if self.padding_B is None:
            return None
        key_S = torch.arange(self.length + tokens, device=self.padding_B.device)
        text_BS = key_S >= self.padding_B[:, None]
        # Padding sees itself, because attention to nothing is not a number.
        itself_TS = key_S == key_S[self.length :, None]
        return (text_BS[:, None, :] | itself_TS).unsqueeze(1)


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

    def new_cache(self, *, branches: int | None = None, padding: Tensor | None = None) -> TextCache:
        """An empty cache for reading a text in parts: `model(tokens, cache=cache)` returns the logits of the new ones.

        Args:
            branches: use the first branches only (default: all).
            padding: int64 (B,); so many tokens at the start of each row are padding, which is not seen and has no
                position, so that texts of several lengths can be read together. Any token will do.

        Raises:
            ValueError: a number of branches that the model does not have, or padding for a model with static mixing,
                whose matrices know tokens by their places.

        >>> model = CausalLM(CausalLMConfig(context=16, width=16, mlp=32, branches=3, depth=1)).eval()
        >>> tokens, cache = torch.randint(256, (2, 9)), model.new_cache(branches=2)
        >>> in_two = torch.cat([model(tokens[:, :5], cache=cache), model(tokens[:, 5:], cache=cache)], dim=1)
        >>> bool(torch.allclose(in_two, model(tokens, branches=2), atol=1e-5)), cache.length
        (True, 9)
        """
        if not isinstance(self.trunk, Branches) and branches not in (None, 1):
            self._branches(f"branches={branches}")
        if padding is not None and self.config.mixing == "static":
            raise ValueError(
                "padding is given, and this model mixes tokens by matrices that know them by their places; read texts "
                "of several lengths one at a time"
            )
        return TextCache(TrunkCache(self.trunk, branches=branches), padding)

    def forward(
        self, inputs: Any, *, branches: int | None = None, cache: TextCache | None = None, last: bool = False
    ) -> Tensor:
        """Logits (B, T, V) of the token after each of `inputs` (B, T).

        Args:
            inputs: whole numbers from 0 to vocab_size − 1.
            branches: use the first branches only (default: all); a cache has its own number.
            cache: of the tokens before these; it takes up these. Layers are evaluated one after another then.
            last: of the last token only, (B, 1, V).

        Raises:
            ValueError: tokens that the stem does not take, more than the context, a number of branches that the model
                does not have, or a cache of other rows.
        """
        if cache is None:
            logits_BTV = super().forward(inputs, branches=branches)
            return logits_BTV[:, -1:] if last else logits_BTV
        if branches is not None:
            raise ValueError(f"branches is {branches}; with a cache its own number counts: new_cache(branches=…)")
        x_BTD = self.stem(inputs, start=cache.start())
        cache.check_rows(len(x_BTD))
        mask = cache.mask(x_BTD.shape[1])
        state_BTD = cache.trunk.advance(x_BTD, *(() if mask is None else (mask,)))
        return self.decode(state_BTD[:, -1:] if last else state_BTD, inputs)
