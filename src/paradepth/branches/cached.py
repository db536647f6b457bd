"""A trunk evaluated a few tokens at a time, with the keys and values of the tokens before them remembered.

Shapes: B batch, T new tokens, D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from paradepth.branches.branches import Aggregate, Branches, next_state, stacks_of
from paradepth.depth import Stack
from paradepth.depth.state import State
from paradepth.nn import EncoderLayer, KeyValueCache, SourceLayer, TargetLayer


class TrunkCache:
    """Evaluates a trunk of causal layers on the tokens that are new, and remembers what later ones need of them.

    The result equals the last T states of the trunk on all tokens so far. Layers are evaluated one after another,
    whatever the trunk's executor: a few tokens leave nothing to run in parallel.

    Args:
        trunk: a stack or branches, of causal `EncoderLayer` or of `SourceLayer` and `TargetLayer`.
        branches: use the first branches only (default: all).

    Raises:
        ValueError: layers of another kind or of another process, or a number of branches that the trunk does not have.

    >>> import torch
    >>> stack = Stack([EncoderLayer(16, heads=2, mlp=32, causal=True) for _ in range(2)])
    >>> x = torch.randn(1, 5, 16)
    >>> cache = TrunkCache(stack)
    >>> in_two = torch.cat([cache.advance(x[:, :3]), cache.advance(x[:, 3:])], dim=1)
    >>> bool(torch.allclose(in_two, stack(x), atol=1e-5)), cache.length
    (True, 5)
    """

    def __init__(self, trunk: Stack | Branches, *, branches: int | None = None) -> None:
        self.aggregate: Aggregate = trunk.aggregate if isinstance(trunk, Branches) else "residual"
        if isinstance(trunk, Branches) and trunk.skip_below:
            raise ValueError(
                f"skip_below is {trunk.skip_below}; with keys and values remembered nothing is left out, set it to 0"
            )
        self.trunk = trunk
        self.alphas_kB: Tensor | None = None  # of a joined state, whose gates read the source, for all tokens
        self.stacks = [_StackCache(stack) for stack in stacks_of(trunk, branches=branches)]
        self.length = 0

    def advance(self, x: Any, *inputs: Any) -> Any:
        """The trunk's states of the new tokens.

        Args:
            x: (B, T, D); or (X, Y) with the source X, which counts in the first call only, and the new target tokens Y.
            inputs: what every layer gets besides the state.

        Returns:
            What the trunk returns for these tokens; of a joined state Y alone, (B, T, D).
        """
        y_BTD: Tensor = x[1] if isinstance(x, tuple) else x
        self.length += y_BTD.shape[1]
        outputs = (cache.advance(x, *inputs) for cache in self.stacks)
        alphas = self._gates(x, inputs) if self.aggregate == "gated" else [None] * len(self.stacks)
        state: State | None = None
        for g_BTD, alpha in zip(outputs, alphas, strict=True):
            state = next_state(state, (g_BTD,), (y_BTD,), aggregate=self.aggregate, alpha=alpha)
        assert state is not None
        return state[0]

    def _gates(self, x: Any, inputs: tuple[Any, ...]) -> Tensor:
        """α of the new tokens, (k, B, T), or of the samples, (k, B)."""
        assert isinstance(self.trunk, Branches)
        count = len(self.stacks)
        if not isinstance(x, tuple):
            return self.trunk.gates(x, *inputs, branches=count)
        if self.alphas_kB is None:
            self.alphas_kB = self.trunk.gates(x, *inputs, branches=count)
        return self.alphas_kB

    def reorder(self, rows_B: Tensor) -> None:
        """Keeps the batch rows `rows_B`, in that order: a row may appear several times, as beams need it."""
        for cache in self.stacks:
            cache.reorder(rows_B)
        if self.alphas_kB is not None:
            self.alphas_kB = self.alphas_kB[:, rows_B]


class _StackCache:
    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.source: Tensor | None = None  # X behind the last layer of the encoder
        self.caches: list[dict[str, KeyValueCache]] = []
        for layer in stack.layers:
            if getattr(layer, "is_elsewhere", False):
                raise ValueError(
                    "processes share this trunk, and new tokens are evaluated by one: generate with a whole model"
                )
            if isinstance(layer, TargetLayer):
                self.caches.append({"cache": KeyValueCache(), "memory_cache": KeyValueCache()})
            elif isinstance(layer, SourceLayer):
                self.caches.append({})
            elif isinstance(layer, EncoderLayer) and layer.attention.causal:
                self.caches.append({"cache": KeyValueCache()})
            else:
                raise ValueError(
                    f"a layer of type {type(layer).__name__} cannot remember keys and values; causal EncoderLayer, "
                    "SourceLayer and TargetLayer can"
                )

    def advance(self, x: Any, *inputs: Any) -> Tensor:
        if not isinstance(x, tuple):
            for n, layer in enumerate(self.stack.layers):
                x = x + self.stack.step_of(n) * layer.residual(x, *inputs, **self.caches[n])  # pyright: ignore[reportCallIssue]
            return x
        source_BSD, y_BTD = x if self.source is None else (self.source, x[1])
        for n, layer in enumerate(self.stack.layers):
            h = self.stack.step_of(n)
            if isinstance(layer, SourceLayer):
                if self.source is None:
                    source_BSD = source_BSD + h * layer.residual((source_BSD, y_BTD), *inputs)[0]
            else:
                assert isinstance(layer, TargetLayer)
                y_BTD = y_BTD + h * layer.residual((source_BSD, y_BTD), *inputs, **self.caches[n])[1]
        self.source = source_BSD
        return y_BTD

    def reorder(self, rows_B: Tensor) -> None:
        for caches in self.caches:
            for cache in caches.values():
                cache.reorder(rows_B)
        if self.source is not None:
            self.source = self.source[rows_B]
