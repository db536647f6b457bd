"""The closed form of a Transformer, Σ_j α_j(x) σ(W_j(x) x + θ_j(x)), as operators that can be built, applied and
measured."""

from paradepth.theory.block import Block, Units, block_form
from paradepth.theory.branch_sum import (
    FirstGuess,
    IntervalDistance,
    OutputDistance,
    first_guess,
    interval_distances,
    output_distances,
)
from paradepth.theory.explain import explain
from paradepth.theory.explanation import BranchFacts, Explanation, LayerFacts
from paradepth.theory.model import ModelForm, check_closed_form, closed_form, closed_form_error
from paradepth.theory.operators import Affine, Diagonal, Kronecker, Operator, identity
from paradepth.theory.relax import Relaxed, layers_of, relax
from paradepth.theory.spectrum import effective_rank, singular_values
from paradepth.theory.trunk import BranchForm, TrunkForm, stack_form, trunk_form
from paradepth.theory.variation import Variation

__all__ = [
    "Affine",
    "Block",
    "BranchFacts",
    "BranchForm",
    "Diagonal",
    "Explanation",
    "FirstGuess",
    "IntervalDistance",
    "Kronecker",
    "LayerFacts",
    "ModelForm",
    "Operator",
    "OutputDistance",
    "Relaxed",
    "TrunkForm",
    "Units",
    "Variation",
    "block_form",
    "check_closed_form",
    "closed_form",
    "closed_form_error",
    "effective_rank",
    "explain",
    "first_guess",
    "identity",
    "interval_distances",
    "layers_of",
    "output_distances",
    "relax",
    "singular_values",
    "stack_form",
    "trunk_form",
]
