"""What the benchmark compares: networks of as many equal layers, in a row or as branches, and the cases they run in.

Shapes: B batch, C channels, H, W image height and width, T tokens, D width, N classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import paradepth

BYTES = 4  # of a float32


@dataclass(frozen=True)
class Case:
    """What is timed: a forward pass or a training step at one batch size.

    Attributes:
        name: as in the tables.
        batch: images, of all processes together.
        training: forward, backward and optimiser, in place of forward alone.
        calls: in each round.
        in_a_row: the calls of a round follow one another without a barrier, so that batches may overlap: throughput,
            in place of latency.
    """

    name: str
    batch: int
    training: bool = False
    calls: int = 1
    in_a_row: bool = False


@dataclass(frozen=True)
class Size:
    """Images and layers of one comparison.

    Attributes:
        image_size, patch_size: in pixels.
        model: the suffix of the registered names.
        heads: of every layer; those of tensor parallelism are shared out evenly only if their number is even.
        layers: of every network.
        shapes: branches and layers of each, of the networks with branches.
        batches: small, medium and large.
    """

    image_size: int
    patch_size: int
    model: str
    heads: int
    layers: int
    shapes: tuple[tuple[int, int], ...]
    batches: tuple[int, int, int]

    @property
    def serial(self) -> str:
        """The name of the network whose layers are in a row."""
        return f"1×{self.layers}"

    @property
    def cases(self) -> tuple[Case, ...]:
        """All cases, from cheap to dear."""
        small, medium, large = self.batches
        return (
            Case(f"latency, batch {small}", small, calls=10),
            Case(f"latency, batch {medium}", medium, calls=3),
            Case(f"throughput, batch {large}", large, calls=2, in_a_row=True),
            Case(f"training step, batch {medium}", medium, training=True),
            Case(f"training step, batch {large}", large, training=True),
        )

    def network(self, branches: int = 0, depth: int | None = None) -> Any:
        """A network with fresh weights, the same in every process; without branches the serial one."""
        torch.manual_seed(0)
        shape = {"image_size": self.image_size, "patch_size": self.patch_size, "channels": 3, "num_classes": 10}
        more = {"branches": branches} if branches else {}
        name = f"{'paraformer' if branches else 'vit'}_{self.model}"
        return paradepth.create_model(name, depth=depth or self.layers, heads=self.heads, **more, **shape)

    def state_bytes(self, network: Any, batch: int) -> int:
        """Bytes of one state between layers, B × T × D: an activation."""
        return batch * network.stem.tokens * network.config.width * BYTES

    def batch_of(self, case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images and labels, the same in every process."""
        draw = torch.Generator().manual_seed(1)
        images_BCHW = torch.rand(case.batch, 3, self.image_size, self.image_size, generator=draw)
        labels_B = torch.randint(10, (case.batch,), generator=draw)
        return images_BCHW.to(device), labels_B.to(device)


SIZES = {
    "tiny": Size(224, 16, "tiny", 4, 12, ((6, 2), (4, 3)), (1, 8, 64)),
    "smoke": Size(8, 4, "nano", 2, 4, ((2, 2),), (1, 2, 4)),
}


class Stage(nn.Module):
    """A part of the serial network: some of its layers, with the stem before and the head behind where they belong."""

    def __init__(self, network: Any, *, index: int, stages: int) -> None:
        super().__init__()
        first, last = stage_bounds(len(network.trunk.layers), stages)[index]
        parts: list[nn.Module] = list(network.trunk.layers)[first:last]
        self.parts = nn.ModuleList(
            [*([network.stem] if index == 0 else []), *parts, *([network.head] if index == stages - 1 else [])]
        )

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


def stage_bounds(layers: int, stages: int) -> list[tuple[int, int]]:
    """First layer and the one behind the last, of each stage; their lengths differ by at most one."""
    cuts = [index * layers // stages for index in range(stages + 1)]
    return list(pairwise(cuts))


def in_sequence(network: Any, stages: int) -> tuple[nn.Sequential, list[int]]:
    """The serial network as modules in a row, and how many of them each stage takes."""
    modules = nn.Sequential(network.stem, *network.trunk.layers, network.head)
    balance = [last - first for first, last in stage_bounds(len(network.trunk.layers), stages)]
    balance[0] += 1
    balance[-1] += 1
    return modules, balance


def parameter_bytes(parameters: Sequence[Tensor]) -> int:
    """Bytes of tensors; of one that is shared out between processes, of the part that lies here."""
    local = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]  # pyright: ignore
    return sum(p.numel() * p.element_size() for p in local)
