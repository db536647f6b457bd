"""Text to the byte that follows.

Shapes: B batch, T tokens (the context), N windows of a split.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor

from paradepth.data.text import TEXT_NAMES, TextData, load_text
from paradepth.data.text_batches import TextBatches, ordered_windows, shuffled_windows
from paradepth.distributed import World
from paradepth.models import CausalLM
from paradepth.train.config import Config
from paradepth.train.tasks.base import Task

_EVALUATED_TOKENS = 2**15  # at a time: their logits of every prefix are in memory together


class LanguageTask(Task):
    """Predicts every next byte: a sample is a window of `context` bytes, with as many targets.

    Raises:
        ValueError: also for a text that is shorter than its windows.
    """

    model_class = CausalLM
    data_names: ClassVar[tuple[str, ...]] = TEXT_NAMES
    kind = "text"

    data: TextData

    def __init__(self, config: Config, data: TextData) -> None:
        super().__init__(config, data)
        self.context: int = self.shape.context
        self.unit = f"windows of {self.context} bytes"
        self.evaluation_batch = max(1, _EVALUATED_TOKENS // self.context)
        for split in ("train", "validation", "test"):
            if self.count(split) < 1:
                raise ValueError(
                    f"context is {self.context}, but the {split} text of {data.name!r} has only "
                    f"{len(self._tokens(split))} bytes; take a shorter context or a longer text"
                )

    @classmethod
    def load(cls, config: Config, *, assets: Path | None = None) -> Self:
        d = config.data_options
        return cls(config, load_text(d.data, data_dir=d.data_dir, validation_fraction=d.validation_fraction))

    def data_shape(self) -> dict[str, Any]:
        return {"vocab_size": self.data.vocab_size}

    def _tokens(self, split: str) -> Tensor:
        return getattr(self.data, split)

    def count(self, split: str) -> int:
        tokens = self._tokens(split)
        if split == "train":
            return shuffled_windows(len(tokens), self.context)
        return len(ordered_windows(tokens, self.context)[0])

    def batches(self, world: World) -> TextBatches:
        size, seed = self.config.optimiser_options.batch_size, self.config.run_options.seed
        return TextBatches(self.data.train, self.context, size, seed, rank=world.rank, world_size=world.size)

    def ordered(self, split: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        inputs_NT, targets_NT = ordered_windows(self._tokens(split), self.context)
        return inputs_NT[start:stop].long(), targets_NT[start:stop].long()

    def measures(self, loss: list[float], split: str) -> dict[str, list[float]]:
        """Perplexity e^loss and bits per byte loss / ln 2; a token is a byte, so both are about bytes."""
        return {
            "perplexity": [math.exp(value) if value < 700 else math.inf for value in loss],
            "bits_per_byte": [value / math.log(2) for value in loss],
        }
