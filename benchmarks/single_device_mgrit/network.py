"""What single_device_mgrit compares: a deep byte-level network, and the ways to get its stack's gradient.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paradepth.depth import MGRIT, Stack
from paradepth.nn import EncoderLayer

Gradients = tuple[Tensor, ...]


@dataclass(frozen=True)
class Size:
    """A network and what MGRIT is tried with."""

    layers: int
    width: int
    heads: int
    tokens: int
    batches: tuple[int, ...]
    coarsenings: tuple[int, ...]


SIZES = {
    "smoke": Size(8, 16, 2, 6, (1,), (2,)),
    "deep": Size(128, 256, 4, 64, (1, 4, 16), (8, 12, 16)),
}


class ByteModel(nn.Module):
    """Embedding, stack of causal layers, and a linear head over the 256 bytes."""

    def __init__(self, size: Size, *, step: float) -> None:
        super().__init__()
        self.size = size
        self.embed = nn.Embedding(256, size.width)
        self.positions = nn.Parameter(0.02 * torch.randn(size.tokens, size.width))
        layers = [
            EncoderLayer(size.width, heads=size.heads, mlp=4 * size.width, causal=True) for _ in range(size.layers)
        ]
        self.stack = Stack(layers, step=step)
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, 256)

    def start(self, windows_BT: Tensor) -> Tensor:
        """The state before the first layer, (B, T, D), of windows of one byte more."""
        return self.embed(windows_BT[:, :-1]) + self.positions

    def loss(self, y_BTD: Tensor, windows_BT: Tensor) -> Tensor:
        """Cross-entropy of the next byte."""
        return F.cross_entropy(self.head(self.norm(y_BTD)).flatten(0, 1), windows_BT[:, 1:].flatten())


def windows(text: Path | None, count: int, tokens: int, *, seed: int) -> Tensor:
    """Random windows (count, tokens + 1) of a text's bytes; random bytes without a text."""
    draw = torch.Generator().manual_seed(seed)
    if text is None:
        return torch.randint(256, (count, tokens + 1), generator=draw)
    corpus = torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8).long()
    starts = torch.randint(len(corpus) - tokens - 1, (count,), generator=draw)
    return torch.stack([corpus[start : start + tokens + 1] for start in starts.tolist()])


def make(size: Size, *, step: float, text: Path | None, train_steps: int, device: torch.device) -> ByteModel:
    """A network from seed 0, trained serially for some steps of AdamW on batches of 16."""
    torch.manual_seed(0)
    model = ByteModel(size, step=step).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for number in range(train_steps):
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * min(1.0, (number + 1) / 50)
        batch = windows(text, 16, size.tokens, seed=1000 + number).to(device)
        optimiser.zero_grad()
        model.loss(model.stack(model.start(batch)), batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return model


@dataclass
class Variant:
    """One way to get the gradients of a stack from the gradient of its result.

    Attributes:
        name: of the way.
        serial: whether layers are evaluated one after another.
        call: forward and backward; the gradients of x and of all parameters.
        executor: of the ones that iterate.
        options: of MGRIT, for the table.
    """

    name: str
    serial: bool
    call: Callable[[], Gradients]
    executor: MGRIT | None = None
    options: dict[str, Any] | None = None


def variants(
    model: ByteModel,
    x_BTD: Tensor,
    w_BTD: Tensor,
    *,
    cast: torch.dtype | None,
    compiled: bool,
    iterations: Sequence[int],
) -> Iterator[Variant]:
    """All ways that this machine has; those with CUDA graphs come last and replay what was recorded once.

    Args:
        model: the network.
        x_BTD: the state before the first layer, a leaf.
        w_BTD: the gradient of the loss with respect to the state after the last.
        cast: type of autocast.
        compiled: also compile the serial ones.
        iterations: of MGRIT, the same forward and backward.
    """
    plain = list(_plain(model, x_BTD, w_BTD, cast=cast, compiled=compiled, iterations=iterations))
    yield from plain
    if x_BTD.device.type == "cuda":
        for variant in plain:
            call = _recorded(variant.call)
            yield Variant(f"{variant.name}, CUDA graph", variant.serial, call, variant.executor, variant.options)


def _plain(
    model: ByteModel, x: Tensor, w: Tensor, *, cast: torch.dtype | None, compiled: bool, iterations: Sequence[int]
) -> Iterator[Variant]:
    stack = model.stack
    parameters = list(stack.parameters())

    def gradients(forward: Callable[[Tensor], Tensor]) -> Gradients:
        with torch.autocast(x.device.type, dtype=cast, enabled=cast is not None):
            y = forward(x)
        return torch.autograd.grad(y, [x, *parameters], w)

    yield Variant("serial", True, lambda: gradients(stack))
    if compiled:
        layers = [torch.compile(layer) for layer in stack.layers]

        def one_by_one(x: Tensor) -> Tensor:
            for layer in layers:
                x = layer(x, step=stack.step)
            return x

        yield Variant("serial, layers compiled", True, lambda: gradients(one_by_one))
        whole = torch.compile(stack)
        yield Variant("serial, compiled", True, lambda: gradients(whole))

    def iterated(executor: MGRIT) -> Gradients:
        executor.forget()  # weights change with every step of training, so they are stacked anew
        return gradients(lambda x: stack(x, executor=executor))

    methods = [(relaxation, k) for k in iterations for relaxation in (("F", "FCF") if k else ("F",))]
    first = model.size.coarsenings[0]
    for c, coarse, (relaxation, k) in itertools.product(model.size.coarsenings, ("branch", "half"), methods):
        options: dict[str, Any] = {"coarsening": c, "coarse": coarse, "relaxation": relaxation}
        options |= {"forward_iterations": k, "backward_iterations": k, "recompute": False}
        for batched in (True, False) if (c, coarse) == (first, "branch") else (True,):
            executor = MGRIT(**options, batched=batched)
            name = f"MGRIT {coarse}, c = {c}, {relaxation} {k}/{k}{'' if batched else ', layers one by one'}"
            yield Variant(name, False, lambda e=executor: iterated(e), executor, {**options, "batched": batched})


def _recorded(call: Callable[[], Gradients]) -> Callable[[], Gradients]:
    """The call as a CUDA graph: its kernels are launched at once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()

    def replay() -> Gradients:
        graph.replay()
        return found

    return replay
