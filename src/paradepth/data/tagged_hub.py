"""Universal Dependencies from the Hugging Face Hub, as the parquet files that the Hub made of its own script.

The Hub's rows list multiword tokens and empty nodes among the words. Neither has a head in the basic tree, and every
word has one, so that tells them apart.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paradepth.data.tagged import bundle

REPOSITORY, REVISION = "universal-dependencies/universal_dependencies", "refs/convert/parquet"
_SPLITS = ("train", "validation", "test")
_COLUMNS = ("tokens", "upos", "feats", "head")

Rows = list[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]]
"""Words, parts of speech and features of each sentence."""


def load_rows(treebank: str, name: str) -> dict[str, Rows]:
    """The three splits of a treebank, downloaded or from the Hub's local cache.

    Args:
        treebank: as the Hub calls it, such as "en_ewt".
        name: of the data, for messages.

    Raises:
        ValueError: it cannot be fetched, or is not what it was.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    splits = {}
    for split in _SPLITS:
        file = f"{treebank}/{split}/0000.parquet"
        try:
            path = hf_hub_download(REPOSITORY, file, repo_type="dataset", revision=REVISION)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"cannot get {file} of {REPOSITORY} from the Hugging Face Hub ({reason}); use --data-dir DIR with "
                f"{treebank}-ud-train.conllu and so on, from https://universaldependencies.org"
            ) from error
        splits[split] = read_rows(Path(path))
    return splits


def read_rows(path: Path) -> Rows:
    """The sentences of a parquet file in the Hub's form.

    Raises:
        ValueError: not parquet, other columns, or rows whose columns differ in length.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    try:
        table = Dataset(pq.read_table(path, columns=list(_COLUMNS)))
        names = table.features["upos"].feature.names
    except (pa.ArrowException, OSError, ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"{path} is not a treebank in parquet with the columns {', '.join(_COLUMNS)}: {error}") from (
            error
        )
    rows = []
    for number, row in enumerate(table):
        assert isinstance(row, dict)
        try:
            words = _words(row, names)
        except (ValueError, SyntaxError, IndexError, TypeError) as error:
            raise ValueError(f"{path}, row {number}: {error}") from error
        if words:
            rows.append(tuple(zip(*words, strict=True)))
    if not rows:
        raise ValueError(f"{path} has no sentences")
    return rows


def _words(row: dict[str, Any], names: Sequence[str]) -> list[tuple[str, str, str]]:
    columns = zip(*(row[column] for column in _COLUMNS), strict=True)
    return [
        (form, str(names[upos]), bundle(ast.literal_eval(features)))  # a printed dictionary, or None
        for form, upos, features, head in columns
        if head.isdigit()
    ]
