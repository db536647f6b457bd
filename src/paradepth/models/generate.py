"""Generating text with a causal language model, with keys and values remembered.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from paradepth.models.causal_lm import CausalLM
from paradepth.models.sampling import Sampling
from paradepth.models.text_stream import Codec, TextStream

_BEFORE = 8  # tokens of the prompt that the first new ones are decoded with

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """What one new token brings.

    Attributes:
        row: of the prompts, from 0.
        token: the token.
        text: the text that is certain now, whole characters only; may be empty.
        reason: with a row's last token, why it is the last: a stop string, or the number of tokens.
    """

    row: int
    token: int
    text: str
    reason: Reason | None


@dataclass(frozen=True)
class Generation:
    """What was generated for a prompt.

    Attributes:
        prompt: the prompt.
        text: the new text, without the stop string that ended it.
        tokens: all new tokens, with those of the stop string.
        reason: why it ends: a stop string, or the number of tokens.
    """

    prompt: str
    text: str
    tokens: list[int]
    reason: Reason


def generate(
    model: CausalLM,
    tokenizer: Codec,
    prompts: str | Sequence[str],
    *,
    on_text: Callable[[int, str], object] | None = None,
    **options: Any,
) -> list[Generation]:
    """Continues one or several prompts.

    Args:
        model, tokenizer, prompts: as of `generate_stream`.
        on_text: called with the row and with text, as soon as it is certain.
        options: as of `generate_stream`.

    Returns:
        A generation for each prompt.

    Raises:
        ValueError: as of `generate_stream`.

    >>> import paradepth
    >>> from paradepth.data import ByteTokenizer
    >>> model = paradepth.create_model("gpt_nano", context=16, branches=2, depth=1)
    >>> whole, first = (generate(model, ByteTokenizer(), "To be", max_tokens=4, branches=k)[0] for k in (2, 1))
    >>> len(whole.tokens), whole.reason, first.prompt
    (4, 'length', 'To be')
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    tokens: list[list[int]] = [[] for _ in prompts]
    texts = [""] * len(prompts)
    reasons: list[Reason] = ["length"] * len(prompts)
    for piece in generate_stream(model, tokenizer, prompts, **options):
        tokens[piece.row].append(piece.token)
        texts[piece.row] += piece.text
        reasons[piece.row] = piece.reason or reasons[piece.row]
        if on_text is not None and piece.text:
            on_text(piece.row, piece.text)
    return [Generation(*parts) for parts in zip(prompts, texts, tokens, reasons, strict=True)]


def generate_stream(
    model: CausalLM,
    tokenizer: Codec,
    prompts: str | Sequence[str],
    *,
    max_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    first: int = 0,
    branches: int | None = None,
    cached: bool = True,
) -> Iterator[Piece]:
    """Continues prompts, a token at a time.

    What a row gets depends on its prompt, its number and the options alone, not on the rows beside it.

    The model sees a window of at most its context. When a window is full, the next one starts with the last half of it:
    with max(1, context // 2) tokens, the newest included, which are read anew at positions 0, 1, …

    Args:
        model: with any trunk; is put into evaluation mode meanwhile.
        tokenizer: the one the model was trained with.
        prompts: one text or several, of any lengths up to the context.
        max_tokens: new tokens of a row, unless a stop string ends it.
        temperature, top_k, top_p, seed: see `Sampling`; temperature 0 takes the likeliest token.
        stop: one or several strings that end a row's text.
        first: number of the first row, which its draws depend on: prompts that are taken in parts with their numbers
            get what they get together.
        branches: use the first branches only (default: all).
        cached: False reads the whole window anew for every token, each row by itself: much slower, and the same. So it
            is for prompts of several lengths where the model has static mixing.

    Returns:
        An iterator of pieces, one for every new token, those of a position in the order of the rows.

    Raises:
        ValueError: before anything is generated: another model, a tokeniser that is not the model's, no prompts, a
            prompt that is empty or longer than the context, or an option out of range.
    """
    if not isinstance(model, CausalLM):
        kind = getattr(model, "model_type", type(model).__name__)
        raise ValueError(f"generate continues texts with a causal language model, and this is {kind!r}")
    vocabulary, context = model.config.vocab_size, model.config.context
    if tokenizer.vocab_size != vocabulary:
        raise ValueError(
            f"the tokeniser has {tokenizer.vocab_size} tokens and the model a vocabulary of {vocabulary}: they do not "
            "belong together"
        )
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(stops):
        raise ValueError("stop has an empty string, which would end every text before it starts")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise ValueError("there is no prompt to continue")
    rows = []
    for number, text in enumerate(texts):
        tokens = _encoded(tokenizer, text, number)
        if len(tokens) > context:
            raise ValueError(
                f"prompt {number + 1} has {len(tokens)} tokens, and the model's context is {context}; shorten it"
            )
        rows.append(_Row(number, tokens, TextStream(tokenizer, stop=stops, before=tokens[-_BEFORE:])))
    sampling = Sampling(temperature, top_k, top_p, seed)
    if model.config.mixing == "static" and len({len(row.window) for row in rows}) > 1:
        cached = False  # such a model knows tokens by their places, so windows of several lengths are read apart
    model.new_cache(branches=branches)  # refuses branches that the model does not have
    return _stream(_Reader(model, branches, cached), rows, sampling, max_tokens, first)


