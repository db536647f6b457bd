"""What models of every task share: stem → trunk (serial stack or branches) → head.

Shapes: B batch, T tokens, D width, n prefixes, … the shape of one sample's logits.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from paradepth.branches import Aggregate, Branches
from paradepth.depth import Stack
from paradepth.models.initial import InitWeights, check_init_weights, initialise_weights_
from paradepth.models.pretrained import save_pretrained
from paradepth.nn import EncoderLayer


@dataclass(frozen=True)
class TrunkConfig:
    """What determines the shape of every model's trunk; a task's model adds its own fields.

    Attributes:
        width: D. heads: attention heads. mlp: hidden width of the feed-forward part.
        branches: number of branches; 0 makes the trunk a serial stack.
        depth: layers of each branch, or of the stack.
        aggregate: how branches are added up, "residual" or "sum".
        bias: whether linear maps have biases.
        dropout, attention_dropout: probabilities.
        step: h of every layer between the buffers; 1 is the ordinary Transformer.
        buffers: numbers of first and of last layers (of each branch, or of the stack) that take h = 1.
        deep_init: scale value, output and MLP projections by √(log 2L), L the number of layers in the trunk.
        init_weights: how fresh weights are drawn, see `initialise_weights_`.

    Raises:
        ValueError: naming the field, its value and what is allowed; what a layer or a stack can tell for itself is
            left to it.
    """

    width: int = 64
    heads: int = 2
    mlp: int = 256
    branches: int = 0
    depth: int = 8
    aggregate: Aggregate = "residual"
    bias: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    step: float = 1.0
    buffers: tuple[int, int] = (0, 0)
    deep_init: bool = False
    init_weights: InitWeights = "default"

    def __post_init__(self) -> None:
        object.__setattr__(self, "buffers", tuple(self.buffers))
        check_init_weights(self.init_weights)
        for name, least in (("branches", 0), ("depth", 1), ("width", 1), ("mlp", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        buffers = self.buffers
        if len(buffers) != 2 or not all(isinstance(number, int) and number >= 0 for number in buffers):
            raise ValueError(f"buffers is {buffers}; it must be two numbers of layers (first, last), each at least 0")

    @property
    def layers(self) -> int:
        """Number of layers in the trunk."""
        return max(self.branches, 1) * self.depth


class TrunkModel(nn.Module):
    """A model whose trunk is a serial stack or branches. A task's model says what its stem and its head are.

    Args:
        config: the shape.
    """

    model_type: ClassVar[str]
    config_class: ClassVar[type]
    causal: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.stem = self._new_stem()
        if config.branches == 0:
            self.trunk: Stack | Branches = self._new_stack()
        else:
            self.trunk = Branches([self._new_stack() for _ in range(config.branches)], aggregate=config.aggregate)
        self.head = self._new_head()
        initialise_weights_(self, config.init_weights, deep_init=config.layers if config.deep_init else None)

    @abstractmethod
    def _new_stem(self) -> Any:
        """Inputs to states (B, T, D); has `tokens`, the T of a full sample, and `flops()`."""

    @abstractmethod
    def _new_head(self) -> Any:
        """States (…, T, D) to logits, leading dimensions passed through; has `flops(tokens)`."""

    def _new_stack(self) -> Stack:
        c = self.config
        layers = [
            EncoderLayer(
                c.width,
                heads=c.heads,
                mlp=c.mlp,
                bias=c.bias,
                dropout=c.dropout,
                attention_dropout=c.attention_dropout,
                causal=self.causal,
                deep_init=c.layers if c.deep_init else None,
            )
            for _ in range(c.depth)
        ]
        return Stack(layers, step=c.step, buffers=c.buffers)

    @property
    def prefixes(self) -> int:
        """Number of prefix models: the branches, or 1 for a serial stack."""
        return len(self.trunk) if isinstance(self.trunk, Branches) else 1

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def check_whole(self) -> None:
        """Refuses a model some of whose layers are on other processes.

        Raises:
            ValueError: it is shared between processes.
        """
        if any(getattr(module, "is_elsewhere", False) for module in self.trunk.modules()):
            raise ValueError(
                "this process has only a part of the model, whose trunk is shared between processes; put the weights "
                "together with gather_tensors and load them into a new model"
            )

    def _branches(self, what: str) -> Branches:
        if not isinstance(self.trunk, Branches):
            raise ValueError(
                f"{what} needs a model with branches; this one is a serial stack of depth {self.trunk.depth}"
            )
        return self.trunk

    def embed(self, inputs: Any) -> tuple[Any, tuple[Any, ...]]:
        """The trunk's input, and what every layer gets besides it: an attention mask, say."""
        return self.stem(inputs), ()

    def decode(self, state: Any, inputs: Any) -> Tensor:
        """Logits (…, B, …) of the trunk's output; leading dimensions, of prefixes, pass through."""
        return self.head(state)

    def forward(self, inputs: Any, *, branches: int | None = None) -> Tensor:
        """Logits (B, …) of the prefix that uses the first `branches` branches (default: all).

        Raises:
            ValueError: inputs that the stem does not take, or a number of branches that the model does not have.
        """
        x, sides = self.embed(inputs)
        if isinstance(self.trunk, Branches):
            return self.decode(self.trunk(x, *sides, branches=branches), inputs)
        if branches not in (None, 1):
            self._branches(f"branches={branches}")
        return self.decode(self.trunk(x, *sides), inputs)

    def prefix_logits(self, inputs: Any, *, branches: int | None = None, detach: bool = False) -> Tensor:
        """Logits of prefixes 1..k from one evaluation of k branches, shape (k, B, …).

        Args:
            inputs: what `forward` takes.
            branches: k (default: all).
            detach: cut the gradient between a prefix and the ones before it (boosting).
        """
        if isinstance(self.trunk, Branches):
            x, sides = self.embed(inputs)
            return self.decode(self.trunk.prefix_states(x, *sides, branches=branches, detach=detach), inputs)
        return self.forward(inputs, branches=branches).unsqueeze(0)

    def contributions(self, inputs: Any) -> Tensor:
        """Relative size of each branch's contribution, ‖δ_i(x)‖ / ‖x‖, shape (n, B); (0, B) for a serial stack. Of a
        joined state (source, target) the target's."""
        x, sides = self.embed(inputs)
        last = x[-1] if isinstance(x, tuple) else x
        if not isinstance(self.trunk, Branches):
            return last.new_zeros(0, len(last))
        delta = self.trunk.contributions(x, *sides)
        delta = delta[-1] if isinstance(delta, tuple) else delta
        return delta.flatten(2).norm(dim=-1) / last.flatten(1).norm(dim=-1)

    def parts(self) -> dict[str, nn.Module]:
        """The parts that schedules treat as one: "stem", "branch1" … "branchn" (or "trunk"), "head"."""
        if isinstance(self.trunk, Branches):
            middle = {f"branch{i}": branch for i, branch in enumerate(self.trunk.branches, start=1)}
        else:
            middle = {"trunk": self.trunk}
        return {"stem": self.stem, **middle, "head": self.head}

    def truncate(self, branches: int) -> Self:
        """A new model made of the first `branches` branches; this one is left alone.

        Raises:
            ValueError: the model is serial, or does not have that many branches.
        """
        trunk = self._branches("truncate")
        if not 1 <= branches <= len(trunk):
            raise ValueError(
                f"branches is {branches}; this model has {len(trunk)}, so it must be between 1 and {len(trunk)}"
            )
        return self._resized(branches)

    def grow(self, branches: int, *, init: Literal["zero", "random"] = "zero") -> Self:
        """A new model with `branches` more branches; this one is left alone.

        Args:
            branches: how many to add, at least 1.
            init: "zero" gives the new branches zero output projections, so outputs are unchanged until they are
                trained; "random" initialises them like those of a new model, as the paper does.

        Raises:
            ValueError: the model is serial, nothing to add, or "zero" with aggregate "sum" (where a branch cannot add
                nothing).
        """
        trunk = self._branches("grow")
        if branches < 1:
            raise ValueError(f"branches is {branches}; at least one must be added")
        if init not in ("zero", "random"):
            raise ValueError(f"init is {init!r}; it must be 'zero' or 'random'")
        if init == "zero" and self.config.aggregate == "sum":
            raise ValueError(
                "aggregate 'sum' adds the input once per branch, so a new branch changes outputs; use init='random'"
            )
        new = self._resized(len(trunk) + branches)
        if init == "zero":
            for part in list(new.parts().values())[1 + len(trunk) : -1]:
                part.zero_output_()  # pyright: ignore[reportCallIssue]
        return new

    def _resized(self, branches: int) -> Self:
        self.check_whole()
        new = type(self)(dataclasses.replace(self.config, branches=branches))
        parameter = next(self.parameters())
        new = new.to(device=parameter.device, dtype=parameter.dtype)
        names = new.state_dict().keys()
        new.load_state_dict({k: v for k, v in copy.deepcopy(self.state_dict()).items() if k in names}, strict=False)
        return new.train(self.training)

    @property
    def tokens(self) -> Any:
        """T of a full sample, which operations are counted for; (S, T) for a joined state."""
        return self.stem.tokens

    def forward_flops(self, *, branches: int | None = None) -> int:
        """Floating-point operations of one forward pass over one full sample (a multiply-add counts two)."""
        tokens = self.tokens
        if isinstance(self.trunk, Branches):
            middle = self.trunk.flops(tokens, branches=branches)
        else:
            middle = self.trunk.flops(tokens)
        return self.stem.flops() + middle + self.head.flops(tokens)

    def save_pretrained(self, path: str | Path) -> Path:
        """Writes `config.json` and `model.safetensors` into the folder `path` (made if missing), each atomically."""
        return save_pretrained(self, path)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Builds the model that a `config.json` describes, with fresh weights.

        Raises:
            ValueError: unknown or invalid fields.
        """
        return cls(cls.read_config(config))

    @classmethod
    def read_config(cls, config: dict[str, Any]) -> Any:
        """The shape that a `config.json` describes.

        Raises:
            ValueError: unknown or invalid fields.
        """
        known = {f.name for f in dataclasses.fields(cls.config_class)}
        unknown = sorted(set(config) - known)
        if unknown:
            raise ValueError(f"unknown model options {unknown}; known are {sorted(known)}")
        return cls.config_class(**config)
