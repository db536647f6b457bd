"""Layers of a trunk that share their weights.

| share | one set of weights for |
|---|---|
| `none` | nothing: every layer has its own |
| `branches` | the n-th layers of all branches that have so many |
| `depth` | all layers of a branch, or of a serial stack |
| `attention` | the attention parts of all layers of all branches, with the norms before them; MLPs are not shared |
| `mlp` | the MLP parts of all layers of all branches, with the norms before them; attention parts are not shared |

Only layers of one kind share: those of an encoder, and those of a decoder. Layers stay modules of their own, with the
parameters of the first of them in place of theirs; so masks of dropout, hooks and executors are those of separate
layers, autograd adds up the gradients of all uses, and `parameters()` has each parameter once. A parameter belongs to
the first part of the model that uses it: there it is counted, there it learns, and with that part it is frozen.

Branches that share whole layers are copies of each other where they are equally deep: on the same input they add the
same, and n of them are one, counted n times. Gates (aggregate "gated") are each branch's own.

Asked for by Dynamic Universal Approximation Theory (arXiv 2407.21670): an ablation of parameter sharing between layers.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any, Literal, get_args

from torch import Tensor, nn

Share = Literal["none", "branches", "depth", "attention", "mlp"]

_PARTS = {"attention": ("attention", "cross", "memory"), "mlp": ("mlp",)}  # how names of a layer's parameters start


def check_share(share: str, branches: int) -> None:
    """Refuses an unknown way, and one that needs branches where there are none.

    Raises:
        ValueError: naming those that there are.
    """
    if share not in get_args(Share):
        raise ValueError(f"share is {share!r}; it must be one of {', '.join(get_args(Share))}")
    if share == "branches" and branches == 0:
        raise ValueError("share is 'branches', and a serial stack has none; take depth, attention or mlp")


def tie_layers_(model: Any, share: Share) -> None:
    """Makes the layers of a new model's trunk share their weights, and the model keep one copy of them in its state
    dict; both in place.

    Args:
        model: with `parts()`, whose middle ones are stacks.
        share: one of the ways above.

    Raises:
        ValueError: layers that have no such part.

    >>> from paradepth import create_model
    >>> def size(share): return sum(p.numel() for p in create_model("paraformer_nano", share=share).trunk.parameters())
    >>> whole = size("none")  # four branches of two layers
    >>> size("branches") / whole, size("depth") / whole, whole > size("attention") > size("mlp")
    (0.25, 0.5, True)
    """
    if share == "none":
        return
    first: dict[Hashable, nn.Parameter] = {}
    _, *stacks, _ = model.parts().values()
    shared = False
    for s, stack in enumerate(stacks):
        for n, layer in enumerate(stack.layers):
            place: Hashable = {"branches": n, "depth": s}.get(share)
            for name, parameter in list(layer.named_parameters()):
                if share in _PARTS and not name.removeprefix("layer.").startswith(_PARTS[share]):
                    continue
                shared = True
                module, _, own = name.rpartition(".")
                alike = type(layer), type(layer.get_submodule(module)), name, parameter.shape
                one = first.setdefault((place, alike), parameter)
                if one is not parameter:
                    setattr(layer.get_submodule(module), own, one)
    if not shared:
        raise ValueError(f"share is {share!r}, and the trunk's layers have no such part")
    model.register_state_dict_post_hook(_leave_out_copies)
    model.register_load_state_dict_pre_hook(_fill_in_copies)


def own_parameters(model: Any) -> dict[str, list[nn.Parameter]]:
    """The parameters of each part of a model, those that several parts use in the first of them only.

    >>> from paradepth import create_model
    >>> found = own_parameters(create_model("paraformer_nano", share="branches"))
    >>> [name for name, parameters in found.items() if not parameters]
    ['branch2', 'branch3', 'branch4']
    """
    seen: set[int] = set()
    found: dict[str, list[nn.Parameter]] = {}
    for name, part in model.parts().items():
        found[name] = [p for p in part.parameters() if id(p) not in seen]
        seen |= {id(p) for p in found[name]}
    return found


def check_unshared(config: Any, what: str) -> None:
    """Refuses a model whose layers share weights.

    Args:
        config: the model's.
        what: what cannot be done with it, the start of the message.

    Raises:
        ValueError: naming how they share.
    """
    share = getattr(config, "share", "none")
    if share != "none":
        raise ValueError(f"{what}, and the layers of this model share weights (share {share!r})")


def check_starts_at_zero(share: Share, instead: str) -> None:
    """Refuses new branches that are to add nothing at first, where their last maps are those of other branches.

    Raises:
        ValueError: naming what to do instead.
    """
    if share in ("branches", "attention", "mlp"):
        raise ValueError(
            f"share is {share!r}, so a new branch has weights of the others and cannot start at zero; take {instead}"
        )


# ---- one copy in the state dict --------------------------------------------------------------------------------


def _copies(module: nn.Module, prefix: str) -> Iterator[tuple[str, str]]:
    """Names of parameters that have another name before, each with that one."""
    names: dict[int, str] = {}
    for name, parameter in module.named_parameters(prefix.removesuffix("."), remove_duplicate=False):
        before = names.setdefault(id(parameter), name)
        if before != name:
            yield name, before


def _leave_out_copies(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name, _before in _copies(module, prefix):
        state.pop(name, None)


def _fill_in_copies(module: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    assert isinstance(state, dict)  # load_state_dict makes one of its own
    for name, before in _copies(module, prefix):
        if before in state:
            state.setdefault(name, state[before])
