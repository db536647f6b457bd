"""Branches on worker threads of one process, for CPUs.

    caller    x ─┬────────────────────────────────────────┬─► G_1(x) … G_n(x)      (waits)
    worker 1     ├─ branch 1 ── branch 3 ── branch 6 ─────┤
    worker 2     └─ branch 2 ── branch 4 ── branch 5 ─────┘   whoever is free takes the next branch

torch's operators let other Python threads run, so branches are computed at the same time. What n threads lose within
each operator, by waiting for one another after it, is saved: a worker has its share of the threads to itself.

The backward pass of a CPU graph runs on the thread that calls it. Here each branch has a graph of its own behind one
autograd node, whose backward pass hands the branches' graphs to the workers again.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._autograd import (  # pyright: ignore[reportMissingModuleSource]
    _get_current_graph_task_keep_graph as _current_graph_is_kept,
)
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from paradepth.branches.executor import BranchExecutor, is_traced, tensors_of
from paradepth.depth import Stack
from paradepth.nn.stacked import signature

T = TypeVar("T")


class Threads(BranchExecutor):
    """Evaluates branches on worker threads, forward and backward.

    Grad mode, inference mode and autocast are the caller's. The backward pass is parallel for branches of the library's
    own layers without hooks; that of others runs on the caller's thread. A second derivative is not available where the
    backward pass is parallel.

    Args:
        workers: threads that evaluate branches, each with its share of the threads that torch would use for one
            operator (`torch.get_num_threads()` of the caller). None: as many as those, at most one for each branch.

    Raises:
        ValueError: `workers` below 1; when called, a state that is not on the CPU.

    >>> from paradepth.branches import Branches
    >>> from paradepth.nn import EncoderLayer
    >>> trunk = Branches([Stack([EncoderLayer(16, heads=2, mlp=32)]) for _ in range(3)])
    >>> x = torch.randn(2, 5, 16)
    >>> one_by_one, trunk.executor = trunk(x), Threads(2)
    >>> bool(torch.allclose(trunk(x), one_by_one, atol=1e-6))
    True
    """

    def __init__(self, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"workers is {workers}; at least one thread has to evaluate branches")
        self.workers = workers
        self._pool: tuple[tuple[int, int, int], ThreadPoolExecutor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Threads:
        return Threads(self.workers)

    def __reduce__(self) -> tuple[Any, ...]:
        return Threads, (self.workers,)

    def applies(self, branches: Sequence[Stack], x: Any, *inputs: Any) -> bool:
        on_cpu = all(tensor.device.type == "cpu" for tensor in tensors_of(x, inputs))
        # What follows a thread's operators does not follow those of the workers.
        return on_cpu and self._workers(branches) > 1 and not is_traced()

    def _workers(self, branches: Sequence[Stack]) -> int:
        return min(self.workers or torch.get_num_threads(), len(branches))

    def outputs(self, branches: Sequence[Stack], x: Any, *inputs: Any) -> list[Any]:
        tensors = tensors_of(x, inputs)
        for tensor in tensors:
            if tensor.device.type != "cpu":
                raise ValueError(
                    f"threads are for CPUs, and the state is on {tensor.device}; take batched or loop there"
                )
        if not self.applies(branches, x, *inputs):
            return [branch(x, *inputs) for branch in branches]
        run = self._runner(self._workers(branches))
        mode = _Mode.of_this_thread()
        jobs = [_Job(branch, mode) for branch in branches]
        if mode.grad and not mode.inference and all(map(_is_ours, branches)):
            parameters = list({id(p): p for b in branches for p in b.parameters() if p.requires_grad}.values())
            wanted = [*(t for t in tensors if t.requires_grad), *parameters]
            if wanted:
                return _parallel(run, jobs, (x, inputs), wanted)
        return run([lambda job=job: job.evaluate(x, inputs) for job in jobs])

    def _runner(self, workers: int) -> Callable[[Sequence[Callable[[], T]]], list[T]]:
        """Runs functions on `workers` threads; results in order."""
        threads = torch.get_num_threads()
        key = (workers, threads, os.getpid())  # threads do not survive a fork
        if self._pool is None or self._pool[0] != key:
            if self._pool is not None and self._pool[0][2] == key[2]:
                self._pool[1].shutdown(wait=False)
            self._pool = key, _new_pool(workers, max(1, threads // workers))
            torch.set_num_threads(threads)  # workers changed what threads that are yet to come start with
        pool = self._pool[1]

        def run(functions: Sequence[Callable[[], T]]) -> list[T]:
            left: deque[tuple[int, Callable[[], T]]] = deque(enumerate(functions))
            results: dict[int, T] = {}

            def work() -> None:
                while left:
                    try:
                        place, function = left.popleft()
                    except IndexError:  # another worker was faster
                        return
                    results[place] = function()

            running = [pool.submit(work) for _ in range(min(workers, len(functions)))]
            wait(running)
            for future in running:
                future.result()
            return [results[place] for place in range(len(functions))]

        return run


def _new_pool(workers: int, threads: int) -> ThreadPoolExecutor:
    started = threading.Barrier(workers + 1)

    def start() -> None:
        torch.get_num_threads()  # a thread's number is set up at its first use, which would undo the next line
        torch.set_num_threads(threads)
        started.wait()

    pool = ThreadPoolExecutor(workers, thread_name_prefix="branches")
    for _ in range(workers):
        pool.submit(start)
    started.wait()
    return pool


@dataclass(frozen=True)
class _Mode:
    """What torch keeps for each thread."""

    grad: bool
    inference: bool
    autocast: bool
    dtype: torch.dtype
    cache: bool

    @classmethod
    def of_this_thread(cls) -> _Mode:
        autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()
        return cls(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)

    @contextmanager
    def entered(self) -> Iterator[None]:
        with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad):
            if not self.autocast:
                yield
                return
            # One branch's end must not clear the casts of another, so each branch keeps none.
            with torch.autocast("cpu", dtype=self.dtype, cache_enabled=False):
                yield


@dataclass(frozen=True)
class _Job:
    branch: Stack
    mode: _Mode

    def evaluate(self, x: Any, inputs: tuple[Any, ...]) -> Any:
        with self.mode.entered():
            return self.branch(x, *inputs)


def _is_ours(branch: Stack) -> bool:
    """Whether all that a branch's result depends on is its inputs and parameters, and nothing watches."""
    modules: list[nn.Module] = [branch, branch.layers]
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules):
        return False
    if any(p._backward_hooks for p in branch.parameters()):  # would be called twice
        return False
    try:
        for layer in branch.layers:
            signature(layer)
    except ValueError:
        return False
    return True


