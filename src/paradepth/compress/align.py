"""Which heads and hidden neurons of two layers do the same, and bringing those of one into the other's order.

Permuting neurons or heads, and rotating the queries and keys, or the values, of a head, changes nothing of what a layer
computes. Before weights of two layers are averaged, each unit has to lie where its counterpart does.

Sources: Singh and Jaggi, Model Fusion via Optimal Transport (arXiv 1910.05653); Ainsworth, Hayase and Srinivasa, Git
Re-Basin (arXiv 2209.04836), from where matching by activations is taken.

Shapes: B batch, T tokens, R rows (tokens that count), D width, H heads, K width of a head, I = H·K, M hidden neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paradepth.nn import EncoderLayer


@dataclass(frozen=True)
class Activations:
    """What happens inside a layer, at the rows that count.

    Attributes:
        q_RI, k_RI, y_RI: queries, keys, and what the heads give to the output projection.
        a_RD: output of the attention.
        h_RM: hidden neurons.
    """

    q_RI: Tensor
    k_RI: Tensor
    y_RI: Tensor
    a_RD: Tensor
    h_RM: Tensor


def watch(layer: EncoderLayer, x_BTD: Tensor, sides: Sequence[Any], rows_BT: Tensor) -> tuple[Tensor, Activations]:
    """F(x), (B, T, D), and the activations on the way, at the rows where `rows_BT` is true."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            seen[f"{name} in"], seen[f"{name} out"] = arguments[0][rows_BT], output[rows_BT]

        return hook

    maps = {"qkv": layer.attention.qkv, "out": layer.attention.out, "down": layer.mlp.down}
    handles = [linear.register_forward_hook(keep(name)) for name, linear in maps.items()]
    try:
        f_BTD = layer.residual(x_BTD, *sides)
    finally:
        for handle in handles:
            handle.remove()
    q_RI, k_RI, _ = seen["qkv out"].chunk(3, dim=-1)
    return f_BTD, Activations(q_RI, k_RI, seen["out in"], seen["out out"], seen["down in"])


@torch.no_grad()
def align(
    layer: EncoderLayer, like: EncoderLayer, pairs: Sequence[tuple[Activations, Activations]]
) -> tuple[list[int], list[int]]:
    """Brings heads and neurons of `layer` into the order, and its heads into the bases, of `like`; what it computes
    stays the same.

    Heads are matched by the correlation of what they add to the state, neurons by that of their activations, each to
    exactly one by the assignment problem. Within a pair of heads an orthogonal map brings queries and keys, another one
    values as close as possible (Procrustes).

    Args:
        layer: changed in place.
        like: of the same shape.
        pairs: activations of `layer` and of `like` on the same samples.

    Returns:
        The heads and the neurons of `layer` in their new order.
    """
    H, K = layer.attention.heads, layer.attention.head_width
    D, M = layer.attention.out.out_features, layer.mlp.up.out_features
    o_DHK, other_DHK = (part.attention.out.weight.unflatten(1, (H, K)) for part in (layer, like))
    heads, turn_qk, turn_v = _Correlation(H), _zeros(layer, H * K, H * K), _zeros(layer, H * K, H * K)
    neurons = _Correlation(M)
    for mine, theirs in pairs:
        added_HR = torch.einsum("rhk,dhk->hrd", mine.y_RI.unflatten(1, (H, K)), o_DHK).flatten(1)
        wanted_HR = torch.einsum("rhk,dhk->hrd", theirs.y_RI.unflatten(1, (H, K)), other_DHK).flatten(1)
        heads.add(added_HR, wanted_HR)
        neurons.add(mine.h_RM.T, theirs.h_RM.T)
        turn_qk += (mine.q_RI.T @ theirs.q_RI + mine.k_RI.T @ theirs.k_RI).double()
        turn_v += (mine.y_RI.T @ theirs.y_RI).double()
    order_H = heads.assignment()
    turns = []
    for gram in (turn_qk, turn_v):
        blocks = gram.view(H, K, H, K)
        u, _, v = torch.linalg.svd(torch.stack([blocks[order_H[g], :, g] for g in range(H)]))
        turns.append((u @ v).to(o_DHK))  # of y_mine into the basis of y_theirs, for each head of `like`
    qk_HKK, v_HKK = turns
    for parameter in layer.attention.qkv.parameters():
        by_head = parameter.unflatten(0, (3, H, K))[:, order_H]
        turned = [
            torch.einsum("hkj,hk...->hj...", turn, part)
            for turn, part in zip((qk_HKK, qk_HKK, v_HKK), by_head, strict=True)
        ]
        parameter.copy_(torch.stack(turned).view_as(parameter))
    layer.attention.out.weight.copy_(torch.einsum("dhk,hkj->dhj", o_DHK[:, order_H], v_HKK).reshape(D, H * K))
    order_M = neurons.assignment()
    for parameter in layer.mlp.up.parameters():
        parameter.copy_(parameter[order_M])
    layer.mlp.down.weight.copy_(layer.mlp.down.weight[:, order_M])
    return order_H, order_M


@torch.no_grad()
def energies(layer: EncoderLayer, seen: Sequence[Activations]) -> tuple[Tensor, Tensor]:
    """How much each head (H,) and each neuron (M,) adds to the state: the mean square over rows, summed over the width;
    of a neuron what varies, since a constant can be had from the bias."""
    heads = layer.attention.heads
    y_RHK = torch.cat([one.y_RI for one in seen]).unflatten(1, (heads, -1)).double()
    o_DHK = layer.attention.out.weight.unflatten(1, (heads, -1)).double()
    added_RHD = torch.einsum("rhk,dhk->rhd", y_RHK, o_DHK)
    spread_M = torch.cat([one.h_RM for one in seen]).double().var(dim=0, correction=0)
    down_M = layer.mlp.down.weight.double().square().sum(dim=0)
    return added_RHD.square().sum(dim=-1).mean(dim=0), spread_M * down_M


def _zeros(layer: EncoderLayer, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=layer.attention.out.weight.device)


class _Correlation:
    """Correlation coefficients between units of two layers, from sums over batches."""

    def __init__(self, units: int) -> None:
        self.units = units
        self.count = 0
        self.sums: list[Tensor] = []

    def add(self, mine_UR: Tensor, theirs_UR: Tensor) -> None:
        a, b = mine_UR.double(), theirs_UR.double()
        terms = [a @ b.T, a.sum(1), b.sum(1), a.square().sum(1), b.square().sum(1)]
        self.sums = [s + t for s, t in zip(self.sums, terms, strict=True)] if self.sums else terms
        self.count += a.shape[1]

    def assignment(self) -> list[int]:
        """For each unit of theirs the unit of mine that is its counterpart; the sum of correlations is the largest
        possible."""
        from scipy.optimize import linear_sum_assignment

        product, a, b, aa, bb = (s / max(self.count, 1) for s in self.sums)
        spread = ((aa - a.square()).clamp(min=0)[:, None] * (bb - b.square()).clamp(min=0)[None]).sqrt()
        correlation = torch.where(spread > 0, (product - a[:, None] * b[None]) / spread.clamp(min=1e-300), 0.0)
        _, mine = linear_sum_assignment(correlation.T.cpu().numpy(), maximize=True)
        return [int(index) for index in mine]
