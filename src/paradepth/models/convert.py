"""From a serial stack to branches and back: the same layers, put together in another way.

    serial, 8 layers                    x ─ 1 ─ 2 ─ 3 ─ 4 ─ 5 ─ 6 ─ 7 ─ 8 ─

                                          ┌ 1 ─ 2 ─ 3 ─ 4 ┐
    2 branches, consecutive             x ┤               + ─        outputs change: G_2 gets x, not what G_1 made
                                          └ 5 ─ 6 ─ 7 ─ 8 ┘

To first order in what layers add both are the same, x + Σ F_i(x).
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from paradepth.branches.branches import stacks_of
from paradepth.depth import AsBranches, Serial, parallelize
from paradepth.depth.as_branches import Groups, branch_depths, branch_layers
from paradepth.models.shape import TrunkConfig
from paradepth.models.sharing import check_unshared

if TYPE_CHECKING:
    from paradepth.models.base import TrunkModel

Module = TypeVar("Module", bound=nn.Module)


def convert(
    model: Module,
    *,
    branches: int,
    groups: Groups = "consecutive",
    path: str | None = None,
    buffers: tuple[int, int] = (0, 0),
) -> Module:
    """A new model whose layers are those of `model`, shared out among branches of the same input; that one is left
    alone.

    What the model computes changes (but for one branch), so it is to be trained further. A model of this package
    becomes one of `Branches`, with the residual aggregate. In a model of another library the list of layers is
    evaluated as branches: weights stay under their names, and `restore` puts the plain list back.

    Args:
        model: of this package, serial or with branches; or any module that loops over a list of residual layers.
        branches: how many; 1 is the serial stack again (one branch of all layers). Where it does not divide the number
            of layers the last branches have one less. A model of this package also takes 0, no `Branches` at all.
        groups: which layers make a branch: "consecutive", the first one has the first layers; "interleaved", they are
            dealt out one by one. On the way back, those that the branches were made with.
        path: of a model of another library, the dotted path of its `nn.ModuleList`, as for `parallelize`.
        buffers: of such a model, numbers of first and of last layers that are left in series.

    Returns:
        The new model, in the mode of the old one.

    Raises:
        ValueError: more branches than layers; a model of this package with a path or buffers, or another one without a
            path; branches with aggregate "sum" or "gated"; layers that share weights; a quantised model; a stack whose
            buffers have another step size than the layers between.

    >>> import paradepth
    >>> model = paradepth.create_model("vit_nano", image_size=8, patch_size=4, depth=6).eval()
    >>> parallel = paradepth.convert(model, branches=4)
    >>> parallel.config.branch_depths
    (2, 2, 1, 1)
    >>> images = torch.rand(2, 3, 8, 8)
    >>> bool(torch.allclose(paradepth.convert(parallel, branches=1)(images), model(images), atol=1e-5))
    True
    """
    from paradepth.models.base import TrunkModel  # which has this as a method

    if isinstance(model, TrunkModel):
        if path is not None or tuple(buffers) != (0, 0):
            raise ValueError(
                f"path is {path!r} and buffers are {tuple(buffers)}; they are for models of other libraries, and this "
                f"is a {type(model).__name__}, whose layers are known and all become branches"
            )
        return model.convert(branches, groups=groups)
    if path is None:
        raise ValueError(
            f"a {type(model).__name__} is no model with a trunk of this package, so the path of its list of layers is "
            "needed, such as path='encoder.layer'"
        )
    executor = AsBranches(branches, groups=groups, buffers=buffers)
    new = parallelize(copy.deepcopy(model), path, executor=executor)
    return parallelize(new, path, executor=Serial()) if branches == 1 else new


def converted_config(config: Any, branches: int, *, groups: Groups = "consecutive") -> Any:
    """The shape that a model has after conversion.

    Args:
        config: of a model of this package.
        branches: how many; 0 makes a serial stack.
        groups: see `convert`.

    Raises:
        ValueError: as `convert`.

    >>> config = TrunkConfig(depth=7, step=0.5)
    >>> converted_config(config, 3).branch_depths, converted_config(config, 3).step
    ((3, 2, 2), 0.5)
    >>> converted_config(converted_config(config, 3), 0) == config
    True
    """
    if not isinstance(config, TrunkConfig):
        raise ValueError(
            "the layers of an encoder of the transformers library stay where they are; evaluate them as branches: "
            "paradepth.convert(model.encoder, branches=…, path='encoder.layer')"
        )
    check_unshared(config, "conversion gives layers other places")
    if config.aggregate != "residual" and (config.branches > 1 or config.aggregate == "gated"):
        raise ValueError(
            f"aggregate is {config.aggregate!r}; only branches that are added up as residuals are layers of one stack"
        )
    layers = sum(config.branch_depths)
    depths = branch_depths(layers, 1 if branches == 0 else branches)
    depth = depths[0]
    places = [place for each in branch_layers(depths, groups) for place in each]
    kept = config.buffers
    if max(config.branches, 1) > 1 or len(depths) > 1:
        if kept != (0, 0) and config.step != 1.0:
            raise ValueError(
                f"buffers are {kept}: these layers take h = 1 and those between h = {config.step:g}, and branches have "
                "the same buffers, each; convert a model whose layers all take the same step"
            )
        kept = (0, 0)  # where h = 1 throughout they are for executors of depth alone
    shape: dict[str, Any] = {"depth": depth, "depths": depths if branches else None, "branches": branches}
    if config.static_layers is not None:
        before = [place for each in branch_layers(config.branch_depths, groups) for place in each]
        static = {before[number] for number in config.static_layers}
        shape["static_layers"] = tuple(number for number, place in enumerate(places) if place in static)
    return dataclasses.replace(config, **shape, buffers=kept, aggregate="residual")


@torch.no_grad()
def converted(model: TrunkModel, branches: int, *, groups: Groups = "consecutive") -> Any:
    """A new model of this package; what `TrunkModel.convert` does."""
    if model.quantisation is not None:
        raise ValueError(
            f"the model is quantised ({model.quantisation.method}), which can be truncated and no more; convert the "
            "one in floating point that it was made from"
        )
    config = converted_config(model.config, branches, groups=groups)
    model.check_whole()
    new = model.fresh(config)
    new.stem.load_state_dict(model.stem.state_dict())
    new.head.load_state_dict(model.head.state_dict())
    mine, theirs = _in_series(new, groups), _in_series(model, groups)
    for layer, source in zip(mine, theirs, strict=True):
        layer.load_state_dict(source.state_dict())
    return new.train(model.training)


def _in_series(model: TrunkModel, groups: Groups) -> list[nn.Module]:
    """The layers of a trunk in the order that they have in one stack; of an encoder-decoder all encoder layers first.

    A stack of such a model has as many kinds of layers as it is times deeper than the configuration says.
    """
    stacks, depths = stacks_of(model.trunk), model.config.branch_depths
    kinds = stacks[0].depth // depths[0]
    order: list[tuple[int, int, nn.Module]] = []
    for stack, depth, places in zip(stacks, depths, branch_layers(depths, groups), strict=True):
        for kind in range(kinds):
            order += [(kind, place, stack.layers[kind * depth + index]) for index, place in enumerate(places)]
    return [layer for _, _, layer in sorted(order, key=lambda entry: entry[:2])]
