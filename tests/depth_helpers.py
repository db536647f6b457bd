"""What the tests of the depth executors share: small layers, a serial oracle, and multigrid written out plainly.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from paradepth.depth import MGRIT, DepthExecutor, Picard, Serial, Stack
from paradepth.depth.chain import Chain
from paradepth.depth.channel import Alone
from paradepth.depth.coarse import CoarseOperator, coarse_operator
from paradepth.depth.multigrid import Multigrid, intervals_of
from paradepth.depth.state import Increment, State
from paradepth.nn import Dropout

D = 4


class Residual(nn.Module):
    """A layer that says only what its residual is."""

    def residual(self, x: Any, *inputs: Any) -> Any:
        raise NotImplementedError

    def forward(self, x: Any, *inputs: Any, step: float = 1.0) -> Any:
        return x + step * self.residual(x, *inputs)


class Linear(Residual):
    """F(x) = A x."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)

    def residual(self, x: Tensor, *inputs: Any) -> Tensor:
        return x @ self.weight


class Toy(Residual):
    """F(x) = dropout(out(tanh(up(x)))), of any hidden width."""

    def __init__(self, hidden: int = D, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.out, self.dropout = nn.Linear(D, hidden), nn.Linear(hidden, D), Dropout(dropout)

    def residual(self, x: Tensor, *inputs: Any) -> Tensor:
        return self.dropout(self.out(torch.tanh(self.up(x))))


class Reads(Residual):
    """F(x) = tanh(A x + B m) with a side input m; the further ones scale and cut it."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = nn.Linear(D, D), nn.Linear(D, D, bias=False)

    def residual(self, x: Tensor, memory: Tensor, scale: Tensor | float = 1.0, mask: Tensor | None = None) -> Tensor:
        f = torch.tanh(self.own(x) + self.other(memory)) * scale
        return f if mask is None else f.masked_fill(~mask, 0.0)


class Encode(Residual):
    """Of Z = [X, Y]: moves X and leaves Y."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(D, D)

    def residual(self, x: tuple[Tensor, Tensor], *inputs: Any) -> tuple[Tensor, None]:
        return torch.tanh(self.map(x[0])), None


class Decode(Residual):
    """Of Z = [X, Y]: moves Y, reading X."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = nn.Linear(D + 1, D + 1), nn.Linear(D, D + 1)

    def residual(self, x: tuple[Tensor, Tensor], *inputs: Any) -> tuple[None, Tensor]:
        return None, torch.tanh(self.own(x[1]) + self.other(x[0]).mean(-2, keepdim=True))


class Midpoint(CoarseOperator):
    """A user's operator: the middle step of the interval stands for all."""

    def increment(self, steps: Sequence[Callable[[State], Increment]], x: State) -> Increment:
        return tuple(None if f is None else len(steps) * f for f in steps[len(steps) // 2](x))

    def evaluations(self, length: int) -> int:
        return 1

    def sequential(self, length: int) -> int:
        return 1


def toys(depth: int, *, step: float | None = None, **options: Any) -> Stack:
    """A stack of layers with hidden widths of their own."""
    return Stack([Toy(D + n % 3) for n in range(depth)], step=step or 1 / depth, **options).double()


def tokens(*shape: int, grad: bool = True) -> Tensor:
    """A random state, (2, 3, D) unless told."""
    return torch.randn(*(shape or (2, 3, D)), dtype=torch.float64, requires_grad=grad)


def exact(**options: Any) -> MGRIT:
    """MGRIT that has converged on any stack used here."""
    return MGRIT(**{"coarsening": 2, "forward_iterations": 9, "backward_iterations": 9, **options})


def every_executor() -> list[DepthExecutor]:
    """A converged one of each kind, with and without kept graphs."""
    made: list[DepthExecutor] = []
    for recompute in (True, False):
        made += [exact(recompute=recompute), exact(levels=3, relaxation="FCF", coarse="half", recompute=recompute)]
        made.append(Picard(forward_iterations=16, backward_iterations=16, recompute=recompute))
    return made


def loss_of(y: Any) -> Tensor:
    """A loss whose gradient differs from element to element and depends on y, for every part of the state."""
    parts = (y,) if isinstance(y, Tensor) else y
    weights = [torch.linspace(-1, 2, part.numel(), dtype=part.dtype).view(part.shape) for part in parts]
    return torch.stack([(part * w + part.square()).sum() for part, w in zip(parts, weights)]).sum()


def outcome(stack: Stack, executor: DepthExecutor | None, x: Any, *inputs: Any) -> dict[str, Tensor | None]:
    """Values and gradients of one call, by name; None where no gradient came."""
    y = stack(x, *inputs, executor=executor)
    parts, states = ((y,), (x,)) if isinstance(x, Tensor) else (y, x)
    wanted = {f"state {i}": part for i, part in enumerate(states) if part.requires_grad}
    wanted |= {f"input {i}": m for i, m in enumerate(inputs) if isinstance(m, Tensor) and m.requires_grad}
    wanted |= {name: p for name, p in stack.named_parameters() if p.requires_grad}
    found: dict[str, Tensor | None] = {f"value {i}": part.detach() for i, part in enumerate(parts)}
    if wanted:
        grads = torch.autograd.grad(loss_of(y), list(wanted.values()), allow_unused=True)
        found |= dict(zip(wanted, grads))
    return found


def same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], atol: float = 1e-10) -> None:
    """Asserts equal values and gradients, and that the same gradients are missing."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def equals_serial(stack: Stack, executor: DepthExecutor, x: Any, *inputs: Any, atol: float = 1e-10) -> None:
    """Asserts that an executor gives the serial values and gradients."""
    same(outcome(stack, executor, x, *inputs), outcome(stack, Serial(), x, *inputs), atol)


class Steps(Chain):
    """A chain of the given increments, which counts how often each was asked for."""

    def __init__(self, deltas: Sequence[Callable[[Tensor], Tensor]]) -> None:
        self.deltas, self.count = deltas, len(deltas)

    def increment(self, j: int, u: State) -> Increment:
        self.evaluations += 1
        return (self.deltas[j](u[0]),)

    def exact(self, first: Tensor) -> list[Tensor]:
        """All states, one step after another."""
        states = [first]
        for delta in self.deltas:
            states.append(states[-1] + delta(states[-1]))
        return states


def steps(depth: int, h: float) -> Steps:
    """A nonlinear chain whose steps differ."""
    weights = torch.randn(depth, D, D, dtype=torch.float64)
    return Steps([lambda u, w=w: h * torch.tanh(u @ w) for w in weights])


def multigrid(
    chain: Steps,
    first: Tensor,
    *,
    coarsening: Sequence[int],
    coarse: Sequence[str] = (),
    relaxation: Sequence[Any] = (),
    cycle: Any = "V",
    how: Any = "coarse",
) -> Multigrid:
    """The solver at its first guess."""
    solver = Multigrid(
        chain,
        bounds=intervals_of(chain.count, coarsening),
        owned=range(chain.count),
        coarse=[coarse_operator(name) for name in coarse or ["sample"] * len(coarsening)],
        relaxation=relaxation or ["F"] * len(coarsening),
        cycle=cycle,
        channel=Alone(),
        upstream=None,
        downstream=None,
    )
    solver.guess((first,), how, None)
    return solver


class PlainMultigrid:
    """The same algorithm without anything remembered: every step is computed whenever the mathematics mentions it.

    Attributes:
        u: states of the finest level.
        residuals: ‖r‖ before each correction.
    """

    def __init__(
        self,
        chain: Steps,
        first: Tensor,
        *,
        coarsening: Sequence[int],
        coarse: Sequence[str],
        relaxation: Sequence[str],
        cycle: str,
        how: str = "coarse",
    ) -> None:
        self.chain, self.relaxation, self.cycle = chain, relaxation, cycle
        self.operators = [coarse_operator(name) for name in coarse]
        self.bounds = []
        count = chain.count
        for c in coarsening:
            self.bounds.append([j for j in range(count) if j % c == 0] + [count])
            count = len(self.bounds[-1]) - 1
        self.residuals: list[float] = []
        self.u = [first] * (chain.count + 1)
        if how == "coarse":
            self._guess(0, self.u)

    def delta(self, level: int, j: int, u: Tensor) -> Tensor:
        if level == 0:
            return self.chain.deltas[j](u)
        interval = range(self.bounds[level - 1][j], self.bounds[level - 1][j + 1])
        members = [partial(lambda x, i: (self.delta(level - 1, i, x[0]),), i=i) for i in interval]
        part = self.operators[level - 1].increment(members, (u,))[0]
        assert part is not None
        return part

    def step(self, level: int, j: int, u: list[Tensor], g: Sequence[Tensor | float]) -> Tensor:
        return u[j] + self.delta(level, j, u[j]) + g[j]

    def _guess(self, level: int, fine: list[Tensor]) -> None:
        u = [fine[bound] for bound in self.bounds[level]]
        none = [0.0] * len(u)
        if level + 1 < len(self.bounds):
            self._guess(level + 1, u)
            self.relax_f(level + 1, u, none)
        else:
            for j in range(len(u) - 1):
                u[j + 1] = self.step(level + 1, j, u, none)
        for bound, state in zip(self.bounds[level], u):
            fine[bound] = state

    def relax_f(self, level: int, u: list[Tensor], g: Sequence[Tensor | float]) -> list[Tensor]:
        ends = []
        for start, end in pairwise(self.bounds[level]):
            for j in range(start, end - 1):
                u[j + 1] = self.step(level, j, u, g)
            ends.append(self.step(level, end - 1, u, g))
        return ends

    def visit(self, level: int, u: list[Tensor], g: Sequence[Tensor | float], cycle: str) -> None:
        if level == len(self.bounds):
            for j in range(len(u) - 1):
                u[j + 1] = self.step(level, j, u, g)
            return
        bounds = self.bounds[level]
        ends = self.relax_f(level, u, g)
        if self.relaxation[level] == "FCF":
            for bound, end in zip(bounds[1:], ends):
                u[bound] = end
            ends = self.relax_f(level, u, g)
        if level == 0:
            self.note(u, ends)
        coarse = [u[bound] for bound in bounds]
        g_coarse = [end - x - self.delta(level + 1, j, x) for j, (x, end) in enumerate(zip(coarse, ends))]
        self.visit(level + 1, coarse, g_coarse, cycle)
        if cycle == "F" and level + 2 <= len(self.bounds):
            self.visit(level + 1, coarse, g_coarse, "V")
        for bound, state in zip(bounds, coarse):
            u[bound] = state
        if level > 0:
            self.relax_f(level, u, g)

    def note(self, u: list[Tensor], ends: list[Tensor]) -> None:
        inner = self.bounds[0][1:-1]
        self.residuals.append(float(torch.stack([end - u[b] for b, end in zip(inner, ends)]).norm()))

    def iterate(self) -> None:
        self.visit(0, self.u, [0.0] * len(self.u), self.cycle)

    def finish(self) -> None:
        ends = self.relax_f(0, self.u, [0.0] * len(self.u))
        self.note(self.u, ends)
        self.u[-1] = ends[-1]


def plain_picard(
    deltas: Sequence[Callable[[Tensor], Tensor]], first: Tensor, *, sweeps: int, cuts: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """Picard sweeps written out: the end, and the states that the last increments were taken at."""
    used: list[Tensor] = []
    for start, stop in pairwise(cuts):
        states = [first] * (stop - start + 1)
        for _ in range(sweeps):
            at = states
            states = [first]
            for j in range(start, stop):
                states.append(states[-1] + deltas[j](at[j - start]))
        used += at[:-1]
        first = states[-1]
    return first, used
