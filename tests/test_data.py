"""Data: sources, decoding, refusals and the cache."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from paradepth.data import ImageSplit, load_images, read_image
from paradepth.data.decode import decode_image
from paradepth.data.images import channel_statistics

NAMES = ["cat", "dog", "emu"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("PARADEPTH_CACHE", str(folder))
    return folder


def random_pixels(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, encoded, labels, *, column="image", label="label", names: list[str] | None = NAMES):
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({column: datasets.Image(), label: kind})
    rows = {column: [{"bytes": data, "path": None} for data in encoded], label: labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def write_pair(folder: Path, *shape, **options):
    """Train and test parquet with 30 and 9 random images; returns the pixels of both."""
    pixels = random_pixels(30, *shape), random_pixels(9, *shape, seed=1)
    for name, split in zip(("train", "test"), pixels, strict=True):
        labels = [i % 3 for i in range(len(split))]
        write_parquet(folder / f"{name}.parquet", [png(image) for image in split], labels, **options)
    return pixels


def write_folder(root: Path, split: str, counts: dict[str, int], *, size=(6, 5), colour=False, suffix="png"):
    for k, (name, count) in enumerate(counts.items()):
        (root / split / name).mkdir(parents=True)
        shape = (*size, 3) if colour else size
        for i, pixels in enumerate(random_pixels(count, *shape, seed=k)):
            Image.fromarray(pixels).save(root / split / name / f"{i:03}.{suffix}")


def sample_keys(split: ImageSplit) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images_NCHW}


# Sources


def test_digits_are_complete_and_split_as_promised():
    data = load_images("digits", seed=3)
    assert (data.channels, data.image_size, data.num_classes) == (1, (8, 8), 10)
    assert len(data.train) + len(data.validation) + len(data.test) == 1797
    assert len(data.test) == pytest.approx(0.2 * 1797, abs=5)
    assert data.train.images_NCHW.dtype == torch.uint8
    assert data.train.images_NCHW.max() == 255
    assert data.train.labels_N.dtype == torch.int64
    # 16 grey levels, scaled, not clipped
    assert len(data.train.images_NCHW.unique()) == 17
    other = load_images("digits", seed=4)
    assert torch.equal(data.test.images_NCHW, other.test.images_NCHW), "the test split depends on the seed"
    assert not torch.equal(data.validation.images_NCHW, other.validation.images_NCHW)
    again = load_images("digits", seed=3)
    assert torch.equal(data.validation.images_NCHW, again.validation.images_NCHW)
    for pair in (("train", "validation"), ("train", "test"), ("validation", "test")):
        # scikit-learn's digits hold no image twice, so equal pixels would be the same sample
        assert not sample_keys(getattr(data, pair[0])) & sample_keys(getattr(data, pair[1]))


def test_statistics_are_those_of_the_training_split_alone():
    data = load_images("digits", seed=1)
    pixels = data.train.images_NCHW.double() / 255
    assert data.mean[0] == pytest.approx(float(pixels.mean()), abs=1e-12)
    assert data.std[0] == pytest.approx(float(pixels.std(correction=0)), abs=1e-12)
    assert load_images("digits", seed=2).mean != data.mean
    colours = torch.from_numpy(random_pixels(7, 3, 4, 5))
    mean, std = channel_statistics(colours)
    assert mean == pytest.approx((colours.double() / 255).mean((0, 2, 3)).tolist(), abs=1e-12)
    assert std == pytest.approx((colours.double() / 255).std((0, 2, 3), correction=0).tolist(), abs=1e-12)
    assert channel_statistics(torch.zeros(3, 1, 2, 2, dtype=torch.uint8)) == ((0.0,), (1 / 255,))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    ("name", "column", "label", "shape"),
    [("fashion_mnist", "image", "label", (7, 6)), ("cifar100", "img", "fine_label", (5, 4, 3))],
)
def test_parquet_is_read_bit_exactly(tmp_path, nested, name, column, label, shape):
    train, test = write_pair(tmp_path / name if nested else tmp_path, *shape, column=column, label=label)
    data = load_images(name, data_dir=tmp_path, validation_fraction=0.2)
    assert data.class_names == tuple(NAMES)
    assert data.image_size == shape[:2]
    expected = torch.from_numpy(test[:, None] if test.ndim == 3 else test.transpose(0, 3, 1, 2).copy())
    assert torch.equal(data.test.images_NCHW, expected)
    assert data.test.labels_N.tolist() == [i % 3 for i in range(9)]
    assert (len(data.train), len(data.validation)) == (24, 6)
    # every training image keeps its label on its way through the split
    channels_last = data.train.images_NCHW.permute(0, 2, 3, 1).numpy()
    by_pixels = {image.tobytes(): i % 3 for i, image in enumerate(train)}
    assert [by_pixels[image.tobytes()] for image in channels_last] == data.train.labels_N.tolist()


def test_labels_without_names_are_numbered_when_contiguous(tmp_path):
    for split in ("train", "test"):
        write_parquet(
            tmp_path / f"{split}.parquet", [png(p) for p in random_pixels(6, 4, 4)], [0, 1, 2] * 2, names=None
        )
    assert load_images("mnist", data_dir=tmp_path).class_names == ("0", "1", "2")
    write_parquet(tmp_path / "train.parquet", [png(p) for p in random_pixels(6, 4, 4)], [0, 1, 3] * 2, names=None)
    with pytest.raises(ValueError, match="class 2 has no sample"):
        load_images("mnist", data_dir=tmp_path)


def test_folder_of_images(tmp_path):
    write_folder(tmp_path, "train", {"owl": 10, "ant": 20})
    write_folder(tmp_path, "test", {"owl": 2, "ant": 3})
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "ant" / ".hidden.png").write_bytes(b"not an image")
    data = load_images("folder", data_dir=tmp_path, validation_fraction=0.1)
    assert data.class_names == ("ant", "owl")
    assert (data.channels, data.image_size) == (1, (6, 5))
    assert data.test.labels_N.tolist() == [0, 0, 0, 1, 1]
    assert data.validation.labels_N.tolist() == [0, 0, 1]
    first = np.asarray(Image.open(tmp_path / "test" / "owl" / "000.png"))
    assert np.array_equal(data.test.images_NCHW[3, 0].numpy(), first)


def test_folder_draws_the_splits_that_are_missing_and_uses_those_that_are_there(tmp_path):
    write_folder(tmp_path, "train", {"a": 10, "b": 20})
    data = load_images("folder", data_dir=tmp_path, seed=1)
    assert data.test.labels_N.bincount().tolist() == [2, 4]
    assert torch.equal(data.test.images_NCHW, load_images("folder", data_dir=tmp_path, seed=2).test.images_NCHW)
    write_folder(tmp_path, "validation", {"a": 3, "b": 1})
    data = load_images("folder", data_dir=tmp_path)
    assert data.validation.labels_N.tolist() == [0, 0, 0, 1]
    assert len(data.train) == 24


def test_images_are_resized_and_sizes_may_then_differ(tmp_path):
    write_folder(tmp_path, "train", {"a": 4, "b": 4}, size=(16, 12))
    write_folder(tmp_path, "test", {"a": 1}, size=(9, 9))
    with pytest.raises(ValueError, match=r"differ in image size.*give image_size"):
        load_images("folder", data_dir=tmp_path)
    data = load_images("folder", data_dir=tmp_path, image_size=(8, 6), validation_fraction=0.3)
    assert data.image_size == (8, 6)
    assert data.test.images_NCHW.shape == (1, 1, 8, 6)
    assert load_images("digits", image_size=12).image_size == (12, 12)
    # antialiased: one-pixel stripes become their mean, nearest or plain bilinear would keep some
    stripes = np.tile(np.array([[0, 255]], np.uint8), (32, 16))
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    small = read_image(tmp_path / "stripes.png", channels=1, image_size=(4, 4))
    assert (small.int() - 127).abs().max() <= 8


def test_mixed_channels_become_rgb(tmp_path):
    write_folder(tmp_path, "train", {"a": 3, "b": 3})
    colour = random_pixels(1, 6, 5, 3, seed=9)[0]
    Image.fromarray(colour).save(tmp_path / "train" / "b" / "001.png")
    write_folder(tmp_path, "test", {"a": 1})
    data = load_images("folder", data_dir=tmp_path, validation_fraction=0.3)
    assert data.channels == 3
    assert data.test.images_NCHW.shape == (1, 3, 6, 5)
    assert (data.test.images_NCHW[:, 0] == data.test.images_NCHW[:, 2]).all()
    everything = torch.cat([data.train.images_NCHW, data.validation.images_NCHW]).permute(0, 2, 3, 1).numpy()
    assert any(np.array_equal(image, colour) for image in everything)


@pytest.mark.parametrize(
    ("mode", "shape"), [("1", ()), ("L", ()), ("LA", ()), ("RGBA", (3,)), ("P", (3,)), ("CMYK", (3,))]
)
def test_pixel_modes(tmp_path, mode, shape):
    path = tmp_path / f"image.{'tif' if mode == 'CMYK' else 'png'}"
    Image.fromarray(random_pixels(1, 4, 4, 3)[0]).convert(mode).save(path)
    assert decode_image(path).shape == (4, 4, *shape)


def test_16_bit_images_are_scaled_not_clipped(tmp_path):
    levels = np.array([[0, 256, 32768, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    assert decode_image(tmp_path / "deep.png").tolist() == [[0, 1, 128, 255]]


# Refusals


def test_wrong_options_are_refused(tmp_path):
    cases: list[tuple[dict[str, Any], str]] = [
        ({"name": "fashion-mnist"}, "did you mean 'fashion_mnist'.*cifar100.*'folder'"),
        ({"name": "digits", "data_dir": tmp_path}, "takes no data_dir"),
        ({"name": "folder"}, "needs data_dir"),
        ({"name": "mnist", "data_dir": tmp_path / "none"}, "none is no folder"),
        ({"name": "mnist", "data_dir": tmp_path}, r"expected .*mnist.train\.parquet"),
        ({"name": "folder", "data_dir": tmp_path}, "train is no folder.*<class>"),
        ({"validation_fraction": 0.0}, "validation_fraction is 0.0"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"validation_fraction": float("nan")}, "validation_fraction is nan"),
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": (8, 8, 8)}, "image_size is"),
        ({"image_size": 2.5}, "image_size is 2.5"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            load_images(**options)


def test_bad_parquet_is_refused_by_name(tmp_path):
    images = [png(p) for p in random_pixels(6, 4, 4)]
    write_pair(tmp_path, 4, 4)
    train = tmp_path / "train.parquet"

    def refused(message):
        with pytest.raises(ValueError, match=message) as caught:
            load_images("mnist", data_dir=tmp_path)
        assert str(tmp_path) in str(caught.value)

    # ClassLabel itself refuses 3 but not what is written past it, so the names go in by the schema's metadata
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(train)
    pq.write_table(table.set_column(1, "label", pa.array([0, 1, 7] * 10)), train)
    refused("row 2: label 7 is out of range, there are 3 classes")
    pq.write_table(table.set_column(1, "label", pa.array([0, None, 1] * 10)), train)
    refused("row 1: the label is None")
    pq.write_table(table.set_column(1, "label", pa.array(["a", "b", "c"] * 10)), train)
    refused("row 0: the label is 'a'")
    pq.write_table(table.slice(0, 0), train)
    refused("has no rows")
    pq.write_table(table.rename_columns(["picture", "label"]), train)
    refused("columns picture, label; expected")
    write_parquet(train, [*images[:5], images[5][:40]], [0, 1, 2] * 2)
    refused("row 5: not a readable image")
    write_parquet(train, [*images[:5], png(random_pixels(1, 5, 4)[0])], [0, 1, 2] * 2)
    refused("row 5: the image is 5 x 4 pixels .* 4 x 4; give image_size")
    train.write_bytes(b"PAR1 and then nothing of use")
    refused("train.parquet cannot be read as parquet")
    write_pair(tmp_path, 4, 4)
    (tmp_path / "test.parquet").unlink()
    refused("test.parquet is missing")


def test_bad_folders_are_refused(tmp_path):
    def refused(message):
        with pytest.raises(ValueError, match=message):
            load_images("folder", data_dir=tmp_path)

    write_folder(tmp_path, "train", {"a": 3})
    refused(r"has 1 class folder\(s\)")
    (tmp_path / "train" / "b").mkdir()
    refused("b holds no images")
    (tmp_path / "train" / "b" / "x.jpg").write_text("hello")
    refused("x.jpg: not a readable image")
    write_folder(tmp_path, "test", {"a": 1, "c": 1})
    (tmp_path / "train" / "b" / "x.jpg").unlink()
    Image.fromarray(random_pixels(1, 6, 5)[0]).save(tmp_path / "train" / "b" / "y.png")
    refused("has the class 'c', but the training classes are a, b")


def test_unreachable_hub_points_to_data_dir(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "empty")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"ylecun/mnist from the Hugging Face Hub.*--data-dir"):
        load_images("mnist")


def test_read_image(tmp_path):
    pixels = random_pixels(1, 6, 5, 3)[0]
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    image = read_image(path, channels=3, image_size=(6, 5))
    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)
    grey = read_image(path, channels=1, image_size=(6, 5))
    assert np.abs(grey[0].int().numpy() - np.asarray(Image.open(path).convert("L")).astype(int)).max() <= 1
    Image.fromarray(pixels[:, :, 0]).save(path)
    assert read_image(path, channels=3, image_size=(3, 4)).shape == (3, 3, 4)
    (tmp_path / "text.png").write_text("hello")
    for bad, message in (("text.png", "text.png: not a readable image"), ("none.png", "none.png: no such file")):
        with pytest.raises(ValueError, match=message):
            read_image(tmp_path / bad, channels=3, image_size=(4, 4))
    with pytest.raises(ValueError, match="channels is 2"):
        read_image(path, channels=2, image_size=(4, 4))


# Cache


def test_cache_is_used_checked_and_kept_up_to_date(tmp_path, cache):
    write_pair(tmp_path, 4, 4)
    first = load_images("mnist", data_dir=tmp_path)
    files = sorted(cache.glob("*.safetensors"))
    assert len(files) == 2
    assert sorted(cache.iterdir()) == files, "something is left over"
    kept = {file: file.stat().st_mtime_ns for file in files}
    load_images("mnist", data_dir=tmp_path)
    assert {file: file.stat().st_mtime_ns for file in files} == kept, "the cache was written again"

    # one flipped bit in the pixels, a truncated file: both are decoded afresh and mended
    good = [file.read_bytes() for file in files]
    stored = [load_file(file)["images"].clone() for file in files]
    files[0].write_bytes(good[0][:-1] + bytes([good[0][-1] ^ 1]))
    files[1].write_bytes(good[1][: len(good[1]) // 2])
    again = load_images("mnist", data_dir=tmp_path)
    for split in ("train", "validation", "test"):
        assert torch.equal(getattr(first, split).images_NCHW, getattr(again, split).images_NCHW)
    assert all(torch.equal(load_file(file)["images"], images) for file, images in zip(files, stored, strict=True))

    # other options and other files do not meet the old entries
    assert load_images("mnist", data_dir=tmp_path, image_size=3).image_size == (3, 3)
    write_parquet(tmp_path / "test.parquet", [png(p) for p in random_pixels(9, 4, 4, seed=5)], [0, 1, 2] * 3)
    assert not torch.equal(load_images("mnist", data_dir=tmp_path).test.images_NCHW, first.test.images_NCHW)


def test_unwritable_cache_is_no_obstacle(tmp_path, monkeypatch):
    write_pair(tmp_path, 4, 4)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PARADEPTH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="PARADEPTH_CACHE"):
        data = load_images("mnist", data_dir=tmp_path)
    assert len(data.test) == 9


def test_cache_entries_of_a_folder_follow_its_files(tmp_path):
    write_folder(tmp_path, "train", {"a": 3, "b": 3})
    write_folder(tmp_path, "test", {"a": 1, "b": 1})
    before = load_images("folder", data_dir=tmp_path, validation_fraction=0.3).test.images_NCHW
    path = tmp_path / "test" / "a" / "000.png"
    stamp = path.stat().st_mtime
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    os.utime(path, (stamp + 5, stamp + 5))
    after = load_images("folder", data_dir=tmp_path, validation_fraction=0.3).test.images_NCHW
    assert torch.equal(after[0], 255 - before[0])
    assert torch.equal(after[1], before[1])
