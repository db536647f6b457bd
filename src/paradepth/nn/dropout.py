"""Dropout whose mask is a function of (seed, step, layer, data-parallel rank) and of nothing else.

The usual dropout draws from a global random stream, so evaluating a layer twice gives two masks. Iterative depth
executors, activation recomputation and resumed runs need the same one each time. Here a mask is a hash of the
element's index under a key; `set_dropout_key` writes the keys of a whole model once per optimiser step.

The hash is Wellons' 32-bit integer finaliser (two rounds, one key each), in plain integer tensor operations: it
gives the same mask on every device and compiles into the surrounding graph.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def _mix_(h: Tensor) -> Tensor:
    # In place, since fresh memory for every operation takes more time than the arithmetic. Shifts of signed integers
    # copy the sign, so each is masked to act as an unsigned shift.
    for shift, mask, factor in ((16, 0xFFFF, 0x7FEB352D), (15, 0x1FFFF, -0x7B935975)):  # the second is 0x846ca68b
        h ^= (h >> shift).bitwise_and_(mask)
        h *= factor
    h ^= (h >> 16).bitwise_and_(0xFFFF)
    return h


class Dropout(nn.Module):
    """Zeroes elements with probability `p` and scales the rest by 1/(1-p), in training mode only.

    Two calls with the same key and shape use the same mask; `set_dropout_key` changes the key.

    Args:
        p: probability that an element is dropped, 0 <= p < 1.

    Raises:
        ValueError: `p` is outside [0, 1).

    >>> drop = Dropout(0.5)
    >>> x = torch.ones(1000)
    >>> bool((drop(x) == drop(x)).all())
    True
    >>> set_dropout_key(drop, seed=1, step=2)
    >>> 0.4 < drop(x).count_nonzero().item() / 1000 < 0.6
    True
    """

    key: Tensor

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"dropout is {p}; it must be at least 0 and below 1")
        self.p = p
        self.register_buffer("key", torch.zeros(2, dtype=torch.int32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns `x` with dropped elements, same shape and dtype."""
        if self.p == 0.0 or not self.training:
            return x
        return _dropped(x, self.p, self.key[0], self.key[1])

    def extra_repr(self) -> str:
        return f"p={self.p}"


class StackedDropout:
    """Several `Dropout` modules, alike but for their keys, on as many tensors at once: each draws the mask that it
    would draw alone.

    Args:
        drops: of one probability and one mode.

    >>> drops = [Dropout(0.5) for _ in range(2)]
    >>> for step, drop in enumerate(drops):
    ...     set_dropout_key(drop, seed=1, step=step)
    >>> x = torch.ones(2, 8)
    >>> bool(torch.equal(StackedDropout(drops)(x), torch.stack([drop(row) for drop, row in zip(drops, x)])))
    True
    """

    def __init__(self, drops: Sequence[Dropout]) -> None:
        self.drops = drops
        self.p, self.training = drops[0].p, drops[0].training

    def __call__(self, x: Tensor) -> Tensor:
        """`x` with dropped elements; its first dimension holds each module's part, one after another."""
        if self.p == 0.0 or not self.training:
            return x
        keys_m2 = torch.stack([drop.key for drop in self.drops])
        return _dropped(x, self.p, keys_m2[:, :1], keys_m2[:, 1:])


def _dropped(x: Tensor, p: float, key0: Tensor, key1: Tensor) -> Tensor:
    """`x` dropped under one key, or cut along its first dimension into as many parts as there are keys (m, 1)."""
    parts = key0.numel()
    index = torch.arange(x.numel() // parts, dtype=torch.int32, device=x.device)
    h = _mix_(_mix_(index + key0).bitwise_xor_(key1))
    threshold = round(p * 2**32) - 2**31  # signed comparison stands for the unsigned one
    keep = (h >= threshold).view(x.shape)
    return x * keep.to(x.dtype) * (1.0 / (1.0 - p))


def dropout_keys(module: nn.Module) -> list[Tensor]:
    """The keys of the masks that `module` draws in its present mode: whoever wants to evaluate it again with the same
    masks has to find them unchanged."""
    return [m.key for m in module.modules() if isinstance(m, Dropout) and m.p and m.training]


def set_dropout_key(module: nn.Module, *, seed: int, step: int, rank: int = 0) -> None:
    """Gives every `Dropout` inside `module` the key of (seed, step, its place in the module, rank).

    Args:
        module: a model or a layer; a layer's place is its qualified name, so truncated and grown models draw the same
            masks.
        seed: the run's seed.
        step: counts draws; one per forward pass that shall have a mask of its own.
        rank: data-parallel rank.
    """
    for name, child in module.named_modules():
        if isinstance(child, Dropout) and child.p:
            digest = hashlib.blake2b(f"{seed}/{step}/{rank}/{name}".encode(), digest_size=8).digest()
            words = [int.from_bytes(digest[i : i + 4], "little", signed=True) for i in (0, 4)]
            child.key.copy_(torch.tensor(words, dtype=torch.int32))
