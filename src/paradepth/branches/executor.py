"""The interface of algorithms that evaluate branches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from paradepth.depth import Stack
from paradepth.depth.state import add, pack, subtract, unpack


class BranchExecutor(ABC):
    """Evaluates branches on one input. Executors never own weights, and a trunk's result does not depend on which one
    it uses.

    An implementation must give `outputs`; it may replace `corrected` where a sum is cheaper than its terms
    (one reduction over devices, say).
    """

    @abstractmethod
    def outputs(self, branches: Sequence[Stack], x: Any, *inputs: Any) -> Sequence[Any]:
        """G_i(x) for each branch, each of the structure and shape of `x`: a tensor or a tuple of tensors."""

    def applies(self, branches: Sequence[Stack], x: Any, *inputs: Any) -> bool:
        """Whether this executor can evaluate these branches on this input in its own way, in the present grad mode."""
        return True

    def corrected(self, branches: Sequence[Stack], x: Any, *inputs: Any) -> Any:
        """x + Σ_i (G_i(x) − x), of the structure and shape of `x`; exactly G_1(x) for one branch, and a branch that
        returns x adds exactly 0."""
        first, *rest = (pack(g) for g in self.outputs(branches, x, *inputs))
        for g in rest:
            first = add(first, subtract(g, pack(x)))
        return unpack(first, like=x)


def tensors_of(*values: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def wants_gradients(branches: Sequence[Stack], x: Any, inputs: tuple[Any, ...]) -> bool:
    """Whether an evaluation of the branches will be part of a graph."""
    if not torch.is_grad_enabled():
        return False
    return any(t.requires_grad for t in tensors_of(x, inputs)) or any(
        p.requires_grad for branch in branches for p in branch.parameters()
    )


def is_traced() -> bool:
    """Whether something follows every operator of this thread: a compiler, an export, fake tensors, a transform."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
    )
