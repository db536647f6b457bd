"""Existing residual stacks, such as those of pretrained Transformers, evaluated by a depth executor.

A model loops over its layers itself, so the list that it loops over is replaced by one that looks the same:

    for layer in self.layers:        layer 0          evaluates the whole stack with the executor
        x = layer(x, mask)           layers 1 … N−1   hand on what they get, after making sure that it is what the
                                                      layer before returned, with the arguments that layer 0 got

Weights stay where they are, under their names.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from paradepth.depth.executor import DepthExecutor
from paradepth.depth.foreign import Arguments, Call, ForeignLayer, refuse_recording
from paradepth.depth.stack import Stack

Module = TypeVar("Module", bound=nn.Module)


def parallelize(module: Module, path: str, *, executor: DepthExecutor | None = None) -> Module:
    """Has the layers of an existing residual stack evaluated by `executor`; `restore` undoes it.

    Each layer Φ becomes a step x + F(x), F(x) = Φ(x) − x, h = 1. Parameters, their names and the model's own code stay
    as they are. Called again on the same list, it changes the executor, as does setting the list's `executor`.

    In training mode random numbers that layers draw (dropout) are functions of one draw from the global stream per
    forward pass and of the layer's place: every executor draws the same masks, each time it evaluates a layer again.

    Args:
        module: holds the layers and loops over them in its forward pass, all of them and in order; or a module that
            contains such a one. Changed in place.
        path: dotted path of the `nn.ModuleList` in `module`. Its items take the hidden state first and keep its shape;
            they return it, or a tuple whose first entry it is (other entries are not kept). Further arguments are
            passed through and may hold tensors, nested too, that need gradients; they are the same for every layer.
        executor: `Serial` by default.

    Returns:
        `module`.

    Raises:
        ValueError: no module list of that path, an empty one, an executor that does not fit. A forward pass raises it
            for layers that are skipped, cut off or get arguments of their own, for changes of the hidden state between
            layers, layers that change its shape, caches of keys and values, and recorded hidden states or attention.

    Source: Layer-Parallel Training for Transformers (arXiv 2601.09026), any residual stack as a chain of steps.

    >>> from paradepth.depth import MGRIT
    >>> layer = nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=32, batch_first=True)
    >>> model = nn.TransformerEncoder(layer, 8, enable_nested_tensor=False).eval()
    >>> x = torch.randn(2, 5, 16)
    >>> y = model(x)
    >>> mgrit = MGRIT(coarsening=2, relaxation="FCF", forward_iterations=2, backward_iterations=2)
    >>> model = parallelize(model, "layers", executor=mgrit)
    >>> bool(torch.allclose(model(x), y, atol=1e-5)), mgrit.report.forward.iterations
    (True, 2)
    >>> type(restore(model, "layers").layers).__name__
    'ModuleList'
    """
    owner, name, layers = _find(module, path)
    if isinstance(layers, ParallelLayers):
        if executor is not None:
            layers.executor = executor
        return module
    if len(layers) == 0:
        raise ValueError(f"the module list {path!r} is empty; there is nothing to evaluate")
    setattr(owner, name, ParallelLayers(layers, owner, executor))
    return module


def restore(module: Module, path: str) -> Module:
    """Undoes `parallelize`: the plain module list is back, with the present layers.

    Args:
        module: what `parallelize` got.
        path: as there.

    Returns:
        `module`.

    Raises:
        ValueError: the list is not parallelized, or there is none.

    >>> holder = nn.Module()
    >>> holder.layers = nn.ModuleList(nn.Tanh() for _ in range(4))
    >>> type(restore(parallelize(holder, "layers"), "layers").layers).__name__
    'ModuleList'
    """
    owner, name, layers = _find(module, path)
    if not isinstance(layers, ParallelLayers):
        raise ValueError(f"the module list {path!r} is not parallelized")
    setattr(owner, name, layers.detach())
    return module


def _find(module: nn.Module, path: str) -> tuple[nn.Module, str, nn.ModuleList]:
    """The module list at a path, its owner and its name there."""
    owner: nn.Module = module
    parts = path.split(".")
    for place, part in enumerate(parts):
        child = owner._modules.get(part)
        if child is None:
            where = f"{'.'.join(parts[:place])!r}" if place else f"the {type(module).__name__}"
            there = ", ".join(repr(name) for name, _ in owner.named_children()) or "nothing"
            raise ValueError(f"there is no {path!r}: {where} contains {there}, not {part!r}{_lists(module)}")
        if place + 1 == len(parts):
            if not isinstance(child, nn.ModuleList):
                raise ValueError(f"{path!r} is a {type(child).__name__}; it must be an nn.ModuleList{_lists(module)}")
            return owner, part, child
        owner = child
    raise AssertionError("a path has at least one part")


def _lists(module: nn.Module) -> str:
    paths = [repr(name) for name, child in module.named_modules() if name and isinstance(child, nn.ModuleList)]
    return f". Module lists of this {type(module).__name__}: {', '.join(paths) or 'none'}"


@dataclass
class _Pass:
    """A loop over the layers that has begun."""

    arguments: Arguments  # of layer 0
    call: Call
    y: Tensor  # the hidden state after the last layer
    next: int = 1  # the layer to be called next


class ParallelLayers(nn.ModuleList):
    """A module list whose items run as one stack. What `parallelize` puts in the place of the list.

    Item 0 evaluates all layers when it is called, the others hand its result on; in every other respect an item stands
    for its layer (attributes are read from there and set there).

    Args:
        layers: the list in whose place it is put.
        owner: the module that holds the list and loops over it.
        executor: how the stack is evaluated; `Serial` by default.

    Attributes:
        stack: the layers as a `Stack`; its layers also take plain arguments, so that diagnostics may use it.
        executor: may be set.
    """

    def __init__(self, layers: nn.ModuleList, owner: nn.Module, executor: DepthExecutor | None) -> None:
        super().__init__()
        self._modules.update(layers._modules)
        self.training = layers.training
        self._pass: _Pass | None = None
        # Not registered as modules: their parameters have their names already.
        self.__dict__["_original"] = layers
        self.__dict__["_stack"] = _stack_of(self._layers, None)
        if executor is not None:
            self.executor = executor
        self._hooks = (
            owner.register_forward_pre_hook(self._before, with_kwargs=True),
            owner.register_forward_hook(self._after),
        )

    @property
    def _layers(self) -> list[nn.Module]:
        return [layer for layer in self._modules.values() if layer is not None]

    @property
    def stack(self) -> Stack:
        """The present layers as a stack."""
        stack: Stack = self.__dict__["_stack"]
        present = self._layers
        if len(present) != stack.depth or any(a.layer is not b for a, b in zip(stack.layers, present, strict=True)):
            stack = self.__dict__["_stack"] = _stack_of(present, stack.executor)
        return stack

    @property
    def executor(self) -> DepthExecutor:
        """How the stack is evaluated."""
        return self.stack.executor

    @executor.setter
    def executor(self, executor: DepthExecutor) -> None:
        if not isinstance(executor, DepthExecutor):
            raise ValueError(f"executor is {executor!r}; it must be a DepthExecutor, for example MGRIT() or Serial()")
        executor.check(self.stack)
        self.stack.executor = executor

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Any]:
        return iter([_Item(self, index) for index in range(len(self))])

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]

    def detach(self) -> nn.ModuleList:
        """The list in whose place this one was put, with the present layers."""
        for hook in self._hooks:
            hook.remove()
        original: nn.ModuleList = self.__dict__["_original"]
        original._modules.clear()
        original._modules.update(self._modules)
        original.training = self.training
        return original

    def _before(self, owner: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._pass = None
        refuse_recording(kwargs, getattr(owner, "config", None))

    def _after(self, owner: nn.Module, _args: tuple[Any, ...], _result: Any) -> None:
        begun, self._pass = self._pass, None
        if begun is not None:
            raise ValueError(
                f"{type(owner).__name__} called the first {begun.next} of {len(self)} layers only; a parallelized list "
                "is evaluated as a whole; `restore` gives the plain list back"
            )

    def _called(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Layer `index` is called."""
        arguments = Arguments.split(self._layers[index], args, kwargs)
        if index == 0:
            self._pass = self._evaluate(arguments)
        else:
            self._check(index, arguments)
            assert self._pass is not None
            self._pass.next += 1
        begun = self._pass
        if begun.next == len(self):
            self._pass = None
        extras = begun.call.extras.get(index)
        return begun.y if extras is None else (begun.y, *extras)

    def _evaluate(self, arguments: Arguments) -> _Pass:
        arguments.refuse_caches()
        refuse_recording(arguments.kwargs)
        draws = any(part.training for part in self.modules())
        seed = int(torch.randint(2**62, (), device="cpu")) if draws else None
        call, tensors = Call.of(arguments, seed)
        return _Pass(arguments, call, self.stack(arguments.x, call, *tensors))

    def _check(self, index: int, arguments: Arguments) -> None:
        begun = self._pass
        if begun is None or begun.next != index:
            before = "on its own" if begun is None else f"after layer {begun.next - 1}"
            raise ValueError(
                f"layer {index} is called {before}; a parallelized list is evaluated as a whole when layer 0 is called "
                f"and then takes layers 1 to {len(self) - 1} in order, none left out; `restore` gives the plain list "
                "back"
            )
        if arguments.x is not begun.y:
            raise ValueError(
                f"layer {index} is not called with what layer {index - 1} returned; a module that changes the hidden "
                "state between its layers cannot be parallelized"
            )
        name = begun.arguments.difference(arguments)
        if name is not None:
            raise ValueError(
                f"layer {index} gets another value of {name} than layer 0; the layers of a parallelized list must get "
                "the same arguments"
            )


class _Item:
    """Stands for one layer of a parallelized list: the layer itself, but for being called."""

    __slots__ = ("_index", "_list")

    def __init__(self, layers: ParallelLayers, index: int) -> None:
        object.__setattr__(self, "_list", layers)
        object.__setattr__(self, "_index", index)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._list._called(self._index, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._list._layers[self._index], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._list._layers[self._index], name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copy.deepcopy(self._list._layers[self._index], memo)

    def __repr__(self) -> str:
        return repr(self._list._layers[self._index])


def _stack_of(layers: list[nn.Module], executor: DepthExecutor | None) -> Stack:
    return Stack([ForeignLayer(layer, index) for index, layer in enumerate(layers)], executor=executor)
