"""Text that may be larger than memory: read in pieces, encoded once into a file, and mapped into memory from there.

    files ── Segment, Segment, … ─ read_text ─► pieces ─ tokeniser ─► $PARADEPTH_CACHE/….tokens ─ map ─► tensor

Only a few pieces are in memory at a time.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import os
import secrets
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from paradepth.atomic import sync_folder, write_text
from paradepth.data.cache import cache_folder, file_identity
from paradepth.data.table import TABLES, documents, table_size
from paradepth.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer

FORMAT = "paradepth-tokens-1"  # to be raised whenever reading, cutting or encoding changes
PIECE = 2**18  # bytes
_TOGETHER = 16  # pieces encoded in one call, on as many threads as there are
_IN_MEMORY = 2**26  # bytes up to which a text of bytes is simply read
_CHECKED = 2**30  # bytes up to which a token file is read and checked whole; of a longer one the length is checked
_HEADER = 256  # bytes


@dataclass(frozen=True)
class Segment:
    """Bytes `start` to `stop` − 1 of a file's text: of the file itself, or of the joined documents of a table.

    As characters, a segment has those whose first byte is in it.
    """

    path: Path
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


Text = tuple[Segment, ...]


def text_size(path: Path) -> int:
    """Bytes of a file's text.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        return table_size(path) if path.suffix in TABLES else path.stat().st_size
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def cut(paths: Sequence[Path], lengths: Sequence[int]) -> list[Text]:
    """Cuts the joined text of several files into contiguous parts.

    Args:
        paths: the files, in order.
        lengths: bytes of each part; together no more than there are.
    """
    parts: list[Text] = []
    sizes = [text_size(path) for path in paths]
    begin = 0
    for length in lengths:
        segments, offset = [], 0
        for path, size in zip(paths, sizes, strict=True):
            start, stop = max(begin - offset, 0), min(begin + length - offset, size)
            if start < stop:
                segments.append(Segment(path, start, stop))
            offset += size
        parts.append(tuple(segments))
        begin += length
    return parts


def stretch(text: Text, fraction: float, place: float) -> Text:
    """A stretch of a text, of `fraction` of its bytes and at least one.

    Args:
        text: the text.
        fraction: above 0 and at most 1.
        place: part of what is left out that is left out in front; with the same place a smaller stretch lies within a
            larger one.

    >>> stretch((Segment(Path("a"), 0, 10), Segment(Path("b"), 5, 15)), 0.5, 0.8)
    (Segment(path=PosixPath('a'), start=8, stop=10), Segment(path=PosixPath('b'), start=5, stop=13))
    """
    size = sum(map(len, text))
    length = min(max(round(fraction * size), 1), size)
    begin = round(place * (size - length))
    chosen, offset = [], 0
    for part in text:
        start, stop = max(begin - offset, 0), min(begin + length - offset, len(part))
        if start < stop:
            chosen.append(Segment(part.path, part.start + start, part.start + stop))
        offset += len(part)
    return tuple(chosen)


def read_bytes(segment: Segment) -> Iterator[bytes]:
    """The bytes of a segment, at most `PIECE` at a time.

    Raises:
        ValueError: the file cannot be read.
    """
    yield from _bytes(segment.path, segment.start, segment.stop)


def _bytes(path: Path, start: int, stop: int) -> Iterator[bytes]:
    try:
        if path.suffix in TABLES:
            offset = 0
            for document in documents(path):
                if offset >= stop:
                    return
                used = document[max(start - offset, 0) : stop - offset]
                offset += len(document)
                yield from (used[i : i + PIECE] for i in range(0, len(used), PIECE))
        else:
            with open(path, "rb") as file:
                file.seek(start)
                left = stop - start
                while left and (piece := file.read(min(PIECE, left))):
                    left -= len(piece)
                    yield piece
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def read_text(segment: Segment) -> Iterator[str]:
    """The characters of a segment in pieces that end before a space or a line break, as long as there are any.

    There a byte-level BPE never joins anything, so that encoding the pieces encodes the whole.

    Raises:
        ValueError: the file cannot be read, or is not UTF-8; the message says where.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position, rest = segment.start, ""
    reading = segment.start > 0  # the first bytes may belong to a character that started before
    for piece in _whole_characters(segment):
        if reading:
            skipped = next((i for i, byte in enumerate(piece[:4]) if byte & 0xC0 != 0x80), len(piece[:4]))
            piece, position = piece[skipped:], position + skipped
            reading = not piece
        held = len(decoder.getstate()[0])
        try:
            rest += decoder.decode(piece)
        except UnicodeDecodeError as error:
            raise _not_utf8(segment.path, position - held + error.start) from error
        position += len(piece)
        end = _last_cut(rest)
        if end:
            yield rest[:end]
            rest = rest[end:]
        elif len(rest) > 4 * PIECE:  # no space anywhere
            yield rest
            rest = ""
    held = len(decoder.getstate()[0])
    if held:
        raise _not_utf8(segment.path, position - held)
    if rest:
        yield rest


def _whole_characters(segment: Segment) -> Iterator[bytes]:
    """The segment's bytes, and behind them those that complete its last character."""
    last = b""
    for last in read_bytes(segment):
        yield last
    if last and last[-1] >= 0x80:
        behind = b"".join(_bytes(segment.path, segment.stop, segment.stop + 3))
        yield behind[: next((i for i, byte in enumerate(behind) if byte & 0xC0 != 0x80), len(behind))]


