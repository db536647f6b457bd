"""A Transformer block as a dynamic universal approximator, Σ_j α_j σ(W_j(x) x + θ_j(x)).

With the operators of `parts`, a layer x + h·F(x) is, exactly,

    a     = P(x) x + p                        attention behind its norm:        P = Σ_h A_h(x) S₁(x) ⊗ O_h V_h Γ₁
    z     = K(x) (x + a) + k                  what goes into the activation:    K = S₂(x) ⊗ W_up Γ₂
    layer = x + h (a + (I ⊗ W_down) σ(z) + b)
          = M(x) x + m(x) + α σ(W(x) x + θ(x))

    W = K (I + P)     θ = K p + k     α = h I ⊗ W_down     M = I + h P     m = h (p + b)

and since y = σ(y) − σ(−y) for GELU, the affine part M(x) x + m(x) is a sum of such units as well: T·M units of the MLP
and 2·T·D of the skip path, whose parameters are functions of x through softmax and norms alone (`Block.units`).

Shapes: B batch, T tokens, D width, M hidden width, J units, N numbers of an input, R of an output.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from paradepth.nn import EncoderLayer
from paradepth.theory.operators import Affine, Diagonal, Kronecker, Operator, check_explicit, identity
from paradepth.theory.parts import attention_map, check_no_dropout, feed_forward_maps, gates, gelu, norm_map


@dataclass(frozen=True)
class Units:
    """Hidden units in explicit form: x ↦ Σ_j α_j σ(W_j x + θ_j), σ = GELU, for each sample of a batch.

    Attributes:
        weight: W, (B, J, N). offset: θ, (B, J). out: α, (B, R, J).
    """

    weight: Tensor
    offset: Tensor
    out: Tensor

    def __call__(self, x_BTD: Tensor) -> Tensor:
        """The sum, (B, R), of states (B, T, D) with T·D = N."""
        z_BJ = torch.einsum("bjn,bn->bj", self.weight, x_BTD.flatten(1)) + self.offset
        return torch.einsum("brj,bj->br", self.out, gelu(z_BJ))

    @property
    def count(self) -> int:
        """J, the number of units."""
        return self.weight.shape[1]

    @classmethod
    def of(cls, hidden: Affine | None, out: Operator | None, skip: Affine, *, batch: int) -> Units:
        """The units of x ↦ skip(x) + out σ(hidden(x)): those of `hidden`, then the pairs that make the affine part.

        Args:
            hidden: W and θ of the hidden units; None where there are none.
            out: α of the hidden units.
            skip: M and m.
            batch: B.

        Raises:
            ValueError: too many entries for explicit matrices.
        """
        R, N = skip.operator.shape
        J = 2 * R + (0 if hidden is None else hidden.operator.shape[0])
        check_explicit(batch * J * (N + R), f"a closed form of {J:,} units for {batch} samples of {N:,} numbers")
        m_BRN = skip.operator.dense().expand(batch, -1, -1)
        shift_BR = skip.offset.expand(batch, *skip.operator.rows).flatten(1)
        eye_BRR = torch.eye(R, dtype=m_BRN.dtype, device=m_BRN.device).expand(batch, -1, -1)
        weights, offsets, outs = [m_BRN, -m_BRN], [shift_BR, -shift_BR], [eye_BRR, -eye_BRR]
        if hidden is not None and out is not None:
            weights.insert(0, hidden.operator.dense().expand(batch, -1, -1))
            offsets.insert(0, hidden.offset.expand(batch, *hidden.operator.rows).flatten(1))
            outs.insert(0, out.dense().expand(batch, -1, -1))
        return cls(torch.cat(weights, dim=1), torch.cat(offsets, dim=1), torch.cat(outs, dim=2))


@dataclass(frozen=True)
class Block:
    """A layer at an input x: the operators that its closed form consists of, computed from x.

    Called, it evaluates the closed form; at the x that it was made for that is the layer's output.

    Attributes:
        step: h.
        attention_norm, attention, mlp_norm, up, down: the parts, in order.
        gates_BTM: Φ(z) of the hidden units, whose product with z is σ(z).
    """

    step: float
    attention_norm: Affine
    attention: Affine
    mlp_norm: Affine
    up: Affine
    down: Affine
    gates_BTM: Tensor

    @cached_property
    def attend(self) -> Affine:
        """P(x) and p: attention behind its norm, a sum of H Kronecker products."""
        return self.attention.after(self.attention_norm)

    @cached_property
    def lift(self) -> Affine:
        """K(x) and k: the first map of the MLP behind its norm, one Kronecker product."""
        return self.up.after(self.mlp_norm)

    @cached_property
    def hidden(self) -> Affine:
        """W(x) and θ(x): from x to what goes into the activation, a sum of H + 1 Kronecker products."""
        return self.lift.after(self._mixed)

    @property
    def _mixed(self) -> Affine:
        """x + a: I + P(x) and p."""
        attend = self.attend.operator
        assert isinstance(attend, Kronecker)
        return Affine(identity(attend.cols, attend.like).plus(attend), self.attend.offset)

    @property
    def out(self) -> Kronecker:
        """α = h I ⊗ W_down, which depends on no input."""
        down = self.down.operator
        assert isinstance(down, Kronecker)
        return down.scaled(self.step)

    @property
    def skip(self) -> Affine:
        """M(x) = I + h P(x) and m(x) = h (p + b): what does not go through the activation."""
        attend = self.attend.operator
        assert isinstance(attend, Kronecker)
        operator = identity(attend.cols, attend.like).plus(attend.scaled(self.step))
        return Affine(operator, self.step * (self.attend.offset + self.down.offset))

    def __call__(self, x_BTD: Tensor) -> Tensor:
        """M x + m + α σ(W x + θ) by products with the operators' factors, (…, B, T, D)."""
        a_BTD = self.attend(x_BTD)
        u_BTD = x_BTD + a_BTD
        return x_BTD + self.step * (a_BTD + self.down(gelu(self.lift(u_BTD))))

    @cached_property
    def relaxed(self) -> Affine:
        """The layer as one input-dependent affine map L(x) x + l(x), gates included:

        L = (1 − h) I + h (I + (I ⊗ W_down) diag(Φ(z)) K) (I + P)
        """
        eye = identity(self.attend.operator.cols, self.gates_BTM)
        z_offset = self.lift.operator.matvec(self.attend.offset) + self.lift.offset
        gate = Diagonal(self.gates_BTM, self.lift.operator.rows)
        mlp = self.down.operator @ (gate @ self.lift.operator)
        operator = (eye + mlp) @ self._mixed.operator
        if self.step != 1.0:
            operator = (1 - self.step) * eye + self.step * operator
        offset = self.attend.offset + self.down(self.gates_BTM * z_offset)
        return Affine(operator, self.step * offset)

    def units(self) -> Units:
        """The closed form as one sum over T·M + 2·T·D units, in explicit matrices.

        Raises:
            ValueError: too many entries for explicit matrices.
        """
        return Units.of(self.hidden, self.out, self.skip, batch=len(self.gates_BTM))


