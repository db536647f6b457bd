"""How input-dependent a model's operators are, what its branches' operators are like, and what the branches contribute.

Shapes: B batch, T tokens, D width, H heads, M hidden width, K probes, N logits, n branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from paradepth.branches import Branches
from paradepth.branches.branches import stacks_of
from paradepth.models import Translator, TrunkModel
from paradepth.theory.block import Block
from paradepth.theory.explanation import BranchFacts, Explanation, LayerFacts
from paradepth.theory.model import ModelForm, check_closed_form, closed_form, closed_form_error
from paradepth.theory.operators import Diagonal, Kronecker, Operator
from paradepth.theory.share import Shares, frozen_parts, prefix_parts
from paradepth.theory.spectrum import effective_rank, probes, singular_values
from paradepth.theory.variation import Variation

CHECKED = 4  # samples that the closed form is compared with the model on
STEADY = 0.01


@torch.no_grad()
def explain(
    model: TrunkModel,
    x: Any,
    *,
    probe_count: int = 4,
    spectrum_samples: int = 8,
    spectrum_values: int = 16,
    seed: int = 0,
) -> Explanation:
    """Looks at a model through its closed form, over a data set.

    How input-dependent each layer is: variation of its attention's operator, of its norms' scales, of its gates. What
    each branch's operator L(x) − I is like: variation, singular values, effective rank. Which share of the final logits
    each branch makes. A serial stack counts as one branch. Operators of branches are never built: everything follows
    from products with vectors.

    Args:
        model: of images, a language model, an encoder or a tagger, in evaluation mode.
        x: a batch of inputs, or a list of batches; at least two samples, and better a hundred.
        probe_count: K, random vectors that the variation of branches' operators is estimated from.
        spectrum_samples: of the first samples, how many the spectrum is computed for.
        spectrum_values: how many singular values.
        seed: of the random vectors.

    Raises:
        ValueError: a model that has no closed form here, fewer than two samples, or a number below 1.

    >>> from paradepth import create_model
    >>> shape = {"image_size": 8, "patch_size": 4, "channels": 1, "width": 16, "heads": 2, "mlp": 32}
    >>> model = create_model("paraformer_nano", **shape, branches=2, depth=1).eval()
    >>> found = explain(model, torch.rand(6, 1, 8, 8))
    >>> len(found.layers), len(found.branches), found.error < 1e-10
    (2, 2, True)
    >>> shares = [found.constant_share, found.input_share, *(branch.share for branch in found.branches)]
    >>> round(sum(shares), 6)
    1.0
    """
    for name, value in (
        ("probe_count", probe_count), ("spectrum_samples", spectrum_samples), ("spectrum_values", spectrum_values)
    ):  # fmt: skip
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    check_closed_form(model)
    if isinstance(model, Translator):
        raise ValueError(
            "a translator's layers act on source and target at once, and its operators are of two kinds; it has a "
            "closed form (closed_form), and no explanation"
        )
    batches: list[Any] = x if isinstance(x, list) else [x]
    sizes = [len(batch[0] if isinstance(batch, tuple) else batch) for batch in batches]
    if sum(sizes) < 2:
        raise ValueError(f"there are {sum(sizes)} samples; variation over inputs needs at least two")
    gathered = _Gathered(model, probe_count, seed)
    spectra: list[tuple[Tensor, Tensor]] = []  # of each batch that was looked at: (n, B, K) and (n, B)
    left = spectrum_samples
    for batch, size in zip(batches, sizes, strict=True):
        form = closed_form(model, batch)
        gathered.add(form, batch)
        if left > 0:
            spectra.append(_spectrum(_first(form, batch, model, left), spectrum_values, seed))
            left -= size
    return gathered.explanation(spectra, sum(sizes), closed_form_error(model, _cut(batches[0], CHECKED)))


class _Gathered:
    """Everything that is added up over batches."""

    def __init__(self, model: TrunkModel, probe_count: int, seed: int) -> None:
        self.model, self.probe_count, self.seed = model, probe_count, seed
        stacks = stacks_of(model.trunk)
        self.depths = [stack.depth for stack in stacks]
        self.layers = [[_Layer() for _ in range(depth)] for depth in self.depths]
        self.operators = [Variation() for _ in stacks]
        self.frozen, self.prefix = Shares(), Shares()
        self.tokens = 0

    def add(self, form: ModelForm, inputs: Any) -> None:
        """Takes up a batch."""
        B, T, _ = form.x_BTD.shape
        self.tokens = max(self.tokens, T)
        real_BT = form.real_BT if form.real_BT is not None else form.x_BTD.new_ones(B, T, dtype=torch.bool)
        for branch, layers in zip(form.trunk.branches, self.layers, strict=True):
            for block, layer in zip(branch.blocks, layers, strict=True):
                layer.add(block, real_BT)
        # The same vectors for texts of any length: the first rows of those of the longest one.
        size = (max(T, self.model.tokens), form.x_BTD.shape[2])
        z_KBTD = probes(self.probe_count, size, seed=self.seed, like=form.x_BTD)[:, :, :T].expand(-1, B, -1, -1)
        for index, variation in enumerate(self.operators):
            y_KBTD = operator_of(form, index).matvec(z_KBTD)
            variation.add(y_KBTD.transpose(0, 1), real_BT[:, None, :, None])
        self.frozen.add(frozen_parts(form), form.counted_BT)
        self.prefix.add(self._prefix_parts(form, inputs), form.counted_BT)

    def _prefix_parts(self, form: ModelForm, inputs: Any) -> Tensor:
        x_BTD = form.x_BTD
        summed = form.trunk.aggregate == "sum"  # every branch then brings x along, and no branch is nothing
        states = [torch.zeros_like(x_BTD) if summed else x_BTD]
        for delta_BTD in form.deltas:
            states.append(states[-1] + (delta_BTD + x_BTD if summed else delta_BTD))
        logits = self.model.decode(torch.stack(states), inputs)
        logits = logits.unsqueeze(-2) if form.pooled else logits
        return prefix_parts(logits[1:], logits[0])

    def explanation(self, spectra: Sequence[tuple[Tensor, Tensor]], samples: int, error: float) -> Explanation:
        """What was found."""
        values_nK = torch.cat([values for values, _ in spectra], dim=1).mean(1)
        ranks_n = torch.cat([ranks for _, ranks in spectra], dim=1).mean(1)
        constant, start, *shares = self.frozen.value()
        before, *prefix_shares = self.prefix.value()
        branches = tuple(
            BranchFacts(
                branch=index + 1,
                depth=depth,
                variation=self.operators[index].value(),
                effective_rank=float(ranks_n[index]),
                spectrum=tuple(values_nK[index].tolist()),
                share=shares[index],
                prefix_share=prefix_shares[index],
            )
            for index, depth in enumerate(self.depths)
        )
        layers = tuple(
            layer.facts(branch + 1, number + 1)
            for branch, of_branch in enumerate(self.layers)
            for number, layer in enumerate(of_branch)
        )
        trunk = self.model.trunk
        return Explanation(
            model=self.model.model_type,
            aggregate=trunk.aggregate if isinstance(trunk, Branches) else "serial",
            samples=samples,
            tokens=self.tokens,
            width=self.model.config.width,
            layers=layers,
            branches=branches,
            constant_share=constant,
            input_share=start,
            input_prefix_share=before,
            error=error,
        )


class _Layer:
    """What is gathered of a layer."""

    def __init__(self) -> None:
        self.attention, self.scale1, self.scale2, self.gates = Variation(), Variation(), Variation(), Variation()
        self.on = Variation()  # of 0 and 1: its sums count how often a unit is active

    def add(self, block: Block, real_BT: Tensor) -> None:
        """Takes up a batch."""
        self.attention.add(attention_coordinates(block), real_BT[:, None, :, None])
        self.scale1.add(_scales(block.attention_norm.operator), real_BT)
        self.scale2.add(_scales(block.mlp_norm.operator), real_BT)
        self.gates.add(block.gates_BTM, real_BT[..., None])
        self.on.add(block.gates_BTM > 0.5, real_BT[..., None])

    def facts(self, branch: int, layer: int) -> LayerFacts:
        """What was found."""
        assert self.on.count is not None
        assert self.on.sum is not None
        seen = self.on.count > 0
        often = self.on.sum[seen] / self.on.count[seen]
        return LayerFacts(
            branch=branch,
            layer=layer,
            attention=self.attention.value(),
            attention_norm=self.scale1.value(),
            mlp_norm=self.scale2.value(),
            gates=self.gates.value(),
            active=float(self.on.sum.sum() / self.on.count.sum()),
            steady=float(((often <= STEADY) | (often >= 1 - STEADY)).double().mean()),
        )


def attention_coordinates(block: Block) -> Tensor:
    """Attention's operator Σ_h A_h ⊗ O_h V_h in an orthonormal basis: H matrices (B, H, T, T) whose squares add up to
    ‖·‖²_F, and whose differences to that of a difference. The matrices O_h V_h, which depend on no input, span it.

    >>> from paradepth.nn import EncoderLayer
    >>> from paradepth.theory.block import block_form
    >>> block = block_form(EncoderLayer(8, heads=2, mlp=8).double(), torch.randn(1, 3, 8, dtype=torch.float64))
    >>> squares, wanted = attention_coordinates(block).square().sum(), block.attention.operator.dense().square().sum()
    >>> bool(torch.isclose(squares, wanted))
    True
    """
    operator = block.attention.operator
    assert isinstance(operator, Kronecker)
    a_BHTT = torch.stack([left for left, _ in operator.terms if left is not None], dim=1).double()
    m_HX = torch.stack([right.flatten() for _, right in operator.terms if right is not None]).double()
    values_H, vectors_HH = torch.linalg.eigh(m_HX @ m_HX.mT)
    root_HH = values_H.clamp(min=0).sqrt()[:, None] * vectors_HH.mT
    return torch.einsum("gh,bhts->bgts", root_HH, a_BHTT)


def _scales(operator: Operator) -> Tensor:
    """s(x) of a norm's operator, (B, T)."""
    assert isinstance(operator, Kronecker)
    left = operator.terms[0][0]
    assert left is not None
    return left.diagonal(dim1=-2, dim2=-1)


