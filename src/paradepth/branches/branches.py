"""The branches trunk.

Shapes: B batch, T tokens, D width, n branches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from paradepth.branches.executor import BranchExecutor
from paradepth.branches.gates import Gate, Per, gate_values, readings, weighted
from paradepth.branches.loop import Loop
from paradepth.branches.routing import contribution_where_needed
from paradepth.depth import Stack
from paradepth.depth.state import State, add, detached, pack, subtract, unpack
from paradepth.nn import TargetLayer

Aggregate = Literal["residual", "sum", "gated"]


class Branches(nn.Module):
    """n stacks G_1 … G_n that read the same input x; their contributions δ_i(x) = G_i(x) − x are added up.

    The state of prefix k, that is of the model that uses branches 1..k, is

    - aggregate "residual": s_k = x + Σ_{i≤k} δ_i(x), the branches approximating target − x;
    - aggregate "sum": s_k = Σ_{i≤k} G_i(x), as in the authors' code;
    - aggregate "gated": s_k = x + Σ_{i≤k} α_i(x) δ_i(x), with a `Gate` for each branch that starts at 1.

    Sources: Shallow Parallel Transformers with Progressive Approximation (arXiv 2510.15425); of the α_i(x), Dynamic
    Universal Approximation Theory (arXiv 2407.21670). For one branch the first two are the serial stack.

    Args:
        branches: the stacks, at least one.
        aggregate: "residual", "sum" or "gated".
        executor: how the branches are evaluated; `Loop` by default. Also an attribute that may be set later.
        gates: of "gated", one for each branch. A gate becomes a part of its branch, `branch.gate`, and goes wherever
            that goes: selected, frozen, saved with it.

    Attributes:
        skip_below: of "gated", see there.

    Raises:
        ValueError: no branches, an unknown aggregate, or gates that do not go with it: none or another number of them,
            of several kinds, or such that read a mean over tokens for layers whose tokens must not see later ones.

    >>> from paradepth.nn import EncoderLayer
    >>> trunk = Branches([Stack([EncoderLayer(16, heads=2, mlp=32)]) for _ in range(3)])
    >>> x = torch.randn(2, 5, 16)
    >>> trunk.prefix_states(x).shape
    torch.Size([3, 2, 5, 16])
    >>> bool(torch.allclose(trunk.prefix_states(x)[1], trunk(x, branches=2), atol=1e-6))
    True
    """

    def __init__(
        self,
        branches: Iterable[Stack],
        *,
        aggregate: Aggregate = "residual",
        executor: BranchExecutor | None = None,
        gates: Sequence[Gate] | None = None,
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        if not self.branches:
            raise ValueError("a branches trunk needs at least one branch")
        if aggregate not in get_args(Aggregate):
            raise ValueError(f"aggregate is {aggregate!r}; it must be 'residual', 'sum' or 'gated'")
        self.aggregate: Aggregate = aggregate
        self.executor = executor or Loop()
        self._skip_below = 0.0
        self._per: Per = "sample"
        if gates is None and aggregate != "gated":
            return
        self._per = _check_gates(self.first(None), aggregate, gates)
        for branch, gate in zip(self.branches, gates or (), strict=True):
            branch.gate = gate

    def __len__(self) -> int:
        return len(self.branches)

    def first(self, count: int | None) -> list[Stack]:
        """The first `count` branches (default: all).

        Raises:
            ValueError: `count` is below 1 or above the number of branches.
        """
        count = len(self) if count is None else count
        if not 1 <= count <= len(self):
            raise ValueError(
                f"branches is {count}; this trunk has {len(self)}, so it must be between 1 and {len(self)}"
            )
        return list(self.branches)[:count]  # pyright: ignore[reportReturnType]

    def forward(self, x: Any, *inputs: Any, branches: int | None = None) -> Any:
        """The state of prefix `branches` (default: all), of the structure and shape of `x`.

        Args:
            x: input of every branch, (B, T, D) or a tuple of such tensors.
            inputs: what every layer gets besides the state, such as an attention mask.
            branches: k.

        Raises:
            ValueError: `branches` is below 1 or above the number of branches.
        """
        used = self.first(branches)
        if self.aggregate == "gated":
            *_, state = self._gated_states(used, x, inputs)
            return unpack(state, like=x)
        state = self.executor.corrected(used, x, *inputs)
        if self.aggregate == "residual" or len(used) == 1:
            return state
        more = len(used) - 1
        return unpack(tuple(s + more * a for s, a in zip(pack(state), pack(x), strict=True)), like=x)

    def contributions(self, x: Any, *inputs: Any, branches: int | None = None) -> Any:
        """What the first `branches` branches (default: all) add to x: δ_1(x) … δ_k(x), gated α_1 δ_1 … α_k δ_k; shape
        (k, B, T, D)."""
        used = self.first(branches)
        deltas = [subtract(pack(g), pack(x)) for g in self.executor.outputs(used, x, *inputs)]
        if self.aggregate == "gated":
            pairs = zip(deltas, self.needed_only(self._gates(used, x, inputs)), strict=True)
            deltas = [tuple(weighted(part, alpha) for part in delta) for delta, alpha in pairs]
        return _stack([unpack(delta, like=x) for delta in deltas])

    # ---- gates -------------------------------------------------------------------------------------------------

    @property
    def skip_below(self) -> float:
        """In evaluation mode a sample leaves out the branches whose α_i(x) is below this: they are not run for it, and
        its state is what those α at 0 would make it. 0, the default, leaves out nothing.

        Each branch then has a batch of its own, the samples that need it, and branches are evaluated one after another
        whatever the executor. Copies made by a model's `select`, `grow` and the like start at 0 again.

        Raises:
            ValueError: when set, a number outside [0, 2), where the gates are; a trunk without gates, or gates of
                tokens: attention needs all tokens of a sample.
        """
        return self._skip_below

    @skip_below.setter
    def skip_below(self, value: float) -> None:
        if not 0 <= value < 2:
            raise ValueError(f"skip_below is {value}; gates are between 0 and 2, and so it must be at least 0, below 2")
        if value and self.aggregate != "gated":
            raise ValueError(
                f"skip_below is {value}, and aggregate {self.aggregate!r} has no gates that say which branches a "
                "sample needs; 'gated' has"
            )
        if value and self._per == "token":
            raise ValueError(
                f"skip_below is {value}, and these gates are of tokens, since layers are causal; a branch's attention "
                "needs all tokens of a sample, and so nothing can be left out"
            )
        self._skip_below = float(value)

    def gates(self, x: Any, *inputs: Any, branches: int | None = None) -> Tensor:
        """α_1(x) … α_k(x) of the first `branches` branches (default: all), (k, B), or (k, B, T) for gates of tokens.

        Args:
            x: input of every branch. Gates read the first part of a joined state: a source, which is there in whole.
            inputs: what every layer gets besides the state; a mask says which tokens are padding.
            branches: k.

        Raises:
            ValueError: a trunk without gates, or a mask that is none of padding.
        """
        if self.aggregate != "gated":
            raise ValueError(f"aggregate is {self.aggregate!r}, which has no gates; 'gated' has")
        return self._gates(self.first(branches), x, inputs)

    def needed(self, alphas_kB: Tensor) -> Tensor:
        """Which branches are run for which samples in evaluation mode: α ≥ `skip_below`, booleans of that shape."""
        return alphas_kB >= self._skip_below

    def gate_parameters(self) -> list[nn.Parameter]:
        """The parameters of all gates. Where processes share the branches every process has all gates."""
        return [p for branch in self.branches for p in getattr(branch, "gate", nn.Module()).parameters()]

    def _gates(self, used: Sequence[Any], x: Any, inputs: tuple[Any, ...]) -> Tensor:
        mask = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
        return gate_values([branch.gate for branch in used], readings(pack(x)[0], per=self._per, mask=mask))

    def needed_only(self, alphas_kB: Tensor) -> Tensor:
        """The gates with those of what is left out at 0."""
        if self.training or not self._skip_below:
            return alphas_kB
        return alphas_kB * self.needed(alphas_kB)

    def _gated_states(
        self, used: Sequence[Stack], x: Any, inputs: tuple[Any, ...], *, detach: bool = False
    ) -> Iterator[State]:
        """The states of prefixes 1..k."""
        alphas, start = self._gates(used, x, inputs), pack(x)
        if self._skip_below and not self.training:
            state = start
            for branch, alpha, needed_B in zip(used, alphas, self.needed(alphas), strict=True):
                delta = contribution_where_needed(branch, x, inputs, needed_B)
                if delta is not None:
                    state = add(state, tuple(weighted(part, alpha) for part in delta))
                yield state
            return
        state: State | None = None
        for g, alpha in zip(self.executor.outputs(used, x, *inputs), alphas, strict=True):
            before = detached(state) if detach and state is not None else state
            state = next_state(before, pack(g), start, aggregate="gated", alpha=alpha)
            yield state

    def prefix_states(self, x: Any, *inputs: Any, branches: int | None = None, detach: bool = False) -> Any:
        """The states of prefixes 1..k from one evaluation of k branches, shape (k, B, T, D).

        Args:
            x: input of every branch; for a tuple of tensors the result is a tuple as well.
            inputs: what every layer gets besides the state.
            branches: k (default: all).
            detach: a prefix sees the ones before it as constants, so that its loss trains its newest branch alone:
                boosting.
        """
        return _stack(self.each_prefix(x, *inputs, branches=branches, detach=detach))

    def each_prefix(self, x: Any, *inputs: Any, branches: int | None = None, detach: bool = False) -> list[Any]:
        """The states of `prefix_states` one by one, each of the structure and shape of `x`: that of a prefix is
        computed from its own branches and no others."""
        if self.aggregate == "gated":
            gated = self._gated_states(self.first(branches), x, inputs, detach=detach)
            return [unpack(state, like=x) for state in gated]
        states: list[State] = []
        for g in self.executor.outputs(self.first(branches), x, *inputs):
            before = None if not states else detached(states[-1]) if detach else states[-1]
            states.append(next_state(before, pack(g), pack(x), aggregate=self.aggregate))
        return [unpack(state, like=x) for state in states]

    def flops(self, tokens: Any, *, branches: int | None = None) -> int:
        """Floating-point operations of one forward pass over one sample (a multiply-add counts two)."""
        used: list[Any] = self.first(branches)
        own = sum(branch.flops(tokens) for branch in used)
        if self.aggregate != "gated":
            return own
        return own + sum(branch.gate.flops(tokens[0] if isinstance(tokens, tuple) else tokens) for branch in used)


def next_state(before: State | None, g: State, x: State, *, aggregate: Aggregate, alpha: Tensor | None = None) -> State:
    """The state of prefix i.

    Args:
        before: that of prefix i − 1; None: this is the first.
        g: G_i(x).
        x: the input.
        aggregate: of the trunk.
        alpha: of "gated", α_i(x), (B,) or (B, T).
    """
    if alpha is not None:
        # G_1 + (α_1 − 1) δ_1, so that gates of 1 give the plain sum to the last bit.
        start, factor = (g, alpha - 1.0) if before is None else (before, alpha)
        return add(start, tuple(weighted(part, factor) for part in subtract(g, x)))
    if before is None:
        return g
    return add(before, g if aggregate == "sum" else subtract(g, x))


def stacks_of(trunk: Stack | Branches, *, branches: int | None = None) -> list[Stack]:
    """The stacks of a trunk: itself, or its first `branches` branches (default: all).

    Raises:
        ValueError: a number of branches that the trunk does not have.
    """
    return trunk.first(branches) if isinstance(trunk, Branches) else [trunk]


def _check_gates(branches: Sequence[Stack], aggregate: str, gates: Sequence[Gate] | None) -> Per:
    """What the gates are of, after refusing those that do not fit."""
    if aggregate != "gated":
        raise ValueError(f"aggregate is {aggregate!r}, which has no gates; 'gated' has")
    if gates is None or len(gates) != len(branches):
        raise ValueError(
            f"aggregate 'gated' takes a gate for each of the {len(branches)} branches, and there are {len(gates or ())}"
        )
    kinds: set[Per] = {gate.per for gate in gates}
    if len(kinds) > 1:
        raise ValueError("some gates are of samples and some of tokens; all must be of one kind")
    # A target's gates read its source, which is there in whole.
    causal = any(
        getattr(module, "causal", False)
        for branch in branches
        for layer in branch.layers
        if not isinstance(layer, TargetLayer)
        for module in layer.modules()
    )
    if causal and "sample" in kinds:
        raise ValueError(
            "these layers are causal, and a gate that reads the mean over a sample's tokens would tell a token what "
            "comes after it; take gates of tokens: per='token'"
        )
    return kinds.pop()


def _stack(states: list[Any]) -> Any:
    if isinstance(states[0], Tensor):
        return torch.stack(states)
    return tuple(torch.stack(parts) for parts in zip(*states, strict=True))