def _encoded(tokenizer: Codec, text: str, number: int) -> list[int]:
    try:
        tokens = tokenizer.encode(text)
    except (UnicodeError, TypeError) as error:  # half characters, which Python's strings may hold
        raise ValueError(f"prompt {number + 1} is not text that UTF-8 can hold: {error}") from error
    if not tokens:
        raise ValueError(f"prompt {number + 1} is empty; a model needs something to continue, a line break at least")
    return tokens


class _Row:
    """A prompt that is being continued: the tokens that the model sees, and the text since the prompt."""

    def __init__(self, number: int, window: list[int], text: TextStream) -> None:
        self.number = number
        self.window = window
        self.text = text
        self.count = 0
        self.moved = True  # the window does not go on from what was read

    def take(self, token: int, *, context: int, max_tokens: int) -> Piece:
        self.count += 1
        self.window = [*self.window, token]
        self.moved = len(self.window) > context
        if self.moved:
            self.window = self.window[-max(1, context // 2) :]
        text, reason = self.text.push(token), None
        if not self.text.stopped and self.count == max_tokens:
            text, reason = text + self.text.finish(), "length"
        return Piece(self.number, token, text, "stop" if self.text.stopped else reason)


def _stream(reader: _Reader, rows: list[_Row], sampling: Sampling, max_tokens: int, first: int) -> Iterator[Piece]:
    context = reader.model.config.context
    kept = list(range(len(rows)))
    while rows:
        logits_BV = reader.read(rows, kept)
        tokens = sampling.choose(logits_BV, [first + row.number for row in rows], [row.count for row in rows]).tolist()
        kept = []
        for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            piece = row.take(token, context=context, max_tokens=max_tokens)
            if piece.reason is None:
                kept.append(place)
            yield piece
        rows = [rows[place] for place in kept]


class _Reader:
    """Reads what is new in the rows' windows and tells what may follow."""

    def __init__(self, model: CausalLM, branches: int | None, cached: bool) -> None:
        self.model, self.branches, self.cached = model, branches, cached
        self.device = next(model.parameters()).device
        self.cache: Any = None

    @torch.no_grad()
    def read(self, rows: Sequence[_Row], kept: Sequence[int]) -> Tensor:
        """Logits (B, V) of the token after each window.

        Args:
            rows: those that go on.
            kept: their places among the rows of the last call.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            if not self.cached:
                one = [self.model(self._tensor([row.window]), branches=self.branches)[:, -1] for row in rows]
                return torch.cat(one)
            if any(row.moved for row in rows):
                return self._whole(rows)
            if len(kept) < self.cache.rows:
                self.cache.reorder(torch.tensor(kept, device=self.device))
            return self.model(self._tensor([row.window[-1:] for row in rows]), cache=self.cache, last=True)[:, 0]
        finally:
            self.model.train(was_training)

    def _whole(self, rows: Sequence[_Row]) -> Tensor:
        """All windows from their starts, the shorter ones with padding before them, so that all end together."""
        longest = max(len(row.window) for row in rows)
        padding = [longest - len(row.window) for row in rows]
        self.cache = self.model.new_cache(
            branches=self.branches, padding=self._tensor(padding) if any(padding) else None
        )
        tokens = [[0] * pad + row.window for pad, row in zip(padding, rows, strict=True)]
        return self.model(self._tensor(tokens), cache=self.cache, last=True)[:, 0]

    def _tensor(self, numbers: Any) -> Tensor:
        return torch.tensor(numbers, device=self.device)
