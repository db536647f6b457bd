"""What `explain` finds, as plain numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class LayerFacts:
    """How a layer's operators depend on the input.

    Attributes:
        branch, layer: numbers, counted from 1.
        attention: variation of Σ_h A_h(x) ⊗ O_h V_h over the inputs.
        attention_norm, mlp_norm: variation of the norms' scales s(x).
        gates: variation of the gates Φ(z) of the MLP's units.
        active: share of (token, unit) pairs with z > 0.
        steady: share of (position, unit) pairs that are on, or off, for all but 1 % of the inputs or fewer.
    """

    branch: int
    layer: int
    attention: float
    attention_norm: float
    mlp_norm: float
    gates: float
    active: float
    steady: float


@dataclass(frozen=True)
class BranchFacts:
    """A branch's operator L(x) − I, where G(x) = L(x) x + l(x), and its part in the logits.

    Attributes:
        branch: number, counted from 1.
        depth: its layers.
        variation: of the operator over the inputs.
        effective_rank: (Σσ²)² / Σσ⁴, mean over samples.
        spectrum: the largest singular values, descending, means over samples.
        share: of the final logits, the head's scale being frozen.
        prefix_share: of the final logits, as what it changes behind the branches before it.
    """

    branch: int
    depth: int
    variation: float
    effective_rank: float
    spectrum: tuple[float, ...]
    share: float
    prefix_share: float


@dataclass(frozen=True)
class Explanation:
    """How input-dependent a model is, and what its branches do. `explain` makes it.

    A variation is √(E‖v − E v‖² / E‖v‖²) over the inputs: 0 for what is the same for all, near 1 for what has nothing
    in common.

    Attributes:
        model: its type, "image_classifier" ….
        aggregate: "residual", "sum" or "gated"; "serial" for a stack, which counts as one branch.
        samples: inputs that were looked at. tokens: T of the longest one. width: D.
        layers: facts about each layer. branches: about each branch.
        constant_share, input_share: of the logits, what the head adds whatever it reads, and what it makes of the
            trunk's input; with the branches' shares they add up to one.
        input_prefix_share: of the logits, those of prefix 0, the trunk's input alone; with the branches' prefix shares
            it adds up to one.
        error: max |closed form − model| / max |model| of the logits of the first samples, in float64.
    """

    model: str
    aggregate: str
    samples: int
    tokens: int
    width: int
    layers: tuple[LayerFacts, ...]
    branches: tuple[BranchFacts, ...]
    constant_share: float
    input_share: float
    input_prefix_share: float
    error: float

    def to_dict(self) -> dict[str, Any]:
        """The same as dicts, lists and numbers, for JSON."""
        values = dataclasses.asdict(self)
        branches = [{**branch, "spectrum": list(branch["spectrum"])} for branch in values["branches"]]
        return {**values, "layers": list(values["layers"]), "branches": branches}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`, and of JSON.

        Raises:
            ValueError: something is missing or too much.
        """
        try:
            branches = tuple(
                BranchFacts(**{**branch, "spectrum": tuple(branch["spectrum"])}) for branch in values["branches"]
            )
            layers = tuple(LayerFacts(**layer) for layer in values["layers"])
            return cls(**{**values, "layers": layers, "branches": branches})
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is no explanation: {error}") from error

    def plot(self, path: str | Path) -> Path:
        """Draws everything as one HTML page that needs nothing else; returns its path.

        Raises:
            ValueError: a path that does not end in .html, or no matplotlib and jinja2 (`pip install paradepth[train]`).
            OSError: it cannot be written.
        """
        path = Path(path)
        if path.suffix != ".html":
            raise ValueError(f"path is {path}; the plots make an HTML page, so it must end in .html")
        try:
            from paradepth.report.explanation import write_explanation
        except ModuleNotFoundError as error:
            raise ValueError(f"plots need {error.name}: pip install 'paradepth[train]'") from error
        return write_explanation(self.to_dict(), path)
