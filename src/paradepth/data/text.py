"""Text as bytes: the three splits are contiguous parts of one corpus."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

TEXT_NAMES = ("tiny_shakespeare", "text")
TEST_FRACTION = 0.05
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


@dataclass(frozen=True)
class TextData:
    """A corpus, ready for training. A token is a byte, so text of any language and alphabet will do.

    Attributes:
        name: as given to :func:`load_text`.
        train, validation, test: uint8, one dimension; joined in this order they are the corpus.
    """

    name: str
    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor

    @property
    def vocab_size(self) -> int:
        """256, the number of bytes there are."""
        return 256

    def to(self, device: torch.device | str) -> TextData:
        """The same data with the three splits on another device."""
        return replace(
            self, train=self.train.to(device), validation=self.validation.to(device), test=self.test.to(device)
        )


def load_text(name: str, *, data_dir: str | Path | None = None, validation_fraction: float = 0.05) -> TextData:
    """Read a corpus and cut it into training, validation and test text, in this order.

    The last 5 % are the test text, the `validation_fraction` before them the validation text, all else is for
    training. Neither depends on a seed: shuffled passages would let a model see the neighbours of what it is tested on.

    Args:
        name: "tiny_shakespeare", from `data_dir`/input.txt or `data_dir`/tiny_shakespeare/input.txt; or "text", any
            text file, or a folder whose *.txt files are joined in the order of their names.
        data_dir: that file or folder.
        validation_fraction: share of the corpus held out, strictly between 0 and 0.95.

    Raises:
        ValueError: when the name or an option is wrong, or the text is missing, unreadable or too short to be cut.

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
    place = None if data_dir is None else Path(data_dir).expanduser()
    content = b"".join(_read(path) for path in (_shakespeare(place) if name == "tiny_shakespeare" else _files(place)))
    test = round(TEST_FRACTION * len(content))
    validation = round(validation_fraction * len(content))
    train = len(content) - validation - test
    if min(train, validation, test) < 2:
        raise ValueError(
            f"the text in {place} has {len(content)} bytes: too short for training, validation and test splits"
        )
    corpus = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return TextData(name, *corpus.split([train, validation, test]))


def _shakespeare(place: Path | None) -> list[Path]:
    if place is None:
        raise ValueError(
            f"data 'tiny_shakespeare' is not fetched for you: save {SHAKESPEARE} as DIR/input.txt and pass data_dir=DIR"
        )
    for path in (place / "input.txt", place / "tiny_shakespeare" / "input.txt"):
        if path.is_file():
            return [path]
    raise ValueError(
        f"data_dir {place} has neither input.txt nor tiny_shakespeare/input.txt; the file is at {SHAKESPEARE}"
    )


def _files(place: Path | None) -> list[Path]:
    if place is None:
        raise ValueError("data 'text' needs data_dir=PLACE, a text file or a folder with *.txt files")
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise ValueError(f"data_dir {place} is neither a file nor a folder")
    found = sorted(path for path in place.glob("*.txt") if path.is_file())
    if not found:
        raise ValueError(f"data_dir {place} has no *.txt files")
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
