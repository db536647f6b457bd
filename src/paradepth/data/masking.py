"""Masking: some tokens of each text are hidden, and a model has to guess them.

Shapes: B texts, T tokens, P hidden tokens of the text that has most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paradepth.data.seeds import generator

IGNORED = -100  # the target of a place that does not count


@dataclass(frozen=True)
class Masking:
    """What is hidden and by what: of each text `rate` of its ordinary tokens, rounded and at least one; 80 % of those
    are replaced by the mask token, 10 % by any ordinary token, 10 % stay as they are. Source: BERT (arXiv 1810.04805).

    Attributes:
        rate: part of a text's ordinary tokens, between 0 and 1.
        mask: number of the mask token.
        vocab_size: V.
        special: numbers of the tokens that are never hidden and never put in place of others.

    Raises:
        ValueError: a rate that hides nothing or everything, or a vocabulary without ordinary tokens.
    """

    rate: float
    mask: int
    vocab_size: int
    special: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ValueError(f"masking is {self.rate}; it must be above 0 and below 1 (BERT hides 0.15)")
        if len(self.ordinary()) < 1:
            raise ValueError(f"a vocabulary of {self.vocab_size} tokens, all special, has none to guess")

    def ordinary(self) -> Tensor:
        """Numbers of the ordinary tokens, ascending."""
        is_ordinary_V = torch.ones(self.vocab_size, dtype=torch.bool)
        is_ordinary_V[list(self.special)] = False
        return is_ordinary_V.nonzero().flatten()

    def __call__(
        self, tokens_BT: Tensor, *, seed: int, purpose: str, numbers: tuple[int, ...], first: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Texts with hidden tokens, their places, and what stood there.

        Text i is masked as (seed, purpose, *numbers, first + i) determine, whatever the other texts and however much
        padding there is.

        Args:
            tokens_BT: texts; special tokens (padding among them) are left alone.
            seed: of the draws.
            purpose: keeps these draws apart from others.
            numbers: further counters, such as the step.
            first: number of the first of these texts.

        Returns:
            tokens (B, T), places (B, P) ascending, targets (B, P); where a text has fewer than P hidden tokens its
            last places are 0 and their targets `IGNORED`.

        Raises:
            ValueError: a text without an ordinary token.

        >>> masking = Masking(0.4, mask=3, vocab_size=20, special=(0, 1, 2, 3))
        >>> texts = torch.tensor([[1, 7, 8, 9, 10, 11, 2], [1, 7, 8, 2, 0, 0, 0]])
        >>> tokens_BT, places_BP, targets_BP = masking(texts, seed=0, purpose="example", numbers=(), first=0)
        >>> targets_BP.shape, int(targets_BP[1, 1]), bool((texts.gather(1, places_BP) == targets_BP)[0].all())
        (torch.Size([2, 2]), -100, True)
        """
        device = tokens_BT.device
        source_BT, ordinary = tokens_BT.cpu(), self.ordinary()
        maskable_BT = torch.isin(source_BT, torch.tensor(self.special), invert=True)
        hidden, places, targets = source_BT.clone(), [], []
        for i, (text_T, maskable_T) in enumerate(zip(source_BT, maskable_BT, strict=True)):
            candidates = maskable_T.nonzero().flatten()
            if not len(candidates):
                raise ValueError(f"text {first + i} has no ordinary token that could be hidden")
            draws = generator(seed, purpose, *numbers, first + i)
            count = max(1, round(self.rate * len(candidates)))
            place_P = candidates[torch.randperm(len(candidates), generator=draws)[:count]].sort().values
            kind_P = torch.rand(count, generator=draws)
            random_P = ordinary[torch.randint(len(ordinary), (count,), generator=draws)]
            replaced_P = torch.where(kind_P < 0.9, random_P, text_T[place_P])
            hidden[i, place_P] = torch.where(kind_P < 0.8, self.mask, replaced_P)
            places.append(place_P)
            targets.append(text_T[place_P])
        pad = torch.nn.utils.rnn.pad_sequence
        places_BP, targets_BP = pad(places, batch_first=True), pad(targets, batch_first=True, padding_value=IGNORED)
        return hidden.to(device), places_BP.to(device), targets_BP.to(device)
