"""Sentences whose words are tagged, from CoNLL-U files: parts of speech (UPOS) and morphological features.

A file has a line a word, an empty line behind each sentence, and ten columns; `#` starts a comment. Of a multiword
token (2-3 in the first column) and of an empty node (5.1) there are lines too; what is tagged are the words: 1, 2, 3 …

    1    They    they    PRON    PRP    Case=Nom|Number=Plur    3    nsubj    _    _
    2-3  can't   _       _       _      _                       _    _        _    _
    2    ca      can     AUX     MD     VerbForm=Fin            …

Source: https://universaldependencies.org/format.html.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Tags = Literal["upos", "features", "both"]

NONE = "_"  # no part of speech: not annotated; no features: the word has none
_FIELDS = ("id", "form", "lemma", "upos", "xpos", "feats")
_COLUMNS = 10


@dataclass(frozen=True)
class Sentence:
    """A sentence and its annotation, word by word.

    Attributes:
        words: as written.
        upos: parts of speech, "_" where there is no annotation.
        features: morphological features, in the order of their names, as "Number=Sing|Person=3"; "_" for none.

    >>> Sentence(("Dogs", "bark"), ("NOUN", "VERB"), ("Number=Plur", "_")).labels("both")
    ('NOUN|Number=Plur', 'VERB|_')
    """

    words: tuple[str, ...]
    upos: tuple[str, ...]
    features: tuple[str, ...]

    def labels(self, tags: Tags) -> tuple[str, ...]:
        """One label a word: its part of speech, all its features, or the pair of them as "UPOS|features". The label of
        a word without part of speech is "_", but for the features alone."""
        if tags == "upos":
            return self.upos
        if tags == "features":
            return self.features
        return tuple(NONE if u == NONE else f"{u}|{f}" for u, f in zip(self.upos, self.features, strict=True))


def read_conllu(path: str | Path) -> tuple[Sentence, ...]:
    """The sentences of a CoNLL-U file, parsed by the `conllu` library.

    Raises:
        ValueError: a file that is missing, empty, not UTF-8 or damaged; the line is told.

    >>> import tempfile
    >>> line = "1\\tDogs\\tdog\\tNOUN\\tNNS\\tNumber=Plur\\t0\\troot\\t_\\t_\\n"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "a.conllu").write_text("# text = Dogs\\n" + line)
    ...     read_conllu(Path(folder, "a.conllu"))
    (Sentence(words=('Dogs',), upos=('NOUN',), features=('Number=Plur',)),)
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    try:
        lines = content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason})") from error
    sentences, block, first = [], [], 1
    for number, line in enumerate([*lines, ""], start=1):
        if line.strip():
            if not block:
                first = number
            block.append(line)
        elif block:
            sentences += _sentence(block, path, first)
            block = []
    if not sentences:
        raise ValueError(f"{path} has no sentences")
    return tuple(sentences)


def _sentence(block: list[str], path: Path, first: int) -> list[Sentence]:
    """The sentence of a block of lines, or none where there are only comments."""
    import conllu
    from conllu.exceptions import ParseException

    rows = [(number, line) for number, line in enumerate(block, start=first) if not line.startswith("#")]
    for number, line in rows:
        columns = line.split("\t")
        if len(columns) != _COLUMNS:
            raise ValueError(
                f"{path}, line {number}: {len(columns)} columns; CoNLL-U has {_COLUMNS}, separated by tabs"
            )
        if any("  " in column for column in columns[: len(_FIELDS)]):  # which the library takes for two columns
            raise ValueError(f"{path}, line {number}: two spaces within a column")
    try:
        tokens = conllu.parse("\n".join(line for _, line in rows), fields=_FIELDS)[0] if rows else []
    except ParseException as error:
        raise ValueError(f"{path}, line {_damaged(rows)}: {error}") from error
    words, upos, features = [], [], []
    for (number, _), token in zip(rows, tokens, strict=True):
        if not isinstance(token["id"], int):
            if token["id"] is None:
                raise ValueError(f"{path}, line {number}: a word without a number")
            continue  # a multiword token or an empty node
        if token["id"] != len(words) + 1:
            raise ValueError(f"{path}, line {number}: word {token['id']} follows word {len(words)} of its sentence")
        if not token["form"]:
            raise ValueError(f"{path}, line {number}: a word without letters")
        words.append(token["form"])
        upos.append(token["upos"] or NONE)
        features.append(bundle(token["feats"]))
    if rows and not words:
        raise ValueError(f"{path}, line {rows[0][0]}: a sentence without words")
    return [Sentence(tuple(words), tuple(upos), tuple(features))] if words else []


def _damaged(rows: list[tuple[int, str]]) -> int:
    import conllu
    from conllu.exceptions import ParseException

    for number, line in rows:
        try:
            conllu.parse(line, fields=_FIELDS)
        except ParseException:
            return number
    return rows[0][0]


def bundle(features: dict[str, str | None] | None) -> str:
    """Features as one label, whatever their order in the file.

    >>> bundle({"Person": "3", "Number": "Sing"}), bundle(None)
    ('Number=Sing|Person=3', '_')
    """
    if not features:
        return NONE
    return "|".join(f"{name}={features[name] or NONE}" for name in sorted(features, key=str.lower))
