"""Encoded images (files or bytes) to one uint8 tensor.

Shape suffixes: N samples, C channels (1 = grey, 3 = RGB), H, W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

GREY_MODES = ("1", "L", "LA", "La")
# Pillow's `convert` drops the alpha channel and looks palettes up.
COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV")


def parse_image_size(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Check an image size in pixels; one number stands for a square.

    Raises:
        ValueError: when it is not one or two positive integers.

    >>> parse_image_size(32), parse_image_size((28, 20)), parse_image_size(None)
    ((32, 32), (28, 20), None)
    """
    if image_size is None:
        return None
    size = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(size) != 2 or any(not isinstance(side, int) or isinstance(side, bool) or side < 1 for side in size):
        raise ValueError(f"image_size is {image_size!r}, but must be a positive integer or (height, width)")
    return size[0], size[1]


def decode_image(source: bytes | Path, *, image_size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode one image to uint8, (H, W) when it is grey and (H, W, 3) when it has colours.

    Args:
        source: the encoded image or the path of its file; any format Pillow reads.
        image_size: (H, W) to resize to, bilinear with antialiasing; the aspect ratio is not kept.

    Raises:
        ValueError: when the source is no image that Pillow can decode, or its pixels are neither 8- nor 16-bit.
        OSError: when the file cannot be opened.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as stream:
        try:
            image = Image.open(stream)
            image.load()
        except Image.DecompressionBombError as error:
            raise ValueError(f"refused by Pillow: {error}") from error
        except Exception as error:  # damaged files raise nearly anything: OSError, SyntaxError, struct.error, ...
            raise ValueError(f"not a readable image ({error or type(error).__name__})") from error
    if image.format not in ("PNG", "BMP", "GIF"):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit pixels to 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode not in GREY_MODES + COLOUR_MODES:
        raise ValueError(f"pixel mode {image.mode!r} is not supported, use 8- or 16-bit grey or 8-bit colour images")
    mode = "L" if image.mode in GREY_MODES else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    if image_size is not None and image.size != (image_size[1], image_size[0]):
        image = image.resize((image_size[1], image_size[0]), Image.Resampling.BILINEAR)
    return np.asarray(image)


def decode_images(
    sources: Sequence[bytes | Path], *, image_size: tuple[int, int] | None, where: Callable[[int], str]
) -> torch.Tensor:
    """Decode images to one uint8 tensor (N, C, H, W). C is 1 when every image is grey, otherwise 3.

    Args:
        sources: encoded images or paths, not empty.
        image_size: (H, W) to resize to, or None when all are of one size already.
        where: names image i in error messages.

    Raises:
        ValueError: names the first image that cannot be decoded or whose size differs.
    """
    assert len(sources) > 0
    images: np.ndarray | None = None  # (N, H, W) as long as every image is grey, (N, H, W, 3) from the first RGB one on
    for i, source in enumerate(sources):
        try:
            pixels = decode_image(source, image_size=image_size)
        except (OSError, ValueError) as error:
            raise ValueError(f"{where(i)}: {error}") from error
        if images is None:
            images = np.empty((len(sources), *pixels.shape), np.uint8)
        if pixels.shape[:2] != images.shape[1:3]:
            expected, found = (f"{h} x {w}" for h, w in (images.shape[1:3], pixels.shape[:2]))
            raise ValueError(
                f"{where(i)}: the image is {found} pixels (height x width), those before it {expected}; "
                "give image_size to resize every image"
            )
        if pixels.ndim == 3 and images.ndim == 3:
            images = np.repeat(images[..., None], 3, axis=3)
        images[i] = pixels[..., None] if pixels.ndim < images.ndim - 1 else pixels
    assert images is not None
    if images.ndim == 3:
        return torch.from_numpy(images)[:, None]
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def resize_images(images_NCHW: torch.Tensor, image_size: tuple[int, int] | None) -> torch.Tensor:
    """Resize uint8 images as :func:`decode_image` does; those of the right size are returned as they are.

    >>> resize_images(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), (16, 12)).shape
    torch.Size([2, 1, 16, 12])
    """
    if image_size is None or tuple(images_NCHW.shape[2:]) == image_size:
        return images_NCHW
    height, width = image_size
    planes = [
        np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR))
        for plane in images_NCHW.flatten(0, 1).numpy()
    ]
    return torch.from_numpy(np.stack(planes)).view(*images_NCHW.shape[:2], height, width)


def with_channels(images_NCHW: torch.Tensor, channels: int) -> torch.Tensor:
    """Convert between grey (1) and RGB (3) with Pillow's luma weights (ITU-R 601-2).

    >>> with_channels(torch.full((1, 1, 2, 2), 7, dtype=torch.uint8), 3).shape
    torch.Size([1, 3, 2, 2])
    """
    assert channels in (1, 3), channels
    if images_NCHW.shape[1] == channels:
        return images_NCHW
    if channels == 3:
        return images_NCHW.expand(-1, 3, -1, -1).contiguous()
    weights_C = torch.tensor([0.299, 0.587, 0.114], device=images_NCHW.device).view(1, 3, 1, 1)
    return (images_NCHW * weights_C).sum(1, keepdim=True).round().to(torch.uint8)
