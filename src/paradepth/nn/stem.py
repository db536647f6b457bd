"""Images to tokens.

Shapes: B batch, C channels, H, W image height and width, P patches, T tokens (P, plus one with a class token), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paradepth.nn.dropout import Dropout

Embedding = Literal["linear", "convolutions"]


class PatchStem(nn.Module):
    """Normalises pixels, embeds each patch of the image and adds learned positions.

    A patch of P × P pixels is embedded by one linear map, or by log₂ P convolutions (3 × 3, stride 2, channels
    doubling up to D) and a linear map; patches then overlap by a few pixels and small images are learned in fewer
    passes. Source of the second: Early Convolutions Help Transformers See Better (arXiv 2106.14881).

    An image whose size is no multiple of the patch is padded at the right and at the bottom with its mean colour.
    The pixel statistics are buffers, saved with the weights, so a saved model takes plain images in [0, 1].

    Args:
        image_size: (H, W) in pixels.
        patch_size: (height, width) of a patch.
        channels: 1 or more.
        width: D.
        class_token: whether a learned token is put in front.
        dropout: dropout probability of the embedding.
        embedding: "linear" or "convolutions".

    Raises:
        ValueError: sizes below 1, a patch larger than the image, an unknown embedding, or convolutions with a patch
            that is no square of 2, 4, 8 … pixels or a width that cannot be halved often enough.

    >>> PatchStem((28, 28), (7, 7), channels=1, width=64)(torch.rand(2, 1, 28, 28)).shape
    torch.Size([2, 16, 64])
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        image_size: tuple[int, int],
        patch_size: tuple[int, int],
        *,
        channels: int,
        width: int,
        class_token: bool = False,
        dropout: float = 0.0,
        embedding: Embedding = "linear",
    ) -> None:
        super().__init__()
        for name, size in (("image_size", image_size), ("patch_size", patch_size)):
            if len(size) != 2 or min(size) < 1:
                raise ValueError(f"{name} is {size}; it must be two numbers of pixels, each at least 1")
        if patch_size[0] > image_size[0] or patch_size[1] > image_size[1]:
            raise ValueError(f"patch_size {patch_size} is larger than image_size {image_size}")
        if channels < 1:
            raise ValueError(f"channels is {channels}; it must be at least 1")
        if embedding not in ("linear", "convolutions"):
            raise ValueError(f"embedding is {embedding!r}; it must be 'linear' or 'convolutions'")
        self.image_size, self.patch_size, self.channels = tuple(image_size), tuple(patch_size), channels
        rows, columns = (-(-size // patch) for size, patch in zip(image_size, patch_size, strict=True))
        self.padding = (columns * patch_size[1] - image_size[1], rows * patch_size[0] - image_size[0])
        self.tokens = rows * columns + int(class_token)
        self.convolutions = _halving_convolutions(channels, width, patch_size) if embedding == "convolutions" else None
        self.embed = nn.Linear(width if self.convolutions else channels * patch_size[0] * patch_size[1], width)
        self.class_token = nn.Parameter(torch.zeros(width)) if class_token else None
        self.positions = nn.Parameter(torch.zeros(self.tokens, width))
        self.dropout = Dropout(dropout)
        nn.init.xavier_uniform_(self.embed.weight)
        nn.init.zeros_(self.embed.bias)
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.register_buffer("pixel_mean", torch.zeros(channels))
        self.register_buffer("pixel_std", torch.ones(channels))

    def set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Sets the mean and standard deviation of each channel, for pixels in [0, 1].

        Raises:
            ValueError: not one value per channel, or a standard deviation that is not positive.
        """
        if len(mean) != self.channels or len(std) != self.channels or min(std) <= 0:
            raise ValueError(
                f"normalisation is {mean} and {std}; {self.channels} means and positive deviations are needed"
            )
        self.pixel_mean.copy_(torch.as_tensor(mean))
        self.pixel_std.copy_(torch.as_tensor(std))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Embeds float images in [0, 1]; returns (B, T, D).

        Raises:
            ValueError: the images do not have the channels and size that the stem was built for, or are not floats.
        """
        expected = (self.channels, *self.image_size)
        if images_BCHW.dim() != 4 or tuple(images_BCHW.shape[1:]) != expected:
            raise ValueError(
                f"images have shape {tuple(images_BCHW.shape)}; this model takes (batch, {str(expected)[1:]}"
            )
        if not images_BCHW.is_floating_point():
            raise ValueError(f"images are {images_BCHW.dtype}; this model takes floating-point pixels between 0 and 1")
        B, C = images_BCHW.shape[:2]
        x = (images_BCHW - self.pixel_mean.view(-1, 1, 1)) / self.pixel_std.view(-1, 1, 1)
        right, bottom = self.padding
        if right or bottom:
            x = F.pad(x, (0, right, 0, bottom))
        if self.convolutions is not None:
            x_BTD = self.embed(self.convolutions(x).flatten(2).transpose(1, 2))
        else:
            h, w = self.patch_size
            x = x.view(B, C, x.shape[2] // h, h, x.shape[3] // w, w).permute(0, 2, 4, 1, 3, 5)
            x_BTD = self.embed(x.reshape(B, -1, C * h * w))
        if self.class_token is not None:
            x_BTD = torch.cat([self.class_token.to(x_BTD.dtype).expand(B, 1, -1), x_BTD], dim=1)
        return self.dropout(x_BTD + self.positions)

    def flops(self) -> int:
        """Floating-point operations of embedding one image (a multiply-add counts two)."""
        patches = self.tokens - int(self.class_token is not None)
        total = 2 * patches * self.embed.in_features * self.embed.out_features
        convolutions = [m for m in self.convolutions or () if isinstance(m, nn.Conv2d)]
        for index, convolution in enumerate(reversed(convolutions)):
            total += 2 * patches * 4**index * convolution.weight.numel()
        return total


def _halving_convolutions(channels: int, width: int, patch_size: tuple[int, int]) -> nn.Sequential:
    count = patch_size[0].bit_length() - 1
    if patch_size[0] != patch_size[1] or patch_size[0] != 2**count or count < 1:
        raise ValueError(f"patch_size is {patch_size}; an embedding by convolutions takes squares of 2, 4, 8 … pixels")
    if width % 2 ** (count - 1):
        raise ValueError(f"width is {width}; for {count} convolutions it must be a multiple of {2 ** (count - 1)}")
    parts: list[nn.Module] = []
    for index in range(count):
        out = width // 2 ** (count - 1 - index)
        convolution = nn.Conv2d(channels, out, kernel_size=3, stride=2, padding=1)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        nn.init.zeros_(convolution.bias)  # pyright: ignore[reportArgumentType]
        parts += [convolution, nn.GELU()]
        channels = out
    return nn.Sequential(*parts)