def _not_utf8(path: Path, offset: int) -> ValueError:
    return ValueError(
        f"{path} is not UTF-8 at byte {offset:,}, which this tokeniser needs; convert it, for example with iconv, or "
        "take --tokenizer bytes, which reads any bytes"
    )


def _last_cut(text: str) -> int:
    """Where the last space or line break behind another character is, or 0."""
    place = len(text)
    while place > 0:
        place = max(text.rfind(" ", 0, place), text.rfind("\n", 0, place))
        if place > 0 and not text[place - 1].isspace():
            return place
    return 0


# ---- tokens ------------------------------------------------------------------------------------------------------


def trained_tokenizer(text: Text, vocab_size: int) -> BPETokenizer:
    """A BPE learned from a text, or the one that was learned from it the last time.

    Raises:
        ValueError: a vocabulary too small, or a text that is not UTF-8.
    """
    import tokenizers

    path = _place(text, f"bpe {vocab_size} {tokenizers.__version__}", "tokenizer.json")
    with _alone(path):
        with contextlib.suppress(ValueError):
            found = load_tokenizer(path)
            if isinstance(found, BPETokenizer):
                return found
        tokenizer = BPETokenizer.train((piece for part in text for piece in read_text(part)), vocab_size=vocab_size)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, tokenizer.inner.to_str())
        except OSError as error:
            _warn("a tokeniser", error)
        return tokenizer


def token_tensor(text: Text, tokenizer: Tokenizer) -> torch.Tensor:
    """A text as tokens, one dimension: uint8 for bytes, uint16 for a BPE of up to 65,536 tokens, int32 above.

    A short text of bytes is read into memory. Everything else is encoded once into a file in the cache, which is found
    again as long as neither the text nor the tokeniser changes, and mapped into memory.

    Args:
        text: what to encode.
        tokenizer: with bytes any content will do; others need UTF-8.

    Raises:
        ValueError: a file that cannot be read, or is not UTF-8.
    """
    size = sum(len(part) for part in text)
    if isinstance(tokenizer, ByteTokenizer) and size <= _IN_MEMORY:
        content = bytearray().join(piece for part in text for piece in read_bytes(part))
        return torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    path = _place(text, "bytes" if isinstance(tokenizer, ByteTokenizer) else tokenizer.identity, "tokens")
    with _alone(path):
        tokens = _map(path)
        if tokens is not None:
            return tokens
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
            file = open(temporary, "xb")  # noqa: SIM115
        except OSError as error:
            _warn("tokens", error)
            with tempfile.NamedTemporaryFile(suffix=".tokens") as file:
                _write(file, text, tokenizer)
                tokens = _map(Path(file.name))
        else:
            try:
                with file:
                    _write(file, text, tokenizer)
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            sync_folder(path.parent)
            tokens = _map(path)
    assert tokens is not None
    return tokens


def _place(text: Text, what: str, suffix: str) -> Path:
    digest = hashlib.sha256()
    parts = (f"{file_identity(part.path)}|{part.start}|{part.stop}" for part in text)
    for part in (FORMAT, what, *parts):
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return cache_folder() / f"{digest.hexdigest()}.{suffix}"


def _warn(what: str, error: OSError) -> None:
    warnings.warn(f"{what} cannot be cached: {error}; set PARADEPTH_CACHE to a writable folder", stacklevel=4)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Processes that make the same file wait for the first, and then find it."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):  # no such locks, or no such folder: each makes its own
            import fcntl

            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path.with_name(f".{path.name}.lock"), "wb"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _encoded(text: Text, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    if isinstance(tokenizer, ByteTokenizer):
        yield from (np.frombuffer(piece, dtype=np.uint8) for part in text for piece in read_bytes(part))
        return
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    for pieces in _batched((piece for part in text for piece in read_text(part)), PIECE * _TOGETHER):
        yield from (np.asarray(tokens, dtype=dtype) for tokens in tokenizer.encode_many(pieces))


def _batched(pieces: Iterable[str], size: int) -> Iterator[list[str]]:
    batch, held = [], 0
    for piece in pieces:
        batch.append(piece)
        held += len(piece)
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _write(file: IO[bytes], text: Text, tokenizer: Tokenizer) -> None:
    file.write(bytes(_HEADER))
    count, checksum, dtype = 0, 0, np.dtype(np.uint8)
    for tokens in _encoded(text, tokenizer):
        count, dtype = count + len(tokens), tokens.dtype
        checksum = zlib.crc32(tokens.data, checksum)
        file.write(tokens.data)
    header = {"format": FORMAT, "dtype": dtype.name, "tokens": count, "crc32": checksum}
    file.seek(0)
    file.write(json.dumps(header).encode().ljust(_HEADER))
    file.flush()
    os.fsync(file.fileno())


def _map(path: Path) -> torch.Tensor | None:
    """The tokens of a file, read from the disk where they are looked at; None if it is missing or damaged."""
    try:
        with open(path, "rb") as file:
            header: dict[str, Any] = json.loads(file.read(_HEADER))
        count, dtype = header["tokens"], np.dtype(header["dtype"])
        if header["format"] != FORMAT or path.stat().st_size != _HEADER + count * dtype.itemsize:
            return None
        # Shared and read-only: a private mapping larger than memory is refused by the system.
        tokens = np.memmap(path, dtype, mode="r", offset=_HEADER, shape=(count,)) if count else np.empty(0, dtype)
        if tokens.nbytes <= _CHECKED and zlib.crc32(tokens.data) != header["crc32"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch cannot know that nothing will write to it
        return torch.from_numpy(tokens)
