"""Closed forms of branches and of a whole trunk.

A branch of depth d is d blocks, one behind the other: the parameters of block l are functions of the state that blocks
1..l−1 made. That is a composition of closed forms (`BranchForm.__call__`). It is one sum of hidden units over its
input, too (`BranchForm.units`): with the gates Φ(z) of GELU every block is an input-dependent affine map L(x) x + l(x),
so that the state before the last block is E(x) x + e(x), and the last block's units read x through it,

    G(x) = Σ_j α_j σ(W_j(x) E(x) x + W_j(x) e(x) + θ_j(x)).

What depth costs is then hidden in the parameters: those of the last block can be computed only behind d − 1 other ones
(`BranchForm.serial_blocks`). For d = 1 there is nothing before them, and all units of all branches are independent of
each other.

Shapes: B batch, T tokens, D width, n branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import torch
from torch import Tensor

from paradepth.branches import Branches
from paradepth.branches.branches import Aggregate
from paradepth.depth import Stack
from paradepth.theory.block import Block, Units, block_form
from paradepth.theory.joint import joint_block_form
from paradepth.theory.operators import Affine, Diagonal, Operator, check_explicit, identity


@dataclass(frozen=True)
class BranchForm:
    """A branch G at an input x. Called, it evaluates the closed forms of its blocks one behind the other.

    Attributes:
        blocks: of the layers, in order.
    """

    blocks: tuple[Block, ...]

    def __call__(self, x_BTD: Tensor) -> Tensor:
        """The composition of the blocks, (…, B, T, D)."""
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return x_BTD

    @property
    def serial_blocks(self) -> int:
        """Blocks that have to be evaluated before the parameters of the last one are known: d − 1."""
        return len(self.blocks) - 1

    @cached_property
    def relaxed(self) -> Affine:
        """G(x) = L(x) x + l(x), the product of the blocks' input-dependent affine maps."""
        return _chain(self.blocks)

    @cached_property
    def contribution(self) -> Affine:
        """δ(x) = G(x) − x = (L(x) − I) x + l(x): the branch's own operator, without the path that goes around it."""
        relaxed = self.relaxed
        return Affine(relaxed.operator - identity(relaxed.operator.cols, self.blocks[0].gates_BTM), relaxed.offset)

    def last(self) -> tuple[Affine, Operator, Affine]:
        """W E and W e + θ; α; M E and M e + m: the branch as units of its last block that read x."""
        *before, block = self.blocks
        if not before:
            return block.hidden, block.out, block.skip
        reads = _chain(before)
        return block.hidden.after(reads), block.out, block.skip.after(reads)

    def units(self) -> Units:
        """The branch as one sum over the units of its last block, T·M + 2·T·D of them, in explicit matrices.

        Raises:
            ValueError: too many entries for explicit matrices.
        """
        hidden, out, skip = self.last()
        return Units.of(hidden, out, skip, batch=len(self.blocks[0].gates_BTM))


def _chain(blocks: Sequence[Block]) -> Affine:
    total = blocks[0].relaxed
    for block in blocks[1:]:
        total = block.relaxed.after(total)
    return total


@dataclass(frozen=True)
class TrunkForm:
    """A trunk at an input x: a serial stack is one branch. Called, it evaluates the closed forms.

    Attributes:
        branches: the branches, all of the same x.
        aggregate: "residual", "sum" or "gated".
        alphas: of "gated", α_i(x) of each branch, (n, B) or (n, B, T).
    """

    branches: tuple[BranchForm, ...]
    aggregate: str = "residual"
    alphas: Tensor | None = None

    def __call__(self, x_BTD: Tensor) -> Tensor:
        """The state of all branches, (B, T, D)."""
        return self.state(x_BTD, self.deltas(x_BTD))

    def state(self, x_BTD: Tensor, deltas: Sequence[Tensor]) -> Tensor:
        """The state of all branches from what `deltas` gives for x."""
        return self.starts * x_BTD + sum(deltas, torch.zeros_like(x_BTD))

    @property
    def starts(self) -> int:
        """How often the state holds x itself: once, or once for each branch where they are summed up as they are."""
        return len(self.branches) if self.aggregate == "sum" else 1

    def deltas(self, x_BTD: Tensor) -> list[Tensor]:
        """What each branch adds to x: δ_i(x), gated α_i(x) δ_i(x)."""
        deltas = [branch(x_BTD) - x_BTD for branch in self.branches]
        return [delta if (gate := self._gate(i)) is None else gate.matvec(delta) for i, delta in enumerate(deltas)]

    def _gate(self, index: int) -> Diagonal | None:
        if self.alphas is None:
            return None
        alpha = self.alphas[index]
        size = self.branches[0].blocks[0].attend.operator.cols
        return Diagonal(alpha.view(*alpha.shape, *(1,) * (3 - alpha.dim())), size)

    def contribution(self, index: int) -> Affine:
        """What branch `index` adds to x, as an input-dependent affine map."""
        own, gate = self.branches[index].contribution, self._gate(index)
        return own if gate is None else own.under(gate)

    @cached_property
    def relaxed(self) -> Affine:
        """The trunk as one input-dependent affine map."""
        like = self.branches[0].blocks[0].gates_BTM
        operator: Operator = float(self.starts) * identity(self.branches[0].relaxed.operator.cols, like)
        offset = like.new_zeros(())
        for index in range(len(self.branches)):
            part = self.contribution(index)
            operator, offset = operator + part.operator, offset + part.offset
        return Affine(operator, offset)

    def units(self, *, reads: Affine | None = None, head: Affine | None = None) -> Units:
        """The trunk as one sum over the units of all branches, in explicit matrices: the dynamic theorem's G(x).

        Args:
            reads: what comes before it, whose input the units then read.
            head: what comes behind it: an input-dependent affine map, whose operator makes α depend on x as well.

        Raises:
            ValueError: too many entries for explicit matrices.
        """
        batch = len(self.branches[0].blocks[0].gates_BTM)
        eye = identity(self.branches[0].relaxed.operator.cols, self.branches[0].blocks[0].gates_BTM)
        around = float(self.starts - len(self.branches)) if self.aggregate != "gated" else 1.0
        parts: list[tuple[Affine | None, Operator | None, Affine]] = []
        for index, branch in enumerate(self.branches):
            hidden, out, skip = branch.last()
            if (gate := self._gate(index)) is not None:
                out = gate @ out
                skip = Affine(skip.operator - eye, skip.offset).under(gate)
            parts.append((hidden, out, skip))
        if around:
            parts.append((None, None, Affine(around * eye, eye.like.new_zeros(eye.rows))))
        joined = [_joined(part, reads, head, batch) for part in parts]
        if head is not None:  # its constant: a pair of units for each logit
            behind = head.operator if reads is None else head.operator @ reads.operator
            joined.append(Units.of(None, None, Affine(0.0 * behind, head.offset), batch=batch))
        J, R, N = sum(units.count for units in joined), joined[0].out.shape[1], joined[0].weight.shape[2]
        check_explicit(batch * J * (N + R), f"a closed form of {J:,} units for {batch} samples of {N:,} numbers")
        return Units(
            torch.cat([units.weight for units in joined], dim=1),
            torch.cat([units.offset for units in joined], dim=1),
            torch.cat([units.out for units in joined], dim=2),
        )


