"""Samples of different lengths: padding, and batches of similar lengths as pure functions of (seed, pass, batch).

Shape suffixes: N samples, B samples of a batch, T tokens of the longest of them, K sequences of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from paradepth.data.seeds import generator


class Ragged:
    """Sequences of whole numbers, one behind the other in one tensor.

    Args:
        flat: all numbers.
        lengths_N: length of each sequence.

    >>> texts = Ragged.of([[5, 6, 7], [8]])
    >>> texts.padded(torch.tensor([1, 0]), pad=0).tolist(), len(texts), texts[0].tolist()
    ([[8, 0, 0], [5, 6, 7]], 2, [5, 6, 7])
    >>> texts.padded(torch.tensor([1]), pad=0, length=4).tolist()
    [[8, 0, 0, 0]]
    """

    def __init__(self, flat: Tensor, lengths_N: Tensor) -> None:
        assert int(lengths_N.sum()) == len(flat)
        self.flat = flat
        self.lengths_N = lengths_N.long()
        self._starts_N = self.lengths_N.cumsum(0) - self.lengths_N

    @classmethod
    def of(cls, sequences: Iterable[Sequence[int]]) -> Ragged:
        """Of lists of numbers."""
        flat: list[int] = []
        lengths: list[int] = []
        for sequence in sequences:
            flat.extend(sequence)
            lengths.append(len(sequence))
        return cls(torch.tensor(flat, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.lengths_N)

    def __getitem__(self, index: int) -> Tensor:
        start = int(self._starts_N[index])
        return self.flat[start : start + int(self.lengths_N[index])]

    def padded(self, indices_B: Tensor, *, pad: int, length: int | None = None) -> Tensor:
        """The chosen sequences as int64 (B, T), filled up at their ends with `pad`; T is the length of the longest, or
        `length`, behind which nothing is kept."""
        lengths_B = self.lengths_N[indices_B]
        T = length if length is not None else int(lengths_B.max()) if len(lengths_B) else 0
        place_T = torch.arange(T, device=self.flat.device)
        inside_BT = place_T < lengths_B[:, None]
        at_BT = (self._starts_N[indices_B, None] + place_T).clamp(max=max(len(self.flat) - 1, 0))
        values_BT = self.flat[at_BT].long() if len(self.flat) else torch.zeros_like(at_BT)
        return torch.where(inside_BT, values_BT, pad)

    def to(self, device: torch.device | str) -> Ragged:
        """The same sequences on another device."""
        return Ragged(self.flat.to(device), self.lengths_N.to(device))


def mean_length(lengths_N: Tensor) -> int:
    """The mean of lengths, rounded, at least 1.

    >>> mean_length(torch.tensor([2, 4, 5]))
    4
    """
    return max(1, round(lengths_N.double().mean().item()))


class PaddedBatches:
    """Shuffled batches of samples of similar lengths, addressed by pass and index, as `Batches` of images are.

    In a pass samples are shuffled and cut into stretches of some batches. Within a stretch they are sorted by length,
    so that a batch is filled up with little padding; at last the batches are shuffled:

        shuffled   7 2 9 3 8 1 | 4 6 2 9 1 5        numbers are lengths, a stretch is three batches of two
        sorted     1 2 3 7 8 9 | 1 2 4 5 6 9
        batches    4 5, 8 9, 1 2, 6 9, 1 2, 3 7

    Args:
        lengths_N: length of each sample; (N, K) where a sample is several sequences: similar in the sum of their
            lengths, then in the first.
        collate: from numbers of samples to a batch, such as inputs and targets padded by `Ragged.padded`.
        batch_size: samples of a batch, over all ranks.
        seed: with the number of the pass it determines the order.
        rank, world_size: this process reads the rank-th of world_size equal slices; the slices in the order of the
            ranks are the batch that a single process reads, but for padding.
        drop_last: leave out the samples of a pass that fill no batch. When False one batch is smaller, slices of it
            may differ by one sample, and one may be empty.
        stretch: batches that are sorted together; 1 does not sort.

    Raises:
        ValueError: when batch_size is not a positive multiple of world_size, the rank does not exist, or there are
            too few samples for one batch.

    >>> texts = Ragged.of([[1] * n for n in (7, 2, 9, 3, 8, 1)])
    >>> batches = PaddedBatches(texts.lengths_N, lambda chosen: texts.padded(chosen, pad=0), batch_size=2, seed=0)
    >>> sorted(tuple(batches.get(0, i).shape) for i in range(len(batches)))
    [(2, 2), (2, 7), (2, 9)]
    """

    def __init__(
        self,
        lengths_N: Tensor,
        collate: Callable[[Tensor], Any],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        stretch: int = 64,
    ) -> None:
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} does not exist: ranks are 0 to world_size - 1")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"batch_size is {batch_size}, but must be a positive multiple of the {world_size} process(es)"
            )
        if len(lengths_N) < (batch_size if drop_last else 1):
            raise ValueError(f"batch_size is {batch_size}, but there are only {len(lengths_N)} samples")
        if stretch < 1:
            raise ValueError(f"stretch is {stretch}, but must be at least 1 batch")
        self.device = lengths_N.device
        self.lengths_NK = lengths_N.cpu().reshape(len(lengths_N), -1).long()
        self.collate = collate
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.stretch = stretch
        self._order: tuple[int, list[Tensor]] | None = None  # the last pass asked for and its batches

    def __len__(self) -> int:
        """Batches of a pass."""
        full, rest = divmod(len(self.lengths_NK), self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def indices(self, pass_index: int, batch_index: int) -> Tensor:
        """Numbers of the samples that :meth:`get` returns (int64, on the device of the lengths).

        Raises:
            IndexError: when pass or batch do not exist.
        """
        if pass_index < 0:
            raise IndexError(f"pass {pass_index} does not exist: passes count from 0")
        if not 0 <= batch_index < len(self):
            raise IndexError(f"batch {batch_index} does not exist: a pass has {len(self)}")
        if self._order is None or self._order[0] != pass_index:
            self._order = (pass_index, self._batches(pass_index))
        return self._order[1][batch_index].tensor_split(self.world_size)[self.rank].to(self.device)

    def get(self, pass_index: int, batch_index: int) -> Any:
        """This rank's slice of a batch, as `collate` makes it.

        Raises:
            IndexError: when pass or batch do not exist.
        """
        return self.collate(self.indices(pass_index, batch_index))

    def _batches(self, pass_index: int) -> list[Tensor]:
        draws = generator(self.seed, "order of padded samples", pass_index)
        order = torch.randperm(len(self.lengths_NK), generator=draws)[: len(self) * self.batch_size]
        batches = []
        for stretch in order.split(self.stretch * self.batch_size):
            if self.stretch > 1:
                for key_N in (self.lengths_NK[:, 0], self.lengths_NK.sum(dim=1)):  # the last sort is the first key
                    stretch = stretch[key_N[stretch].argsort(stable=True)]
            batches += stretch.split(self.batch_size)
        return [batches[i] for i in torch.randperm(len(batches), generator=draws).tolist()]
