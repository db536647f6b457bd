"""Do branches do the same, or do they complement each other?

Shapes: k branches, N points, d dimensions, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from paradepth.branches import Branches
from paradepth.studies._approximator import Approximator


def mean_cosine(functions_kN: Tensor) -> float:
    """Mean cosine over all pairs of k ≥ 2 functions, given by their values at N points, without their means.

    Raises:
        ValueError: fewer than two functions.

    >>> u_N = torch.arange(8) / 8 * 2 * torch.pi
    >>> [round(mean_cosine(torch.stack(pair)), 6) + 0.0 for pair in ((u_N.cos(), u_N.sin()), (u_N.cos(), -u_N.cos()))]
    [0.0, -1.0]
    """
    count = len(functions_kN)
    if count < 2:
        raise ValueError(f"there are {count} functions; an alignment needs at least two")
    centred_kN = functions_kN.double() - functions_kN.double().mean(dim=1, keepdim=True)
    unit_kN = torch.nn.functional.normalize(centred_kN, dim=1)
    return float((unit_kN.sum(0).square().sum() - unit_kN.square().sum()) / (count * (count - 1)))


@torch.no_grad()
def contributions(model: Approximator, u_Nd: Tensor, *, branches: int) -> Tensor:
    """What each of the first `branches` branches adds to the output, shape (k, N)."""
    assert isinstance(model.trunk, Branches)
    return model.head.increment(model.trunk.contributions(model.stem(u_Nd), branches=branches))


def updates(model: Approximator, u_Nd: Tensor, target_N: Tensor, *, branches: int) -> Tensor:
    """How the gradient step of each branch alone would change the output, up to its length and sign, shape (k, N).

    J_i g_i, with J_i the derivative of the outputs by the weights of branch i and g_i = ∇L of these weights, L the mean
    square error of prefix k. All branches get the same gradient from the output, since they are added up; what they
    make of it tells whether they are about to do the same. (Weights of different branches do not correspond, so the
    cosine of the g_i themselves says nothing.)
    """
    assert isinstance(model.trunk, Branches)
    with torch.no_grad():
        x_NTD = model.stem(u_Nd)
    changes = []
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the one kernel whose gradient can be differentiated
        loss = (model(u_Nd, branches=branches) - target_N).square().mean()
        for stack in model.trunk.first(branches):
            weights = list(stack.parameters())
            steps = torch.autograd.grad(loss, weights, retain_graph=True)
            output_N = model.head.increment(stack(x_NTD))
            # Jᵀz is linear in z, and its derivative along g is Jg.
            z_N = torch.zeros_like(output_N, requires_grad=True)
            back = torch.autograd.grad(output_N, weights, z_N, create_graph=True)
            inner = torch.stack([(b * g).sum() for b, g in zip(back, steps, strict=True)]).sum()
            changes.append(torch.autograd.grad(inner, z_N)[0])
    return torch.stack(changes)
