"""Text to token numbers and back: bytes, or a byte-level BPE from the `tokenizers` library.

Both have the same special tokens, and both lose nothing: any text is encoded, and decoding gives it back.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from paradepth.atomic import write_text

FILE = "tokenizer.json"
# In this order behind the ordinary tokens of a vocabulary made here; one from elsewhere may have them anywhere.
SPECIALS = ("<pad>", "<s>", "</s>", "<mask>")
_BERT = {"<pad>": "[PAD]", "<s>": "[CLS]", "</s>": "[SEP]", "<mask>": "[MASK]"}  # the same tokens under BERT's names


class Tokenizer(ABC):
    """Numbers for texts.

    Attributes:
        vocab_size: how many numbers there are, special tokens included.
        specials: number of each special token that the vocabulary has, by its name in `SPECIALS`.
    """

    vocab_size: int
    specials: dict[str, int]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without special ones."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; special ones are left out."""

    @abstractmethod
    def save(self, folder: str | Path) -> Path:
        """Writes `tokenizer.json` into the folder, atomically."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """The same for tokenisers that give the same numbers, whatever their place on the disk."""

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text."""
        return [self.encode(text) for text in texts]

    def special(self, name: str) -> int:
        """The number of a special token.

        Raises:
            ValueError: the vocabulary does not have it.
        """
        if name not in self.specials:
            raise ValueError(
                f"this vocabulary of {self.vocab_size} tokens has no {name}, which this task needs; it has "
                f"{', '.join(self.specials) or 'no special tokens'}. Train one with --tokenizer bpe"
            )
        return self.specials[name]


class ByteTokenizer(Tokenizer):
    """A token is a byte of the text in UTF-8; special tokens follow behind the 256 bytes.

    Args:
        special: whether there are special tokens; a plain language model needs none.

    >>> ByteTokenizer().encode("Hé"), ByteTokenizer().decode([72, 195, 169]), ByteTokenizer(special=True).vocab_size
    ([72, 195, 169], 'Hé', 260)
    """

    def __init__(self, *, special: bool = False) -> None:
        self.specials = {name: 256 + i for i, name in enumerate(SPECIALS)} if special else {}
        self.vocab_size = 256 + len(self.specials)

    @property
    def identity(self) -> str:
        return "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogateescape"))

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode("utf-8", "replace")

    def save(self, folder: str | Path) -> Path:
        path = Path(folder) / FILE
        write_text(path, json.dumps({"paradepth": "bytes", "special": bool(self.specials)}))
        return path


class BPETokenizer(Tokenizer):
    """A byte-level BPE: frequent sequences of bytes are one token.

    Args:
        inner: a `tokenizers.Tokenizer`.

    >>> tokenizer = BPETokenizer.train(["the cat and the dog, the cat and the dog"] * 4, vocab_size=270)
    >>> tokenizer.decode(tokenizer.encode("the dög")), tokenizer.vocab_size <= 270, sorted(tokenizer.specials.values())
    ('the dög', True, [0, 1, 2, 3])
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.vocab_size = inner.get_vocab_size(with_added_tokens=True)
        known = {name: inner.token_to_id(name) for name in SPECIALS}
        known = {name: inner.token_to_id(_BERT[name]) if n is None else n for name, n in known.items()}
        self.specials = {name: number for name, number in known.items() if number is not None}

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int) -> BPETokenizer:
        """Learns the `vocab_size` − 260 most useful merges of a corpus.

        Args:
            texts: the corpus in pieces; a token does not reach across pieces.
            vocab_size: with the 256 bytes and the special tokens; fewer if the corpus does not have as many merges.

        Raises:
            ValueError: a vocabulary too small for the bytes and the special tokens.
        """
        from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Inner

        least = 256 + len(SPECIALS)
        if vocab_size < least:
            raise ValueError(f"vocab_size is {vocab_size}; a BPE needs at least {least}: 256 bytes and special tokens")
        inner = Inner(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[AddedToken(name, special=True) for name in SPECIALS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        # A special token that stands in a text is text: it is encoded as its bytes.
        inner.encode_special_tokens = True
        return cls(inner)

    @property
    def identity(self) -> str:
        return hashlib.sha256(self.inner.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, tokens: Sequence[int]) -> str:
        return self.inner.decode(list(tokens), skip_special_tokens=True)

    def save(self, folder: str | Path) -> Path:
        path = Path(folder) / FILE
        write_text(path, self.inner.to_str())
        return path


def load_tokenizer(place: str | Path) -> Tokenizer:
    """A saved tokeniser.

    Args:
        place: a `tokenizer.json` of this package or of the `tokenizers` library, or a folder that has one.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = Path(place).expanduser()
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{place} is no tokeniser: there is no file {path}")
    try:
        return read_tokenizer(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} does not hold a tokeniser: {error}") from error


