"""What using a model needs of it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Model(Protocol):
    """A model in evaluation mode: a `TrunkModel`, or an exported one.

    Attributes:
        model_type: what kind it is.
        config: its shape.
    """

    model_type: Any
    config: Any

    @property
    def device(self) -> torch.device:
        """Where inputs have to be."""
        ...

    def __call__(self, inputs: Any, *, branches: int | None = None) -> Tensor:
        """Logits (B, …) of the prefix that uses the first `branches` branches."""
        ...
