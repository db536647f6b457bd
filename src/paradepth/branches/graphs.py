"""CUDA graphs: an evaluation of fixed shapes, recorded once and replayed, so that its kernels are launched at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from paradepth.branches.executor import tensors_of, wants_gradients
from paradepth.depth import Stack

_WARM_UPS = 3  # before recording: libraries choose their kernels and reserve memory


@dataclass
class _Recorded:
    graph: Any
    inputs: list[Tensor]  # read by the graph
    outputs: Any  # written by it
    parameters: list[Tensor]  # kept, so that none is mistaken for one that came to lie where it was
    state: list[tuple[Any, ...]]  # of the parameters at recording
    held: Any  # what else the graph reads


class Graphs:
    """Recorded evaluations, by what was evaluated and on what shapes.

    A recording is made anew when a parameter was replaced, changed or moved.

    Args:
        keep: recordings that are kept; each holds its own intermediate results.
    """

    def __init__(self, keep: int = 16) -> None:
        self.keep = keep
        self._recorded: OrderedDict[Hashable, _Recorded] = OrderedDict()

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        return Graphs(self.keep)

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, (self.keep,)

    def forget(self) -> None:
        """Drops all recordings."""
        self._recorded.clear()

    @staticmethod
    def fit(branches: Sequence[Stack], x: Any, inputs: tuple[Any, ...]) -> bool:
        """Whether an evaluation can be recorded: no gradients wanted, and everything on a CUDA device."""
        tensors = [*tensors_of(x, inputs), *(p for branch in branches for p in branch.parameters())]
        if not all(tensor.is_cuda for tensor in tensors):
            return False
        if torch.cuda.is_current_stream_capturing():  # an outer graph records this as well
            return False
        return not wants_gradients(branches, x, inputs)

    def call(
        self,
        name: Hashable,
        parameters: Sequence[Tensor],
        evaluate: Callable[..., Any],
        x: Any,
        inputs: tuple[Any, ...],
        *,
        reads: Callable[[], Any],
    ) -> Any:
        """`evaluate(x, inputs)`, from a recording.

        Args:
            name: what is evaluated, in which mode.
            parameters: what else the result depends on.
            evaluate: to be recorded.
            x, inputs: tensors, and tuples of them.
            reads: after an evaluation, tensors besides the parameters that it read, which must not be freed.
        """
        leaves, form = tree_flatten((x, inputs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        cast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        shapes = tuple((leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        key = (name, shapes, str(form), cast)
        state = [(id(p), p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]
        found = self._recorded.get(key)
        if found is None or found.state != state:
            # Normal tensors even in inference mode, since a later call may not be in it.
            with torch.inference_mode(False), torch.no_grad():
                static = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                graph, outputs = _record(evaluate, *tree_unflatten(static, form))
            own = [leaf for leaf in static if isinstance(leaf, Tensor)]
            found = self._recorded[key] = _Recorded(graph, own, outputs, list(parameters), state, reads())
            while len(self._recorded) > self.keep:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(key)
        for static, tensor in zip(found.inputs, tensors, strict=True):
            static.copy_(tensor)
        found.graph.replay()
        return tree_map(lambda tensor: tensor.clone(), found.outputs)  # the next replay writes over them


def _record(evaluate: Callable[..., Any], x: Any, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    with torch.cuda.device(tensors_of(x)[0].device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                evaluate(x, inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = evaluate(x, inputs)
    return graph, outputs
