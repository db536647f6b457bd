"""Text with hidden tokens to the tokens that are hidden.

Shapes: B windows, T tokens of a window with its two ends, P hidden tokens, N windows of a split.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paradepth.data.masking import Masking
from paradepth.data.text import TextData
from paradepth.data.text_batches import ordered_windows
from paradepth.models import MaskedLM
from paradepth.train.config import Config
from paradepth.train.tasks.windows import WindowTask

RATE = 0.15
_EVALUATION_SEED = 0  # not the run's, so that what runs of different seeds have to guess is the same
_EVALUATED_LOGITS = 2**25  # of one prefix at a time


class MaskedTask(WindowTask):
    """Guesses hidden tokens: a sample is a window of the text between <s> and </s>, `context` tokens together.

    Loss and accuracy are those of the hidden tokens. Training hides others in every pass, validation and test always
    the same ones.

    Raises:
        ValueError: also for a text that is shorter than its windows, or a tokeniser without special tokens.
    """

    model_class = MaskedLM
    own_options = (*WindowTask.own_options, "masking")
    tokenizer = "bpe"
    special_tokens = True

    def __init__(self, config: Config, data: TextData) -> None:
        self._ends = tuple(data.tokenizer.special(name) for name in ("<s>", "</s>"))
        super().__init__(config, data)
        context: int = self.shape.context
        if context < 3:
            raise ValueError(f"context is {context}; a masked language model needs at least 3: <s>, a token and </s>")
        self.window = context - 2
        self.unit = f"windows of {context} tokens"
        rate = config.data_options.masking
        self.masking = Masking(
            RATE if rate is None else rate,
            mask=data.tokenizer.special("<mask>"),
            vocab_size=data.vocab_size,
            special=tuple(data.tokenizer.specials.values()),
        )
        logits = max(1, round(self.masking.rate * self.window)) * data.vocab_size * max(self.shape.branches, 1)
        self.evaluation_batch = max(1, min(256, _EVALUATED_LOGITS // logits))
        self.check_lengths()

    def data_shape(self) -> dict[str, Any]:
        return {"vocab_size": self.data.vocab_size, "pad": self.data.tokenizer.special("<pad>")}

    def _between_ends(self, windows_BT: Tensor) -> Tensor:
        first_B1, last_B1 = (windows_BT.new_full((len(windows_BT), 1), end) for end in self._ends)
        return torch.cat([first_B1, windows_BT, last_B1], dim=1)

    def prepare(self, inputs: Tensor, targets: Tensor, *, step: int, first: int) -> tuple[Any, Tensor]:
        tokens_BT, places_BP, targets_BP = self.masking(
            self._between_ends(inputs),
            seed=self.config.run_options.seed,
            purpose="masking",
            numbers=(step,),
            first=first,
        )
        return (tokens_BT, places_BP), targets_BP

    def ordered(self, split: str, start: int, stop: int) -> tuple[Any, Tensor]:
        windows_BT = ordered_windows(self.tokens(split), self.window)[0][start:stop].long()
        tokens_BT, places_BP, targets_BP = self.masking(
            self._between_ends(windows_BT),
            seed=_EVALUATION_SEED,
            purpose=f"masking of the {split} text",
            numbers=(),
            first=start,
        )
        device = self.data.device
        return (tokens_BT.to(device), places_BP.to(device)), targets_BP.to(device)

    def measures(self, loss: list[float], split: str) -> dict[str, list[float]]:
        """Perplexity e^loss, of a hidden token."""
        return {"perplexity": self.perplexity(loss)}
