"""The executor that measures the others and takes the fastest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from paradepth.branches.batched import Batched
from paradepth.branches.executor import BranchExecutor, is_traced, tensors_of, wants_gradients
from paradepth.branches.loop import Loop
from paradepth.branches.threads import Threads
from paradepth.depth import Stack

Timer = Callable[[str, Callable[[], Any]], float]
_ROUNDS = 5


@dataclass(frozen=True)
class Situation:
    """What a choice holds for.

    Attributes:
        device: of the state, such as "cpu" or "cuda:0".
        dtype: of the state; with autocast also that of the operators, as "float32/bfloat16".
        shapes: of the state's tensors and of what the layers get besides it. Tokens are rounded up to a power of two,
            so that texts of different lengths are not measured one by one.
        branches: their number.
        training: whether there are gradients.
        summed: whether the sum of the branches is wanted rather than the output of each.
        threads: of torch on the CPU.
    """

    device: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    branches: int
    training: bool
    summed: bool
    threads: int


@dataclass(frozen=True)
class Choice:
    """The executor that was the fastest in a situation, and the median seconds of each one that was measured."""

    situation: Situation
    chosen: str
    seconds: dict[str, float]


class Auto(BranchExecutor):
    """Measures `Loop`, `Batched` and, on CPUs, `Threads` or, for inference on GPUs, CUDA graphs; takes the fastest.

    It measures once for each `Situation`, candidates by turns, on the first branches and inputs that come: forward, and
    backward where there are gradients. Weights, their gradients, dropout masks and torch's random numbers are left as
    they are. Executors round differently, so a choice decides the last digits of a result; `state_dict` keeps choices,
    and training stores them in its checkpoints. Copies share them.

    Args:
        timer: measures a candidate: gets its name and a function that evaluates once, returns seconds. None measures
            the time that passes.

    >>> from paradepth.branches import Branches
    >>> from paradepth.nn import EncoderLayer
    >>> trunk = Branches([Stack([EncoderLayer(16, heads=2, mlp=32)]) for _ in range(3)], executor=Auto())
    >>> y = trunk(torch.randn(2, 5, 16))
    >>> (choice,) = trunk.executor.choices
    >>> choice.chosen in choice.seconds, choice.situation.branches, choice.situation.shapes
    (True, 3, ((2, 8, 16),))
    """

    def __init__(self, *, timer: Timer | None = None) -> None:
        self._timer = timer or _seconds
        self._executors: dict[str, BranchExecutor] = {"loop": Loop(), "batched": Batched(), "threads": Threads()}
        if torch.cuda.is_available():
            self._executors["batched with graphs"] = Batched(graphs=True)
        self._choices: dict[Situation, Choice] = {}

    @property
    def choices(self) -> tuple[Choice, ...]:
        """What was chosen so far."""
        return tuple(self._choices.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> Auto:
        new = Auto(timer=self._timer)
        new._choices = self._choices  # a model and its moving average choose alike
        return new

    def outputs(self, branches: Sequence[Stack], x: Any, *inputs: Any) -> Sequence[Any]:
        return self._chosen("outputs", branches, x, inputs).outputs(branches, x, *inputs)

    def corrected(self, branches: Sequence[Stack], x: Any, *inputs: Any) -> Any:
        return self._chosen("corrected", branches, x, inputs).corrected(branches, x, *inputs)

    # ---- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The choices, for JSON."""
        return {"choices": [asdict(choice) for choice in self.choices]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes choices over from `state_dict`; situations that are not among them are still measured."""
        for entry in saved.get("choices", []):
            known = dict(entry["situation"])
            known["shapes"] = tuple(tuple(shape) for shape in known["shapes"])
            situation = Situation(**known)
            self._choices[situation] = Choice(situation, entry["chosen"], dict(entry["seconds"]))

    # ---- choosing ----------------------------------------------------------------------------------------------

    def _chosen(self, method: str, branches: Sequence[Stack], x: Any, inputs: tuple[Any, ...]) -> BranchExecutor:
        if len(branches) == 1 or is_traced():
            return self._executors["loop"]
        situation = _situation(method, branches, x, inputs)
        choice = self._choices.get(situation)
        if choice is None:
            choice = self._choices[situation] = self._measure(situation, method, branches, x, inputs)
        executor = self._executors.get(choice.chosen, self._executors["loop"])
        # Of equal shapes, but of other layers, say.
        return executor if executor.applies(branches, x, *inputs) else self._executors["loop"]

    def _measure(
        self, situation: Situation, method: str, branches: Sequence[Stack], x: Any, inputs: tuple[Any, ...]
    ) -> Choice:
        fitting = {name: e for name, e in self._executors.items() if e.applies(branches, x, *inputs)}
        seconds: dict[str, list[float]] = {name: [] for name in fitting}
        if len(fitting) > 1:
            runs = {name: _run(e, method, branches, x, inputs, situation.training) for name, e in fitting.items()}
            devices = [t.device for t in tensors_of(x) if t.is_cuda][:1]
            with torch.random.fork_rng(devices=devices):
                for run in runs.values():
                    run()  # the first time takes longer: weights are stacked, threads and graphs made
                for _ in range(_ROUNDS):
                    for name, run in runs.items():
                        seconds[name].append(self._timer(name, run))
        medians = {name: statistics.median(values) if values else 0.0 for name, values in seconds.items()}
        return Choice(situation, min(medians, key=lambda name: medians[name]), medians)


def _situation(method: str, branches: Sequence[Stack], x: Any, inputs: tuple[Any, ...]) -> Situation:
    states = tensors_of(x)
    device = states[0].device
    dtype = str(states[0].dtype).removeprefix("torch.")
    if torch.is_autocast_enabled(device.type):
        dtype += f"/{torch.get_autocast_dtype(device.type)}".replace("torch.", "")
    return Situation(
        device=str(device),
        dtype=dtype,
        shapes=tuple(_rounded(t.shape) for t in (*states, *tensors_of(inputs))),
        branches=len(branches),
        training=wants_gradients(branches, x, inputs),
        summed=method == "corrected",
        threads=torch.get_num_threads(),
    )


def _rounded(shape: Sequence[int]) -> tuple[int, ...]:
    """Batch and width as they are, what is between them rounded up to a power of two.

    >>> _rounded((3, 65, 192)), _rounded((3, 1, 1, 65))
    ((3, 128, 192), (3, 1, 1, 128))
    """
    last = len(shape) if len(shape) > 3 else len(shape) - 1  # a mask ends with tokens
    return tuple(1 << (n - 1).bit_length() if 0 < i < last and n > 0 else n for i, n in enumerate(shape))


def _run(
    executor: BranchExecutor, method: str, branches: Sequence[Stack], x: Any, inputs: tuple[Any, ...], training: bool
) -> Callable[[], Any]:
    """A function that evaluates once, on copies that are cut from any graph."""

    def cut(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach().requires_grad_(training and value.requires_grad)
        return type(value)(map(cut, value)) if isinstance(value, tuple | list) else value

    own_x, own_inputs = cut(x), cut(inputs)
    parameters = [p for branch in branches for p in branch.parameters()]
    wanted = [t for t in (*tensors_of(own_x, own_inputs), *parameters) if t.requires_grad]

    def run() -> None:
        results = tensors_of(getattr(executor, method)(branches, own_x, *own_inputs))
        ends = [y for y in results if y.requires_grad]
        if training and ends:
            torch.autograd.grad(ends, wanted, [torch.ones_like(y) for y in ends], allow_unused=True)

    return run


def _seconds(name: str, run: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
