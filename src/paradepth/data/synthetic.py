"""Sequences made by a rule, for which what a token has to look at depends on the tokens: recall, copying, sorting.

    recall          aQcMbX|bXaQcM      pairs, then every key again: the value that stood behind it
    copying         .x..yz|xyz         symbols scattered among blanks, then the symbols in their order
    copying_fixed   xyz...|xyz         the same, but always in the same places: no content is needed to know where
    sorting         qdbd|bddq          symbols, then the symbols in the order of the alphabet

(answers stand behind the bar: all of them, in recall every second token). A token is a byte of ASCII text, so a model
of such sequences has the tokeniser of bytes, and continues a prompt that is typed in.

Sources: associative recall as in Zoology (arXiv 2312.04927), where every key is asked for; copying among blanks as the
selective copying of Mamba (arXiv 2312.00752).

Shapes: B sequences, N tokens of a sequence, n its length (pairs or symbols), T = N − 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paradepth.data.seeds import generator

SEQUENCE_NAMES = ("recall", "copying", "copying_fixed", "sorting")
PASS = 2**14  # sequences of a pass; the next pass has new ones
HELD_OUT = 2000  # sequences of the validation split, and of the test split

_LETTERS = torch.tensor(list(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"))
_LOWER = _LETTERS[:26]
_BAR, _BLANK = ord("|"), ord(".")
_MOST = {"recall": 26, "copying": 512, "copying_fixed": 512, "sorting": 512}


def _symbols(rows: int, length: int, draws: torch.Generator) -> Tensor:
    return _LOWER[torch.randint(len(_LOWER), (rows, length), generator=draws)]


def _any_order(rows: int, count: int, draws: torch.Generator) -> Tensor:
    return torch.rand(rows, count, generator=draws).argsort(dim=1)


def _recall(rows: int, n: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    keys_Bn = _LETTERS[_any_order(rows, 2 * n, draws)[:, :n]]  # different ones, of twice as many
    values_Bn = _LETTERS[torch.randint(len(_LETTERS), (rows, n), generator=draws)]
    pairs_Bn2 = torch.stack([keys_Bn, values_Bn], dim=2)
    order_Bn1 = _any_order(rows, n, draws)[:, :, None]
    asked_Bn2 = pairs_Bn2.gather(1, order_Bn1.expand(-1, -1, 2))
    tokens_BN = torch.cat([pairs_Bn2.flatten(1), _bar(rows), asked_Bn2.flatten(1)], dim=1)
    answer_N = torch.arange(4 * n + 1)
    return tokens_BN, (answer_N > 2 * n) & (answer_N % 2 == 0)


def _copying(rows: int, n: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    symbols_Bn = _symbols(rows, n, draws)
    places_Bn = _any_order(rows, 2 * n, draws)[:, :n].sort(dim=1).values
    return _after_bar(torch.full((rows, 2 * n), _BLANK).scatter(1, places_Bn, symbols_Bn), symbols_Bn)


def _copying_fixed(rows: int, n: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    symbols_Bn = _symbols(rows, n, draws)
    return _after_bar(torch.cat([symbols_Bn, torch.full((rows, n), _BLANK)], dim=1), symbols_Bn)


def _sorting(rows: int, n: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    symbols_Bn = _symbols(rows, n, draws)
    return _after_bar(symbols_Bn, symbols_Bn.sort(dim=1).values)


def _bar(rows: int) -> Tensor:
    return torch.full((rows, 1), _BAR)


def _after_bar(given_BG: Tensor, answers_Bn: Tensor) -> tuple[Tensor, Tensor]:
    tokens_BN = torch.cat([given_BG, _bar(len(given_BG)), answers_Bn], dim=1)
    return tokens_BN, torch.arange(tokens_BN.shape[1]) > given_BG.shape[1]


_RULES: dict[str, Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]] = {
    "recall": _recall,
    "copying": _copying,
    "copying_fixed": _copying_fixed,
    "sorting": _sorting,
}


def draw_sequences(name: str, length: int, rows: int, *, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences of one kind.

    Args:
        name: one of `SEQUENCE_NAMES`.
        length: n, pairs of recall, at most 26; or symbols, at most 512.
        rows: B.
        draws: what they are drawn with.

    Returns:
        Tokens, int64 (B, N), and which places have the answers, booleans (N,).

    Raises:
        ValueError: unknown name, or a length out of range.

    >>> tokens_BN, answer_N = draw_sequences("sorting", 4, 1, draws=generator(0, "a doctest"))
    >>> bytes(tokens_BN[0].tolist()), answer_N.sum().item()
    (b'wgtg|ggtw', 4)
    """
    check_length(name, length)
    return _RULES[name](rows, length, draws)


def check_length(name: str, length: int) -> None:
    """Refuses sequences that there are not.

    Raises:
        ValueError: unknown name, or a length out of range.
    """
    if name not in _RULES:
        raise ValueError(f"unknown sequences {name!r}. Known: {', '.join(SEQUENCE_NAMES)}")
    if not 1 <= length <= _MOST[name]:
        raise ValueError(f"length is {length}; sequences of {name} have a length between 1 and {_MOST[name]}")


@functools.lru_cache(maxsize=4)
def _held_out(name: str, length: int, split: str) -> tuple[Tensor, Tensor]:
    """All sequences of a split, on the CPU, and which of their tokens are answers; batch after batch asks for them."""
    return draw_sequences(name, length, HELD_OUT, draws=generator(0, f"{split} sequences of {name}", length))


@dataclass(frozen=True)
class SequenceData:
    """Sequences of one kind and length; what is drawn is a function of the seed, the split and the place in it.

    Validation and test are the same for all seeds, and drawn from streams of their own.

    Args:
        name: one of `SEQUENCE_NAMES`.
        length: n.
        seed: of the training sequences.
        device: where sequences go.

    Raises:
        ValueError: unknown name, or a length out of range.

    >>> data = SequenceData("recall", 3)
    >>> inputs_BT, answers_BT, answered_T = data.held_out("test", 0, 5)
    >>> inputs_BT.shape, data.tokens, bytes(inputs_BT[0, :7].tolist()), answered_T.nonzero().flatten().tolist()
    (torch.Size([5, 12]), 12, b'bXcPdn|', [7, 9, 11])
    """

    name: str
    length: int
    seed: int = 0
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        check_length(self.name, self.length)

    @property
    def tokens(self) -> int:
        """T, tokens that a model reads of a sequence: all but the last."""
        return {"recall": 4, "sorting": 2}.get(self.name, 3) * self.length

    def to(self, device: torch.device | str) -> SequenceData:
        """The same data on another device."""
        return replace(self, device=device)

    def training(self, pass_index: int, batch_index: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """A batch of training sequences, drawn anew for every pass and batch; returns what `held_out` does."""
        draws = generator(self.seed, f"training sequences of {self.name}", self.length, pass_index, batch_index)
        return self._cut(*draw_sequences(self.name, self.length, rows, draws=draws))

    def held_out(self, split: str, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sequences start, … stop − 1 of "validation" or "test", those that exist.

        Returns:
            What a model reads, int64 (B, T); the token after each, (B, T); and which of these are answers, booleans
            (T,).
        """
        tokens_BN, answer_N = _held_out(self.name, self.length, split)
        return self._cut(tokens_BN[start:stop], answer_N)

    def _cut(self, tokens_BN: Tensor, answer_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens_BN, answer_N = tokens_BN.to(self.device), answer_N.to(self.device)
        return tokens_BN[:, :-1], tokens_BN[:, 1:], answer_N[1:]
