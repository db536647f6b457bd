"""What the inputs of each kind of model look like: names, shapes, and random ones to check an export with.

Shapes: B batch, T tokens, C channels, H, W image height and width, F numbers of a word.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

BATCH = "batch"


@dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    Attributes:
        name: of the input in an exported file.
        shape: a size, or the name of a dimension whose size is free.
        longest: largest size of the free dimension besides the batch; None where there is none.
        highest: inputs are whole numbers from 0 to this one; None where they are pixels between 0 and 1.
        pad: number that fills up short samples at their ends; None where there is none.
    """

    name: str
    shape: tuple[int | str, ...]
    longest: int | None = None
    highest: int | None = None
    pad: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        return torch.float32 if self.highest is None else torch.int64

    def described(self) -> dict[str, Any]:
        """For a file's description."""
        return {**asdict(self), "dtype": str(self.dtype).removeprefix("torch.")}

    def check(self, tensor: Tensor) -> None:
        """Refuses a tensor that is no such input.

        Raises:
            ValueError: another shape or another kind of numbers, or numbers out of range.
        """
        fitting = tensor.dim() == len(self.shape) and all(
            1 <= size <= (self.longest if self.longest and name != BATCH else size)
            if isinstance(name, str)
            else size == name
            for size, name in zip(tensor.shape, self.shape)
        )
        if not fitting:
            limit = "" if self.longest is None else f" with at most {self.longest} {self.shape[1]}"
            raise ValueError(f"{self.name} have shape {tuple(tensor.shape)}; this file takes {self.shape}{limit}")
        if tensor.is_floating_point() != (self.highest is None) or tensor.dtype == torch.bool:
            kind = "whole numbers" if self.highest is not None else "floating-point pixels between 0 and 1"
            raise ValueError(f"{self.name} are {tensor.dtype}; this file takes {kind}")
        if self.highest is not None:
            low, high = (int(value) for value in tensor.aminmax())
            if low < 0 or high > self.highest:
                raise ValueError(f"{self.name} run from {low} to {high}; this file takes 0 to {self.highest}")

    def sample(self, batch: int, length: int, generator: torch.Generator) -> Tensor:
        """A random input; rows behind the first are padded here and there.

        >>> InputSpec("tokens", ("batch", "tokens"), 8, 99, pad=0).sample(3, 5, torch.Generator()).shape
        torch.Size([3, 5])
        """
        sizes = [size if isinstance(size, int) else batch if size == BATCH else length for size in self.shape]
        if self.highest is None:
            return torch.rand(sizes, generator=generator)
        numbers = torch.randint(self.highest + 1 - (self.pad is not None), sizes, generator=generator)
        if self.pad is not None:
            numbers += numbers >= self.pad  # none of them is padding
            for row in range(1, batch):
                numbers[row, int(torch.randint(1, length + 1, (), generator=generator)) :] = self.pad
        return numbers


def _texts(c: Any) -> tuple[InputSpec, ...]:
    return (InputSpec("tokens", (BATCH, "tokens"), c.context, c.vocab_size - 1, c.pad),)


_INPUTS: dict[str, Callable[[Any], tuple[InputSpec, ...]]] = {
    "image_classifier": lambda c: (InputSpec("images", (BATCH, c.channels, *c.image_size)),),
    "causal_lm": lambda c: (InputSpec("tokens", (BATCH, "tokens"), c.context, c.vocab_size - 1),),
    "masked_lm": _texts,
    "sequence_classifier": _texts,
    "hf_classifier": lambda c: (InputSpec("tokens", (BATCH, "tokens"), c.context, c.hf["vocab_size"] - 1, c.pad),),
    "tagger": lambda c: (InputSpec("words", (BATCH, "words", c.features), c.context, c.vocab_size - 1, c.pad),),
    "translator": lambda c: (
        InputSpec("source", (BATCH, "source_tokens"), c.context, c.vocab_size - 1, c.pad),
        InputSpec("target", (BATCH, "target_tokens"), c.context, c.vocab_size - 1),
    ),
}


def input_specs(model_type: str, config: Any) -> tuple[InputSpec, ...]:
    """The inputs of a kind of model, in order.

    Args:
        model_type: of the model.
        config: of the model.

    Raises:
        ValueError: a kind of model that cannot be exported.

    >>> from paradepth.models import ImageClassifierConfig
    >>> [spec.shape for spec in input_specs("image_classifier", ImageClassifierConfig(image_size=28, channels=1))]
    [('batch', 1, 28, 28)]
    """
    if model_type not in _INPUTS:
        raise ValueError(f"a model of type {model_type!r} cannot be exported; {', '.join(sorted(_INPUTS))} can")
    return _INPUTS[model_type](config)
