"""The closed form of a whole model: stem, trunk and head.

Shapes: B batch, T tokens, P places, D width, N logits of a token, … the shape of one sample's logits.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from paradepth.models import TrunkModel
from paradepth.models.encoder import EncoderModel
from paradepth.models.masked_lm import MaskedLM
from paradepth.models.translator import Translator
from paradepth.theory.block import Units
from paradepth.theory.ends import head_map, stem_map
from paradepth.theory.operators import Affine, Kronecker
from paradepth.theory.parts import check_no_dropout
from paradepth.theory.trunk import TrunkForm, trunk_form


@dataclass(frozen=True)
class ModelForm:
    """A model at a batch of inputs.

    Attributes:
        x_BTD: X_0, the embedded inputs, which the trunk takes; of a translator source and target, one behind the other.
        trunk: its closed form.
        head: the head at the trunk's state.
        real_BT: which tokens are no padding; None where all are.
        stem: the stem as an affine map, and what it is applied to; None where it is no such map.
        pooled: whether a sample has one row of logits, not one for each token.
        counted_BT: which rows of logits are of tokens that are no padding; None where all count.
        deltas: what each branch adds to X_0, from its closed form, (B, T, D).
        state: the trunk's state from them, (B, T, D).
    """

    x_BTD: Tensor
    trunk: TrunkForm
    head: Affine
    real_BT: Tensor | None
    stem: tuple[Affine, Tensor] | None
    pooled: bool
    counted_BT: Tensor | None
    deltas: tuple[Tensor, ...]
    state: Tensor

    def logits(self) -> Tensor:
        """The model's logits, evaluated from the operators, (B, …)."""
        return self._shaped(self.head(self.state))

    def units(self) -> Units:
        """The model as one sum over hidden units, from pixels or one-hot tokens (from X_0 where the stem is no affine
        map) to logits, in explicit matrices.

        Raises:
            ValueError: too many entries for explicit matrices.
        """
        return self.trunk.units(reads=None if self.stem is None else self.stem[0], head=self.head)

    @property
    def read(self) -> Tensor:
        """What `units` are applied to: (B, 1, pixels), one-hot tokens (B, T, V), or X_0."""
        return self.x_BTD if self.stem is None else self.stem[1]

    def _shaped(self, logits: Tensor) -> Tensor:
        return logits.squeeze(-2) if self.pooled else logits


def check_closed_form(model: Any) -> None:
    """Refuses a model that has no closed form here.

    Raises:
        ValueError: no model of this package with a trunk of `EncoderLayer`s, a quantised one, one in training mode with
            dropout, or one whose trunk is shared between processes.
    """
    if not isinstance(model, TrunkModel):
        raise ValueError(f"this is a {type(model).__name__}; the closed form is of models of paradepth.models")
    if model.model_type == "hf_classifier":
        raise ValueError(
            "the layers of an encoder of the transformers library are its own, and the closed form is of EncoderLayer: "
            "models of images, language models, encoders, taggers, translators"
        )
    if model.quantisation is not None:
        raise ValueError(
            f"the model is quantised ({model.quantisation.method}); take the one in floating point that it is made from"
        )
    model.check_whole()
    check_no_dropout(model)


@torch.no_grad()
def closed_form(model: TrunkModel, inputs: Any, *, branches: int | None = None) -> ModelForm:
    """The closed form of a model at a batch of inputs: operators computed from its weights and these inputs.

    Nothing of the trunk and of the head is evaluated by the modules themselves, so `logits` of the result against
    `model(inputs)` is a test of the equations (`closed_form_error`).

    Args:
        model: in evaluation mode; in float64 for a comparison.
        inputs: what the model takes, a batch.
        branches: use the first branches only (default: all).

    Raises:
        ValueError: a model that has no closed form here, or a number of branches that it does not have.

    Source: Dynamic Universal Approximation Theory (arXiv 2407.21670); derivation and conventions in docs/theory.md.

    >>> from paradepth import create_model
    >>> shape = {"image_size": 4, "patch_size": 2, "channels": 1, "width": 8, "heads": 2, "mlp": 16}
    >>> model = create_model("paraformer_nano", **shape, branches=2, depth=1).double().eval()
    >>> form = closed_form(model, torch.rand(3, 1, 4, 4, dtype=torch.float64))
    >>> units = form.units()
    >>> units.weight.shape, units(form.read).shape
    (torch.Size([3, 208, 16]), torch.Size([3, 10]))
    >>> bool(torch.allclose(units(form.read), form.logits(), atol=1e-12))
    True
    """
    check_closed_form(model)
    x, sides = model.embed(inputs)
    trunk = trunk_form(model.trunk, x, *sides, branches=branches)
    x_BTD = torch.cat(x, dim=1) if isinstance(x, tuple) else x
    deltas = tuple(trunk.deltas(x_BTD))
    state_BTD = trunk.state(x_BTD, deltas)
    real_BT = sides[0][:, 0, 0].expand(x_BTD.shape[:2]) if isinstance(model, EncoderModel) else None
    counted_BT = real_BT
    if isinstance(inputs, tuple) and isinstance(model, MaskedLM | Translator):
        # The head reads the tokens at some places, or the target's behind the source's.
        counted_BT = None
        T, D = x_BTD.shape[1:]
        places = inputs[1] if isinstance(model, MaskedLM) else torch.arange(inputs[0].shape[1], T, device=x_BTD.device)
        picked_PT = F.one_hot(places, T).to(x_BTD.dtype)
        P = picked_PT.shape[-2]
        pick = Affine(Kronecker([(picked_PT, None)], cols=(T, D), rows=(P, D)), x_BTD.new_zeros(P, D))
        head = head_map(model.head, pick(state_BTD)).after(pick)
    else:
        head = head_map(model.head, state_BTD, real_BT=real_BT)
    pooled = model.model_type in ("image_classifier", "sequence_classifier")
    stem = stem_map(model.stem, inputs, x_BTD)
    counted_BT = None if pooled else counted_BT
    return ModelForm(x_BTD, trunk, head, real_BT, stem, pooled, counted_BT, deltas, state_BTD)


@torch.no_grad()
def closed_form_error(model: TrunkModel, inputs: Any, *, units: bool = False) -> float:
    """How far the closed form is from the model, both in float64: max |difference of logits| / max |logits|.

    Args:
        model: left alone; a copy in float64 is compared.
        inputs: a batch.
        units: whether the sum over hidden units, in explicit matrices, is evaluated, and not the composition of blocks.

    Raises:
        ValueError: as of `closed_form`; with `units`, too many entries for explicit matrices.

    >>> from paradepth import create_model
    >>> model = create_model("gpt_nano", depth=2, context=8).eval()
    >>> closed_form_error(model, torch.randint(256, (2, 8))) < 1e-10
    True
    """
    check_closed_form(model)
    double = copy.deepcopy(model).double()
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        inputs = inputs.double()
    form, wanted = closed_form(double, inputs), double(inputs)
    found = form.units()(form.read).view_as(wanted) if units else form.logits()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=torch.finfo(torch.float64).tiny))
