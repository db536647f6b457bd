"""Text with hidden tokens to the tokens that are hidden.

Shapes: B windows, T tokens of a window with its two ends, P hidden tokens, N windows of a split.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from paradepth.data.masking import Masking
from paradepth.data.text import SPLITS, TEXT_NAMES, TextData, load_text
from paradepth.data.text_batches import TextBatches, ordered_windows, shuffled_windows
from paradepth.distributed import World
from paradepth.models import MaskedLM
from paradepth.train.config import Config
from paradepth.train.tasks.base import Task

RATE = 0.15
_EVALUATION_SEED = 0  # not the run's, so that what runs of different seeds have to guess is the same
_EVALUATED_LOGITS = 2**25  # of one prefix at a time


class MaskedTask(Task):
    """Guesses hidden tokens: a sample is a window of the text between <s> and </s>, `context` tokens together.

    Loss and accuracy are those of the hidden tokens. Training hides others in every pass, validation and test always
    the same ones.

    Raises:
        ValueError: also for a text that is shorter than its windows, or a tokeniser without special tokens.
    """

    model_class = MaskedLM
    data_names: ClassVar[tuple[str, ...]] = TEXT_NAMES
    kind = "text"
    own_options = ("tokenizer", "vocab_size", "masking")

    data: TextData

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
        for split in SPLITS:
            if self.count(split) < 1:
                raise ValueError(
                    f"context is {context}, but the {split} text of {data.name!r} has only {len(self._tokens(split))} "
                    "tokens; take a shorter context or a longer text"
                )

    @classmethod
    def load(cls, config: Config, *, assets: Path | None = None) -> Self:
        d = config.data_options
        data = load_text(
            d.data,
            data_dir=d.data_dir,
            validation_fraction=d.validation_fraction,
            tokenizer=d.tokenizer or "bpe",
            vocab_size=d.vocab_size,
            special=True,
            assets=assets,
        )
        return cls(config, data)

    def save_assets(self, folder: Path) -> None:
        self.data.tokenizer.save(folder)

    def data_shape(self) -> dict[str, Any]:
        return {"vocab_size": self.data.vocab_size, "pad": self.data.tokenizer.special("<pad>")}

    def _tokens(self, split: str) -> Tensor:
        return getattr(self.data, split)

    def count(self, split: str) -> int:
        tokens = self._tokens(split)
        if split == "train":
            return shuffled_windows(len(tokens), self.window)
        return len(ordered_windows(tokens, self.window)[0])

    def batches(self, world: World) -> TextBatches:
        size, seed = self.config.optimiser_options.batch_size, self.config.run_options.seed
        return TextBatches(
            self.data.train, self.window, size, seed, rank=world.rank, world_size=world.size, device=self.data.device
        )

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
        windows_BT = ordered_windows(self._tokens(split), self.window)[0][start:stop].long()
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
        return {"perplexity": [math.exp(value) if value < 700 else math.inf for value in loss]}
