"""The network that is measured: a byte-level language model of pre-LN causal layers, trained with serial depth.

Shapes: B batch, T tokens, D width, V = 256 bytes.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paradepth.depth import DepthExecutor, Stack
from paradepth.nn import EncoderLayer, LanguageModelHead, TokenStem


@dataclass(frozen=True)
class Recipe:
    """Shape and training of a network.

    Attributes:
        layers, width, heads, context: N, D, attention heads, T; the MLP is four times as wide.
        embedding: standard deviation of token and position embeddings at the start.
        batch: texts a training step.
        learning_rate, weight_decay: of AdamW, both constant; gradients are not clipped.
        seed: of weights and batches.
        buffers: serial layers of step 1 at either end.
    """

    layers: int = 32
    width: int = 64
    heads: int = 4
    context: int = 64
    embedding: float = 1.0
    batch: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    seed: int = 0
    buffers: int = 0

    def step(self, name: str) -> float:
        """h of the layers between the buffers: "1", or "1/N" with N the number of these layers."""
        return 1.0 if name == "1" else 1 / (self.layers - 2 * self.buffers)


class Watched(nn.Module):
    """A layer that remembers the state it was called with last."""

    def __init__(self, layer: EncoderLayer) -> None:
        super().__init__()
        self.layer = layer
        self.seen: Tensor | None = None

    def residual(self, x_BTD: Tensor) -> Tensor:
        self.seen = x_BTD.detach()
        return self.layer.residual(x_BTD)

    def forward(self, x_BTD: Tensor, *, step: float = 1.0) -> Tensor:
        return x_BTD + step * self.residual(x_BTD)


class Network(nn.Module):
    """Bytes and positions embedded, N layers x + h·F(x), LayerNorm and a linear map to the next byte."""

    def __init__(self, recipe: Recipe, *, step: float) -> None:
        super().__init__()
        width = recipe.width
        self.stem = TokenStem(256, recipe.context, width)
        nn.init.normal_(self.stem.embed.weight, std=recipe.embedding)
        nn.init.normal_(self.stem.positions, std=recipe.embedding)
        self.layers = [
            Watched(EncoderLayer(width, heads=recipe.heads, mlp=4 * width, causal=True)) for _ in range(recipe.layers)
        ]
        self.stack = Stack(self.layers, step=step, buffers=(recipe.buffers, recipe.buffers))
        self.head = LanguageModelHead(width, 256)

    def loss(self, tokens_BT: Tensor, *, executor: DepthExecutor | None = None) -> Tensor:
        """Mean cross-entropy of every byte but the first, given those before it."""
        x_BTD = self.stack(self.stem(tokens_BT[:, :-1]), executor=executor)
        return F.cross_entropy(self.head(x_BTD).flatten(0, 1), tokens_BT[:, 1:].flatten())

    def states(self) -> list[Tensor]:
        """The state before each layer, as each was called last."""
        return [layer.seen for layer in self.layers if layer.seen is not None]


def draw(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """`count` passages of `length` bytes."""
    starts = torch.randint(len(text) - length + 1, (count,), generator=generator)
    return torch.stack([text[start : start + length] for start in starts.tolist()]).long()


def train(text: Tensor, recipe: Recipe, *, step: float, saves: list[int], cache: Path) -> dict[int, Path]:
    """Trains a network and keeps its weights after each number of steps in `saves`.

    Args:
        text: bytes to train on.
        recipe: shape and training.
        step: h.
        saves: numbers of training steps, 0 for the untrained network.
        cache: folder of files that a later call with the same recipe finds again.

    Returns:
        The file of the weights after each number of steps; it also holds the losses of all steps up to there.
    """
    name = "-".join(f"{value:g}" for value in (*asdict(recipe).values(), step))
    files = {count: cache / f"{name}-{count}.pt" for count in saves}
    if all(file.is_file() for file in files.values()):
        return files
    cache.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    network = Network(recipe, step=step)
    parameters = list(network.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    generator = torch.Generator().manual_seed(recipe.seed)
    losses: list[float] = []
    for count in range(max(saves) + 1):
        if count in files:
            partial = files[count].with_suffix(f".{os.getpid()}")
            torch.save({"weights": network.state_dict(), "losses": losses}, partial)
            partial.replace(files[count])
        if count == max(saves):
            break
        loss = network.loss(draw(text, recipe.batch, recipe.context + 1, generator))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        if count % 50 == 0:
            print(f"h = {step:g}: step {count}, loss {loss.item():.3f}", file=sys.stderr, flush=True)
    return files


def load(file: Path, recipe: Recipe, *, step: float) -> tuple[Network, list[float]]:
    """A trained network in float64, and the losses of its training."""
    saved = torch.load(file)
    network = Network(recipe, step=step)
    network.load_state_dict(saved["weights"])
    return network.double().eval(), saved["losses"]
