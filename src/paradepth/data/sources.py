"""Where images come from: embedded digits, parquet files, the Hub, image folders.

Shape suffixes: N samples, C channels, H, W, P pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch

from paradepth.data import folder, parquet
from paradepth.data.decode import resize_images
from paradepth.data.split import stratified_split

HUB = {  # name: Hub repository
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
}
DATA_NAMES = ("digits", *HUB, "folder")

# A test split that had to be drawn depends on neither the seed of the run nor its options.
TEST_FRACTION, TEST_SEED = 0.2, 0


@dataclass(frozen=True)
class Source:
    """All samples of a data set: images_NCHW (uint8) and labels_N of "train", "test" and sometimes "validation"."""

    class_names: tuple[str, ...]
    splits: dict[str, tuple[torch.Tensor, torch.Tensor]]


def load_source(name: str, data_dir: Path | None, image_size: tuple[int, int] | None) -> Source:
    """Read a data set by name; see :func:`paradepth.data.load_images`. There always is a train and a test split.

    Raises:
        ValueError: when the name is unknown, the data are missing or damaged, or `data_dir` does not belong.
    """
    if name not in DATA_NAMES:
        close = get_close_matches(name, DATA_NAMES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"unknown data {name!r}{hint}. Known: {', '.join(DATA_NAMES)}. "
            "For images of your own use data 'folder' with data_dir=DIR, where DIR/train/<class>/ holds the images"
        )
    if name == "digits":
        if data_dir is not None:
            raise ValueError(f"data 'digits' is embedded and takes no data_dir (given: {data_dir})")
        source = load_digits(image_size)
    elif name == "folder":
        if data_dir is None:
            raise ValueError("data 'folder' needs data_dir=DIR, where DIR/train/<class>/ holds the images")
        source = Source(*folder.load_folder(data_dir, image_size))
    elif data_dir is not None:
        source = Source(*parquet.load_parquet(name, data_dir, image_size))
    else:
        source = Source(*parquet.load_hub(name, HUB[name], image_size))
    return source if "test" in source.splits else _with_test_split(source)


def load_digits(image_size: tuple[int, int] | None = None) -> Source:
    """The 1,797 handwritten digits of scikit-learn: 8 x 8 pixels, grey values 0..16 scaled to 0..255.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    from sklearn.datasets import load_digits as sklearn_digits  # slow to import

    pixels_NP, labels = sklearn_digits(return_X_y=True)
    images_NHW = torch.from_numpy(pixels_NP).view(-1, 8, 8).mul(255 / 16).round().to(torch.uint8)
    labels_N = torch.from_numpy(labels).long()
    names = tuple(str(digit) for digit in range(10))
    return Source(names, {"train": (resize_images(images_NHW[:, None], image_size), labels_N)})


def _with_test_split(source: Source) -> Source:
    images_NCHW, labels_N = source.splits["train"]
    kept, held = stratified_split(labels_N, TEST_FRACTION, seed=TEST_SEED)
    splits = dict(source.splits)
    splits["train"] = (images_NCHW[kept], labels_N[kept])
    splits["test"] = (images_NCHW[held], labels_N[held])
    return Source(source.class_names, splits)
