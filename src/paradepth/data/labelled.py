"""Texts, or pairs of texts, with labels: tasks of GLUE by name, and tables of one's own.

Shape suffixes: N samples, B samples of a batch, T tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paradepth.data.labelled_files import Rows, find_table, hub_rows, read_rows
from paradepth.data.padded import Ragged
from paradepth.data.split import check_train_fraction, stratified_split, training_part
from paradepth.data.tokenizer import Tokenizer, choose_tokenizer

HUB = "nyu-mll/glue"
TEST_SEED = 0  # a test split that had to be drawn does not depend on the seed of the run


@dataclass(frozen=True)
class Glue:
    """A task of the GLUE benchmark (arXiv 1804.07461).

    Attributes:
        columns: of its text, or of both.
        classes: names, in the order of their numbers.
        validation: its validation split, which is the test split here where test labels are kept secret.
        other: further splits with labels that are tested on.
    """

    columns: tuple[str, ...]
    classes: tuple[str, ...]
    validation: str = "validation"
    other: tuple[str, ...] = ()


GLUE = {
    "sst2": Glue(("sentence",), ("negative", "positive")),
    "cola": Glue(("sentence",), ("unacceptable", "acceptable")),
    "mrpc": Glue(("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "rte": Glue(("sentence1", "sentence2"), ("entailment", "not_entailment")),
    "qnli": Glue(("question", "sentence"), ("entailment", "not_entailment")),
    "mnli": Glue(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        "validation_matched",
        ("validation_mismatched",),
    ),
    "qqp": Glue(("question1", "question2"), ("not_duplicate", "duplicate")),
}
LABELLED_NAMES = (*GLUE, "labelled")


@dataclass(frozen=True)
class LabelledSplit:
    """Samples of a split.

    Attributes:
        texts: text or texts of each.
        labels_N: class of each.
        tokens: <s> text </s>, or <s> text </s> other text </s>.
    """

    texts: list[tuple[str, ...]]
    labels_N: Tensor
    tokens: Ragged

    def __len__(self) -> int:
        return len(self.labels_N)

    def batch(self, indices_B: Tensor, *, pad: int, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Tokens (B, T), padded to the longest or to `length`, and labels (B,) of the chosen samples."""
        return self.tokens.padded(indices_B, pad=pad, length=length), self.labels_N[indices_B]

    def to(self, device: torch.device | str) -> LabelledSplit:
        """The same samples on another device."""
        return replace(self, labels_N=self.labels_N.to(device), tokens=self.tokens.to(device))


@dataclass(frozen=True)
class LabelledData:
    """Labelled texts, ready for training.

    Attributes:
        name: as given to :func:`load_labelled`.
        class_names: of the labels.
        pairs: whether a sample is two texts.
        tokenizer: made the tokens.
        splits: "train", "validation" and "test", and "mismatched" of MNLI.
        notes: what a user should know of the splits.
    """

    name: str
    class_names: tuple[str, ...]
    pairs: bool
    tokenizer: Tokenizer
    splits: dict[str, LabelledSplit]
    notes: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> LabelledData:
        """The same data on another device."""
        return replace(self, splits={name: split.to(device) for name, split in self.splits.items()})


