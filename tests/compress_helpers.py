"""A bench for tests: fixed samples, so that every figure can be computed by hand, and models that are small and odd."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import paradepth
from paradepth.compress import Workbench
from paradepth.train import Config
from paradepth.train.step import IGNORED
from paradepth.train.tasks import Task


class Fixed(Task):
    """A task over given samples; the same ones for training, validation and test."""

    def __init__(self, inputs: Any, targets: Tensor, *, evaluation_batch: int = 5, training_batch: int = 6) -> None:
        self.inputs, self.targets = inputs, targets
        self.data = SimpleNamespace(name="fixed")
        self.evaluation_batch, self.training_batch = evaluation_batch, training_batch

    @classmethod
    def load(cls, config: Config, **_: Any) -> Any:
        raise AssertionError

    def data_shape(self) -> dict[str, Any]:
        raise AssertionError

    def count(self, split: str) -> int:
        return len(self.targets)

    def ordered(self, split: str, start: int, stop: int) -> tuple[Any, Tensor]:
        part = slice(start, stop)
        cut = tuple(x[part] for x in self.inputs) if isinstance(self.inputs, tuple) else self.inputs[part]
        return cut, self.targets[part]

    def batches(self, world: Any) -> Any:
        return _Batches(self, self.training_batch)


class _Batches:
    """Whole batches in the order of the samples, the same in every pass."""

    def __init__(self, task: Fixed, size: int) -> None:
        self.task, self.size = task, size

    def __len__(self) -> int:
        return self.task.count("train") // self.size

    def get(self, pass_index: int, batch_index: int) -> tuple[Any, Tensor]:
        return self.task.ordered("train", batch_index * self.size, (batch_index + 1) * self.size)


def bench_for(model: Any, inputs: Any, targets: Tensor, **options: Any) -> Workbench:
    """A bench whose samples these are; `config` replaces options of the run."""
    config = Config().replace(**{"precision": "float32", "device": "cpu", **options.pop("config", {})})
    sizes = {name: options.pop(name) for name in ("evaluation_batch", "training_batch") if name in options}
    return Workbench(config, Fixed(inputs, targets, **sizes), model, **options)


def roughen(model: Any) -> Any:
    """Weights, norms and biases as far from their initial values as those of a trained model."""
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draws, dtype=parameter.dtype))
    return model


def classifier(**options: Any) -> Any:
    """A ParaFormer for 8 × 8 pixels in float64; `branches=0` makes a ViT."""
    small = {"image_size": 8, "patch_size": 4, "channels": 1, "width": 8, "heads": 2, "mlp": 12, "num_classes": 3}
    name = "paraformer_nano"
    if options.get("branches", 1) == 0:
        name, options = "vit_nano", {key: value for key, value in options.items() if key != "branches"}
    return roughen(paradepth.create_model(name, **{**small, "depth": 1, **options}).double().eval())


def images(samples: int = 12) -> tuple[Tensor, Tensor]:
    """Images for `classifier`, and their classes."""
    draws = torch.Generator().manual_seed(2)
    inputs = torch.rand(samples, 1, 8, 8, generator=draws, dtype=torch.float64)
    return inputs, torch.randint(3, (samples,), generator=draws)


def text_model(kind: str, **options: Any) -> Any:
    """A model in float64 for `texts`, of one of the kinds of `other_kinds`."""
    small: dict[str, Any] = {"width": 8, "heads": 2, "mlp": 12, "depth": 1, "branches": 3, "vocab_size": 19}
    name, own = {
        "texts": ("text_classifier_nano", {"pad": 0, "separator": 2, "context": 7, "num_classes": 3}),
        "language": ("gpt_nano", {"context": 7}),
        "translation": ("translator_nano", {"context": 9}),
    }[kind]
    return roughen(paradepth.create_model(name, **{**small, **own, **options}).double()).eval()


def texts() -> Tensor:
    """Twelve texts of seven tokens; every second one ends in two tokens of padding."""
    draws = torch.Generator().manual_seed(3)
    drawn = torch.randint(1, 19, (12, 7), generator=draws)
    drawn[::2, 5:] = 0
    return drawn


def other_kinds(**options: Any) -> dict[str, tuple[Any, Any, Tensor]]:
    """Models that are no classifiers of images, with inputs and targets, some of which do not count."""
    x = texts()
    marks = torch.where(x == 0, IGNORED, x % 3)
    return {
        "texts": (text_model("texts", **options), x, x[:, 0] % 3),
        "language": (text_model("language", **options), x, marks),
        "translation": (text_model("translation", **options), (x, x[:, :5]), marks[:, 2:]),
    }


def entropy(model: Any, inputs: Any, targets: Tensor) -> float:
    """The mean cross-entropy, by definition."""
    with torch.no_grad():
        logits = model(inputs).double()
    return float(F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED))


def weights(model: Any) -> dict[str, Tensor]:
    """A copy of everything that a model stores."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether they are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())
