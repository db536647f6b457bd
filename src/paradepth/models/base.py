"""What models of every task share: stem → trunk (serial stack or branches) → head.

Shapes: B batch, T tokens, D width, n prefixes, … the shape of one sample's logits.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from paradepth.branches import Branches, Gate
from paradepth.depth import Stack
from paradepth.depth.as_branches import Groups
from paradepth.models.classes import carry_over, with_classes, without_classes
from paradepth.models.convert import converted
from paradepth.models.initial import initialise_weights_
from paradepth.models.pretrained import save_pretrained
from paradepth.models.quantised import Quantisation
from paradepth.models.sharing import check_starts_at_zero, tie_layers_
from paradepth.nn import EncoderLayer


class TrunkModel(nn.Module):
    """A model whose trunk is a serial stack or branches. A task's model says what its stem and its head are.

    Args:
        config: the shape.

    Attributes:
        quantisation: how the model is quantised; None for one in floating point.
    """

    model_type: ClassVar[str]
    config_class: ClassVar[type]
    causal: ClassVar[bool] = False
    quantisation: Quantisation | None = None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.stem = self._new_stem()
        if config.branches == 0:
            self.trunk: Stack | Branches = self._new_stack(config.depth)
        else:
            depths = config.branch_depths
            stacks = [self._new_stack(depth, sum(depths[:i])) for i, depth in enumerate(depths)]
            gated = config.aggregate == "gated"
            # The mean over a sample's tokens would tell those of a causal trunk what comes after them.
            gates = [Gate(config.width, per="token" if self.causal else "sample") for _ in stacks] if gated else None
            self.trunk = Branches(stacks, aggregate=config.aggregate, gates=gates)
        self.head = self._new_head()
        initialise_weights_(self, config.init_weights, deep_init=config.layers if config.deep_init else None)
        tie_layers_(self, config.share)

    @abstractmethod
    def _new_stem(self) -> Any:
        """Inputs to states (B, T, D); has `tokens`, the T of a full sample, and `flops()`."""

    @abstractmethod
    def _new_head(self) -> Any:
        """States (…, T, D) to logits, leading dimensions passed through; has `flops(tokens)`."""

    def _new_stack(self, depth: int, first: int = 0) -> Stack:
        """A fresh stack of `depth` layers, of which the first has the number `first` in the trunk."""
        c = self.config
        static: dict[str, Any] = {}
        if c.mixing == "static":
            static = {"mixing": "static", "tokens": self.stem.tokens, "mixing_rank": c.mixing_rank}
        kinds = [c.mixing_of(number) for number in range(first, first + depth)]
        layers = [self._new_layer(**(static if kind == "static" else {})) for kind in kinds]
        return Stack(layers, step=c.step, buffers=c.buffers)

    def _new_layer(self, **options: Any) -> nn.Module:
        """A fresh layer of the trunk; a model with layers of its own replaces it.

        Args:
            options: of `EncoderLayer`, of a layer that differs from the others.
        """
        c = self.config
        return EncoderLayer(
            c.width,
            heads=c.heads,
            head_width=c.head_width,
            mlp=c.mlp,
            bias=c.bias,
            dropout=c.dropout,
            attention_dropout=c.attention_dropout,
            causal=self.causal,
            deep_init=c.layers if c.deep_init else None,
            **options,
        )

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

    def gates(self, inputs: Any, *, branches: int | None = None) -> Tensor:
        """α_1 … α_k of the first `branches` branches (default: all) for each sample, (k, B), or of a causal model for
        each token, (k, B, T); aggregate "gated".

        Raises:
            ValueError: a model without gates.

        >>> from paradepth import create_model
        >>> model = create_model("paraformer_nano", branches=3, depth=1, aggregate="gated")
        >>> model.gates(torch.rand(2, 3, 32, 32)).tolist()
        [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
        """
        trunk = self._branches("gates")
        x, sides = self.embed(inputs)
        return trunk.gates(x, *sides, branches=branches)

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
        return self.select(range(branches))

    def select(self, branches: Sequence[int]) -> Self:
        """A new model made of some branches; this one is left alone. `truncate(k)` is `select(range(k))`.

        Args:
            branches: their numbers, counted from 0, in the order that they have in the new model; each at most once.

        Raises:
            ValueError: the model is serial, no branches, or numbers that it does not have or that repeat.

        >>> from paradepth import create_model
        >>> model = create_model("paraformer_nano", branches=3, depth=1)
        >>> len(model.select([2, 0]).trunk)
        2
        """
        trunk = self._branches("select")
        chosen = list(branches)
        if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(len(trunk))):
            raise ValueError(
                f"branches is {chosen}; it must be at least one of 0 to {len(trunk) - 1}, each at most once"
            )
        self.check_whole()
        new = self.fresh(self.config.with_chosen(chosen))
        stem, *stacks, head = self.parts().values()
        for part, source in zip(new.parts().values(), [stem, *(stacks[i] for i in chosen), head], strict=True):
            # Integers take the place of the new weights; others are copied.
            part.load_state_dict(copy.deepcopy(source.state_dict()), assign=self.quantisation is not None)
        if self.quantisation is not None:
            new.quantisation = self.quantisation
            new.requires_grad_(False)
        return new.train(self.training)

    def grow(
        self,
        branches: int = 0,
        *,
        depth: int | None = None,
        classes: Sequence[str] | int = (),
        init: Literal["zero", "random"] = "zero",
    ) -> Self:
        """A new model with more branches, more classes or both; this one is left alone. `drop` is the inverse.

        Logits of the old classes do not change until something is trained. That of a new class is at first the mean of
        theirs, so predictions do not change either.

        Args:
            branches: how many to add.
            depth: layers of each new branch; None: as many as the first one has.
            classes: names of the classes to add behind the old ones; their number, where the old ones have no names.
            init: "zero" gives the new branches zero output projections, so outputs are unchanged until they are
                trained; "random" initialises them like those of a new model, as the paper does.

        Raises:
            ValueError: nothing to add; branches for a serial model; classes for a model that has none, or that
                collide; "zero" with aggregate "sum" or layers that the old branches use as well (where a branch cannot
                add nothing); or a quantised model.

        >>> from paradepth import create_model
        >>> model = create_model("paraformer_nano", branches=2, depth=2, num_classes=2, class_names=("cat", "dog"))
        >>> larger = model.grow(1, depth=1, classes=["fox"])
        >>> larger.config.branch_depths, larger.config.class_names
        ((2, 2, 1), ('cat', 'dog', 'fox'))
        >>> larger.drop(1, classes=1).config == model.config
        True
        """
        if branches < 0 or (depth is not None and depth < 1):
            raise ValueError(f"branches is {branches} and depth {depth}; they must be at least 0 and at least 1")
        if init not in ("zero", "random"):
            raise ValueError(f"init is {init!r}; it must be 'zero' or 'random'")
        if branches == 0 and not classes:
            raise ValueError("nothing to grow: give a number of branches, classes, or both")
        if branches == 0 and depth is not None:
            raise ValueError(f"depth is {depth}, and no branch is to be added")
        config = self.config
        if branches:
            self._branches("growing branches")
            if init == "zero" and config.aggregate == "sum":
                raise ValueError(
                    "aggregate 'sum' adds the input once per branch, so a new branch changes outputs; use init='random'"
                )
            if init == "zero":
                check_starts_at_zero(config.share, "init='random'")
            config = config.with_branches(config.branch_depths + (depth or config.depth,) * branches)
        new = self._resized(with_classes(config, classes, model_type=self.model_type))
        if branches and init == "zero":
            for part in list(new.parts().values())[-1 - branches : -1]:
                part.zero_output_()  # pyright: ignore[reportCallIssue]
        return new

    def drop(self, branches: int = 0, *, classes: int = 0) -> Self:
        """A new model without the last `branches` branches and the last `classes` classes; this one is left alone.

        What is kept is kept bit for bit: of a model that grew, and whose old parts were frozen, the model before.

        Raises:
            ValueError: nothing to drop, or nothing that would be left.
        """
        if branches < 0 or classes < 0 or branches + classes == 0:
            raise ValueError(
                f"branches is {branches} and classes {classes}; they are numbers to drop, at least one of them above 0"
            )
        config = self.config
        if branches:
            left = len(self._branches("dropping branches")) - branches
            if left < 1:
                raise ValueError(f"branches is {branches}; this model has {left + branches}, and one must be left")
            config = config.with_branches(config.branch_depths[:left])
        return self._resized(without_classes(config, classes, model_type=self.model_type))

    def convert(self, branches: int, *, groups: Groups = "consecutive") -> Self:
        """A new model whose layers are shared out among branches of the same input; this one is left alone. See
        `paradepth.convert`.

        Args:
            branches: how many; 1 or 0 makes a serial stack of branches again (0 without `Branches` around it).
            groups: which layers make a branch: "consecutive" or "interleaved".

        Raises:
            ValueError: more branches than layers, or a model that cannot be converted.
        """
        return converted(self, branches, groups=groups)

    def fresh(self, config: Any) -> Self:
        """A model of shape `config` with fresh weights, of this one's device and number format."""
        parameter = next(self.parameters())
        return type(self)(config).to(device=parameter.device, dtype=parameter.dtype)

    @torch.no_grad()
    def _resized(self, config: Any) -> Self:
        """A model of shape `config` with the weights of this one, as far as both have them."""
        self.check_whole()
        if self.quantisation is not None:
            raise ValueError(
                f"the model is quantised ({self.quantisation.method}), which can be truncated and no more; resize the "
                "one in float32 that it was made from"
            )
        new = self.fresh(config)
        mine, theirs = self.state_dict(), new.state_dict()
        for name, value in theirs.items():
            if name in mine:
                carry_over(mine[name], value)
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

    def save_pretrained(self, path: str | Path, *, packed: bool = False) -> Path:
        """Writes `config.json` and `model.safetensors` into the folder `path` (made if missing), each atomically.

        With `packed`, weights with many zeros are stored without them; `from_pretrained` gives them back.
        """
        return save_pretrained(self, path, packed=packed)

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