def load_labelled(
    name: str,
    *,
    context: int,
    data_dir: str | Path | None = None,
    columns: Sequence[str] | None = None,
    validation_fraction: float = 0.1,
    train_fraction: float = 1.0,
    tokenizer: str = "bpe",
    vocab_size: int | None = None,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    chosen: Tokenizer | None = None,
) -> LabelledData:
    """Reads labelled texts and makes tokens of them.

    Texts that are longer than `context` with their marks are cut at the end, of a pair the longer one first, and their
    number is told in a warning.

    Args:
        name: a task of GLUE, or "labelled" for a table of one's own.
        context: tokens of a sample at most.
        data_dir: where `data_dir`/NAME/train.jsonl (or .csv, .tsv, .parquet) lies, with validation and test beside it;
            `data_dir`/glue/NAME or `data_dir` itself will do, too. None fetches GLUE from the Hub. For "labelled" also
            one file, of which `validation_fraction` is the validation split and as much the test split. GLUE keeps most
            test labels secret (they are −1 there): then its validation split is the test split, and the validation
            split is held out of training, as it is wherever there is none.
        columns: for "labelled": the text column, or both, and the label column; ("text", "label") by default.
        validation_fraction: share held out, the same of every class.
        train_fraction: the part of the other training texts that is used, see `training_part`.
        tokenizer: "bpe" (learned from the training texts), "bytes", a tokenizer.json, a folder with one, or "hub:NAME".
        vocab_size: of a BPE that is learned.
        seed: of the validation split and of the part.
        class_names: what labels may be called; None: what the training labels are called.
        chosen: a tokeniser that is used, whatever `tokenizer` says.

    Raises:
        ValueError: no, empty or damaged files, columns that are not there, labels that are missing or unknown, a text
            without tokens, a tokeniser without special tokens, or options out of range.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     table = Path(folder, "reviews.csv")
    ...     _ = table.write_text("text,label\\n" + "fine film,good\\nno fun,bad\\n" * 20)
    ...     data = load_labelled("labelled", context=16, data_dir=table, tokenizer="bytes")
    >>> data.class_names, {name: len(split) for name, split in data.splits.items()}
    (('bad', 'good'), {'train': 32, 'validation': 4, 'test': 4})
    """
    if name not in LABELLED_NAMES:
        raise ValueError(f"unknown labelled texts {name!r}. Known: {', '.join(LABELLED_NAMES)}")
    if not 0 < validation_fraction < 0.5:
        raise ValueError(f"validation_fraction is {validation_fraction}, but must lie strictly between 0 and 0.5")
    check_train_fraction(train_fraction)
    glue = GLUE.get(name)
    if glue is not None and columns is not None:
        raise ValueError(f"columns are {', '.join(columns)}; those of {name} are known, leave them out")
    used = (*glue.columns, "label") if glue else tuple(columns or ("text", "label"))
    if len(used) not in (2, 3) or len(set(used)) != len(used):
        raise ValueError(f"columns are {', '.join(used)}; name the text column, or both, and then the label column")
    if glue is not None and class_names and tuple(class_names[: len(glue.classes)]) != glue.classes:
        raise ValueError(f"class_names is {tuple(class_names)}; those of {name} start with {', '.join(glue.classes)}")
    rows = _glue_rows(name, glue, data_dir) if glue else _own_rows(data_dir, used)
    names = tuple(class_names or (glue.classes if glue else _names(rows["train"])))
    labels = {split: _numbers(found, names, by_number=glue is not None) for split, found in rows.items()}
    texts = {split: found.texts for split, found in rows.items()}
    notes = []
    if glue and "test" not in texts:
        texts["test"], labels["test"] = texts.pop("validation"), labels.pop("validation")
        notes.append(f"the test split is GLUE's {glue.validation} split, since GLUE keeps the test labels secret")
    for split, draw in (("test", TEST_SEED), ("validation", seed)):
        if split not in texts:
            kept, held = stratified_split(labels["train"], validation_fraction, seed=draw)
            texts[split], labels[split] = [texts["train"][i] for i in held], labels["train"][held]
            texts["train"], labels["train"] = [texts["train"][i] for i in kept], labels["train"][kept]
            notes.append(f"the {split} split is held out of the training split")
    if train_fraction < 1:
        part = training_part(labels["train"], train_fraction, seed=seed)
        texts["train"], labels["train"] = [texts["train"][i] for i in part], labels["train"][part]
    if chosen is None:
        corpus = (part for text in texts["train"] for part in text)
        chosen = choose_tokenizer(tokenizer, vocab_size=vocab_size, texts=corpus, special=True)
    order = [split for split in ("train", "validation", "test", "mismatched") if split in texts]
    splits = {
        split: LabelledSplit(texts[split], labels[split], encoded(texts[split], chosen, context, what=f"{split} texts"))
        for split in order
    }
    return LabelledData(name, names, len(used) == 3, chosen, splits, tuple(notes))


def encoded(texts: Sequence[tuple[str, ...]], tokenizer: Tokenizer, context: int, *, what: str = "texts") -> Ragged:
    """Samples as tokens with their marks: <s> text </s>, or <s> text </s> other text </s>.

    Args:
        texts: text or texts of each sample.
        tokenizer: with special tokens.
        context: tokens of a sample at most; longer ones are cut and counted in a warning.
        what: the samples, for the warning.

    Raises:
        ValueError: a tokeniser without special tokens, or a context that leaves no room for a text.
    """
    start, end = tokenizer.special("<s>"), tokenizer.special("</s>")
    tokenizer.special("<pad>")
    parts = [tokenizer.encode_many(side) for side in zip(*texts, strict=True)]
    room = context - 1 - len(parts)
    if room < len(parts):
        raise ValueError(f"context is {context}, which leaves no room for texts between their marks")
    samples, long = [], 0
    for sample in zip(*parts, strict=True):
        lengths = [len(part) for part in sample]
        long += sum(lengths) > room
        while sum(lengths) > room:  # the longest first, and of equal ones the last
            most = max(range(len(lengths)), key=lambda i: (lengths[i], i))
            rest = sum(lengths) - room
            others = max((length for i, length in enumerate(lengths) if i != most), default=0)
            lengths[most] -= min(rest, max(lengths[most] - others, 1))
        tokens = [start]
        for part, length in zip(sample, lengths, strict=True):
            tokens += [*part[:length], end]
        samples.append(tokens)
    if long:
        warnings.warn(
            f"{long:,} of {len(samples):,} {what} are longer than the model's {context} tokens and were cut; a larger "
            "--context reads them whole",
            stacklevel=2,
        )
    return Ragged.of(samples)


