"""Batches whose order is a pure function of (seed, pass, batch): nothing to save, nothing to restore.

Shape suffixes: N samples of the split, B samples of a batch, C channels, H, W pixels.
"""

from __future__ import annotations

import torch

from paradepth.data.images import ImageSplit
from paradepth.data.seeds import generator


class Batches:
    """Shuffled batches of a split, addressed by pass and index.

    There is no iterator state: any process can ask for any batch at any time and gets the same samples, so a resumed
    run continues exactly, and a rank knows what the others read.

    Args:
        split: samples; batches lie on its device.
        batch_size: samples of a batch, over all ranks.
        seed: with the number of the pass it determines the order of the samples.
        rank, world_size: this process reads the rank-th of world_size equal slices; the slices in the order of the
            ranks are the batch that a single process reads.
        drop_last: leave out the samples of a pass that fill no batch. When False the last batch is smaller, slices of
            it may differ by one sample, and one may be empty.

    Raises:
        ValueError: when batch_size is not a positive multiple of world_size, the rank does not exist, or there are
            too few samples for one batch.

    >>> split = ImageSplit(torch.zeros(10, 1, 2, 2, dtype=torch.uint8), torch.arange(10))
    >>> batches = Batches(split, batch_size=4, seed=0)
    >>> len(batches), batches.get(0, 1)[0].shape
    (2, torch.Size([4, 1, 2, 2]))
    """

    def __init__(
        self,
        split: ImageSplit,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
    ) -> None:
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} does not exist: ranks are 0 to world_size - 1")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"batch_size is {batch_size}, but must be a positive multiple of the {world_size} process(es)"
            )
        smallest = batch_size if drop_last else 1
        if len(split) < smallest:
            raise ValueError(f"batch_size is {batch_size}, but there are only {len(split)} samples")
        self.split = split
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self._order: tuple[int, torch.Tensor] | None = None  # the last pass asked for and its permutation

    def __len__(self) -> int:
        """Batches of a pass."""
        full, rest = divmod(len(self.split), self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def indices(self, pass_index: int, batch_index: int) -> torch.Tensor:
        """Numbers of the samples, within the split, that :meth:`get` returns (int64, on the device of the split)."""
        if pass_index < 0:
            raise IndexError(f"pass {pass_index} does not exist: passes count from 0")
        if not 0 <= batch_index < len(self):
            raise IndexError(f"batch {batch_index} does not exist: a pass has {len(self)}")
        if self._order is None or self._order[0] != pass_index:
            self._order = (pass_index, self._permutation(pass_index))
        batch = self._order[1][batch_index * self.batch_size : (batch_index + 1) * self.batch_size]
        return batch.tensor_split(self.world_size)[self.rank]

    def get(self, pass_index: int, batch_index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's slice of a batch: images_BCHW (uint8) and labels_B (int64).

        Raises:
            IndexError: when pass or batch do not exist.
        """
        indices = self.indices(pass_index, batch_index)
        return self.split.images_NCHW[indices], self.split.labels_N[indices]

    def _permutation(self, pass_index: int) -> torch.Tensor:
        draws = generator(self.seed, "order of samples", pass_index)
        return torch.randperm(len(self.split), generator=draws).to(self.split.labels_N.device)
