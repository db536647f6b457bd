"""Blocks of an encoder-decoder: layers that act on a joined state Z, the S tokens of a source above the T of a target.

Source and target have the same width, so Z is a state of S + T tokens, and what one text does with another is a block
of a matrix that mixes tokens:

    SourceLayer   A_h = | A_h(X)  0 |      TargetLayer   | 0       0      |   A_h: causal self-attention of Y
                        | 0       0 |                    | B_h(Z)  A_h(Y) |   B_h: cross-attention of Y to X, its
                                                                              own O_h V_h and its norm of X

A decoder's layer has then 2 H Kronecker products in place of H, and is a block like any other, of
`paradepth.theory.block`: rows of the other text are zero, their hidden units are σ(0) = 0, and the path around the
layer carries them on.

Shapes: B batch, S source tokens, T target tokens, D width, H heads, K width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paradepth.nn import SourceLayer, TargetLayer
from paradepth.theory.block import Block, block_form
from paradepth.theory.operators import Affine, Kronecker
from paradepth.theory.parts import (
    attention_map,
    check_no_dropout,
    feed_forward_maps,
    gates,
    norm_map,
)


def joint_block_form(
    layer: nn.Module, z_BUD: Tensor, mask: Tensor | None = None, *, source: int, step: float = 1.0
) -> Block:
    """The closed form of an encoder-decoder's layer at a joined state.

    Args:
        layer: `SourceLayer` or `TargetLayer`, in evaluation mode.
        z_BUD: source and target one behind the other, (B, S + T, D).
        mask: booleans that broadcast to (B, H, S, S) and (B, H, T, S); True lets a source token be seen.
        source: S.
        step: h.

    Raises:
        ValueError: another kind of layer, dropout in training mode, or a token that sees none.

    >>> layer = TargetLayer(8, heads=2, mlp=16).double()
    >>> x, y = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    >>> z = torch.cat([x, y], dim=1)
    >>> block = joint_block_form(layer, z, source=5, step=0.5)
    >>> wanted = torch.cat(layer((x, y), step=0.5), dim=1)
    >>> bool(torch.allclose(block(z), wanted, atol=1e-12))
    True
    """
    check_no_dropout(layer)
    if isinstance(layer, SourceLayer):
        return _source_block(layer, z_BUD, mask, source, step)
    if isinstance(layer, TargetLayer):
        return _target_block(layer, z_BUD, mask, source, step)
    raise ValueError(f"the layer is {type(layer).__name__}; of a joined state there are SourceLayer and TargetLayer")


def _source_block(layer: SourceLayer, z_BUD: Tensor, mask: Tensor | None, source: int, step: float) -> Block:
    target = z_BUD.shape[1] - source
    block = block_form(layer.layer, z_BUD[:, :source], mask, step=step)
    return Block(
        step,
        _among(block.attention_norm, 0, target),
        _among(block.attention, 0, target),
        _among(block.mlp_norm, 0, target),
        _among(block.up, 0, target),
        _among(block.down, 0, target),
        F.pad(block.gates_BTM, (0, 0, 0, target)),
    )


def _target_block(layer: TargetLayer, z_BUD: Tensor, mask: Tensor | None, source: int, step: float) -> Block:
    x_BSD, y_BTD = z_BUD[:, :source], z_BUD[:, source:]
    target = y_BTD.shape[1]
    own_norm, memory_norm = norm_map(layer.attention_norm, y_BTD), norm_map(layer.memory_norm, x_BSD)
    own = attention_map(layer.attention, own_norm(y_BTD))
    a_BTD = own(own_norm(y_BTD))
    asking_BTD = norm_map(layer.cross_norm, y_BTD + a_BTD)(y_BTD + a_BTD)
    memory_BSD = memory_norm(x_BSD)
    cross = attention_map(layer.cross, asking_BTD, mask, memory_BSD=memory_BSD)
    mixed_BTD = y_BTD + a_BTD + cross(memory_BSD)
    mlp_norm = norm_map(layer.mlp_norm, mixed_BTD)
    up, down = feed_forward_maps(layer.mlp, target)
    gates_BTM = gates(up(mlp_norm(mixed_BTD)))
    return Block(
        step,
        _sum(_among(memory_norm, 0, target), _among(own_norm, source, 0)),
        _sum(_placed(cross, rows=(source, 0), cols=(0, target)), _among(own, source, 0)),
        _among(mlp_norm, source, 0),
        _among(up, source, 0),
        _among(down, source, 0),
        F.pad(gates_BTM, (0, 0, source, 0)),
    )


def _among(part: Affine, before: int, behind: int) -> Affine:
    """A map of some tokens as one of all: `before` tokens above and `behind` below them give zero."""
    return _placed(part, rows=(before, behind), cols=(before, behind))


def _placed(part: Affine, *, rows: tuple[int, int], cols: tuple[int, int]) -> Affine:
    """A map with rows and columns of zeros around it: tokens that it does not give, and does not read."""
    operator = part.operator
    assert isinstance(operator, Kronecker)
    tokens = operator.cols[0]
    terms = []
    for left, right in operator.terms:
        if left is None:
            left = torch.eye(tokens, dtype=operator.like.dtype, device=operator.like.device)
        terms.append((F.pad(left, (*cols, *rows)), right))
    placed = Kronecker(
        terms, cols=(sum(cols) + tokens, operator.cols[1]), rows=(sum(rows) + operator.rows[0], operator.rows[1])
    )
    offset = part.offset.expand(*part.offset.shape[:-2], *operator.rows)
    return Affine(placed, F.pad(offset, (0, 0, *rows)))


def _sum(a: Affine, b: Affine) -> Affine:
    assert isinstance(a.operator, Kronecker)
    assert isinstance(b.operator, Kronecker)
    return Affine(a.operator.plus(b.operator), a.offset + b.offset)
