"""What an operator is like, from products with vectors alone: singular values, norms, effective rank.

Shapes: B batch, T tokens, D width, K vectors, N = T·D numbers of a state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paradepth.theory.operators import Operator, Size


def probes(count: int, size: Size, *, seed: int, like: Tensor) -> Tensor:
    """Random signs, (K, 1, T, D): E‖O z‖² over them is ‖O‖²_F.

    Args:
        count: K. size: (T, D). seed: the same signs for the same seed and sizes. like: of the dtype and device wanted.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (count, 1, *size), generator=generator) * 2 - 1
    return signs.to(like)


def singular_values(
    operator: Operator, *, batch: int, like: Tensor, count: int = 16, iterations: int = 6, seed: int = 0
) -> Tensor:
    """The largest singular values of each sample's operator, descending, (B, K).

    Randomised subspace iteration, with four more vectors than values that are asked for: estimates from below, the
    better the faster the values fall. Source: Halko, Martinsson and Tropp, Finding structure with randomness
    (arXiv 0909.4061).

    Args:
        operator: with `matvec` and `rmatvec`.
        batch: B.
        like: of the dtype and device of its vectors.
        count: K at most; an operator of fewer rows or columns has fewer.
        iterations: products with the operator and its transpose.
        seed: of the first vectors.

    Raises:
        ValueError: a number below 1.

    >>> from paradepth.theory.operators import Kronecker
    >>> m = torch.randn(4, 4, dtype=torch.float64)
    >>> operator = Kronecker([(None, m)], cols=(3, 4), rows=(3, 4))
    >>> found = singular_values(operator, batch=1, like=m, count=6)
    >>> bool(torch.allclose(found[0], torch.linalg.svdvals(operator.dense())[:6]))
    True
    """
    for name, value in (("count", count), ("iterations", iterations), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    smaller = min(operator.shape)
    vectors = min(count + 4, smaller)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(operator.shape[1], vectors, generator=generator, dtype=torch.float64).to(like)
    v_BNK = torch.linalg.qr(draws)[0].expand(batch, -1, -1)
    transposed = operator.T
    for _ in range(iterations):
        u_BNK = torch.linalg.qr(_times(operator, v_BNK))[0]
        v_BNK = torch.linalg.qr(_times(transposed, u_BNK))[0]
    return torch.linalg.svdvals(_times(operator, v_BNK))[:, : min(count, smaller)]


def _times(operator: Operator, v_BNK: Tensor) -> Tensor:
    """The operator times K vectors of each sample, (B, N', K)."""
    states_KBTD = v_BNK.permute(2, 0, 1).unflatten(-1, operator.cols)
    return operator.matvec(states_KBTD).flatten(-2).permute(1, 2, 0)


def moments(operator: Operator, *, batch: int, like: Tensor, count: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Σσ² and Σσ⁴ over all singular values of each sample's operator, (B,) each, estimated without bias from random
    signs z: E‖O z‖² and E‖OᵀO z‖²."""
    z_KBTD = probes(count, operator.cols, seed=seed, like=like).expand(-1, batch, -1, -1)
    y_KBTD = operator.matvec(z_KBTD)
    back_KBTD = operator.rmatvec(y_KBTD)
    return y_KBTD.square().sum((-2, -1)).mean(0), back_KBTD.square().sum((-2, -1)).mean(0)


def effective_rank(operator: Operator, *, batch: int, like: Tensor, count: int = 32, seed: int = 0) -> Tensor:
    """(Σσ²)² / Σσ⁴ of each sample's operator, (B,): in how many directions it acts, from 1 to its rank.

    The participation ratio of the squared singular values; k equal ones among zeros give k. Estimated by `moments`,
    so that it needs no matrix.

    >>> from paradepth.theory.operators import Kronecker
    >>> two = Kronecker([(None, torch.diag(torch.tensor([1.0, 1.0, 0.0])))], cols=(1, 3), rows=(1, 3))
    >>> effective_rank(two, batch=1, like=torch.zeros(1)).tolist()
    [2.0]
    """
    second_B, fourth_B = moments(operator, batch=batch, like=like, count=count, seed=seed)
    return torch.where(fourth_B > 0, second_B.square() / fourth_B, torch.zeros_like(second_B))
