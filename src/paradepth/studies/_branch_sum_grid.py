"""The grid of the study `branch_sum`: data sets with their serial stacks, and what is done with them at each size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from paradepth.studies.study import Size
from paradepth.studies.tasks import COMMON as TEXT

SERIAL, ON = "serial", "serial, trained on"
DISTANCE, MINILM_DISTANCE, MINILM = "distance to the branch sum", "MiniLM, distance", "MiniLM, converted"
AT_ONCE = "right after conversion"


@dataclass(frozen=True)
class Stacks:
    """A data set with the serial stack that is trained on it.

    Attributes:
        name: of its groups.
        serial, parallel: recipes of the stack and of branches.
        options: what both are trained with.
        depth: its layers.
        key: the measure that rows are compared by.
        branches: numbers to convert to.
        between: numbers of branches to convert to between a first and a last layer that stay in series.
        scratch: whether branches are trained from scratch, and converted ones trained further.
    """

    name: str
    serial: str
    parallel: str
    options: dict[str, Any]
    depth: int
    key: str
    branches: tuple[int, ...]
    between: tuple[int, ...] = ()
    scratch: bool = True

    def at(self, depth: int, branches: tuple[int, ...], options: dict[str, Any], *, scratch: bool = True) -> Stacks:
        """The same data with another stack; a step other than 1 becomes part of the name."""
        step = options.get("step", 1.0)
        name = self.name if step == 1.0 else f"{self.name}, h = 1/{round(1 / step)}"
        merged = {**self.options, **options}
        return replace(self, name=name, options=merged, depth=depth, branches=branches, scratch=scratch)

    @property
    def trained_on(self) -> str:
        """The group of the serial stack that is trained on."""
        return f"{self.name}, the serial stack trained on"

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """The conversions: label, and options of the measurement."""
        return {
            **{f"{n} branches": {"branches": n} for n in self.branches},
            **{f"{n} branches between serial ends": {"branches": n, "buffers": [1, 1]} for n in self.between},
        }

    @property
    def at_once(self) -> dict[str, dict[str, Any]]:
        """The conversions that nothing is trained after: of interleaved layers, and all where none is trained
        further."""
        dealt = {
            f"{n} branches, interleaved": {"branches": n, "groups": "interleaved"}
            for n in self.branches
            if n < self.depth
        }
        return dealt if self.scratch else {**self.rows, **dealt}

    @property
    def slug(self) -> str:
        """The name as part of a cell's."""
        return "-".join(self.name.lower().replace(",", "").replace("= 1/", "").split())

    @property
    def trained(self) -> str:
        """The group of what is trained from scratch."""
        return f"{self.name}, trained from scratch"

    @property
    def converted(self) -> str:
        """The group of what is converted and trained further."""
        return f"{self.name}, converted"


@dataclass(frozen=True)
class Scale:
    """What a size consists of.

    Attributes:
        sets: the data sets.
        fractions: lengths of further training, parts of the stack's own updates.
        seeds: of every row.
        sentences: options of every conversion of the encoder of sentences.
        encoder: options of its distance.
        rows: conversions of it: label and options.
        samples: of a distance.
    """

    sets: tuple[Stacks, ...]
    fractions: tuple[float, ...]
    seeds: tuple[int, ...]
    sentences: dict[str, Any]
    encoder: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    samples: int = 64


IMAGES: dict[str, Any] = {
    "patch_size": 7,
    "embedding": "linear",
    "flip": True,
    "crop_padding": 2,
    "batch_size": 64,
    "optimiser": "muon",
    "learning_rate": 2e-3,
    "weight_decay": 0.05,
    "warmup": 0.05,
    "decay": "cosine",
    "label_smoothing": 0.1,
    "ema": 0.0,
    "precision": "bf16",
    "schedule": "joint",
    "validations": 3,
}
WINDOWS: dict[str, Any] = {**TEXT, "model": "gpt_nano", "context": 64, "batch_size": 16, "schedule": "joint"}
WINDOWS |= {"step": 1.0, "buffers": [0, 0], "validations": 3}
FASHION = Stacks("Fashion-MNIST", "fashion_vit", "fashion_paraformer", IMAGES, 8, "accuracy", (2, 4, 8), (3,))
SHAKESPEARE = Stacks("Tiny Shakespeare", "shakespeare_gpt", "shakespeare_gpt", WINDOWS, 8, "loss", (2, 4, 8), (3,))
ROWS: dict[str, dict[str, Any]] = {
    "2 branches": {"branches": 2},
    "3 branches": {"branches": 3},
    "6 branches": {"branches": 6},
    "2 branches between serial ends": {"branches": 2, "buffers": [1, 1]},
    "first 3 layers alone": {"layers": 3},
    "first 2 layers alone": {"layers": 2},
    "first layer alone": {"layers": 1},
}
_TINY: dict[str, Any] = {"width": 16, "heads": 2, "mlp": 32, "batch_size": 8, "precision": "float32"}
_TINY |= {"validations": 1, "budget": "160 layer_evals"}
_AT_224: dict[str, Any] = {"image_size": 224, "patch_size": 16, "budget": "300 epochs"}
_GPT2: dict[str, Any] = {"executor": "serial", "step": 1.0, "buffers": [0, 0]}

SIZES: dict[Size, Scale] = {
    "smoke": Scale(
        sets=(replace(FASHION.at(4, (2,), _TINY), between=(2,)),),
        fractions=(0.5,),
        seeds=(0,),
        sentences={"encoder": "random", "updates": 2, "batch_size": 4, "unlabelled": 20, "probe": 20},
        encoder={"encoder": "random"},
        rows={label: ROWS[label] for label in ("2 branches between serial ends",)},
        samples=4,
    ),
    "here": Scale(
        sets=(
            FASHION.at(8, (2, 4, 8), {"budget": "300000 layer_evals"}),
            SHAKESPEARE.at(8, (2, 4, 8), {"budget": "57600 layer_evals"}),
            SHAKESPEARE.at(8, (2, 4, 8), {"budget": "57600 layer_evals", "step": 1 / 8}, scratch=False),
        ),
        fractions=(0.02, 0.05, 0.1, 0.2),
        seeds=(0, 1, 2),
        sentences={"encoder": "minilm", "updates": 100, "batch_size": 32, "unlabelled": 3200, "probe": 500},
        encoder={"encoder": "minilm"},
        rows=ROWS,
    ),
    "paper": Scale(  # 300 passes over CIFAR-10 at 224 pixels; the text is the one of layer-parallel training
        sets=(
            Stacks(
                "CIFAR-10",
                "cifar10_vit",
                "cifar10_paraformer",
                {"schedule": "joint", **_AT_224},
                8,
                "accuracy",
                (2, 4, 8),
            ),
            Stacks("OpenWebText", "gpt2_openwebtext", "gpt2_openwebtext", _GPT2, 20, "loss", (2, 4, 10), (9,)),
        ),
        fractions=(0.02, 0.05, 0.1, 0.2),
        seeds=(0, 1, 2),
        sentences={"encoder": "minilm", "updates": 5000, "batch_size": 128, "unlabelled": 60000, "probe": 5000},
        encoder={"encoder": "minilm", "samples": 256},
        rows=ROWS,
    ),
}


def shape(branches: int, depth: int) -> str:
    """The row of branches from scratch that have so many layers together."""
    return f"{branches} branches × {depth // branches}"
