"""Treebanks: tagged sentences for training, validation and test, from local files or the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from paradepth.data.seeds import generator
from paradepth.data.split import check_train_fraction, training_part
from paradepth.data.tagged import Sentence, read_conllu
from paradepth.data.tagged_hub import load_rows

TREEBANKS = {"ud_english_ewt": "en_ewt", "ud_english_gum": "en_gum"}  # name: as UD's files and the Hub call it
TAGGED_NAMES = (*TREEBANKS, "conllu")

# A test split that had to be drawn depends on neither the seed of the run nor its options.
TEST_FRACTION, TEST_SEED = 0.1, 0
_SPLITS = {"train": "train", "dev": "validation", "test": "test"}


@dataclass(frozen=True)
class Treebank:
    """Sentences of the three splits.

    Attributes:
        name: as given to :func:`load_tagged`.
    """

    name: str
    train: tuple[Sentence, ...]
    validation: tuple[Sentence, ...]
    test: tuple[Sentence, ...]


def load_tagged(
    name: str,
    *,
    data_dir: str | Path | None = None,
    validation_fraction: float = 0.1,
    train_fraction: float = 1.0,
    seed: int = 0,
) -> Treebank:
    """Reads a treebank.

    Args:
        name: "ud_english_ewt" or "ud_english_gum": Universal Dependencies' files, such as en_ewt-ud-train.conllu, from
            `data_dir` or `data_dir`/NAME, or from the Hub; or "conllu", files of one's own.
        data_dir: for "conllu" a file, or a folder with train.conllu and, where they exist, dev.conllu and
            test.conllu (or one file of each kind whose name ends in -train.conllu and so on).
        validation_fraction: part of the training sentences held out where there is no dev file. A missing test split
            is 10 % of the sentences; which ones does not depend on `seed`.
        train_fraction: the part of the other training sentences that is used.
        seed: of the choice of validation sentences and of the part.

    Raises:
        ValueError: unknown name, missing, damaged or empty files (file and line are told), or too few sentences.
    """
    if name not in TAGGED_NAMES:
        raise ValueError(f"unknown tagged sentences {name!r}. Known: {', '.join(TAGGED_NAMES)}")
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}, but must lie strictly between 0 and 1")
    check_train_fraction(train_fraction)
    place = None if data_dir is None else Path(data_dir).expanduser()
    if name == "conllu":
        if place is None:
            raise ValueError("data 'conllu' needs data_dir=PLACE, a CoNLL-U file or a folder with train.conllu")
        parts = {split: list(read_conllu(path)) for split, path in _own_files(place).items()}
    elif place is None:
        rows = load_rows(TREEBANKS[name], name)
        parts = {split: [Sentence(*columns) for columns in sentences] for split, sentences in rows.items()}
    else:
        parts = {split: list(read_conllu(path)) for split, path in _treebank_files(name, place).items()}
    for split, fraction, number in (("test", TEST_FRACTION, TEST_SEED), ("validation", validation_fraction, seed)):
        if split not in parts:
            parts["train"], parts[split] = _held_out(parts["train"], fraction, number, split, name)
    if train_fraction < 1:
        part = training_part(torch.zeros(len(parts["train"])).long(), train_fraction, seed=seed)
        parts["train"] = [parts["train"][i] for i in part.tolist()]
    return Treebank(name, **{split: tuple(parts[split]) for split in _SPLITS.values()})


def _treebank_files(name: str, place: Path) -> dict[str, Path]:
    names = {split: f"{TREEBANKS[name]}-ud-{part}.conllu" for part, split in _SPLITS.items()}
    for folder in (place, place / name):
        if all((folder / file).is_file() for file in names.values()):
            return {split: folder / file for split, file in names.items()}
    raise ValueError(f"neither {place} nor {place / name} has the three files {', '.join(names.values())}")


def _own_files(place: Path) -> dict[str, Path]:
    if place.is_file():
        return {"train": place}
    if not place.is_dir():
        raise ValueError(f"data_dir {place} is neither a file nor a folder")
    found = {}
    for part, split in _SPLITS.items():
        fitting = [place / f"{part}.conllu"] if (place / f"{part}.conllu").is_file() else []
        fitting = fitting or sorted(place.glob(f"*-{part}.conllu"))
        if len(fitting) > 1:
            raise ValueError(f"data_dir {place} has several files for {part}: {', '.join(p.name for p in fitting)}")
        if fitting:
            found[split] = fitting[0]
    if "train" not in found:
        raise ValueError(f"data_dir {place} has no train.conllu")
    return found


def _held_out(
    sentences: Sequence[Sentence], fraction: float, seed: int, split: str, name: str
) -> tuple[list[Sentence], list[Sentence]]:
    count = max(1, round(fraction * len(sentences)))
    if count >= len(sentences):
        raise ValueError(
            f"data {name!r} has no {split} file, and {len(sentences)} training sentence(s) are too few to hold "
            f"{count} out"
        )
    order = torch.randperm(len(sentences), generator=generator(seed, f"{split} sentences"))
    held = set(order[:count].tolist())
    return (
        [sentence for i, sentence in enumerate(sentences) if i not in held],
        [sentence for i, sentence in enumerate(sentences) if i in held],
    )
