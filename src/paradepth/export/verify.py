"""An exported file is compared with PyTorch before anybody can take it for finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from paradepth.export.graph import Graph

TOLERANCE = 1e-4
CASES = ((1, 1.0), (2, 0.0), (5, 0.5))
"""Batch sizes, and the share of the longest length: one token where it is 0."""


class ExportMismatch(RuntimeError):
    """What was exported does not compute what PyTorch computes."""


@dataclass(frozen=True)
class Verification:
    """How an exported file compares with PyTorch.

    Attributes:
        difference: the largest absolute difference of any logit, by output.
        shapes: shapes of the inputs that were tried.
    """

    difference: dict[str, float]
    shapes: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def largest(self) -> float:
        """The largest absolute difference."""
        return max(self.difference.values())


def verify(
    graph: Graph, run: Callable[[Sequence[Tensor]], Sequence[Tensor]], *, tolerance: float = TOLERANCE
) -> Verification:
    """Compares an exported graph with PyTorch on random inputs of several batch sizes and lengths.

    Args:
        graph: the reference.
        run: evaluates what was exported: inputs, in order, to outputs, in order.
        tolerance: largest absolute difference of a logit that is allowed.

    Raises:
        ExportMismatch: a logit differs by more, is no number, or an output has another shape.

    >>> import paradepth
    >>> from paradepth.export.graph import build_graph
    >>> graph = build_graph(paradepth.create_model("gpt_nano", depth=1))
    >>> verify(graph, graph.run).largest
    0.0
    """
    worst = dict.fromkeys(graph.outputs, 0.0)
    shapes = []
    for seed, (batch, share) in enumerate(CASES):
        inputs = graph.sample(batch, share=share, seed=seed)
        shapes.append(tuple(tuple(tensor.shape) for tensor in inputs))
        found = run(inputs)
        for name, want, got in zip(graph.outputs, graph.run(inputs), found, strict=True):
            if want.shape != got.shape:
                raise ExportMismatch(f"{name} has shape {tuple(got.shape)} where PyTorch's has {tuple(want.shape)}")
            difference = (want.double() - got.double()).abs().max().item()
            if not difference <= tolerance:  # one that is no number, too
                raise ExportMismatch(
                    f"{name} differs from PyTorch's by {difference:.2g} for inputs of shape {shapes[-1]}, and "
                    f"{tolerance:g} is allowed; nothing was written"
                )
            worst[name] = max(worst[name], difference)
    return Verification(worst, tuple(shapes))
