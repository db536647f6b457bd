"""How the weights of a fresh model are drawn.

| name | linear maps of stem and head | linear maps of layers | a layer at first |
|---|---|---|---|
| `default` | as each is made: N(0, 0.02²) in heads, Xavier for patches | Xavier, uniform | changes the state |
| `truncated_normal` | N(0, 0.02²), cut at two deviations | the same | changes it little |
| `zero_output` | as each is made | Xavier, but zero in the last map of attention and MLP | is the identity |
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import nn

from paradepth.nn.layer import scale_projections_

InitWeights = Literal["default", "truncated_normal", "zero_output"]
DEVIATION = 0.02


def check_init_weights(how: str) -> None:
    """Refuses an unknown way.

    Raises:
        ValueError: naming those that there are.
    """
    if how not in get_args(InitWeights):
        raise ValueError(f"init_weights is {how!r}; it must be one of {', '.join(get_args(InitWeights))}")


@torch.no_grad()
def initialise_weights_(model: Any, how: InitWeights, *, deep_init: int | None = None) -> None:
    """Draws the weights of a fresh model anew, from torch's global generator; "default" leaves them as they were made.

    - "truncated_normal": every linear map has weights from N(0, 0.02²), cut at two deviations, and no biases.
      Embeddings, positions, norms and convolutions stay. Source: BERT (arXiv 1810.04805); timm draws the linear maps of
      a ViT with the same deviation (and cuts so far out that it never shows).
    - "zero_output": the output projections of attention and MLP are zero, so that every layer, and the trunk, starts as
      the identity. Source: Fixup (arXiv 1901.09321) and ReZero (arXiv 2003.04887), which start residual layers at zero.

    Args:
        model: with `parts()` whose middle ones have `zero_output_`.
        how: one of the above.
        deep_init: number L of layers in a deep stack: truncated normal weights are scaled as Xavier's are, by
            √(log 2L).

    Raises:
        ValueError: unknown way.

    >>> from paradepth import create_model
    >>> model = create_model("paraformer_nano", init_weights="zero_output").eval()
    >>> x_BTD = torch.randn(1, 64, 64)
    >>> bool(torch.equal(model.trunk(x_BTD), x_BTD))
    True
    """
    check_init_weights(how)
    stem, *middle, head = model.parts().values()
    if how == "zero_output":
        for part in middle:
            part.zero_output_()
    if how != "truncated_normal":
        return
    for part in (stem, *middle, head):
        for linear in part.modules():
            if isinstance(linear, nn.Linear):
                nn.init.trunc_normal_(linear.weight, std=DEVIATION, a=-2 * DEVIATION, b=2 * DEVIATION)
                if linear.bias is not None:
                    linear.bias.zero_()
    if deep_init is not None:
        for part in middle:
            scale_projections_(part, deep_init)
