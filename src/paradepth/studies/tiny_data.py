"""Generated data sets of a few kilobytes in the layout of the real ones, for studies at size "smoke".

They show that code runs. What is measured on them means nothing.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path

from paradepth.atomic import write_bytes, write_text

# Data set: shape of an image, number of classes, and samples of each class for training and for testing.
IMAGES = {
    "fashion_mnist": ((28, 28), 10, (12, 2)),
    "cifar10": ((32, 32, 3), 10, (12, 2)),
    "cifar100": ((32, 32, 3), 100, (3, 1)),
}
_WORDS = {
    "DET": ("the", "a", "every"),
    "ADJ": ("small", "green", "old", "good", "bad", "plain"),
    "NOUN": ("branch", "layer", "tree", "river", "bird", "house", "child"),
    "VERB": ("sees", "moves", "finds", "likes", "adds"),
    "ADV": ("slowly", "often", "here", "again"),
}
_PATTERN = ("DET", "ADJ", "NOUN", "VERB", "DET", "NOUN", "ADV")


def write_tiny_data(folder: Path) -> Path:
    """Write the data sets that are not there yet; the same bytes every time.

    Args:
        folder: created where needed. It gets fashion_mnist, cifar10, cifar100, tiny_shakespeare, glue (sst2, cola,
            mrpc), ud_english_ewt and multi30k.

    Returns:
        The folder, to be given as `data_dir`.

    >>> import tempfile
    >>> place = write_tiny_data(Path(tempfile.mkdtemp()))
    >>> (place / "tiny_shakespeare" / "input.txt").read_text().split(".")[0]
    'a good bird adds the bird here'
    """
    writers: dict[str, Callable[[Path], None]] = dict.fromkeys(IMAGES, _write_images)
    writers |= {"tiny_shakespeare": _write_text, "glue": _write_glue}
    writers |= {"ud_english_ewt": _write_treebank, "multi30k": _write_pairs}
    for name, write in writers.items():
        if not (folder / name / "done").exists():
            (folder / name).mkdir(parents=True, exist_ok=True)
            write(folder / name)
            write_text(folder / name / "done", "")
    return folder


def _sentence(draws: random.Random) -> list[tuple[str, str]]:
    """Words and their parts of speech."""
    return [(draws.choice(_WORDS[part]), part) for part in _PATTERN]


def _words(draws: random.Random) -> str:
    return " ".join(word for word, _ in _sentence(draws))


def _write_images(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    shape, classes, counts = IMAGES[folder.name]
    for split, count in zip(("train", "test"), counts, strict=True):
        draws = random.Random(f"{folder.name} {split}")
        rows, labels = [], []
        for label in range(classes):
            for _ in range(count):
                rows.append({"bytes": _picture(shape, label, draws), "path": None})
                labels.append(label)
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns = {"img": pa.array(rows, type=kind), "label": pa.array(labels, type=pa.int64())}
        stream = io.BytesIO()
        pq.write_table(pa.table(columns), stream)
        write_bytes(folder / f"{split}.parquet", stream.getvalue())


def _picture(shape: tuple[int, ...], label: int, draws: random.Random) -> bytes:
    """A PNG of blocks of noise with a bright bar whose place tells the class."""
    from PIL import Image

    height, width, *channels = shape
    small = Image.frombytes("RGB" if channels else "L", (4, 4), draws.randbytes(16 * (3 if channels else 1)))
    picture = small.resize((width, height), Image.Resampling.NEAREST)
    row = label % 10 * height // 10
    picture.paste("white", (0, row, width // (1 + label // 10), row + 2))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def _write_text(folder: Path) -> None:
    draws = random.Random("text")
    write_text(folder / "input.txt", "".join(f"{_words(draws)}.\n" for _ in range(300)))


def _write_glue(folder: Path) -> None:
    for task, columns in (("sst2", ["sentence"]), ("cola", ["sentence"]), ("mrpc", ["sentence1", "sentence2"])):
        (folder / task).mkdir(exist_ok=True)
        for split, count in (("train", 80), ("test" if task == "mrpc" else "validation", 12)):
            draws = random.Random(f"{task} {split}")
            rows = [{column: _words(draws) for column in columns} | {"label": i % 2} for i in range(count)]
            _write_lines(folder / task / f"{split}.jsonl", rows)


def _write_pairs(folder: Path) -> None:
    for split, count in (("train", 80), ("validation", 8), ("test", 6)):
        draws = random.Random(f"pairs {split}")
        texts = [_words(draws) for _ in range(count)]
        _write_lines(folder / f"{split}.jsonl", [{"de": text.upper(), "en": text} for text in texts])


def _write_lines(path: Path, rows: list[dict[str, str | int]]) -> None:
    write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def _write_treebank(folder: Path) -> None:
    for split, count in (("train", 60), ("dev", 8), ("test", 8)):
        draws = random.Random(f"treebank {split}")
        lines = []
        for number in range(count):
            lines.append(f"# sent_id = {split}-{number}")
            for place, (word, part) in enumerate(_sentence(draws), start=1):
                lines.append("\t".join((str(place), word, word, part, "_", "_", str(place - 1), "dep", "_", "_")))
            lines.append("")
        write_text(folder / f"en_ewt-ud-{split}.conllu", "\n".join(lines) + "\n")
