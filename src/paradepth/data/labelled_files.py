"""Rows of labelled texts from CSV, TSV, JSON lines, parquet or the Hugging Face Hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Rows:
    """The rows of a split, as read.

    Attributes:
        where: file or place on the Hub, for messages.
        texts: the text of each row, or both texts.
        labels: the label of each row, as it stands there; None where there is none.
        numbers: number of each row, counted as an editor would show it.
    """

    where: str
    texts: list[tuple[str, ...]]
    labels: list[Any]
    numbers: list[int]

    def __len__(self) -> int:
        return len(self.labels)


def read_rows(path: Path, columns: Sequence[str], *, labelled: bool = True) -> Rows:
    """Reads a table; other columns are left alone.

    Args:
        path: .csv or .tsv with a line of column names, .jsonl with an object a line, or .parquet. CSV and JSON in
            UTF-8.
        columns: names of the text columns and, last, of the label column.
        labelled: whether the label column has to be there; where it is not, labels are None.

    Raises:
        ValueError: a file that cannot be read, is empty or not UTF-8, has no such columns, or a text that is missing
            or not text; the message names file and row.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "train.csv")
    ...     _ = path.write_text('text,label\\n"good, or not bad",1\\nawful,0\\n')
    ...     rows = read_rows(path, ["text", "label"])
    >>> rows.texts, rows.labels, rows.numbers
    ([('good, or not bad',), ('awful',)], ['1', '0'], [2, 3])
    """
    try:
        if path.suffix == ".parquet":
            found = list(_parquet(path, columns, labelled))
        else:
            content = path.read_bytes()
            try:
                text = content.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 at byte {error.start:,}; convert it, say with iconv") from error
            found = list(_jsonl(path, text) if path.suffix == ".jsonl" else _csv(path, text, columns, labelled))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    return checked_rows(str(path), found, columns, labelled=labelled)


def checked_rows(
    where: str, found: Sequence[tuple[int, dict[str, Any]]], columns: Sequence[str], *, labelled: bool = True
) -> Rows:
    """Rows of objects, with their numbers, once they have been looked at.

    Raises:
        ValueError: no rows, or one without one of the columns or with something else than text in a text column.
    """
    if not found:
        raise ValueError(f"{where} has no rows")
    *text_columns, label_column = columns
    texts, labels = [], []
    for number, row in found:
        for column in columns:
            if column not in row and (labelled or column != label_column):
                raise ValueError(
                    f"{where}, row {number} has no {column!r}; it has {', '.join(map(str, row)) or 'nothing'}"
                )
        text = tuple(row[column] for column in text_columns)
        for column, part in zip(text_columns, text, strict=True):
            if not isinstance(part, str):
                raise ValueError(f"{where}, row {number}: {column} is {part!r}, but must be a text")
        texts.append(text)
        labels.append(row.get(label_column))
    return Rows(where, texts, labels, [number for number, _ in found])


def _jsonl(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would cut at other marks, too
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is no JSON object")
        yield number, row


def _csv(path: Path, text: str, columns: Sequence[str], labelled: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        reader = csv.DictReader(text.splitlines(keepends=True), delimiter="\t" if path.suffix == ".tsv" else ",")
        _check_names(str(path), list(reader.fieldnames or ()), columns, labelled)
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}, line {reader.line_num} has {_width(row)} fields, the first line another number"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as CSV: {error}") from error


def _width(row: dict[Any, Any]) -> int:
    extra = row.get(None) or ()
    return sum(value is not None for key, value in row.items() if key is not None) + len(extra)


def _parquet(path: Path, columns: Sequence[str], labelled: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
        _check_names(str(path), names, columns, labelled)
        table = pq.read_table(path, columns=[column for column in columns if column in names])
    except pa.ArrowException as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error
    yield from enumerate(table.to_pylist())


def _check_names(where: str, names: Sequence[str], columns: Sequence[str], labelled: bool) -> None:
    missing = [column for column in columns if column not in names and (labelled or column != columns[-1])]
    if missing:
        raise ValueError(
            f"{where} has no column {missing[0]!r}; it has {', '.join(map(repr, names)) or 'none'}. Name the text "
            "column, or both, and then the label column with --columns"
        )


def find_table(folder: Path, split: str) -> Path | None:
    """The table of a split in a folder.

    Raises:
        ValueError: several.
    """
    found = [path for suffix in SUFFIXES if (path := folder / f"{split}{suffix}").is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder} has {found[0].name} and {found[1].name}; one of them is the {split} split: which?")
    return found[0] if found else None


def hub_rows(repository: str, configuration: str, split: str, columns: Sequence[str], *, hint: str) -> Rows:
    """Downloads a split (or takes it from the local Hub cache); runs no remote code.

    Raises:
        ValueError: when the Hub cannot be reached, or the data have other columns.
    """
    import datasets  # slow to import

    where = f"{repository} {configuration}, split {split}"
    try:
        table = datasets.load_dataset(repository, configuration, split=split)
    except Exception as error:  # no network, no such repository, no access, a full disk: many types
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"cannot get {where} from the Hugging Face Hub ({reason}); {hint}") from error
    assert isinstance(table, datasets.Dataset)
    _check_names(where, table.column_names, columns, True)
    return checked_rows(where, list(enumerate(table.select_columns(list(columns)))), columns)  # pyright: ignore[reportArgumentType]
