"""RandAugment with operations drawn per image, on kornia's operations.

Shape suffixes: B images, C channels, H, W pixels.
"""

from __future__ import annotations

import torch
from kornia.augmentation.auto import RandAugment
from kornia.augmentation.auto.rand_augment.rand_augment import default_policy
from kornia.augmentation.container.params import ParamItem

OPERATIONS = len(default_policy)


class BatchRandAugment:
    """Apply to each image `n` different operations at magnitude `m`.

    kornia's RandAugment applies the same operations to the whole batch. Here each image draws its own, as published: in
    each of n rounds the images that drew the same operation go through it together.

    Magnitudes are kornia's, which are those of the widespread unofficial PyTorch version: each range is walked from its
    low end, so colour, contrast, brightness and sharpness (0.1 to 1.9) darken or flatten below m = 15, do nothing at 15
    and strengthen above. The call has a fixed cost of 15 n small kornia calls, so it pays per batch rather than per
    image: small on large batches or images, noticeable on a CPU with 128 images of 32 x 32.

    Source: E. D. Cubuk et al., RandAugment, arXiv:1909.13719.

    Args:
        n: operations per image, 1 to 15.
        m: magnitude, 1 to 29; 30 would be the strongest.

    Raises:
        ValueError: when n or m are out of range.
    """

    def __init__(self, n: int, m: int) -> None:
        if not 1 <= n <= OPERATIONS:
            raise ValueError(f"RandAugment applies n = {n} operations, but n must be 1 to {OPERATIONS}")
        if not 1 <= m <= 29:
            raise ValueError(f"RandAugment has magnitude m = {m}, but m must be 1 to 29")
        self.n = n
        self._operations = [
            RandAugment(1, m, [operation], transformation_matrix_mode="skip") for operation in default_policy
        ]

    @torch.no_grad()
    def __call__(self, images_BCHW: torch.Tensor, *, seed: int, total: int, rows: slice) -> torch.Tensor:
        """Augment float images in [0, 1], which are `rows` of a global batch of `total` images.

        Grey images go through the colour operations as RGB and come back as the mean of the three channels.

        Raises:
            ValueError: when the images have neither 1 nor 3 channels.
        """
        channels = images_BCHW.shape[1]
        if channels not in (1, 3):
            raise ValueError(f"RandAugment takes images of 1 or 3 channels, these have {channels}")
        images = images_BCHW.repeat(1, 3 // channels, 1, 1)
        with torch.random.fork_rng(devices=[]):
            # kornia draws from the global CPU generator; torch.manual_seed would seed those of the accelerators too.
            torch.default_generator.manual_seed(seed)
            choice = torch.rand(total, OPERATIONS).argsort(1)[:, : self.n]
            for round_B in choice.unbind(1):
                for i, operation in enumerate(self._operations):
                    members = (round_B == i).nonzero().flatten()
                    if len(members) == 0:
                        continue
                    parameters = operation.forward_parameters(torch.Size([len(members), *images.shape[1:]]))
                    ours = ((members >= rows.start) & (members < rows.stop)).nonzero().flatten()
                    if len(ours) == 0:
                        continue
                    local = (members[ours] - rows.start).to(images.device)
                    chosen = images[local]
                    images[local] = operation(chosen, params=_select(parameters, ours, len(members), chosen.shape))
        images.clamp_(0, 1)
        return images if channels == 3 else images.mean(1, keepdim=True)


def _select(items: list[ParamItem], index: torch.Tensor, count: int, shape: torch.Size) -> list[ParamItem]:
    """The rows `index` of kornia's drawn parameters, nested lists that end in dictionaries of (count, ...) tensors."""

    selected = []
    for item in items:
        if isinstance(item.data, dict):
            data = {key: value[index] if len(value) == count else value for key, value in item.data.items()}
            data["forward_input_shape"] = torch.tensor(shape)
        else:
            assert item.data is not None
            data = _select(item.data, index, count, shape)
        selected.append(ParamItem(item.name, data))
    return selected
