"""Images in folders: DIR/train/<class>/*.png, and the like for test and validation."""

from __future__ import annotations

from pathlib import Path

import torch

from paradepth.data.cache import cached_images, file_identity
from paradepth.data.decode import decode_images, with_channels

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
Splits = dict[str, tuple[torch.Tensor, torch.Tensor]]


def load_folder(data_dir: Path, image_size: tuple[int, int] | None) -> tuple[tuple[str, ...], Splits]:
    """Read DIR/train and, where they exist, DIR/test and DIR/validation. Classes are the sub-folders of train, by name.

    Hidden entries and files without an image suffix are passed over. When some image of any split has colours, all
    become RGB.

    Raises:
        ValueError: names the folder or image that is missing, empty, damaged, or of another size than the others.
    """
    train = data_dir / "train"
    if not train.is_dir():
        raise ValueError(
            f"{train} is no folder: expected images in {train}/<class>/, and test images in a folder beside"
        )
    names = tuple(entry.name for entry in _entries(train) if entry.is_dir())
    if len(names) < 2:
        raise ValueError(
            f"{train} has {len(names)} class folder(s) ({', '.join(names) or 'none'}); at least 2 are needed"
        )
    splits: Splits = {}
    for split in ("train", "validation", "test"):
        if (data_dir / split).is_dir():
            splits[split] = _read_split(data_dir / split, names, image_size)
    sizes = {split: tuple(images.shape[2:]) for split, (images, _) in splits.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the splits of {data_dir} differ in image size (height, width): {sizes}; give image_size")
    channels = max(images.shape[1] for images, _ in splits.values())
    return names, {split: (with_channels(images, channels), labels) for split, (images, labels) in splits.items()}


def _entries(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _read_split(folder: Path, names: tuple[str, ...], image_size: tuple[int, int] | None):
    unknown = [entry.name for entry in _entries(folder) if entry.is_dir() and entry.name not in names]
    if unknown:
        raise ValueError(f"{folder} has the class {unknown[0]!r}, but the training classes are {', '.join(names)}")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = []
        if (folder / name).is_dir():
            found = [file for file in _entries(folder / name) if file.suffix.lower() in SUFFIXES and file.is_file()]
        if not found and folder.name == "train":
            raise ValueError(f"{folder / name} holds no images ({', '.join(SUFFIXES)})")
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise ValueError(f"{folder} holds no images: expected them in {folder}/<class>/")
    images_NCHW = cached_images(
        (*(file_identity(path) for path in paths), str(image_size)),
        lambda: decode_images(paths, image_size=image_size, where=lambda i: str(paths[i])),
    )
    return images_NCHW, torch.tensor(labels, dtype=torch.int64)
