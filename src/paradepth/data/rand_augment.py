"""RandAugment for a batch on its device: every image draws its own operations.

Shape suffixes: B images, C channels, H, W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from kornia import enhance
from kornia.geometry.transform import warp_affine

# Each magnitude is low + (high - low) m / 30. The published pixel ranges (of 256 levels) are scaled to [0, 1].
# Rotations are degrees, shears pixels per pixel, translations shares of the side; they get a random sign.
GEOMETRIC = {
    "rotate": (0.0, 30.0),
    "shear_x": (0.0, 0.3),
    "shear_y": (0.0, 0.3),
    "translate_x": (0.0, 0.1),
    "translate_y": (0.0, 0.1),
}
PHOTOMETRIC: dict[str, tuple[float, float, Callable[[torch.Tensor, float], torch.Tensor]]] = {
    "auto_contrast": (0.0, 0.0, lambda x, _: _auto_contrast(x)),
    "equalize": (0.0, 0.0, lambda x, _: enhance.equalize(x)),
    "invert": (0.0, 0.0, lambda x, _: 1 - x),
    "posterize": (8.0, 4.0, lambda x, bits: enhance.posterize(x, int(bits))),
    "solarize": (1.0, 0.0, lambda x, threshold: torch.where(x < threshold, x, 1 - x)),
    "solarize_add": (0.0, 110 / 256, lambda x, amount: torch.where(x < 0.5, x + amount, x)),
    "color": (0.1, 1.9, lambda x, factor: _saturation(x, factor)),
    "contrast": (0.1, 1.9, lambda x, factor: enhance.adjust_contrast_with_mean_subtraction(x, factor)),
    "brightness": (0.1, 1.9, lambda x, factor: x * factor),
    "sharpness": (0.1, 1.9, lambda x, factor: enhance.sharpness(x, factor)),
}
OPERATIONS = (*GEOMETRIC, *PHOTOMETRIC)


class BatchRandAugment:
    """Apply to each image `n` different operations at magnitude `m`.

    kornia's own RandAugment draws one set of operations for the whole batch; here each image draws its own, as
    published. In each of n rounds the images that drew the same operation go through kornia's function for it together,
    and the geometric operations of a round are one warp. The order of operations is random.

    The ranges are those of the unofficial PyTorch version that small vision Transformers are commonly trained with:
    colour, contrast, brightness and sharpness fade below m = 15, rest there and grow above. Translations end at 10 % of
    the side.

    Source: E. D. Cubuk et al., RandAugment, arXiv:1909.13719.

    Args:
        n: operations per image, 1 to 15.
        m: magnitude, 1 to 30.

    Raises:
        ValueError: when n or m are out of range.

    >>> images_BCHW = torch.rand(4, 3, 16, 16)
    >>> BatchRandAugment(2, 14)(images_BCHW, generator=torch.Generator(), total=4, rows=slice(0, 4)).shape
    torch.Size([4, 3, 16, 16])
    """

    def __init__(self, n: int, m: int) -> None:
        if not 1 <= n <= len(OPERATIONS):
            raise ValueError(f"RandAugment applies n = {n} operations, but n must be 1 to {len(OPERATIONS)}")
        if not 1 <= m <= 30:
            raise ValueError(f"RandAugment has magnitude m = {m}, but m must be 1 to 30")
        self.n = n
        self.m = m

    @torch.no_grad()
    def __call__(
        self, images_BCHW: torch.Tensor, *, generator: torch.Generator, total: int, rows: slice
    ) -> torch.Tensor:
        """Augment float images in [0, 1], which are `rows` of a global batch of `total` images.

        Every draw is made from `generator`, for the whole of the global batch.

        Raises:
            ValueError: when the images have neither 1 nor 3 channels.
        """
        if images_BCHW.shape[1] not in (1, 3):
            raise ValueError(f"RandAugment takes images of 1 or 3 channels, these have {images_BCHW.shape[1]}")
        drawn = torch.rand(total, len(OPERATIONS), generator=generator).argsort(1)[rows, : self.n]
        signs = torch.where(torch.rand(total, self.n, generator=generator) < 0.5, -1.0, 1.0)[rows]
        images = images_BCHW.clone()
        for operation_B, sign_B in zip(drawn.unbind(1), signs.unbind(1), strict=True):
            self._warp(images, operation_B, sign_B)
            for i, (low, high, operation) in enumerate(PHOTOMETRIC.values(), len(GEOMETRIC)):
                members = (operation_B == i).nonzero().flatten().to(images.device)
                if len(members):
                    images[members] = operation(images[members], self._magnitude(low, high)).clamp(0, 1)
        return images

    def _magnitude(self, low: float, high: float) -> float:
        return low + (high - low) * self.m / 30

    def _warp(self, images: torch.Tensor, operation_B: torch.Tensor, sign_B: torch.Tensor) -> None:
        """Warp, in place, the images that drew a geometric operation; what comes in from outside is black."""
        members = (operation_B < len(GEOMETRIC)).nonzero().flatten()
        if len(members) == 0:
            return
        height, width = images.shape[2:]
        matrices = torch.eye(3).repeat(len(members), 1, 1)
        entries = {  # row, column and unit of the entry that the magnitude goes to
            "shear_x": (0, 1, 1),
            "shear_y": (1, 0, 1),
            "translate_x": (0, 2, width),
            "translate_y": (1, 2, height),
        }
        for i, (name, (low, high)) in enumerate(GEOMETRIC.items()):
            mine = operation_B[members] == i
            value = sign_B[members][mine] * self._magnitude(low, high)
            if name == "rotate":
                radians = value * (math.pi / 180)
                matrices[mine, 0, 0] = matrices[mine, 1, 1] = radians.cos()
                matrices[mine, 0, 1] = radians.sin()
                matrices[mine, 1, 0] = -radians.sin()
            else:
                row, column, unit = entries[name]
                matrices[mine, row, column] = value * unit
        # The matrices act about the centre of the image.
        centre = torch.eye(3)
        centre[0, 2], centre[1, 2] = (width - 1) / 2, (height - 1) / 2
        matrices = (centre @ matrices @ torch.linalg.inv(centre))[:, :2].to(images.device)
        members = members.to(images.device)
        images[members] = warp_affine(images[members], matrices, (height, width)).clamp(0, 1)


def _auto_contrast(images: torch.Tensor) -> torch.Tensor:
    """Stretch each channel of each image to [0, 1]; a constant one stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1e-6), images)


def _saturation(images: torch.Tensor, factor: float) -> torch.Tensor:
    """Move away from (factor > 1) or towards the image's grey version, which grey images are already."""
    return images if images.shape[1] == 1 else enhance.adjust_saturation_with_gray_subtraction(images, factor)
