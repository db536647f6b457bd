"""One task of a sequence as the training loop takes it, and the model that is told which task a sample is of.

Shapes: B batch, N classes, C channels, H, W pixels, … leading dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paradepth.data.batches import Batches
from paradepth.data.images import ImageData, ImageSplit
from paradepth.data.seeds import generator
from paradepth.distributed import World
from paradepth.models import ImageClassifier
from paradepth.train.config import Config
from paradepth.train.tasks import ImageTask

_NEVER = -1e4  # a logit whose probability is 0; finite, so that no gradient becomes not a number


class TaskClassifier(ImageClassifier):
    """An image classifier that chooses among some classes only: (images (B, C, H, W), allowed (B, N)) to logits.

    Its weights and its configuration are those of an `ImageClassifier`, as which it is saved.

    >>> from paradepth.models import ImageClassifierConfig
    >>> model = TaskClassifier(ImageClassifierConfig(image_size=8, patch_size=4, channels=1, num_classes=3, depth=1))
    >>> allowed = torch.tensor([[True, True, False]])
    >>> bool(model((torch.rand(1, 1, 8, 8), allowed)).argmax() < 2)
    True
    """

    def embed(self, inputs: tuple[Tensor, Tensor]) -> tuple[Any, tuple[Any, ...]]:
        """The trunk's input, of the images alone."""
        return super().embed(inputs[0])

    def decode(self, state: Any, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """Logits (…, B, N), those of other tasks' classes so low that they are never chosen."""
        return self.head(state).masked_fill(~inputs[1], _NEVER)


class MixedBatches:
    """Batches of which a part is new and the rest is drawn from a memory, a pure function of seed, pass and index.

    Args:
        new: batches of the new samples.
        memory: samples of earlier tasks, of which `count` are drawn for each batch, without a repetition where there
            are enough.
        count: samples of a batch that come from the memory.
        seed: of the draws.
    """

    def __init__(self, new: Batches, memory: ImageSplit, *, count: int, seed: int) -> None:
        self.new, self.memory, self.count, self.seed = new, memory, count, seed

    def __len__(self) -> int:
        """Batches of a pass over the new samples."""
        return len(self.new)

    def get(self, pass_index: int, batch_index: int) -> tuple[Tensor, Tensor]:
        """images_BCHW (uint8) and labels_B: the new samples, then those of the memory."""
        images, labels = self.new.get(pass_index, batch_index)
        draws, size = generator(self.seed, "replay", pass_index, batch_index), len(self.memory)
        if size >= self.count:
            chosen = torch.randperm(size, generator=draws)[: self.count]
        else:
            chosen = torch.randint(size, (self.count,), generator=draws)
        chosen = chosen.to(labels.device)
        return (
            torch.cat([images, self.memory.images_NCHW[chosen]]),
            torch.cat([labels, self.memory.labels_N[chosen]]),
        )


class SequenceTask(ImageTask):
    """The images of one task of a sequence.

    Args:
        config: options of training.
        data: the task's samples; its classes are those that the model has by then.
        memory: samples of earlier tasks that make up half of every batch.
        blocks_N: the task of each class, where it is known which task a sample is of.
    """

    def __init__(
        self, config: Config, data: ImageData, *, memory: ImageSplit | None = None, blocks_N: Tensor | None = None
    ) -> None:
        super().__init__(config, data)
        self.memory = memory
        self.blocks_N = None if blocks_N is None else blocks_N.to(data.train.labels_N.device)

    def batches(self, world: World) -> Any:
        if self.memory is None or not len(self.memory):
            return super().batches(world)
        size, seed = self.config.optimiser_options.batch_size, self.config.run_options.seed
        replayed = size // 2
        new = Batches(self.data.train, batch_size=size - replayed, seed=seed, drop_last=True)
        return MixedBatches(new, self.memory, count=replayed, seed=seed)

    def prepare(self, inputs: Tensor, targets: Tensor, *, step: int, first: int) -> tuple[Any, Tensor]:
        images, targets = super().prepare(inputs, targets, step=step, first=first)
        return self._told(images, targets), targets

    def ordered(self, split: str, start: int, stop: int) -> tuple[Any, Tensor]:
        images, targets = super().ordered(split, start, stop)
        return self._told(images, targets), targets

    def _told(self, images: Tensor, targets: Tensor) -> Any:
        if self.blocks_N is None:
            return images
        return images, self.blocks_N == self.blocks_N[targets][:, None]
