"""Images in parquet: local files with the schema of the Hugging Face Hub, or the Hub itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from paradepth.data.cache import cached_images, file_identity
from paradepth.data.decode import decode_images

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label")
Splits = dict[str, tuple[torch.Tensor, torch.Tensor]]


def load_parquet(name: str, data_dir: Path, image_size: tuple[int, int] | None) -> tuple[tuple[str, ...], Splits]:
    """Read {train,test}.parquet from data_dir/name or data_dir.

    Raises:
        ValueError: names the file and what was expected of it.
    """
    folder = next((folder for folder in (data_dir / name, data_dir) if (folder / "train.parquet").is_file()), None)
    if folder is None:
        raise ValueError(
            f"no data {name!r} in {data_dir}: expected {data_dir / name / 'train.parquet'} and test.parquet beside it, "
            f"or {data_dir / 'train.parquet'} and {data_dir / 'test.parquet'}"
        )
    names: tuple[str, ...] | None = None
    splits: Splits = {}
    for split in ("train", "test"):
        path = folder / f"{split}.parquet"
        if not path.is_file():
            raise ValueError(f"{path} is missing: a parquet data set has train.parquet and test.parquet in one folder")
        found, images_NCHW, labels_N = _read_file(path, image_size)
        splits[split] = (images_NCHW, labels_N)
        names = names or found
    assert names is not None
    return names, splits


def load_hub(name: str, repository: str, image_size: tuple[int, int] | None) -> tuple[tuple[str, ...], Splits]:
    """Download a data set (or take it from the local Hub cache) and read its train and test split; runs no remote code.

    Raises:
        ValueError: when the Hub cannot be reached.
    """
    import datasets  # slow to import

    names: tuple[str, ...] = ()
    splits: Splits = {}
    for split in ("train", "test"):
        try:
            table = datasets.load_dataset(repository, split=split)
        except Exception as error:  # no network, no such repository, no access, a full disk: many types
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(
                f"cannot get {repository} from the Hugging Face Hub ({reason}); use --data-dir DIR with "
                f"DIR/{name}/train.parquet and test.parquet, or --data digits, which is embedded"
            ) from error
        assert isinstance(table, datasets.Dataset)
        where = f"{repository}, split {split}"
        image, label = _columns(table.column_names, where)
        table = table.cast_column(image, datasets.Image(decode=False))
        labels = table.with_format("arrow")[:][label].to_pylist()
        feature: Any = table.features[label]
        names = names or tuple(getattr(feature, "names", None) or _numbered(labels, where))
        splits[split] = (
            cached_images(
                (repository, split, table._fingerprint, str(image_size)),
                lambda table=table, image=image, where=where: _decode(table[:][image], where, image_size),
            ),
            _labels(labels, names, where),
        )
    return names, splits


def _read_file(path: Path, image_size: tuple[int, int] | None) -> tuple[tuple[str, ...], torch.Tensor, torch.Tensor]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        image, label = _columns(file.schema_arrow.names, str(path))
        labels = file.read(columns=[label]).column(label).to_pylist()
        if not labels:
            raise ValueError(f"{path} has no rows")
        names = _class_names(file.schema_arrow.metadata or {}, label) or _numbered(labels, str(path))

        def decode() -> torch.Tensor:
            return _decode(file.read(columns=[image]).column(image).to_pylist(), str(path), image_size)

        images_NCHW = cached_images((file_identity(path), str(image_size)), decode)
    except (pa.ArrowException, OSError) as error:
        # ArrowInvalid is a ValueError too, but says neither which file nor what to do
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error
    return names, images_NCHW, _labels(labels, names, str(path))


def _columns(names: list[str], where: str) -> tuple[str, str]:
    image = next((column for column in IMAGE_COLUMNS if column in names), None)
    label = next((column for column in LABEL_COLUMNS if column in names), None)
    if image is None or label is None:
        raise ValueError(
            f"{where} has the columns {', '.join(names)}; expected one of {', '.join(IMAGE_COLUMNS)} with images "
            f"and one of {', '.join(LABEL_COLUMNS)} with class numbers"
        )
    return image, label


def _class_names(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...] | None:
    """Class names that the `datasets` library stored in the parquet schema, or None."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    if isinstance(names, dict):  # the Hub's YAML form: {"0": "cat", ...}
        names = [names[str(i)] for i in range(len(names))]
    return tuple(str(name) for name in names) or None


def _numbered(labels: list, where: str) -> tuple[str, ...]:
    """Names "0", "1", ... for labels without names, which then have to be contiguous."""
    _check_integers(labels, where)
    present = set(labels)
    missing = sorted(set(range(max(present) + 1)) - present)
    if missing or min(present) < 0:
        what = f"class {missing[0]} has no sample" if missing else f"there is a label {min(present)}"
        raise ValueError(
            f"{where}: labels without class names must be 0, 1, ..., n - 1, but run from {min(present)} to "
            f"{max(present)} and {what}"
        )
    return tuple(str(i) for i in range(len(present)))


def _check_integers(labels: list, where: str) -> None:
    for row, label in enumerate(labels):
        if not isinstance(label, int) or isinstance(label, bool):
            raise ValueError(f"{where}, row {row}: the label is {label!r}, but must be a class number")


def _labels(labels: list, names: tuple[str, ...], where: str) -> torch.Tensor:
    _check_integers(labels, where)
    if not labels:
        raise ValueError(f"{where} has no rows")
    labels_N = torch.tensor(labels, dtype=torch.int64)
    wrong = ((labels_N < 0) | (labels_N >= len(names))).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"{where}, row {wrong[0]}: label {labels[wrong[0]]} is out of range, there are {len(names)} classes "
            f"(0 to {len(names) - 1}); {len(wrong)} such row(s)"
        )
    return labels_N


def _decode(cells: list, where: str, image_size: tuple[int, int] | None) -> torch.Tensor:
    encoded: list[bytes | Path] = []
    for row, cell in enumerate(cells):
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(data, bytes):
            raise ValueError(
                f"{where}, row {row}: expected the bytes of an image file (column of structs with 'bytes')"
            )
        encoded.append(data)
    return decode_images(encoded, image_size=image_size, where=lambda row: f"{where}, row {row}")
