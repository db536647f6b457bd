"""Sequences made by a rule to their answers.

Shapes: B sequences, T tokens, M targets, N tokens of the vocabulary, n prefixes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from paradepth.data.synthetic import HELD_OUT, PASS, SEQUENCE_NAMES, SequenceData
from paradepth.data.tokenizer import ByteTokenizer
from paradepth.distributed import World
from paradepth.models import CausalLM
from paradepth.train.config import Config
from paradepth.train.step import IGNORED
from paradepth.train.tasks.base import Task

_DEFAULT_LENGTH = 8
_EVALUATED_TOKENS = 2**15  # at a time
_EXAMPLES = 12


class SequenceTask(Task):
    """Predicts the answers of sequences of `paradepth.data.synthetic`; the tokens before them are read and no more.

    A pass has 16,384 sequences, and the next one others. Besides the accuracy over answers there is `exact_accuracy`,
    the share of sequences whose answers are all right. An answer is predicted from the true ones before it; where all
    are right, they are what the model would have written by itself.

    Raises:
        ValueError: also for a length out of range, or options that generated sequences have no use for.
    """

    model_class = CausalLM
    data_names: ClassVar[tuple[str, ...]] = SEQUENCE_NAMES
    kind = "generated sequences"
    own_options = ("length",)
    score_names = ("exact_accuracy",)
    tally_size = 2
    unit = "sequences"

    data: SequenceData

    def __init__(self, config: Config, data: SequenceData) -> None:
        context = config.model_options.context
        if context not in (None, data.tokens):
            raise ValueError(
                f"context is {context}; sequences of {data.name} of length {data.length} have {data.tokens} tokens, "
                "which is the context; leave it out"
            )
        super().__init__(config.replace(context=None), data)
        self.config = config
        self.tokenizer = ByteTokenizer()
        self.evaluation_batch = max(1, _EVALUATED_TOKENS // data.tokens)

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        fraction = config.data_options.train_fraction
        if fraction != 1.0:
            raise ValueError(
                f"train_fraction is {fraction}; generated sequences have no end, so there is no part of them"
            )

    @classmethod
    def load(cls, config: Config, *, assets: Path | None = None) -> Self:
        d = config.data_options
        length = _DEFAULT_LENGTH if d.length is None else d.length
        return cls(config, SequenceData(d.data, length, seed=config.run_options.seed))

    def save_assets(self, folder: Path) -> None:
        self.tokenizer.save(folder)

    def data_shape(self) -> dict[str, Any]:
        return {"vocab_size": ByteTokenizer().vocab_size, "context": self.data.tokens}

    def count(self, split: str) -> int:
        return PASS if split == "train" else HELD_OUT

    def batches(self, world: World) -> _Batches:
        return _Batches(self.data, self.config.optimiser_options.batch_size, world)

    # ---- evaluation ----------------------------------------------------------------------------------------

    def ordered(self, split: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        if split == "train":
            stop = min(stop, PASS)
            return _asked(*self.data.training(0, start, max(stop - start, 0)))
        return _asked(*self.data.held_out(split, start, stop))

    def tally(self, logits_nMN: Tensor, targets_M: Tensor) -> Tensor:
        """Sequences, and those all of whose answers are right."""
        right_nM = (logits_nMN.argmax(dim=-1) == targets_M) | (targets_M == IGNORED)
        exact_nB = right_nM.unflatten(1, (-1, self.data.tokens)).all(dim=2)
        count_n = torch.full((len(exact_nB),), exact_nB.shape[1], dtype=torch.float64, device=exact_nB.device)
        return torch.stack([count_n, exact_nB.sum(dim=1).double()], dim=1)

    def scores(self, tally_nK: Tensor) -> dict[str, list[float]]:
        """Share of sequences all of whose answers are right."""
        return {"exact_accuracy": (tally_nK[:, 1] / tally_nK[:, 0].clamp(min=1)).tolist()}

    def details(self, model: CausalLM, split: str) -> dict[str, Any]:
        """Means by prefix, and the first sequences with what the full model answers."""
        return {**super().details(model, split), "examples": self._examples(model, split)}

    @torch.no_grad()
    def _examples(self, model: CausalLM, split: str) -> list[dict[str, str]]:
        was_training = model.training
        inputs_BT, targets_BT = self.ordered(split, 0, _EXAMPLES)
        predicted_BT = model.eval()(inputs_BT).argmax(dim=-1)
        model.train(was_training)
        examples = []
        for tokens_T, targets_T, predicted_T in zip(inputs_BT, targets_BT, predicted_BT, strict=True):
            asked_T = targets_T != IGNORED
            told = {"sequence": tokens_T, "answers": targets_T[asked_T], "predicted": predicted_T[asked_T]}
            examples.append({key: self.tokenizer.decode(value.tolist()) for key, value in told.items()})
        return examples


class _Batches:
    """Training batches of one process: its share of each."""

    def __init__(self, data: SequenceData, batch_size: int, world: World) -> None:
        self.data, self.batch_size, self.world = data, batch_size, world

    def __len__(self) -> int:
        return PASS // self.batch_size

    def get(self, pass_index: int, batch_index: int) -> tuple[Tensor, Tensor]:
        inputs_BT, targets_BT = _asked(*self.data.training(pass_index, batch_index, self.batch_size))
        rank, size = self.world.rank, self.world.size
        return inputs_BT.tensor_split(size)[rank], targets_BT.tensor_split(size)[rank]


def _asked(inputs_BT: Tensor, tokens_BT: Tensor, answer_T: Tensor) -> tuple[Tensor, Tensor]:
    return inputs_BT, tokens_BT.masked_fill(~answer_T, IGNORED)