def block_form(layer: nn.Module, x_BTD: Tensor, mask: Tensor | None = None, *, step: float = 1.0) -> Block:
    """The closed form of a layer at x.

    Args:
        layer: an `EncoderLayer`, in evaluation mode, with attention or static mixing.
        x_BTD: its input.
        mask: booleans that broadcast to (B, H, T, T); True lets a query see a key.
        step: h.

    Raises:
        ValueError: another kind of layer, dropout in training mode, or a token that sees none.

    Source: Dynamic Universal Approximation Theory (arXiv 2407.21670), the matrix-vector method; the step is that of
    Layer-Parallel Training for Transformers (arXiv 2601.09026).

    >>> layer, x = EncoderLayer(8, heads=2, mlp=16).double(), torch.randn(2, 3, 8, dtype=torch.float64)
    >>> block = block_form(layer, x, step=0.5)
    >>> units = block.units()
    >>> wanted = layer(x, step=0.5)
    >>> units.count, bool(torch.allclose(units(x), wanted.flatten(1), atol=1e-12))
    (96, True)
    """
    if not isinstance(layer, EncoderLayer):
        raise ValueError(
            f"the layer is {type(layer).__name__}; the closed form is of EncoderLayer, and on joined states of "
            "SourceLayer and TargetLayer; what layers of other libraries compute is not known here"
        )
    check_no_dropout(layer)
    attention_norm = norm_map(layer.attention_norm, x_BTD)
    attention = attention_map(layer.attention, attention_norm(x_BTD), mask)
    mixed_BTD = x_BTD + attention(attention_norm(x_BTD))
    mlp_norm = norm_map(layer.mlp_norm, mixed_BTD)
    up, down = feed_forward_maps(layer.mlp, x_BTD.shape[1])
    gates_BTM = gates(up(mlp_norm(mixed_BTD)))
    return Block(step, attention_norm, attention, mlp_norm, up, down, gates_BTM)
