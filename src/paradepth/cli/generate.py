"""Command that continues texts: generate."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from paradepth.cli.parse import Commands, parse


@dataclass(frozen=True)
class _Generate:
    """Continue texts with a causal language model; the text appears as it is made."""

    run: tyro.conf.Positional[Path]
    """Run directory, or a folder with config.json, model.safetensors and tokenizer.json."""
    prompt: tuple[str, ...] = ()
    """Texts to continue; without any, standard input is one, less a line break at its end."""
    branches: int | None = None
    """Use the first K branches only."""
    max_tokens: int = 200
    """Most new tokens (bytes, if that is what the model reads)."""
    temperature: float = 0.8
    """0 takes the likeliest token; 1 draws as the model has learned; more is wilder."""
    top_k: int | None = None
    """Draw from that many of the likeliest tokens only."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens that have this probability together."""
    stop: tuple[str, ...] = ()
    """Strings that end a text."""
    samples: int = 1
    """Continuations of each prompt."""
    seed: int = 0
    """Of the draws."""
    device: str = "auto"
    """auto, cpu or cuda."""
    json: bool = False
    """Print the result as one JSON object."""


class _Terminal:
    """Prints rows one below the other, the first one that is not complete as it grows."""

    def __init__(self, titles: Sequence[str], prompts: Sequence[str]) -> None:
        self.titles = titles
        self.prompts = prompts
        self.waiting = list(prompts)
        self.complete = [False] * len(prompts)
        self.shown = 0

    def start(self) -> None:
        """Prints the first prompt."""
        self._say(self.titles[0] + self.waiting[0])

    def add(self, row: int, text: str, *, complete: bool) -> None:
        """Takes text of a row."""
        self.complete[row] = complete
        if row == self.shown:
            self._say(text)
        else:
            self.waiting[row] += text
        while self.shown < len(self.complete) and self.complete[self.shown]:
            self.shown += 1
            self._say("\n")
            if self.shown < len(self.complete):
                self._say(self.titles[self.shown] + self.waiting[self.shown])

    @staticmethod
    def _say(text: str) -> None:
        if text:
            print(text, end="", flush=True)


def _generate(options: Sequence[str]) -> dict[str, Any]:
    from paradepth.data import tokenizer_of
    from paradepth.distributed.world import pick_device
    from paradepth.models import CausalLM, from_pretrained, generate_stream

    o = parse(_Generate, options, "generate")
    if o.samples < 1:
        raise ValueError(f"samples is {o.samples}; it must be at least 1")
    model = from_pretrained(o.run)
    if not isinstance(model, CausalLM):
        raise ValueError(f"generate continues texts, and {o.run} is a model of type {model.model_type!r}")
    tokenizer = tokenizer_of(o.run, model.config.vocab_size)
    given = list(o.prompt) or [_standard_input()]
    prompts = [prompt for prompt in given for _ in range(o.samples)]
    device = pick_device(o.device)
    pieces = generate_stream(
        model.to(device),
        tokenizer,
        prompts,
        max_tokens=o.max_tokens,
        temperature=o.temperature,
        top_k=o.top_k,
        top_p=o.top_p,
        stop=o.stop,
        seed=o.seed,
        branches=o.branches,
    )
    terminal = None if o.json else _Terminal(_titles(len(given), o.samples), prompts)
    if terminal:
        terminal.start()
    texts, counts, reasons = [""] * len(prompts), [0] * len(prompts), [""] * len(prompts)
    started = time.monotonic()
    for piece in pieces:
        texts[piece.row] += piece.text
        counts[piece.row] += 1
        reasons[piece.row] = piece.reason or ""
        if terminal:
            terminal.add(piece.row, piece.text, complete=piece.reason is not None)
    seconds = time.monotonic() - started
    print(f"{sum(counts)} tokens, {sum(counts) / max(seconds, 1e-9):,.0f} a second", file=sys.stderr)
    if terminal:
        return {}
    return {
        "run": str(o.run),
        "branches": model.prefixes if o.branches is None else o.branches,
        "generations": [
            {"prompt": prompt, "text": text, "tokens": count, "reason": reason}
            for prompt, text, count, reason in zip(prompts, texts, counts, reasons, strict=True)
        ],
        "seconds": seconds,
    }


def _standard_input() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError("there is no prompt: pass --prompt TEXT, or a text on standard input")
    content = sys.stdin.buffer.read()
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 at byte {error.start:,}") from error
    return text.removesuffix("\n")


def _titles(prompts: int, samples: int) -> list[str]:
    if prompts * samples == 1:
        return [""]
    of = [(p, s) for p in range(1, prompts + 1) for s in range(1, samples + 1)]
    return [
        "── " + ", ".join([f"prompt {p}"] * (prompts > 1) + [f"sample {s}"] * (samples > 1)) + " ──\n" for p, s in of
    ]


COMMANDS: Commands = {
    "generate": (_generate, "continue a text with a language model"),
}
