"""The MGRIT executor: a stack's depth solved in parallel by multigrid, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from paradepth.depth.bridge import Segment
from paradepth.depth.chain import Chain
from paradepth.depth.coarse import CoarseOperator, coarse_operator
from paradepth.depth.iterative import Iterations, IterativeExecutor
from paradepth.depth.multigrid import Cycle, FirstGuess, Multigrid, Relaxation, intervals_of, mirrored
from paradepth.depth.state import State

if TYPE_CHECKING:
    from paradepth.depth.stack import Stack

T = TypeVar("T")


class MGRIT(IterativeExecutor):
    """Multigrid-reduction-in-time over the layers of a stack. Two levels with F-relaxation are parareal.

    An iteration relaxes all intervals of `coarsening` layers at once and corrects their starting points by a coarse
    solve. k iterations make the first k·c states exact with F-relaxation and 2k·c with FCF, so N/c (N/2c) iterations
    give the serial result; fewer give an approximation whose error `report` measures. An iteration is counted after
    the first guess: 0 iterations are the guess and one relaxation. What is exact already is not computed again.

    Source: Layer-Parallel Training for Transformers (arXiv 2601.09026).

    Args:
        levels: number of levels, at least 2.
        coarsening: c, layers an interval; a sequence gives one for each coarsening.
        forward_iterations: iterations of the forward solve, or "serial".
        backward_iterations: iterations of the adjoint solve, or "serial".
        relaxation: "F" or "FCF", or one for each relaxed level.
        coarse: coarse operator, "sample" (the papers'), "branch", "half", "branch:k" or a `CoarseOperator`; or one for
            each coarse level.
        cycle: "V" or "F"; they differ from three levels on.
        initial: first guess: "coarse" (a coarse solve), "previous" (the states of the last solve of the same stack and
            shape, else coarse), or "constant" (every state is the first).
        tolerance: stop iterating once the relative residual before an iteration is at most this; the counts are then
            upper bounds. On several processes each check waits for all of them.
        recompute: evaluate layers again in the backward pass, so that only states are stored; False keeps the graph of
            every layer, as ordinary training does, and saves that time.
        batched: evaluate layers at once, by stacked weights, wherever they do not wait for one another and are alike
            (`StackedLayers`): the same position of all intervals, the terms of a branch sum, the corrections of all
            coarse steps. An iteration then takes about c + N/c batched steps in a row; meant for GPUs and small
            batches, where a layer alone does not fill the device. Layers that are like no other are evaluated by
            themselves (`alone`). Takes a second copy of the weights. With `recompute=False` the graphs of the last
            relaxation are kept for those of the adjoint, if both directions are iterated; coarse steps evaluate layers
            again.

    Raises:
        ValueError: values outside the ranges above.

    >>> import torch
    >>> from paradepth.depth import Stack
    >>> from paradepth.nn import EncoderLayer
    >>> stack = Stack([EncoderLayer(16, heads=2, mlp=32) for _ in range(8)], step=1 / 8)
    >>> x = torch.randn(2, 5, 16)
    >>> mgrit = MGRIT(coarsening=2, forward_iterations=4, backward_iterations=4)
    >>> bool(torch.allclose(stack(x, executor=mgrit), stack(x), atol=1e-6))
    True
    >>> mgrit = MGRIT(coarsening=2, coarse="branch", batched=True)
    >>> _ = stack(x, executor=mgrit)
    >>> mgrit.report.forward.evaluations, mgrit.report.forward.sequential
    (19, 9)
    """

    def __init__(
        self,
        *,
        levels: int = 2,
        coarsening: int | Sequence[int] = 4,
        forward_iterations: Iterations = 1,
        backward_iterations: Iterations = 1,
        relaxation: Relaxation | Sequence[Relaxation] = "F",
        coarse: str | CoarseOperator | Sequence[str | CoarseOperator] = "sample",
        cycle: Cycle = "V",
        initial: FirstGuess = "coarse",
        tolerance: float | None = None,
        recompute: bool = True,
        batched: bool = False,
    ) -> None:
        super().__init__(
            forward_iterations=forward_iterations,
            backward_iterations=backward_iterations,
            tolerance=tolerance,
            initial=initial,
            recompute=recompute,
            batched=batched,
        )
        if not isinstance(levels, int) or levels < 2:
            raise ValueError(f"levels is {levels!r}; it must be at least 2 (a serial executor has one level)")
        self.levels = levels
        self.coarsening = _each("coarsening", coarsening, levels - 1)
        for c in self.coarsening:
            if not isinstance(c, int) or c < 2:
                raise ValueError(f"coarsening is {coarsening!r}; it must be a whole number, at least 2")
        self.relaxation: tuple[Relaxation, ...] = _each("relaxation", relaxation, levels - 1)
        for kind in self.relaxation:
            if kind not in ("F", "FCF"):
                raise ValueError(f"relaxation is {kind!r}; it must be 'F' or 'FCF'")
        self.coarse = tuple(coarse_operator(name) for name in _each("coarse", coarse, levels - 1))
        if cycle not in ("V", "F"):
            raise ValueError(f"cycle is {cycle!r}; it must be 'V' or 'F'")
        if initial not in ("coarse", "previous", "constant"):
            raise ValueError(f"initial is {initial!r}; it must be 'coarse', 'previous' or 'constant'")
        self.cycle: Cycle = cycle

    @property
    def unit(self) -> int:
        layers = 1
        for c in self.coarsening:
            layers *= c
        return layers

    def check(self, stack: Stack) -> None:
        count = len(stack.between)
        for level, c in enumerate(self.coarsening, start=1):
            steps = -(-count // c)
            if steps < 2:
                what = "layers between the buffers" if level == 1 else f"steps of level {level - 1}"
                raise ValueError(
                    f"coarsening {c} makes one interval of the {count} {what}, which leaves nothing to coarsen; use a "
                    f"smaller coarsening{' or fewer levels' if level > 1 else ''}, or Serial"
                )
            count = steps
        if stack.part is not None:
            bounds = intervals_of(len(stack.between), self.coarsening)
            allowed = set(range(0, len(stack.between), self.unit)) | {len(stack.between)}
            cuts = [bound - stack.between.start for bound in stack.part.bounds[1:-1]]
            wrong = [cut + stack.between.start for cut in cuts if cut not in allowed]
            if wrong:
                raise ValueError(
                    f"the stack is cut over processes at layer {wrong[0]}, inside an interval of {self.unit} layers "
                    f"(coarsening {self.coarsening}, {len(bounds)} relaxed levels); shard it for this executor"
                )

    def _begin(
        self, stack: Stack, chain: Chain, segment: Segment, first: State, previous: dict[int, State] | None
    ) -> Multigrid:
        bounds = intervals_of(chain.count, self.coarsening)
        if segment.direction == "backward":
            bounds = mirrored(bounds)
        solver = Multigrid(
            chain,
            bounds=bounds,
            owned=segment.owned,
            coarse=self.coarse,
            relaxation=self.relaxation,
            cycle=self.cycle,
            channel=segment.channel,
            upstream=segment.upstream,
            downstream=segment.downstream,
        )
        solver.guess(first, self.initial, previous)  # pyright: ignore[reportArgumentType]
        return solver


def _each(name: str, value: T | Sequence[T], count: int) -> tuple[T, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return (value,) * count  # pyright: ignore[reportReturnType]
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} values; with {count + 1} levels it takes one or {count}")
    return tuple(value)
