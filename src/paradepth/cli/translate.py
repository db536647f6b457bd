"""Command that translates sentences or a file: translate."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from paradepth.atomic import replacing
from paradepth.cli.parse import Commands, parse

_BATCHES = 16  # whose sentences are sorted by length together, and written when all of them are done


@dataclass(frozen=True)
class _Translate:
    """Translate sentences, or a file line by line, in order."""

    run: tyro.conf.Positional[Path]
    """Run directory, or a folder with config.json, model.safetensors and tokenizer.json."""
    sentences: tyro.conf.Positional[tuple[str, ...]] = ()
    """Sentences to translate; without any and without --file, the lines of standard input."""
    file: Path | None = None
    """Text file with a sentence on each line; a blank line stays one."""
    out: Path | None = None
    """File for the translations, line by line; it appears when all are done. Standard output by default."""
    beams: int = 4
    """Hypotheses that beam search keeps; 1 is greedy decoding."""
    branches: int | None = None
    """Use the first K branches only."""
    max_tokens: int | None = None
    """Most tokens of a translation; as many as the model takes by default."""
    length_penalty: float = 1.0
    """The score of n tokens is log p / n^α: a larger α favours long translations."""
    batch_size: int = 32
    """Sentences that are translated at a time."""
    device: str = "auto"
    """auto, cpu or cuda."""
    json: bool = False
    """Print the result as one JSON object."""


def _translate(options: Sequence[str]) -> dict[str, Any]:
    from paradepth.data import tokenizer_of
    from paradepth.distributed.world import pick_device
    from paradepth.models import Translator, from_pretrained
    from paradepth.models.translator import check_search, too_long

    o = parse(_Translate, options, "translate")
    if o.sentences and o.file is not None:
        raise ValueError(f"translate takes sentences or a file, and it was given both ({o.file})")
    model = from_pretrained(o.run)
    if not isinstance(model, Translator):
        raise ValueError(f"translate needs a translator, and {o.run} is a model of type {model.model_type!r}")
    check_search(
        model,
        beams=o.beams,
        branches=o.branches,
        max_tokens=o.max_tokens,
        length_penalty=o.length_penalty,
        batch_size=o.batch_size,
    )
    tokenizer = tokenizer_of(o.run, model.config.vocab_size)
    sentences = list(o.sentences) if o.sentences else _lines(o.file)
    if o.out is not None and (o.out.is_dir() or not o.out.parent.is_dir()):
        raise ValueError(f"out is {o.out}; it must be a file, new or old, in a folder that exists")
    cut = too_long(model, tokenizer, sentences)
    if cut:
        shown = ", ".join(map(str, cut[:10])) + (" …" if len(cut) > 10 else "")
        print(f"longer than the model's {model.config.context} tokens, and so cut: sentences {shown}", file=sys.stderr)
    started = time.monotonic()
    translations: list[str] = []
    with ExitStack() as stack:
        out = None if o.out is None else stack.enter_context(replacing(o.out))
        for translation in _translated(model.to(pick_device(o.device)), tokenizer, sentences, o):
            if out is not None:
                out.write(f"{translation}\n".encode())
            elif o.json:
                translations.append(translation)
            else:
                print(translation, flush=True)
    seconds = time.monotonic() - started
    print(f"{len(sentences)} sentences in {seconds:,.1f} s", file=sys.stderr)
    common = {"run": str(o.run), "sentences": len(sentences), "cut": cut, "seconds": seconds}
    if o.out is not None:
        return {**common, "out": str(o.out)}
    return {**common, "translations": translations} if o.json else {}


def _translated(model: Any, tokenizer: Any, sentences: Sequence[str], o: _Translate) -> Iterator[str]:
    from paradepth.models import translate

    stretch = _BATCHES * o.batch_size
    for first in range(0, len(sentences), stretch):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is cut was told
            found = translate(
                model,
                tokenizer,
                sentences[first : first + stretch],
                beams=o.beams,
                branches=o.branches,
                max_tokens=o.max_tokens,
                batch_size=o.batch_size,
                length_penalty=o.length_penalty,
            )
        yield from (" ".join(translation.split("\n")) for translation in found)  # a line for a line


def _lines(file: Path | None) -> list[str]:
    from paradepth.data.pairs import decode_lines, read_lines

    if file is not None:
        return read_lines(file)
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError("there is nothing to translate: pass sentences, --file, or lines on standard input")
    return decode_lines(sys.stdin.buffer.read(), "standard input")


COMMANDS: Commands = {
    "translate": (_translate, "translate sentences or a file"),
}
