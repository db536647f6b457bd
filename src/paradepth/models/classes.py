"""More classes, or fewer, for a classifier: the shape, and the rows of its head.

Shapes: N classes, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def with_classes(config: Any, classes: Sequence[str] | int, *, model_type: str) -> Any:
    """A classifier's shape with more classes behind the ones that it has.

    Args:
        config: the shape.
        classes: names; or their number, where the present ones have no names.
        model_type: of the model, for messages.

    Raises:
        ValueError: a model without classes; names that are empty, occur twice or are taken; a number where names are
            needed, or names where there are none.

    >>> from paradepth.models import ImageClassifierConfig
    >>> shape = with_classes(ImageClassifierConfig(num_classes=1, class_names=("a",)), ["b"], model_type="images")
    >>> shape.num_classes, shape.class_names
    (2, ('a', 'b'))
    """
    if not classes:
        return config
    _check(config, model_type)
    present = config.class_names
    if isinstance(classes, int):
        if present:
            raise ValueError(
                f"classes is {classes}, but this model's {len(present)} classes have names; name the new ones"
            )
        if classes < 0:
            raise ValueError(f"classes is {classes}; it must be at least 0")
        return dataclasses.replace(config, num_classes=config.num_classes + classes)
    if isinstance(classes, str) or not all(isinstance(name, str) and name for name in classes):
        raise ValueError(f"classes is {classes!r}; it must be a list of names")
    if not present:
        raise ValueError(f"this model's {config.num_classes} classes have no names; say how many classes to add")
    taken = [name for name in classes if name in present]
    twice = sorted({name for name in classes if list(classes).count(name) > 1})
    if taken or twice:
        what = f"{taken} are classes of this model already" if taken else f"{twice} are given twice"
        raise ValueError(f"classes collide: {what}")
    return dataclasses.replace(config, num_classes=config.num_classes + len(classes), class_names=(*present, *classes))


def without_classes(config: Any, count: int, *, model_type: str) -> Any:
    """A classifier's shape without its last `count` classes.

    Raises:
        ValueError: a model without classes, or no class that would be left.
    """
    if count == 0:
        return config
    _check(config, model_type)
    left = config.num_classes - count
    if left < 1:
        raise ValueError(f"classes is {count}; this model has {config.num_classes}, and one must be left")
    return dataclasses.replace(config, num_classes=left, class_names=config.class_names[:left])


def _check(config: Any, model_type: str) -> None:
    if not hasattr(config, "num_classes"):
        raise ValueError(f"a model of type {model_type!r} has no classes; classifiers and taggers have")


def carry_over(old: Tensor, new: Tensor) -> None:
    """Copies a tensor into another one that may have more rows, or fewer. A row that is new becomes the mean of the old
    ones: a new class's logit is then the mean of the others, and never the largest.

    Source: J. Hewitt, Initializing New Word Embeddings for Pretrained Language Models, 2021.

    >>> import torch
    >>> new = torch.zeros(3)
    >>> carry_over(torch.tensor([1.0, 2.0]), new)
    >>> new
    tensor([1.0000, 2.0000, 1.5000])
    """
    if old.shape == new.shape:
        new.copy_(old)
        return
    kept = min(len(old), len(new))
    new[:kept].copy_(old[:kept])
    if kept < len(new):
        new[kept:].copy_(old.mean(dim=0).expand_as(new[kept:]))
