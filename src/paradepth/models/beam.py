"""Greedy decoding and beam search, over anything that tells the logits of the next token.

The score of a hypothesis of n tokens y_1 … y_n, its end included, is

    score(y) = (Σ_t log p(y_t | y_<t)) / n^α,

with the length penalty α: 0 compares plain log-probabilities, which favours short hypotheses, 1 their means per token.
Source: Google's Neural Machine Translation System (arXiv 1609.08144), with n in place of (5 + n) / 6.

Shapes: N sentences, K beams, V vocabulary; a batch has N·K rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Protocol

import torch
from torch import Tensor


class NextToken(Protocol):
    """What a search asks."""

    def advance(self, tokens_B: Tensor) -> Tensor:
        """Takes up a token in each row and returns the logits (B, V) of the one after it."""
        ...

    def reorder(self, rows_B: Tensor) -> None:
        """Keeps these rows, in that order; a row may appear several times."""
        ...


@dataclass(frozen=True)
class Hypothesis:
    """What a search found.

    Attributes:
        tokens: without start and end.
        log_probability: of all tokens, and of the end if it was reached.
        score: what hypotheses are ranked by.
        ended: whether the end was reached, rather than the greatest number of tokens.
    """

    tokens: list[int]
    log_probability: float
    score: float
    ended: bool


_score = attrgetter("score")


def _log_probabilities(logits_BV: Tensor, forbidden: Sequence[int]) -> Tensor:
    if logits_BV.dtype in (torch.bfloat16, torch.float16):
        logits_BV = logits_BV.float()
    if forbidden:
        logits_BV = logits_BV.index_fill(1, torch.tensor(sorted(set(forbidden)), device=logits_BV.device), -torch.inf)
    return logits_BV.log_softmax(dim=-1)


def greedy_search(
    decoder: NextToken, starts_N: Tensor, *, end: int, max_tokens: int, forbidden: Sequence[int] = ()
) -> list[Hypothesis]:
    """The likeliest next token, again and again; the best hypothesis of each sentence.

    Args:
        decoder: at the beginning of N targets.
        starts_N: the token that each starts with.
        end: the token that ends a hypothesis.
        max_tokens: tokens of a hypothesis at most, its end included.
        forbidden: tokens that are never chosen.
    """
    tokens: list[list[int]] = [[] for _ in starts_N]
    sums = [0.0] * len(tokens)
    ended = [False] * len(tokens)
    left, last_B = list(range(len(tokens))), starts_N
    for _ in range(max_tokens):
        best = _log_probabilities(decoder.advance(last_B), forbidden).max(dim=-1)
        rows = []
        for row, (i, token, value) in enumerate(zip(left, best.indices.tolist(), best.values.tolist(), strict=True)):
            sums[i] += value
            ended[i] = token == end
            if not ended[i]:
                tokens[i].append(token)
                rows.append(row)
        left = [left[row] for row in rows]
        if not left:
            break
        rows_B = torch.tensor(rows, device=starts_N.device)
        last_B = best.indices[rows_B]
        if len(rows) < len(best.indices):  # those that ended leave the batch
            decoder.reorder(rows_B)
    lengths = [len(own) + done for own, done in zip(tokens, ended, strict=True)]
    return [Hypothesis(t, s, s / max(n, 1), e) for t, s, n, e in zip(tokens, sums, lengths, ended, strict=True)]


def beam_search(
    decoder: NextToken,
    starts_N: Tensor,
    *,
    beams: int,
    end: int,
    max_tokens: int,
    length_penalty: float = 1.0,
    forbidden: Sequence[int] = (),
) -> list[list[Hypothesis]]:
    """The best hypotheses of each sentence, up to `beams`, best first.

    At each step the K likeliest unfinished hypotheses are continued by every token. Those of the K likeliest
    continuations that end are finished; of the others the K likeliest are carried on. A sentence is done when K of its
    hypotheses are finished and no unfinished one has, so far, a better score than the worst of those; or at
    `max_tokens`, where what is unfinished counts as it is. (To be done as soon as K are finished would let unlikely
    early ends crowd out the likeliest text.) With one beam that is greedy decoding; with as many as there are
    hypotheses it is exhaustive search.

    Args:
        decoder: at the beginning of N targets.
        starts_N: the token that each starts with.
        beams: K.
        end: the token that ends a hypothesis.
        max_tokens: tokens of a hypothesis at most, its end included.
        length_penalty: α.
        forbidden: tokens that are never chosen.

    Raises:
        ValueError: fewer than one beam or token, or a negative length penalty.
    """
    for name, value in (("beams", beams), ("max_tokens", max_tokens)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not 0 <= length_penalty < float("inf"):
        raise ValueError(f"length_penalty is {length_penalty}; it must be at least 0")
    device, N, K = starts_N.device, len(starts_N), beams
    finished: list[list[Hypothesis]] = [[] for _ in range(N)]
    left = list(range(N))  # sentences that are not done
    written: list[list[list[int]]] = [[[]] for _ in range(N)]  # tokens of each unfinished hypothesis of those
    sums_NK = torch.zeros(N, 1, dtype=torch.float64, device=device)
    last_B = starts_N

    def hypothesis(tokens: list[int], total: float, *, ended: bool) -> Hypothesis:
        return Hypothesis(tokens, total, total / (len(tokens) + ended) ** length_penalty, ended)

    for step in range(1, max_tokens + 1):
        log_p_BV = _log_probabilities(decoder.advance(last_B), forbidden)
        V, width = log_p_BV.shape[1], sums_NK.shape[1]
        totals_NC = (sums_NK[:, :, None] + log_p_BV.view(len(left), width, V)).flatten(1)
        best = totals_NC.topk(min(2 * K, totals_NC.shape[1]), dim=1)  # at least K of them do not end
        totals, places = best.values.tolist(), best.indices.tolist()
        rows, chosen, sums, kept, texts = [], [], [], [], []
        for n, i in enumerate(left):
            carried: list[tuple[int, int, float]] = []  # row, token, log-probability
            for rank, (total, place) in enumerate(zip(totals[n], places[n], strict=True)):
                beam, token = divmod(place, V)
                if total == -torch.inf or len(carried) == K:
                    break
                if token != end:
                    carried.append((beam, token, total))
                elif rank < K:
                    finished[i].append(hypothesis(written[n][beam], total, ended=True))
            finished[i] = sorted(finished[i], key=_score, reverse=True)[:K]
            if not carried:
                continue
            if len(finished[i]) == K and carried[0][2] / step**length_penalty <= finished[i][-1].score:
                continue
            own = [[*written[n][beam], token] for beam, token, _ in carried]
            if step == max_tokens:
                finished[i] += [hypothesis(t, c[2], ended=False) for t, c in zip(own, carried, strict=True)]
                continue
            kept.append(i)
            texts.append(own)
            carried += [(carried[0][0], carried[0][1], -torch.inf)] * (K - len(carried))  # fill up with what cannot win
            rows += [n * width + beam for beam, _, _ in carried]
            chosen += [token for _, token, _ in carried]
            sums.append([total for _, _, total in carried])
        if not kept:
            break
        left, written = kept, texts
        decoder.reorder(torch.tensor(rows, device=device))
        last_B = torch.tensor(chosen, device=device)
        sums_NK = torch.tensor(sums, dtype=torch.float64, device=device)
    return [sorted(found, key=_score, reverse=True)[:K] for found in finished]
