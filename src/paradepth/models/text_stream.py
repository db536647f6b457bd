"""Tokens to text as they come: whole characters only, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

UNFINISHED = "\ufffd"  # what decoders make of bytes that are no character, or not one yet


class Codec(Protocol):
    """What generation needs of a tokeniser."""

    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        ...


class TextStream:
    """The text of tokens that come one at a time.

    Bytes that may become a character, and characters that may become a stop string, are held back until it is clear.

    Args:
        codec: the tokeniser.
        stop: strings, none of them empty, that end the text; they do not belong to it.
        before: tokens of the text that this one continues, the last few at least: some tokenisers decode the same token
            differently at the start of a text.

    Attributes:
        stopped: whether a stop string came; the text is complete then.

    >>> from paradepth.models.text_stream import TextStream
    >>> class Bytes:
    ...     vocab_size = 256
    ...     def encode(self, text): return list(text.encode())
    ...     def decode(self, tokens): return bytes(tokens).decode("utf-8", "replace")
    >>> stream = TextStream(Bytes(), stop=["END"])
    >>> [stream.push(byte) for byte in "é EN. END!".encode()]
    ['', 'é', ' ', '', '', 'EN.', ' ', '', '', '', '']
    >>> stream.stopped
    True
    """

    def __init__(self, codec: Codec, *, stop: Sequence[str] = (), before: Sequence[int] = ()) -> None:
        self.codec = codec
        self.stop = tuple(stop)
        self.stopped = False
        self._before = list(before)
        self._tokens: list[int] = []
        self._held = ""

    def push(self, token: int) -> str:
        """Takes a token and returns the text that is certain now."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        text = self._decoded()
        if text.endswith(UNFINISHED):
            return ""
        self._before, self._tokens = self._tokens, []
        return self._up_to_stop(text)

    def finish(self) -> str:
        """The text that was held back, when no more tokens come."""
        if self.stopped:
            return ""
        text = self._up_to_stop(self._decoded() if self._tokens else "")
        rest, self._held, self._tokens = ("" if self.stopped else self._held), "", []
        return text + rest

    def _decoded(self) -> str:
        before = self.codec.decode(self._before) if self._before else ""
        return self.codec.decode([*self._before, *self._tokens])[len(before) :]

    def _up_to_stop(self, text: str) -> str:
        text = self._held + text
        places = [place for word in self.stop if (place := text.find(word)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        longest = max((n for word in self.stop for n in range(1, len(word)) if text.endswith(word[:n])), default=0)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest]
