"""Image classification: patch stem → trunk (serial stack or branches) → classifier head.

Shapes: B batch, C channels, H, W image height and width, N classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from paradepth.models.base import TrunkModel
from paradepth.models.pretrained import register_model_type
from paradepth.models.shape import TrunkConfig
from paradepth.nn import ClassifierHead, PatchStem
from paradepth.nn.heads import Pool
from paradepth.nn.stem import Embedding


def _pair(name: str, value: int | tuple[int, ...] | list[int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) for v in pair):
        raise ValueError(f"{name} is {value!r}; it must be a whole number or two of them (height, width)")
    return pair[0], pair[1]


@dataclass(frozen=True)
class ImageClassifierConfig(TrunkConfig):
    """Everything that determines the shape of an `ImageClassifier`: the fields of `TrunkConfig`, and

    Attributes:
        image_size: (H, W) in pixels; one number for both.
        patch_size: (height, width) of a patch; one number for both.
        embedding: of a patch, "linear" or "convolutions".
        channels: 1 for grey images, 3 for colour.
        num_classes: N.
        pool: "mean" over tokens or a "cls" token.
        class_names: names of the classes, empty when unknown.

    Raises:
        ValueError: values outside the ranges above.
    """

    image_size: tuple[int, int] = (32, 32)
    patch_size: tuple[int, int] = (4, 4)
    embedding: Embedding = "linear"
    channels: int = 3
    num_classes: int = 10
    width: int = 192
    heads: int = 3
    mlp: int = 768
    pool: Pool = "mean"
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", _pair("image_size", self.image_size))
        object.__setattr__(self, "patch_size", _pair("patch_size", self.patch_size))
        object.__setattr__(self, "class_names", tuple(self.class_names))
        super().__post_init__()
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for num_classes {self.num_classes}")


@register_model_type("image_classifier")
class ImageClassifier(TrunkModel):
    """A ViT (serial stack) or a ParaFormer (branches) for images: float images (B, C, H, W) in [0, 1] to logits (B, N).

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
    config_class = ImageClassifierConfig

    config: ImageClassifierConfig
    stem: PatchStem
    head: ClassifierHead

    def _new_stem(self) -> PatchStem:
        c = self.config
        return PatchStem(
            c.image_size,
            c.patch_size,
            channels=c.channels,
            width=c.width,
            class_token=c.pool == "cls",
            dropout=c.dropout,
            embedding=c.embedding,
        )

    def _new_head(self) -> ClassifierHead:
        return ClassifierHead(self.config.width, self.config.num_classes, pool=self.config.pool)
