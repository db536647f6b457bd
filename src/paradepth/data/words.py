"""Words to whole numbers: the word itself where it is frequent, and hashed parts of every word.

A tagger sees words that its training data does not have. What their ends, beginnings and shapes tell of them is known
from other words, so a word is several numbers, each the row of one embedding table:

    row 0       padding
    row 1       a word that is not in the vocabulary
    rows 2 …    words that occur often enough in the training data, then the same words in lower case
    the rest    buckets, into which all else is hashed

Shapes: B sentences, T words, F numbers of a word.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from paradepth.atomic import write_text

FILE = "words.json"
PADDING, UNKNOWN = 0, 1
OWN = 2  # numbers that stand for the word as a whole, in front of those that it shares with others
AFFIX = 4  # longest beginning and end
BUCKETS = 2**15
_VERSION = 1  # to be raised whenever a word gets other numbers


class WordVocabulary:
    """Numbers for words.

    The numbers of a word are: its row and that of its lower case, `UNKNOWN` where the vocabulary does not have it; and
    the buckets of its first 1 to 4 and of its last 1 to 4 letters in lower case, and of its shape. They depend on
    nothing but the vocabulary and the word: they are the same in every process and on every machine.

    Args:
        words: the vocabulary; their order is that of their rows.
        buckets: rows for everything else.

    Attributes:
        size: rows of the embedding table.
        features: F, numbers of a word.

    Raises:
        ValueError: no bucket, or a word that occurs twice.

    >>> vocabulary = WordVocabulary(["the", "dog"], buckets=1000)
    >>> vocabulary.size, vocabulary.features
    (1006, 11)
    >>> vocabulary.numbers("dog")[:2], vocabulary.numbers("dogs")[:2]
    ((3, 5), (1, 1))
    >>> vocabulary.numbers("Walking")[9] == vocabulary.numbers("talking")[9]  # both end in "king"
    True
    """

    features = OWN + 2 * AFFIX + 1

    def __init__(self, words: Iterable[str], *, buckets: int = BUCKETS) -> None:
        self.words = tuple(words)
        self.buckets = buckets
        self._rows = {word: row for row, word in enumerate(self.words, start=UNKNOWN + 1)}
        lower = dict.fromkeys(word.lower() for word in self.words)
        self._lower_rows = {word: row for row, word in enumerate(lower, start=UNKNOWN + 1 + len(self.words))}
        self._first_bucket = UNKNOWN + 1 + len(self.words) + len(lower)
        self._known: dict[str, tuple[int, ...]] = {}
        if buckets < 1:
            raise ValueError(f"buckets is {buckets}; it must be at least 1")
        if len(self._rows) < len(self.words):
            twice = next(word for word, count in Counter(self.words).items() if count > 1)
            raise ValueError(f"{twice!r} is twice in the vocabulary")

    @classmethod
    def learn(cls, sentences: Iterable[Sequence[str]], *, least: int = 2, buckets: int = BUCKETS) -> WordVocabulary:
        """The words that occur at least `least` times in the training data, the most frequent first.

        >>> WordVocabulary.learn([["a", "b", "a"], ["b", "a", "c"]]).words
        ('a', 'b')
        """
        counts = Counter(word for sentence in sentences for word in sentence)
        kept = [(-count, word) for word, count in counts.items() if count >= least]
        return cls([word for _, word in sorted(kept)], buckets=buckets)

    @property
    def size(self) -> int:
        """Rows of the embedding table that the numbers point into."""
        return self._first_bucket + self.buckets

    def numbers(self, word: str) -> tuple[int, ...]:
        """The F numbers of a word."""
        found = self._known.get(word)
        if found is None:
            found = self._known[word] = self._numbers(word)
        return found

    def encode(self, sentences: Sequence[Sequence[str]]) -> torch.Tensor:
        """The numbers of sentences, padded at their ends: int64, (B, T, F), T the words of the longest.

        >>> WordVocabulary(["the"], buckets=9).encode([["the", "dog"], ["dogs"]])[:, :, 0].tolist()
        [[2, 1], [1, 0]]
        """
        longest = max((len(sentence) for sentence in sentences), default=0)
        numbers_BTF = torch.full((len(sentences), longest, self.features), PADDING)
        for row_TF, sentence in zip(numbers_BTF, sentences, strict=True):
            if len(sentence):
                row_TF[: len(sentence)] = torch.tensor([self.numbers(word) for word in sentence])
        return numbers_BTF

    def save(self, folder: str | Path) -> Path:
        """Writes `words.json` into the folder, atomically."""
        path = Path(folder) / FILE
        content = {"paradepth": "words", "version": _VERSION, "buckets": self.buckets, "words": self.words}
        write_text(path, json.dumps(content, ensure_ascii=False))
        return path

    def _numbers(self, word: str) -> tuple[int, ...]:
        lower = word.lower()
        parts = [lower[:length] for length in range(1, AFFIX + 1)]
        parts += [lower[-length:] for length in range(1, AFFIX + 1)]
        parts.append(shape(word))
        own = self._rows.get(word, UNKNOWN), self._lower_rows.get(lower, UNKNOWN)
        return *own, *(self._bucket(kind, part) for kind, part in enumerate(parts))

    def _bucket(self, kind: int, part: str) -> int:
        digest = hashlib.blake2b(f"{kind} {part}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return self._first_bucket + int.from_bytes(digest, "little") % self.buckets


def shape(word: str) -> str:
    """What a word looks like: X for a capital, x for another letter, 0 for a digit, all else as it is; repeated signs
    once.

    >>> shape("McDonald's"), shape("3,000"), shape("B-52"), shape("USA")
    ("XxXx'x", '0,0', 'X-0', 'X')
    """
    signs = "".join(
        "0" if sign.isdigit() else "X" if sign.isupper() else "x" if sign.isalpha() else sign for sign in word
    )
    return re.sub(r"(.)\1+", r"\1", signs, flags=re.DOTALL)


def load_words(place: str | Path) -> WordVocabulary:
    """A saved vocabulary.

    Args:
        place: a `words.json`, or a folder that has one.

    Raises:
        ValueError: there is none, or it is damaged, or of another version.
    """
    path = Path(place).expanduser()
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{place} has no vocabulary of words: there is no file {path}")
    try:
        return read_words(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} does not hold a vocabulary of words: {error}") from error


def read_words(content: str) -> WordVocabulary:
    """The vocabulary that the content of a `words.json` describes.

    Raises:
        ValueError: it describes none, or one of another version.
    """
    try:
        described = json.loads(content)
        if described["paradepth"] != "words" or not all(isinstance(word, str) for word in described["words"]):
            raise ValueError("it is something else")
        if described["version"] != _VERSION:
            raise ValueError(f"its version is {described['version']}, this paradepth reads {_VERSION}")
        return WordVocabulary(described["words"], buckets=described["buckets"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"it is something else: {error!r}") from error


def check_words(vocabulary: WordVocabulary, vocab_size: int, features: int) -> None:
    """Refuses a vocabulary that was not made for a model.

    Args:
        vocabulary: of the words.
        vocab_size, features: of the model: rows of its embedding table, numbers of a word.

    Raises:
        ValueError: they differ from the vocabulary's.
    """
    if (vocabulary.size, vocabulary.features) != (vocab_size, features):
        raise ValueError(
            f"the vocabulary has {vocabulary.size} rows and {vocabulary.features} numbers a word, the model takes "
            f"{vocab_size} and {features}: they do not belong together"
        )


_SPLIT = re.compile(
    r"(?:[^\W\d_]\.){2,}"  # U.S., a.m.
    r"|\d+(?:[.,:/]\d+)*"  # 3,000 or 10:30
    r"|\w+?(?=n['’]t\b)|n['’]t\b"  # do n't
    r"|['’](?:s|re|ve|ll|d|m)\b"  # dog 's
    r"|\w+"
    r"|([^\w\s])\1*",  # ... or !!
    re.IGNORECASE,
)


def split_words(text: str) -> list[str]:
    """English text in words, roughly as UD's English treebanks have them.

    A word is a stretch of letters and digits, or the same sign once or more; n't, 's, 're, 've, 'll, 'd and 'm are
    words of their own; numbers keep the signs within them and abbreviations such as U.S. their full stops.

    >>> split_words("The dog's owner didn't pay $3,000 in the U.S. (yet)...")
    ['The', 'dog', "'s", 'owner', 'did', "n't", 'pay', '$', '3,000', 'in', 'the', 'U.S.', '(', 'yet', ')', '...']
    """
    return [match.group() for match in _SPLIT.finditer(text)]