# ---- files ---------------------------------------------------------------------------------------------------


def _glue_rows(name: str, glue: Glue, data_dir: str | Path | None) -> dict[str, Rows]:
    """Splits that have labels."""
    columns = (*glue.columns, "label")
    splits = {"train": "train", "validation": glue.validation, "mismatched": (*glue.other, None)[0], "test": "test"}
    rows: dict[str, Rows] = {}
    if data_dir is None:
        hint = f"use --data-dir DIR with DIR/{name}/train.jsonl and {glue.validation}.jsonl"
        for split, there in splits.items():
            if there is not None and not (split == "test" and glue.other):  # MNLI's two test splits are secret
                rows[split] = hub_rows(HUB, name, there, columns, hint=hint)
    else:
        place = Path(data_dir).expanduser()
        places = (place / name, place / "glue" / name, place)
        folder = next((f for f in places if f.is_dir() and find_table(f, "train")), None)
        if folder is None:
            raise ValueError(
                f"no data {name!r} in {place}: expected {place / name / 'train.jsonl'} (or .parquet, .csv, .tsv) and "
                f"{glue.validation}.jsonl beside it, or the same in {place}"
            )
        for split, there in splits.items():
            path = None if there is None else find_table(folder, there)
            if path is not None:
                rows[split] = read_rows(path, columns, labelled=split != "test")
    if "test" in rows and all(label in (None, -1, "-1", "") for label in rows["test"].labels):
        del rows["test"]
    if "test" not in rows and "validation" not in rows:
        raise ValueError(
            f"no data {name!r} to test on in {data_dir}: neither a {glue.validation} split nor a test split with labels"
        )
    return rows


def _own_rows(data_dir: str | Path | None, columns: Sequence[str]) -> dict[str, Rows]:
    if data_dir is None:
        raise ValueError(
            "data 'labelled' needs data_dir=PLACE: a .csv, .tsv, .jsonl or .parquet file, or a folder with train.csv "
            "and the like, and perhaps validation and test beside it"
        )
    place = Path(data_dir).expanduser()
    if place.is_file():
        return {"train": read_rows(place, columns)}
    if not place.is_dir():
        raise ValueError(f"data_dir {place} is neither a file nor a folder")
    found = {split: find_table(place, split) for split in ("train", "validation", "test")}
    if found["train"] is None:
        raise ValueError(f"data_dir {place} has no train.csv, train.tsv, train.jsonl or train.parquet")
    return {split: read_rows(path, columns) for split, path in found.items() if path is not None}


def _names(train: Rows) -> tuple[str, ...]:
    """Names of the labels: in the order of their numbers if all are whole numbers, else of the alphabet."""
    names = {_name(label, train, i) for i, label in enumerate(train.labels)}
    whole = all(name.removeprefix("-").isdecimal() for name in names)
    ordered = sorted(names, key=int) if whole else sorted(names)
    if len(ordered) < 2:
        raise ValueError(f"{train.where}: all rows have the label {ordered[0]!r}; there is nothing to tell apart")
    if len(ordered) > 1000 or len(ordered) == len(train) > 2:
        raise ValueError(
            f"{train.where}: {len(train)} rows have {len(ordered)} different labels; is this the label column? Name "
            "the columns with --columns"
        )
    return tuple(ordered)


def _name(label: Any, rows: Rows, row: int) -> str:
    where = f"{rows.where}, row {rows.numbers[row]}"
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if not isinstance(label, str | int) or str(label).strip() == "":
        raise ValueError(f"{where}: the label is {label!r}, but must be a name or a whole number")
    return str(label).strip()


def _numbers(rows: Rows, names: tuple[str, ...], *, by_number: bool) -> Tensor:
    """Class numbers of the labels; where `by_number`, labels may also be these numbers."""
    known = {name: i for i, name in enumerate(names)}
    if by_number:
        known |= {str(i): i for i in range(len(names))}
    numbers = []
    for i, label in enumerate(rows.labels):
        name = _name(label, rows, i)
        if name not in known:
            raise ValueError(
                f"{rows.where}, row {rows.numbers[i]}: unknown label {name!r}; known are {', '.join(names[:20])}"
            )
        numbers.append(known[name])
    return torch.tensor(numbers, dtype=torch.int64)
