"""Tables of documents: .parquet or .jsonl files with a column `text`, as the Hugging Face Hub has them.

The text of a table is its documents one after another; one that does not end with a line break is given one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from paradepth.atomic import write_text
from paradepth.data.cache import cache_folder, file_identity

TABLES = (".parquet", ".jsonl")
COLUMN = "text"
_ROWS = 256  # read at a time


def documents(path: Path) -> Iterator[bytes]:
    """The documents of a table in UTF-8, a few at a time in memory. Empty ones are left out.

    Raises:
        ValueError: not such a table; the message names the file and the row.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "train.jsonl")
    ...     _ = path.write_text('{"text": "to be"}\\n{"text": "or not"}\\n')
    ...     list(documents(path))
    [b'to be\\n', b'or not\\n']
    """
    rows = _parquet(path) if path.suffix == ".parquet" else _jsonl(path)
    for row, value in enumerate(rows):
        if not isinstance(value, str):
            raise ValueError(f"{path}, row {row}: {COLUMN} is {value!r}, but must be a text")
        if not value:
            continue
        try:
            yield (value if value.endswith("\n") else value + "\n").encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{path}, row {row}: {COLUMN} holds half a character at {error.start}") from error


def table_size(path: Path) -> int:
    """Bytes of the documents; counted once, and remembered in the cache as long as the file does not change.

    Raises:
        ValueError: as of `documents`.
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256(f"table size\0{file_identity(path)}".encode("utf-8", "surrogateescape"))
    remembered = cache_folder() / f"{digest.hexdigest()}.size"
    with suppress(OSError, ValueError):
        return int(remembered.read_text())
    size = sum(len(document) for document in documents(path))
    with suppress(OSError):  # then it is counted again
        remembered.parent.mkdir(parents=True, exist_ok=True)
        write_text(remembered, str(size))
    return size


def _jsonl(path: Path) -> Iterator[object]:
    with open(path, "rb") as file:
        for row, line in enumerate(file):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:  # of JSON or of UTF-8
                raise ValueError(f"{path}, line {row + 1} is not JSON in UTF-8: {error}") from error
            if not isinstance(value, dict) or COLUMN not in value:
                raise ValueError(f"{path}, line {row + 1} has no {COLUMN!r}; each line must be an object with a text")
            yield value[COLUMN]


def _parquet(path: Path) -> Iterator[object]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if COLUMN not in names:
                raise ValueError(f"{path} has the columns {', '.join(names)}; expected one called {COLUMN!r}")
            for batch in file.iter_batches(batch_size=_ROWS, columns=[COLUMN]):
                yield from batch.column(0).to_pylist()
    except pa.ArrowException as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error
