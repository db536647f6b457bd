"""Starting from a trained model: what is taken over, what is new."""

from __future__ import annotations

import torch
from torch import nn

from paradepth.models import TrunkModel


@torch.no_grad()
def take_over(model: TrunkModel, source: TrunkModel) -> list[str]:
    """Copies the parts of `source` into `model`: the stem, each branch or the trunk, and the head if it fits.

    A model with more branches than the source keeps its own ones behind them; one with fewer takes the first. However
    the source was trained (serially, layer-parallel, by any schedule), its weights are those of the same layers.

    Args:
        model: a new model.
        source: a trained one.

    Returns:
        Names of the parts that stay as they were.

    Raises:
        ValueError: stem or trunk do not fit; the message names the first tensor that does not.
    """
    mine, theirs = model.parts(), source.parts()
    if ("trunk" in mine) != ("trunk" in theirs):
        shapes = [f"{m.config.branches} branches × {m.config.depth}" for m in (model, source)]
        raise ValueError(
            f"a model of {shapes[0]} layers cannot start from one of {shapes[1]} (0 branches are a serial stack): take "
            "--branches and --depth of the source"
        )
    new = []
    for name, part in mine.items():
        if name not in theirs:
            new.append(name)
            continue
        difference = _difference(part, theirs[name])
        if difference is None:
            part.load_state_dict(theirs[name].state_dict())
        elif name == "head":
            new.append(name)
        else:
            raise ValueError(f"the {name} of the source does not fit this model: {difference}")
    return new


def _difference(mine: nn.Module, theirs: nn.Module) -> str | None:
    a, b = ({key: tuple(value.shape) for key, value in part.state_dict().items()} for part in (mine, theirs))
    for key in a.keys() | b.keys():
        if a.get(key) != b.get(key):
            return f"{key} has shape {a.get(key, 'none')} here and {b.get(key, 'none')} there"
    return None if type(mine) is type(theirs) else f"it is a {type(theirs).__name__}, not a {type(mine).__name__}"
