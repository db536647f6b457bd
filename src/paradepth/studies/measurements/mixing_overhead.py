"""Memory, time and parameters of a layer with attention and of the same layer with static mixing.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paradepth.data.seeds import generator
from paradepth.nn import EncoderLayer
from paradepth.nn.static_mixing import equal_shape
from paradepth.timing import quartiles

ATTENTION, FULL, EQUAL = "attention", "static_full", "static_equal"
VARIANTS = (ATTENTION, FULL, EQUAL)


def measure(
    *,
    seed: int,
    data_dir: Path | None,
    run_dir: Path,
    source: Path | None,
    tokens: int,
    width: int,
    batch_tokens: int = 4096,
    rounds: int = 15,
    causal: bool = False,
) -> dict[str, float | list[float]]:
    """One layer in three forms, timed in turns: attention, static mixing by full matrices and otherwise alike, and
    static mixing with as many parameters as attention.

    Args:
        seed: of weights and inputs.
        data_dir, run_dir, source: not used.
        tokens: T.
        width: D; a head is 32 wide, the feed-forward part 4 D.
        batch_tokens: B·T; at least one sample.
        rounds: how often every form is timed, after two rounds that do not count.
        causal: whether a token sees the ones before it only.

    Returns:
        For each form, behind its name: `forward_ms` and `step_ms`, medians of a forward pass without gradients and of
        forward and backward pass; `forward_spread` and `step_spread`, the distance between the quartiles over the
        median; `saved_mb`, what the forward pass keeps for the backward pass, parameters left out; `parameters`. And
        `forward_ratio`, `step_ratio` and `saved_ratio`, attention over static mixing of equal parameters; and the same
        over full matrices, `full_…`.

    Raises:
        ValueError: a width that heads of 32 do not divide, or numbers below 1.
    """
    for name, value in (("tokens", tokens), ("batch_tokens", batch_tokens), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if width < 32 or width % 32:
        raise ValueError(f"width is {width}; it must be a multiple of 32, the width of a head")
    heads, mlp = width // 32, 4 * width
    options: dict[str, Any] = {"heads": heads, "causal": causal}
    equal: dict[str, Any] = dict(equal_shape(width, heads, mlp, tokens))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = {
            ATTENTION: EncoderLayer(width, mlp=mlp, **options),
            FULL: EncoderLayer(width, mlp=mlp, mixing="static", tokens=tokens, **options),
            EQUAL: EncoderLayer(width, mixing="static", tokens=tokens, **options, **equal),
        }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layers = {name: layer.to(device) for name, layer in layers.items()}
    draws = generator(seed, "input of a layer", tokens, width)
    x_BTD = torch.randn(max(1, batch_tokens // tokens), tokens, width, generator=draws).to(device)
    times: dict[str, list[float]] = {f"{name}_{what}": [] for name in VARIANTS for what in ("forward", "step")}
    for _ in range(rounds + 2):
        for name, layer in layers.items():
            times[f"{name}_forward"].append(_seconds(lambda layer=layer: _forward(layer, x_BTD)))
            times[f"{name}_step"].append(_seconds(lambda layer=layer: _step(layer, x_BTD)))
    found: dict[str, float | list[float]] = {}
    for name, layer in layers.items():
        for what in ("forward", "step"):
            told = quartiles(times[f"{name}_{what}"][2:])
            found[f"{name}_{what}_ms"] = 1000 * told["median"]
            found[f"{name}_{what}_spread"] = (told["upper_quartile"] - told["lower_quartile"]) / told["median"]
        found[f"{name}_saved_mb"] = _saved(layer, x_BTD) / 1e6
        found[f"{name}_parameters"] = sum(p.numel() for p in layer.parameters())
    for prefix, other in (("", EQUAL), ("full_", FULL)):
        for what in ("forward_ms", "step_ms", "saved_mb"):
            ours, theirs = (float(found[f"{name}_{what}"]) for name in (ATTENTION, other))  # pyright: ignore[reportArgumentType]
            found[f"{prefix}{what.split('_')[0]}_ratio"] = ours / theirs
    return found


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _forward(layer: nn.Module, x_BTD: Tensor) -> None:
    with torch.no_grad():
        layer(x_BTD)


def _step(layer: nn.Module, x_BTD: Tensor) -> None:
    layer.zero_grad(set_to_none=True)
    layer(x_BTD).sum().backward()


def _saved(layer: nn.Module, x_BTD: Tensor) -> int:
    """Bytes of what the forward pass keeps for the backward pass: each piece of memory once, without parameters and the
    input."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), x_BTD)}
    kept: dict[int, Tensor] = {}  # held, so that no memory is given back and taken again

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x_BTD)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in known)
