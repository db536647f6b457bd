"""Starting from a trained model: what is taken over, what is new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paradepth.models import HFClassifier, TrunkModel, from_pretrained
from paradepth.models.hf_classifier import is_hf_folder
from paradepth.models.quantised import check_learns

# Of a trunk, besides the shapes of its weights.
_SAME = ("step", "buffers", "aggregate", "causal", "heads", "mixing", "static_layers", "share")


def start_from(model: Any, source: str | Path) -> list[str]:
    """Gives a new model the weights of a trained one.

    Args:
        model: a new model.
        source: a run directory, a saved model or, for an `HFClassifier`, a folder of the transformers library.

    Returns:
        Names of the parts that stay as they were.

    Raises:
        ValueError: no such folder, or a source that does not fit.
    """
    if isinstance(model, HFClassifier) and is_hf_folder(source):
        model.load_encoder(source)
        return ["head"]
    return take_over(model, from_pretrained(source))


@torch.no_grad()
def take_over(model: TrunkModel, source: TrunkModel) -> list[str]:
    """Copies the parts of `source` into `model`: the stem, each branch or the trunk, and the head if it fits.

    A model with more branches than the source keeps its own ones behind them; one with fewer takes the first. However
    the source was trained (serially, layer-parallel, by any schedule), its weights are those of the same layers. Of a
    stem with further tokens or with segments these stay new: a source's numbers keep their meaning.

    Args:
        model: a new model.
        source: a trained one.

    Returns:
        Names of the parts that stay as they were.

    Raises:
        ValueError: stem or trunk do not fit, and the message names the first tensor that does not; or the source is
            quantised.
    """
    check_learns(source.quantisation, "the source")
    mine, theirs = model.parts(), source.parts()
    if ("trunk" in mine) != ("trunk" in theirs):
        shapes = [f"{m.config.branches} branches × {m.config.depth}" for m in (model, source)]
        raise ValueError(
            f"a model of {shapes[0]} layers cannot start from one of {shapes[1]} (0 branches are a serial stack): take "
            "--branches and --depth of the source"
        )
    for name in _SAME:
        a, b = (getattr(m.config, name, getattr(m, name, None)) for m in (model, source))
        if a != b:
            raise ValueError(f"{name} is {a} here and {b} in the source, whose layers would compute something else")
    new = []
    for name, part in mine.items():
        if name not in theirs:
            new.append(name)
            continue
        difference = _difference(part, theirs[name], may_grow=name == "stem")
        if name == "head" and _class_names(model) != _class_names(source):
            new.append(name)  # as many classes, maybe, but others
        elif difference is None:
            _copy(part, theirs[name].state_dict())
        elif name == "head":
            new.append(name)
        else:
            raise ValueError(f"the {name} of the source does not fit this model: {difference}")
    return new


def _class_names(model: TrunkModel) -> tuple[str, ...]:
    return tuple(getattr(model.config, "class_names", ()))


_TOKENS, _SEGMENTS = "embed.weight", "segments.weight"  # of a stem: what a new one may have more of


def _difference(mine: nn.Module, theirs: nn.Module, *, may_grow: bool) -> str | None:
    a, b = ({key: tuple(value.shape) for key, value in part.state_dict().items()} for part in (mine, theirs))
    for key in [*a, *(key for key in b if key not in a)]:
        if a.get(key) == b.get(key) or (may_grow and key == _SEGMENTS and key not in b):
            continue
        if may_grow and key == _TOKENS and key in b and a[key][0] > b[key][0] and a[key][1:] == b[key][1:]:
            continue
        return f"{key} has shape {a.get(key, 'none')} here and {b.get(key, 'none')} there"
    return None if isinstance(mine, type(theirs)) else f"it is a {type(theirs).__name__}, not a {type(mine).__name__}"


def _copy(part: nn.Module, weights: dict[str, Tensor]) -> None:
    for key, value in part.state_dict().items():
        if key in weights:
            value[: len(weights[key])].copy_(weights[key]) if value.dim() else value.copy_(weights[key])
