"""The network of the benchmark and its gradients: pre-LN layers on bytes of a text, or on noise.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paradepth.depth import Stack
from paradepth.nn import EncoderLayer

LENGTH, BATCH, WIDTH, HEADS = 64, 16, 128, 4


class ByteModel(nn.Module):
    """Embedding, stack, and a linear head over the 256 bytes."""

    def __init__(self, depth: int, step: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        layers = [EncoderLayer(WIDTH, heads=HEADS, mlp=4 * WIDTH, causal=True) for _ in range(depth)]
        self.stack = Stack(layers, step=step)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256)

    def states(self, tokens_BT: Tensor) -> Tensor:
        """The state before the first layer, (B, T, D)."""
        return self.embed(tokens_BT) + self.positions

    def loss(self, windows_BT: Tensor, **options: Any) -> Tensor:
        """Cross-entropy of the next byte, for windows of one byte more than the length."""
        y_BTD = self.stack(self.states(windows_BT[:, :-1]), **options)
        return F.cross_entropy(self.head(self.norm(y_BTD)).flatten(0, 1), windows_BT[:, 1:].flatten())


def windows(text: Path | None, count: int, *, seed: int) -> Tensor:
    """Random windows (count, LENGTH + 1) of a text's bytes; random bytes without a text."""
    draw = torch.Generator().manual_seed(seed)
    if text is None:
        return torch.randint(256, (count, LENGTH + 1), generator=draw)
    corpus = torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8).long()
    starts = torch.randint(len(corpus) - LENGTH - 1, (count,), generator=draw)
    return torch.stack([corpus[start : start + LENGTH + 1] for start in starts.tolist()])


def make(depth: int, step: float, *, text: Path | None, train_steps: int) -> ByteModel:
    """A network from seed 0, trained serially for some steps of AdamW with rate 1e-3."""
    torch.manual_seed(0)
    model = ByteModel(depth, step)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for number in range(train_steps):
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * min(1.0, (number + 1) / 50)
        optimiser.zero_grad()
        model.loss(windows(text, BATCH, seed=1000 + number)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return model


def gradient(model: ByteModel, batch_BT: Tensor, **options: Any) -> Tensor:
    """The gradient of all parameters of the stack as one vector."""
    model.zero_grad()
    model.loss(batch_BT, **options).backward()
    return torch.cat([p.grad.flatten().double() for p in model.stack.parameters() if p.grad is not None])


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two gradients."""
    return float((a @ b) / (a.norm() * b.norm()))
