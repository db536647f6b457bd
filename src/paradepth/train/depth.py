"""The depth of a training run: which executor evaluates the stack, on which processes the layers or the branches lie,
and the controller's probes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from paradepth.branches import Auto, Branches, choose_executor
from paradepth.depth import (
    DEPTH_EXECUTORS,
    Controller,
    DepthExecutor,
    IterativeExecutor,
    Report,
    Serial,
    SolveReport,
    Stack,
    cut_into_parts,
    lipschitz,
)
from paradepth.distributed import World, assign_branches, process_count, shard_branches, shard_depth
from paradepth.models.sharing import check_unshared
from paradepth.train.config import BranchOptions, DepthOptions

T = TypeVar("T")
_POWER_ITERATIONS = 8

_ARGUMENTS = {"checkpoint_layers": "checkpoint"}  # of an executor, where it is not called as the option
_OF_THE_RUN = ("executor", "control", "exact_probe", "depth_processes", "lipschitz")
_CONTROL = {
    "probe_every": "every",
    "rho_threshold": "threshold",
    "rho_return": "return_below",
    "probe_patience": "patience",
    "max_iterations": "max_iterations",
}


def build_executor(options: DepthOptions) -> DepthExecutor:
    """The executor that the options ask for.

    Raises:
        ValueError: an unknown executor, options that it does not take, or values out of range.

    >>> build_executor(DepthOptions(executor="mgrit", coarse="half")).coarse
    (BranchSum(sums=2),)
    """
    cls = _executor_class(options)
    given = {f.name: getattr(options, f.name) for f in fields(options) if getattr(options, f.name) != f.default}
    controls = {name for name in given if name in _CONTROL or name == "exact_probe"}
    if options.control and not issubclass(cls, IterativeExecutor):
        raise ValueError(
            f"control watches an iterative executor; with executor {options.executor!r} there is nothing to watch"
        )
    if controls and not options.control:
        raise ValueError(f"{', '.join(sorted(controls))}: only with control")
    own = {_ARGUMENTS.get(name, name): name for name in given if name not in {*_CONTROL, *_OF_THE_RUN}}
    taken = [p.name for p in inspect.signature(cls).parameters.values() if p.kind is p.KEYWORD_ONLY]
    foreign = sorted(name for argument, name in own.items() if argument not in taken)
    if foreign:
        raise ValueError(f"executor {options.executor!r} does not take {', '.join(foreign)}")
    return cls(**{argument: given[name] for argument, name in own.items()})


def _executor_class(options: DepthOptions) -> type[DepthExecutor]:
    if options.executor not in DEPTH_EXECUTORS:
        raise ValueError(f"executor is {options.executor!r}; it must be one of {', '.join(DEPTH_EXECUTORS)}")
    return DEPTH_EXECUTORS[options.executor]


def depth_processes(options: DepthOptions) -> int:
    """Processes that share the layers: as asked for, else all of them for an iterative executor and one for serial."""
    if options.depth_processes is not None:
        return options.depth_processes
    return process_count() if issubclass(_executor_class(options), IterativeExecutor) else 1


def branch_processes(options: BranchOptions) -> int:
    """Processes that share the branches: one where nothing else was asked for.

    Raises:
        ValueError: fewer than 1.
    """
    asked = options.branch_processes
    if asked is not None and asked < 1:
        raise ValueError(f"branch_processes is {asked}; it must be at least 1")
    return 1 if asked is None else asked


def check_depth(model: Any, options: DepthOptions, processes: int, branches: BranchOptions | None = None) -> None:
    """Refuses, before any work starts, what `DepthRun` could not set up.

    Args:
        model: the whole model.
        options: executor and controller of a stack.
        processes: in a row that shares the layers or the branches.
        branches: how branches are evaluated.

    Raises:
        ValueError: options of a stack for a model with branches or the other way round, a stack that the executor
            cannot solve or that cannot be cut into so many parts, fewer branches than processes, or a controller that
            makes no sense.
    """
    executor, stack = build_executor(options), model.trunk
    if processes > 1:
        check_unshared(model.config, f"{processes} processes would each have layers of their own")
    if not isinstance(stack, Stack):
        if options != DepthOptions():
            raise ValueError(
                f"executor {options.executor!r} and its options are for a serial stack (branches 0); this model has "
                "branches"
            )
        assign_branches([branch.depth for branch in stack.first(None)], ranks=processes)
        return
    if branches is not None and branches.branch_processes is not None:
        raise ValueError(
            f"branch_processes is {branches.branch_processes}; processes share branches, and this model is a serial "
            "stack (branches 0), whose layers are shared by depth_processes"
        )
    if branches is not None and branches.branch_executor != "loop":
        raise ValueError(
            f"branch_executor is {branches.branch_executor!r}; it evaluates branches, and this model is a serial stack "
            "(branches 0), which has an executor"
        )
    executor.check(stack)
    if processes > 1 and not executor.on_several_processes:
        raise ValueError(
            f"executor {options.executor!r} evaluates the layers of one process, and {processes} would share them; "
            "leave depth_processes out"
        )
    if options.control and isinstance(executor, IterativeExecutor):
        build_controller(executor, options)
    cut_into_parts(stack.depth, buffers=stack.buffer_layers, unit=executor.unit, ranks=processes)


def build_controller(executor: IterativeExecutor, options: DepthOptions) -> Controller:
    """The controller that the options ask for.

    Raises:
        ValueError: values that make no sense.
    """
    given = {name: getattr(options, name) for name in _CONTROL if getattr(options, name) is not None}
    return Controller(executor, **{_CONTROL[name]: value for name, value in given.items()})


class DepthRun:
    """Sets a model's trunk up for a run and wraps its training steps.

    Args:
        model: a model on this process's device, equal on all; its layers or branches are shared between the processes
            of a row.
        options: executor and controller of a stack.
        world: the processes.
        branches: how branches are evaluated.

    Attributes:
        owned: parameters that this process alone has within its row.

    Raises:
        ValueError: what `check_depth` refuses.
    """

    def __init__(
        self, model: nn.Module, options: DepthOptions, world: World, branches: BranchOptions | None = None
    ) -> None:
        self.model, self.options, self.world = model, options, world
        self.executor = build_executor(options)
        self.owned: list[Tensor] = []
        self.controller: Controller | None = None
        self.auto: Auto | None = None
        trunk: Any = model.trunk
        self.stack = trunk if isinstance(trunk, Stack) else None
        check_depth(model, options, world.row.size, branches)
        if isinstance(trunk, Branches):
            choose_executor(trunk, (branches or BranchOptions()).branch_executor)
            self.auto = trunk.executor if isinstance(trunk.executor, Auto) else None
            shard_branches(trunk, world.row)
        elif self.stack is not None:
            self.stack.executor = self.executor
            shard_depth(self.stack, world.row)
        if self.shared:
            # Gates read what every process has, and each process has all of them.
            common = {id(p) for p in trunk.gate_parameters()} if isinstance(trunk, Branches) else set()
            self.owned = [p for p in trunk.parameters() if id(p) not in common]
        if self.stack is not None and options.control:
            assert isinstance(self.executor, IterativeExecutor)
            self.controller = build_controller(self.executor, options)

    @property
    def shared(self) -> bool:
        """Whether several processes share the layers or the branches."""
        return self.world.row.size > 1

    @contextmanager
    def serial(self, model: Any = None) -> Iterator[None]:
        """Evaluates the stack of `model` (default: the one that learns) serially within the context: validation
        measures the network, not its solver."""
        stack = self.stack if model is None or self.stack is None else model.trunk
        if stack is None:
            yield
            return
        before, stack.executor = stack.executor, Serial()
        try:
            yield
        finally:
            stack.executor = before

    def lipschitz(self, inputs: Any) -> list[float]:
        """Estimates of the layers' Lipschitz constants on these inputs of the model."""
        assert self.stack is not None
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            x, sides = self.model.embed(inputs)  # pyright: ignore[reportCallIssue]
        values = lipschitz(self.stack, x, *sides, iterations=_POWER_ITERATIONS)
        self.model.train(was_training)
        return values

    # ---- training steps ----------------------------------------------------------------------------------------

    def step(self, batch: int, gradients: Callable[[], T], note: Callable[..., None]) -> T:
        """Forms the gradients of a batch, with a probe when one is due.

        Args:
            batch: number of the batch in the run, from 0.
            gradients: forms the gradients, from none, of the whole batch; may be called several times.
            note: receives the event of a probe.
        """
        controller = self.controller
        if controller is None or not controller.due(batch):
            return gradients()
        assert isinstance(self.executor, IterativeExecutor)
        controller.apply_probe()
        result = gradients()
        report = self._agreed(self.executor.report)
        was_serial = bool(controller.serial)
        decisions = controller.observe(report)
        event: dict[str, Any] = {
            d.direction: {k: v for k, v in asdict(d).items() if k != "direction"} for d in decisions
        }
        controller.apply()
        if self.options.exact_probe:
            result = gradients()
            event |= self._compare_with_serial(gradients)
        elif was_serial or controller.serial:
            result = gradients()  # the probe's own gradient is not trusted
        note(step=batch, **event)
        return result

    def _agreed(self, report: Report) -> Report:
        """The report with residuals averaged over the data dimension, so that all processes decide alike."""
        agreed = Report()
        for name in ("forward", "backward"):
            solved: SolveReport = getattr(report, name)
            ends = solved.residuals[-2:]
            if self.world.size > 1 and len(ends) == 2:
                values = torch.tensor(ends, dtype=torch.float64, device=self.world.device)
                ends = (self.world.sum(values) / self.world.size).tolist()
            setattr(agreed, name, SolveReport(solved.iterations, ends, solved.evaluations, solved.sequential))
        return agreed

    def _compare_with_serial(self, gradients: Callable[[], Any]) -> dict[str, float]:
        """Cosine and relative norm of the present gradients to the serial ones, which are formed and dropped."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        mine = [None if p.grad is None else p.grad.detach().clone() for p in parameters]
        with self.serial():
            gradients()
        own = {id(p) for p in self.owned}
        sums = torch.zeros(2, 3, dtype=torch.float64, device=self.world.device)
        for parameter, a in zip(parameters, mine, strict=True):
            b = parameter.grad
            if a is not None and b is not None:
                products = [(a.double() * b.double()).sum(), a.double().square().sum(), b.double().square().sum()]
                sums[0 if id(parameter) in own else 1] += torch.stack(products)
            parameter.grad = a
        dot, square, exact = (self.world.row.sum(sums[0]) + sums[1]).tolist()
        scale = (square * exact) ** 0.5
        return {"cosine": dot / scale if scale else 1.0, "relative_norm": (square / exact) ** 0.5 if exact else 1.0}

    # ---- state -------------------------------------------------------------------------------------------------

    def solve_fields(self) -> dict[str, Any]:
        """What a training event tells of the last solve."""
        if not isinstance(self.executor, IterativeExecutor) or self.stack is None:
            return {}
        forward, backward = self.executor.report.forward, self.executor.report.backward
        told = {
            "forward_iterations": forward.iterations,
            "backward_iterations": backward.iterations,
            "evaluations": [forward.evaluations, backward.evaluations],
        }
        return told | ({"sequential": [forward.sequential, backward.sequential]} if self.executor.batched else {})

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint. First guesses from earlier batches are forgotten, so that a resumed run and an
        uninterrupted one start alike."""
        if isinstance(self.executor, IterativeExecutor):
            self.executor.forget()
        if self.auto is not None:
            return self.auto.state_dict()  # executors round differently: a resumed run has to choose alike
        return {} if self.controller is None else self.controller.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        if self.auto is not None:
            self.auto.load_state_dict(saved)
        if self.controller is not None:
            self.controller.load_state_dict(saved)
            self.controller.apply()
