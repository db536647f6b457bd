"""Image classification: patch stem → trunk (serial stack or branches) → classifier head.

Shapes: B batch, C channels, H, W image height and width, T tokens, D width, N classes, n prefixes.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from paradepth.branches import Aggregate, Branches
from paradepth.depth import Stack
from paradepth.models.pretrained import register_model_type, save_pretrained
from paradepth.nn import ClassifierHead, EncoderLayer, PatchStem
from paradepth.nn.heads import Pool


def _pair(name: str, value: int | tuple[int, ...] | list[int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) for v in pair):
        raise ValueError(f"{name} is {value!r}; it must be a whole number or two of them (height, width)")
    return pair[0], pair[1]


@dataclass(frozen=True)
class ImageClassifierConfig:
    """Everything that determines the shape of an `ImageClassifier`.

    Attributes:
        image_size: (H, W) in pixels; one number for both.
        patch_size: (height, width) of a patch; one number for both.
        channels: 1 for grey images, 3 for colour.
        num_classes: N.
        width: D. heads: attention heads. mlp: hidden width of the feed-forward part.
        branches: number of branches; 0 makes the trunk a serial stack.
        depth: layers of each branch, or of the stack.
        aggregate: how branches are added up, "residual" or "sum".
        pool: "mean" over tokens or a "cls" token.
        bias: whether linear maps have biases.
        dropout, attention_dropout: probabilities.
        step: h of every layer; 1 is the ordinary Transformer.
        deep_init: scale value, output and MLP projections by √(log 2L), L the number of layers in the trunk.
        class_names: names of the classes, empty when unknown.

    Raises:
        ValueError: values outside the ranges above.
    """

    image_size: tuple[int, int] = (32, 32)
    patch_size: tuple[int, int] = (4, 4)
    channels: int = 3
    num_classes: int = 10
    width: int = 192
    heads: int = 3
    mlp: int = 768
    branches: int = 0
    depth: int = 8
    aggregate: Aggregate = "residual"
    pool: Pool = "mean"
    bias: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    step: float = 1.0
    deep_init: bool = False
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", _pair("image_size", self.image_size))
        object.__setattr__(self, "patch_size", _pair("patch_size", self.patch_size))
        object.__setattr__(self, "class_names", tuple(self.class_names))
        for name, least in (("branches", 0), ("depth", 1), ("width", 1), ("mlp", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for num_classes {self.num_classes}")

    @property
    def layers(self) -> int:
        """Number of layers in the trunk."""
        return max(self.branches, 1) * self.depth


@register_model_type("image_classifier")
class ImageClassifier(nn.Module):
    """A ViT (serial stack) or a ParaFormer (branches) for images.

    A ParaFormer of one branch computes what a ViT of the same depth and weights computes.

    Args:
        config: the shape.

    >>> import torch
    >>> model = ImageClassifier(ImageClassifierConfig(image_size=8, patch_size=2, channels=1, width=16, heads=2, mlp=32,
    ...                                               branches=3, depth=1))
    >>> images = torch.rand(2, 1, 8, 8)
    >>> bool(torch.allclose(model.truncate(2)(images), model(images, branches=2), atol=1e-6))
    True
    """

    model_type = "image_classifier"

    def __init__(self, config: ImageClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = PatchStem(
            config.image_size,
            config.patch_size,
            channels=config.channels,
            width=config.width,
            class_token=config.pool == "cls",
            dropout=config.dropout,
        )
        if config.branches == 0:
            self.trunk: Stack | Branches = self._new_stack()
        else:
            self.trunk = Branches([self._new_stack() for _ in range(config.branches)], aggregate=config.aggregate)
        self.head = ClassifierHead(config.width, config.num_classes, pool=config.pool)

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
                deep_init=c.layers if c.deep_init else None,
            )
            for _ in range(c.depth)
        ]
        return Stack(layers, step=c.step)

    @property
    def prefixes(self) -> int:
        """Number of prefix models: the branches, or 1 for a serial stack."""
        return len(self.trunk) if isinstance(self.trunk, Branches) else 1

    def _branches(self, what: str) -> Branches:
        if not isinstance(self.trunk, Branches):
            raise ValueError(
                f"{what} needs a model with branches; this one is a serial stack of depth {self.trunk.depth}"
            )
        return self.trunk

    def forward(self, images_BCHW: Tensor, *, branches: int | None = None) -> Tensor:
        """Logits (B, N) of float images in [0, 1], using the first `branches` branches (default: all).

        Raises:
            ValueError: images of another shape than the model's, or a number of branches that it does not have.
        """
        x_BTD = self.stem(images_BCHW)
        if isinstance(self.trunk, Branches):
            return self.head(self.trunk(x_BTD, branches=branches))
        if branches not in (None, 1):
            self._branches(f"branches={branches}")
        return self.head(self.trunk(x_BTD))

    def prefix_logits(self, images_BCHW: Tensor, *, branches: int | None = None, detach: bool = False) -> Tensor:
        """Logits of prefixes 1..k from one evaluation of k branches, shape (k, B, N).

        Args:
            images_BCHW: float images in [0, 1].
            branches: k (default: all).
            detach: cut the gradient between a prefix and the ones before it (boosting).
        """
        if isinstance(self.trunk, Branches):
            states = self.trunk.prefix_states(self.stem(images_BCHW), branches=branches, detach=detach)
            return self.head(states)
        return self.forward(images_BCHW, branches=branches).unsqueeze(0)

    def contributions(self, images_BCHW: Tensor) -> Tensor:
        """Relative size of each branch's contribution, ‖δ_i(x)‖ / ‖x‖, shape (n, B); (0, B) for a serial stack."""
        x_BTD = self.stem(images_BCHW)
        if not isinstance(self.trunk, Branches):
            return x_BTD.new_zeros(0, len(x_BTD))
        return self.trunk.contributions(x_BTD).flatten(2).norm(dim=-1) / x_BTD.flatten(1).norm(dim=-1)

    def parts(self) -> dict[str, nn.Module]:
        """The parts that schedules treat as one: "stem", "branch1" … "branchn" (or "trunk"), "head"."""
        if isinstance(self.trunk, Branches):
            middle = {f"branch{i}": branch for i, branch in enumerate(self.trunk.branches, start=1)}
        else:
            middle = {"trunk": self.trunk}
        return {"stem": self.stem, **middle, "head": self.head}

    def truncate(self, branches: int) -> ImageClassifier:
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

    def grow(self, branches: int, *, init: Literal["zero", "random"] = "zero") -> ImageClassifier:
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

    def _resized(self, branches: int) -> ImageClassifier:
        new = ImageClassifier(dataclasses.replace(self.config, branches=branches))
        parameter = next(self.parameters())
        new = new.to(device=parameter.device, dtype=parameter.dtype)
        names = new.state_dict().keys()
        new.load_state_dict({k: v for k, v in copy.deepcopy(self.state_dict()).items() if k in names}, strict=False)
        return new.train(self.training)

    def forward_flops(self, *, branches: int | None = None) -> int:
        """Floating-point operations of one forward pass over one image (a multiply-add counts two)."""
        tokens = self.stem.tokens
        if isinstance(self.trunk, Branches):
            middle = self.trunk.flops(tokens, branches=branches)
        else:
            middle = self.trunk.flops(tokens)
        return self.stem.flops() + middle + self.head.flops()

    def save_pretrained(self, path: str | Path) -> Path:
        """Writes `config.json` and `model.safetensors` into the folder `path` (made if missing), each atomically."""
        return save_pretrained(self, path)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ImageClassifier:
        """Builds the model that a `config.json` describes, with fresh weights.

        Raises:
            ValueError: unknown or invalid fields.
        """
        known = {f.name for f in dataclasses.fields(ImageClassifierConfig)}
        unknown = sorted(set(config) - known)
        if unknown:
            raise ValueError(f"unknown model options {unknown}; known are {sorted(known)}")
        return cls(ImageClassifierConfig(**config))
