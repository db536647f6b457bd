"""Named model shapes."""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase
from typing import Any

from paradepth.models.base import TrunkModel
from paradepth.models.causal_lm import CausalLM
from paradepth.models.hf_classifier import HFClassifier
from paradepth.models.image_classifier import ImageClassifier
from paradepth.models.masked_lm import MaskedLM
from paradepth.models.sequence_classifier import SequenceClassifier
from paradepth.models.tagger import Tagger
from paradepth.models.translator import Translator

_SIZES: dict[str, dict[str, int]] = {
    "nano": {"width": 64, "heads": 2, "mlp": 256},
    "pico": {"width": 96, "heads": 3, "mlp": 384},
    "tiny": {"width": 192, "heads": 3, "mlp": 768},
    "small": {"width": 384, "heads": 6, "mlp": 1536},
}

_IMAGE_CLASSIFIERS: dict[str, dict[str, Any]] = {
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

_CAUSAL_LMS: dict[str, dict[str, Any]] = {
    "gpt_nano": {**_SIZES["nano"], "depth": 8},
    # Deep and narrow, as an ODE in depth: layers for layer-parallel training. Source of the step and of the buffers:
    # Layer-Parallel Training for Transformers (arXiv 2601.09026).
    "gpt_mini": {"width": 128, "heads": 4, "mlp": 512, "depth": 32, "step": 1 / 28, "buffers": (2, 2)},
    # The smallest published GPT-2.
    "gpt2": {"width": 768, "heads": 12, "mlp": 3072, "depth": 12, "vocab_size": 50257, "context": 1024},
}

_TRANSLATORS: dict[str, dict[str, Any]] = {
    "translator_nano": {**_SIZES["nano"], "depth": 2},
    "translator_mini": {"width": 128, "heads": 4, "mlp": 512, "depth": 3},
    # The size of the translation runs of Layer-Parallel Training for Transformers (arXiv 2601.09026).
    "translator_base": {"width": 512, "heads": 8, "mlp": 2048, "depth": 6, "context": 274},
}

_TAGGERS: dict[str, dict[str, Any]] = {
    "tagger_nano": {**_SIZES["nano"], "depth": 2},
    "tagger_mini": {"width": 128, "heads": 4, "mlp": 256, "depth": 4},
    # Deep and narrow, as an ODE in depth: layers for layer-parallel training.
    "tagger_deep": {"width": 64, "heads": 2, "mlp": 128, "depth": 12, "step": 1 / 8, "buffers": (2, 2)},
    # The morphological classification of Layer-Parallel Training for Transformers (arXiv 2601.09026); its step is not
    # stated, and taken so that the depth is a unit of time.
    "tagger_gum": {
        "width": 128,
        "heads": 1,
        "mlp": 128,
        "depth": 64,
        "step": 1 / 64,
        "context": 2048,
        "neighbours": False,
    },
}

_MASKED_LMS: dict[str, dict[str, Any]] = {
    "bert_nano": {**_SIZES["nano"], "depth": 4},
    "bert_mini": {"width": 128, "heads": 4, "mlp": 512, "depth": 4},
    # The smallest published BERT, here with normalisation at the start of a layer.
    "bert_base": {"width": 768, "heads": 12, "mlp": 3072, "depth": 12, "vocab_size": 30522, "pad": 0, "context": 512},
}

_SEQUENCE_CLASSIFIERS: dict[str, dict[str, Any]] = {
    f"text_classifier_{size}": {key: value for key, value in _MASKED_LMS[f"bert_{size}"].items() if key != "vocab_size"}
    for size in ("nano", "mini", "base")
}

_MODELS: dict[str, tuple[type[TrunkModel], dict[str, Any]]] = {
    **{name: (ImageClassifier, shape) for name, shape in _IMAGE_CLASSIFIERS.items()},
    **{name: (CausalLM, shape) for name, shape in _CAUSAL_LMS.items()},
    **{name: (MaskedLM, shape) for name, shape in _MASKED_LMS.items()},
    **{name: (SequenceClassifier, shape) for name, shape in _SEQUENCE_CLASSIFIERS.items()},
    "hf_classifier": (HFClassifier, {}),
    **{name: (Tagger, shape) for name, shape in _TAGGERS.items()},
    **{name: (Translator, shape) for name, shape in _TRANSLATORS.items()},
}


def register_model(name: str, cls: type[TrunkModel], **shape: Any) -> None:
    """Makes a shape of your own known by name: to `create_model`, and so to training and the command line.

    Args:
        name: a new one.
        cls: class of the model, one of paradepth's or your own.
        shape: fields of its configuration; the others keep their defaults.

    Raises:
        ValueError: the name is taken, or fields that the configuration does not have.

    >>> register_model("gpt_nano", CausalLM, depth=2)
    Traceback (most recent call last):
    ...
    ValueError: there is a model 'gpt_nano' already; take another name
    """
    if name in _MODELS:
        raise ValueError(f"there is a model {name!r} already; take another name")
    known = {field.name for field in dataclasses.fields(cls.config_class)}
    unknown = sorted(set(shape) - known)
    if unknown:
        raise ValueError(f"unknown options {unknown} for {cls.__name__}; known are {', '.join(sorted(known))}")
    _MODELS[name] = cls, shape


def list_models(pattern: str = "*") -> list[str]:
    """Names of the registered models that match a shell pattern, sorted.

    >>> list_models("paraformer_tiny*")
    ['paraformer_tiny', 'paraformer_tiny_8x2_224']
    """
    return sorted(name for name in _MODELS if fnmatchcase(name, pattern))


def model_class(name: str) -> type[TrunkModel]:
    """The class of a registered model: its task.

    Raises:
        ValueError: unknown model.

    >>> model_class("gpt_nano").__name__
    'CausalLM'
    """
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(list_models())}")
    return _MODELS[name][0]


