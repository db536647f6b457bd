"""The function that an exported file holds: a model with its number of branches fixed, or with one output for each
prefix.

    branches=k      inputs ─► stem ─► branches 1 … k ─► Σ ─► head ─► logits
    prefixes        inputs ─► stem ─┬► branch 1 ─► + ─┬► head ─► logits_1
                                    ├► branch 2 ─► + ─┼► head ─► logits_2          logits_k needs branches 1 … k only
                                    └► …              └► …

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from paradepth.branches import Branches, Loop
from paradepth.export.inputs import BATCH, InputSpec, input_specs
from paradepth.export.quiet import quiet
from paradepth.models.base import TrunkModel
from paradepth.models.pretrained import build_model, config_dict
from paradepth.models.quantised import float_weights


class Logits(nn.Module):
    """A model as a function of tensors alone.

    Args:
        model: a model.
        prefixes: return the logits of every prefix, not those of the whole model.
    """

    def __init__(self, model: TrunkModel, *, prefixes: bool) -> None:
        super().__init__()
        self.model = model
        self.prefixes = prefixes

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Logits (B, …), one tensor for each output."""
        given: Any = inputs[0] if len(inputs) == 1 else inputs
        if not self.prefixes:
            return (self.model(given),)
        x, sides = self.model.embed(given)
        assert isinstance(self.model.trunk, Branches)
        return tuple(self.model.decode(state, given) for state in self.model.trunk.each_prefix(x, *sides))


@dataclass(frozen=True)
class Graph:
    """What is exported.

    Attributes:
        module: in evaluation mode, in float32, on the CPU, every branch and every layer evaluated on its own.
        inputs: in order.
        outputs: names, in order: "logits", or "logits_1" … "logits_n".
    """

    module: Logits
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]

    @property
    def model(self) -> TrunkModel:
        """The model inside."""
        return self.module.model

    def sample(self, batch: int, *, share: float = 1.0, seed: int = 0) -> tuple[Tensor, ...]:
        """Random inputs of the real shape, of `share` of the longest length, at least 1."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(spec.sample(batch, max(1, round(share * (spec.longest or 1))), generator) for spec in self.inputs)

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        """For each input its free dimensions."""
        batch = Dim(BATCH, min=1)
        return tuple(
            {
                place: batch if name == BATCH else Dim(name, min=1, max=spec.longest)
                for place, name in enumerate(spec.shape)
                if isinstance(name, str)
            }
            for spec in self.inputs
        )

    @torch.no_grad()
    def program(self) -> ExportedProgram:
        """The graph by `torch.export`, with the free dimensions free."""
        with quiet():
            # A batch of 3 with 5 tokens, say: sizes of 0 and 1 are special to a tracer.
            example = tuple(
                spec.sample(3, min(5, spec.longest or 5), torch.Generator().manual_seed(0)) for spec in self.inputs
            )
            return torch.export.export(self.module, example, dynamic_shapes=(self.dynamic_shapes(),))

    @torch.no_grad()
    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What PyTorch makes of inputs: the reference."""
        return self.module(*inputs)


def build_graph(model: TrunkModel, *, branches: int | None = None, prefixes: bool = False) -> Graph:
    """The graph of a model, which is left alone: the graph has a copy of its weights. Of a quantised model these are
    the numbers in float32 that its integers stand for.

    Args:
        model: any registered model, of any dtype, on any device, with any executors.
        branches: use the first branches only (default: all); a serial stack counts as one.
        prefixes: one output for each prefix, up to `branches`.

    Raises:
        ValueError: branches or prefixes that the model does not have, or a kind of model that cannot be exported, such
            as one quantised by int8_dynamic.

    >>> import paradepth
    >>> model = paradepth.create_model("paraformer_nano", image_size=8, patch_size=4, branches=3, depth=1)
    >>> build_graph(model, prefixes=True).outputs, build_graph(model, branches=2).outputs
    (('logits_1', 'logits_2', 'logits_3'), ('logits',))
    """
    inputs = input_specs(model.model_type, model.config)
    if branches is not None and not 1 <= branches <= model.prefixes:
        raise ValueError(f"branches is {branches}; this model has {model.prefixes}, and at least 1 is needed")
    if prefixes and not isinstance(model.trunk, Branches):
        raise ValueError("prefixes are of a model with branches, and this one is a serial stack; export it without")
    if branches is not None and model.config.branches:
        model = model.truncate(branches)
    weights = float_weights(model)
    with torch.random.fork_rng(devices=[]):  # its fresh weights are overwritten
        plain = build_model(config_dict(model))
    plain.load_state_dict(weights)
    if isinstance(plain.trunk, Branches):
        plain.trunk.executor = Loop()  # the branches side by side in the graph, for the runtime to schedule
    plain = plain.to(device="cpu", dtype=torch.float32).eval().requires_grad_(False)
    outputs = tuple(f"logits_{k}" for k in range(1, plain.prefixes + 1)) if prefixes else ("logits",)
    return Graph(Logits(plain, prefixes=prefixes), inputs, outputs)
