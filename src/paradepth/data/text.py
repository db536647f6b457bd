"""Text as tokens: three splits, contiguous parts of one corpus or files of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from paradepth.data.corpus import Text, cut, stretch, text_size, token_tensor, trained_tokenizer
from paradepth.data.seeds import generator
from paradepth.data.split import check_train_fraction
from paradepth.data.table import TABLES
from paradepth.data.tokenizer import FILE, ByteTokenizer, Tokenizer, choose_tokenizer

TEXT_NAMES = ("tiny_shakespeare", "text")
TEST_FRACTION = 0.05
SPLITS = ("train", "validation", "test")
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


@dataclass(frozen=True)
class TextData:
    """A corpus, ready for training.

    Attributes:
        name: as given to :func:`load_text`.
        train, validation, test: tokens, one dimension, of an unsigned or signed type that holds the vocabulary; they
            stay on the CPU, a large corpus on the disk, wherever the model is.
        tokenizer: what made them.
        sizes: bytes of each split's text.
        device: where batches are to go.
    """

    name: str
    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor
    tokenizer: Tokenizer = field(default_factory=ByteTokenizer)
    sizes: Mapping[str, int] = field(default_factory=dict)
    device: torch.device | str = "cpu"

    @property
    def vocab_size(self) -> int:
        """Number of different tokens; 256 for bytes."""
        return self.tokenizer.vocab_size

    def bytes_per_token(self, split: str) -> float:
        """Bytes of text that a token of a split stands for, on average; 1 for bytes."""
        return self.sizes[split] / max(len(getattr(self, split)), 1)

    def to(self, device: torch.device | str) -> TextData:
        """The same data, batches of which go to another device."""
        return replace(self, device=device)


def load_text(
    name: str,
    *,
    data_dir: str | Path | None = None,
    validation_fraction: float = 0.05,
    train_fraction: float = 1.0,
    tokenizer: str = "bytes",
    vocab_size: int | None = None,
    special: bool = False,
    seed: int = 0,
    assets: Path | None = None,
) -> TextData:
    """Read a corpus as tokens of training, validation and test text.

    Splits that have files of their own are those files. Of one that has none, the last 5 % of the training text are the
    test text and the `validation_fraction` before them the validation text. Neither depends on a seed: shuffled
    passages would let a model see the neighbours of what it is tested on. Splits are cut by the byte, so that they are
    the same for every tokeniser.

    Args:
        name: "tiny_shakespeare", from `data_dir`/input.txt or `data_dir`/tiny_shakespeare/input.txt; or "text".
        data_dir: for "text" any file (of a .parquet or .jsonl file the column `text` is read), or a folder: with
            train.EXT and perhaps validation.EXT and test.EXT, where EXT is parquet, jsonl or txt (also in several
            files, train-*.EXT); or with *.txt files, which are joined in the order of their names.
        validation_fraction: share of the corpus held out, strictly between 0 and 0.95.
        train_fraction: the part of the training text that is used: one stretch of it, whose place is drawn by `seed`.
            A smaller one lies within a larger one.
        tokenizer: "bytes", which takes any content; "bpe", learned from the training text; a tokenizer.json or a folder
            that has one; or "hub:NAME". All but bytes need UTF-8.
        vocab_size: of a BPE that is learned; None is 8192 or fewer.
        special: whether bytes come with special tokens; a BPE that is learned always has them.
        seed: of the part of the training text; nothing else is drawn.
        assets: a run or a saved model whose tokeniser is used, whatever `tokenizer` says.

    Raises:
        ValueError: when the name or an option is wrong, or the text is missing, unreadable, not UTF-8 or too short to
            be cut.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "a.txt").write_text("to be or not to be, " * 10)
    ...     data = load_text("text", data_dir=folder)
    >>> len(data.train), len(data.validation), bytes(data.test.tolist())
    (180, 10, b'ot to be, ')
    """
    if name not in TEXT_NAMES:
        raise ValueError(f"unknown text {name!r}. Known: {', '.join(TEXT_NAMES)}")
    if not 0 < validation_fraction < 1 - TEST_FRACTION:
        raise ValueError(
            f"validation_fraction is {validation_fraction}, but must lie strictly between 0 and {1 - TEST_FRACTION:g}: "
            f"the last {100 * TEST_FRACTION:.0f} % of a text are its test split"
        )
    check_train_fraction(train_fraction)
    place = None if data_dir is None else Path(data_dir).expanduser()
    texts = _splits(_shakespeare(place) if name == "tiny_shakespeare" else _files(place), validation_fraction, place)
    if train_fraction < 1:
        drawn = torch.rand((), generator=generator(seed, "part of the training text"), dtype=torch.float64).item()
        texts["train"] = stretch(texts["train"], train_fraction, drawn)
    if tokenizer == "bpe" and not (assets is not None and (assets / FILE).is_file()):
        chosen: Tokenizer = trained_tokenizer(texts["train"], 8192 if vocab_size is None else vocab_size)
    else:
        chosen = choose_tokenizer(tokenizer, vocab_size=vocab_size, texts=(), special=special, assets=assets)
    train, validation, test = (token_tensor(texts[split], chosen) for split in SPLITS)
    sizes = {split: sum(map(len, text)) for split, text in texts.items()}
    return TextData(name, train, validation, test, tokenizer=chosen, sizes=sizes)


def _splits(files: dict[str, list[Path]], validation_fraction: float, place: Path | None) -> dict[str, Text]:
    """The text of each split; those without files of their own are cut from the training text."""
    size = sum(text_size(path) for path in files["train"])
    shares = {"validation": validation_fraction, "test": TEST_FRACTION}
    lengths = {split: round(share * size) for split, share in shares.items() if split not in files}
    names = ["train", *lengths]
    parts = cut(files["train"], [size - sum(lengths.values()), *lengths.values()])
    texts = dict(zip(names, parts, strict=True))
    for split in SPLITS:
        if split not in texts:
            texts[split] = cut(files[split], [sum(text_size(path) for path in files[split])])[0]
    for split in SPLITS:
        length = sum(map(len, texts[split]))
        if length < 2 and split in files and split != "train":
            raise ValueError(f"{files[split][0]} has {length} bytes of text: too short for a {split} split")
        if length < 2:
            raise ValueError(
                f"the text in {place} has {size} bytes: too short for training, validation and test splits"
            )
    return {split: texts[split] for split in SPLITS}


def _shakespeare(place: Path | None) -> dict[str, list[Path]]:
    if place is None:
        raise ValueError(
            f"data 'tiny_shakespeare' is not fetched for you: save {SHAKESPEARE} as DIR/input.txt and pass data_dir=DIR"
        )
    for path in (place / "input.txt", place / "tiny_shakespeare" / "input.txt"):
        if path.is_file():
            return {"train": [path]}
    raise ValueError(
        f"data_dir {place} has neither input.txt nor tiny_shakespeare/input.txt; the file is at {SHAKESPEARE}"
    )


def _files(place: Path | None) -> dict[str, list[Path]]:
    """Files by split; files that belong to no split are training text."""
    if place is None:
        raise ValueError(
            "data 'text' needs data_dir=PLACE: a text file, a folder with *.txt files, or one with train.parquet or "
            "train.jsonl"
        )
    if place.is_file():
        return {"train": [place]}
    if not place.is_dir():
        raise ValueError(f"data_dir {place} is neither a file nor a folder")
    for suffix in (*TABLES, ".txt"):
        files = {split: _parts_of(place, split, suffix) for split in SPLITS}
        files = {split: found for split, found in files.items() if found}
        if "train" in files and (suffix in TABLES or len(files) > 1):
            return files
    found = sorted(path for path in place.glob("*.txt") if path.is_file())
    if not found:
        raise ValueError(f"data_dir {place} has no *.txt files, and neither train.parquet nor train.jsonl")
    return {"train": found}


def _parts_of(place: Path, split: str, suffix: str) -> list[Path]:
    patterns = (f"{split}{suffix}", f"{split}-*{suffix}")
    return sorted(path for pattern in patterns for path in place.glob(pattern) if path.is_file())
