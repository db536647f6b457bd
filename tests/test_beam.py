"""Search: greedy and beam search against plain loops and exhaustive search, on made-up next-token probabilities."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paradepth.models.beam import Hypothesis, beam_search, greedy_search

V, END, START = 4, 0, 3


class Toy:
    """Logits that depend on the sentence and on all tokens so far; remembers how often it was asked."""

    def __init__(self, sentences: list[int]) -> None:
        self.rows: list[tuple[int, ...]] = [(number,) for number in sentences]
        self.calls = 0
        self.sizes: list[int] = []

    @staticmethod
    def logits(row: tuple[int, ...]) -> Tensor:
        seed = sum((token + 1) * 31**place for place, token in enumerate(row)) % 2**62
        return 2 * torch.randn(V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def advance(self, tokens_B: Tensor) -> Tensor:
        self.calls += 1
        self.sizes.append(len(tokens_B))
        self.rows = [(*row, token) for row, token in zip(self.rows, tokens_B.tolist(), strict=True)]
        return torch.stack([self.logits(row) for row in self.rows])

    def reorder(self, rows_B: Tensor) -> None:
        self.rows = [self.rows[row] for row in rows_B.tolist()]


def starts(sentences: list[int]) -> Tensor:
    return torch.full((len(sentences),), START)


def log_probability(sentence: int, tokens: tuple[int, ...], forbidden: tuple[int, ...] = ()) -> float:
    total, row = 0.0, (sentence, START)
    for token in tokens:
        logits = Toy.logits(row)
        logits[list(forbidden)] = -math.inf
        total += float(logits.log_softmax(-1)[token])
        row = (*row, token)
    return total


def every_hypothesis(sentence: int, longest: int, alpha: float, forbidden: tuple[int, ...]) -> list[Hypothesis]:
    """All texts that end within `longest` tokens, and those of that length that do not."""
    words = [token for token in range(V) if token not in (END, *forbidden)]
    found = []
    for length in range(longest + 1):
        for text in itertools.product(words, repeat=length):
            whole = text if length == longest else (*text, END)
            total = log_probability(sentence, whole, forbidden)
            found.append(Hypothesis(list(text), total, total / len(whole) ** alpha, length < longest))
    return sorted(found, key=lambda h: -h.score)


sentences = st.lists(st.integers(0, 10**6), min_size=1, max_size=3)
forbid = st.sampled_from([(), (START,), (1, START)])
alphas = st.sampled_from([0.0, 0.6, 1.0, 2.0])


@given(sentences, st.integers(1, 4), alphas, forbid)
def test_a_beam_as_wide_as_there_are_hypotheses_searches_them_all(
    many: list[int], longest: int, alpha: float, forbidden: tuple[int, ...]
) -> None:
    expected = [every_hypothesis(number, longest, alpha, forbidden) for number in many]
    found = beam_search(
        Toy(many),
        starts(many),
        beams=len(expected[0]),
        end=END,
        max_tokens=longest,
        length_penalty=alpha,
        forbidden=forbidden,
    )
    for mine, true in zip(found, expected, strict=True):
        assert [h.tokens for h in mine] == [h.tokens for h in true]
        assert [h.ended for h in mine] == [h.ended for h in true]
        assert [h.score for h in mine] == pytest.approx([h.score for h in true], abs=1e-12)
        assert [h.log_probability for h in mine] == pytest.approx([h.log_probability for h in true], abs=1e-12)


@given(sentences, st.integers(1, 12), forbid)
def test_greedy_is_an_argmax_loop_and_what_one_beam_finds(
    many: list[int], longest: int, forbidden: tuple[int, ...]
) -> None:
    options: dict[str, Any] = {"end": END, "max_tokens": longest, "forbidden": forbidden}
    greedy = greedy_search(Toy(many), starts(many), **options)
    beam = beam_search(Toy(many), starts(many), beams=1, **options)
    for number, mine, other in zip(many, greedy, beam, strict=True):
        row, text = (number, START), []
        for _ in range(longest):
            logits = Toy.logits(row)
            logits[list(forbidden)] = -math.inf
            row = (*row, int(logits.argmax()))
            if row[-1] == END:
                break
            text.append(row[-1])
        assert mine.tokens == text
        assert mine.ended == (row[-1] == END)
        whole = tuple(text) + (END,) * mine.ended
        assert mine.log_probability == pytest.approx(log_probability(number, whole, forbidden), abs=1e-12)
        assert mine.score == pytest.approx(mine.log_probability / len(whole), abs=1e-12)
        assert len(other) == 1
        assert (other[0].tokens, other[0].ended) == (mine.tokens, mine.ended)
        assert other[0].score == pytest.approx(mine.score, abs=1e-12)


@given(sentences, st.integers(1, 4), st.integers(1, 8))
def test_a_sentence_is_translated_alike_alone_and_among_others(many: list[int], beams: int, longest: int) -> None:
    options: dict[str, Any] = {"end": END, "max_tokens": longest}
    together = beam_search(Toy(many), starts(many), beams=beams, **options)
    alone = [beam_search(Toy([number]), starts([number]), beams=beams, **options)[0] for number in many]
    assert [[h.tokens for h in found] for found in together] == [[h.tokens for h in found] for found in alone]
    greedy = greedy_search(Toy(many), starts(many), **options)
    assert greedy == [greedy_search(Toy([number]), starts([number]), **options)[0] for number in many]


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_hypotheses_come_best_first_with_their_own_probabilities(sentence: int, beams: int) -> None:
    (found,) = beam_search(Toy([sentence]), starts([sentence]), beams=beams, end=END, max_tokens=6)
    assert 1 <= len(found) <= beams
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    for h in found:
        whole = tuple(h.tokens) + (END,) * h.ended
        assert h.log_probability == pytest.approx(log_probability(sentence, whole), abs=1e-12)


class Fixed:
    """The same probabilities at each step."""

    def __init__(self, rows: int, probabilities: list[float]) -> None:
        self.rows, self.logits_V = rows, torch.tensor(probabilities, dtype=torch.float64).log()
        self.calls, self.sizes = 0, []

    def advance(self, tokens_B: Tensor) -> Tensor:
        assert len(tokens_B) == self.rows
        self.calls += 1
        self.sizes.append(self.rows)
        return self.logits_V.expand(self.rows, -1)

    def reorder(self, rows_B: Tensor) -> None:
        assert max(rows_B.tolist()) < self.rows
        self.rows = len(rows_B)


def test_the_length_penalty_chooses_between_short_and_long() -> None:
    """p(end) = 0.3, p(1) = 0.7: ending at once has the highest probability but for the longest text, whose mean is the
    best."""

    def best(alpha: float) -> Hypothesis:
        decoder = Fixed(1, [0.3, 0.7])
        return beam_search(decoder, torch.zeros(1), beams=5, end=0, max_tokens=4, length_penalty=alpha)[0][0]

    assert best(0.0).tokens == []
    assert best(0.0).ended
    assert best(1.0).tokens == [1, 1, 1, 1]
    assert best(1.0).score == pytest.approx(math.log(0.7))


def test_unlikely_early_ends_do_not_crowd_out_the_likeliest_text() -> None:
    """Ends of small probability come among the four likeliest at every step, long before the text 1, 1, … is done."""
    decoder = Fixed(1, [0.02, 0.96, 0.01, 0.01])
    best = beam_search(decoder, torch.zeros(1), beams=4, end=0, max_tokens=12)[0][0]
    assert best.tokens == [1] * 12
    assert decoder.calls == 12


def test_sentences_that_are_done_leave_the_batch() -> None:
    decoder = Fixed(3, [0.9, 0.1])
    assert all(h.ended and not h.tokens for h in greedy_search(decoder, torch.zeros(3), end=0, max_tokens=50))
    assert decoder.calls == 1
    toy = Toy([1, 2, 3, 4])
    beam_search(toy, starts([1, 2, 3, 4]), beams=2, end=END, max_tokens=40)
    assert toy.sizes[:2] == [4, 8]
    assert toy.sizes == sorted(toy.sizes[:1]) + sorted(toy.sizes[1:], reverse=True)
    assert toy.calls < 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "beams is 0; it must be at least 1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"length_penalty": -1.0}, r"length_penalty is -1\.0; it must be at least 0"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    chosen = {"beams": 2, "max_tokens": 3, **options}
    with pytest.raises(ValueError, match=message):
        beam_search(Toy([1]), starts([1]), end=END, **chosen)
