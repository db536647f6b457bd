"""Named model shapes."""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase
from typing import Any

from paradepth.models.image_classifier import ImageClassifier, ImageClassifierConfig

_SIZES: dict[str, dict[str, int]] = {
    "nano": {"width": 64, "heads": 2, "mlp": 256},
    "pico": {"width": 96, "heads": 3, "mlp": 384},
    "tiny": {"width": 192, "heads": 3, "mlp": 768},
    "small": {"width": 384, "heads": 6, "mlp": 1536},
}

_MODELS: dict[str, dict[str, Any]] = {
    **{f"paraformer_{size}": {**shape, "branches": 4, "depth": 2} for size, shape in _SIZES.items()},
    **{f"vit_{size}": {**shape, "depth": 12 if size in ("tiny", "small") else 8} for size, shape in _SIZES.items()},
    # The shape of the authors' public code: ViT-Tiny width, 8 branches of 2 layers, plain sum, class token, dropout
    # 0.1.
    "paraformer_tiny_8x2_224": {
        **_SIZES["tiny"],
        "branches": 8,
        "depth": 2,
        "image_size": 224,
        "patch_size": 16,
        "aggregate": "sum",
        "pool": "cls",
        "dropout": 0.1,
        "attention_dropout": 0.1,
    },
}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the registered models that match a shell pattern, sorted.

    >>> list_models("paraformer_tiny*")
    ['paraformer_tiny', 'paraformer_tiny_8x2_224']
    """
    return sorted(name for name in _MODELS if fnmatchcase(name, pattern))


def model_config(name: str, **options: Any) -> ImageClassifierConfig:
    """The configuration of a registered model with some options replaced.

    Raises:
        ValueError: unknown model or option, a serial model with branches, or a ParaFormer with none.
    """
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(list_models())}")
    known = {field.name for field in dataclasses.fields(ImageClassifierConfig)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"unknown options {unknown} for {name}; known are {', '.join(sorted(known))}")
    merged = {**_MODELS[name], **options}
    serial = "branches" not in _MODELS[name]
    if serial and merged.get("branches", 0) != 0:
        raise ValueError(f"branches is {merged['branches']} but {name} is a serial model; use a paraformer")
    if not serial and merged["branches"] < 1:
        raise ValueError(f"branches is {merged['branches']}; {name} needs at least 1 (a serial model is called vit_…)")
    return ImageClassifierConfig(**merged)


def create_model(name: str, **options: Any) -> ImageClassifier:
    """Builds a registered model with fresh weights.

    Args:
        name: see `list_models`.
        options: fields of `ImageClassifierConfig` to replace, such as image_size, patch_size, channels, num_classes,
            branches,
            depth, pool or dropout.

    Raises:
        ValueError: unknown model or option, or a value out of range.

    >>> import torch
    >>> create_model("vit_nano", image_size=28, patch_size=7, channels=1)(torch.rand(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    return ImageClassifier(model_config(name, **options))
