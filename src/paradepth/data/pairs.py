"""Pairs of sentences, a source and its translation: Multi30k, JSON lines, or two text files line by line.

Shape suffixes: N pairs, B pairs of a batch, S source tokens, T target tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from paradepth.data.padded import Ragged
from paradepth.data.seeds import generator
from paradepth.data.split import check_train_fraction, training_part
from paradepth.data.tokenizer import Tokenizer, choose_tokenizer

PAIR_NAMES = ("multi30k", "pairs")
HUB = {"multi30k": "bentrevett/multi30k"}
TEST_FRACTION, TEST_SEED = 0.05, 0  # of a corpus without a test split; depends on neither seed nor options of the run
_SPLITS = {"train": ("train",), "validation": ("validation", "val", "valid", "dev"), "test": ("test",)}

Texts = list[tuple[str, str]]


@dataclass(frozen=True)
class PairSplit:
    """Aligned sentences.

    Attributes:
        sources: tokens of each source, with </s> behind them.
        targets: tokens of each target, between <s> and </s>.
        texts: both sentences of each pair.
    """

    sources: Ragged
    targets: Ragged
    texts: Texts

    def __len__(self) -> int:
        return len(self.texts)

    def chosen(self, keep_N: Tensor) -> PairSplit:
        """The pairs for which `keep_N` is true."""
        numbers = keep_N.nonzero().flatten().tolist()
        sources, targets = (Ragged.of([side[i].tolist() for i in numbers]) for side in (self.sources, self.targets))
        return PairSplit(sources, targets, [self.texts[i] for i in numbers])

    def to(self, device: torch.device | str) -> PairSplit:
        """The same pairs with their tokens on another device."""
        return replace(self, sources=self.sources.to(device), targets=self.targets.to(device))


@dataclass(frozen=True)
class PairData:
    """A corpus of pairs, ready for training.

    Attributes:
        name: as given to :func:`load_pairs`.
        languages: source and target.
        tokenizer: of both languages.
        train, validation, test: the splits.
        blank: training pairs that were left out because one side is blank.
        long: training pairs that were left out because one side is too long.
    """

    name: str
    languages: tuple[str, str]
    tokenizer: Tokenizer
    train: PairSplit
    validation: PairSplit
    test: PairSplit
    blank: int = 0
    long: int = 0

    def to(self, device: torch.device | str) -> PairData:
        """The same data with its tokens on another device."""
        splits = {name: getattr(self, name).to(device) for name in _SPLITS}
        return replace(self, **splits)

    def without_long(self, context: int) -> PairData:
        """Without the training pairs whose source or target, with its marks, is longer than `context` tokens.

        Raises:
            ValueError: nothing is left.
        """
        # A target's input lacks </s> and what it predicts lacks <s>.
        keep_N = (self.train.sources.lengths_N <= context) & (self.train.targets.lengths_N - 1 <= context)
        long = int((~keep_N).sum())
        if not long:
            return self
        if long == len(self.train):
            raise ValueError(f"context is {context}; all {long} training pairs of {self.name!r} are longer")
        return replace(self, train=self.train.chosen(keep_N), long=self.long + long)


def load_pairs(
    name: str,
    *,
    data_dir: str | Path | None = None,
    languages: tuple[str, str] | None = None,
    validation_fraction: float = 0.05,
    train_fraction: float = 1.0,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
    assets: Path | None = None,
) -> PairData:
    """Reads pairs of sentences and makes tokens of them.

    Training pairs with a blank side are left out and counted; a validation or test pair with one is refused.

    Args:
        name: "multi30k", from `data_dir`, `data_dir`/multi30k or the Hub; or "pairs".
        data_dir: for "pairs" a folder with train.jsonl or train.SOURCE and train.TARGET, line by line, and the same for
            validation (or val, valid, dev) and test; one .jsonl file; or PREFIX of PREFIX.SOURCE and PREFIX.TARGET.
        languages: source and target: keys of the JSON objects, or endings of the text files. ("de", "en") for multi30k.
        validation_fraction: share of the training pairs held out where there is no validation split. Without a test
            split 5 % are the test split.
        train_fraction: the part of the other training pairs that is used, drawn by `seed`.
        tokenizer: see `choose_tokenizer`; one BPE of both languages by default.
        vocab_size: of a BPE.
        seed: of the validation split and of the part.
        assets: a folder whose tokeniser is used.

    Raises:
        ValueError: no, damaged or unaligned files, text that is not UTF-8, languages that are not there, or options out
            of range.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for language, word in ("de", "Hund"), ("en", "dog"):
    ...         _ = Path(folder, f"train.{language}").write_text("".join(f"{word} {i}\\n" for i in range(100)))
    ...     data = load_pairs("pairs", data_dir=folder, languages=("de", "en"), tokenizer="bytes")
    >>> len(data.train), len(data.validation), len(data.test), data.train.texts[0]
    (90, 5, 5, ('Hund 0', 'dog 0'))
    """
    if name not in PAIR_NAMES:
        raise ValueError(f"unknown pairs {name!r}. Known: {', '.join(PAIR_NAMES)}")
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}, but must lie strictly between 0 and 1")
    check_train_fraction(train_fraction)
    languages = ("de", "en") if languages is None and name == "multi30k" else languages
    if languages is None:
        raise ValueError("data 'pairs' needs languages: source and target, such as --languages de en")
    if len(languages) != 2 or languages[0] == languages[1]:
        raise ValueError(f"languages are {', '.join(languages)}; they must be two different ones, source and target")
    splits = _read(name, data_dir, languages)
    texts, blank = {}, 0
    for split, (place, pairs) in splits.items():
        full = [(a.strip(), b.strip()) for a, b in pairs]
        blanks = [i for i, pair in enumerate(full) if not all(pair)]
        if blanks and split != "train":
            side = languages[0] if not full[blanks[0]][0] else languages[1]
            raise ValueError(f"{place}: pair {blanks[0] + 1} of the {split} split has no {side} text")
        if split == "train":
            blank = len(blanks)
        texts[split] = [pair for pair in full if all(pair)]
        if not texts[split]:
            raise ValueError(f"{place} holds no pair of sentences")
    for split, fraction, draw in (("test", TEST_FRACTION, TEST_SEED), ("validation", validation_fraction, seed)):
        if split not in texts:
            texts["train"], texts[split] = _held_out(texts["train"], fraction, split, draw, str(splits["train"][0]))
    if train_fraction < 1:
        part = training_part(torch.zeros(len(texts["train"])).long(), train_fraction, seed=seed)
        texts["train"] = [texts["train"][i] for i in part.tolist()]
    corpus = (sentence for pair in texts["train"] for sentence in pair)
    chosen = choose_tokenizer(tokenizer or "bpe", vocab_size=vocab_size, texts=corpus, special=True, assets=assets)
    train, validation, test = (_tokens(texts[split], chosen) for split in _SPLITS)
    return PairData(name, languages, chosen, train, validation, test, blank=blank)


def _tokens(texts: Texts, tokenizer: Tokenizer) -> PairSplit:
    start, end = tokenizer.special("<s>"), tokenizer.special("</s>")
    sources, targets = (tokenizer.encode_many(side) for side in zip(*texts, strict=True))
    return PairSplit(
        Ragged.of([[*tokens, end] for tokens in sources]),
        Ragged.of([[start, *tokens, end] for tokens in targets]),
        texts,
    )


def _held_out(pairs: Texts, fraction: float, split: str, seed: int, place: str) -> tuple[Texts, Texts]:
    count = max(1, round(fraction * len(pairs)))
    if len(pairs) - count < 1:
        raise ValueError(f"{place} has {len(pairs)} pairs: too few to hold out a {split} split")
    held = set(torch.randperm(len(pairs), generator=generator(seed, f"{split} pairs"))[:count].tolist())
    return [p for i, p in enumerate(pairs) if i not in held], [p for i, p in enumerate(pairs) if i in held]


# ---- files ---------------------------------------------------------------------------------------------------

_Found = dict[str, tuple[Path, Texts]]  # by split


def _read(name: str, data_dir: str | Path | None, languages: tuple[str, str]) -> _Found:
    if data_dir is None:
        if name in HUB:
            return _from_hub(name, languages)
        raise ValueError(
            "data 'pairs' needs data_dir=PLACE, a folder with train.jsonl or two text files, or such files"
        )
    place = Path(data_dir).expanduser()
    if name in HUB and not _candidates(place, "train", languages) and (place / name).is_dir():
        place = place / name
    if place.is_file():
        return {"train": (place, _jsonl(place, languages))}
    if not place.is_dir():
        prefix = [place.with_name(f"{place.name}.{language}") for language in languages]
        if not any(path.is_file() for path in prefix):
            raise ValueError(f"data_dir {place} is neither a file nor a folder, and there is no {prefix[0]} either")
        return {"train": (place, _aligned(*prefix))}
    found = {}
    for split, names in _SPLITS.items():
        for stem in names:
            paths = _candidates(place, stem, languages)
            if paths:
                pairs = _jsonl(paths[0], languages) if len(paths) == 1 else _aligned(*paths)
                found[split] = (place if len(paths) == 2 else paths[0], pairs)
                break
    if "train" not in found:
        texts = " and ".join(f"train.{language}" for language in languages)
        raise ValueError(f"data_dir {place} has neither train.jsonl nor {texts}")
    return found


def _candidates(folder: Path, stem: str, languages: Sequence[str]) -> list[Path]:
    """The JSONL file of a split, or its two text files; nothing if it has neither."""
    if (folder / f"{stem}.jsonl").is_file():
        return [folder / f"{stem}.jsonl"]
    both = [folder / f"{stem}.{language}" for language in languages]
    return both if any(path.is_file() for path in both) else []


def _from_hub(name: str, languages: tuple[str, str]) -> _Found:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    found = {}
    for split, file in (("train", "train.jsonl"), ("validation", "val.jsonl"), ("test", "test.jsonl")):
        try:
            path = Path(hf_hub_download(HUB[name], file, repo_type="dataset"))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ValueError(
                f"{file} of {HUB[name]} cannot be fetched from the Hub: {error}. With files of your own pass data_dir"
            ) from error
        found[split] = (path, _jsonl(path, languages))
    return found


def read_lines(path: Path) -> list[str]:
    """The lines of a text; only line feeds separate them, so that both files of a pair are cut alike.

    Raises:
        ValueError: a file that cannot be read, is empty, or is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    return decode_lines(content, str(path))