def _joined(
    part: tuple[Affine | None, Operator | None, Affine], reads: Affine | None, head: Affine | None, batch: int
) -> Units:
    hidden, out, skip = part
    if reads is not None:
        hidden, skip = None if hidden is None else hidden.after(reads), skip.after(reads)
    if head is not None:
        out = None if out is None else head.operator @ out
        skip = skip.under(head.operator)
    return Units.of(hidden, out, skip, batch=batch)


def stack_form(stack: Stack, x_BTD: Tensor, mask: Tensor | None = None, *, source: int | None = None) -> BranchForm:
    """The closed form of a stack at x: step sizes and buffers are the stack's own, whatever its executor computes.

    Args:
        stack: of `EncoderLayer`s, or of an encoder-decoder's layers; in evaluation mode.
        x_BTD: its input; of an encoder-decoder source and target one behind the other.
        mask: what its layers get besides: booleans that broadcast to (B, H, T, T).
        source: of an encoder-decoder, the number of source tokens.

    Raises:
        ValueError: layers of another kind, dropout in training mode, or a stack shared between processes.

    >>> from paradepth.nn import EncoderLayer
    >>> stack = Stack([EncoderLayer(8, heads=2, mlp=16) for _ in range(3)], step=0.5).double()
    >>> x = torch.randn(2, 3, 8, dtype=torch.float64)
    >>> form = stack_form(stack, x)
    >>> wanted = stack(x)
    >>> [float((y - wanted).abs().max()) < 1e-12 for y in (form(x), form.relaxed(x), form.units()(x).view_as(x))]
    [True, True, True]
    """
    if stack.part is not None:
        raise ValueError("the stack is shared between processes, and its closed form needs all of its layers")
    blocks = []
    for n, layer in enumerate(stack.layers):
        h = stack.step_of(n)
        if source is None:
            blocks.append(block_form(layer, x_BTD, mask, step=h))
        else:
            blocks.append(joint_block_form(layer, x_BTD, mask, source=source, step=h))
        x_BTD = blocks[-1](x_BTD)
    return BranchForm(tuple(blocks))


def trunk_form(trunk: Stack | Branches, x: Any, *sides: Any, branches: int | None = None) -> TrunkForm:
    """The closed form of a trunk at x.

    Args:
        trunk: branches, or a serial stack.
        x: its input, (B, T, D), or a joined state ((B, S, D), (B, T, D)), of which the closed form is one of S + T
            tokens.
        sides: what every layer gets besides: nothing, or an attention mask.
        branches: use the first branches only (default: all).

    Raises:
        ValueError: as `stack_form`; also other states, more side inputs than a mask, an unknown aggregate, or a number
            of branches that the trunk does not have.
    """
    source = None
    if isinstance(x, tuple) and len(x) == 2:
        x_BTD, source = torch.cat(x, dim=1), x[0].shape[1]
    elif isinstance(x, Tensor):
        x_BTD = x
    else:
        raise ValueError(f"the trunk's state is a {type(x).__name__}; it must be a tensor, or a source and a target")
    if len(sides) > 1:
        raise ValueError(f"layers get {len(sides)} inputs besides the state; the closed form knows an attention mask")
    mask = sides[0] if sides else None
    if isinstance(trunk, Stack):
        if branches not in (None, 1):
            raise ValueError(f"branches is {branches}; this trunk is a serial stack, which counts as one")
        return TrunkForm((stack_form(trunk, x_BTD, mask, source=source),))
    if trunk.aggregate not in get_args(Aggregate):
        raise ValueError(f"aggregate is {trunk.aggregate!r}; the closed form covers 'residual', 'sum' and 'gated'")
    forms = tuple(stack_form(branch, x_BTD, mask, source=source) for branch in trunk.first(branches))
    if trunk.aggregate != "gated":
        return TrunkForm(forms, trunk.aggregate)
    alphas = trunk.needed_only(trunk.gates(x, *sides, branches=branches))
    return TrunkForm(forms, trunk.aggregate, alphas.to(x_BTD.dtype))
