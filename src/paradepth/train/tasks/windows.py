"""What tasks on windows of a text share.

Shapes: N windows of a split.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar, Self

from torch import Tensor

from paradepth.data.text import SPLITS, TEXT_NAMES, TextData, load_text
from paradepth.data.text_batches import TextBatches, ordered_windows, shuffled_windows
from paradepth.distributed import World
from paradepth.train.config import Config
from paradepth.train.tasks.base import Task


class WindowTask(Task):
    """A task whose samples are windows of a text.

    Attributes:
        window: tokens of the text that a sample has.
    """

    data_names: ClassVar[tuple[str, ...]] = TEXT_NAMES
    kind = "text"
    own_options = ("tokenizer", "vocab_size")
    tokenizer: ClassVar[str]  # unless another is asked for
    special_tokens: ClassVar[bool] = False  # whether bytes come with special tokens

    data: TextData
    window: int

    @classmethod
    def load(cls, config: Config, *, assets: Path | None = None) -> Self:
        d = config.data_options
        data = load_text(
            d.data,
            data_dir=d.data_dir,
            validation_fraction=d.validation_fraction,
            train_fraction=d.train_fraction,
            tokenizer=d.tokenizer or cls.tokenizer,
            vocab_size=d.vocab_size,
            special=cls.special_tokens,
            seed=config.run_options.seed,
            assets=assets,
        )
        return cls(config, data)

    def save_assets(self, folder: Path) -> None:
        self.data.tokenizer.save(folder)

    def check_lengths(self, *, noun: str = "tokens") -> None:
        """Refuses a text that is shorter than its windows.

        Args:
            noun: what its tokens are called.

        Raises:
            ValueError: naming the split.
        """
        for split in SPLITS:
            if self.count(split) < 1:
                raise ValueError(
                    f"context is {self.shape.context}, but the {split} text of {self.data.name!r} has only "
                    f"{len(self.tokens(split))} {noun}; take a shorter context or a longer text"
                )

    def tokens(self, split: str) -> Tensor:
        """The text of a split, one dimension."""
        return getattr(self.data, split)

    def count(self, split: str) -> int:
        tokens = self.tokens(split)
        if split == "train":
            return shuffled_windows(len(tokens), self.window)
        return len(ordered_windows(tokens, self.window)[0])

    def batches(self, world: World) -> TextBatches:
        size, seed = self.config.optimiser_options.batch_size, self.config.run_options.seed
        return TextBatches(
            self.data.train, self.window, size, seed, rank=world.rank, world_size=world.size, device=self.data.device
        )

    @staticmethod
    def perplexity(loss: list[float]) -> list[float]:
        """e^loss."""
        return [math.exp(value) if value < 700 else math.inf for value in loss]