def decode_lines(content: bytes, place: str) -> list[str]:
    """The lines of UTF-8, as `read_lines`.

    Raises:
        ValueError: naming the place, for what is empty or not UTF-8.

    >>> decode_lines("ein Hund\\nzwei Hunde\\n".encode(), "a file")
    ['ein Hund', 'zwei Hunde']
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{place} is not UTF-8: line {line} has the byte 0x{content[error.start]:02x}") from error
    if not text.strip():
        raise ValueError(f"{place} is empty")
    lines = text.split("\n")
    return lines[:-1] if not lines[-1] else lines


def _aligned(source: Path, target: Path) -> Texts:
    sides = []
    for path, other in ((source, target), (target, source)):
        if not path.is_file():
            raise ValueError(f"there is {other} but no {path}; pairs need both")
        sides.append(read_lines(path))
    if len(sides[0]) != len(sides[1]):
        raise ValueError(
            f"{source} has {len(sides[0])} lines and {target} has {len(sides[1])}; they must be translations of each "
            "other, line by line"
        )
    return list(zip(*sides, strict=True))


def _jsonl(path: Path, languages: tuple[str, str]) -> Texts:
    pairs: Texts = []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, line {number} is no JSON object with the keys {' and '.join(languages)}")
        for language in languages:
            if not isinstance(entry.get(language), str):
                known = [key for key, value in entry.items() if isinstance(value, str)]
                raise ValueError(
                    f"{path}, line {number} has no text {language!r}; languages are {' and '.join(languages)}, and "
                    f"there are texts under {', '.join(known) or 'no key'}"
                )
        pairs.append((entry[languages[0]], entry[languages[1]]))
    return pairs