def model_config(name: str, **options: Any) -> Any:
    """The configuration of a registered model, of its class's `config_class`, with some options replaced.

    Raises:
        ValueError: unknown model or option, a ViT with branches, or a ParaFormer with none.
    """
    config_class = model_class(name).config_class
    shape = _MODELS[name][1]
    known = {field.name for field in dataclasses.fields(config_class)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"unknown options {unknown} for {name}; known are {', '.join(sorted(known))}")
    merged = {**shape, **options}
    depths = options.get("depths")
    if depths and options.get("depth", depths[0]) != depths[0]:
        raise ValueError(f"depth is {options['depth']} and depths {tuple(depths)}; give one of them")
    if name in _IMAGE_CLASSIFIERS:  # a ViT and a ParaFormer are told apart by their names; a GPT takes branches or none
        serial = "branches" not in shape
        if serial and merged.get("branches", 0) != 0:
            raise ValueError(f"branches is {merged['branches']} but {name} is a serial model; use a paraformer")
        if not serial and merged["branches"] < 1:
            raise ValueError(
                f"branches is {merged['branches']}; {name} needs at least 1 (a serial model is called vit_…)"
            )
    return config_class(**merged)


def name_with_branches(name: str, branches: int) -> str:
    """The name that a shape goes by when it has so many branches: a ViT with some is called a ParaFormer, and a
    ParaFormer without any a ViT. Other names do not say.

    >>> name_with_branches("vit_tiny", 4), name_with_branches("vit_tiny", 0), name_with_branches("gpt_nano", 4)
    ('paraformer_tiny', 'vit_tiny', 'gpt_nano')
    """
    mine, other = ("vit_", "paraformer_") if branches else ("paraformer_", "vit_")
    renamed = other + name.removeprefix(mine)
    return renamed if name.startswith(mine) and name in _IMAGE_CLASSIFIERS and renamed in _MODELS else name


def create_model(name: str, **options: Any) -> Any:
    """Builds a registered model with fresh weights.

    Args:
        name: see `list_models`.
        options: fields of the model's configuration to replace: of `ImageClassifierConfig`, such as image_size,
            patch_size, channels, num_classes, branches, depth, pool or dropout; or of `CausalLMConfig`, such as
            vocab_size, context, branches, depth, step or buffers.

    Returns:
        The model, of the class of its task: an `ImageClassifier`, a `CausalLM` …

    Raises:
        ValueError: unknown model or option, or a value out of range.

    >>> import torch
    >>> create_model("vit_nano", image_size=28, patch_size=7, channels=1)(torch.rand(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    >>> create_model("gpt_nano", context=32)(torch.randint(256, (2, 32))).shape
    torch.Size([2, 32, 256])
    """
    return model_class(name)(model_config(name, **options))
