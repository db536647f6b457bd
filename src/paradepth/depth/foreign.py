"""Layers of other libraries as layers of a `Stack`: F(x) = Φ(x) − x with h = 1, extra arguments passed through.

Shapes: the hidden state is one tensor of any shape that the layers keep.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params", "cache")
_RECORDS = ("output_hidden_states", "output_attentions")
_TENSOR = object()  # stands for a tensor among the leaves of a call


class NotKept:
    """Stands for what a layer returned besides its hidden state, which an executor does not keep."""

    def __repr__(self) -> str:
        return "<not kept: only the hidden state passes through a parallelized list of layers>"


@dataclass(eq=False)
class Call:
    """What every layer of a list gets in one forward pass besides the hidden state. The first of its side inputs; the
    tensors inside follow as side inputs of their own, so that gradients flow to them.

    Attributes:
        leaves: the arguments flattened, with a mark where a tensor was.
        spec: how they nest.
        name: keyword under which the hidden state is handed over, None where it is the first argument.
        seed: of the random numbers that layers draw in this pass; None: they draw none.
        extras: what each layer returned last besides the hidden state, by index; None where it returned just that.
    """

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    name: str | None
    seed: int | None
    extras: dict[int, tuple[Any, ...] | None] = field(default_factory=dict)

    @classmethod
    def of(cls, arguments: Arguments, seed: int | None) -> tuple[Call, list[Tensor]]:
        """A call and the tensors in it."""
        leaves, spec = pytree.tree_flatten((arguments.args, arguments.kwargs), is_leaf=is_cache)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        marked = tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return cls(marked, spec, arguments.name, seed), tensors

    def arguments(self, x: Tensor, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a layer."""
        rest = iter(tensors)
        leaves = [next(rest) if leaf is _TENSOR else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return ((x, *args), kwargs) if self.name is None else (tuple(args), {self.name: x, **kwargs})


@dataclass(frozen=True)
class Arguments:
    """The arguments of a layer: hidden state, and the rest."""

    x: Tensor
    name: str | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def split(cls, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Finds the hidden state: the first positional argument, or what is given for the first parameter.

        Raises:
            ValueError: there is none, or it is not a floating-point tensor.
        """
        kwargs = dict(kwargs)
        name = None
        if args:
            x, args = args[0], args[1:]
        else:
            name = next(iter(inspect.signature(layer.forward).parameters), None)
            x = kwargs.pop(name, None) if name is not None else None
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise ValueError(
                f"{type(layer).__name__} is called with {kind} as its first argument; a parallelized list of layers "
                "takes the hidden state there, a floating-point tensor"
            )
        return cls(x, name, args, kwargs)

    def difference(self, other: Arguments) -> str | None:
        """The name of an argument that differs, None if all are the same."""
        mine, theirs = self._named(), other._named()
        if mine.keys() != theirs.keys():
            return sorted(mine.keys() ^ theirs.keys())[0]
        return next((name for name, value in mine.items() if not _same(value, theirs[name])), None)

    def refuse_caches(self) -> None:
        """Refuses to have a cache filled by evaluations that happen more than once.

        Raises:
            ValueError: which argument it is.
        """
        for name, value in self._named().items():
            leaves = pytree.tree_leaves(value, is_leaf=is_cache)
            if (name in _CACHES and value is not None) or any(map(is_cache, leaves)) or (name == "use_cache" and value):
                raise ValueError(
                    f"the layers get a cache of keys and values ({name} is "
                    f"{value if isinstance(value, bool) else type(value).__name__}), which repeated evaluations would "
                    "fill with wrong entries; call the model with use_cache=False, or set config.use_cache = False"
                )

    def _named(self) -> dict[str, Any]:
        return {**{f"argument {i}": value for i, value in enumerate(self.args, start=1)}, **self.kwargs}


def is_cache(value: Any) -> bool:
    """Whether a value is a cache of keys and values, as text generation uses it."""
    return callable(getattr(value, "get_seq_length", None)) and callable(getattr(value, "update", None))


def refuse_recording(kwargs: dict[str, Any], config: Any = None) -> None:
    """Refuses to record what happens inside the layers.

    Args:
        kwargs: keyword arguments of a module or layer.
        config: what holds the defaults, if anything does.

    Raises:
        ValueError: hidden states or attention weights are asked for.
    """
    for name in _RECORDS:
        given = kwargs.get(name)
        if given if given is not None else getattr(config, name, False):
            raise ValueError(
                f"{name} is {given if given is not None else 'set in the config'}; layers of a parallelized list are "
                "evaluated several times and out of order, so it must be False; `restore` gives the plain list back"
            )


def _same(a: Any, b: Any) -> bool:
    leaves, spec = pytree.tree_flatten(a, is_leaf=is_cache)
    others, other_spec = pytree.tree_flatten(b, is_leaf=is_cache)
    return spec == other_spec and all(map(_same_leaf, leaves, others))


def _same_leaf(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):  # equal values do for constants; gradients need the tensor
        return not (a.requires_grad or b.requires_grad) and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


class ForeignLayer(nn.Module):
    """A layer Φ of another library as a layer of a `Stack`.

    Args:
        layer: maps hidden states to hidden states of the same shape; it may return a tuple whose first entry that is.
        index: its place, which tells its random numbers from those of the other layers.

    >>> tanh = ForeignLayer(nn.Tanh(), 0)
    >>> x = torch.randn(2, 3)
    >>> bool(torch.equal(tanh(x), x.tanh())), bool(torch.equal(tanh.residual(x), x.tanh() - x))
    (True, True)
    """

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        self.layer, self.index = layer, index

    def residual(self, x: Tensor, *inputs: Any) -> Tensor:
        """F(x) = Φ(x) − x. `inputs` are a `Call` and the tensors in it, or the layer's further arguments."""
        return self._map(x, inputs) - x

    def forward(self, x: Tensor, *inputs: Any, step: float = 1.0) -> Tensor:
        """x + step · F(x); Φ(x) itself where the step is 1."""
        return self._map(x, inputs) if step == 1.0 else x + step * self.residual(x, *inputs)

    def flops(self, tokens: Any) -> int:
        """Floating-point operations of one evaluation for one sample (a multiply-add counts two): those of products
        with its matrices. What a layer multiplies besides, such as attention weights, is not known from outside."""
        return 2 * tokens * sum(p.numel() for p in self.layer.parameters() if p.dim() == 2)

    def _map(self, x: Tensor, inputs: tuple[Any, ...]) -> Tensor:
        call = inputs[0] if inputs and isinstance(inputs[0], Call) else None
        args, kwargs = call.arguments(x, inputs[1:]) if call is not None else ((x, *inputs), {})
        seed = call.seed if call is not None else None
        version = None if x.is_inference() else x._version
        with nullcontext() if seed is None else random_numbers_of(seed, self.index, x.device):
            y = self.layer(*args, **kwargs)
        if version is not None and x._version != version:
            raise ValueError(
                f"layer {self.index} ({type(self.layer).__name__}) changes the hidden state it is given in place; the "
                "layers of a parallelized list must leave it as it is"
            )
        extras: tuple[Any, ...] | None = None
        if isinstance(y, tuple | list) and y:
            y, extras = y[0], tuple(None if entry is None else NotKept() for entry in y[1:])
        if call is not None:
            call.extras[self.index] = extras
        if not isinstance(y, Tensor):
            raise ValueError(
                f"layer {self.index} ({type(self.layer).__name__}) returns a {type(y).__name__}; it must return the "
                "hidden state, or a tuple whose first entry is the hidden state"
            )
        if y.shape != x.shape:
            raise ValueError(
                f"layer {self.index} ({type(self.layer).__name__}) maps a hidden state of shape {tuple(x.shape)} to "
                f"{tuple(y.shape)}; the layers of a parallelized list must keep the shape"
            )
        return y


@contextmanager
def random_numbers_of(seed: int, index: int, device: torch.device) -> Iterator[None]:
    """The global random stream inside is that of (seed, index), and untouched afterwards.

    >>> with random_numbers_of(1, 2, torch.device("cpu")):
    ...     a = torch.rand(3)
    >>> with random_numbers_of(1, 2, torch.device("cpu")):
    ...     b = torch.rand(3)
    >>> bool(torch.equal(a, b))
    True
    """
    own = int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest(), "little") >> 1
    state = torch.get_rng_state()
    accelerator = torch.get_device_module(device) if device.type != "cpu" else None
    accelerator_state = accelerator.get_rng_state(device) if accelerator is not None else None
    try:
        torch.default_generator.manual_seed(own)
        if accelerator is not None:
            with accelerator.device(device):
                accelerator.manual_seed(own)
        yield
    finally:
        torch.set_rng_state(state)
        if accelerator is not None:
            accelerator.set_rng_state(accelerator_state, device)
