"""Weights with many zeros, stored without them: a bit for each number says whether it is zero, and the others follow.

    weight   0 0 .3 0 -.1 0 0 .2   ─►   mask  0 0 1 0 1 0 0 1  (a byte for 8 numbers)   values  .3 -.1 .2

A float32 matrix of which the part z is zero takes 32·(1 − z) + 1 bits a number instead of 32: 0.53 of its size with
half of its weights gone, 0.13 with nine tenths. Nothing is lost; the model that is loaded has plain weights.

Shapes: N numbers of a tensor, M of them that are not zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

MASK, VALUES = ".mask", ".values"  # endings of the two tensors that stand for one
_ENTRY = 200  # bytes that a file's header takes for two tensors instead of one, about


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Packs the tensors that become smaller by it.

    Args:
        tensors: by name, on the CPU.

    Returns:
        The tensors to store: "NAME.mask", bytes (N/8 rounded up), the first number in the lowest bit of the first byte,
        and "NAME.values" (M) in place of a packed NAME; and the shapes of the packed ones, which `unpack` needs.

    >>> stored, shapes = pack({"w": torch.eye(64), "b": torch.ones(3)})
    >>> {name: tuple(tensor.shape) for name, tensor in stored.items()}, shapes
    ({'w.mask': (512,), 'w.values': (64,), 'b': (3,)}, {'w': [64, 64]})
    """
    stored: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        flat_N = tensor.flatten()
        kept_N = flat_N != 0
        size = tensor.element_size()
        if math.ceil(len(flat_N) / 8) + size * int(kept_N.sum()) + _ENTRY >= size * len(flat_N):
            stored[name] = tensor
            continue
        stored[name + MASK] = torch.from_numpy(np.packbits(kept_N.numpy(), bitorder="little"))
        stored[name + VALUES] = flat_N[kept_N]
        shapes[name] = list(tensor.shape)
    return stored, shapes


def unpack(stored: Mapping[str, Tensor], shapes: Any) -> dict[str, Tensor]:
    """The inverse of `pack`; zeros of either sign become 0.

    Args:
        stored: the content of a file.
        shapes: of the packed tensors, by name.

    Raises:
        ValueError: shapes that are none, a mask or values that are missing or do not fit each other, or a tensor that
            is there twice.
    """
    if not isinstance(shapes, dict):
        raise ValueError(f"packed is {shapes!r}; it must be the shapes of packed tensors by name")
    tensors = dict(stored)
    for name, shape in shapes.items():
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"packed has {shape!r} for {name}; it must be a shape, a list of numbers")
        for part in (name + MASK, name + VALUES):
            if part not in tensors:
                raise ValueError(f"there is no {part}, and {name} is packed")
        if name in tensors:
            raise ValueError(f"{name} is there both packed and as it is")
        tensors[name] = _unpacked(name, tensors.pop(name + MASK), tensors.pop(name + VALUES), shape)
    return tensors


def _unpacked(name: str, mask: Tensor, values_M: Tensor, shape: list[int]) -> Tensor:
    N = math.prod(shape)
    if mask.dtype != torch.uint8 or tuple(mask.shape) != (math.ceil(N / 8),):
        raise ValueError(
            f"{name}{MASK} is {mask.dtype} of shape {tuple(mask.shape)}; for {N} numbers it must be torch.uint8 of "
            f"shape ({math.ceil(N / 8)},)"
        )
    bits = np.unpackbits(mask.numpy(), bitorder="little")
    if bits[N:].any():
        raise ValueError(f"{name}{MASK} has bits behind its {N} numbers")
    kept_N = torch.from_numpy(bits[:N].astype(bool))
    if tuple(values_M.shape) != (int(kept_N.sum()),):
        raise ValueError(
            f"{name}{VALUES} has shape {tuple(values_M.shape)}, and the mask has {int(kept_N.sum())} bits set"
        )
    flat_N = values_M.new_zeros(N)
    flat_N[kept_N] = values_M
    return flat_N.view(shape)