def operator_of(form: ModelForm, index: int) -> Operator:
    """What branch `index` does, L(x) − I (gated, times its gate), among the tokens that are no padding."""
    operator = form.trunk.contribution(index).operator
    if form.real_BT is None:
        return operator
    real = Diagonal(form.real_BT.to(form.x_BTD.dtype)[..., None], operator.cols)
    return real @ operator @ real


def _spectrum(form: ModelForm, count: int, seed: int) -> tuple[Tensor, Tensor]:
    values, ranks = [], []
    for index in range(len(form.trunk.branches)):
        operator, B = operator_of(form, index), len(form.x_BTD)
        found_BK = singular_values(operator, batch=B, like=form.x_BTD, count=count, seed=seed)
        values.append(F.pad(found_BK, (0, count - found_BK.shape[1])))  # a tiny operator has no more of them
        ranks.append(effective_rank(operator, batch=B, like=form.x_BTD, seed=seed))
    return torch.stack(values).double(), torch.stack(ranks).double()


def _first(form: ModelForm, inputs: Any, model: TrunkModel, count: int) -> ModelForm:
    return form if len(form.x_BTD) <= count else closed_form(model, _cut(inputs, count))


def _cut(inputs: Any, count: int) -> Any:
    return tuple(part[:count] for part in inputs) if isinstance(inputs, tuple) else inputs[:count]