def read_tokenizer(content: str) -> Tokenizer:
    """The tokeniser that the content of a `tokenizer.json` describes.

    Raises:
        ValueError: it describes none.
    """
    described = json.loads(content)
    if isinstance(described, dict) and described.get("paradepth") == "bytes":
        if "special" not in described:
            raise ValueError("it does not say whether there are special tokens")
        return ByteTokenizer(special=bool(described["special"]))
    return _from_string(content)


def _from_string(content: str) -> BPETokenizer:
    from tokenizers import Tokenizer as Inner

    try:
        inner = Inner.from_str(content)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(str(error)) from error
    inner.encode_special_tokens = True  # not part of the file
    inner.no_truncation()  # files of sentence models ask for both, and would lose all text behind some length
    inner.no_padding()
    return BPETokenizer(inner)


def hub_tokenizer(name: str) -> Tokenizer:
    """The tokeniser of a Hub repository, such as "gpt2".

    Raises:
        ValueError: it cannot be fetched, or is none.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return load_tokenizer(hf_hub_download(name, FILE))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"the tokeniser of {name} cannot be fetched from the Hub: {error}") from error


def choose_tokenizer(
    choice: str, *, vocab_size: int | None, texts: Iterable[str], special: bool, assets: Path | None = None
) -> Tokenizer:
    """The tokeniser that an option asks for.

    Args:
        choice: "bytes", "bpe", a file, a folder, or "hub:NAME".
        vocab_size: of a BPE; None is 8192 or fewer.
        texts: the training data, which a BPE is learned from.
        special: whether the task needs special tokens.
        assets: a run or a saved model; its tokeniser is taken, whatever the choice, so that numbers keep their meaning.

    Raises:
        ValueError: no such tokeniser, or a vocabulary that is given its size twice.
    """
    if assets is not None and (assets / FILE).is_file():
        return load_tokenizer(assets)
    if vocab_size is not None and choice != "bpe":
        raise ValueError(f"vocab_size is {vocab_size}; only a BPE is given a size, and tokenizer is {choice!r}")
    if choice == "bytes":
        return ByteTokenizer(special=special)
    if choice == "bpe":
        return BPETokenizer.train(texts, vocab_size=8192 if vocab_size is None else vocab_size)
    return hub_tokenizer(choice.removeprefix("hub:")) if choice.startswith("hub:") else load_tokenizer(choice)


def with_specials(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokeniser with those of `SPECIALS` that it does not have as new numbers behind all others; the numbers
    of all other tokens stay as they are.

    >>> with_specials(ByteTokenizer()).vocab_size, with_specials(ByteTokenizer(special=True)).vocab_size
    (260, 260)
    """
    missing = [name for name in SPECIALS if name not in tokenizer.specials]
    if not missing:
        return tokenizer
    if isinstance(tokenizer, ByteTokenizer):
        return ByteTokenizer(special=True)
    assert isinstance(tokenizer, BPETokenizer)
    from tokenizers import AddedToken

    extended = _from_string(tokenizer.inner.to_str())
    extended.inner.add_special_tokens([AddedToken(name, special=True) for name in missing])
    return BPETokenizer(extended.inner)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuses a tokeniser that was not made for a model.

    Raises:
        ValueError: their vocabularies differ in size.
    """
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"the tokeniser has {tokenizer.vocab_size} tokens and the model a vocabulary of {vocab_size}: they do not "
            "belong together"
        )


def tokenizer_of(folder: str | Path, vocab_size: int) -> Tokenizer:
    """The tokeniser of a run or of a saved model; bytes where there is none and the vocabulary is that of bytes.

    Args:
        folder: the run.
        vocab_size: of its model.

    Raises:
        ValueError: there is none, it is damaged, or it does not belong to the model.
    """
    if not (Path(folder) / FILE).is_file() and vocab_size == ByteTokenizer().vocab_size:
        return ByteTokenizer()
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, vocab_size)
    return tokenizer
