"""Image data sets: uint8 tensors of the three splits, with statistics of the training pixels.

Shape suffixes: N samples, C channels, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from paradepth.data.decode import decode_image, parse_image_size, with_channels
from paradepth.data.sources import load_source
from paradepth.data.split import check_train_fraction, stratified_split, training_part


@dataclass(frozen=True)
class ImageSplit:
    """Images and labels of one split.

    Attributes:
        images_NCHW: uint8 pixels.
        labels_N: int64 class numbers.
    """

    images_NCHW: torch.Tensor
    labels_N: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels_N)

    def to(self, device: torch.device | str) -> ImageSplit:
        """The same split on another device."""
        return ImageSplit(self.images_NCHW.to(device), self.labels_N.to(device))


@dataclass(frozen=True)
class ImageData:
    """A data set, ready for training.

    Attributes:
        name: as given to :func:`load_images`.
        class_names: one a class, by class number.
        train, validation, test: disjoint splits.
        mean, std: per channel, of the training split's pixels scaled to [0, 1]; std is at least 1/255.
    """

    name: str
    class_names: tuple[str, ...]
    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return self.train.images_NCHW.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        height, width = self.train.images_NCHW.shape[2:]
        return height, width

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def to(self, device: torch.device | str) -> ImageData:
        """The same data with the three splits on another device."""
        splits = {name: getattr(self, name).to(device) for name in ("train", "validation", "test")}
        return replace(self, **splits)

    def with_class_names(self, names: Sequence[str]) -> ImageData:
        """The same samples with other numbers: those that their classes have among `names`, which may be more.

        Raises:
            ValueError: a class of this data is not among them, or a name occurs twice.
        """
        missing = [name for name in self.class_names if name not in names]
        if missing or len(set(names)) != len(names):
            what = f"lacks {missing[:5]} of data {self.name!r}" if missing else "has a name twice"
            raise ValueError(f"class_names {what}; it must name every class of the data once")
        number_N = torch.tensor([list(names).index(name) for name in self.class_names])
        splits = {
            name: ImageSplit(split.images_NCHW, number_N.to(split.labels_N.device)[split.labels_N])
            for name in ("train", "validation", "test")
            for split in [getattr(self, name)]
        }
        return replace(self, class_names=tuple(names), **splits)


def load_images(
    name: str = "digits",
    *,
    data_dir: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    validation_fraction: float = 0.1,
    train_fraction: float = 1.0,
    seed: int = 0,
) -> ImageData:
    """Load a data set and hold a stratified validation split out of its training samples.

    Decoded images are kept in `$PARADEPTH_CACHE` (default `~/.cache/paradepth`) until their files change.

    Args:
        name: "digits" (embedded; no network); "mnist", "fashion_mnist", "cifar10" or "cifar100" (from the Hugging Face
            Hub, or from `data_dir`); "folder" (any images, from `data_dir`).
        data_dir: for the four named sets a folder with {train,test}.parquet in the Hub's schema, or with these in a
            sub-folder of the data set's name; for "folder" one with train/<class>/ and, where wanted, test/<class>/ and
            validation/<class>/. A validation folder is used instead of a split by `seed`.
        image_size: resize every image to (height, width), bilinear with antialiasing; needed when sizes differ.
        channels: 3 repeats the grey value of grey images, 1 makes colours grey (ITU-R 601-2); None leaves them.
        validation_fraction: share of the training samples held out, strictly between 0 and 1.
        train_fraction: the part of what is left that is the training split, see `training_part`. Validation and test
            split do not depend on it; mean and std are those of the part.
        seed: draws the validation split and the part. A test split that has to be drawn (digits, a folder without
            test/: 20 %) does not depend on it.

    Raises:
        ValueError: when the name or an option is wrong, or data are missing, damaged or inconsistent.

    >>> data = load_images("digits", seed=0)
    >>> len(data.train), len(data.validation), len(data.test), data.channels, data.image_size, data.num_classes
    (1295, 143, 359, 1, (8, 8), 10)
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}, but must lie strictly between 0 and 1")
    check_train_fraction(train_fraction)
    if channels not in (None, 1, 3):
        raise ValueError(f"channels is {channels}, but must be 1 (grey) or 3 (RGB)")
    size = parse_image_size(image_size)
    folder = None if data_dir is None else Path(data_dir).expanduser()
    if folder is not None and not folder.is_dir():
        raise ValueError(f"data_dir {folder} is no folder")
    source = load_source(name, folder, size)

    train = ImageSplit(*source.splits["train"])
    if "validation" in source.splits:
        validation = ImageSplit(*source.splits["validation"])
    else:
        kept, held = stratified_split(train.labels_N, validation_fraction, seed=seed)
        validation = ImageSplit(train.images_NCHW[held], train.labels_N[held])
        train = ImageSplit(train.images_NCHW[kept], train.labels_N[kept])
    test = ImageSplit(*source.splits["test"])
    if train_fraction < 1:
        part = training_part(train.labels_N, train_fraction, seed=seed)
        train = ImageSplit(train.images_NCHW[part], train.labels_N[part])
    if channels is not None:
        train, validation, test = (
            ImageSplit(with_channels(split.images_NCHW, channels), split.labels_N)
            for split in (train, validation, test)
        )
    if train.images_NCHW.shape[1:] != test.images_NCHW.shape[1:]:
        shapes = [tuple(split.images_NCHW.shape[1:]) for split in (train, test)]
        raise ValueError(f"training and test images of {name!r} differ in (channels, height, width): {shapes}")
    mean, std = channel_statistics(train.images_NCHW)
    return ImageData(name, source.class_names, train, validation, test, mean, std)


def channel_statistics(images_NCHW: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 pixels scaled to [0, 1]; the deviation is at least 1/255.

    >>> channel_statistics(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1))
    ((0.5,), (0.5,))
    """
    # From histograms: exact, whatever the number of pixels.
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(images_NCHW.shape[1]):
        share = torch.zeros(256, dtype=torch.float64)
        for chunk in images_NCHW[:, channel].split(4096):
            share += torch.bincount(chunk.flatten(), minlength=256)
        share /= share.sum()
        average = float((share * values).sum())
        mean.append(average)
        std.append(max(float((share * (values - average) ** 2).sum()) ** 0.5, 1 / 255))
    return tuple(mean), tuple(std)


def read_image(path: str | Path, *, channels: int, image_size: tuple[int, int]) -> torch.Tensor:
    """Read one image file as a model expects it: uint8 (C, H, W).

    Args:
        path: a file in any format that Pillow reads.
        channels: 1 (colours become grey) or 3 (grey is repeated).
        image_size: (height, width) to resize to, bilinear with antialiasing.

    Raises:
        ValueError: when there is no such file, or it is no image.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}, but must be 1 or 3")
    size = parse_image_size(image_size)
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        pixels = torch.from_numpy(decode_image(path, image_size=size).copy())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    images_NCHW = pixels[None, None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)[None]
    return with_channels(images_NCHW, channels)[0].contiguous()
