"""Windows of a text: shuffled batches that are a pure function of (seed, pass, batch), and windows in order.

Shape suffixes: B windows of a batch, T tokens (the context).
"""

from __future__ import annotations

import torch

from paradepth.data.seeds import generator


class TextBatches:
    """Shuffled batches of windows, addressed by pass and index, as `Batches` of images are.

    A window is `context` + 1 tokens: `context` inputs, and for each of them the token after it as target. In a pass
    windows stand `context` apart from a random start, so that each token is an input once and a target once, save
    the fewer than two windows at the ends of the text and what fills no batch; the next pass cuts elsewhere.

        pass 0   ..|----|----|----|----|...        | a token that is the last target of one window
        pass 1   |----|----|----|----|.....          and the first input of the next

    Args:
        tokens: whole numbers of any type, one dimension, on the CPU; of a corpus on the disk only the windows of a
            batch are read.
        context: T.
        batch_size: windows of a batch, over all ranks.
        seed: with the number of the pass it determines start and order of the windows.
        rank, world_size: this process reads the rank-th of world_size equal slices; the slices in the order of the
            ranks are the batch that a single process reads.
        device: where batches go.

    Raises:
        ValueError: when batch_size is not a positive multiple of world_size, the rank does not exist, or there are
            too few windows for one batch.

    >>> batches = TextBatches(torch.arange(100), context=8, batch_size=4, seed=0)
    >>> inputs_BT, targets_BT = batches.get(0, 1)
    >>> len(batches), inputs_BT.shape, bool((targets_BT == inputs_BT + 1).all())
    (2, torch.Size([4, 8]), True)
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        context: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        if context < 1:
            raise ValueError(f"context is {context}, but must be at least 1 token")
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} does not exist: ranks are 0 to world_size - 1")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"batch_size is {batch_size}, but must be a positive multiple of the {world_size} process(es)"
            )
        self.windows = shuffled_windows(len(tokens), context)
        if self.windows < batch_size:
            raise ValueError(
                f"batch_size is {batch_size}, but {len(tokens)} tokens have only {self.windows} windows of {context}"
            )
        self.tokens = tokens
        self.context = context
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self._starts: tuple[int, torch.Tensor] | None = None  # the last pass asked for and where its windows start

    def __len__(self) -> int:
        """Batches of a pass."""
        return self.windows // self.batch_size

    def starts(self, pass_index: int, batch_index: int) -> torch.Tensor:
        """Where the windows that :meth:`get` returns start (int64, on the CPU)."""
        if pass_index < 0:
            raise IndexError(f"pass {pass_index} does not exist: passes count from 0")
        if not 0 <= batch_index < len(self):
            raise IndexError(f"batch {batch_index} does not exist: a pass has {len(self)}")
        if self._starts is None or self._starts[0] != pass_index:
            self._starts = (pass_index, self._shuffled(pass_index))
        batch = self._starts[1][batch_index * self.batch_size : (batch_index + 1) * self.batch_size]
        return batch.tensor_split(self.world_size)[self.rank]

    def get(self, pass_index: int, batch_index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's slice of a batch: inputs_BT and targets_BT, int64, on the device.

        Raises:
            IndexError: when pass or batch do not exist.
        """
        starts_B = self.starts(pass_index, batch_index)
        windows = self.tokens[starts_B[:, None] + torch.arange(self.context + 1)].long().to(self.device)
        return windows[:, :-1], windows[:, 1:]

    def _shuffled(self, pass_index: int) -> torch.Tensor:
        draws = generator(self.seed, "order of windows", pass_index)
        first = int(torch.randint(self.context, (), generator=draws))
        return first + self.context * torch.randperm(self.windows, generator=draws)


def shuffled_windows(tokens: int, context: int) -> int:
    """How many windows a pass has, wherever it starts.

    >>> shuffled_windows(100, 8)
    11
    """
    return max(tokens - context, 0) // context


def ordered_windows(tokens: torch.Tensor, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All windows in the order of the text, none overlapping: inputs and targets, each (windows, context), views.

    What is left at the end and fills no window is left out.

    >>> inputs, targets = ordered_windows(torch.arange(9), 4)
    >>> inputs.tolist(), targets.tolist()
    ([[0, 1, 2, 3], [4, 5, 6, 7]], [[1, 2, 3, 4], [5, 6, 7, 8]])
    """
    count = max(len(tokens) - 1, 0) // context
    used = tokens[: count * context + 1]
    return used[: count * context].view(count, context), used[1 : count * context + 1].view(count, context)