# ---- backward on the workers -----------------------------------------------------------------------------------


@dataclass
class _Graph:
    """One branch's graph: what it was made from and what came out."""

    sources: list[Tensor]  # stand-ins of the inputs
    outputs: list[Tensor]


def _parallel(run: Any, jobs: list[_Job], given: tuple[Any, Any], wanted: list[Tensor]) -> list[Any]:
    """The branches' outputs, behind one autograd node with the tensors `wanted` as its inputs."""
    form: list[Any] = []
    flat = _Node.apply(run, jobs, given, form, wanted, *wanted)
    leaves = iter(flat)  # pyright: ignore[reportArgumentType]
    return [tree_unflatten([next(leaves) for _ in range(spec.num_leaves)], spec) for spec in form]


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Any, jobs: list[_Job], given: tuple[Any, Any], form: list[Any], wanted: list[Tensor], *_: Tensor
    ) -> tuple[Tensor, ...]:
        place = {id(tensor): index for index, tensor in enumerate(wanted)}

        def evaluate(job: _Job) -> tuple[_Graph, list[tuple[int, Tensor]], Any]:
            found: list[tuple[int, Tensor]] = []  # in `wanted`, and what stands for it

            def own(leaf: Any) -> Any:
                if not isinstance(leaf, Tensor) or not leaf.requires_grad:
                    return leaf
                stand_in = leaf.detach().requires_grad_()
                found.append((place[id(leaf)], stand_in))
                return stand_in

            x, inputs = tree_map(own, given)
            found += [(place[id(p)], p) for p in job.branch.parameters() if p.requires_grad]
            outputs, spec = tree_flatten(job.evaluate(x, inputs))
            return _Graph([tensor for _, tensor in found], outputs), found, spec

        results = run([lambda job=job: evaluate(job) for job in jobs])
        form += [spec for _, _, spec in results]
        ctx.run, ctx.count = run, len(wanted)
        ctx.graphs = [graph for graph, _, _ in results]
        ctx.places = [[index for index, _ in found] for _, found, _ in results]
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for graph in ctx.graphs for tensor in graph.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if ctx.graphs is None:
            raise RuntimeError("this graph was freed by an earlier backward pass; pass retain_graph=True to that one")
        keep = _current_graph_is_kept()
        left = iter(grads)

        def differentiate(graph: _Graph, own: list[Tensor | None]) -> Sequence[Tensor | None]:
            pairs = [(y, g) for y, g in zip(graph.outputs, own, strict=True) if g is not None and y.requires_grad]
            if not pairs or not graph.sources:
                return [None] * len(graph.sources)
            ends, seeds = zip(*pairs, strict=True)
            return torch.autograd.grad(ends, graph.sources, seeds, retain_graph=keep, allow_unused=True)

        jobs = []
        for graph in ctx.graphs:
            own = [next(left) for _ in graph.outputs]
            jobs.append(lambda graph=graph, own=own: differentiate(graph, own))
        sums: list[Tensor | None] = [None] * ctx.count
        for places, found in zip(ctx.places, ctx.run(jobs), strict=True):
            for index, grad in zip(places, found, strict=True):
                before = sums[index]
                sums[index] = grad if before is None else before if grad is None else before + grad
        if not keep:
            ctx.graphs = None
        return None, None, None, None, None, *sums
